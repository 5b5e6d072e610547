//! The controller: an LSTM that writes policies (sections 3.2 and 4.3).
//!
//! Gives, for n policies at once, the choices it samples, and the logarithm of their probability and
//! their entropy as tensors that gradients flow through. A decision is written destination by
//! destination, those already taken being masked, so that every permutation of any number of groups
//! can be had and nothing else; where levels are searched one more choice follows. Each choice is one
//! step of the LSTM and its next input. The product of a decision's choices is a distribution over
//! all G! decisions, as the paper's softmax is, with G² outputs instead of G! (8! is 40,320).

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::{log_softmax, sigmoid, tanh};
use burn::tensor::{Bytes, Device, Int, Tensor, TensorData};
use rand::RngExt;
use snn_schemas::{Decision, Policy, Step};

use crate::config::{Config, SearchConfig};
use crate::error::TrainError;
use crate::seed::{Rng, rng};

/// Added to the logit of a destination that is taken: its probability becomes exactly zero in f32.
const TAKEN: f32 = -1e4;
/// Fresh weights lie between −this and this (ENAS): all choices start nearly equally likely.
const START: f32 = 0.1;

/// An LSTM that samples policies.
#[derive(Module, Debug)]
pub struct Controller {
    embedding: Embedding,
    gates: Linear,
    head: Linear,
    cells: usize,
    groups: usize,
    levels: usize,
    steps: usize,
}

/// What [`Controller::sample`] gives for n policies.
pub struct Rollout {
    /// The policies' steps.
    pub steps: Vec<Vec<Step>>,
    /// Logarithm of each policy's probability, `[n]`.
    pub log_probability: Tensor<1>,
    /// Each policy's entropy, summed over its choices, `[n]`.
    pub entropy: Tensor<1>,
}

/// Hidden state and cell state, `[n, cells]` each.
struct State {
    hidden: Tensor<2>,
    cell: Tensor<2>,
}

/// One kind of choice: which outputs it is made of.
#[derive(Clone, Copy)]
struct Choice {
    first: usize,
    options: usize,
    destination: bool,
}

impl Controller {
    /// A fresh controller for the policies of `config`, drawn from its seed.
    pub fn new(config: &Config, device: &Device) -> Controller {
        let groups = config.net.groups;
        let levels = if config.exchange.search_levels { config.exchange.levels.count } else { 1 };
        let cells = config.search.cells;
        let outputs = groups * (groups - 1) + levels;
        let mut rng = rng(config.seed, "controller", 0);
        let mut matrix = |rows: usize, columns: usize| {
            let draw = (0..rows * columns).map(|_| rng.random_range(-START..START));
            TensorData::new(draw.collect::<Vec<f32>>(), [rows, columns])
        };
        let zeros =
            |count: usize| Param::from_data(TensorData::new(vec![0.0_f32; count], [count]), device);
        Controller {
            // One row an output, and one for "nothing yet".
            embedding: Embedding { weight: Param::from_data(matrix(outputs + 1, cells), device) },
            gates: Linear {
                weight: Param::from_data(matrix(2 * cells, 4 * cells), device),
                bias: Some(zeros(4 * cells)),
            },
            head: Linear {
                weight: Param::from_data(matrix(cells, outputs), device),
                bias: Some(zeros(outputs)),
            },
            cells,
            groups,
            levels,
            steps: config.steps(),
        }
    }

    /// Samples `count` policies.
    ///
    /// # Errors
    /// The probabilities cannot be read back from the device.
    pub fn sample(&self, count: usize, rng: &mut impl rand::Rng) -> Result<Rollout, TrainError> {
        let device = self.head.weight.device();
        let zeros = || Tensor::<2>::zeros([count, self.cells], &device);
        let mut state = State { hidden: zeros(), cell: zeros() };
        let mut log_probability = Tensor::<1>::zeros([count], &device);
        let mut entropy = Tensor::<1>::zeros([count], &device);
        let start = self.groups * (self.groups - 1) + self.levels;
        let mut last = vec![start; count];
        let mut steps = vec![Vec::with_capacity(self.steps); count];
        for _ in 0..self.steps {
            let mut chosen = vec![Vec::with_capacity(self.groups); count];
            for choice in self.choices() {
                state = self.advance(state, &last);
                let logits = self.logits(&state, choice, &chosen); // [count, options]
                let log_p = log_softmax(logits, 1);
                let picks = draw(&log_p, rng)?;
                let picked = Tensor::<2, Int>::from_data(
                    TensorData::new(picks.iter().map(|&p| p as i64).collect(), [count, 1]),
                    &device,
                );
                let terms = log_p.clone().exp() * log_p.clone();
                entropy = entropy - terms.sum_dim(1).reshape([count]);
                log_probability = log_probability + log_p.gather(1, picked).reshape([count]);
                for (policy, &pick) in picks.iter().enumerate() {
                    chosen[policy].push(pick);
                    last[policy] = choice.first + pick;
                }
            }
            for (policy, chosen) in steps.iter_mut().zip(&chosen) {
                policy.push(self.step(chosen));
            }
        }
        Ok(Rollout { steps, log_probability, entropy })
    }

    /// The choices of one step: a destination for every group but the last, then a level.
    fn choices(&self) -> impl Iterator<Item = Choice> + use<> {
        let (groups, levels) = (self.groups, self.levels);
        let destinations = (0..groups - 1).map(move |group| Choice {
            first: group * groups,
            options: groups,
            destination: true,
        });
        let level = Choice { first: groups * (groups - 1), options: levels, destination: false };
        destinations.chain((levels > 1).then_some(level))
    }

    /// One step of the LSTM.
    fn advance(&self, state: State, last: &[usize]) -> State {
        let indices: Vec<i64> = last.iter().map(|&token| token as i64).collect();
        let indices = TensorData::new(indices, [last.len()]);
        let indices = Tensor::<1, Int>::from_data(indices, &state.hidden.device());
        let input = self.embedding.weight.val().select(0, indices); // [n, cells]
        let gates = self.gates.forward(Tensor::cat(vec![input, state.hidden], 1)); // [n, 4·cells]
        let gate = |index: usize| gates.clone().narrow(1, index * self.cells, self.cells);
        let kept = sigmoid(gate(0)) * state.cell;
        let cell = kept + sigmoid(gate(1)) * tanh(gate(2));
        let hidden = sigmoid(gate(3)) * tanh(cell.clone());
        State { hidden, cell }
    }

    /// The logits of one choice, `[n, options]`, with taken destinations masked.
    fn logits(&self, state: &State, choice: Choice, chosen: &[Vec<usize>]) -> Tensor<2> {
        let all = self.head.forward(state.hidden.clone()); // [n, outputs]
        let logits = all.narrow(1, choice.first, choice.options);
        if !choice.destination {
            return logits;
        }
        let mut mask = vec![0.0_f32; chosen.len() * choice.options];
        for (row, chosen) in mask.chunks_exact_mut(choice.options).zip(chosen) {
            chosen.iter().for_each(|&destination| row[destination] = TAKEN);
        }
        let mask = TensorData::new(mask, [chosen.len(), choice.options]);
        logits + Tensor::from_data(mask, &state.hidden.device())
    }

    /// Choices become a step: the last group gets the destination that is left.
    fn step(&self, chosen: &[usize]) -> Step {
        let mut send_to: Vec<usize> = chosen[..self.groups - 1].to_vec();
        send_to.extend((0..self.groups).find(|group| !chosen[..self.groups - 1].contains(group)));
        // Masked choices are all different, so the fallback is never taken.
        let silent = || Decision::silent(self.groups);
        let decision = Decision::new(send_to).unwrap_or_else(|_| silent());
        let level = chosen.get(self.groups - 1).copied();
        Step::new(decision, level.unwrap_or(usize::MAX))
    }
}

/// Draws one option a row from log-probabilities `[n, options]`.
fn draw(log_p: &Tensor<2>, rng: &mut impl rand::Rng) -> Result<Vec<usize>, TrainError> {
    let [_, options] = log_p.dims();
    let values: Vec<f32> =
        log_p.try_to_vec_as().map_err(|error| TrainError::Tensor(error.to_string()))?;
    let pick = |row: &[f32]| {
        let mut rest: f32 = rng.random_range(0.0..1.0);
        let possible = row.iter().map(|log_p| log_p.exp()).enumerate().filter(|(_, p)| *p > 0.0);
        let mut last = 0;
        for (option, p) in possible {
            last = option;
            rest -= p;
            if rest < 0.0 {
                break;
            }
        }
        last
    };
    Ok(values.chunks_exact(options).map(pick).collect())
}

/// The policies of `config` with the given steps; steps without a level send everything.
pub(crate) fn policies(config: &Config, steps: Vec<Vec<Step>>) -> Vec<Policy> {
    let full = config.exchange.levels.full();
    let silent = config.silent();
    let level = |step: Step| Step { level: step.level.min(full), ..step };
    let fill = |steps: Vec<Step>| steps.into_iter().map(level).collect();
    steps.into_iter().map(|steps| Policy { steps: fill(steps), ..silent.clone() }).collect()
}

/// Draws policies with equal probability: the random sampler that the controller is compared with.
pub(crate) fn random_policies(config: &Config, count: usize, rng: &mut Rng) -> Vec<Policy> {
    let groups = config.net.groups;
    let levels = config.exchange.levels;
    let mut step = || {
        let id = rng.random_range(0..Decision::count(groups));
        let decision = Decision::from_id(id, groups).unwrap_or_else(|| Decision::silent(groups));
        let searched = config.exchange.search_levels;
        let level = if searched { rng.random_range(0..levels.count) } else { levels.full() };
        Step::new(decision, level)
    };
    let draw = (0..count).map(|_| (0..config.steps()).map(|_| step()).collect()).collect();
    policies(config, draw)
}

/// The controller in training: REINFORCE with a moving baseline and an entropy bonus.
#[derive(Clone)]
pub struct Reinforce {
    /// The controller as it is now.
    pub controller: Controller,
    optimiser: ModuleOptimizer,
    baseline: Option<f64>,
    settings: SearchConfig,
}

impl Reinforce {
    /// Goes on training `controller`, with a fresh optimiser and baseline.
    pub fn new(controller: Controller, settings: &SearchConfig) -> Reinforce {
        let optimiser = AdamConfig::new().init();
        Reinforce { controller, optimiser, baseline: None, settings: settings.clone() }
    }

    /// The moving baseline and the optimiser's state, for a checkpoint.
    pub(crate) fn memory(&self) -> Result<(Option<f64>, Vec<u8>), TrainError> {
        let bytes =
            self.optimiser.into_bytes().map_err(|error| TrainError::Tensor(error.to_string()))?;
        Ok((self.baseline, bytes.to_vec()))
    }

    /// Puts back what [`Reinforce::memory`] gave, and with `weights` the controller's.
    pub(crate) fn remember(
        self,
        baseline: Option<f64>,
        optimiser: Vec<u8>,
        weights: impl FnOnce(Controller) -> Result<Controller, String>,
    ) -> Result<Reinforce, String> {
        let optimiser = self.optimiser.from_bytes(Bytes::from_bytes_vec(optimiser));
        Ok(Reinforce {
            controller: weights(self.controller)?,
            optimiser: optimiser.map_err(|error| error.to_string())?,
            baseline,
            settings: self.settings,
        })
    }

    /// One step: raises the probability of policies whose reward is above the moving baseline.
    ///
    /// Maximises (1/n) Σ (Rᵢ − b) log π(mᵢ) + entropy · H, b being the baseline before this step
    /// (the first step's rewards are their own baseline).
    pub fn learn(mut self, rollout: Rollout, rewards: &[f64]) -> Reinforce {
        let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
        let before = self.baseline.unwrap_or(mean);
        let decay = self.settings.baseline_decay;
        self.baseline = Some(decay * before + (1.0 - decay) * mean);
        let device = rollout.log_probability.device();
        let above: Vec<f32> = rewards.iter().map(|reward| (reward - before) as f32).collect();
        let above = Tensor::<1>::from_data(TensorData::new(above, [rewards.len()]), &device);
        let gain = (above * rollout.log_probability).mean();
        let objective = gain + rollout.entropy.mean() * self.settings.entropy;
        let grads = GradientsParams::from_grads(objective.neg().backward(), &self.controller);
        self.controller = self.optimiser.step(self.settings.lr, self.controller, grads);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn config(groups: usize, search_levels: bool) -> Config {
        let mut config = Config::digits();
        config.net.groups = groups;
        config.net.cardinality = groups;
        config.exchange.search_levels = search_levels;
        config
    }

    fn device() -> Device {
        Device::flex().autodiff()
    }

    #[test]
    fn every_decision_is_sampled_and_probabilities_sum_to_one() {
        let config = config(3, false);
        let controller = Controller::new(&config, &device()).valid();
        let rollout = controller.sample(4000, &mut rng(1, "test", 0)).unwrap();
        let log_p: Vec<f32> = rollout.log_probability.try_into_vec_as().unwrap();
        let mut seen = BTreeMap::new();
        for (steps, log_p) in rollout.steps.iter().zip(log_p) {
            let ids: Vec<usize> = steps.iter().map(|step| step.decision.id()).collect();
            seen.insert(ids, f64::from(log_p).exp());
        }
        assert_eq!(seen.len(), 216, "6 decisions in 3 steps");
        assert!((seen.values().sum::<f64>() - 1.0).abs() < 1e-3);
    }

    #[test]
    fn entropy_of_a_fresh_controller_is_that_of_equal_chances() {
        let config = config(4, true);
        let controller = Controller::new(&config, &device()).valid();
        let rollout = controller.sample(50, &mut rng(1, "test", 0)).unwrap();
        let entropy: f32 = rollout.entropy.mean().try_into_scalar().unwrap();
        assert!((entropy - 3.0 * (24.0_f32 * 9.0).ln()).abs() < 0.05, "{entropy}");
    }

    #[test]
    fn eight_groups_are_sampled_too() {
        let config = config(8, true);
        let controller = Controller::new(&config, &device());
        let rollout = controller.sample(3, &mut rng(1, "test", 0)).unwrap();
        for policy in policies(&config, rollout.steps) {
            assert_eq!(Policy::from_json(policy.to_json().as_bytes()).unwrap(), policy);
        }
    }

    #[test]
    fn unsearched_levels_send_everything() {
        let config = config(4, false);
        let controller = Controller::new(&config, &device());
        let rollout = controller.sample(2, &mut rng(1, "test", 0)).unwrap();
        let sampled = policies(&config, rollout.steps);
        assert!(sampled.iter().all(|policy| policy.steps.iter().all(|step| step.level == 8)));
        let random = random_policies(&config, 2, &mut rng(1, "test", 0));
        assert!(random.iter().all(|policy| policy.steps.iter().all(|step| step.level == 8)));
    }

    #[test]
    fn reinforce_finds_the_policy_that_pays() {
        let mut config = config(4, true);
        config.search = SearchConfig { lr: 0.005, entropy: 0.02, ..config.search };
        let best = [(7, 4), (12, 8), (23, 0)];
        let reward = |steps: &Vec<Step>| {
            let hit = |(step, (id, level)): (&Step, (usize, usize))| {
                let right = Decision::from_id(id, 4).unwrap();
                let pairs = step.decision.send_to().iter().zip(right.send_to());
                let destinations = pairs.filter(|(found, wanted)| found == wanted).count();
                destinations as f64 + f64::from(step.level == level)
            };
            steps.iter().zip(best).map(hit).sum::<f64>() / 15.0
        };
        let mut rng = rng(1, "test", 0);
        let mut reinforce = Reinforce::new(Controller::new(&config, &device()), &config.search);
        for _ in 0..600 {
            let rollout = reinforce.controller.sample(8, &mut rng).unwrap();
            let rewards: Vec<f64> = rollout.steps.iter().map(reward).collect();
            reinforce = reinforce.learn(rollout, &rewards);
        }
        let found = reinforce.controller.valid().sample(50, &mut rng).unwrap();
        let right = found.steps.iter().filter(|steps| reward(steps) == 1.0).count();
        assert!(right >= 25, "{right} of 50");
    }
}
