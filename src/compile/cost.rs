//! `snnc cost`: what a device and a link make of a split, before there are any.
//!
//! Takes the command's arguments; compiles the model in memory and prints the prediction of
//! [`snn_schemas::cost`]: each node's time, latency, and what it is worth against one device that runs the
//! model unsplit. `--sweep` draws the paper's Figure 5 instead: how fast devices may be for their links,
//! for each staleness.

use std::fs;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use snn_compiler::{CompileError, PolicySource, flops, show};
use snn_schemas::Policy;
use snn_schemas::cost::{Device, Link, Plan, Prediction};

use super::args::Cost;
use super::{blame, compile, print, read_model, read_policy};
use crate::chart::{self, Frame, Line};

/// Staleness of the sweep: beyond it nobody has trained.
const STALENESS: std::ops::RangeInclusive<usize> = 1..=6;
/// Rates of the sweep in Mbit/s, and points a decade.
const RATES: (f64, f64) = (10.0, 10_000.0);
const POINTS: usize = 8;
/// Share of the latency that transfers may cost in the sweep.
const ALLOWED: f64 = 0.05;
/// Speeds among which the sweep searches, in GFLOP/s.
const SPEEDS: (f64, f64) = (1e-3, 1e6);

/// What `--json` prints. Times in ms.
#[derive(Serialize)]
struct Report {
    device_gflops: f64,
    link_mbit: f64,
    round_trip_ms: f64,
    latency_ms: f64,
    one_device_ms: f64,
    speed_up: f64,
    speed_up_without_transfers: f64,
    /// Share of the exchanges' travel that is hidden behind computation.
    #[serde(skip_serializing_if = "Option::is_none")]
    hidden: Option<f64>,
    pays: bool,
    nodes: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    rank: usize,
    groups: Vec<usize>,
    flops: u64,
    compute_ms: f64,
    waiting_ms: f64,
    finished_ms: f64,
    bytes_sent: u64,
}

pub(super) fn cost(args: &Cost) -> Result<()> {
    if args.sweep {
        return sweep(args);
    }
    let split = compile(&args.model, &args.compile)?;
    let report = report(args, &split)?;
    if args.json {
        let text = serde_json::to_string_pretty(&report).context("report")?;
        return print(format_args!("{text}\n"));
    }
    print(report.text())
}

fn report(args: &Cost, split: &snn_compiler::Split) -> Result<Report> {
    let plan = Plan::with_zeros(&split.manifest, args.zeros);
    let plan = plan.context("the split computes nothing")?;
    let devices = std::slice::from_ref(&args.device);
    let predict = |plan: &Plan, link: &Link| plan.predict(devices, link).context("cost");
    let found = predict(&plan, &args.link)?;
    let at_once = predict(&plan, &no_transfers())?;
    let one = args.device.seconds(unsplit(args)?);
    let row = |(rank, node): (usize, &snn_schemas::cost::NodeTime)| Row {
        rank,
        groups: show::groups_of(&split.manifest, rank),
        flops: plan.flops(rank),
        compute_ms: 1e3 * node.compute,
        waiting_ms: 1e3 * node.waiting,
        finished_ms: 1e3 * node.finished,
        bytes_sent: node.bytes_sent,
    };
    Ok(Report {
        device_gflops: args.device.gflops,
        link_mbit: args.link.bits_per_second / 1e6,
        round_trip_ms: 1e3 * args.link.round_trip.as_secs_f64(),
        latency_ms: 1e3 * found.latency,
        one_device_ms: 1e3 * one,
        speed_up: one / found.latency,
        speed_up_without_transfers: one / at_once.latency,
        hidden: found.hidden(),
        pays: found.latency < one,
        nodes: found.nodes.iter().enumerate().map(row).collect(),
    })
}

/// Operations of the model as it stands.
fn unsplit(args: &Cost) -> Result<u64> {
    let source = read_model(&args.model)?;
    let shape = args.compile.options().input_shape;
    flops(&source, shape.as_deref()).map_err(|error| blame(error, &source, &args.model, None))
}

/// `3.2 times as fast`; no number where it would be 1.0.
fn times_as_fast(times: f64) -> String {
    match format!("{times:.1}").as_str() {
        "1.0" => "as fast".to_owned(),
        times => format!("{times} times as fast"),
    }
}

/// A link on which nothing takes time.
fn no_transfers() -> Link {
    Link { bits_per_second: f64::INFINITY, round_trip: std::time::Duration::ZERO }
}

impl Report {
    fn text(&self) -> String {
        let Report { device_gflops, link_mbit, round_trip_ms, .. } = self;
        let (latency, one) = (self.latency_ms, self.one_device_ms);
        let mut text = format!(
            "devices of {device_gflops} GFLOP/s, links of {link_mbit} Mbit/s and {round_trip_ms} ms there and back\n\n{}\n\n",
            self.table()
        );
        text += &format!(
            "latency     {latency:.3} ms, as a perfect runtime reaches it\none device  {one:.3} ms for the unsplit network\n"
        );
        let (speed_up, most) = (self.speed_up, self.speed_up_without_transfers);
        text += &format!("speed-up    {speed_up:.2}, without any time for transfers {most:.2}\n");
        if let Some(hidden) = self.hidden {
            let percent = 100.0 * hidden;
            text += &format!("hidden      {percent:.1} % of the exchanges' travel\n");
        }
        if !self.pays {
            let times = times_as_fast(1.0 / speed_up);
            text += &format!("splitting does not pay: one device is {times}\n");
        }
        text
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        let header =
            ["node", "groups", "MFLOPs", "compute ms", "waiting ms", "done at ms", "bytes sent"];
        table.set_header(header);
        for row in &self.nodes {
            let groups: Vec<String> = row.groups.iter().map(|group| format!("g{group}")).collect();
            table.add_row([
                row.rank.to_string(),
                groups.join(" "),
                format!("{:.1}", row.flops as f64 / 1e6),
                format!("{:.3}", row.compute_ms),
                format!("{:.3}", row.waiting_ms),
                format!("{:.3}", row.finished_ms),
                row.bytes_sent.to_string(),
            ]);
        }
        for column in table.column_iter_mut() {
            if column.index != 1 {
                column.set_cell_alignment(CellAlignment::Right);
            }
            column.set_padding((0, 2));
        }
        table.trim_fmt()
    }
}

/// Draws how fast devices may be for their links, a line for each staleness that the blocks allow.
fn sweep(args: &Cost) -> Result<()> {
    let (Some(path), Some(policy)) = (&args.output, &args.compile.policy) else { return Ok(()) };
    let policy = read_policy(policy)?;
    let mut lines = Vec::new();
    let mut at_link = Vec::new();
    let mut left_out = Vec::new();
    for staleness in STALENESS {
        match plan_of(args, &policy, staleness)? {
            Some(plan) => {
                let points = rates().map(|rate| Ok((rate, fastest(&plan, args, rate)?)));
                let points: Vec<(f64, f64)> = points.collect::<Result<_>>()?;
                let name = format!("α = {staleness}");
                at_link.push((name, fastest(&plan, args, args.link.bits_per_second / 1e6)?));
                lines.push(Line { name: format!("α = {staleness}"), points });
            }
            None => left_out.push(staleness.to_string()),
        }
    }
    let percent = 100.0 * ALLOWED;
    let frame = Frame {
        title: format!("Devices below a line lose at most {percent} % to their link"),
        x: "link, Mbit/s".to_owned(),
        y: "device, GFLOP/s".to_owned(),
    };
    let (rate, speed) = (args.link.bits_per_second / 1e6, args.device.gflops);
    let mark =
        Line { name: format!("{rate} Mbit/s, {speed} GFLOP/s"), points: vec![(rate, speed)] };
    let inside = (RATES.0..=RATES.1).contains(&rate);
    let svg = chart::lines(&frame, &lines, if inside { std::slice::from_ref(&mark) } else { &[] })?;
    fs::write(path, svg).with_context(|| format!("{}: write", path.display()))?;
    for (name, speed) in &at_link {
        let ratio = 1e3 * speed / rate;
        print(format_args!(
            "{name}: up to {speed:.3} GFLOP/s at {rate} Mbit/s, {ratio:.2} operations a bit\n"
        ))?;
    }
    if !left_out.is_empty() {
        let list = left_out.join(", ");
        print(format_args!("left out: α = {list}, whose steps would cross a stride\n"))?;
    }
    print(format_args!("wrote {}\n", path.display()))
}

/// The plan of the model under the policy's decisions, one after another as often as `staleness` asks
/// for them; none where a step would cross a stride.
fn plan_of(args: &Cost, source: &PolicySource, staleness: usize) -> Result<Option<Plan>> {
    let model = read_model(&args.model)?;
    let options = args.compile.options();
    let blocks = {
        let read = snn_compiler::read(&model, options.input_shape.as_deref());
        let found =
            read.and_then(|read| snn_compiler::groups::find(&read, Some(source.policy.groups)));
        found.map_err(|error| blame(error, &model, &args.model, None))?.blocks.len()
    };
    let steps = Policy::steps_for(blocks, staleness);
    let steps: Vec<_> = source.policy.steps.iter().cycle().take(steps).cloned().collect();
    if steps.is_empty() {
        return Ok(None);
    }
    let policy = Policy { staleness, steps, ..source.policy.clone() };
    let policy = PolicySource { policy, sha256: source.sha256.clone() };
    match snn_compiler::compile(&model, Some(&policy), &options) {
        Ok(split) => Ok(Plan::with_zeros(&split.manifest, args.zeros)),
        Err(CompileError::CrossesStride { .. }) => Ok(None),
        Err(error) => Err(blame(error, &model, &args.model, args.compile.policy.as_deref())),
    }
}

fn rates() -> impl Iterator<Item = f64> {
    let decades = (RATES.1 / RATES.0).log10();
    let count = (decades * POINTS as f64).round() as usize;
    (0..=count).map(|point| RATES.0 * 10f64.powf(point as f64 / POINTS as f64))
}

/// The speed in GFLOP/s up to which transfers cost at most [`ALLOWED`] of the latency. The faster the
/// device, the less there is to hide them behind.
fn fastest(plan: &Plan, args: &Cost, mbit: f64) -> Result<f64> {
    let link = Link { bits_per_second: 1e6 * mbit, ..args.link };
    let (mut slow, mut fast) = SPEEDS;
    for _ in 0..60 {
        let middle = (slow * fast).sqrt();
        let device = [Device::new(middle)?];
        let latency = |link: &Link| -> Result<f64> {
            let Prediction { latency, .. } = plan.predict(&device, link)?;
            Ok(latency)
        };
        match latency(&no_transfers())? >= (1.0 - ALLOWED) * latency(&link)? {
            true => slow = middle,
            false => fast = middle,
        }
    }
    Ok(slow)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(speed_up: f64) -> Report {
        Report {
            device_gflops: 5.0,
            link_mbit: 300.0,
            round_trip_ms: 0.3,
            latency_ms: 1.0 / speed_up,
            one_device_ms: 1.0,
            speed_up,
            speed_up_without_transfers: 3.0,
            hidden: None,
            pays: speed_up > 1.0,
            nodes: vec![],
        }
    }

    #[test]
    fn how_much_faster_one_device_is_stands_where_splitting_does_not_pay() {
        let last = |speed_up| report(speed_up).text().lines().next_back().map(str::to_owned);
        let says = |times: &str| Some(format!("splitting does not pay: one device is {times}"));
        assert_eq!(last(0.02), says("50.0 times as fast"));
        assert_eq!(last(0.4), says("2.5 times as fast"));
        assert_eq!(last(0.98), says("as fast"));
        assert!(!report(1.02).text().contains("does not pay"));
    }
}
