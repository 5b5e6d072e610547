//! The command `snn-run`: runs the shards of a split network. See [`snn::run`].

use std::process::ExitCode;

use snn::run::{self, local};
use snn::terminal::{guard, parse_and_run};

fn main() -> ExitCode {
    guard("snn-run", || match local::serve_if_child() {
        Some(code) => code,
        None => parse_and_run(run::run),
    })
}
