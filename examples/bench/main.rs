//! Four slow devices against one, in networks of their own: what splitting is worth on this machine.
//!
//! Makes four network namespaces on a bridge, shapes every interface with `tbf`, slows each node to a
//! stated speed, and measures in turn, request by request: one device that runs the unsplit network, the
//! four of them, and the same four emulated in user space. Beside them stand what the cost model predicts,
//! stock tract and ONNX Runtime on one device. Writes `bench.json` and `bench.svg` (the paper's Figure 6).
//! Needs root, `ip` and `tc`; ONNX Runtime (a Python package) is left out where it is not installed.
//! `cargo run --release --example bench` takes about three minutes; README.md beside it says what it means.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it talks to whoever runs it")]

#[path = "../../compiler/tests/fixtures/mod.rs"]
mod fixtures;
mod links;
mod machine;
mod models;
mod namespaces;
mod report;
mod single;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use snn_schemas::cost::{Device, Link};

use links::{Measured, Orders};
use models::Models;
use namespaces::Namespaces;
use report::Report;
use single::Single;

/// Set in the process that measures inside the first namespace: its orders, as JSON.
const ORDERS: &str = "SNN_BENCH_ORDERS";

#[derive(Debug, Parser)]
struct Args {
    /// Separable model to split [default: Sep-ResNeXt-56 4x16d, untrained]
    #[arg(long, requires = "policy")]
    model: Option<PathBuf>,
    /// Its policies [default: Table 6's with f16, and with i8 and i4 with zeros packed]
    #[arg(long)]
    policy: Vec<PathBuf>,
    /// Speed of each device
    #[arg(long, default_value = "5gflops")]
    device: Device,
    /// Links to measure; the first 300mbit one is drawn
    #[arg(long, default_values = ["1gbit,0.3ms", "300mbit,0.3ms", "100mbit,0.3ms"])]
    link: Vec<Link>,
    /// Requests of each kind, on each link
    #[arg(long, default_value_t = 60)]
    requests: usize,
    /// Python with the package onnxruntime
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Folder for traces of the four in their namespaces, one a link, which Perfetto opens
    #[arg(long)]
    traces: Option<PathBuf>,
    /// Write the paper's networks and policies to this folder, for the commands of runtime/BENCH.md, and measure nothing
    #[arg(long, value_name = "DIR")]
    write: Option<PathBuf>,
    /// Folder for bench.json and bench.svg
    #[arg(short, long, default_value = ".")]
    output: PathBuf,
}

fn main() -> ExitCode {
    if let Some(code) = snn::run::local::serve_if_child() {
        return code;
    }
    let told = |variable| std::env::var(variable).ok();
    let done = match (told(wire::TAKER), told(ORDERS)) {
        (Some(address), _) => wire::take(&address),
        (None, Some(orders)) => links::measure_here(&orders),
        (None, None) => run(&Args::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// One policy on one link.
struct Run {
    /// The policy's number.
    policy: usize,
    link: Link,
    measured: Measured,
}

fn run(args: &Args) -> Result<()> {
    if let Some(folder) = &args.write {
        return models::write(folder);
    }
    let models = Models::prepare(args.model.as_deref(), &args.policy)?;
    eprintln!("one device: this engine, stock tract, ONNX Runtime …");
    let single = Single::measure(&models, &args.python)?;
    // How often slower a device is than this machine, by what this engine makes of the whole network.
    let times = single.gflops(&models) / args.device.gflops;
    let namespaces = Namespaces::make(models.nodes())?;
    let mut runs = Vec::new();
    for (policy, (name, split)) in models.splits.iter().enumerate() {
        for &link in &args.link {
            let rate = link.bits_per_second / 1e6;
            eprintln!("four devices, {name}, {rate} Mbit/s …");
            namespaces.shape(&link)?;
            let trace = |folder: &PathBuf| folder.join(format!("trace_{policy}_{rate}mbit.json"));
            let orders = Orders {
                split: models.split_folder(policy),
                exchanges: split
                    .manifest
                    .transfers
                    .iter()
                    .filter(|transfer| transfer.step.is_some())
                    .map(|transfer| transfer.id)
                    .collect(),
                whole: models.whole_folder(),
                link,
                times,
                requests: args.requests,
                hosts: namespaces.hosts(),
                trace: args.traces.as_ref().map(trace),
            };
            let orders = serde_json::to_string(&orders)?;
            runs.push(Run { policy, link, measured: namespaces.run_in_first(ORDERS, &orders)? });
        }
    }
    drop(namespaces);
    let report = Report::new(args, &models, (&single, times), &runs)?;
    report.write(&args.output)?;
    println!("{}", report.text());
    Ok(())
}

/// The value below which the share `q` of the numbers lies; 0 of none.
fn quantile(numbers: &[f64], q: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}
