//! A sampler that gradients flow through: Gumbel-Sinkhorn over permutations, a relaxed choice of levels.
//!
//! Has for each step a logit for each pair of groups and for each level. A proposal adds Gumbel noise
//! to them and takes the best assignment and the best level, so that what is judged is a policy like any
//! other. In the backward pass the assignment stands for the doubly stochastic matrix that Sinkhorn's
//! normalisation makes of the same numbers, and the level for their softmax (straight through; Mena et
//! al., "Learning latent permutations with Gumbel-Sinkhorn networks", 2018). The gradient is that
//! of the network itself on the mini-batch that the policy was judged on: of the mean probability of the
//! right class, which is accuracy made smooth, less what `lambda_wire` takes. `lambda_latency` has no
//! gradient here and counts where the best of the sampled policies is chosen, not before.

use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor, TensorData};
use rand::RngExt;
use snn_schemas::{Decision, Policy, Step};

use crate::compare::{Lesson, Sampler, SamplerRng};
use crate::config::Config;
use crate::controller::policies;
use crate::error::TrainError;
use crate::exchange::Relaxed;
use crate::judge::host;
use crate::net::Stats;
use crate::seed::Rng;
use crate::wire;

/// Rows and columns are normalised in turn so often: rows then sum to one within a few thousandths.
const ITERATIONS: usize = 20;
/// What logits and noise are divided by before they are normalised. At 1 most of what stands for an
/// assignment lies on it, and the rest still gets a gradient.
const TEMPERATURE: f64 = 1.0;
/// Learning rate of the logits (Adam). They stand alone: the controller's many weights, which move
/// together, get there with a tenth of it.
const RATE: f64 = 0.05;

/// The logits of all steps.
#[derive(Module, Debug)]
struct Logits {
    /// `[steps, G, G]`: for group i to send to group j.
    routes: Param<Tensor<3>>,
    /// `[steps, levels]`.
    levels: Param<Tensor<2>>,
}

/// A policy that was drawn, and the noise that drew it.
struct Draw {
    policy: Policy,
    /// One for each of [`Logits::routes`].
    routes: Vec<f32>,
    /// One for each of [`Logits::levels`].
    levels: Vec<f32>,
}

/// The distribution over policies, and its optimiser.
struct Sinkhorn<'a> {
    config: &'a Config,
    logits: Logits,
    optimiser: ModuleOptimizer,
}

impl<'a> Sinkhorn<'a> {
    /// All assignments and all levels equally likely.
    fn new(config: &'a Config) -> Sinkhorn<'a> {
        let device = host().autodiff();
        let (steps, groups) = (config.steps(), config.net.groups);
        let levels = config.exchange.levels.count;
        let zeros = |shape: &[usize]| {
            TensorData::new(vec![0.0_f32; shape.iter().product()], shape.to_vec())
        };
        let logits = Logits {
            routes: Param::from_data(zeros(&[steps, groups, groups]), &device),
            levels: Param::from_data(zeros(&[steps, levels]), &device),
        };
        Sinkhorn { config, logits, optimiser: AdamConfig::new().init() }
    }

    fn draw(&self, count: usize, rng: &mut Rng) -> Result<Vec<Draw>, TrainError> {
        let routes = numbers(self.logits.routes.val())?;
        let levels = numbers(self.logits.levels.val())?;
        Ok((0..count).map(|_| self.draw_one(&routes, &levels, rng)).collect())
    }

    fn draw_one(&self, routes: &[f32], levels: &[f32], rng: &mut Rng) -> Draw {
        let groups = self.config.net.groups;
        let count = self.config.exchange.levels.count;
        let mut gumbel = |logits: &[f32]| -> Vec<f32> {
            let mut noise = || -(-rng.random_range(f32::MIN_POSITIVE..1.0).ln()).ln();
            logits.iter().map(|_| noise()).collect()
        };
        let noise = (gumbel(routes), gumbel(levels));
        let disturbed = |logits: &[f32], noise: &[f32]| -> Vec<f32> {
            logits.iter().zip(noise).map(|(logit, noise)| logit + noise).collect()
        };
        let scores = disturbed(routes, &noise.0);
        let chances = disturbed(levels, &noise.1);
        let steps = scores.chunks(groups * groups).zip(chances.chunks(count));
        let step = |(scores, chances): (&[f32], &[f32])| {
            let decision = Decision::new(assignment(scores, groups));
            let level = match self.config.exchange.search_levels {
                true => crate::judge::largest(chances),
                false => usize::MAX,
            };
            // An assignment is a permutation, so the fallback is never taken.
            Step::new(decision.unwrap_or_else(|_| Decision::silent(groups)), level)
        };
        let drawn = policies(self.config, vec![steps.map(step).collect()]);
        let policy = drawn.into_iter().next().unwrap_or_else(|| self.config.silent());
        Draw { policy, routes: noise.0, levels: noise.1 }
    }

    /// The steps of a policy that was drawn: its own numbers, with the gradients of the relaxed ones.
    fn relax(&self, draw: &Draw, device: &Device) -> Vec<Relaxed> {
        let (steps, groups) = (draw.policy.steps.len(), self.config.net.groups);
        let count = self.config.exchange.levels.count;
        let home = self.logits.routes.val().device();
        let noise = TensorData::new(draw.routes.clone(), [steps, groups, groups]);
        let scores = self.logits.routes.val() + Tensor::from_data(noise, &home);
        let routes = sinkhorn(scores, TEMPERATURE).to_device(device); // [steps, G, G]
        let noise = TensorData::new(draw.levels.clone(), [steps, count]);
        let chances = self.logits.levels.val() + Tensor::from_data(noise, &home);
        let levels = softmax(chances / TEMPERATURE, 1).to_device(device); // [steps, levels]
        let relaxed = |(index, step): (usize, &Step)| {
            let soft = routes.clone().narrow(0, index, 1).reshape([groups, groups]);
            let taken: Vec<usize> =
                (0..groups).map(|group| group * groups + step.decision.send_to()[group]).collect();
            let hard = Tensor::from_data(ones(&taken, [groups, groups]), device);
            let level = Tensor::from_data(ones(&[step.level], [count]), device);
            let levels = match self.config.exchange.search_levels {
                true => stand_for(level, levels.clone().narrow(0, index, 1).reshape([count])),
                false => level,
            };
            Relaxed { routes: stand_for(hard, soft), levels }
        };
        draw.policy.steps.iter().enumerate().map(relaxed).collect()
    }

    /// One step down `objective`.
    fn descend(&mut self, objective: Tensor<1>) {
        let grads = GradientsParams::from_grads(objective.backward(), &self.logits);
        self.logits = self.optimiser.step(RATE, self.logits.clone(), grads);
    }
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, TrainError> {
    tensor.try_into_vec_as().map_err(|error| TrainError::Tensor(error.to_string()))
}

/// Zeros, and ones at the places `taken`.
fn ones<const D: usize>(taken: &[usize], shape: [usize; D]) -> TensorData {
    let mut values = vec![0.0_f32; shape.iter().product()];
    taken.iter().for_each(|&place| values[place] = 1.0);
    TensorData::new(values, shape)
}

/// The values of `hard`, the gradients of `soft`.
fn stand_for<const D: usize>(hard: Tensor<D>, soft: Tensor<D>) -> Tensor<D> {
    hard + (soft.clone() - soft.detach())
}

/// Makes matrices of scores `[steps, G, G]` doubly stochastic: columns sum to one, rows nearly.
fn sinkhorn(scores: Tensor<3>, temperature: f64) -> Tensor<3> {
    let normalised = |logs, _| log_softmax(log_softmax(logs, 2), 1);
    (0..ITERATIONS).fold(scores / temperature, normalised).exp()
}

/// The permutation whose scores, `scores[i · groups + p(i)]`, have the largest sum.
///
/// Goes over all sets of destinations that the first groups may have taken: 2^G of them, G at most 8.
fn assignment(scores: &[f32], groups: usize) -> Vec<usize> {
    // For each set the best sum, and the last group's destination in it.
    let mut best = vec![(f32::NEG_INFINITY, 0); 1 << groups];
    best[0].0 = 0.0;
    for set in 1..1_usize << groups {
        let group = set.count_ones() as usize - 1;
        for to in (0..groups).filter(|to| set >> to & 1 == 1) {
            let sum = best[set ^ 1 << to].0 + scores[group * groups + to];
            if sum > best[set].0 {
                best[set] = (sum, to);
            }
        }
    }
    let mut set = (1 << groups) - 1;
    let mut send_to = vec![0; groups];
    for destination in send_to.iter_mut().rev() {
        *destination = best[set].1;
        set ^= 1 << *destination;
    }
    send_to
}

/// The sampler.
pub(crate) struct Differentiable<'a> {
    sinkhorn: Sinkhorn<'a>,
    proposed: Vec<Draw>,
}

impl<'a> Differentiable<'a> {
    /// A fresh one for the policies of `config`.
    pub(crate) fn new(config: &'a Config) -> Differentiable<'a> {
        Differentiable { sinkhorn: Sinkhorn::new(config), proposed: Vec::new() }
    }
}

impl Sampler for Differentiable<'_> {
    fn propose(&mut self, count: usize, rng: &mut SamplerRng) -> Result<Vec<Policy>, TrainError> {
        self.proposed = self.sinkhorn.draw(count, &mut rng.0)?;
        Ok(self.proposed.iter().map(|draw| draw.policy.clone()).collect())
    }

    fn study(&mut self, lesson: &Lesson) -> Result<(), TrainError> {
        let config = self.sinkhorn.config;
        // Gradients flow through the network, not into its weights.
        let network = lesson.network.copy().no_grad();
        let device = network.device();
        let objective = |(draw, batch): (&Draw, &Vec<usize>)| {
            let relaxed = self.sinkhorn.relax(draw, &device);
            let (pixels, labels) = lesson.images.batch(batch, &device);
            let steps = (&draw.policy, &*relaxed);
            let logits = network.forward_relaxed(pixels, steps, Stats::Batch); // [batch, classes]
            let right = softmax(logits, 1).gather(1, labels.unsqueeze_dim(1)).mean(); // [1]
            match config.search.lambda_wire {
                0.0 => right.neg(),
                lambda => wire::relaxed(&config.net, &draw.policy, &relaxed) * lambda - right,
            }
        };
        let objectives = self.proposed.iter().zip(lesson.batches).map(objective);
        let sum = objectives.reduce(|sum, objective| sum + objective);
        if let Some(sum) = sum {
            self.sinkhorn.descend(sum / self.proposed.len() as f64);
        }
        Ok(())
    }

    fn learn(&mut self, _: &[f64]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::SamplerName;
    use crate::controller::random_policies;
    use crate::data::Data;
    use crate::net::Network;
    use crate::seed::rng;
    use crate::wire::Wire;
    use snn_schemas::Dtype;

    fn noise(shape: [usize; 3], scale: f32, seed: u64) -> Tensor<3> {
        let mut rng = rng(seed, "test", 0);
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-scale..scale)).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.try_into_vec_as().unwrap()
    }

    #[test]
    fn rows_and_columns_sum_to_one() {
        for groups in [2, 4, 8] {
            let soft = sinkhorn(noise([3, groups, groups], 3.0, 1), TEMPERATURE);
            assert!(values(soft.clone()).iter().all(|&value| value > 0.0));
            for sum in values(soft.clone().sum_dim(1)) {
                assert!((sum - 1.0).abs() < 1e-5, "column: {sum}");
            }
            for sum in values(soft.sum_dim(2)) {
                assert!((sum - 1.0).abs() < 5e-3, "row: {sum}");
            }
        }
    }

    #[test]
    fn an_assignment_is_the_best_of_all_permutations() {
        for groups in 1..=5 {
            let scores = values(noise([20, groups, groups], 1.0, 2));
            for scores in scores.chunks(groups * groups) {
                let sum = |send_to: &[usize]| -> f32 {
                    send_to.iter().enumerate().map(|(i, to)| scores[i * groups + to]).sum()
                };
                let all = (0..Decision::count(groups))
                    .map(|id| sum(Decision::from_id(id, groups).unwrap().send_to()));
                let best = all.fold(f32::NEG_INFINITY, f32::max);
                assert!((sum(&assignment(scores, groups)) - best).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_cold_matrix_is_the_assignment() {
        let scores = noise([8, 4, 4], 3.0, 3);
        let distance = |temperature: f64| {
            let soft = values(sinkhorn(scores.clone(), temperature));
            let numbers = values(scores.clone());
            let each = soft.chunks(16).zip(numbers.chunks(16)).map(|(soft, scores)| {
                let send_to = assignment(scores, 4);
                let on = (0..4).map(|i| soft[i * 4 + send_to[i]]).sum::<f32>();
                4.0 - on
            });
            each.sum::<f32>() / 8.0
        };
        let (warm, mild, cold) = (distance(5.0), distance(1.0), distance(0.02));
        // Of four groups; twenty iterations do not quite get there.
        assert!(warm > mild && mild > cold && cold < 0.5, "{warm} {mild} {cold}");
    }

    /// The objective counts what differs from a known policy; its gradient is that of a loss.
    #[test]
    fn the_policy_that_pays_is_found() {
        let config = Config::digits();
        let right = [(7, 4), (12, 8), (23, 0)];
        let mut sinkhorn = Sinkhorn::new(&config);
        let mut rng = rng(1, "test", 0);
        let is_right = |step: &Step, (id, level)| step.decision.id() == id && step.level == level;
        let device = host().autodiff();
        for _ in 0..200 {
            let draw = sinkhorn.draw(1, &mut rng).unwrap().remove(0);
            let relaxed = sinkhorn.relax(&draw, &device);
            let hits = relaxed.into_iter().zip(right).map(|(step, (id, level))| {
                let wanted = Decision::from_id(id, 4).unwrap();
                let pairs: Vec<usize> = (0..4).map(|i| i * 4 + wanted.send_to()[i]).collect();
                let routes = Tensor::from_data(ones(&pairs, [4, 4]), &device) * step.routes;
                let levels = Tensor::from_data(ones(&[level], [9]), &device) * step.levels;
                routes.sum() + levels.sum()
            });
            sinkhorn.descend(hits.reduce(|sum, hits| sum + hits).unwrap().neg());
        }
        let found = sinkhorn.draw(50, &mut rng).unwrap();
        let all = |draw: &&Draw| {
            draw.policy.steps.iter().zip(right).all(|(step, right)| is_right(step, right))
        };
        let count = found.iter().filter(all).count();
        assert!(count >= 40, "{count} of 50");
    }

    /// A draw has the values of its policy, in the network and on the wire.
    #[test]
    fn a_draw_is_worth_what_its_policy_is() {
        for (staleness, dtype) in
            [(1, Dtype::F32), (2, Dtype::F32), (2, Dtype::F16), (2, Dtype::I8)]
        {
            let mut config = Config::digits();
            (config.exchange.staleness, config.exchange.dtype) = (staleness, dtype);
            config.exchange.levels.min_percent = 0.0;
            let data = Data::load(&config, None).unwrap();
            let device = Device::flex().autodiff();
            let network = Network::new(&config.net, 1, &device);
            let sinkhorn = Sinkhorn::new(&config);
            for draw in sinkhorn.draw(20, &mut rng(1, "test", 0)).unwrap() {
                let relaxed = sinkhorn.relax(&draw, &device);
                let of_wire = values(wire::relaxed(&config.net, &draw.policy, &relaxed));
                let expected = Wire::of(&config.net, &draw.policy).fraction();
                assert!((f64::from(of_wire[0]) - expected).abs() < 1e-6, "{of_wire:?} {expected}");
                let (pixels, _) = data.test.batch(&[0, 1, 2, 3], &device);
                let steps = (&draw.policy, &*relaxed);
                let found = network.forward_relaxed(pixels.clone(), steps, Stats::Batch);
                let wanted = network.forward_with(pixels, &draw.policy, Stats::Batch);
                for (found, wanted) in values(found).iter().zip(values(wanted)) {
                    assert!((found - wanted).abs() < 1e-4, "{dtype}: {found} {wanted}");
                }
            }
        }
    }

    /// What flows into routes and levels is what the logits change by, by differences.
    #[test]
    fn gradients_are_those_of_the_network() {
        // Few units of the network change sides, and of many images no single one of them matters.
        const STEP: f32 = 3e-3;
        let mut config = Config::digits();
        // Gradients pass the rounding of f16 as if it were not there; differences do not.
        config.exchange.dtype = Dtype::F32;
        let data = Data::load(&config, None).unwrap();
        let device = Device::flex().autodiff();
        let network = Network::new(&config.net, 1, &device).no_grad();
        let policy = random_policies(&config, 1, &mut rng(1, "test", 0)).remove(0);
        let soft: Vec<f32> = values(sinkhorn(noise([3, 4, 4], 1.0, 4), 1.0));
        let levels: Vec<f32> = values(softmax(noise([3, 1, 9], 1.0, 5), 2));
        let (pixels, _) = data.test.batch(&(0..256).collect::<Vec<_>>(), &device);
        let steps = |soft: &[f32], levels: &[f32]| -> Vec<Relaxed> {
            let step = |(routes, levels): (&[f32], &[f32])| {
                let routes = TensorData::new(routes.to_vec(), [4, 4]);
                let levels = TensorData::new(levels.to_vec(), [9]);
                Relaxed {
                    routes: Tensor::from_data(routes, &device).require_grad(),
                    levels: Tensor::from_data(levels, &device).require_grad(),
                }
            };
            soft.chunks(16).zip(levels.chunks(9)).map(step).collect()
        };
        let loss = |relaxed: &[Relaxed]| {
            let steps = (&policy, relaxed);
            let logits = network.forward_relaxed(pixels.clone(), steps, Stats::Batch);
            let weights: Vec<f32> =
                (0..2560).map(|at| ((at * 37 % 11) as f32 / 11.0 - 0.5) / 8.0).collect();
            (logits * Tensor::from_data(TensorData::new(weights, [256, 10]), &device)).sum()
        };
        let relaxed = steps(&soft, &levels);
        let grads = loss(&relaxed).backward();
        let by_difference = |soft: [Vec<f32>; 2], levels: [Vec<f32>; 2], twice: f32| {
            let [up, down] = [0, 1].map(|at| values(loss(&steps(&soft[at], &levels[at])))[0]);
            (up - down) / twice
        };
        let near = |found: f32, wanted: f32, of: &str| {
            let apart = (found - wanted).abs();
            assert!(apart < 0.02 + 0.1 * wanted.abs(), "{of}: {found} {wanted}");
        };
        let moved = |values: &[f32], at: usize| {
            [STEP, -STEP].map(|by| {
                let mut values = values.to_vec();
                values[at] += by;
                values
            })
        };
        for (index, step) in relaxed.iter().enumerate() {
            let routes = values(step.routes.grad(&grads).unwrap());
            let of_levels = values(step.levels.grad(&grads).unwrap());
            for at in [1, 6, 8, 15] {
                let unmoved = [levels.clone(), levels.clone()];
                near(
                    routes[at],
                    by_difference(moved(&soft, index * 16 + at), unmoved, 2.0 * STEP),
                    "route",
                );
            }
            for at in [0, 4, 8] {
                let unmoved = [soft.clone(), soft.clone()];
                let wanted = by_difference(unmoved, moved(&levels, index * 9 + at), 2.0 * STEP);
                near(of_levels[at], wanted, "level");
            }
        }
    }

    /// A network that has learned nothing: only the price has a gradient worth the name.
    #[test]
    fn a_price_on_bytes_is_learned_through_the_network() {
        let mut config = Config::digits();
        config.search.lambda_wire = 100.0;
        let data = Data::load(&config, None).unwrap();
        let network = Network::new(&config.net, 1, &Device::flex());
        let mut sampler = SamplerName::Sinkhorn.build(&config);
        let mut sent = Vec::new();
        for number in 0..150 {
            let mut own = SamplerRng(rng(1, "test", number));
            let policies = sampler.propose(2, &mut own).unwrap();
            let fraction = |policy: &Policy| Wire::of(&config.net, policy).fraction();
            sent.push(policies.iter().map(fraction).sum::<f64>());
            let batches = vec![(0..16).collect::<Vec<_>>(); 2];
            let lesson = Lesson { network: &network, images: &data.validation, batches: &batches };
            sampler.study(&lesson).unwrap();
            sampler.learn(&[0.0, 0.0]);
        }
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (early, late) = (mean(&sent[..20]), mean(&sent[130..]));
        assert!(late < 0.2 * early, "{early} {late}");
    }
}
