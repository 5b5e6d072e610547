//! `metrics.jsonl`: a line for every epoch, step and choice of a run.
//!
//! Lines are appended as things happen. [`Metrics::open`] drops lines past a count, so that a
//! resumed run does not tell twice what it does twice. [`read`] gives the lines back for the report.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::jsonl::Jsonl;
use crate::progress::Stage;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Which stage.
    pub(crate) stage: Stage,
    /// Round of the three stages, from 1.
    pub(crate) round: usize,
    /// Number of the epoch, step or sample over all rounds, from 1.
    pub(crate) number: usize,
    /// Whose weights, past the shared ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) candidate: Option<String>,
    /// Whether the policies looked for have levels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) search_levels: Option<bool>,
    /// Learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lr: Option<f64>,
    /// Mean loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) loss: Option<f64>,
    /// Accuracy on the training images as they came, augmented.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) train_accuracy: Option<f64>,
    /// What the controller learned from: accuracy less the price of traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reward: Option<f64>,
    /// Accuracy on validation images: after an epoch, of a step's mini-batches, or a judgement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) validation_accuracy: Option<f64>,
    /// Accuracy on the test images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) test_accuracy: Option<f64>,
    /// The controller's entropy, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) entropy: Option<f64>,
    /// The step's policies, for each of their steps the decision's number and the level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sampled: Option<Vec<Vec<[usize; 2]>>>,
    /// Time it took. The only thing that differs between equal runs.
    pub(crate) seconds: f64,
}

impl Line {
    /// A line that says nothing yet.
    pub(crate) fn new(stage: Stage, round: usize, number: usize) -> Line {
        Line {
            stage,
            round,
            number,
            candidate: None,
            search_levels: None,
            lr: None,
            loss: None,
            train_accuracy: None,
            reward: None,
            validation_accuracy: None,
            test_accuracy: None,
            entropy: None,
            sampled: None,
            seconds: 0.0,
        }
    }
}

/// The file while a run writes to it.
pub(crate) struct Metrics {
    file: Jsonl,
    /// Lines written, in this and earlier sittings.
    pub(crate) lines: usize,
}

impl Metrics {
    /// Opens the file for appending after its first `lines` lines; the rest is dropped.
    pub(crate) fn open(path: &Path, lines: usize) -> Result<Metrics, TrainError> {
        Ok(Metrics { file: Jsonl::open(path, |number, _| number < lines)?, lines })
    }

    /// Appends a line.
    pub(crate) fn write(&mut self, line: &Line) -> Result<(), TrainError> {
        self.file.append(line)?;
        self.lines += 1;
        Ok(())
    }
}

/// The lines of a file; those that make no sense are left out.
pub(crate) fn read(path: &Path) -> Result<Vec<Line>, TrainError> {
    let text = fs::read_to_string(path).map_err(TrainError::io(path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_past_the_checkpoint_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = |number| Line { loss: Some(0.5), ..Line::new(Stage::Train, 1, number) };
        let mut metrics = Metrics::open(&path, 0).unwrap();
        (1..=3).for_each(|number| metrics.write(&line(number)).unwrap());
        let mut metrics = Metrics::open(&path, 2).unwrap();
        metrics.write(&line(9)).unwrap();
        assert_eq!(metrics.lines, 3);
        assert_eq!(read(&path).unwrap(), [line(1), line(2), line(9)]);
    }
}
