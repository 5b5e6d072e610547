//! How a run tells the outside how far it is.
//!
//! The library calls [`Progress::report`] after every epoch, search step and judged policy, from the
//! thread that trains, and [`Progress::warn`] where a run goes on but somebody should know something.
//! Nothing is printed here: the binary draws a bar and writes warnings, tests pass `&mut ()`.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One stage of a run (section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Stage 1: the network's weights, under sampled policies.
    Train,
    /// Stage 2: the controller, by policy gradient, the weights fixed.
    Search,
    /// Stage 3: policies are sampled and the best is kept.
    Select,
    /// The baselines: the random sampler's policies.
    Baseline,
    /// The network's weights once more, under the best policy.
    Finetune,
    /// ONNX and policy file are written.
    Export,
    /// The test set, once.
    Test,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Train => "train",
            Stage::Search => "search",
            Stage::Select => "select",
            Stage::Baseline => "baseline",
            Stage::Finetune => "finetune",
            Stage::Export => "export",
            Stage::Test => "test",
        })
    }
}

/// How far a stage is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Which stage.
    pub stage: Stage,
    /// Round of the three stages, from 1.
    pub round: usize,
    /// Epochs, steps or samples done in this stage and round.
    pub done: usize,
    /// Epochs, steps or samples to do in this stage and round.
    pub total: usize,
    /// Mean training loss, where there is one.
    pub loss: Option<f64>,
    /// Latest accuracy between 0 and 1, where there is one.
    pub accuracy: Option<f64>,
    /// Time that everything asked for will take yet, all stages together, by how fast it has been.
    pub left: Option<Duration>,
}

impl Report {
    /// [`Report::left`] in words, such as `"40 s"`, `"12 min"`, `"3 h 05 min"` or `"2 d 4 h"`.
    pub fn time_left(&self) -> Option<String> {
        let seconds = self.left?.as_secs_f64().round() as u64;
        let minutes = seconds.div_ceil(60);
        let (hours, days) = (minutes / 60, minutes / (24 * 60));
        Some(match (days, hours, minutes) {
            _ if seconds < 60 => format!("{seconds} s"),
            (0, 0, _) => format!("{minutes} min"),
            (0, _, _) => format!("{hours} h {:02} min", minutes % 60),
            _ => format!("{days} d {} h", hours % 24),
        })
    }
}

/// Whoever wants to know how far a run is.
pub trait Progress {
    /// Takes one report; must return soon, for training waits.
    fn report(&mut self, report: &Report);

    /// Takes a sentence on what does not stop the run, such as images that could not be used.
    fn warn(&mut self, _: &str) {}
}

/// Nobody listens.
impl Progress for () {
    fn report(&mut self, _: &Report) {}
}

/// A closure listens.
impl<F: FnMut(&Report)> Progress for F {
    fn report(&mut self, report: &Report) {
        self(report);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_told_in_two_figures() {
        let told = |seconds: u64| {
            let left = Some(Duration::from_secs(seconds));
            let (stage, loss, accuracy) = (Stage::Train, None, None);
            Report { stage, round: 1, done: 1, total: 2, loss, accuracy, left }.time_left()
        };
        let times = [0, 59, 60, 61, 3540, 3541, 7500, 86_340, 86_341, 360_000].map(told);
        let expected = [
            "0 s",
            "59 s",
            "1 min",
            "2 min",
            "59 min",
            "1 h 00 min",
            "2 h 05 min",
            "23 h 59 min",
            "1 d 0 h",
            "4 d 4 h",
        ];
        assert_eq!(times, expected.map(|text| Some(text.to_owned())));
    }
}
