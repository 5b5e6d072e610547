//! `snnc`: splits a model, looks into one, draws a partition, predicts what it costs, or deploys one.
//!
//! Takes parsed [`args::Args`] and gives the process's exit code. What the user asked for goes to
//! standard output; errors go to standard error, one line each: file, stage, reason. Nothing is
//! written to disk unless everything is.

pub mod args;
mod cost;
mod deploy;
mod inspect;
mod key;
mod output;
mod show;
mod split;

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use snn_compiler::{CompileError, Options, PolicySource, Source, Split};
use snn_schemas::policy::MAX_POLICY_BYTES;

use crate::terminal::{self, is_broken_pipe, one_line, print};
use args::{Args, Command};

pub use output::write;

/// Largest model read: ONNX's own limit, what a protobuf message may have.
const MAX_MODEL_BYTES: u64 = 1 << 31;
/// Models from this size on take over a second: the user is told that work goes on.
const LARGE_MODEL_BYTES: usize = 64 << 20;

/// Runs the command that was asked for, and says on standard error why it could not.
pub fn run(args: Args) -> ExitCode {
    match dispatch(&args) {
        Ok(code) => code,
        // Whoever reads us has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&one_line(&error));
            ExitCode::from(terminal::EXIT_ERROR)
        }
    }
}

fn dispatch(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Split(split) => split::split(split)?,
        Command::Inspect(inspect) => inspect::inspect(inspect)?,
        Command::Cost(cost) => cost::cost(cost)?,
        Command::Show(show) => show::show(show)?,
        Command::Deploy(deploy) => return deploy::deploy(deploy),
        Command::Key(args::Key::New(new)) => key::new(new)?,
        Command::Key(args::Key::Authority(authority)) => key::authority(authority)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes one line about an error to standard error.
fn complain(reason: &str) {
    terminal::complain("snnc", reason);
}

/// The bytes of a file of at most `limit` bytes.
fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut bytes = Vec::with_capacity(usize::try_from(length.min(limit)).unwrap_or(0));
        file.take(limit + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().with_context(|| format!("{}: read", path.display()))?;
    if bytes.len() as u64 > limit {
        anyhow::bail!(
            "{}: read: larger than the {limit} bytes such a file may have",
            path.display()
        );
    }
    Ok(bytes)
}

/// Reads and decodes a model file.
fn read_model(path: &Path) -> Result<Source> {
    let bytes = read_file(path, MAX_MODEL_BYTES)?;
    if bytes.len() >= LARGE_MODEL_BYTES {
        // Progress that nobody can read is no reason to stop.
        let _ = writeln!(io::stderr(), "snnc: {}: {} MB …", path.display(), bytes.len() >> 20);
    }
    Source::from_bytes(bytes.into()).with_context(|| path.display().to_string())
}

/// Reads and checks a policy file.
fn read_policy(path: &Path) -> Result<PolicySource> {
    let bytes = read_file(path, MAX_POLICY_BYTES as u64)?;
    PolicySource::from_bytes(&bytes).with_context(|| format!("{}: policy", path.display()))
}

/// Compiles the model at `path` as `compile` says.
fn compile(path: &Path, compile: &args::Compile) -> Result<Split> {
    compile_with(path, compile.policy.as_deref(), &compile.options())
}

/// Compiles the model at `path` under the policy of a file.
fn compile_with(path: &Path, policy: Option<&Path>, options: &Options) -> Result<Split> {
    let source = read_model(path)?;
    let read = policy.map(read_policy).transpose()?;
    let split = snn_compiler::compile(&source, read.as_ref(), options);
    split.map_err(|error| blame(error, &source, path, policy))
}

/// Puts the file in front that the error is about.
fn blame(
    error: CompileError,
    source: &Source,
    model: &Path,
    policy: Option<&Path>,
) -> anyhow::Error {
    if matches!(error, CompileError::UnknownOp { .. })
        && let Some(rank) = source.model.metadata("snn.rank")
    {
        let model = model.display();
        return anyhow::anyhow!("{model}: read: shard {rank} of a split network, not a whole one");
    }
    let is_about_policy = matches!(
        error,
        CompileError::PolicyGroups { .. }
            | CompileError::PolicySteps { .. }
            | CompileError::CrossesStride { .. }
    );
    let file = policy.filter(|_| is_about_policy).unwrap_or(model);
    anyhow::Error::new(error).context(file.display().to_string())
}

#[cfg(test)]
#[path = "../../compiler/tests/fixtures/mod.rs"]
mod fixtures;

#[cfg(test)]
mod tests;
