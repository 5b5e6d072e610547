//! A run: the stages tied together, and the folder that holds what they leave behind.
//!
//! Every round trains the weights for its share of the epochs (stage 1), teaches the controller on them
//! (stage 2), and chooses among the policies it then samples and the one chosen before (stage 3). After
//! the last round the random sampler chooses once, on the same weights, among as many policies as what
//! a single round judges allows. Then each candidate is fine-tuned and told the test images, and the
//! first is exported.
//!
//! The folder has `config.toml`, `run.json`, `metrics.jsonl`, a `report.html` that is drawn anew as the
//! run goes on, and in `checkpoints` the files `last.ckpt`, `best.ckpt` (the epoch with the best
//! validation accuracy) and `scores.jsonl` (policies judged on the weights as they are now); in the end
//! also `model.onnx` and `best.json`. Nothing is written before settings, images and the order of the
//! stages have been checked.
//!
//! Each stage does what is still missing up to its goal and no more. So a run that was stopped goes on
//! where its last checkpoint stands, at most an epoch, half a minute of the controller's steps or one
//! judged policy back, and ends with the figures of one that was not. Stages asked for one by one give
//! what a run of one round gives; of several rounds, all of stage 1 then comes before the controller
//! has learned anything.

mod choosing;
mod finish;
mod folder;
mod left;
mod weights;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use snn_schemas::Policy;

use self::finish::Drawing;
use self::folder::{
    CHECKPOINTS, COMPARE, COMPARE_PAGE, CONFIG, LAST, METRICS, MODEL, POLICY, SCORES, check_images,
    check_order, check_same, read_config, write_about,
};
use self::left::{Pace, Work};
use crate::candidate::Candidate;
use crate::checkpoint::{self, write_whole};
use crate::compare::Trial;
use crate::config::Config;
use crate::data::Data;
use crate::engine::judge_onnx;
use crate::error::TrainError;
use crate::export::{read_network, write_exchanging};
use crate::fit;
use crate::judge::Score;
use crate::metrics::{Line, Metrics};
use crate::net::Network;
use crate::progress::{Progress, Report, Stage};
use crate::state::State;
use crate::wire::Wire;
use crate::{compare as samplers, report};

/// The stages of a whole run. Choosing policies is part of the search, the test images of the export.
const WHOLE: &[Stage] = &[Stage::Train, Stage::Search, Stage::Finetune, Stage::Export];

/// How long the controller may learn between two checkpoints. An epoch is always followed by one.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// A fine-tuned candidate, judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// What it is, every limit filled in.
    pub candidate: Candidate,
    /// Its policy.
    pub policy: Policy,
    /// On the validation images.
    pub validation: Score,
    /// On the test images.
    pub test: Score,
    /// What its policy sends per image.
    pub wire: Wire,
}

/// What a finished run gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The candidates, in the settings' order; the first is the one that was exported.
    pub candidates: Vec<Judged>,
    /// The network that was exported, with the first candidate's weights and statistics.
    pub network: Network,
    /// The folder.
    pub folder: PathBuf,
    /// The exported network.
    pub model: PathBuf,
    /// The policy file; absent for a network of one group.
    pub policy: Option<PathBuf>,
    /// The report.
    pub report: PathBuf,
}

impl Outcome {
    /// The candidate that was exported.
    pub fn exported(&self) -> Option<&Judged> {
        self.candidates.first()
    }

    /// The candidate of this name.
    pub fn candidate(&self, name: &str) -> Option<&Judged> {
        self.candidates.iter().find(|judged| judged.candidate.name == name)
    }
}

/// Goes through all stages of `config` and leaves everything in the folder `out`.
///
/// Images come from the folder `data`, or from the crate itself if it has them. With `resume` an
/// earlier run in `out` is gone on with; without, it is an error to find one there.
///
/// # Errors
/// Bad settings or images, a folder that cannot be written to, a loss that leaves the numbers.
pub fn run(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    resume: bool,
    progress: &mut dyn Progress,
) -> Result<Outcome, TrainError> {
    let mut run = Run::open(Task { stages: WHOLE, config, data, out, resume }, progress)?;
    for round in 0..config.search.rounds {
        run.train(round)?;
        run.search(round)?;
    }
    run.baseline()?;
    run.finetune()?;
    run.test()?;
    run.export()?;
    Ok(run.outcome())
}

/// Stage 1 alone: the weights, for all epochs of all rounds, under the policies that `train.under`
/// says. A controller has learned nothing by then, and draws with equal probability.
///
/// # Errors
/// As [`run`].
pub fn train(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    resume: bool,
    progress: &mut dyn Progress,
) -> Result<(), TrainError> {
    let stages = &[Stage::Train];
    let mut run = Run::open(Task { stages, config, data, out, resume }, progress)?;
    (0..config.search.rounds).try_for_each(|round| run.train(round))?;
    run.draw()
}

/// Stages 2 and 3 alone, all rounds of them, and the random sampler's choice, on the weights that
/// [`train`] left.
///
/// # Errors
/// As [`run`]; or stage 1 is not done.
pub fn search(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<(), TrainError> {
    let stages = &[Stage::Search];
    let mut run = Run::open(Task { stages, config, data, out, resume: true }, progress)?;
    (0..config.search.rounds).try_for_each(|round| run.search(round))?;
    run.baseline()?;
    run.draw()
}

/// The last stage alone: each candidate's weights under its policy.
///
/// # Errors
/// As [`run`]; or no policy has been chosen.
pub fn finetune(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<(), TrainError> {
    let stages = &[Stage::Finetune];
    let mut run = Run::open(Task { stages, config, data, out, resume: true }, progress)?;
    run.finetune()?;
    run.draw()
}

/// Judges the fine-tuned candidates on the test images, and writes model, policy and report.
///
/// # Errors
/// As [`run`]; or fine-tuning is not done.
pub fn export(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<Outcome, TrainError> {
    let stages = &[Stage::Export];
    let mut run = Run::open(Task { stages, config, data, out, resume: true }, progress)?;
    run.test()?;
    run.export()?;
    Ok(run.outcome())
}

/// Sets all samplers side by side on the weights that [`train`] left, once for each of `seeds`.
///
/// Leaves `compare.json` and `compare.html` in the folder.
///
/// # Errors
/// As [`run`]; or stage 1 is not done, or the network has one group.
pub fn compare(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    (seeds, progress): (&[u64], &mut dyn Progress),
) -> Result<Vec<Trial>, TrainError> {
    if config.net.groups == 1 {
        return Err(TrainError::Data(
            "a network of one group has no policies to compare".to_owned(),
        ));
    }
    let stages = &[Stage::Search];
    let run = Run::open(Task { stages, config, data, out, resume: true }, progress)?;
    let (network, images) = (&run.state.network, &run.data.validation);
    let trials = samplers::compare(config, network, images, (seeds, run.progress))?;
    write_whole(&out.join(COMPARE), &serde_json::to_vec(&trials)?)?;
    write_whole(&out.join(COMPARE_PAGE), report::comparison(&trials)?.as_bytes())?;
    Ok(trials)
}

/// Judges what a finished run exported on the test images, as tract runs it.
///
/// The weights are those of `model.onnx`, the exchanges those of `best.json`, written into the model
/// as training simulates them. With `model` that file is judged instead, as it is: one that
/// contains its exchanges already, such as `snnc split --nodes 1` writes.
///
/// # Errors
/// The folder holds no finished run, the images are not its kind, or tract cannot run the model.
pub fn evaluate(
    folder: &Path,
    data: Option<&Path>,
    model: Option<&Path>,
) -> Result<Score, TrainError> {
    let config = read_config(folder)?.ok_or_else(|| TrainError::Order {
        stage: Stage::Test,
        path: folder.to_owned(),
        missing: CONFIG,
        before: Stage::Export,
    })?;
    let read = |path: &Path| fs::read(path).map_err(TrainError::io(path));
    let data = Data::load(&config, data)?;
    let (test, classes) = (&data.test, data.classes.len());
    if let Some(model) = model {
        return judge_onnx(&read(model)?, test, classes);
    }
    let policy = read_policy(folder, &config)?;
    let network = read_network(read(&folder.join(MODEL))?, &config)?;
    judge_onnx(&write_exchanging(&network, &policy, &data)?, test, classes)
}

/// The policy that a run exported: silent, where there is nobody to send to.
fn read_policy(folder: &Path, config: &Config) -> Result<Policy, TrainError> {
    if config.net.groups == 1 {
        return Ok(config.silent());
    }
    let path = folder.join(POLICY);
    let wrong = |reason: String| TrainError::Data(format!("{}: {reason}", path.display()));
    let json = fs::read(&path).map_err(TrainError::io(&path))?;
    let policy = Policy::from_json(&json).map_err(|error| wrong(error.to_string()))?;
    let fits = policy.groups == config.net.groups && policy.steps.len() <= config.steps();
    match fits && policy.staleness == config.exchange.staleness {
        true => Ok(policy),
        false => Err(wrong(format!("not a policy for {CONFIG}"))),
    }
}

/// What is asked for.
struct Task<'a> {
    /// The stages, of those in [`WHOLE`]; what the first builds on must be done.
    stages: &'static [Stage],
    config: &'a Config,
    data: Option<&'a Path>,
    /// The folder.
    out: &'a Path,
    /// Whether it may hold a run.
    resume: bool,
}

/// A run at work.
struct Run<'a> {
    stages: &'static [Stage],
    config: &'a Config,
    candidates: Vec<Candidate>,
    data: Data,
    folder: PathBuf,
    state: State,
    metrics: Metrics,
    progress: &'a mut dyn Progress,
    pace: Pace,
    drawing: Drawing,
    saved: Instant,
}

impl<'a> Run<'a> {
    fn open(task: Task<'a>, progress: &'a mut dyn Progress) -> Result<Run<'a>, TrainError> {
        let Task { stages, config, data, out, resume } = task;
        config.check()?;
        let data = Data::load(config, data)?;
        if fit::batches(&data.train, &config.train) == 0 {
            let (images, batch) = (data.train.len(), config.train.batch);
            return Err(TrainError::Data(format!(
                "{images} training images do not fill one batch of {batch}"
            )));
        }
        if let Some(left_out) = data.left_out() {
            progress.warn(&left_out);
        }
        let device = config.device.open()?.autodiff();
        let last = out.join(CHECKPOINTS).join(LAST);
        let sections = checkpoint::load(&last)?;
        let found = sections.is_some();
        if found && !resume {
            return Err(TrainError::Occupied { path: out.to_owned() });
        }
        let state = match sections {
            None => State::fresh(config, &device),
            Some(sections) => State::restore(config, &device, sections)
                .map_err(|reason| TrainError::Checkpoint { path: last, reason })?,
        };
        check_same(config, out, &state)?;
        check_images(out, &data)?;
        if let Some(first) = stages.first() {
            check_order(*first, config, out, &state.ledger)?;
        }
        // All that could be refused has been: only from here on is anything written.
        fs::create_dir_all(out.join(CHECKPOINTS)).map_err(TrainError::io(out))?;
        write_whole(&out.join(CONFIG), config.to_toml().as_bytes())?;
        write_about(out, config, &data)?;
        if !found {
            // What a run without a checkpoint has judged was judged on weights that are lost.
            remove(&out.join(CHECKPOINTS).join(SCORES))?;
        }
        let metrics = Metrics::open(&out.join(METRICS), state.ledger.lines)?;
        Ok(Run {
            stages,
            config,
            candidates: config.candidates(),
            data,
            folder: out.to_owned(),
            state,
            metrics,
            progress,
            pace: Pace::default(),
            drawing: Drawing::default(),
            saved: Instant::now(),
        })
    }

    /// Writes a line and tells whoever listens that so much of a stage is done, `work` of which the
    /// ledger does not have yet.
    fn note(
        &mut self,
        line: &Line,
        (done, total): (usize, usize),
        work: Work,
    ) -> Result<(), TrainError> {
        self.metrics.write(line)?;
        let accuracies = [line.test_accuracy, line.validation_accuracy, line.train_accuracy];
        self.tell(Report {
            stage: line.stage,
            round: line.round,
            done,
            total,
            loss: line.loss,
            accuracy: accuracies.into_iter().flatten().next(),
            left: self.time_left(work),
        })
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.save_as(&[LAST])
    }

    /// Writes one checkpoint under several names, in their order.
    fn save_as(&mut self, names: &[&str]) -> Result<(), TrainError> {
        self.state.ledger.lines = self.metrics.lines;
        let sections = self.state.sections()?;
        for name in names {
            checkpoint::save(&self.folder.join(CHECKPOINTS).join(name), &sections)?;
        }
        self.saved = Instant::now();
        Ok(())
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<(), TrainError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(TrainError::io(path)(error))
        }
        _ => Ok(()),
    }
}
