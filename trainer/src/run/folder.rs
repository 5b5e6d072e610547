//! The folder of a run: what its files are called, and what may be gone on with.
//!
//! Knows the names, writes what a run is made of (`run.json`), reads the settings back, and refuses
//! to go on under settings or with images other than those that what is done was done with, or with a
//! stage before those it builds on. What refuses writes nothing.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::choosing::has_chosen;
use crate::candidate::Candidate;
use crate::checkpoint::write_whole;
use crate::config::Config;
use crate::data::Data;
use crate::error::TrainError;
use crate::progress::Stage;
use crate::state::{Ledger, State};

/// Who wrote a run, in its files.
pub(super) const TOOL: &str = concat!("snn-train ", env!("CARGO_PKG_VERSION"), ", burn 0.22");

pub(super) const CONFIG: &str = "config.toml";
pub(super) const ABOUT: &str = "run.json";
pub(super) const METRICS: &str = "metrics.jsonl";
pub(super) const CHECKPOINTS: &str = "checkpoints";
pub(super) const LAST: &str = "last.ckpt";
pub(super) const BEST: &str = "best.ckpt";
pub(super) const SCORES: &str = "scores.jsonl";
pub(super) const MODEL: &str = "model.onnx";
pub(super) const POLICY: &str = "best.json";
pub(super) const REPORT: &str = "report.html";
pub(super) const COMPARE: &str = "compare.json";
pub(super) const COMPARE_PAGE: &str = "compare.html";

/// Refuses images other than those that the run was begun with.
pub(super) fn check_images(folder: &Path, data: &Data) -> Result<(), TrainError> {
    let before: Option<serde_json::Value> =
        fs::read(folder.join(ABOUT)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match before.is_some_and(|before| before["dataset"]["sha256"] != data.sha256.as_str()) {
        true => {
            let folder = folder.display();
            Err(TrainError::Data(format!("{folder}: was begun with other images")))
        }
        false => Ok(()),
    }
}

/// Writes what the run is made of.
pub(super) fn write_about(folder: &Path, config: &Config, data: &Data) -> Result<(), TrainError> {
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
    write_whole(&folder.join(ABOUT), serde_json::to_string_pretty(&about)?.as_bytes())
}

/// The settings stored in a run folder.
pub(super) fn read_config(folder: &Path) -> Result<Option<Config>, TrainError> {
    let path = folder.join(CONFIG);
    match fs::read_to_string(&path) {
        Ok(text) => Config::from_toml(&text).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrainError::io(&path)(error)),
    }
}

/// Refuses settings other than those with which the folder's checkpoint came about.
pub(super) fn check_same(config: &Config, folder: &Path, state: &State) -> Result<(), TrainError> {
    let Some(stored) = read_config(folder)? else { return Ok(()) };
    let ledger = &state.ledger;
    let searched = ledger.main.steps + ledger.other.steps > 0;
    let started = ledger.epochs > 0 || searched || !ledger.tuned.is_empty();
    // Candidates may be added, but one that has weights stays what it was.
    let [before, now] = [&stored, config].map(Config::candidates);
    let changed = |name: &String| {
        let of = |list: &[Candidate]| list.iter().find(|other| other.name == *name).cloned();
        of(&before) != of(&now)
    };
    let table = [
        ("seed", stored.seed != config.seed),
        ("data", stored.data != config.data),
        ("net", stored.net != config.net),
        ("exchange", stored.exchange != config.exchange),
        ("train", stored.train != config.train),
        ("search", stored.search != config.search && searched),
        ("search.rounds", stored.search.rounds != config.search.rounds),
        ("finetune", stored.finetune != config.finetune && !ledger.tuned.is_empty()),
        ("export", stored.export != config.export && !ledger.validation.is_empty()),
        ("candidates", ledger.tuned.keys().any(changed)),
    ];
    match table.iter().find(|(_, differs)| started && *differs) {
        Some((section, _)) => Err(TrainError::Other { path: folder.to_owned(), section }),
        None => Ok(()),
    }
}

/// Refuses a stage before those it builds on are done.
pub(super) fn check_order(
    stage: Stage,
    config: &Config,
    folder: &Path,
    ledger: &Ledger,
) -> Result<(), TrainError> {
    let trained = ledger.epochs >= config.train.epochs;
    let tuned = |candidate: &Candidate| ledger.validation.contains_key(&candidate.name);
    let (missing, before) = match stage {
        Stage::Train => return Ok(()),
        _ if !trained => ("trained weights", Stage::Train),
        Stage::Finetune | Stage::Export if !has_chosen(config, ledger) => {
            ("chosen policy", Stage::Search)
        }
        Stage::Export if !config.candidates().iter().all(tuned) => {
            ("fine-tuned weights", Stage::Finetune)
        }
        _ => return Ok(()),
    };
    Err(TrainError::Order { stage, path: folder.to_owned(), missing, before })
}
