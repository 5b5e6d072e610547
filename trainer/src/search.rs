//! Stages 2 and 3: teaching the controller, and choosing a policy (section 3.2).
//!
//! Weights stay as they are. A step lets the controller sample policies, judges each on a validation
//! mini-batch of its own, and learns from the rewards: the accuracy, less what the policy's traffic
//! or its latency costs where the settings give them a price. Choosing judges every sampled policy on
//! the same validation images, all of them or as many as the settings say. The random sampler chooses
//! once, on the weights of the last round, and its policies are judged on as many images as that round
//! judges; what the controller learned in earlier rounds, on other weights, has no counterpart. The
//! test images are never looked at.

use burn::module::Module;
use rand::seq::SliceRandom;
use snn_schemas::Policy;

use crate::config::Config;
use crate::controller::{Reinforce, policies, random_policies};
use crate::data::Dataset;
use crate::error::TrainError;
use crate::judge::{Score, judge};
use crate::latency::latency;
use crate::net::{Network, Stats};
use crate::seed::rng;
use crate::state::Choice;
use crate::wire::Wire;

/// What a step of the controller saw.
pub(crate) struct Step {
    /// Mean accuracy of the step's policies.
    pub(crate) accuracy: f64,
    /// Mean reward, the accuracy less [`price`].
    pub(crate) reward: f64,
    /// Mean entropy of the controller's policies, in nats.
    pub(crate) entropy: f64,
    /// The step's policies.
    pub(crate) policies: Vec<Policy>,
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
    let mut accuracies = 0.0;
    let policies = policies(config, rollout.steps.clone());
    for policy in &policies {
        order.shuffle(&mut rng);
        let batch = &order[..config.train.batch.min(order.len())];
        let accuracy = judge(network, policy, images, batch, Stats::Batch)?.accuracy();
        accuracies += accuracy;
        rewards.push(accuracy - price(config, policy)?);
    }
    let count = rewards.len().max(1) as f64;
    let reward = rewards.iter().sum::<f64>() / count;
    let accuracy = accuracies / count;
    let step = Step { accuracy, reward, entropy: f64::from(entropy), policies };
    Ok((reinforce.learn(rollout, &rewards), step))
}

/// What a policy takes from its reward: λ times its wire bytes, as a part of the ring's, and λ times
/// the milliseconds it is predicted to take.
pub(crate) fn price(config: &Config, policy: &Policy) -> Result<f64, TrainError> {
    let search = &config.search;
    let mut price = 0.0;
    if search.lambda_wire > 0.0 {
        price += search.lambda_wire * Wire::of(&config.net, policy).fraction();
    }
    if search.lambda_latency > 0.0 {
        price += search.lambda_latency * latency(config, policy)?;
    }
    Ok(price)
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

/// The random sampler's policies, [`random_count`] of them.
pub(crate) fn random(config: &Config, images: &Dataset) -> Vec<Policy> {
    let count = random_count(config, images.len());
    random_policies(config, count, &mut rng(config.seed, "random", 0))
}

/// How many policies the random sampler chooses among: as many as can be judged on `images` validation
/// images for what stages 2 and 3 judge in a round, on the weights both are judged on.
pub(crate) fn random_count(config: &Config, images: usize) -> usize {
    let judged = config.search.steps * judged_in_step(config, images);
    config.search.samples + judged.div_ceil(config.judged_images(images).max(1))
}

/// Images that a step of the controller judges, of `images` validation images.
pub(crate) fn judged_in_step(config: &Config, images: usize) -> usize {
    config.search.policies_per_step * config.train.batch.min(images)
}

/// A policy of stage 3 on the validation images it is judged on.
pub(crate) fn judge_sample(
    config: &Config,
    network: &Network,
    policy: &Policy,
    images: &Dataset,
) -> Result<Score, TrainError> {
    // Drawn by seed when the data was split: the first are as good as any.
    let judged: Vec<usize> = (0..config.judged_images(images.len())).collect();
    judge(network, policy, images, &judged, Stats::Batch)
}

/// The best of the policies offered so far, in reward.
pub(crate) struct Best<'a> {
    config: &'a Config,
    best: Option<((f64, f64), Choice)>,
}

impl<'a> Best<'a> {
    /// Before the first.
    pub(crate) fn new(config: &'a Config) -> Best<'a> {
        Best { config, best: None }
    }

    /// Takes a policy and how it was judged; gives its reward, the accuracy less [`price`].
    pub(crate) fn offer(&mut self, policy: &Policy, validation: Score) -> Result<f64, TrainError> {
        let reward = validation.accuracy() - price(self.config, policy)?;
        let worth = (reward, -validation.loss); // of equal rewards the smaller loss
        if self.best.as_ref().is_none_or(|(most, _)| worth > *most) {
            self.best = Some((worth, Choice { policy: policy.clone(), validation }));
        }
        Ok(reward)
    }

    /// The best; of equal ones the first.
    pub(crate) fn choice(self) -> Option<Choice> {
        self.best.map(|(_, choice)| choice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidate::full;
    use crate::data::Data;
    use burn::tensor::Device;

    fn choose(config: &Config, candidates: &[Policy], images: &Dataset) -> Choice {
        let network = Network::new(&config.net, 1, &Device::flex());
        let mut best = Best::new(config);
        for policy in candidates {
            let score = judge_sample(config, &network, policy, images).unwrap();
            best.offer(policy, score).unwrap();
        }
        best.choice().unwrap()
    }

    /// A network that has learned nothing tells policies apart by chance alone; a price outweighs it.
    #[test]
    fn a_price_on_bytes_makes_silence_the_best_policy() {
        let mut config = Config::digits();
        config.search.judged_images = 40;
        let images = Data::load(&config, None).unwrap().validation;
        let candidates = [full(&config), config.silent()];
        let choose = |config: &Config| choose(config, &candidates, &images);
        assert_eq!(choose(&config).validation.images, 40);
        assert_eq!(price(&config, &candidates[0]).unwrap(), 0.0);
        config.search.lambda_wire = 1000.0;
        let ring = Wire::of(&config.net, &candidates[0]).fraction();
        assert!(ring > 0.05);
        assert_eq!(price(&config, &candidates[0]).unwrap(), 1000.0 * ring);
        assert_eq!(price(&config, &candidates[1]).unwrap(), 0.0);
        assert_eq!(choose(&config).policy, candidates[1]);
        config.search.lambda_wire = 1e-9;
        let free = choose(&Config { search: Default::default(), ..config.clone() });
        assert_eq!(choose(&config).policy, free.policy);
    }

    /// On a slow link the policy that sends less wins, and on a fast one what it sends is free.
    #[test]
    fn a_price_on_latency_follows_the_link() {
        let mut config = Config::digits();
        config.search.judged_images = 40;
        config.search.lambda_latency = 1000.0;
        let images = Data::load(&config, None).unwrap().validation;
        let everything = full(&config);
        let mut half = everything.clone();
        half.steps.iter_mut().for_each(|step| step.level = 0);
        let choose =
            |config: &Config, candidates: &[Policy]| choose(config, candidates, &images).policy;
        config.search.link = "1mbit,1ms".to_owned();
        let all = [everything.clone(), half.clone(), config.silent()];
        assert_eq!(choose(&config, &all), config.silent());
        assert_eq!(choose(&config, &all[..2]), half);
        config.search.link = "unlimited".to_owned();
        let prices: Vec<f64> = all.iter().map(|policy| price(&config, policy).unwrap()).collect();
        assert!((prices[0] - prices[1]).abs() < 1e-6 && prices[1] >= prices[2], "{prices:?}");
        // Only bytes have a price where waiting does not: half of them cost half.
        config.search =
            crate::SearchConfig { lambda_latency: 0.0, lambda_wire: 1.0, ..config.search };
        let [most, less] = [&everything, &half].map(|policy| price(&config, policy).unwrap());
        assert!((less / most - 0.5).abs() < 1e-9);
    }
}
