//! Small devices, emulated: how slow a node is to be, and how fast this machine is.
//!
//! Takes the command line's `--device` and `--link`; gives an [`Emulation`], and engines slowed down as it
//! says. A speed in GFLOP/s becomes a factor by measuring this machine with the blocks of
//! [`snn_runtime::profile`], as `snn-run --profile` does: a device that this command calls one of 5 GFLOP/s
//! is what `--device 5gflops` makes of this one. Nothing needs the rights of an administrator.

use std::fs;
use std::process::ExitCode;
use std::str::FromStr as _;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};
use serde_json::json;
use snn_runtime::engine::slowed::{Pace, Slowed};
use snn_runtime::profile::{self, Profile};
use snn_runtime::{Engine, TractEngine};
use snn_schemas::cost::{Device, Link};

use super::args;

/// A device slower than this one.
#[derive(Clone, Debug, PartialEq)]
pub enum Slower {
    /// As fast as this device.
    As(Device),
    /// This often slower than this machine.
    Times(f64),
}

/// What a node is slowed down to; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Emulation {
    /// How often each segment's time is taken.
    pub times: Option<f64>,
    /// The link to all other nodes.
    pub link: Option<Link>,
}

impl Emulation {
    /// What the command line asks for, on nodes of `threads` threads. Measures this machine where it
    /// must.
    ///
    /// # Errors
    /// A device that is faster than this machine.
    pub fn new(device: Option<&Slower>, link: Option<Link>, threads: usize) -> Result<Emulation> {
        let times = match device {
            None => None,
            Some(Slower::Times(times)) => Some(*times),
            Some(Slower::As(device)) => {
                let here = measure(threads)?.gflops;
                let wanted = device.gflops;
                ensure!(
                    wanted <= here,
                    "--device: {wanted} GFLOP/s are more than the {here:.1} of this machine"
                );
                Some(here / wanted)
            }
        };
        Ok(Emulation { times, link })
    }
}

/// An engine of `threads` threads, whose segments take `times` as long as they would.
pub(super) fn engine(threads: usize, times: Option<f64>) -> Box<dyn Engine> {
    let engine = TractEngine::new(threads);
    match times {
        None => Box::new(engine),
        Some(times) => Box::new(Slowed { engine, pace: Pace::Times(times) }),
    }
}

/// Reads `--device`.
pub(super) fn device(text: &str) -> Result<Slower, String> {
    if let Some(times) = text.strip_suffix(['x', '×']).and_then(|times| times.parse::<f64>().ok())
    {
        let sound = times.is_finite() && times >= 1.0;
        return sound
            .then_some(Slower::Times(times))
            .ok_or_else(|| "expected how often slower than this machine, at least 1x".to_owned());
    }
    known(text).map(Slower::As)
}

/// A device by its speed, or by the profile in a file.
pub(crate) fn known(text: &str) -> Result<Device, String> {
    match (Device::from_str(text), fs::read(text)) {
        (Ok(device), _) => Ok(device),
        (Err(_), Ok(json)) => Device::from_json(&json).map_err(|error| error.to_string()),
        (Err(error), Err(_)) => Err(format!("{error}, or a file of snn-run --profile --json")),
    }
}

/// Reads `--link`.
pub(crate) fn link(text: &str) -> Result<Link, String> {
    text.parse().map_err(|error: snn_schemas::cost::CostError| error.to_string())
}

fn measure(threads: usize) -> Result<Profile> {
    profile::measure(&mut TractEngine::new(threads)).context("profile")
}

/// Runs `snn-run --profile`.
pub(super) fn profile(args: &args::Profile) -> Result<ExitCode> {
    super::progress("measuring this device …");
    let profile = measure(args.threads)?;
    match args.json {
        true => {
            let isa = format!("{:?}", snn_runtime::kernels::Isa::best());
            let about = json!({
                "gflops": profile.gflops,
                "gbytes": profile.gbytes,
                "threads": args.threads,
                "instructions": isa,
                "stages": profile.stages,
            });
            super::print(format_args!("{about:#}"))?;
        }
        false => super::print(table(&profile))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn table(profile: &Profile) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["blocks", "MFLOPs", "ms", "GFLOP/s", "ms exchanging"]);
    for stage in &profile.stages {
        table.add_row([
            stage.shape.clone(),
            format!("{:.1}", stage.flops as f64 / 1e6),
            format!("{:.3}", stage.ms),
            format!("{:.1}", stage.gflops),
            format!("{:.3}", stage.exchanging_ms),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let moving = profile.gbytes.map_or_else(String::new, |gbytes| {
        format!(", {gbytes:.1} GB/s of features sent or received")
    });
    format!("{:.1} GFLOP/s{moving}\n\n{}", profile.gflops, table.trim_fmt())
}
