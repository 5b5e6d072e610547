//! How good a network is under a policy.
//!
//! Takes a network without autodiff, a policy and images, and gives a [`Score`] or each image's
//! class. While weights are shared by many policies they are judged with each batch's own
//! statistics ([`Stats::Batch`]); [`calibrate`] then gives the chosen policy statistics of its own,
//! with which it is judged as it will run ([`Stats::Stored`]).

use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use snn_schemas::Policy;

use crate::config::FitConfig;
use crate::data::Dataset;
use crate::error::TrainError;
use crate::net::{Network, Stats};
use crate::progress::Stage;
use crate::seed::Rng;

/// Images judged at once: enough to keep a core busy, and small beside what training holds.
const AT_ONCE: usize = 256;

/// How good a network is on some images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Images whose class was told right.
    pub correct: usize,
    /// Images in all.
    pub images: usize,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
}

impl Score {
    /// The part of the images that was told right, between 0 and 1.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.images.max(1) as f64
    }

    /// The score itself, found in `stage` after so many epochs: JSON has no way to write a loss that is
    /// no number, so that what was saved with it could not be read again.
    ///
    /// # Errors
    /// The loss left the numbers.
    pub(crate) fn finite(self, stage: Stage, epoch: usize) -> Result<Score, TrainError> {
        match self.loss.is_finite() {
            true => Ok(self),
            false => Err(TrainError::Diverged { stage, epoch, loss: self.loss }),
        }
    }
}

/// Judges `network` under `policy` on the images `indices`.
///
/// # Errors
/// The logits cannot be read back from the device.
pub(crate) fn judge(
    network: &Network,
    policy: &Policy,
    images: &Dataset,
    indices: &[usize],
    stats: Stats,
) -> Result<Score, TrainError> {
    let mut score = Score { correct: 0, images: indices.len(), loss: 0.0 };
    for chunk in even(indices) {
        let (pixels, _) = images.batch(chunk, &network.device());
        let rows = rows(network.forward_with(pixels, policy, stats))?;
        for (row, &index) in rows.iter().zip(chunk) {
            let label = images.labels()[index];
            score.correct += usize::from(largest(row) == label);
            score.loss -= f64::from(row[label]);
        }
    }
    score.loss /= indices.len().max(1) as f64;
    Ok(score)
}

/// As few parts as hold [`AT_ONCE`] at most, of sizes that differ by one at most: the statistics of
/// a batch of one image would make all its features the same.
fn even(indices: &[usize]) -> impl Iterator<Item = &[usize]> {
    let parts = indices.len().div_ceil(AT_ONCE);
    let start = move |part: usize| part * indices.len() / parts;
    (0..parts).map(move |part| &indices[start(part)..start(part + 1)])
}

/// Judges on all images.
pub(crate) fn judge_all(
    network: &Network,
    policy: &Policy,
    images: &Dataset,
    stats: Stats,
) -> Result<Score, TrainError> {
    let all: Vec<usize> = (0..images.len()).collect();
    judge(network, policy, images, &all, stats)
}

/// The class that `network` gives each image under `policy`, with stored statistics: what the
/// exported model, split by the same policy, must answer.
///
/// # Errors
/// The logits cannot be read back from the device.
pub fn classify(
    network: &Network,
    policy: &Policy,
    images: &Dataset,
) -> Result<Vec<usize>, TrainError> {
    let network = network.inference();
    let all: Vec<usize> = (0..images.len()).collect();
    let mut classes = Vec::with_capacity(all.len());
    for chunk in all.chunks(AT_ONCE) {
        let (pixels, _) = images.batch(chunk, &network.device());
        let rows = rows(network.forward_with(pixels, policy, Stats::Stored))?;
        classes.extend(rows.iter().map(|row| largest(row)));
    }
    Ok(classes)
}

/// Gives `network` the batch-norm statistics of `policy`: the mean over the first images, as many as the
/// settings say, as they are or, with random numbers, each changed as in training.
pub(crate) fn calibrate(
    network: &Network,
    policy: &Policy,
    images: &Dataset,
    settings: &FitConfig,
    mut change: Option<Rng>,
) {
    let device = network.device();
    let indices: Vec<usize> = (0..images.len().min(settings.calibration)).collect();
    for (batch, chunk) in indices.chunks(AT_ONCE.min(indices.len().max(1))).enumerate() {
        // A last chunk that is not full would weigh its few images as much as a full one's.
        if batch > 0 && chunk.len() < AT_ONCE {
            break;
        }
        let (pixels, _) = match &mut change {
            Some(rng) => images.augmented(chunk, &settings.augment, rng, &device),
            None => images.batch(chunk, &device),
        };
        network.forward_with(pixels, policy, Stats::Update(1.0 / (batch + 1) as f64));
    }
}

/// Log-probabilities, a row an image.
fn rows(logits: Tensor<2>) -> Result<Vec<Vec<f32>>, TrainError> {
    let [_, classes] = logits.dims();
    let values: Vec<f32> = log_softmax(logits, 1)
        .try_into_vec_as()
        .map_err(|error| TrainError::Tensor(error.to_string()))?;
    Ok(values.chunks_exact(classes).map(<[f32]>::to_vec).collect())
}

/// Index of the first of the largest values.
pub(crate) fn largest(row: &[f32]) -> usize {
    let better =
        |best: usize, (index, value): (usize, &f32)| if *value > row[best] { index } else { best };
    row.iter().enumerate().fold(0, better)
}

/// The device that models are exported from and small things computed on.
pub(crate) fn host() -> Device {
    Device::flex()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::data::Data;
    use crate::seed::rng;

    #[test]
    fn statistics_are_those_of_images_as_training_changes_them() {
        let config = Config::digits();
        let data = Data::load(&config, None).unwrap();
        let network = Network::new(&config.net, 1, &host());
        let policy = config.silent();
        let settings = FitConfig { calibration: 64, ..config.train };
        calibrate(&network, &policy, &data.train, &settings, Some(rng(1, "test", 0)));
        let first: Vec<usize> = (0..64).collect();
        let changed = &mut rng(1, "test", 0);
        let (pixels, _) = data.train.augmented(&first, &settings.augment, changed, &host());
        let logits = |stats| -> Vec<f32> {
            network.forward_with(pixels.clone(), &policy, stats).try_into_vec_as().unwrap()
        };
        let (stored, batch) = (logits(Stats::Stored), logits(Stats::Batch));
        let off = stored.iter().zip(&batch).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-3, "{off}");
    }

    #[test]
    fn images_are_judged_in_even_parts() {
        let sizes = |count: usize| {
            let indices: Vec<usize> = (0..count).collect();
            let parts: Vec<&[usize]> = even(&indices).collect();
            assert_eq!(parts.concat(), indices);
            parts.into_iter().map(<[usize]>::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(0), [0; 0]);
        assert_eq!(sizes(AT_ONCE), [AT_ONCE]);
        assert_eq!(sizes(AT_ONCE + 1), [AT_ONCE / 2, AT_ONCE / 2 + 1]);
        assert_eq!(sizes(2 * AT_ONCE + 1), [171; 3]);
    }

    #[test]
    fn a_loss_that_is_no_number_ends_the_run() {
        let score = Score { correct: 1, images: 2, loss: 0.5 };
        assert_eq!(score.finite(Stage::Select, 3).unwrap(), score);
        for loss in [f64::NAN, f64::INFINITY] {
            let error = Score { loss, ..score }.finite(Stage::Select, 3).unwrap_err().to_string();
            assert!(error.starts_with("select: epoch 3: the loss is "), "{error}");
        }
    }

    #[test]
    fn the_first_of_equal_logits_wins() {
        assert_eq!(largest(&[0.5, 2.0, 2.0, -1.0]), 1);
    }
}
