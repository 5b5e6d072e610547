//! The command `snnc`: splits a network, looks into one, draws a partition. See [`snn::compile`].

use std::panic;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser as _;
use snn::compile::args::Args;
use snn::compile::{self, EXIT_ERROR};

/// What the last panic said: a panic that a stage catches by itself is nobody's business.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    panic::set_hook(Box::new(|info| {
        if let Ok(mut text) = PANIC.lock() {
            *text = info.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        }
    }));
    let done = panic::catch_unwind(|| match Args::try_parse() {
        Ok(args) => compile::run(args),
        Err(answer) => {
            // Help goes to standard output, mistakes to standard error; a closed one is no error.
            let _ = answer.print();
            ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(EXIT_ERROR))
        }
    });
    done.unwrap_or_else(|_| {
        let text = PANIC.lock().map(|text| text.clone()).unwrap_or_default();
        compile::complain(&format!("internal error: {text}"));
        ExitCode::from(EXIT_ERROR)
    })
}
