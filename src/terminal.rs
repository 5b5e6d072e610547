//! What both commands say, and how: results on standard output, one line an error on standard error.
//!
//! Takes text and errors; writes them. A reader of standard output who has seen enough and left is no
//! error ([`is_broken_pipe`] tells). Nothing here ends the process.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::panic::{self, UnwindSafe};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};

/// Something went wrong.
pub const EXIT_ERROR: u8 = 2;

/// What the last panic said: a panic that a stage catches by itself is nobody's business.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs the command `tool`; a panic that comes this far ends it with one line, as an error does.
pub fn guard(tool: &str, command: impl FnOnce() -> ExitCode + UnwindSafe) -> ExitCode {
    panic::set_hook(Box::new(|info| {
        let text = info.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        tracing::debug!(text, "panic");
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }));
    panic::catch_unwind(command).unwrap_or_else(|_| {
        let text = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        complain(tool, &format!("internal error: {text}"));
        ExitCode::from(EXIT_ERROR)
    })
}

/// Parses the command line and runs it; help goes to standard output, mistakes to standard error.
pub fn parse_and_run<A: clap::Parser>(run: impl FnOnce(A) -> ExitCode) -> ExitCode {
    match A::try_parse() {
        Ok(args) => run(args),
        Err(answer) => {
            // A closed output is no error.
            let _ = answer.print();
            ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(EXIT_ERROR))
        }
    }
}

/// Writes one line about an error to standard error, in the name of `tool`.
pub fn complain(tool: &str, reason: &str) {
    // Without a standard error there is nobody left to tell.
    let _ = writeln!(io::stderr(), "{tool}: {reason}");
}

/// An error and its causes on one line, each said once.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if line.ends_with(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

/// Whether an error is that nobody reads standard output any more.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.into_iter().any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes to standard output.
pub(crate) fn print(text: impl Display) -> Result<()> {
    let mut output = io::stdout().lock();
    write!(output, "{text}").and_then(|()| output.flush()).context("standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once_and_on_one_line() {
        let inner = io::Error::other("no\nspace");
        let error = anyhow::Error::new(inner).context("write").context("y.npy");
        assert_eq!(one_line(&error), "y.npy: write: no space");
        let repeated = anyhow::anyhow!("a: b").context("x: a: b");
        assert_eq!(one_line(&repeated), "x: a: b");
    }

    #[test]
    fn a_reader_that_left_is_recognised() {
        let broken = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(is_broken_pipe(&broken.context("standard output")));
        assert!(!is_broken_pipe(&anyhow::Error::new(io::Error::other("disk"))));
    }
}
