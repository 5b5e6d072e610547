//! The command `snnc`: splits a network, looks into one, draws a partition. See [`snn::compile`].

use std::process::ExitCode;

use snn::compile;
use snn::terminal::{guard, parse_and_run};

fn main() -> ExitCode {
    guard("snnc", || parse_and_run(compile::run))
}
