//! What was measured beside what was predicted: JSON, a picture and a text.
//!
//! Takes measurements under all policies and on all links; gives `bench.json` (with a description of the machine), `bench.svg`
//! (where a request's time goes) and the lines that are printed.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};
use snn::chart::{self, Bar, Frame};
use snn_compiler::Split;
use snn_schemas::cost::{Device, Plan};

use crate::links::{Cluster, Measured};
use crate::models::Models;
use crate::single::Single;
use crate::{Args, Run, quantile};

pub(crate) struct Report {
    json: Value,
    svg: String,
    text: String,
}

/// What one link gave. Times in ms, shares 0 to 1.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    policy: String,
    link_mbit: f64,
    round_trip_ms: f64,
    one_ms: f64,
    four_ms: f64,
    emulated_ms: f64,
    /// Median of the ratios, request by request.
    speed_up: f64,
    /// What the cost model predicts for such a device, with the time that exchanges take within it.
    predicted_ms: f64,
    prediction_error: f64,
    /// The same without that time: what a perfect runtime reaches.
    perfect_ms: f64,
    perfect_speed_up: f64,
    /// Measured against it.
    of_perfect: f64,
    /// User space against namespaces.
    emulation_error: f64,
    predicted_hidden: Option<f64>,
    hidden: Option<f64>,
    /// Of the entry node: neither computing nor waiting.
    other_share: f64,
    /// The same in ms, and that of the one device: both have the asker's way to the cluster and back.
    four_other_ms: f64,
    one_other_ms: f64,
    predicted_compute_ms: Vec<f64>,
    compute_ms: Vec<f64>,
    predicted_waiting_ms: Vec<f64>,
    waiting_ms: Vec<f64>,
    codec_ms: Vec<f64>,
    /// One device with ONNX Runtime against the four.
    over_onnxruntime: Option<f64>,
}

impl Figures {
    fn new(
        (device, one_ms): (&Device, f64),
        (policy, split): &(String, Split),
        (single, times): (&Single, f64),
        Run { link, measured, .. }: &Run,
    ) -> Result<Figures> {
        let Measured { one, four, emulated, hidden, .. } = measured;
        let plan = &as_sent(split, four)?;
        let predicted = plan.predict(std::slice::from_ref(device), link)?;
        let perfect = plan.predict(&[Device { gbytes: None, ..device.clone() }], link)?;
        let pairs = one.latencies.iter().zip(&four.latencies).map(|(one, four)| one / four);
        let speed_up = quantile(&pairs.collect::<Vec<f64>>(), 0.5);
        let four_ms = median(four);
        let predicted_ms = 1e3 * predicted.latency;
        let perfect_ms = 1e3 * perfect.latency;
        let perfect_speed_up = one_ms / perfect_ms;
        let four_other_ms = other(four, split.manifest.entry);
        Ok(Figures {
            policy: policy.clone(),
            link_mbit: link.bits_per_second / 1e6,
            round_trip_ms: 1e3 * link.round_trip.as_secs_f64(),
            one_ms: median(one),
            four_ms,
            emulated_ms: median(emulated),
            speed_up,
            predicted_ms,
            prediction_error: predicted_ms / four_ms - 1.0,
            perfect_ms,
            perfect_speed_up,
            of_perfect: speed_up / perfect_speed_up,
            emulation_error: median(emulated) / four_ms - 1.0,
            predicted_hidden: predicted.hidden(),
            hidden: *hidden,
            other_share: four_other_ms / mean(four),
            four_other_ms,
            one_other_ms: other(one, 0),
            predicted_compute_ms: predicted.nodes.iter().map(|node| 1e3 * node.compute).collect(),
            compute_ms: four.nodes.iter().map(|node| node.compute).collect(),
            predicted_waiting_ms: predicted.nodes.iter().map(|node| 1e3 * node.waiting).collect(),
            waiting_ms: four.nodes.iter().map(|node| node.waiting).collect(),
            codec_ms: four.nodes.iter().map(|node| node.codec).collect(),
            over_onnxruntime: single.best_onnxruntime().map(|best| best * times / four_ms),
        })
    }
}

/// The plan with the bytes that really crossed, where their number depends on the input.
fn as_sent(split: &Split, cluster: &Cluster) -> Result<Plan> {
    let mut plan = Plan::of_manifest(&split.manifest).context("the split computes nothing")?;
    for &(transfer, bytes) in cluster.nodes.iter().flat_map(|node| &node.sends) {
        if let Some(carried) = plan.transfers.get_mut(transfer as usize) {
            carried.bytes = bytes.round() as u64;
        }
    }
    Ok(plan)
}

fn median(cluster: &Cluster) -> f64 {
    quantile(&cluster.latencies, 0.5)
}

fn mean(cluster: &Cluster) -> f64 {
    cluster.latencies.iter().sum::<f64>() / cluster.latencies.len() as f64
}

/// Of a request's time, what the entry node neither computes nor waits, in ms.
fn other(cluster: &Cluster, entry: usize) -> f64 {
    let node = &cluster.nodes[entry];
    mean(cluster) - node.compute - node.waiting
}

impl Report {
    pub(crate) fn new(
        args: &Args,
        models: &Models,
        (single, times): (&Single, f64),
        runs: &[Run],
    ) -> Result<Report> {
        let one_ms = 1e3 * args.device.seconds(models.flops);
        // Slowed by one factor, a device moves features as much slower as it computes.
        let gbytes = args.device.gbytes.or(single.gbytes.map(|gbytes| gbytes / times));
        let device = Device { gbytes, ..args.device.clone() };
        let about = (&device, one_ms);
        let figures: Vec<Figures> = runs
            .iter()
            .map(|run| Figures::new(about, &models.splits[run.policy], (single, times), run))
            .collect::<Result<_>>()?;
        let measured: Vec<Value> = figures
            .iter()
            .zip(runs)
            .map(|(figures, run)| json!({ "figures": figures, "measured": run.measured }))
            .collect();
        let json = json!({
            "machine": machine(),
            "device": device,
            "times_slower": times,
            "here_gflops": single.gflops(models),
            "unsplit_flops": models.flops,
            "single_ms_here": single,
            "runs": measured,
        });
        let drawn = runs.iter().find(|run| run.link.bits_per_second == 300e6).or(runs.first());
        let drawn = drawn.context("nothing was measured")?.link.bits_per_second;
        let drawn: Vec<&Run> =
            runs.iter().filter(|run| run.link.bits_per_second == drawn).collect();
        let svg = picture(args, models, &drawn)?;
        let text = text(args, models, (single, times), &figures);
        Ok(Report { json, svg, text })
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())
        };
        write("bench.json", &format!("{:#}\n", self.json))?;
        write("bench.svg", &self.svg)
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

/// The paper's Figure 6: where a request's time goes, under each policy on one link.
fn picture(args: &Args, models: &Models, runs: &[&Run]) -> Result<String> {
    let bar = |name: String, cluster: &Cluster, entry: usize| {
        let node = &cluster.nodes[entry];
        let other = other(cluster, entry).max(0.0);
        Bar { name, parts: vec![node.compute, node.waiting, other] }
    };
    let first = runs.first().context("nothing was measured")?;
    let mut bars = vec![bar("one device".to_owned(), &first.measured.one, 0)];
    for Run { policy, measured, .. } in runs {
        let (name, split) = &models.splits[*policy];
        let entry = split.manifest.entry;
        bars.push(bar(format!("four, {name}"), &measured.four, entry));
        bars.push(bar("the same, emulated".to_owned(), &measured.emulated, entry));
    }
    let link = &first.link;
    let (speed, rate) = (args.device.gflops, link.bits_per_second / 1e6);
    let frame = Frame {
        title: format!("A request on devices of {speed} GFLOP/s, {rate} Mbit/s"),
        x: String::new(),
        y: "ms".to_owned(),
    };
    chart::bars(&frame, &["compute", "waiting", "other"], &bars)
}

fn text(
    args: &Args,
    models: &Models,
    (single, times): (&Single, f64),
    figures: &[Figures],
) -> String {
    let mut text = String::new();
    let device = |ms: f64| ms * times;
    // Writing to a String cannot end in an error.
    let _ = writeln!(
        text,
        "one device of {} GFLOP/s, the unsplit network ({:.0} MFLOPs; this machine is {times:.1} times as fast):\n  \
         this engine {:.1} ms, stock tract {:.1} ms",
        args.device.gflops,
        models.flops as f64 / 1e6,
        device(single.ours),
        device(single.tract),
    );
    match single.best_onnxruntime() {
        None => text += "  ONNX Runtime is not installed\n",
        Some(best) => {
            let _ =
                writeln!(text, "  ONNX Runtime, with the faster network {:.1} ms", device(best));
        }
    }
    for link in figures {
        let percent = |share: f64| 100.0 * share;
        let hidden =
            |share: Option<f64>| share.map_or("-".to_owned(), |s| format!("{:.1} %", percent(s)));
        let _ = writeln!(
            text,
            "\n{}, {} Mbit/s, {} ms:\n  \
             one {:.2} ms, four {:.2} ms, predicted {:.2} ms ({:+.1} %), emulated {:.2} ms ({:+.1} %)\n  \
             speed-up {:.2}, of a perfect runtime {:.2}: {:.1} % of it\n  \
             hidden {}, predicted {}; other {:.1} % of the time, {:.2} ms (one device: {:.2} ms)",
            link.policy,
            link.link_mbit,
            link.round_trip_ms,
            link.one_ms,
            link.four_ms,
            link.predicted_ms,
            percent(link.prediction_error),
            link.emulated_ms,
            percent(link.emulation_error),
            link.speed_up,
            link.perfect_speed_up,
            percent(link.of_perfect),
            hidden(link.hidden),
            hidden(link.predicted_hidden),
            percent(link.other_share),
            link.four_other_ms,
            link.one_other_ms,
        );
        if let Some(times) = link.over_onnxruntime {
            let _ = writeln!(text, "  {times:.2} times as fast as one device with ONNX Runtime");
        }
        let list = |numbers: &[f64]| {
            numbers.iter().map(|ms| format!("{ms:.2}")).collect::<Vec<_>>().join(" ")
        };
        let _ = writeln!(
            text,
            "  compute {} (predicted {})\n  waiting {} (predicted {})\n  codec   {}",
            list(&link.compute_ms),
            list(&link.predicted_compute_ms),
            list(&link.waiting_ms),
            list(&link.predicted_waiting_ms),
            list(&link.codec_ms),
        );
    }
    text
}

/// What the figures were measured on.
fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    json!({
        "cpu": model.trim_start_matches(['\t', ' ', ':']),
        "cores": std::thread::available_parallelism().map_or(0, |cores| cores.get()),
        "instructions": format!("{:?}", snn_runtime::kernels::Isa::best()),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "snn": env!("CARGO_PKG_VERSION"),
    })
}
