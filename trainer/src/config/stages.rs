//! The settings of the stages: training the weights, searching a policy, fine-tuning.
//!
//! Takes and gives plain numbers; each table's defaults are the paper's where it gives them, and the
//! reason stands beside those it does not. What is out of range is named by its key.

use serde::{Deserialize, Serialize};
use snn_schemas::cost::{Device, Link};

use super::{ConfigError, within};
use crate::candidate::Source;

/// Upper end of counts that have none of their own.
const MANY: f64 = u32::MAX as f64;

/// How the learning rate falls.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Decay {
    /// Multiplied by `factor` after every `every` epochs.
    Step {
        /// Epochs between two drops.
        every: usize,
        /// What a drop multiplies by.
        factor: f64,
    },
    /// Half a cosine, from the full rate to (almost) nothing at the last epoch.
    Cosine,
}

impl Decay {
    /// The rate of epoch `epoch` of `epochs`, counted from 0, when it starts at `lr`.
    pub fn rate(self, lr: f64, epoch: usize, epochs: usize) -> f64 {
        match self {
            Decay::Step { every, factor } => lr * factor.powf((epoch / every.max(1)) as f64),
            Decay::Cosine => {
                let done = epoch as f64 / epochs.max(1) as f64;
                lr * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}

/// Stage 1: the network's weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FitConfig {
    /// Passes over the training images, in all rounds together, spread evenly over the rounds.
    pub epochs: usize,
    /// Images a batch; a last batch that is not full is left out, since batch norm needs it full.
    pub batch: usize,
    /// Whose policies the weights learn under: the controller's as it is then (the paper's way; random
    /// ones while it has learned nothing), random ones throughout, or one policy alone, full or silent:
    /// what an exchange is worth to weights that need not serve any other.
    pub under: Source,
    /// M of equation 9: policies sampled a batch. Each costs a pass.
    pub policies_per_batch: usize,
    /// Learning rate at the start.
    pub lr: f64,
    /// How it falls.
    pub decay: Decay,
    /// Momentum, without dampening. It starts anew in each round.
    pub momentum: f64,
    /// L2 penalty on all parameters.
    pub weight_decay: f64,
    /// What is done to a training image at random.
    pub augment: Augmentation,
    /// Training images from which batch-norm statistics are estimated anew under one policy.
    pub calibration: usize,
}

impl Default for FitConfig {
    fn default() -> FitConfig {
        FitConfig {
            epochs: 200,                                   // section 4.2, for all its networks
            batch: 128,                                    // section 4.2
            under: Source::Searched,                       // section 4.2
            policies_per_batch: 1, // unstated; ENAS, whose method this is, uses 1
            lr: 0.1,               // section 4.2
            decay: Decay::Step { every: 50, factor: 0.1 }, // section 4.2
            momentum: 0.9,         // unstated; the usual with this schedule
            weight_decay: 5e-4,    // unstated; ResNeXt's on CIFAR
            augment: Augmentation::default(),
            calibration: 2048, // enough for the statistics of a channel, and a fraction of an epoch
        }
    }
}

/// What is done to a training image at random.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augmentation {
    /// Pixels by which it is moved along both axes, at most.
    pub shift: usize,
    /// Degrees by which it is turned, at most.
    pub rotate: f64,
    /// Part by which it is made larger or smaller, at most.
    pub zoom: f64,
    /// Whether every other image is mirrored.
    pub flip: bool,
    /// Whether AutoAugment's policy for CIFAR is applied first; images have three channels then.
    pub autoaugment: bool,
}

impl Default for Augmentation {
    fn default() -> Augmentation {
        Augmentation {
            shift: 4,    // unstated; the usual on CIFAR beside AutoAugment
            rotate: 0.0, // AutoAugment turns by itself
            zoom: 0.0,   // as above
            flip: false, // digits and letters do not bear it
            autoaugment: false,
        }
    }
}

/// Stages 2 and 3: the controller, and the choice of a policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchConfig {
    /// How often the three stages are gone through.
    pub rounds: usize,
    /// Cells of the controller's LSTM.
    pub cells: usize,
    /// Steps of the controller's optimiser a round.
    pub steps: usize,
    /// Policies sampled a step, each judged on a validation mini-batch of its own.
    pub policies_per_step: usize,
    /// Learning rate of the controller (Adam).
    pub lr: f64,
    /// Weight of the entropy in the controller's objective: keeps it from settling too early.
    pub entropy: f64,
    /// How slowly the baseline follows the rewards: b ← decay · b + (1 − decay) · reward.
    pub baseline_decay: f64,
    /// What a policy's wire bytes take from its reward: this many times the part of a ring
    /// all-reduce that really crosses. 0.1 takes a point of accuracy for a tenth of the ring.
    pub lambda_wire: f64,
    /// What a policy's latency takes from its reward: this many times the milliseconds that the cost
    /// model predicts for an image on a cluster of `device` and `link`, a node a group. 0.01 takes a
    /// point of accuracy for a millisecond. Traffic that hides behind computation is free by this
    /// measure, and is not by `lambda_wire`.
    pub lambda_latency: f64,
    /// Speed of each node for `lambda_latency`, such as `"5gflops"`; `snn-run --profile` measures one.
    pub device: String,
    /// Link between the nodes for `lambda_latency`: rate and round trip, such as `"300mbit,0.3ms"`.
    pub link: String,
    /// Policies sampled in stage 3.
    pub samples: usize,
    /// Validation images each of them is judged on, the same ones for all; 0 means all there are.
    pub judged_images: usize,
}

impl Default for SearchConfig {
    fn default() -> SearchConfig {
        SearchConfig {
            rounds: 60,                       // section 4.2
            cells: 100,                       // section 4.2
            steps: 500,                       // section 4.2
            policies_per_step: 1,             // unstated; ENAS uses 1
            lr: 3.5e-4,                       // unstated; ENAS
            entropy: 1e-4,                    // unstated; ENAS
            baseline_decay: 0.99,             // unstated; ENAS
            samples: 100,                     // section 4.2
            lambda_wire: 0.0,                 // the paper rewards accuracy alone
            lambda_latency: 0.0,              // as above
            device: "5gflops".to_owned(),     // what the benchmarks of this repository emulate
            link: "300mbit,0.3ms".to_owned(), // section 4.6's 300 Mbit/s; a wired network's round trip
            judged_images: 0,                 // unstated; all of them leave the least to chance
        }
    }
}

/// The last stage: the weights under the best policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Passes over the training images.
    pub epochs: usize,
    /// Learning rate at the start.
    pub lr: f64,
    /// How it falls.
    pub decay: Decay,
}

impl Default for FinetuneConfig {
    fn default() -> FinetuneConfig {
        FinetuneConfig {
            epochs: 45,                                    // section 4.2
            lr: 1e-4,                                      // section 4.2
            decay: Decay::Step { every: 45, factor: 1.0 }, // section 4.2: constant
        }
    }
}

impl FitConfig {
    /// Checks the settings for images of `input` channels, height and width.
    pub(super) fn check(&self, input: [usize; 3]) -> Result<(), ConfigError> {
        let least = |key, value: usize, least: f64, expected| {
            within(key, value as f64, least, MANY, expected)
        };
        least("train.batch", self.batch, 2.0, "at least 2")?;
        least("train.policies_per_batch", self.policies_per_batch, 1.0, "at least 1")?;
        within("train.lr", self.lr, f64::MIN_POSITIVE, 100.0, "above 0")?;
        within("train.momentum", self.momentum, 0.0, 0.9999, "0 to 0.9999")?;
        within("train.weight_decay", self.weight_decay, 0.0, 1.0, "0 to 1")?;
        let smaller = input[1].min(input[2]) as f64;
        let Augmentation { shift, rotate, zoom, autoaugment, .. } = self.augment;
        within("train.augment.shift", shift as f64, 0.0, smaller - 1.0, "less than the image")?;
        within("train.augment.rotate", rotate, 0.0, 180.0, "0 to 180 degrees")?;
        within("train.augment.zoom", zoom, 0.0, 10.0, "0 to 10")?;
        least("train.calibration", self.calibration, 2.0, "at least 2")?;
        match autoaugment && input[0] != 3 {
            true => Err(ConfigError::Colours { channels: input[0] }),
            false => Ok(()),
        }
    }
}

impl SearchConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let least_one = |key, value: usize| within(key, value as f64, 1.0, MANY, "at least 1");
        least_one("search.rounds", self.rounds)?;
        within("search.cells", self.cells as f64, 1.0, 10_000.0, "1 to 10000")?;
        least_one("search.policies_per_step", self.policies_per_step)?;
        within("search.lr", self.lr, f64::MIN_POSITIVE, 100.0, "above 0")?;
        within("search.entropy", self.entropy, 0.0, 100.0, "0 to 100")?;
        within("search.baseline_decay", self.baseline_decay, 0.0, 1.0, "0 to 1")?;
        within("search.lambda_wire", self.lambda_wire, 0.0, 1e6, "0 to 1000000")?;
        within("search.lambda_latency", self.lambda_latency, 0.0, 1e6, "0 to 1000000")?;
        self.cluster()?;
        least_one("search.samples", self.samples)
    }

    /// The device and the link that latencies are predicted for.
    ///
    /// # Errors
    /// One of them is not written as the cost model reads it.
    pub fn cluster(&self) -> Result<(Device, Link), ConfigError> {
        let wrong = |key, error: snn_schemas::cost::CostError| ConfigError::Cluster {
            key,
            reason: error.to_string(),
        };
        let device = self.device.parse().map_err(|error| wrong("search.device", error))?;
        let link = self.link.parse().map_err(|error| wrong("search.link", error))?;
        Ok((device, link))
    }
}
