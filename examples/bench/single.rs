//! One device without a cluster: this engine, stock tract and ONNX Runtime on the unsplit network.
//!
//! Takes the models; gives the least time of each in ms on this machine, one thread, run in turn. The
//! least time is that of the undisturbed machine; a device is slower by one factor for all of them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};
use bytes::BytesMut;
use serde::Serialize;
use snn_runtime::engine::{Engine, Executor};
use snn_runtime::shard::Step;
use snn_runtime::{Shard, TractEngine, profile};

use crate::models::Models;

/// Rounds, and runs of each in a round.
const ROUNDS: usize = 5;
const RUNS: usize = 40;
const SCRIPT: &str = include_str!("onnxruntime.py");

/// Least times in ms.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Single {
    /// The separable network in this engine.
    pub(crate) ours: f64,
    /// The same in tract without this engine's convolutions.
    pub(crate) tract: f64,
    /// The same in ONNX Runtime, where it is installed.
    pub(crate) onnxruntime: Option<f64>,
    /// The ordinary network in this engine.
    pub(crate) ours_ordinary: Option<f64>,
    /// The same in ONNX Runtime.
    pub(crate) onnxruntime_ordinary: Option<f64>,
    /// Its version.
    pub(crate) onnxruntime_version: Option<String>,
    /// GB/s of features that this engine takes out to send or adds once received.
    pub(crate) gbytes: Option<f64>,
}

impl Single {
    pub(crate) fn measure(models: &Models, python: &Path) -> Result<Single> {
        let mut ours = Loaded::new(&models.whole(), TractEngine::new(1))?;
        let mut tract = Loaded::new(&models.whole(), TractEngine::stock(1))?;
        let ordinary = models.has_ordinary.then(|| models.ordinary());
        let mut ours_ordinary =
            ordinary.as_deref().map(|path| Loaded::new(path, TractEngine::new(1))).transpose()?;
        let infinite = f64::INFINITY;
        let gbytes = profile::measure(&mut TractEngine::new(1)).context("profile")?.gbytes;
        let mut single = Single { ours: infinite, tract: infinite, gbytes, ..Single::default() };
        for _ in 0..ROUNDS {
            single.ours = ours.least()?.min(single.ours);
            single.tract = tract.least()?.min(single.tract);
            keep(
                &mut single.onnxruntime,
                onnxruntime(python, &models.whole()).map(|found| found.0),
            );
            if let (Some(path), Some(loaded)) = (&ordinary, &mut ours_ordinary) {
                keep(&mut single.ours_ordinary, Some(loaded.least()?));
                let found = onnxruntime(python, path);
                single.onnxruntime_version = found.as_ref().map(|found| found.1.clone());
                keep(&mut single.onnxruntime_ordinary, found.map(|found| found.0));
            }
        }
        Ok(single)
    }

    /// What this engine makes of the unsplit network here.
    pub(crate) fn gflops(&self, models: &Models) -> f64 {
        models.flops as f64 / 1e6 / self.ours
    }

    /// ONNX Runtime with whichever network suits it better.
    pub(crate) fn best_onnxruntime(&self) -> Option<f64> {
        [self.onnxruntime, self.onnxruntime_ordinary].into_iter().flatten().min_by(f64::total_cmp)
    }
}

fn keep(least: &mut Option<f64>, found: Option<f64>) {
    *least = [*least, found].into_iter().flatten().min_by(f64::total_cmp);
}

/// A network in an engine, with an input.
struct Loaded {
    shard: Shard,
    executor: Box<dyn Executor>,
    image: Vec<u8>,
}

impl Loaded {
    fn new(path: &Path, mut engine: TractEngine) -> Result<Loaded> {
        let shard = Shard::from_bytes(fs::read(path)?.into())?;
        let program = shard.program();
        let slot = *program.inputs.first().context("the model has no input")?;
        let shape = program.slot(slot).shape.clone().context("the input has no fixed shape")?;
        let value = |at: usize| ((at * 7919 % 257) as f32 / 128.0 - 1.0).to_le_bytes();
        let image = (0..shape.iter().product()).flat_map(value).collect();
        let executor = engine.load(program)?;
        Ok(Loaded { shard, executor, image })
    }

    /// The least time of some runs, in ms.
    fn least(&mut self) -> Result<f64> {
        let mut least = f64::INFINITY;
        for _ in 0..RUNS {
            let start = Instant::now();
            self.run()?;
            least = least.min(1e3 * start.elapsed().as_secs_f64());
        }
        Ok(least)
    }

    fn run(&mut self) -> Result<()> {
        let program = self.shard.program();
        let job = self.executor.begin();
        for &slot in &program.inputs {
            self.executor.write(job, slot, &self.image)?;
        }
        for step in &program.steps {
            if let Step::Compute(segment) = step {
                self.executor.compute(job, *segment)?;
            }
        }
        for &slot in &program.outputs {
            self.executor.read(job, slot, &mut BytesMut::new())?;
        }
        self.executor.end(job);
        Ok(())
    }
}

/// The least time of a network in ONNX Runtime on one thread, and its version; none where it is not
/// installed.
fn onnxruntime(python: &Path, model: &Path) -> Option<(f64, String)> {
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT]).arg(model).arg(RUNS.to_string()).stderr(Stdio::null());
    let done = command.output().ok().filter(|done| done.status.success())?;
    let text = String::from_utf8(done.stdout).ok()?;
    let (ms, version) = text.trim().split_once(' ')?;
    Some((ms.parse().ok()?, version.to_owned()))
}
