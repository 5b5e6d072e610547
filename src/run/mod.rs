//! `snn-run`: one node, a whole cluster on this machine, an agent that waits for work, or a question
//! to a running cluster.
//!
//! Takes parsed [`args::Args`] and gives the process's exit code. Everything the user reads is
//! written here: results to standard output, progress and one line an error to standard error. What
//! examples and tests start clusters with is [`local::LocalCluster`].

mod agent;
pub mod args;
mod child;
pub mod emulation;
pub mod http;
mod infer;
pub mod input;
mod keep;
pub mod local;
mod report;
mod serve;
mod trace;

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use tracing_subscriber::EnvFilter;

use crate::terminal;
use args::{Args, Mode};
pub use infer::{class_names, input_spec};
pub use report::per_request;

/// The answer is no: `--check` found a difference.
pub const EXIT_DIFFERENT: u8 = 1;
/// Environment variable that says what is logged, as `tracing` filters are written.
const LOG_VARIABLE: &str = "SNN_LOG";
/// What is logged otherwise: our own warnings. Zenoh's describe what it tries again by itself.
const LOG_DEFAULT: &str = "off,snn=warn,snn_runtime=warn";
/// Where Linux tells the machine's name.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";
/// Worker threads of the process: they move bytes, the computing is done elsewhere.
const IO_THREADS: usize = 2;

/// Says whom a process without a key listens to.
fn warn_without_key(has_key: bool, insecure: bool) {
    match (has_key, insecure) {
        (true, _) => {}
        (false, false) => progress(
            "no key: only this machine is listened to, and nobody is looked for (--key FILE)",
        ),
        (false, true) => {
            progress("no key: nothing is encrypted, and whoever reaches the address takes part")
        }
    }
}

/// The machine's name, where it has one.
pub(crate) fn host_name() -> Option<String> {
    let name = std::fs::read_to_string(HOST_NAME).ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// Runs the command that was asked for, and says on standard error why it could not.
pub fn run(args: Args) -> ExitCode {
    start_logging();
    let done = match args.mode() {
        Mode::Node(node) => block_on(serve::node(node)),
        Mode::Local(local) => block_on(report::local(local)),
        Mode::Agent(agent) => block_on(agent::agent(agent)),
        Mode::Profile(profile) => emulation::profile(&profile),
        Mode::Infer(infer) => block_on(infer::infer(infer)),
    };
    done.unwrap_or_else(|error| {
        if terminal::is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        complain(&terminal::one_line(&error));
        ExitCode::from(terminal::EXIT_ERROR)
    })
}

/// Writes one line about an error to standard error.
fn complain(reason: &str) {
    terminal::complain("snn-run", reason);
}

/// Logs to standard error what [`LOG_VARIABLE`] asks for.
fn start_logging() {
    let filter =
        EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(LOG_DEFAULT));
    let color = io::stderr().is_terminal();
    let logging = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color);
    // An error means that somebody, an example say, logs already.
    let _ = logging.with_writer(io::stderr).try_init();
}

pub(crate) fn block_on<T>(task: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .enable_all()
        .build()
        .context("start")?;
    runtime.block_on(task)
}

/// Refuses a place for a file that could not be written once there is something to write.
fn check_place(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let name = path.display();
    ensure!(folder.is_none_or(Path::is_dir), "{name}: there is no such folder");
    ensure!(!path.is_dir(), "{name}: it is a folder");
    Ok(())
}

/// Writes a line to standard output.
fn print(text: impl Display) -> Result<()> {
    terminal::print(format_args!("{text}\n"))
}

/// Writes a line of progress to standard error.
fn progress(text: impl Display) {
    // Progress that nobody can read is no reason to stop.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Waits for Ctrl-C or SIGTERM.
async fn interrupted() -> Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("signals")?;
        tokio::select! {
            done = tokio::signal::ctrl_c() => done.context("signals"),
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.context("signals")
}
