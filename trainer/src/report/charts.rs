//! Curves and heat-maps as SVG, drawn by plotters for a page with a light and a dark dress.
//!
//! Takes numbers and gives the text of an `<svg>` without a background. Whatever is black in it takes
//! the page's own colour of writing (the page's style sheet says so); series have colours that can
//! be told apart on white and on black. Equal numbers give equal texts.

use std::error::Error;

use plotters::coord::ranged1d::SegmentValue;
use plotters::prelude::*;

use crate::error::TrainError;

/// Points of a curve past which it is averaged: more cannot be told apart on the page.
const POINTS: usize = 400;
/// Colours of curves, in order, of middling lightness.
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 111, 235),
    RGBColor(224, 123, 0),
    RGBColor(46, 158, 91),
    RGBColor(155, 89, 208),
    RGBColor(214, 69, 69),
    RGBColor(21, 152, 168),
];
/// Room for the key beside several curves, in pixels: over them it would hide what it names.
const KEY: i32 = 104;
/// Width of a heat-map, and the height of one of its rows, in pixels.
const HEAT: (u32, u32) = (300, 10);

/// A curve: what it is called, and its points.
pub(super) type Curve = (String, Vec<(f64, f64)>);

/// Several curves over one another.
pub(super) struct Chart<'a> {
    /// Written above it; nothing if empty.
    pub(super) title: &'a str,
    /// What the axes are called.
    pub(super) axes: (&'a str, &'a str),
    /// Width and height in pixels.
    pub(super) size: (u32, u32),
    /// The curves; a key is drawn where there are several.
    pub(super) curves: Vec<Curve>,
}

impl Chart<'_> {
    /// Draws it; nothing where no curve has two points.
    pub(super) fn draw(mut self) -> Result<String, TrainError> {
        self.curves.retain(|(_, points)| points.len() > 1);
        if self.curves.is_empty() {
            return Ok(String::new());
        }
        let mut svg = String::new();
        self.draw_on(&mut svg).map_err(|error| TrainError::Report(error.to_string()))?;
        Ok(svg)
    }

    fn bounds(&self, value: fn(&(f64, f64)) -> f64) -> std::ops::Range<f64> {
        let all = || self.curves.iter().flat_map(|(_, points)| points).map(value);
        let (low, high) =
            (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        // A flat curve still needs an axis of some length.
        if high > low { low..high } else { low - 0.5..high + 0.5 }
    }

    fn draw_on(&self, svg: &mut String) -> Result<(), Box<dyn Error>> {
        let area = SVGBackend::with_string(svg, self.size).into_drawing_area();
        let several = self.curves.len() > 1;
        let key = if several { KEY } else { 0 };
        let (plot, beside) = area.split_horizontally(self.size.0 as i32 - key);
        let written = ("sans-serif", 12).into_text_style(&beside);
        let mut chart = ChartBuilder::on(&plot)
            .caption(self.title, ("sans-serif", if self.title.is_empty() { 1 } else { 15 }))
            .margin(8)
            .margin_right(14)
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d(self.bounds(|point| point.0), self.bounds(|point| point.1))?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(self.axes.0).y_desc(self.axes.1).x_labels(6).y_labels(6);
        mesh.x_label_formatter(&tick).y_label_formatter(&tick);
        mesh.light_line_style(TRANSPARENT).bold_line_style(BLACK.mix(0.12)).draw()?;
        let curves = self.curves.iter().zip(COLOURS.iter().cycle());
        for (row, ((name, points), colour)) in curves.enumerate() {
            let style = ShapeStyle::from(colour).stroke_width(2);
            chart.draw_series(LineSeries::new(thin(points), style))?;
            if several {
                let y = 48 + 18 * row as i32;
                beside.draw(&PathElement::new([(0, y), (16, y)], style))?;
                beside.draw(&Text::new(name.as_str(), (22, y - 5), written.clone()))?;
            }
        }
        area.present()?;
        Ok(())
    }
}

/// A number at an axis, without the `.0` of whole ones.
fn tick(number: &f64) -> String {
    // Ticks lie on round numbers, but for what adding them up leaves.
    format!("{}", (number * 1e6).round() / 1e6)
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

/// How often each of some options was taken in the course of something.
pub(super) struct Heat<'a> {
    /// Written above it.
    pub(super) title: &'a str,
    /// The options, from below.
    pub(super) rows: &'a [String],
    /// For each bin of time the share of each option, 0 to 1.
    pub(super) bins: &'a [Vec<f64>],
    /// Steps that the bins stand for.
    pub(super) steps: usize,
}

impl Heat<'_> {
    /// Draws it: the stronger the colour the more often.
    pub(super) fn draw(&self) -> Result<String, TrainError> {
        let mut svg = String::new();
        self.draw_on(&mut svg).map_err(|error| TrainError::Report(error.to_string()))?;
        Ok(svg)
    }

    fn draw_on(&self, svg: &mut String) -> Result<(), Box<dyn Error>> {
        let size = (HEAT.0, HEAT.1 * self.rows.len() as u32 + 70);
        let area = SVGBackend::with_string(svg, size).into_drawing_area();
        let last = self.rows.len().saturating_sub(1);
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 14))
            .margin(4)
            .margin_right(12)
            .x_label_area_size(32)
            .y_label_area_size(46)
            .build_cartesian_2d(0.0..self.steps as f64, (0..last).into_segmented())?;
        let name = |row: &SegmentValue<usize>| match row {
            SegmentValue::CenterOf(row) => self.rows.get(*row).cloned().unwrap_or_default(),
            _ => String::new(),
        };
        let mut mesh = chart.configure_mesh();
        mesh.disable_mesh().x_desc("step").x_labels(5).y_labels(self.rows.len());
        mesh.x_label_formatter(&tick);
        mesh.y_label_style(("sans-serif", 9)).y_label_formatter(&name).draw()?;
        let wide = self.steps as f64 / self.bins.len().max(1) as f64;
        let cells = self.bins.iter().enumerate().flat_map(|(bin, shares)| {
            let taken = shares.iter().enumerate().filter(|(_, share)| **share > 0.0);
            taken.map(move |(row, share)| {
                let from = (bin as f64 * wide, SegmentValue::Exact(row));
                let to = ((bin + 1) as f64 * wide, SegmentValue::Exact(row + 1));
                // Among many options each is rare: in proportion most would be too pale to be seen.
                Rectangle::new([from, to], COLOURS[0].mix(share.sqrt()).filled())
            })
        });
        chart.draw_series(cells)?;
        area.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_short() {
        assert_eq!([5.0, 0.2 + 0.1, 1e-4].map(|number| tick(&number)), ["5", "0.3", "0.0001"]);
    }

    #[test]
    fn many_points_are_averaged() {
        let points: Vec<(f64, f64)> = (0..1000).map(|x| (f64::from(x), f64::from(x % 2))).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 334);
        assert_eq!(thinned[0], (1.0, 1.0 / 3.0));
        assert_eq!(thin(&points[..3]), points[..3]);
    }

    #[test]
    fn a_cell_is_drawn_where_an_option_was_taken() {
        let rows = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let bins = [vec![1.0, 0.0, 0.0], vec![0.25, 0.75, 0.0]];
        let svg = Heat { title: "t0", rows: &rows, bins: &bins, steps: 10 }.draw().unwrap();
        assert_eq!(svg.matches("#1F6FEB").count(), 3, "{svg}");
        assert!(["a", "b", "c"].iter().all(|row| svg.contains(&format!("\n{row}\n"))), "{svg}");
    }

    #[test]
    fn curves_without_two_points_are_left_out() {
        let curves = vec![("one".to_owned(), vec![(1.0, 2.0)])];
        let chart = Chart { title: "t", axes: ("x", "y"), size: (100, 100), curves };
        assert_eq!(chart.draw().unwrap(), "");
    }
}
