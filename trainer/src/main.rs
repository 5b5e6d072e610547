//! `snn-train`: trains a separable network, searches its policy, exports both.
//!
//! Parses the command line, calls the library, shows how far it is, and prints what came out: a
//! table, or JSON with `--json`. Errors and warnings are one line each on stderr. Exit codes: 0 done, 2 error.

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use snn_trainer::{Config, DeviceName, Outcome, Progress, Report, Stage, TrainError, Trial};

/// Trains a separable network, searches its communication policy, exports ONNX.
#[derive(Parser)]
#[command(name = "snn-train", version, arg_required_else_help = true)]
#[command(
    after_help = "Example:\n  snn-train run examples/digits.toml --out runs/digits\n  snn-train eval runs/digits"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print what came out as JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// All stages: train, search, fine-tune, test, export.
    #[command(after_help = "Example:\n  snn-train run examples/digits.toml --out runs/digits")]
    Run {
        #[command(flatten)]
        of: Of,
        /// Go on with the run that OUT already holds.
        #[arg(long)]
        resume: bool,
    },
    /// Stage 1 alone: the weights, under policies drawn at random.
    #[command(after_help = "Example:\n  snn-train train examples/digits.toml --out runs/digits")]
    Train {
        #[command(flatten)]
        of: Of,
        /// Go on with the run that OUT already holds.
        #[arg(long)]
        resume: bool,
    },
    /// Stages 2 and 3 alone: the controller, and the choice of a policy.
    #[command(after_help = "Example:\n  snn-train search examples/digits.toml --out runs/digits")]
    Search {
        #[command(flatten)]
        of: Of,
    },
    /// The last stage alone: the weights once more, under the chosen policy.
    #[command(after_help = "Example:\n  snn-train finetune examples/digits.toml --out runs/digits")]
    Finetune {
        #[command(flatten)]
        of: Of,
    },
    /// Judge on the test images and write model.onnx, best.json and report.html.
    #[command(after_help = "Example:\n  snn-train export examples/digits.toml --out runs/digits")]
    Export {
        #[command(flatten)]
        of: Of,
    },
    /// All samplers side by side on trained weights: rewards, and what they find.
    #[command(
        after_help = "Example:\n  snn-train compare examples/digits.toml --out runs/digits --seeds 3"
    )]
    Compare {
        #[command(flatten)]
        of: Of,
        /// How many seeds to repeat it with.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
        seeds: u64,
    },
    /// Test accuracy of what a run exported, as tract runs it.
    #[command(
        after_help = "Example:\n  snn-train eval runs/digits\n  snnc split runs/digits/model.onnx --policy runs/digits/best.json --nodes 1 -o fused\n  snn-train eval runs/digits --model fused/shard_0.onnx"
    )]
    Eval {
        /// Folder of a finished run.
        run_dir: PathBuf,
        /// Folder of the images, where they do not come with the program.
        #[arg(long)]
        data: Option<PathBuf>,
        /// Judge this ONNX file instead, as it is [default: the run's model under its policy].
        #[arg(long)]
        model: Option<PathBuf>,
    },
}

/// What to work on.
#[derive(Args)]
struct Of {
    /// Settings, as TOML.
    config: PathBuf,
    /// Folder of the images, where they do not come with the program.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Folder of the run [default: runs/ and the name of CONFIG].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where to train: flex is the CPU, the others are there if they were built in [default: what
    /// CONFIG says, or flex].
    #[arg(long, value_parser = devices())]
    device: Option<DeviceName>,
}

impl Of {
    fn settings(&self) -> anyhow::Result<Config> {
        let text = std::fs::read_to_string(&self.config)
            .with_context(|| self.config.display().to_string())?;
        let config = Config::from_toml(&text).with_context(|| self.config.display().to_string())?;
        Ok(Config { device: self.device.unwrap_or(config.device), ..config })
    }

    fn out(&self) -> PathBuf {
        let stem = self.config.file_stem().unwrap_or("run".as_ref());
        self.out.clone().unwrap_or_else(|| Path::new("runs").join(stem))
    }
}

fn devices() -> impl TypedValueParser<Value = DeviceName> {
    PossibleValuesParser::new(DeviceName::ALL.map(DeviceName::name)).try_map(|name| name.parse())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What a panic says is one line, as an error's.
    panic::set_hook(Box::new(|info| {
        let text = info.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        complain(&format!("internal error: {text}"));
    }));
    match panic::catch_unwind(|| run(&cli)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            complain(&sentence(&error));
            ExitCode::from(2)
        }
        Err(_) => ExitCode::from(2),
    }
}

fn complain(reason: &str) {
    // Nobody is left to tell if stderr is closed.
    let _ = writeln!(io::stderr(), "snn-train: {reason}");
}

/// An error and its causes on one line. What a [`TrainError`] says includes its own.
fn sentence(error: &anyhow::Error) -> String {
    let mut causes = Vec::new();
    for cause in error.chain() {
        causes.push(cause.to_string().split_whitespace().collect::<Vec<_>>().join(" "));
        if cause.is::<TrainError>() {
            break;
        }
    }
    causes.join(": ")
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let mut bar = Bar::new(cli.quiet);
    let done =
        |out: PathBuf| say(cli.json, &json!({ "folder": out }), &format!("{}\n", out.display()));
    match &cli.command {
        Command::Run { of, resume } => {
            let (config, out) = (of.settings()?, of.out());
            let outcome = snn_trainer::run(&config, of.data.as_deref(), &out, *resume, &mut bar)?;
            bar.finish();
            tell(cli.json, &config, &outcome)
        }
        Command::Train { of, resume } => {
            let out = of.out();
            snn_trainer::train(&of.settings()?, of.data.as_deref(), &out, *resume, &mut bar)?;
            bar.finish();
            done(out)
        }
        Command::Search { of } => {
            let out = of.out();
            snn_trainer::search(&of.settings()?, of.data.as_deref(), &out, &mut bar)?;
            bar.finish();
            done(out)
        }
        Command::Finetune { of } => {
            let out = of.out();
            snn_trainer::finetune(&of.settings()?, of.data.as_deref(), &out, &mut bar)?;
            bar.finish();
            done(out)
        }
        Command::Export { of } => {
            let (config, out) = (of.settings()?, of.out());
            let outcome = snn_trainer::export(&config, of.data.as_deref(), &out, &mut bar)?;
            bar.finish();
            tell(cli.json, &config, &outcome)
        }
        Command::Compare { of, seeds } => {
            let out = of.out();
            let seeds: Vec<u64> = (1..=*seeds).collect();
            let trials = snn_trainer::compare(
                &of.settings()?,
                of.data.as_deref(),
                &out,
                (&seeds, &mut bar),
            )?;
            bar.finish();
            let page = out.join("compare.html");
            say(cli.json, &json!(trials), &format!("{}{}\n", ranking(&trials), page.display()))
        }
        Command::Eval { run_dir, data, model } => {
            let score = snn_trainer::evaluate(run_dir, data.as_deref(), model.as_deref())?;
            let accuracy = score.accuracy();
            let text = format!(
                "test accuracy {:.2} % ({} of {} images), loss {:.4}\n",
                100.0 * accuracy,
                score.correct,
                score.images,
                score.loss
            );
            let value = json!({ "accuracy": accuracy, "correct": score.correct, "images": score.images, "loss": score.loss });
            say(cli.json, &value, &text)
        }
    }
}

/// Rewards of each sampler under each seed, a line each.
fn ranking(trials: &[Trial]) -> String {
    let mut text =
        format!("{:<11} {:>5} {:>10} {:>10} {:>10}\n", "sampler", "seed", "late", "mean", "best");
    for trial in trials {
        let rewards = [trial.late(), trial.mean, trial.best];
        let [late, mean, best] = rewards.map(|reward| format!("{:.2} %", 100.0 * reward));
        let (name, seed) = (trial.sampler.name(), trial.seed);
        text += &format!("{name:<11} {seed:>5} {late:>10} {mean:>10} {best:>10}\n");
    }
    text
}

/// Prints what a run gave.
fn tell(as_json: bool, config: &Config, outcome: &Outcome) -> anyhow::Result<()> {
    let blocks = config.net.blocks();
    let names = outcome.candidates.iter().map(|judged| judged.candidate.name.len());
    let width = names.max().unwrap_or(0).max("policy".len());
    let mut text = format!(
        "{:<width$} {:>10} {:>10} {:>11} {:>10} {:>10} {:>11}\n",
        "policy", "validation", "test", "paper cost", "wire", "wire bytes", "planned"
    );
    let mut candidates = serde_json::Map::new();
    for judged in &outcome.candidates {
        let [validation, test] = [judged.validation.accuracy(), judged.test.accuracy()];
        let (cost, wire) = (judged.policy.paper_cost(blocks), judged.wire);
        text += &format!(
            "{:<width$} {:>8.2} % {:>8.2} % {:>9.2} % {:>8.2} % {:>10} {:>11}\n",
            judged.candidate.name,
            100.0 * validation,
            100.0 * test,
            100.0 * cost,
            100.0 * wire.fraction(),
            wire.bytes,
            wire.planned_bytes,
        );
        let value =
            json!({ "validation": validation, "test": test, "paper_cost": cost, "wire": wire });
        candidates.insert(judged.candidate.name.clone(), value);
    }
    let files = [Some(&outcome.model), outcome.policy.as_ref(), Some(&outcome.report)];
    text.extend(files.into_iter().flatten().map(|file| format!("{}\n", file.display())));
    let value = json!({
        "candidates": candidates,
        "model": outcome.model,
        "policy": outcome.policy,
        "report": outcome.report,
    });
    say(as_json, &value, &text)
}

fn say(as_json: bool, value: &serde_json::Value, text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = match as_json {
        true => writeln!(out, "{value}"),
        false => out.write_all(text.as_bytes()),
    };
    match written {
        // Whoever reads may stop early, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A progress line a stage: a bar on a terminal, a line now and then in a file.
struct Bar {
    bar: Option<ProgressBar>,
    of: Option<(Stage, usize)>,
    plain: bool,
    told: Option<Instant>,
    quiet: bool,
}

/// How often a progress line is written where no bar can be drawn.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

impl Bar {
    fn new(quiet: bool) -> Bar {
        Bar { bar: None, of: None, plain: !io::stderr().is_terminal(), told: None, quiet }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn start(&mut self, report: &Report) -> ProgressBar {
        self.finish();
        let bar = ProgressBar::new(report.total as u64);
        // The message says how long all stages will take yet.
        let template = "{prefix:<12} {bar:30} {pos:>5}/{len} {elapsed:>4}  {msg}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(format!("{} {}", report.stage, report.round));
        bar
    }
}

impl Progress for Bar {
    /// Also where no progress is wanted: it is about the result.
    fn warn(&mut self, warning: &str) {
        complain(warning);
    }

    fn report(&mut self, report: &Report) {
        if self.quiet {
            return;
        }
        let loss = report.loss.map(|loss| format!("loss {loss:.4}"));
        let accuracy = report.accuracy.map(|part| format!("accuracy {:.2} %", 100.0 * part));
        let left = report.time_left().map(|left| format!("{left} left in all"));
        let figures: Vec<String> = [loss, accuracy, left].into_iter().flatten().collect();
        let figures = figures.join(", ");
        if self.plain {
            let last = report.done == report.total;
            if last || self.told.is_none_or(|told| told.elapsed() > PLAIN_EVERY) {
                self.told = Some(Instant::now());
                let Report { stage, round, done, total, .. } = report;
                // Progress that cannot be written is no reason to stop training.
                let _ = writeln!(io::stderr(), "{stage} {round}: {done}/{total} {figures}");
            }
            return;
        }
        let of = Some((report.stage, report.round));
        let bar = match self.bar.take() {
            Some(bar) if self.of == of => bar,
            other => {
                self.bar = other;
                self.start(report)
            }
        };
        self.of = of;
        bar.set_message(figures);
        bar.set_position(report.done as u64);
        self.bar = Some(bar);
    }
}
