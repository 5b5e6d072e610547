//! The command `snn-run`: runs the shards of a split network. See [`snn::run`].

use std::panic;
use std::process::ExitCode;

use clap::Parser as _;
use snn::run::args::Args;
use snn::run::{self, EXIT_ERROR, local};

fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| run::complain(&format!("internal error: {info}"))));
    let done = panic::catch_unwind(|| {
        if let Some(code) = local::serve_if_child() {
            return code;
        }
        match Args::try_parse() {
            Ok(args) => run::run(args),
            Err(answer) => {
                // Help goes to standard output, mistakes to standard error; a closed one is no error.
                let _ = answer.print();
                ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(EXIT_ERROR))
            }
        }
    });
    done.unwrap_or(ExitCode::from(EXIT_ERROR))
}
