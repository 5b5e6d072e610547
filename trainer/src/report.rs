//! `report.html`: what a run did, on one page that opens anywhere.
//!
//! Takes the settings, the judged candidates and the lines of `metrics.jsonl`, and gives an HTML
//! text that needs nothing beside it: curves as SVG, the policy as a picture, results as tables.
//! Equal runs give equal pages.

use std::fmt::Write as _;

use plotters::prelude::*;
use snn_schemas::Policy;

use crate::candidate::Source;
use crate::compare::{SamplerName, Trial};
use crate::config::Config;
use crate::data::Data;
use crate::error::TrainError;
use crate::metrics::Line;
use crate::progress::Stage;
use crate::run::Judged;

/// Width and height of a curve, in pixels.
const CURVE: (u32, u32) = (460, 240);
/// Points of a curve past which it is averaged: more cannot be told apart on the page.
const POINTS: usize = 400;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:1em 0}th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}\
th:first-child,td:first-child{text-align:left}.curves{display:flex;flex-wrap:wrap;gap:12px}h2{margin-top:2em}\
code{background:#f4f4f4;padding:0 .3em}.note{color:#666}";

/// Draws the page.
pub(crate) fn page(
    config: &Config,
    data: &Data,
    judged: &[Judged],
    lines: &[Line],
) -> Result<String, TrainError> {
    let mut html = String::new();
    let net = &config.net;
    let title = format!(
        "{} on {}",
        if net.groups > 1 {
            format!("Sep-ResNeXt-{} (G = {})", net.depth, net.groups)
        } else {
            format!("ResNeXt-{}", net.depth)
        },
        data.name
    );
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    let _ = writeln!(
        html,
        "<p>{}×{}d, trunk {}, α = {}, {} on the wire. {} training, {} validation and {} test images. Seed {}.</p>",
        net.cardinality,
        net.path_width,
        net.trunk_width,
        config.exchange.staleness,
        config.exchange.dtype,
        data.train.len(),
        data.validation.len(),
        data.test.len(),
        config.seed
    );
    html.push_str(&results(config, judged));
    if let Some(searched) = judged.iter().find(|judged| judged.candidate.source == Source::Searched)
    {
        html.push_str("<h2>The policy</h2>\n");
        html.push_str(&picture(&searched.policy));
        html.push_str(&steps(&searched.policy));
    }
    html.push_str(&curves(lines)?);
    html.push_str("</body></html>\n");
    Ok(html)
}

/// A page on what samplers did: rewards step by step, averaged over seeds, and what they found.
pub(crate) fn comparison(trials: &[Trial]) -> Result<String, TrainError> {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Samplers</title><style>{STYLE}</style></head><body>\n<h1>Samplers on the same weights</h1>\n<table><tr><th>sampler</th><th>seeds</th><th>last tenth of the rewards</th><th>mean of the samples</th><th>best</th></tr>\n"
    );
    let mut curves = Vec::new();
    for sampler in SamplerName::ALL {
        let of = || trials.iter().filter(move |trial| trial.sampler == sampler);
        let count = of().count().max(1) as f64;
        let mean = |value: &dyn Fn(&Trial) -> f64| of().map(value).sum::<f64>() / count;
        let steps = of().map(|trial| trial.rewards.len()).min().unwrap_or(0);
        let step = |at: usize| (at as f64 + 1.0, mean(&|trial| trial.rewards[at]));
        let curve: Vec<(f64, f64)> = (0..steps).map(step).collect();
        let last = &curve[steps - steps.div_ceil(10).min(steps)..];
        let late = last.iter().map(|point| point.1).sum::<f64>() / last.len().max(1) as f64;
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{count}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            sampler.name(),
            percent(late),
            percent(mean(&|trial| trial.mean)),
            percent(mean(&|trial| trial.best)),
        );
        curves.push((sampler.name(), smooth(&curve)));
    }
    html.push_str("</table>\n<p class=\"note\">Accuracies on validation images, means over seeds; curves are running means over a twentieth of the steps.</p>\n");
    let mut svg = String::new();
    draw_all(&mut svg, &curves).map_err(|error| TrainError::Report(error.to_string()))?;
    Ok(html + &svg + "</body></html>\n")
}

/// Running means over a twentieth of the points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() / 20).max(1);
    let mean = |part: &[(f64, f64)]| {
        let sum: f64 = part.iter().map(|point| point.1).sum();
        (part[part.len() - 1].0, sum / part.len() as f64)
    };
    points.windows(window).map(mean).collect()
}

fn draw_all(
    svg: &mut String,
    curves: &[(&str, Vec<(f64, f64)>)],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (900, 420)).into_drawing_area();
    area.fill(&WHITE)?;
    let all = || curves.iter().flat_map(|(_, points)| points);
    let most = all().map(|point| point.0).fold(1.0, f64::max);
    let low = all().map(|point| point.1).fold(f64::INFINITY, f64::min).min(1.0);
    let high = all().map(|point| point.1).fold(low + 0.01, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(56)
        .build_cartesian_2d(1.0..most, low..high)?;
    chart.configure_mesh().x_desc("step").y_desc("reward").light_line_style(WHITE).draw()?;
    for (index, (name, points)) in curves.iter().enumerate() {
        let style = ShapeStyle::from(&Palette99::pick(index)).stroke_width(2);
        let line = LineSeries::new(points.iter().copied(), style);
        let key = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style);
        chart.draw_series(line)?.label(*name).legend(key);
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

fn percent(fraction: f64) -> String {
    format!("{:.2} %", 100.0 * fraction)
}

fn results(config: &Config, judged: &[Judged]) -> String {
    let mut html = String::from(
        "<h2>Results</h2>\n<table><tr><th>policy</th><th>validation</th><th>test</th><th>paper cost</th><th>wire</th><th>bytes an image</th></tr>\n",
    );
    for judged in judged {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            judged.candidate.name,
            percent(judged.validation.accuracy()),
            percent(judged.test.accuracy()),
            percent(judged.policy.paper_cost(config.net.blocks())),
            percent(judged.wire.fraction()),
            judged.wire.bytes,
        );
    }
    html.push_str("</table>\n<p class=\"note\">All start from the same shared weights and are fine-tuned alike, each under its own policy. \
Policies were chosen on validation images; the test images were judged once, at the end. Paper cost: sends against a ring all-reduce after every block.</p>\n");
    html
}

/// Groups as lanes, steps as columns, an arrow where a group sends to another.
fn picture(policy: &Policy) -> String {
    let (lane, column, left) = (44, 96, 60);
    let width = left + column * policy.steps.len() + 10;
    let height = lane * policy.groups + 30;
    let y = |group: usize| 24 + lane * group + lane / 2;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"system-ui,sans-serif\" font-size=\"13\">\
<defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#1f6feb\"/></marker></defs>\n"
    );
    for group in 0..policy.groups {
        let at = y(group);
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{}\">g{group}</text><line x1=\"{left}\" x2=\"{width}\" y1=\"{at}\" y2=\"{at}\" stroke=\"#ccc\"/>",
            at + 4
        );
    }
    for (index, step) in policy.steps.iter().enumerate() {
        let from = left + column * index + 14;
        let to = from + column - 28;
        let percent = policy.levels.percent(step.level);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"14\" text-anchor=\"middle\">t{index} · {percent}%</text>",
            (from + to) / 2
        );
        for (source, destination) in step.decision.sends() {
            let _ = writeln!(
                svg,
                "<line x1=\"{from}\" y1=\"{}\" x2=\"{to}\" y2=\"{}\" stroke=\"#1f6feb\" stroke-width=\"{:.1}\" marker-end=\"url(#head)\"/>",
                y(source),
                y(destination),
                0.8 + percent / 80.0
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn steps(policy: &Policy) -> String {
    let mut html = String::from(
        "<table><tr><th>step</th><th>decision</th><th>sends to</th><th>level</th><th>sent</th></tr>\n",
    );
    for (index, step) in policy.steps.iter().enumerate() {
        let _ = writeln!(
            html,
            "<tr><td>t{index}</td><td>{}</td><td><code>{:?}</code></td><td>{}</td><td>{} %</td></tr>",
            step.decision.id(),
            step.decision.send_to(),
            step.level,
            policy.levels.percent(step.level)
        );
    }
    html.push_str("</table>\n");
    html
}

fn curves(lines: &[Line]) -> Result<String, TrainError> {
    let pick = |stage: Stage, value: fn(&Line) -> Option<f64>| -> Vec<(f64, f64)> {
        let of_stage = lines.iter().filter(|line| line.stage == stage);
        of_stage.filter_map(|line| Some((line.number as f64, value(line)?))).collect()
    };
    let groups = [
        ("Stage 1: loss", "epoch", pick(Stage::Train, |line| line.loss)),
        (
            "Stage 1: accuracy while training",
            "epoch",
            pick(Stage::Train, |line| line.train_accuracy),
        ),
        ("Stage 2: reward", "step", pick(Stage::Search, |line| line.validation_accuracy)),
        ("Stage 2: entropy of the controller", "step", pick(Stage::Search, |line| line.entropy)),
    ];
    let mut html = String::from("<h2>Curves</h2>\n<div class=\"curves\">\n");
    for (title, axis, points) in groups {
        if points.len() > 1 {
            html.push_str(&curve(title, axis, &thin(&points))?);
        }
    }
    html.push_str("</div>\n");
    Ok(html)
}

/// Averages neighbours until no more than [`POINTS`] are left.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    let mean = |chunk: &[(f64, f64)]| {
        let count = chunk.len() as f64;
        let sum = chunk.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(each).map(mean).collect()
}

fn curve(title: &str, axis: &str, points: &[(f64, f64)]) -> Result<String, TrainError> {
    let mut svg = String::new();
    draw(&mut svg, title, axis, points).map_err(|error| TrainError::Report(error.to_string()))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    title: &str,
    axis: &str,
    points: &[(f64, f64)],
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, CURVE).into_drawing_area();
    area.fill(&WHITE)?;
    let bounds = |value: fn(&(f64, f64)) -> f64| {
        let low = points.iter().map(value).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(value).fold(f64::NEG_INFINITY, f64::max);
        // A flat curve still needs an axis of some length.
        if high > low { low..high } else { low - 0.5..high + 0.5 }
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(bounds(|point| point.0), bounds(|point| point.1))?;
    chart.configure_mesh().x_desc(axis).x_labels(6).y_labels(6).light_line_style(WHITE).draw()?;
    let style = ShapeStyle::from(&RGBColor(31, 111, 235)).stroke_width(2);
    chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_points_are_averaged() {
        let points: Vec<(f64, f64)> = (0..1000).map(|x| (f64::from(x), f64::from(x % 2))).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 334);
        assert_eq!(thinned[0], (1.0, 1.0 / 3.0));
        assert_eq!(thin(&points[..3]), points[..3]);
    }

    #[test]
    fn a_policy_is_drawn_with_an_arrow_a_send() {
        let policy = Policy::from_json(
            br#"{"version":1,"groups":4,"staleness":2,"decisions":[[7,4],0,12]}"#,
        )
        .unwrap();
        let svg = picture(&policy);
        assert_eq!(svg.matches("marker-end").count(), 4 + 3);
        assert!(svg.contains("t0 · 75%") && svg.contains(">g3</text>"));
    }
}
