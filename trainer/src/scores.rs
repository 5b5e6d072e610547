//! Scores of policies, each measured once.
//!
//! A controller that has settled samples the same policy again and again, and a run that was stopped
//! while it chose comes back to policies it has judged. [`Scores`] judges what it does not know, and in
//! a file keeps every score as it is measured, a line each, to the last bit. Scores of other weights,
//! or of another number of images, are dropped when the file is opened.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use snn_schemas::Policy;

use crate::error::TrainError;
use crate::jsonl::Jsonl;
use crate::judge::Score;

/// A policy's decisions and levels, step by step, as `metrics.jsonl` has them.
pub(crate) type Shorthand = Vec<[usize; 2]>;

/// The shorthand of a policy.
pub(crate) fn shorthand(policy: &Policy) -> Shorthand {
    policy.steps.iter().map(|step| [step.decision.id(), step.level]).collect()
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    /// Epochs that the weights had behind them.
    epochs: usize,
    policy: Shorthand,
    correct: usize,
    images: usize,
    /// The bits of the loss: a number read from JSON may be off by the last one.
    loss_bits: u64,
}

/// Scores of policies under the same weights, on the same images.
#[derive(Default)]
pub(crate) struct Scores {
    known: BTreeMap<Shorthand, Score>,
    /// The file, and the epochs that the weights have behind them.
    kept: Option<(Jsonl, usize)>,
}

impl Scores {
    /// Those that the file `path` has of weights after `epochs` epochs on `images` images; what is
    /// measured from now on is kept there.
    pub(crate) fn open(path: &Path, epochs: usize, images: usize) -> Result<Scores, TrainError> {
        let mut known = BTreeMap::new();
        let file = Jsonl::open(path, |_, line| {
            let Ok(line) = serde_json::from_str::<Line>(line) else { return false };
            let fits = (line.epochs, line.images) == (epochs, images);
            if fits {
                let loss = f64::from_bits(line.loss_bits);
                known.insert(line.policy, Score { correct: line.correct, images, loss });
            }
            fits
        })?;
        Ok(Scores { known, kept: Some((file, epochs)) })
    }

    /// The score of `policy`, which `judge` measures if it is not known.
    pub(crate) fn of(
        &mut self,
        policy: &Policy,
        judge: impl FnOnce() -> Result<Score, TrainError>,
    ) -> Result<Score, TrainError> {
        let policy = shorthand(policy);
        if let Some(score) = self.known.get(&policy) {
            return Ok(*score);
        }
        let score = judge()?;
        if let Some((file, epochs)) = &mut self.kept {
            let Score { correct, images, loss } = score;
            let (policy, loss_bits) = (policy.clone(), loss.to_bits());
            file.append(&Line { epochs: *epochs, policy, correct, images, loss_bits })?;
        }
        self.known.insert(policy, score);
        Ok(score)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidate::full;
    use crate::config::Config;

    #[test]
    fn a_score_is_measured_once_and_comes_back_to_the_last_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.jsonl");
        let config = Config::digits();
        let policies = [config.silent(), full(&config)];
        let score = |loss| Score { correct: 3, images: 7, loss };
        // Read as a decimal the third would be off by a bit.
        for (epochs, loss) in [0.1 + 0.2, 2.0 / 3.0, 1e-9 / 7.0, 5e-324].into_iter().enumerate() {
            let mut scores = Scores::open(&path, epochs, 7).unwrap();
            for policy in policies.iter().chain(&policies) {
                assert_eq!(scores.of(policy, || Ok(score(loss))).unwrap(), score(loss));
                let again = scores.of(policy, || unreachable!("is known")).unwrap();
                assert_eq!(again, score(loss));
            }
            let mut scores = Scores::open(&path, epochs, 7).unwrap();
            let again = scores.of(&policies[1], || unreachable!("is kept")).unwrap();
            assert_eq!(again.loss.to_bits(), loss.to_bits());
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
    }

    #[test]
    fn scores_of_other_weights_and_of_other_images_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scores.jsonl");
        let silent = Config::digits().silent();
        let measure = |epochs, images, correct| {
            let judged = || Ok(Score { correct, images, loss: 1.0 });
            Scores::open(&path, epochs, images).unwrap().of(&silent, judged).unwrap().correct
        };
        assert_eq!([measure(4, 7, 1), measure(4, 7, 2)], [1, 1]);
        assert_eq!([measure(4, 8, 3), measure(5, 8, 4)], [3, 4]);
        assert_eq!(measure(4, 7, 5), 5);
    }
}
