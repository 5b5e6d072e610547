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
use burn::tensor::{Int, Tensor, TensorReadError};
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
        let mut told = Told::default();
        for (batch, policies) in batches.zip(policies) {
            let (pixels, labels) = images.tensors(batch.pixels, batch.indices, &device);
            let mut mean = GradientsAccumulator::new();
            for policy in policies {
                let logits = network.forward_with(pixels.clone(), policy, Stats::Batch); // [batch, classes]
                let right = hits(&logits, &labels);
                let loss = CrossEntropyLoss::new(None, &device).forward(logits, labels.clone()); // [1]
                told.losses.push(loss.clone().detach());
                told.right.push(right);
                let grads = (loss / policies.len() as f64).backward();
                mean.accumulate(&network, GradientsParams::from_grads(grads, &network));
            }
            network = sgd.step(lr, network, mean.grads());
            told.read_some(batch.indices.len())?;
        }
        told.read(settings.batch)?;
        Ok((network, told.loss / told.seen, told.hits / told.seen))
    })
}

/// Figures are read from the device this many at a time: it computes on meanwhile, and is never far behind.
const READ_AT_ONCE: usize = 32;

/// What the batches of an epoch came to.
#[derive(Default)]
struct Told {
    /// Mean loss of each batch that is not read yet, `[1]`.
    losses: Vec<Tensor<1>>,
    /// Images told right in each, `[1]`.
    right: Vec<Tensor<1, Int>>,
    loss: f64,
    hits: f64,
    seen: f64,
}

impl Told {
    /// Reads what has gathered, if it is enough; batches have `images` images.
    fn read_some(&mut self, images: usize) -> Result<(), TrainError> {
        if self.losses.len() < READ_AT_ONCE { Ok(()) } else { self.read(images) }
    }

    /// Reads what has gathered.
    fn read(&mut self, images: usize) -> Result<(), TrainError> {
        if self.losses.is_empty() {
            return Ok(());
        }
        let losses = Tensor::cat(std::mem::take(&mut self.losses), 0);
        let right = Tensor::cat(std::mem::take(&mut self.right), 0);
        let wrong = |error: TensorReadError| TrainError::Tensor(error.to_string());
        for loss in losses.try_into_vec_as::<f32>().map_err(wrong)? {
            self.loss += f64::from(loss) * images as f64;
            self.seen += images as f64;
        }
        for right in right.try_into_vec_as::<i64>().map_err(wrong)? {
            self.hits += right as f64;
        }
        Ok(())
    }
}

/// How many of a batch are told right, `[1]`.
fn hits(logits: &Tensor<2>, labels: &Tensor<1, Int>) -> Tensor<1, Int> {
    let [batch, _] = logits.dims();
    let told = logits.clone().detach().argmax(1).reshape([batch]);
    told.equal(labels.clone()).int().sum()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::candidate;
    use crate::config::{Config, NetConfig};
    use crate::data::Data;
    use crate::seed::rng;

    #[test]
    fn a_deep_network_survives_its_first_steps_under_exchanges() {
        let digits = Config::digits();
        let config = Config { net: NetConfig { depth: 56, ..digits.net.clone() }, ..digits };
        let data = Data::load(&config, None).unwrap();
        let settings = FitConfig { batch: 32, ..config.train.clone() };
        let policies = vec![vec![candidate::full(&config)]; batches(&data.train, &settings)];
        let network = Network::new(&config.net, 1, &Device::flex().autodiff());
        let epoch = Epoch {
            images: &data.train,
            settings: &settings,
            lr: settings.lr,
            policies: &policies,
            rng: rng(1, "epoch", 0),
        };
        let (_, loss, _) = super::epoch(network, &mut sgd(&settings), epoch).unwrap();
        // Chance is 2.3; without normalised features it was 18, and never learned again.
        assert!(loss < 3.0, "mean loss {loss}");
    }
}
