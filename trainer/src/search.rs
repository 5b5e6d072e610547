//! Stages 2 and 3: teaching the controller, and choosing a policy (section 3.2).
//!
//! Weights stay as they are. A step lets the controller sample policies, judges each on a validation
//! mini-batch of its own, and learns from the accuracies. Choosing judges every sampled policy on
//! the same validation images, all of them or as many as the settings say. The random sampler is
//! judged on as many images. The test images are never looked at.

use burn::module::Module;
use rand::seq::SliceRandom;
use snn_schemas::Policy;

use crate::config::Config;
use crate::controller::{Reinforce, policies, random_policies};
use crate::data::Dataset;
use crate::error::TrainError;
use crate::judge::{Score, judge};
use crate::net::{Network, Stats};
use crate::seed::rng;
use crate::state::Choice;

/// What a step of the controller saw.
pub(crate) struct Step {
    /// Mean reward of the step's policies.
    pub(crate) reward: f64,
    /// Mean entropy of the controller's policies, in nats.
    pub(crate) entropy: f64,
}

/// Step `number` of stage 2; `network` is without gradients.
pub(crate) fn step(
    reinforce: Reinforce,
    network: &Network,
    images: &Dataset,
    (config, number): (&Config, usize),
) -> Result<(Reinforce, Step), TrainError> {
    let mut rng = rng(config.seed, "search", number);
    let rollout = reinforce.controller.sample(config.search.policies_per_step, &mut rng)?;
    let entropy = rollout.entropy.clone().detach().mean();
    let entropy: f32 =
        entropy.try_into_scalar().map_err(|error| TrainError::Tensor(error.to_string()))?;
    let mut order: Vec<usize> = (0..images.len()).collect();
    let mut rewards = Vec::with_capacity(config.search.policies_per_step);
    for policy in policies(config, rollout.steps.clone()) {
        order.shuffle(&mut rng);
        let batch = &order[..config.train.batch.min(order.len())];
        rewards.push(judge(network, &policy, images, batch, Stats::Batch)?.accuracy());
    }
    let reward = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    Ok((reinforce.learn(rollout, &rewards), Step { reward, entropy: f64::from(entropy) }))
}

/// The policies that stage 3 of round `round` samples.
pub(crate) fn sample(
    reinforce: &Reinforce,
    config: &Config,
    round: usize,
) -> Result<Vec<Policy>, TrainError> {
    let mut rng = rng(config.seed, "select", round);
    let rollout = reinforce.controller.valid().sample(config.search.samples, &mut rng)?;
    Ok(policies(config, rollout.steps))
}

/// The random sampler's policies: as many as can be chosen among for the images that the search
/// judged in a round, on the weights both are judged on.
pub(crate) fn random(config: &Config, images: &Dataset) -> Vec<Policy> {
    let search = &config.search;
    let batch = config.train.batch.min(images.len());
    let judged = search.steps * search.policies_per_step * batch;
    let count = search.samples + judged.div_ceil(config.judged_images(images.len()).max(1));
    random_policies(config, count, &mut rng(config.seed, "random", 0))
}

/// The best of `candidates` on the first `count` validation images; calls `done` after each.
pub(crate) fn best(
    network: &Network,
    candidates: &[Policy],
    (images, count): (&Dataset, usize),
    mut done: impl FnMut(usize, f64),
) -> Result<Option<Choice>, TrainError> {
    // Drawn by seed when the data was split: the first are as good as any.
    let judged: Vec<usize> = (0..count.min(images.len())).collect();
    // A controller that has settled samples the same policy again and again.
    let mut known: Vec<(&Policy, Score)> = Vec::new();
    let mut best: Option<Choice> = None;
    for (index, policy) in candidates.iter().enumerate() {
        let validation = match known.iter().find(|(other, _)| other.steps == policy.steps) {
            Some((_, score)) => *score,
            None => judge(network, policy, images, &judged, Stats::Batch)?,
        };
        known.push((policy, validation));
        if best.as_ref().is_none_or(|best| validation.beats(&best.validation)) {
            best = Some(Choice { policy: policy.clone(), validation });
        }
        done(index + 1, validation.accuracy());
    }
    Ok(best)
}
