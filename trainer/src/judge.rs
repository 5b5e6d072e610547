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
    for chunk in indices.chunks(AT_ONCE) {
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
    fn the_first_of_equal_logits_wins() {
        assert_eq!(largest(&[0.5, 2.0, 2.0, -1.0]), 1);
    }
}
