//! Ways to look for a policy, on the same weights and at the same budget (section 4.5).
//!
//! A [`Sampler`] proposes policies and is told how good they were. [`compare`] lets several of them
//! go through stage 2 and 3 of the same run with the same images, as often as there are seeds, and
//! gives their rewards step by step, how long the steps took, and what they find. But for the times
//! equal settings give equal trials. Nothing here looks at the test images.

use std::time::Instant;

use burn::module::Module;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use snn_schemas::Policy;

use crate::candidate::full;
use crate::config::Config;
use crate::controller::{Controller, Reinforce, Rollout, policies, random_policies};
use crate::data::Dataset;
use crate::error::TrainError;
use crate::judge::{host, judge};
use crate::net::{Network, Stats};
use crate::progress::{Progress, Report, Stage};
use crate::scores::Scores;
use crate::search::{Best, judge_sample, price};
use crate::seed::{Rng, rng};
use crate::sinkhorn::Differentiable;

/// Policies that evolution keeps: the youngest so many.
const POPULATION: usize = 32;
/// Of so many drawn from the population the best becomes a parent.
const TOURNAMENT: usize = 6;

/// Something that proposes policies.
pub trait Sampler {
    /// Proposes `count` policies.
    ///
    /// # Errors
    /// Probabilities cannot be read back from the device.
    fn propose(&mut self, count: usize, rng: &mut SamplerRng) -> Result<Vec<Policy>, TrainError>;

    /// Is shown what the policies proposed last are judged with, before it is told how good they were:
    /// for samplers that learn from more than a reward.
    ///
    /// # Errors
    /// Numbers cannot be read back from the device.
    fn study(&mut self, _: &Lesson) -> Result<(), TrainError> {
        Ok(())
    }

    /// Is told the rewards of the policies proposed last, in order.
    fn learn(&mut self, rewards: &[f64]);
}

/// What the policies of a step are judged with.
pub struct Lesson<'a> {
    /// The network, without gradients.
    pub network: &'a Network,
    /// The validation images.
    pub images: &'a Dataset,
    /// For each policy the images that it is judged on.
    pub batches: &'a [Vec<usize>],
}

/// The random numbers a sampler is given.
pub struct SamplerRng(pub(crate) Rng);

/// A sampler of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SamplerName {
    /// The LSTM trained by REINFORCE.
    Controller,
    /// Regularised evolution: the best of a few is changed in one place, the oldest dies.
    Evolution,
    /// Gumbel-Sinkhorn, by the gradient of the network itself.
    Sinkhorn,
    /// Every policy equally likely.
    Random,
    /// Everybody sends everything, round and round: an anchor.
    Full,
    /// Nobody sends: an anchor.
    Silent,
}

impl SamplerName {
    /// All of them.
    pub const ALL: [SamplerName; 6] = [
        SamplerName::Controller,
        SamplerName::Evolution,
        SamplerName::Sinkhorn,
        SamplerName::Random,
        SamplerName::Full,
        SamplerName::Silent,
    ];

    /// What it is called in files and figures.
    pub fn name(self) -> &'static str {
        match self {
            SamplerName::Controller => "controller",
            SamplerName::Evolution => "evolution",
            SamplerName::Sinkhorn => "sinkhorn",
            SamplerName::Random => "random",
            SamplerName::Full => "full",
            SamplerName::Silent => "silent",
        }
    }

    /// A fresh one for the policies of `config`.
    pub fn build(self, config: &Config) -> Box<dyn Sampler + '_> {
        match self {
            SamplerName::Controller => {
                let controller = Controller::new(config, &host().autodiff());
                let reinforce = Reinforce::new(controller, &config.search);
                Box::new(Learner { config, reinforce: Some(reinforce), proposed: None })
            }
            SamplerName::Evolution => {
                Box::new(Evolution { config, population: Vec::new(), proposed: Vec::new() })
            }
            SamplerName::Sinkhorn => Box::new(Differentiable::new(config)),
            SamplerName::Random => Box::new(Uniform { config }),
            SamplerName::Full => Box::new(Fixed { policy: full(config) }),
            SamplerName::Silent => Box::new(Fixed { policy: config.silent() }),
        }
    }
}

struct Learner<'a> {
    config: &'a Config,
    reinforce: Option<Reinforce>,
    proposed: Option<Rollout>,
}

impl Sampler for Learner<'_> {
    fn propose(&mut self, count: usize, rng: &mut SamplerRng) -> Result<Vec<Policy>, TrainError> {
        let Some(reinforce) = &self.reinforce else { return Ok(Vec::new()) };
        let rollout = reinforce.controller.sample(count, &mut rng.0)?;
        let proposed = policies(self.config, rollout.steps.clone());
        self.proposed = Some(rollout);
        Ok(proposed)
    }

    fn learn(&mut self, rewards: &[f64]) {
        if let (Some(reinforce), Some(rollout)) = (self.reinforce.take(), self.proposed.take()) {
            self.reinforce = Some(reinforce.learn(rollout, rewards));
        }
    }
}

struct Uniform<'a> {
    config: &'a Config,
}

impl Sampler for Uniform<'_> {
    fn propose(&mut self, count: usize, rng: &mut SamplerRng) -> Result<Vec<Policy>, TrainError> {
        Ok(random_policies(self.config, count, &mut rng.0))
    }

    fn learn(&mut self, _: &[f64]) {}
}

struct Fixed {
    policy: Policy,
}

impl Sampler for Fixed {
    fn propose(&mut self, count: usize, _: &mut SamplerRng) -> Result<Vec<Policy>, TrainError> {
        Ok(vec![self.policy.clone(); count])
    }

    fn learn(&mut self, _: &[f64]) {}
}

struct Evolution<'a> {
    config: &'a Config,
    /// Oldest first.
    population: Vec<(Policy, f64)>,
    proposed: Vec<Policy>,
}

impl Evolution<'_> {
    /// One step of the best of a few gets another decision, or another level.
    fn child(&self, rng: &mut Rng) -> Policy {
        let draw = |rng: &mut Rng| &self.population[rng.random_range(0..self.population.len())];
        let mut parent = draw(rng);
        for _ in 1..TOURNAMENT {
            let other = draw(rng);
            parent = if other.1 > parent.1 { other } else { parent };
        }
        let mut child = parent.0.clone();
        let fresh = random_policies(self.config, 1, rng);
        let place = rng.random_range(0..child.steps.len().max(1));
        if let (Some(step), Some(fresh)) = (child.steps.get_mut(place), fresh.first()) {
            let fresh = &fresh.steps[place];
            match self.config.exchange.search_levels && rng.random::<bool>() {
                true => step.level = fresh.level,
                false => step.decision = fresh.decision.clone(),
            }
        }
        child
    }
}

impl Sampler for Evolution<'_> {
    fn propose(&mut self, count: usize, rng: &mut SamplerRng) -> Result<Vec<Policy>, TrainError> {
        self.proposed = match self.population.len() < POPULATION {
            true => random_policies(self.config, count, &mut rng.0),
            false => (0..count).map(|_| self.child(&mut rng.0)).collect(),
        };
        Ok(self.proposed.clone())
    }

    fn learn(&mut self, rewards: &[f64]) {
        self.population.extend(self.proposed.drain(..).zip(rewards.iter().copied()));
        let dead = self.population.len().saturating_sub(POPULATION);
        self.population.drain(..dead);
    }
}

/// What a sampler did with one seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// Which sampler.
    pub sampler: SamplerName,
    /// Which seed.
    pub seed: u64,
    /// Mean reward of each step's policies, on a validation mini-batch each.
    pub rewards: Vec<f64>,
    /// Seconds from the sampler's start to each step's end: proposing, judging and learning.
    pub seconds: Vec<f64>,
    /// Mean reward of the policies sampled in the end, on the validation images: accuracy less what
    /// the settings have policies pay.
    pub mean: f64,
    /// Reward of the best of them.
    pub best: f64,
    /// And its policy.
    pub policy: Policy,
}

impl Trial {
    /// Mean reward of the last tenth of the steps: what the sampler had learned in the end.
    pub fn late(&self) -> f64 {
        let steps = self.rewards.len();
        let last = &self.rewards[steps - steps.div_ceil(10).min(steps)..];
        last.iter().sum::<f64>() / last.len().max(1) as f64
    }
}

/// Lets every sampler search on the weights of `network`, once for each of `seeds`.
///
/// The budget is that of one round: `config.search.steps` steps, then `config.search.samples` policies.
///
/// # Errors
/// Logits cannot be read back from the device.
pub(crate) fn compare(
    config: &Config,
    network: &Network,
    images: &Dataset,
    (seeds, progress): (&[u64], &mut dyn Progress),
) -> Result<Vec<Trial>, TrainError> {
    let network = network.valid();
    let mut trials = Vec::new();
    let total = seeds.len() * SamplerName::ALL.len();
    let started = Instant::now();
    for &seed in seeds {
        let config = Config { seed, ..config.clone() };
        for sampler in SamplerName::ALL {
            let trial = try_one(&config, &network, images, sampler)?;
            let accuracy = Some(trial.best);
            trials.push(trial);
            let done = trials.len();
            progress.report(&Report {
                stage: Stage::Search,
                round: 1,
                done,
                total,
                loss: None,
                accuracy,
                left: Some(started.elapsed().mul_f64((total - done) as f64 / done as f64)),
            });
        }
    }
    Ok(trials)
}

fn try_one(
    config: &Config,
    network: &Network,
    images: &Dataset,
    name: SamplerName,
) -> Result<Trial, TrainError> {
    let mut sampler = name.build(config);
    let search = &config.search;
    let mut order: Vec<usize> = (0..images.len()).collect();
    let mut rewards = Vec::with_capacity(search.steps);
    let mut seconds = Vec::with_capacity(search.steps);
    let started = Instant::now();
    for number in 0..search.steps {
        // All samplers are judged on the same images.
        let mut drawn = rng(config.seed, "compare images", number);
        let mut own = SamplerRng(rng(config.seed, name.name(), number));
        let mut step = Vec::with_capacity(search.policies_per_step);
        let mut batches = Vec::with_capacity(search.policies_per_step);
        for policy in sampler.propose(search.policies_per_step, &mut own)? {
            order.sort_unstable();
            order.shuffle(&mut drawn);
            let batch = &order[..config.train.batch.min(order.len())];
            let accuracy = judge(network, &policy, images, batch, Stats::Batch)?.accuracy();
            step.push(accuracy - price(config, &policy)?);
            batches.push(batch.to_vec());
        }
        rewards.push(step.iter().sum::<f64>() / step.len().max(1) as f64);
        sampler.study(&Lesson { network, images, batches: &batches })?;
        sampler.learn(&step);
        seconds.push(started.elapsed().as_secs_f64());
    }
    let mut own = SamplerRng(rng(config.seed, name.name(), search.steps));
    let candidates = sampler.propose(search.samples, &mut own)?;
    let (mut scores, mut best) = (Scores::default(), Best::new(config));
    let (mut sum, mut most) = (0.0, f64::NEG_INFINITY);
    for policy in &candidates {
        let score = scores.of(policy, || judge_sample(config, network, policy, images))?;
        let reward = best.offer(policy, score)?;
        sum += reward;
        most = most.max(reward);
    }
    let policy = best.choice().map_or_else(|| config.silent(), |choice| choice.policy);
    let mean = sum / candidates.len().max(1) as f64;
    Ok(Trial { sampler: name, seed: config.seed, rewards, seconds, mean, best: most, policy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use snn_schemas::{Decision, Step};

    /// Mean reward of the last policies on a problem whose best policy is known: each destination
    /// that is right pays, and so does each level.
    fn play(name: SamplerName) -> f64 {
        let mut config = Config::digits();
        config.search.lr = 0.005;
        config.search.entropy = 0.02;
        let right = [(7, 4), (12, 8), (23, 0)];
        let reward = |policy: &Policy| {
            let hit = |(step, (id, level)): (&Step, (usize, usize))| {
                let wanted = Decision::from_id(id, 4).unwrap();
                let pairs = step.decision.send_to().iter().zip(wanted.send_to());
                pairs.filter(|(a, b)| a == b).count() as f64 + f64::from(step.level == level)
            };
            policy.steps.iter().zip(right).map(hit).sum::<f64>() / 15.0
        };
        let mut sampler = name.build(&config);
        let mut mean = 0.0;
        for number in 0..300 {
            let mut own = SamplerRng(rng(1, name.name(), number));
            let rewards: Vec<f64> =
                sampler.propose(8, &mut own).unwrap().iter().map(reward).collect();
            mean = rewards.iter().sum::<f64>() / 8.0;
            sampler.learn(&rewards);
        }
        mean
    }

    #[test]
    fn those_that_learn_do_better_than_chance() {
        let random = play(SamplerName::Random);
        assert!(random < 0.5, "{random}");
        for name in [SamplerName::Controller, SamplerName::Evolution] {
            let learned = play(name);
            assert!(learned > 0.7, "{}: {learned}", name.name());
        }
    }
}
