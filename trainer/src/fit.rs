//! One pass over the training images (stage 1 and fine-tuning, equation 9).
//!
//! Takes a network on an autodiff device and its optimiser, and gives the network after an epoch.
//! Each batch is computed under M policies, and the gradients' mean is applied: M sampled ones in
//! stage 1, a single fixed one when fine-tuning. Batches, shifts and their order depend on the seed
//! and the epoch's number alone.

use burn::nn::loss::CrossEntropyLoss;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Int, Tensor};
use rand::seq::SliceRandom;
use snn_schemas::Policy;

use crate::config::FitConfig;
use crate::data::{Dataset, loader};
use crate::error::TrainError;
use crate::net::{Network, Stats};
use crate::seed::Rng;

/// What an epoch is made with.
pub(crate) struct Epoch<'a> {
    /// Images to learn from.
    pub(crate) images: &'a Dataset,
    /// Batch size and augmentation.
    pub(crate) settings: &'a FitConfig,
    /// Learning rate.
    pub(crate) lr: f64,
    /// Policies of a batch: `policies[batch]` are its M.
    pub(crate) policies: &'a [Vec<Policy>],
    /// Order, shifts.
    pub(crate) rng: Rng,
}

/// Batches of an epoch; a last one that is not full is left out.
pub(crate) fn batches(images: &Dataset, settings: &FitConfig) -> usize {
    images.len() / settings.batch
}

/// The optimiser of section 4.2, without memory.
pub(crate) fn sgd(settings: &FitConfig) -> ModuleOptimizer {
    let momentum = MomentumConfig::new().with_momentum(settings.momentum).with_dampening(0.0);
    let decay = WeightDecayConfig::new(settings.weight_decay as f32);
    let config = SgdConfig::new().with_weight_decay(Some(decay));
    config.with_momentum((settings.momentum > 0.0).then_some(momentum)).init()
}

/// Makes one pass; gives the network, and the mean loss and accuracy on the way.
pub(crate) fn epoch(
    mut network: Network,
    sgd: &mut ModuleOptimizer,
    mut epoch: Epoch,
) -> Result<(Network, f64, f64), TrainError> {
    let device = network.device();
    let mut order: Vec<usize> = (0..epoch.images.len()).collect();
    order.shuffle(&mut epoch.rng);
    let Epoch { images, settings, lr, policies, rng } = epoch;
    loader::load(images, (&order, settings.batch), (&settings.augment, rng), |batches| {
        let mut sums = Sums::default();
        for (batch, policies) in batches.zip(policies) {
            let (pixels, labels) = images.tensors(batch.pixels, batch.indices, &device);
            let mut mean = GradientsAccumulator::new();
            for policy in policies {
                let logits = network.forward_with(pixels.clone(), policy, Stats::Batch); // [batch, classes]
                sums.right += hits(&logits, &labels)?;
                let loss = CrossEntropyLoss::new(None, &device).forward(logits, labels.clone()); // [1]
                sums.loss += scalar(&loss)? * batch.indices.len() as f64;
                sums.seen += batch.indices.len() as f64;
                let grads = (loss / policies.len() as f64).backward();
                mean.accumulate(&network, GradientsParams::from_grads(grads, &network));
            }
            network = sgd.step(lr, network, mean.grads());
        }
        Ok((network, sums.loss / sums.seen, sums.right / sums.seen))
    })
}

/// What an epoch adds up over its images.
#[derive(Default)]
struct Sums {
    loss: f64,
    right: f64,
    seen: f64,
}

fn hits(logits: &Tensor<2>, labels: &Tensor<1, Int>) -> Result<f64, TrainError> {
    let [batch, _] = logits.dims();
    let told = logits.clone().detach().argmax(1).reshape([batch]);
    let hits = told.equal(labels.clone()).int().sum();
    let hits: i64 =
        hits.try_into_scalar().map_err(|error| TrainError::Tensor(error.to_string()))?;
    Ok(hits as f64)
}

fn scalar(value: &Tensor<1>) -> Result<f64, TrainError> {
    let value: f32 = value
        .clone()
        .detach()
        .try_into_scalar()
        .map_err(|error| TrainError::Tensor(error.to_string()))?;
    Ok(f64::from(value))
}
