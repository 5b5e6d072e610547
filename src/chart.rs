//! Charts as SVG: lines over two logarithmic axes, and stacked bars.
//!
//! Takes numbers with their names; gives the text of an SVG file, the same for the same numbers.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Size of a chart in pixels; of one with many bars the least.
const SIZE: (u32, u32) = (720, 460);
/// Pixels that a bar's name needs, and those beside all bars.
const BAR: (u32, u32) = (124, 100);
/// Colours of series, in their order: told apart by those who see colours differently, too.
static COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
];

/// What stands around a chart.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis; of bars none.
    pub x: String,
    /// Beside the vertical axis.
    pub y: String,
}

/// A named line.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
}

/// A named bar: the heights of its parts, from below.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// Heights, one a part.
    pub parts: Vec<f64>,
}

/// Lines over two logarithmic axes, and points by themselves.
///
/// # Errors
/// Nothing to draw, or numbers that have no logarithm.
pub fn lines(frame: &Frame, lines: &[Line], marks: &[Line]) -> Result<String> {
    let all = || lines.iter().chain(marks).flat_map(|line| &line.points);
    let (x, y) = (extent(all().map(|point| point.0))?, extent(all().map(|point| point.1))?);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = builder(&area, frame)?
            .build_cartesian_2d((x.0..x.1).log_scale(), (y.0..y.1).log_scale())
            .map_err(unusable)?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(&frame.x).y_desc(&frame.y).light_line_style(WHITE);
        mesh.x_label_formatter(&short).y_label_formatter(&short);
        mesh.draw().map_err(unusable)?;
        for (line, color) in lines.iter().zip(COLORS.iter().cycle()) {
            let series = LineSeries::new(line.points.iter().copied(), color.stroke_width(2));
            let drawn = chart.draw_series(series).map_err(unusable)?;
            drawn.label(&line.name).legend(move |(x, y)| {
                PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
            });
        }
        for mark in marks {
            let circles = mark.points.iter().map(|&point| Circle::new(point, 5, BLACK.filled()));
            let drawn = chart.draw_series(circles).map_err(unusable)?;
            drawn.label(&mark.name).legend(|(x, y)| Circle::new((x + 9, y), 5, BLACK.filled()));
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8));
        labels.border_style(BLACK.mix(0.3)).draw().map_err(unusable)?;
        area.present().map_err(unusable)?;
    }
    Ok(svg)
}

/// Bars side by side, each of the same parts, one on another.
///
/// # Errors
/// Nothing to draw.
pub fn bars(frame: &Frame, parts: &[&str], bars: &[Bar]) -> Result<String> {
    let highest = bars.iter().map(|bar| bar.parts.iter().sum::<f64>()).fold(0.0, f64::max);
    if !(highest > 0.0 && highest.is_finite()) {
        return Err(anyhow!("chart: nothing to draw"));
    }
    let names = Names(bars.iter().map(|bar| bar.name.clone()).collect());
    let width = SIZE.0.max(BAR.0 * bars.len() as u32 + BAR.1);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, SIZE.1)).into_drawing_area();
        let mut chart = builder(&area, frame)?
            .build_cartesian_2d(names, 0.0..highest * 1.1)
            .map_err(unusable)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().light_line_style(WHITE).y_desc(&frame.y).x_desc(&frame.x);
        mesh.x_labels(bars.len()).draw().map_err(unusable)?;
        for (part, (name, color)) in parts.iter().zip(COLORS.iter().cycle()).enumerate() {
            let rectangle = |(place, bar): (usize, &Bar)| {
                let below: f64 = bar.parts.iter().take(part).sum();
                let height = bar.parts.get(part).copied().unwrap_or(0.0);
                let (left, right) = (place as f64 + 0.2, place as f64 + 0.8);
                Rectangle::new([(left, below), (right, below + height)], color.filled())
            };
            let series = bars.iter().enumerate().map(rectangle);
            let drawn = chart.draw_series(series).map_err(unusable)?;
            drawn.label(*name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled())
            });
        }
        let mut labels = chart.configure_series_labels();
        labels.position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.8));
        labels.border_style(BLACK.mix(0.3)).draw().map_err(unusable)?;
        area.present().map_err(unusable)?;
    }
    Ok(svg)
}

/// A white sheet with the title and room for both axes' words.
fn builder<'a, 'b>(
    area: &'a Area<'b>,
    frame: &Frame,
) -> Result<ChartBuilder<'a, 'b, SVGBackend<'b>>> {
    area.fill(&WHITE).map_err(unusable)?;
    let mut builder = ChartBuilder::on(area);
    builder.caption(&frame.title, ("sans-serif", 18)).margin(16);
    builder.x_label_area_size(44).y_label_area_size(64);
    Ok(builder)
}

/// What a chart is drawn on.
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// An axis of names: the first between 0 and 1, the next between 1 and 2.
struct Names(Vec<String>);

impl Ranged for Names {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let share = value / self.0.len().max(1) as f64;
        low + (share * f64::from(high - low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        (0..self.0.len()).map(|place| place as f64 + 0.5).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        0.0..self.0.len() as f64
    }
}

impl ValueFormatter<f64> for Names {
    fn format(value: &f64) -> String {
        short(value)
    }

    fn format_ext(&self, value: &f64) -> String {
        self.0.get(*value as usize).cloned().unwrap_or_default()
    }
}

/// The decades around the numbers.
fn extent(numbers: impl Iterator<Item = f64>) -> Result<(f64, f64)> {
    let (low, high) =
        numbers.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
    if !(low > 0.0 && low <= high && high.is_finite()) {
        return Err(anyhow!("chart: nothing to draw"));
    }
    let decade = |x: f64| 10f64.powf(x);
    let (low, high) = (decade(low.log10().floor()), decade(high.log10().ceil()));
    Ok((low, if high > low { high } else { 10.0 * low }))
}

/// A number as an axis shows it.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that plotters calls")]
fn short(number: &f64) -> String {
    format!("{}", (number * 1e6).round() / 1e6)
}

fn unusable(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("chart: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let [title, x, y] = ["a title", "Mbit/s", "GFLOP/s"].map(str::to_owned);
        Frame { title, x, y }
    }

    #[test]
    fn charts_name_what_they_show() {
        let line = |name: &str, points: &[(f64, f64)]| Line {
            name: name.to_owned(),
            points: points.to_vec(),
        };
        let drawn = [line("α = 2", &[(10.0, 1.0), (1000.0, 90.0)])];
        let svg = lines(&frame(), &drawn, &[line("here", &[(300.0, 5.0)])]).unwrap();
        for name in ["a title", "Mbit/s", "GFLOP/s", "α = 2", "here", "polyline", "circle"] {
            assert!(svg.contains(name), "{name}");
        }
        let bar =
            |name: &str, parts: [f64; 2]| Bar { name: name.to_owned(), parts: parts.to_vec() };
        let both = [bar("one device", [3.0, 0.0]), bar("four", [1.0, 0.5])];
        let svg = bars(&frame(), &["compute", "waiting"], &both).unwrap();
        for name in ["one device", "four", "compute", "waiting"] {
            assert!(svg.contains(name), "{name}");
        }
        assert_eq!(svg, bars(&frame(), &["compute", "waiting"], &both).unwrap());
    }

    #[test]
    fn nothing_is_no_chart() {
        assert!(lines(&frame(), &[], &[]).is_err());
        assert!(bars(&frame(), &["compute"], &[]).is_err());
    }
}
