//! `snn-run --local`: runs inputs through a cluster of processes, measures, compares.
//!
//! Takes [`args::Local`]; gives the exit code. Latency is measured by the asking process, from handing
//! an input over to having the answer, loopback included. Time in compute, time in waiting and bytes
//! sent are each node's own counts, as means over the timed requests. One pass over the inputs comes
//! first and is not timed; its answers are what `--output` and `--check` use.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};
use snn_runtime::NodeReport;

use super::args;
use super::emulation::Emulation;
use super::infer::{input_spec, single};
use super::input::{self, Array};
use super::local::{LocalCluster, LocalOptions};
use super::{http, serve, trace};

/// Largest difference that `--check` takes for the same answer.
const TOLERANCE: f32 = 1e-4;
/// Seed of the input that is used when none is given.
const NOISE_SEED: u64 = 1;

/// What was measured.
#[derive(Clone, Debug, PartialEq)]
struct Measurement {
    /// Milliseconds a request, in the order of the requests.
    latencies: Vec<f64>,
    /// Each node's means, by rank.
    nodes: Vec<NodeMeans>,
}

#[derive(Clone, Debug, PartialEq)]
struct NodeMeans {
    rank: usize,
    compute_ms: f64,
    waiting_ms: f64,
    bytes_sent: f64,
}

/// Runs `snn-run --local`.
pub(super) async fn local(local: args::Local) -> Result<ExitCode> {
    if local.http.is_some() {
        return http::local(local).await;
    }
    let work = run(&local);
    // Whichever branch ends first, the cluster goes with `work` and takes its children along.
    tokio::select! {
        done = work => done,
        stopped = super::interrupted() => {
            stopped?;
            Err(anyhow::anyhow!("interrupted").context(local.folder.display().to_string()))
        }
    }
}

async fn run(local: &args::Local) -> Result<ExitCode> {
    // Whatever can be wrong with the files is found before anything is started.
    let requests = requests(local)?;
    let reference = local.check.as_deref().map(read_reference).transpose()?;
    for (path, what) in [(&local.output, "output"), (&local.trace, "trace")] {
        path.as_deref().map(super::check_place).transpose().context(what)?;
    }
    let trace = local.trace.is_some();
    let emulation = Emulation::new(local.device.as_ref(), local.link, local.threads)?;
    let options =
        LocalOptions { threads: local.threads, trace, emulation, ..LocalOptions::default() };
    let cluster = LocalCluster::start(&local.folder, options).await?;
    let outputs = answers(&cluster, &requests).await?;
    let measured = measure(&cluster, &requests, local.repeat).await?;
    if let Some(path) = &local.trace {
        trace::write(&cluster.trace().await?, path)?;
    }
    cluster.stop().await.with_context(|| local.folder.display().to_string())?;

    match local.json {
        true => super::print(measured.json())?,
        false => super::print(measured.table())?,
    }
    let output = stack(outputs).context("output")?;
    if let Some(path) = &local.output {
        let written = input::write_npy(path, &output);
        written.context("output").with_context(|| path.display().to_string())?;
    }
    match (&local.check, &reference) {
        (Some(path), Some(reference)) => check(path, &output, reference),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The requests that the input files make, or one of noise.
fn requests(local: &args::Local) -> Result<Vec<Array>> {
    let manifest = serve::read_manifest(&local.folder)?;
    let spec = input_spec(&manifest.inputs, &manifest.metadata)
        .context("model")
        .with_context(|| local.folder.display().to_string())?;
    if local.inputs.is_empty() {
        return Ok(vec![input::noise(&spec.shape, NOISE_SEED)]);
    }
    let mut requests = Vec::new();
    for path in &local.inputs {
        let read = input::read(path, &spec);
        requests.extend(read.context("input").with_context(|| path.display().to_string())?);
    }
    Ok(requests)
}

fn read_reference(path: &Path) -> Result<Array> {
    input::read_npy(path).context("check").with_context(|| path.display().to_string())
}

async fn answers(cluster: &LocalCluster, requests: &[Array]) -> Result<Vec<Array>> {
    let mut outputs = Vec::with_capacity(requests.len());
    for request in requests {
        outputs.push(single(cluster.infer(std::slice::from_ref(request)).await?)?);
    }
    Ok(outputs)
}

async fn measure(cluster: &LocalCluster, requests: &[Array], repeat: usize) -> Result<Measurement> {
    let before = cluster.reports().await?;
    let mut latencies = Vec::with_capacity(requests.len() * repeat);
    for _ in 0..repeat {
        for request in requests {
            let start = Instant::now();
            cluster.infer(std::slice::from_ref(request)).await?;
            latencies.push(milliseconds(start.elapsed()));
        }
    }
    let after = cluster.reports().await?;
    let count = latencies.len() as f64;
    let nodes = before.iter().zip(&after).map(|(before, after)| means(before, after, count));
    Ok(Measurement { nodes: nodes.collect(), latencies })
}

/// What each node has counted, a request of `requests`: a heading, and a line a node.
pub fn per_request(reports: &[NodeReport], requests: usize) -> String {
    let mut lines = vec![format!(
        "{:<6} {:>12} {:>12} {:>12}   a request",
        "node", "compute ms", "waiting ms", "bytes sent"
    )];
    for report in reports {
        let node = means(&NodeReport::default(), report, requests as f64);
        lines.push(format!(
            "{:<6} {:>12.3} {:>12.3} {:>12.0}",
            node.rank, node.compute_ms, node.waiting_ms, node.bytes_sent
        ));
    }
    lines.join("\n")
}

fn means(before: &NodeReport, after: &NodeReport, count: f64) -> NodeMeans {
    NodeMeans {
        rank: after.rank,
        compute_ms: (after.compute_ms - before.compute_ms) / count,
        waiting_ms: (after.waiting_ms - before.waiting_ms) / count,
        bytes_sent: (after.bytes_sent - before.bytes_sent) as f64 / count,
    }
}

impl Measurement {
    fn json(&self) -> Value {
        let nodes: Vec<Value> = self.nodes.iter().map(NodeMeans::json).collect();
        let (median, p95) = (quantile(&self.latencies, 0.5), quantile(&self.latencies, 0.95));
        json!({ "latency_ms": { "median": median, "p95": p95 }, "nodes": nodes })
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["node", "compute ms", "waiting ms", "bytes sent"]);
        for node in &self.nodes {
            table.add_row([
                node.rank.to_string(),
                format!("{:.3}", node.compute_ms),
                format!("{:.3}", node.waiting_ms),
                format!("{:.0}", node.bytes_sent),
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let (median, p95) = (quantile(&self.latencies, 0.5), quantile(&self.latencies, 0.95));
        let count = self.latencies.len();
        let requests = if count == 1 { "request" } else { "requests" };
        format!(
            "latency  median {median:.3} ms  p95 {p95:.3} ms  ({count} {requests})\n\n\
             Each node, a request:\n{}",
            table.trim_fmt()
        )
    }
}

impl NodeMeans {
    fn json(&self) -> Value {
        let (rank, bytes_sent) = (self.rank, self.bytes_sent.round() as u64);
        let (compute_ms, waiting_ms) = (self.compute_ms, self.waiting_ms);
        json!({
            "rank": rank,
            "compute_ms": compute_ms,
            "waiting_ms": waiting_ms,
            "bytes_sent": bytes_sent,
        })
    }
}

/// The smallest value that at least the fraction `q` of the values do not exceed; 0 of none.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or_default()
}

/// Outputs of one shape, one after another on axis 0.
pub(super) fn stack(outputs: Vec<Array>) -> Result<Array> {
    let mut outputs = outputs.into_iter();
    let mut all = outputs.next().context("no answer")?;
    for output in outputs {
        let same = output.shape.get(1..) == all.shape.get(1..);
        ensure!(same, "shapes {:?} and {:?} do not stack", all.shape, output.shape);
        if let (Some(rows), Some(more)) = (all.shape.first_mut(), output.shape.first()) {
            *rows += more;
        }
        all.data.extend(output.data);
    }
    Ok(all)
}

fn check(path: &Path, output: &Array, reference: &Array) -> Result<ExitCode> {
    let name = path.display();
    let (found, expected) = (&output.shape, &reference.shape);
    ensure!(found == expected, "{name}: check: shape {expected:?}, but the output is {found:?}");
    let Some((at, difference)) = largest_difference(output, reference) else {
        return Ok(ExitCode::SUCCESS);
    };
    let place = position(at, &output.shape);
    let (ours, theirs) = (output.data[at], reference.data[at]);
    if difference <= TOLERANCE {
        super::progress(format_args!("check: largest difference {difference:.1e} at {place:?}"));
        return Ok(ExitCode::SUCCESS);
    }
    super::complain(&format!(
        "{name}: check: differs by {difference:.1e} at {place:?}: {ours} instead of {theirs}, \
         tolerance {TOLERANCE:.0e}"
    ));
    Ok(ExitCode::from(super::EXIT_DIFFERENT))
}

/// Where two arrays differ most, and by how much; infinitely where either is no number.
fn largest_difference(a: &Array, b: &Array) -> Option<(usize, f32)> {
    let difference = |(a, b): (&f32, &f32)| match (a - b).abs() {
        number if number.is_nan() && a != b => f32::INFINITY,
        number if number.is_nan() => 0.0,
        number => number,
    };
    let differences = a.data.iter().zip(&b.data).map(difference).enumerate();
    differences.max_by(|(_, a), (_, b)| a.total_cmp(b))
}

/// The indices, axis by axis, of a place in a row-major array.
fn position(at: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = at;
    let mut place: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&length| {
            let index = rest % length;
            rest /= length;
            index
        })
        .collect();
    place.reverse();
    place
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(quantile(&values, 0.5), 2.0);
        assert_eq!(quantile(&values, 0.95), 4.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn outputs_stack_on_the_first_axis() {
        let one = Array { shape: vec![1, 2], data: vec![1.0, 2.0] };
        let two = Array { shape: vec![1, 2], data: vec![3.0, 4.0] };
        let all = stack(vec![one, two]).unwrap();
        assert_eq!(all, Array { shape: vec![2, 2], data: vec![1.0, 2.0, 3.0, 4.0] });
    }

    #[test]
    fn the_largest_difference_is_found_with_its_place() {
        let a = Array { shape: vec![2, 3], data: vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0] };
        let mut b = a.clone();
        b.data[4] = 4.5;
        assert_eq!(largest_difference(&a, &b), Some((4, 0.5)));
        assert_eq!(position(4, &a.shape), [1, 1]);
        b.data[0] = f32::NAN;
        assert_eq!(largest_difference(&a, &b), Some((0, f32::INFINITY)));
        b.data[0] = f32::INFINITY;
        assert_eq!(largest_difference(&a, &b), Some((0, f32::INFINITY)));
    }

    #[test]
    fn the_json_has_the_keys_of_the_contract() {
        let node = NodeMeans { rank: 1, compute_ms: 2.0, waiting_ms: 0.5, bytes_sent: 10.0 };
        let measured = Measurement { latencies: vec![3.0], nodes: vec![node] };
        let expected = r#"{"latency_ms":{"median":3.0,"p95":3.0},"nodes":[{"rank":1,"compute_ms":2.0,"waiting_ms":0.5,"bytes_sent":10}]}"#;
        assert_eq!(measured.json().to_string(), expected);
    }
}
