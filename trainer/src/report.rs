//! `report.html`: what a run did, on one page that opens anywhere.
//!
//! Takes the settings, the judged candidates and the lines of `metrics.jsonl`, and gives an HTML
//! text that needs nothing beside it: results as tables, policies as pictures, curves and heat-maps as
//! SVG, in light or dark as the reader's system is. Equal runs give equal pages. While a run goes on
//! the page has what there is, says how far the run is, and loads itself anew.

mod charts;
mod picture;
mod sampled;
mod tables;

use std::borrow::Cow;
use std::fmt::Write as _;

use self::charts::{Chart, Curve};
use crate::candidate::Source;
use crate::compare::{SamplerName, Trial};
use crate::config::Config;
use crate::data::Data;
use crate::error::TrainError;
use crate::metrics::Line;
use crate::progress::{Report, Stage};
use crate::run::Judged;

/// Width and height of a curve, in pixels: two fit side by side.
const CURVE: (u32, u32) = (470, 250);
/// Of those that set samplers side by side, as wide as the page.
const COMPARED: (u32, u32) = (940, 420);

/// Charts are drawn in black, which stands for the colour of the page's own writing.
const STYLE: &str = ":root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--faint:#5f6a76;--line:#d5d9de;--blue:#1f6feb;--red:#c62828}\
@media(prefers-color-scheme:dark){:root{--paper:#11151a;--ink:#e4e8ed;--faint:#9aa5b1;--line:#363e48;--blue:#6ea8fe;--red:#ff8a80}}\
body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper)}\
table{border-collapse:collapse;margin:1em 0}th,td{padding:.3em .8em;border-bottom:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}\
th{border-bottom-width:2px}th:first-child,td:first-child,th.left,td.left{text-align:left}\
.wide{overflow-x:auto}.stack{display:flex;flex-direction:column}th{white-space:nowrap}.curves{display:flex;flex-wrap:wrap;gap:12px}h2{margin-top:2em}h3{margin:1.5em 0 .5em}.note{color:var(--faint);font-size:.9em}\
.intensive{color:var(--red)}svg text{fill:var(--ink)}svg .lane{stroke:var(--line)}svg .send{stroke:var(--blue)}svg .head{fill:var(--blue)}\
svg [fill=\"#000000\"]{fill:var(--ink)}svg [stroke=\"#000000\"]{stroke:var(--faint)}";

/// Makes a browser load the page again, as often as it is drawn anew.
const RELOAD: &str = "<meta http-equiv=\"refresh\" content=\"10\">";

/// Draws the page of a finished run.
pub(crate) fn page(
    config: &Config,
    data: &Data,
    judged: &[Judged],
    lines: &[Line],
) -> Result<String, TrainError> {
    let mut html = opening(config, data, "");
    html += &tables::tables(config, &escaped(&data.name), judged)?;
    html += &pictures(judged);
    Ok(html + &figures(config, lines)?)
}

/// Draws the page of a run that is as far as `told`.
pub(crate) fn running(
    config: &Config,
    data: &Data,
    told: &Report,
    lines: &[Line],
) -> Result<String, TrainError> {
    let Report { stage, round, done, total, .. } = told;
    let mut html = opening(config, data, RELOAD);
    let rounds = config.search.rounds;
    let _ = write!(html, "<p>Not finished: {stage}, round {round} of {rounds}, {done} of {total}");
    if let Some(left) = told.time_left() {
        let _ = write!(html, "; {left} left in all when this was drawn");
    }
    html.push_str(".</p>\n");
    Ok(html + &figures(config, lines)?)
}

/// What both begin with; `extra` goes into the page's head.
fn opening(config: &Config, data: &Data, extra: &str) -> String {
    let net = &config.net;
    let mut html = head(&format!("{} on {}", net.title(), escaped(&data.name)), extra);
    let _ = writeln!(
        html,
        "<p>{}×{}d, trunk {}, G = {}, α = {}, {} on the wire. {} training, {} validation and {} test images. Seed {}.</p>",
        net.cardinality,
        net.path_width,
        net.trunk_width,
        net.groups,
        config.exchange.staleness,
        config.exchange.dtype,
        data.train.len(),
        data.validation.len(),
        data.test.len(),
        config.seed
    );
    if let Some(left_out) = data.left_out() {
        let _ = writeln!(html, "<p class=\"note\">{}.</p>", escaped(&left_out));
    }
    html
}

/// What both end with: heat-maps and curves.
fn figures(config: &Config, lines: &[Line]) -> Result<String, TrainError> {
    Ok(sampled::distributions(config, lines)? + &curves(config, lines)? + "</body></html>\n")
}

/// `text` as HTML shows it, whatever a folder or a file is called.
fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<', '>', '"', '\'']) {
        return Cow::Borrowed(text);
    }
    // The ampersand first: the others bring their own.
    let escapes = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\"", "&quot;"), ("'", "&#39;")];
    let escape = |text: String, (from, to): (&str, &str)| text.replace(from, to);
    Cow::Owned(escapes.into_iter().fold(text.to_owned(), escape))
}

/// The start of a page under a title in HTML; `extra` goes into its head.
fn head(title: &str, extra: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">{extra}<title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    )
}

/// A page on what samplers did: rewards by step and by time, averaged over seeds, and what they found.
pub(crate) fn comparison(trials: &[Trial]) -> Result<String, TrainError> {
    let mut html = head("Samplers on the same weights", "");
    html.push_str("<table><tr><th>sampler</th><th>seeds</th><th>last tenth of the steps</th><th>mean of the samples</th><th>best of the samples</th><th>time of the steps</th></tr>\n");
    let (mut by_step, mut by_time) = (Vec::new(), Vec::new());
    for sampler in SamplerName::ALL {
        let of = || trials.iter().filter(move |trial| trial.sampler == sampler);
        let count = of().count().max(1) as f64;
        let mean = |value: &dyn Fn(&Trial) -> f64| of().map(value).sum::<f64>() / count;
        let steps = of().map(|trial| trial.rewards.len()).min().unwrap_or(0);
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{count}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.1} s</td></tr>",
            sampler.name(),
            percent(mean(&Trial::late)),
            percent(mean(&|trial| trial.mean)),
            percent(mean(&|trial| trial.best)),
            mean(&|trial| trial.seconds.last().copied().unwrap_or(0.0)),
        );
        let reward = |at: usize| 100.0 * mean(&|trial| trial.rewards[at]);
        let seconds = |at: usize| mean(&|trial| trial.seconds[at]);
        let curve = |x: &dyn Fn(usize) -> f64| -> Curve {
            let points: Vec<(f64, f64)> = (0..steps).map(|at| (x(at), reward(at))).collect();
            (sampler.name().to_owned(), smooth(&points))
        };
        by_step.push(curve(&|at| at as f64 + 1.0));
        by_time.push(curve(&seconds));
    }
    html.push_str("</table>\n<p class=\"note\">Rewards, means over seeds: accuracy on validation images, less what the settings have policies pay. Steps see a mini-batch each, the samples at the end all images alike. \
Curves are running means over a twentieth of the steps, against steps and against the time since a sampler's start: proposing, judging and learning, as this machine did them.</p>\n");
    let charts = [("Reward by step", "step", by_step), ("Reward by time", "seconds", by_time)];
    for (title, axis, curves) in charts {
        html += &Chart { title, axes: (axis, "reward, %"), size: COMPARED, curves }.draw()?;
    }
    Ok(html + "</body></html>\n")
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

fn percent(fraction: f64) -> String {
    format!("{:.2} %", 100.0 * fraction)
}

/// Those whose policies send anything.
fn sending(judged: &[Judged]) -> impl Iterator<Item = &Judged> {
    judged.iter().filter(|judged| {
        judged.candidate.source != Source::Silent && !judged.policy.steps.is_empty()
    })
}

/// The policies that send anything, each once, under the names of those that share it.
fn pictures(judged: &[Judged]) -> String {
    let mut shown: Vec<(Vec<&str>, &Judged)> = Vec::new();
    for judged in sending(judged) {
        let name = judged.candidate.name.as_str();
        match shown.iter_mut().find(|(_, other)| other.policy.steps == judged.policy.steps) {
            Some((names, _)) => names.push(name),
            None => shown.push((vec![name], judged)),
        }
    }
    if shown.is_empty() {
        return String::new();
    }
    let mut html = String::from("<h2>Policies</h2>\n");
    for (names, judged) in shown {
        let drawn = picture::picture(&judged.policy);
        let _ = writeln!(html, "<h3>{}</h3>\n<div class=\"wide\">{drawn}</div>", names.join(", "));
    }
    html + "<p class=\"note\">Groups from above, steps from the left, each with the share of the feature maps that is sent.</p>\n"
}

/// A figure of a line.
type Value = fn(&Line) -> Option<f64>;

fn curves(config: &Config, lines: &[Line]) -> Result<String, TrainError> {
    let main = config.exchange.search_levels;
    let pick = |of: &dyn Fn(&Line) -> bool, value: Value, scale: f64| -> Vec<(f64, f64)> {
        let chosen = lines.iter().filter(|line| of(line));
        chosen.filter_map(|line| Some((line.number as f64, scale * value(line)?))).collect()
    };
    let train = |value: Value, scale, name: &str| -> Curve {
        (name.to_owned(), pick(&|line| line.stage == Stage::Train, value, scale))
    };
    // Two controllers, where policies with levels and policies without were looked for.
    let search = |value: Value, scale| -> Vec<Curve> {
        let of = |levels: bool, name: &str| {
            let matches = |line: &Line| {
                line.stage == Stage::Search && line.search_levels.unwrap_or(main) == levels
            };
            (name.to_owned(), pick(&matches, value, scale))
        };
        vec![of(false, "without levels"), of(true, "with levels")]
    };
    let tuning = |value: Value, scale| -> Vec<Curve> {
        let of = |candidate: crate::candidate::Candidate| {
            let name = candidate.name;
            let matches = |line: &Line| {
                line.stage == Stage::Finetune && line.candidate.as_deref() == Some(&name)
            };
            let points = pick(&matches, value, scale);
            (name, points)
        };
        config.candidates().into_iter().map(of).collect()
    };
    let loss: Value = |line| line.loss;
    let accuracy: Value = |line| line.train_accuracy;
    let validation: Value = |line| line.validation_accuracy;
    let reward: Value = |line| line.reward.or(line.validation_accuracy);
    let learned = vec![train(accuracy, 100.0, "training"), train(validation, 100.0, "validation")];
    let charts = [
        ("Stage 1: loss", ("epoch", "nats"), vec![train(loss, 1.0, "")]),
        ("Stage 1: accuracy", ("epoch", "%"), learned),
        ("Stage 2: reward", ("step", "%"), search(reward, 100.0)),
        ("Stage 2: entropy of the controller", ("step", "nats"), search(|line| line.entropy, 1.0)),
        ("Fine-tuning: loss", ("epoch", "nats"), tuning(loss, 1.0)),
        ("Fine-tuning: accuracy while training", ("epoch", "%"), tuning(accuracy, 100.0)),
        ("Fine-tuning: accuracy on validation images", ("epoch", "%"), tuning(validation, 100.0)),
    ];
    let mut html = String::from("<h2>Curves</h2>\n<div class=\"curves\">\n");
    for (title, axes, curves) in charts {
        html += &Chart { title, axes, size: CURVE, curves }.draw()?;
    }
    html.push_str("</div>\n");
    Ok(html)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_and_what_is_left_out_stands_in_the_head() {
        let config = Config::digits();
        let mut data = Data::load(&config, None).unwrap();
        let page_of = |data: &Data| page(&config, data, &[], &[]).unwrap();
        assert!(!page_of(&data).contains("left out"));
        data.name = "cats & <dogs>".to_owned();
        data.skipped.push("train/<i>/0.png: broken".to_owned());
        let page = page_of(&data);
        assert!(page.contains("on cats &amp; &lt;dogs&gt;</h1>"), "{page}");
        assert!(page.contains("test, cats &amp; &lt;dogs&gt;</th>"), "{page}");
        let left_out = "<p class=\"note\">1 image is left out: train/&lt;i&gt;/0.png: broken.</p>";
        assert!(page.contains(left_out) && !page.contains("<dogs>") && !page.contains("<i>"));
    }
    #[test]
    fn a_run_that_goes_on_says_how_far_it_is_and_loads_itself_anew() {
        let config = Config::digits();
        let data = Data::load(&config, None).unwrap();
        let line = |number: usize| Line {
            loss: Some(1.0 / number as f64),
            train_accuracy: Some(0.5),
            validation_accuracy: Some(0.6),
            ..Line::new(Stage::Train, 1, number)
        };
        let lines: Vec<Line> = (1..=3).map(line).collect();
        let left = Some(std::time::Duration::from_secs(95));
        let (stage, loss, accuracy) = (Stage::Train, None, None);
        let mut told = Report { stage, round: 1, done: 3, total: 16, loss, accuracy, left };
        let page = running(&config, &data, &told, &lines).unwrap();
        let standing = "<p>Not finished: train, round 1 of 2, 3 of 16; 2 min left in all when";
        assert!(page.contains(standing) && page.contains(RELOAD), "{page}");
        assert!(page.contains("Stage 1: loss") && page.contains(">\nvalidation\n<"), "{page}");
        told.left = None;
        let page = running(&config, &data, &told, &[]).unwrap();
        assert!(page.contains("3 of 16.</p>") && !page.contains("<svg"), "{page}");
        assert!(!super::page(&config, &data, &[], &lines).unwrap().contains(RELOAD));
    }

    #[test]
    fn samplers_are_compared_by_step_and_by_time() {
        let trial = |sampler, seed, pace: f64| Trial {
            sampler,
            seed,
            rewards: vec![0.5, 0.6, 0.7],
            seconds: vec![pace, 2.0 * pace, 3.0 * pace],
            mean: 0.7,
            best: 0.8,
            policy: Config::digits().silent(),
        };
        let slow = SamplerName::Sinkhorn;
        let trials = [trial(SamplerName::Random, 1, 1.0), trial(slow, 1, 4.0), trial(slow, 2, 6.0)];
        let page = comparison(&trials).unwrap();
        assert!(page.contains("<td>80.00 %</td><td>3.0 s</td>"), "{page}");
        assert!(page.contains("<td>sinkhorn</td><td>2</td>") && page.contains("15.0 s"), "{page}");
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(page.contains("Reward by step") && page.contains("Reward by time"), "{page}");
    }
}
