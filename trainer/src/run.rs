//! A run: the stages tied together, and the folder that holds what they leave behind.
//!
//! The folder has `config.toml`, `run.json`, `metrics.jsonl`, `checkpoints/last.ckpt` and `checkpoints/best.ckpt`,
//! and in the end `model.onnx`, `best.json` and `report.html`. Each stage does what is still missing
//! up to its goal and no more. So a run that was stopped goes on where its last checkpoint stands,
//! at most an epoch back, and stages asked for one by one give what one run gives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use serde::Serialize;
use serde_json::json;
use snn_schemas::Policy;

use crate::checkpoint::{self, write_whole};
use crate::compare::Trial;
use crate::config::Config;
use crate::controller::{policies, random_policies};
use crate::data::Data;
use crate::error::TrainError;
use crate::export::{read_network, write_onnx};
use crate::fit::{self, Epoch};
use crate::judge::{Score, calibrate, judge_all};
use crate::metrics::{Line, Metrics};
use crate::net::{Network, Stats};
use crate::progress::{Progress, Report, Stage};
use crate::seed::rng;
use crate::state::{Candidate, State};
use crate::{compare as samplers, report, search as searching};

/// Who wrote a run, in its files.
const TOOL: &str = concat!("snn-train ", env!("CARGO_PKG_VERSION"), ", burn 0.22");

/// How long the controller may learn between two checkpoints. An epoch is always followed by one.
const SAVE_EVERY: Duration = Duration::from_secs(30);

const CONFIG: &str = "config.toml";
const ABOUT: &str = "run.json";
const METRICS: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const LAST: &str = "last.ckpt";
const BEST: &str = "best.ckpt";
const MODEL: &str = "model.onnx";
const POLICY: &str = "best.json";
const REPORT: &str = "report.html";
const COMPARE: &str = "compare.json";
const COMPARE_PAGE: &str = "compare.html";

/// A fine-tuned candidate, judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// Its policy.
    pub policy: Policy,
    /// On the validation images.
    pub validation: Score,
    /// On the test images.
    pub test: Score,
}

/// What a finished run gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The candidates: the searched policy, and what it is to be compared with.
    pub candidates: BTreeMap<Candidate, Judged>,
    /// The network that was exported, with the searched policy's statistics (the silent one's, if
    /// the network has one group and nothing to search).
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
        let first = [Candidate::Searched, Candidate::Silent];
        first.iter().find_map(|candidate| self.candidates.get(candidate))
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
    let mut run = Run::open(config, data, (out, resume), progress)?;
    for round in 0..config.search.rounds {
        run.train(round)?;
        run.search(round)?;
        run.select(round)?;
    }
    run.baseline()?;
    run.finetune()?;
    run.test()?;
    run.export()?;
    run.outcome()
}

/// Stage 1 alone: the weights, for all epochs, under policies drawn with equal probability.
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
    let mut run = Run::open(config, data, (out, resume), progress)?;
    (0..config.search.rounds).try_for_each(|round| run.train(round))
}

/// Stages 2 and 3 alone, and the random sampler's choice, on the weights that [`train`] left.
///
/// # Errors
/// As [`run`]; or stage 1 is not done.
pub fn search(
    config: &Config,
    data: Option<&Path>,
    out: &Path,
    progress: &mut dyn Progress,
) -> Result<(), TrainError> {
    let mut run = Run::open(config, data, (out, true), progress)?;
    run.requires(Stage::Search)?;
    for round in 0..config.search.rounds {
        run.search(round)?;
        run.select(round)?;
    }
    run.baseline()
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
    let mut run = Run::open(config, data, (out, true), progress)?;
    run.requires(Stage::Finetune)?;
    run.finetune()
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
    let mut run = Run::open(config, data, (out, true), progress)?;
    run.requires(Stage::Export)?;
    run.test()?;
    run.export()?;
    run.outcome()
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
    let run = Run::open(config, data, (out, true), progress)?;
    run.requires(Stage::Search)?;
    if config.net.groups == 1 {
        return Err(TrainError::Data(
            "a network of one group has no policies to compare".to_owned(),
        ));
    }
    let (network, images) = (&run.state.network, &run.data.validation);
    let trials = samplers::compare(config, network, images, (seeds, run.progress))?;
    write_whole(&out.join(COMPARE), &serde_json::to_vec(&trials)?)?;
    write_whole(&out.join(COMPARE_PAGE), report::comparison(&trials)?.as_bytes())?;
    Ok(trials)
}

/// Judges what a finished run exported, read back from its folder, on the test images.
///
/// # Errors
/// The folder holds no finished run, or the images are not its kind.
pub fn evaluate(folder: &Path, data: Option<&Path>) -> Result<Score, TrainError> {
    let config = read_config(folder)?.ok_or_else(|| TrainError::Order {
        stage: Stage::Test,
        path: folder.to_owned(),
        missing: CONFIG,
        before: Stage::Export,
    })?;
    let read = |name: &'static str| {
        let path = folder.join(name);
        fs::read(&path).map_err(TrainError::io(&path))
    };
    let policy = match config.net.groups {
        1 => config.silent(),
        _ => Policy::from_json(&read(POLICY)?).map_err(|error| {
            TrainError::Data(format!("{}: {error}", folder.join(POLICY).display()))
        })?,
    };
    let fits = policy.groups == config.net.groups && policy.steps.len() <= config.steps();
    if !fits || policy.staleness != config.exchange.staleness {
        let path = folder.join(POLICY);
        return Err(TrainError::Data(format!("{}: not a policy for {CONFIG}", path.display())));
    }
    let data = Data::load(&config, data)?;
    let network = read_network(read(MODEL)?, &config)?;
    judge_all(&network, &policy, &data.test, Stats::Stored)
}

/// A run at work.
struct Run<'a> {
    config: &'a Config,
    data: Data,
    folder: PathBuf,
    state: State,
    metrics: Metrics,
    progress: &'a mut dyn Progress,
    saved: Instant,
}

impl<'a> Run<'a> {
    fn open(
        config: &'a Config,
        data: Option<&Path>,
        (out, resume): (&Path, bool),
        progress: &'a mut dyn Progress,
    ) -> Result<Run<'a>, TrainError> {
        config.check()?;
        let data = Data::load(config, data)?;
        if fit::batches(&data.train, &config.train) == 0 {
            let (images, batch) = (data.train.len(), config.train.batch);
            return Err(TrainError::Data(format!(
                "{images} training images do not fill one batch of {batch}"
            )));
        }
        let device = Device::flex().autodiff();
        let last = out.join(CHECKPOINTS).join(LAST);
        let sections = checkpoint::load(&last)?;
        if sections.is_some() && !resume {
            return Err(TrainError::Occupied { path: out.to_owned() });
        }
        let state = match sections {
            None => State::fresh(config, &device),
            Some(sections) => State::restore(config, &device, sections)
                .map_err(|reason| TrainError::Checkpoint { path: last, reason })?,
        };
        check_same(config, out, &state)?;
        fs::create_dir_all(out.join(CHECKPOINTS)).map_err(TrainError::io(out))?;
        write_whole(&out.join(CONFIG), config.to_toml().as_bytes())?;
        write_about(out, config, &data)?;
        let metrics = Metrics::open(&out.join(METRICS), state.ledger.lines)?;
        let folder = out.to_owned();
        Ok(Run { config, data, folder, state, metrics, progress, saved: Instant::now() })
    }

    /// Checks that the stages before `stage` are done.
    fn requires(&self, stage: Stage) -> Result<(), TrainError> {
        let ledger = &self.state.ledger;
        let trained = ledger.epochs >= self.config.train.epochs;
        let chosen = self.config.net.groups == 1 || ledger.random.is_some();
        let tuned = self.candidates().iter().all(|candidate| self.is_tuned(*candidate));
        let (missing, before) = match stage {
            _ if !trained => ("trained weights", Stage::Train),
            Stage::Finetune | Stage::Export if !chosen => ("chosen policy", Stage::Search),
            Stage::Export if !tuned => ("fine-tuned weights", Stage::Finetune),
            _ => return Ok(()),
        };
        Err(TrainError::Order { stage, path: self.folder.clone(), missing, before })
    }

    /// Stage 1 of a round.
    fn train(&mut self, round: usize) -> Result<(), TrainError> {
        let epochs = self.config.epochs_of(round);
        while self.state.ledger.epochs < epochs.end {
            let started = Instant::now();
            let number = self.state.ledger.epochs;
            if number == epochs.start {
                self.state.sgd = fit::sgd(&self.config.train);
            }
            let train = &self.config.train;
            let epoch = Epoch {
                images: &self.data.train,
                settings: train,
                lr: train.decay.rate(train.lr, number, train.epochs),
                policies: &self.sampled(number)?,
                rng: rng(self.config.seed, "epoch", number),
            };
            let lr = epoch.lr;
            let (network, loss, accuracy) =
                fit::epoch(self.state.network.clone(), &mut self.state.sgd, epoch)?;
            self.state.network = network;
            self.state.ledger.epochs += 1;
            let line = Line {
                lr: Some(lr),
                loss: Some(loss),
                train_accuracy: Some(accuracy),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Train, round + 1, number + 1)
            };
            self.note(&line, number + 1 - epochs.start, epochs.len())?;
            finite(loss, Stage::Train, number)?;
            self.save()?;
        }
        Ok(())
    }

    /// The policies of an epoch, M a batch, sampled by the controller as it is.
    fn sampled(&self, epoch: usize) -> Result<Vec<Vec<Policy>>, TrainError> {
        let batches = fit::batches(&self.data.train, &self.config.train);
        let each = self.config.train.policies_per_batch;
        if self.config.net.groups == 1 {
            return Ok(vec![vec![self.config.silent()]; batches]);
        }
        let mut rng = rng(self.config.seed, "policies", epoch);
        // A controller that has learned nothing is the random sampler, only slower.
        let all = match self.state.ledger.steps {
            0 => random_policies(self.config, batches * each, &mut rng),
            _ => {
                let controller = self.state.reinforce.controller.valid();
                policies(self.config, controller.sample(batches * each, &mut rng)?.steps)
            }
        };
        Ok(all.chunks(each).map(<[Policy]>::to_vec).collect())
    }

    /// Stage 2 of a round.
    fn search(&mut self, round: usize) -> Result<(), TrainError> {
        let steps = self.config.search.steps;
        let goal = if self.config.net.groups == 1 { 0 } else { (round + 1) * steps };
        let network = self.state.network.inference();
        while self.state.ledger.steps < goal {
            let started = Instant::now();
            let number = self.state.ledger.steps;
            let reinforce = self.state.reinforce.clone();
            let (reinforce, step) =
                searching::step(reinforce, &network, &self.data.validation, (self.config, number))?;
            self.state.reinforce = reinforce;
            self.state.ledger.steps += 1;
            let line = Line {
                validation_accuracy: Some(step.reward),
                entropy: Some(step.entropy),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Search, round + 1, number + 1)
            };
            self.note(&line, number + 1 - round * steps, steps)?;
            if self.saved.elapsed() > SAVE_EVERY || self.state.ledger.steps == goal {
                self.save()?;
            }
        }
        Ok(())
    }

    /// Stage 3 of a round. What an earlier round chose competes on the weights of now.
    fn select(&mut self, round: usize) -> Result<(), TrainError> {
        if self.config.net.groups == 1 || self.state.ledger.selections.len() > round {
            return Ok(());
        }
        let mut candidates = searching::sample(&self.state.reinforce, self.config, round)?;
        candidates.extend(self.state.ledger.selections.last().map(|choice| choice.policy.clone()));
        let choice = self.choose(Stage::Select, round, &candidates)?;
        self.state.ledger.selections.extend(choice);
        self.save()
    }

    /// The random sampler's choice.
    fn baseline(&mut self) -> Result<(), TrainError> {
        if self.config.net.groups == 1 || self.state.ledger.random.is_some() {
            return Ok(());
        }
        let candidates = searching::random(self.config, &self.data.validation);
        let round = self.config.search.rounds - 1;
        self.state.ledger.random = self.choose(Stage::Baseline, round, &candidates)?;
        self.save()
    }

    fn choose(
        &mut self,
        stage: Stage,
        round: usize,
        candidates: &[Policy],
    ) -> Result<Option<crate::state::Choice>, TrainError> {
        let started = Instant::now();
        let network = self.state.network.inference();
        let progress = &mut *self.progress;
        let mut best = 0.0_f64;
        let choice =
            searching::best(&network, candidates, &self.data.validation, |done, accuracy| {
                best = best.max(accuracy);
                let total = candidates.len();
                let accuracy = Some(best);
                progress.report(&Report {
                    stage,
                    round: round + 1,
                    done,
                    total,
                    loss: None,
                    accuracy,
                });
            })?;
        let score = choice.as_ref().map(|choice| choice.validation);
        let line = Line {
            loss: score.map(|score| score.loss),
            validation_accuracy: score.map(|score| score.accuracy()),
            seconds: started.elapsed().as_secs_f64(),
            ..Line::new(stage, round + 1, candidates.len())
        };
        self.metrics.write(&line)?;
        Ok(choice)
    }

    /// The policies that are carried to the end.
    fn candidates(&self) -> Vec<Candidate> {
        match self.config.net.groups {
            1 => vec![Candidate::Silent],
            _ => vec![Candidate::Searched, Candidate::Random, Candidate::Silent],
        }
    }

    fn policy(&self, candidate: Candidate) -> Policy {
        let ledger = &self.state.ledger;
        let choice = match candidate {
            Candidate::Searched => ledger.selections.last(),
            Candidate::Random => ledger.random.as_ref(),
            Candidate::Silent => None,
        };
        choice.map_or_else(|| self.config.silent(), |choice| choice.policy.clone())
    }

    fn is_tuned(&self, candidate: Candidate) -> bool {
        self.state.ledger.validation.contains_key(&candidate)
    }

    /// The last stage, for each candidate from the same weights.
    fn finetune(&mut self) -> Result<(), TrainError> {
        for candidate in self.candidates() {
            if !self.is_tuned(candidate) {
                self.finetune_candidate(candidate)?;
            }
        }
        Ok(())
    }

    fn finetune_candidate(&mut self, candidate: Candidate) -> Result<(), TrainError> {
        let policy = self.policy(candidate);
        let settings = &self.config.finetune;
        let batches = fit::batches(&self.data.train, &self.config.train);
        let under = vec![vec![policy.clone()]; batches];
        let place = self.candidates().iter().position(|other| *other == candidate).unwrap_or(0);
        let mut network = match self.state.tuned.remove(&candidate) {
            Some(network) => network,
            None => self.state.network.copy(),
        };
        let mut done = self.state.ledger.tuned.get(&candidate).copied().unwrap_or(0);
        while done < settings.epochs {
            let started = Instant::now();
            if done == 0 {
                self.state.sgd = fit::sgd(&self.config.train);
            }
            let epoch = Epoch {
                images: &self.data.train,
                settings: &self.config.train,
                lr: settings.decay.rate(settings.lr, done, settings.epochs),
                policies: &under,
                // All candidates see the same images in the same order.
                rng: rng(self.config.seed, "finetune", done),
            };
            let lr = epoch.lr;
            let (tuned, loss, accuracy) = fit::epoch(network, &mut self.state.sgd, epoch)?;
            network = tuned;
            done += 1;
            let line = Line {
                candidate: Some(candidate),
                lr: Some(lr),
                loss: Some(loss),
                train_accuracy: Some(accuracy),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Finetune, self.config.search.rounds, done)
            };
            let total = settings.epochs * self.candidates().len();
            self.note(&line, place * settings.epochs + done, total)?;
            finite(loss, Stage::Finetune, done - 1)?;
            self.state.tuned.insert(candidate, network.clone());
            self.state.ledger.tuned.insert(candidate, done);
            self.save()?;
        }
        let judged = network.inference();
        calibrate(&judged, &policy, &self.data.train, self.config.train.calibration);
        let score = judge_all(&judged, &policy, &self.data.validation, Stats::Stored)?;
        self.state.tuned.insert(candidate, judged.copy());
        self.state.ledger.tuned.insert(candidate, done);
        self.state.ledger.validation.insert(candidate, score);
        let line = Line {
            candidate: Some(candidate),
            loss: Some(score.loss),
            validation_accuracy: Some(score.accuracy()),
            ..Line::new(Stage::Select, self.config.search.rounds, done)
        };
        self.metrics.write(&line)?;
        self.save()?;
        if candidate == self.candidates()[0] {
            let sections = self.state.sections()?;
            checkpoint::save(&self.folder.join(CHECKPOINTS).join(BEST), &sections)?;
        }
        Ok(())
    }

    /// The test images, once a candidate.
    fn test(&mut self) -> Result<(), TrainError> {
        let candidates = self.candidates();
        for (index, &candidate) in candidates.iter().enumerate() {
            if self.state.ledger.test.contains_key(&candidate) {
                continue;
            }
            let started = Instant::now();
            let Some(network) = self.state.tuned.get(&candidate) else { continue };
            let policy = self.policy(candidate);
            let score = judge_all(&network.inference(), &policy, &self.data.test, Stats::Stored)?;
            self.state.ledger.test.insert(candidate, score);
            let line = Line {
                candidate: Some(candidate),
                loss: Some(score.loss),
                test_accuracy: Some(score.accuracy()),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Test, self.config.search.rounds, index + 1)
            };
            self.note(&line, index + 1, candidates.len())?;
        }
        self.save()
    }

    /// Model, policy and report.
    fn export(&mut self) -> Result<(), TrainError> {
        let first = self.candidates()[0];
        let Some(network) = self.state.tuned.get(&first) else { return Ok(()) };
        write_whole(&self.folder.join(MODEL), &write_onnx(network, &self.data)?)?;
        if self.config.net.groups > 1 {
            let policy = Policy { provenance: Some(self.provenance()), ..self.policy(first) };
            write_whole(&self.folder.join(POLICY), policy.to_json().as_bytes())?;
        }
        let judged = self.judged();
        let lines = crate::metrics::read(&self.folder.join(METRICS))?;
        let page = report::page(self.config, &self.data, &judged, &lines)?;
        write_whole(&self.folder.join(REPORT), page.as_bytes())?;
        let (round, done, total) = (self.config.search.rounds, 1, 1);
        let stage = Stage::Export;
        self.progress.report(&Report { stage, round, done, total, loss: None, accuracy: None });
        Ok(())
    }

    /// Where the policy came from, for `best.json`.
    fn provenance(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut accuracy = serde_json::Map::new();
        for (candidate, judged) in self.judged() {
            accuracy.insert(
                candidate.to_string(),
                json!({
                    "validation": judged.validation.accuracy(),
                    "test": judged.test.accuracy(),
                    "paper_cost": judged.policy.paper_cost(self.config.net.blocks()),
                }),
            );
        }
        let entries = [
            ("tool", json!(TOOL)),
            ("dataset", json!(self.data.name)),
            ("dataset_sha256", json!(self.data.sha256)),
            ("seed", json!(self.config.seed)),
            ("net", json!(self.config.net)),
            ("search", json!(self.config.search)),
            ("epochs", json!(self.config.train.epochs)),
            ("finetune_epochs", json!(self.config.finetune.epochs)),
            ("accuracy", serde_json::Value::Object(accuracy)),
        ];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn judged(&self) -> BTreeMap<Candidate, Judged> {
        let ledger = &self.state.ledger;
        let judge = |candidate: Candidate| {
            let validation = *ledger.validation.get(&candidate)?;
            let test = *ledger.test.get(&candidate)?;
            Some((candidate, Judged { policy: self.policy(candidate), validation, test }))
        };
        self.candidates().into_iter().filter_map(judge).collect()
    }

    fn outcome(mut self) -> Result<Outcome, TrainError> {
        let candidates = self.judged();
        let first = self.candidates()[0];
        let network = match self.state.tuned.remove(&first) {
            Some(network) => network.inference(),
            None => self.state.network.inference(),
        };
        Ok(Outcome {
            candidates,
            network,
            model: self.folder.join(MODEL),
            policy: (self.config.net.groups > 1).then(|| self.folder.join(POLICY)),
            report: self.folder.join(REPORT),
            folder: self.folder,
        })
    }

    /// Writes a line and tells whoever listens.
    fn note(&mut self, line: &Line, done: usize, total: usize) -> Result<(), TrainError> {
        self.metrics.write(line)?;
        let accuracies = [line.test_accuracy, line.validation_accuracy, line.train_accuracy];
        self.progress.report(&Report {
            stage: line.stage,
            round: line.round,
            done,
            total,
            loss: line.loss,
            accuracy: accuracies.into_iter().flatten().next(),
        });
        Ok(())
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.state.ledger.lines = self.metrics.lines;
        let sections = self.state.sections()?;
        checkpoint::save(&self.folder.join(CHECKPOINTS).join(LAST), &sections)?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// Writes what the run is made of; refuses images other than those it was begun with.
fn write_about(folder: &Path, config: &Config, data: &Data) -> Result<(), TrainError> {
    let path = folder.join(ABOUT);
    let before: Option<serde_json::Value> =
        fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if before.is_some_and(|before| before["dataset"]["sha256"] != data.sha256.as_str()) {
        let folder = folder.display();
        return Err(TrainError::Data(format!("{folder}: was begun with other images")));
    }
    let about = json!({
        "tool": TOOL,
        "seed": config.seed,
        "dataset": {
            "name": data.name,
            "sha256": data.sha256,
            "train": data.train.len(),
            "validation": data.validation.len(),
            "test": data.test.len(),
            "skipped": data.skipped,
        },
    });
    write_whole(&path, serde_json::to_string_pretty(&about)?.as_bytes())
}

/// The settings stored in a run folder.
fn read_config(folder: &Path) -> Result<Option<Config>, TrainError> {
    let path = folder.join(CONFIG);
    match fs::read_to_string(&path) {
        Ok(text) => Config::from_toml(&text).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrainError::io(&path)(error)),
    }
}

/// Refuses settings other than those with which the folder's checkpoint came about.
fn check_same(config: &Config, folder: &Path, state: &State) -> Result<(), TrainError> {
    let Some(stored) = read_config(folder)? else { return Ok(()) };
    let ledger = &state.ledger;
    let started = ledger.epochs + ledger.steps + ledger.tuned.len() > 0;
    let table = [
        ("seed", stored.seed != config.seed),
        ("data", stored.data != config.data),
        ("net", stored.net != config.net),
        ("exchange", stored.exchange != config.exchange),
        ("train", stored.train != config.train),
        ("search", stored.search != config.search && ledger.steps > 0),
        ("search.rounds", stored.search.rounds != config.search.rounds),
        ("finetune", stored.finetune != config.finetune && !ledger.tuned.is_empty()),
    ];
    match table.iter().find(|(_, differs)| started && *differs) {
        Some((section, _)) => Err(TrainError::Other { path: folder.to_owned(), section }),
        None => Ok(()),
    }
}

fn finite(loss: f64, stage: Stage, number: usize) -> Result<(), TrainError> {
    match loss.is_finite() {
        true => Ok(()),
        false => Err(TrainError::Diverged { stage, epoch: number + 1, loss }),
    }
}
