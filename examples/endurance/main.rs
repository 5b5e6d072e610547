//! What a cluster of four endures on this machine: time, deaths, crowds, and being watched.
//!
//! Starts four nodes as processes of their own, over loopback, of the digits model (or another split
//! with `--model` and `--policy`), and measures one thing:
//!
//! - `soak`: hours of requests; memory, descriptors and latency by the minute.
//! - `takeover`: from the death of a node to the next answer, each rank in turn.
//! - `returns`: what a node's death and its return cost those who ask meanwhile.
//! - `clients`: many clients at once over HTTP; throughput, latency, who was turned away.
//! - `watching`: throughput and processor time of a cluster that is watched, against the same when it is not.
//!
//! With `--key` the nodes have a key: what they say to each other is encrypted, and each proves to be of the
//! cluster whenever it connects. Clients ask over HTTP on this machine all the same.
//!
//! Every answer is compared with the first of its input. Exit code 1 where one was wrong or lost.
//! `cargo run --release --example endurance -- soak --minutes 20`

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it talks to whoever runs it")]

mod clients;
mod devices;
mod http;
mod returns;
mod soak;
mod takeover;
mod watching;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use devices::Model;

/// Set in the processes that are nodes: they are this very program.
const NODE: &str = "SNN_ENDURANCE_NODE";
/// What it is set to in those that are told when to record.
const TOLD: &str = "told";

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// Model to split, one group a node
    #[arg(long, global = true, default_value = "examples/models/digits.onnx")]
    model: PathBuf,
    /// Its policy
    #[arg(long, global = true, default_value = "examples/models/digits.json")]
    policy: PathBuf,
    /// Give all nodes a key, made for the run: they then speak TLS with each other
    #[arg(long, global = true)]
    key: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Hours of requests
    Soak {
        /// How long
        #[arg(long, default_value_t = 20)]
        minutes: u64,
        /// Requests a second
        #[arg(long, default_value_t = 5.0)]
        rate: f64,
    },
    /// Deaths
    Takeover {
        /// How many
        #[arg(long, default_value_t = 30)]
        rounds: usize,
    },
    /// Deaths and returns
    Returns {
        /// How many
        #[arg(long, default_value_t = 30)]
        rounds: usize,
    },
    /// Crowds
    Clients {
        /// How many at once
        #[arg(long, default_value_t = 64)]
        count: usize,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Traces, metrics and status, against none
    Watching {
        /// Pairs of runs
        #[arg(long, default_value_t = 60)]
        pairs: usize,
        /// Length of a run
        #[arg(long, default_value_t = 1.0)]
        seconds: f64,
    },
}

fn main() -> ExitCode {
    match std::env::var(NODE) {
        Ok(told) if told == TOLD => return end(watching::node::run().map(|()| true)),
        Ok(_) => return snn::run::run(snn::run::args::Args::parse()),
        Err(_) => {}
    }
    let Args { what, model, policy, key } = Args::parse();
    let done = Model::split(&model, &policy, key).and_then(|model| match what {
        What::Soak { minutes, rate } => soak::run(&model, minutes, rate),
        What::Takeover { rounds } => takeover::run(&model, rounds),
        What::Returns { rounds } => returns::run(&model, rounds),
        What::Clients { count, seconds } => clients::run(&model, count, seconds),
        What::Watching { pairs, seconds } => watching::run(&model, pairs, seconds),
    });
    end(done)
}

fn end(done: anyhow::Result<bool>) -> ExitCode {
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("endurance: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The value below which the share `q` of the numbers lies; 0 of none.
fn quantile(numbers: &[f64], q: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}
