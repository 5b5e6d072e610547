//! The network against figures of the paper, and against a plain evaluation of the exchange rule.
//!
//! [`Plain`] computes each group by itself with loops over slices of the same weights, and sends
//! between groups what equations 2 and 3 say. It shares nothing with the network but the weights.

use std::collections::HashMap;

use half::f16;
use snn_schemas::{Decision, Dtype, Levels, Step};

use super::*;
use crate::config::{Classifier, Config, Family};

/// Sums made in another order differ by this much.
const TOLERANCE: f32 = 1e-4;
/// And now and then such a difference decides to which f16 a feature is rounded.
const ROUNDED: f32 = 2e-3;

#[test]
fn parameter_counts_are_the_papers() {
    let device = Device::flex();
    let expected = [
        ("resnext-56-8x16d", 4_394_676),
        ("sep-resnext-56-8x16d", 4_539_444),
        ("resnext-56-4x16d", 2_234_548),
        ("sep-resnext-56-4x16d", 2_379_316),
        ("resnext-110-8x16d", 8_808_372),
        ("sep-resnext-110-8x16d", 8_969_268),
        ("resnext-56-64x4d", 5_231_284),
        ("sep-resnext-56-64x4d", 5_376_052),
    ];
    let resnexts = NetConfig::presets().filter(|name| name.contains("resnext"));
    assert_eq!(resnexts.count(), expected.len());
    for (name, expected) in expected {
        let hundred = NetConfig::preset(name, 100).unwrap();
        assert_eq!(Network::new(&hundred, 1, &device).parameters(), expected, "{name}");
        // The last layer of 256 channels has a weight and a bias for each of 90 classes less.
        let ten = NetConfig::preset(name, 10).unwrap();
        assert_eq!(Network::new(&ten, 1, &device).parameters(), expected - 90 * 257, "{name}");
    }
    assert_eq!(NetConfig::preset("resnext-57", 10), None);
}

/// By hand: ResNets with a bottleneck of 16·2^s channels in G groups, trunk 64·2^s a group.
#[test]
fn resnets_have_as_many_parameters_as_by_hand() {
    let resnets: Vec<String> =
        NetConfig::presets().filter(|name| !name.contains("resnext")).collect();
    assert_eq!(resnets.len(), 6);
    for name in resnets {
        let settings = NetConfig::preset(&name, 10).unwrap();
        assert_eq!(settings.check(), Ok(()));
        let groups = if name.starts_with("sep-") { 4 } else { 1 };
        let depth: usize = name.rsplit('-').next().unwrap().parse().unwrap();
        // A convolution without bias, in g groups of equal size, and its norm's gamma and beta.
        let conv = |from: usize, to: usize, taps: usize, g: usize| from * to / g * taps + 2 * to;
        let mut expected = conv(3, 16, 9, 1) + 256 * 10 + 10;
        let mut from = 16 * groups;
        for stage in 0..3 {
            let (inner, to) = (16 << stage, (groups * 64) << stage);
            for block in 0..(depth - 2) / 9 {
                expected += conv(from, inner, 1, groups) + conv(inner, inner, 9, groups);
                expected += conv(inner, to, 1, groups);
                expected += if block == 0 { conv(from, to, 1, groups) } else { 0 };
                from = to;
            }
        }
        assert_eq!(Network::new(&settings, 1, &Device::flex()).parameters(), expected, "{name}");
        // He et al. give 1.7 million for their ResNet-164.
        assert!(name != "resnet-164" || expected / 10_000 == 170, "{expected}");
    }
}

#[test]
fn weights_depend_on_the_seed_alone() {
    let device = Device::flex();
    let small = Config::digits().net;
    let first = Plain::of(&Network::new(&small, 7, &device), &small);
    let again = Plain::of(&Network::new(&small, 7, &device), &small);
    let other = Plain::of(&Network::new(&small, 8, &device), &small);
    assert_eq!(first.weights, again.weights);
    assert_ne!(first.weights, other.weights);
}

#[test]
fn a_dense_convolution_with_zeros_between_groups_is_a_grouped_one() {
    let device = Device::flex().autodiff();
    for (groups, kernel, stride) in [(4, 3, 2), (2, 3, 1), (4, 1, 1), (8, 1, 2)] {
        let mut rng = rng(9, "dense", groups);
        let mut random = |shape: [usize; 4]| {
            let count = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
            Tensor::<4>::from_data(TensorData::new(values, shape), &device)
        };
        let x = random([2, 8, 6, 7]).require_grad();
        let weight = random([16, 8 / groups, kernel, kernel]).require_grad();
        let gradients = |weight_of: Tensor<4>, groups: usize| {
            let options = ConvOptions::new([stride; 2], [kernel / 2; 2], [1, 1], groups);
            let y = conv2d(x.clone(), weight_of, None, options);
            let [images, channels, height, width] = y.dims();
            let weighing = Tensor::<1, Int>::arange(0..y.shape().num_elements() as i64, &device);
            let weighing = weighing.float().sin().reshape([images, channels, height, width]);
            let grads = (y.clone() * weighing).sum().backward();
            [y, x.grad(&grads).unwrap(), weight.grad(&grads).unwrap()]
                .map(|tensor| tensor.try_into_vec_as::<f32>().unwrap())
        };
        let grouped = gradients(weight.clone(), groups);
        let dense = gradients(dense(weight.clone(), groups), 1);
        for (dense, grouped) in dense.iter().zip(&grouped) {
            assert_eq!(dense.len(), grouped.len());
            let off = dense.iter().zip(grouped).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < TOLERANCE, "{groups} groups, {kernel}x{kernel}, stride {stride}: {off}");
        }
    }
}

#[test]
fn exchange_is_that_of_a_plain_evaluation() {
    let cases = [
        (Family::ResNeXt, 2, 1, 11, Dtype::F32),
        (Family::ResNeXt, 2, 2, 20, Dtype::F16),
        (Family::ResNeXt, 3, 1, 20, Dtype::F16),
        (Family::ResNeXt, 3, 3, 29, Dtype::F32),
        (Family::ResNeXt, 4, 2, 20, Dtype::F16),
        (Family::ResNet, 4, 2, 20, Dtype::F32),
        (Family::ResNeXt, 2, 1, 20, Dtype::I8),
        (Family::ResNeXt, 4, 2, 20, Dtype::I8),
    ];
    let classifiers = [Classifier::First, Classifier::All];
    for ((family, groups, staleness, depth, dtype), classifier) in
        cases.into_iter().flat_map(|case| classifiers.map(|classifier| (case, classifier)))
    {
        let [cardinality, path_width] = match family {
            Family::ResNeXt => [2 * groups, 2],
            Family::ResNet => [1, 4 * groups],
        };
        let settings = NetConfig {
            family,
            depth,
            groups,
            cardinality,
            path_width,
            trunk_width: 4,
            stem_channels: 3,
            input: [2, 6, 6],
            classes: 5,
            classifier,
            pooled_norm: true,
        };
        let network = seasoned(Network::new(&settings, 3, &Device::flex())).folded();
        let policy =
            some_policy(groups, staleness, Policy::steps_for(settings.blocks(), staleness), dtype);
        let mut rng = rng(5, "image", groups);
        let image: Vec<f32> = (0..2 * 36).map(|_| rng.random_range(-1.0..1.0)).collect();
        let pixels =
            Tensor::from_data(TensorData::new(image.clone(), [1, 2, 6, 6]), &Device::flex());
        let logits = network.forward_with(pixels, &policy, Stats::Stored);
        let found: Vec<f32> = logits.try_into_vec_as().unwrap();
        let plain = Plain::of(&network, &settings);
        let expected = plain.logits(&image, &policy);
        let silent = plain.logits(&image, &Policy::silent(groups, staleness, 0));
        let off = largest_difference(&found, &expected);
        let tolerance = match dtype {
            Dtype::F32 => TOLERANCE,
            Dtype::F16 => ROUNDED,
            // A number halfway between two codes may become either.
            Dtype::I8 | Dtype::I4 => 5.0 * ROUNDED,
        };
        assert!(off < tolerance, "G = {groups}, α = {staleness}: off by {off}");
        // A test in which the exchange changed nothing would prove nothing.
        assert!(largest_difference(&silent, &expected) > 1e-2);
    }
}

#[test]
fn a_silent_policy_is_no_policy() {
    let settings = Config::digits().net;
    let network = seasoned(Network::new(&settings, 3, &Device::flex()));
    let images = Tensor::<4>::ones([2, 1, 8, 8], &Device::flex());
    let silent = Policy::silent(4, 2, 3);
    let with: Vec<f32> =
        network.forward_with(images.clone(), &silent, Stats::Stored).try_into_vec_as().unwrap();
    let without: Vec<f32> = network.forward(images).try_into_vec_as().unwrap();
    assert_eq!(with, without);
}

#[test]
fn a_copy_has_statistics_of_its_own() {
    let settings = Config::digits().net;
    let network = Network::new(&settings, 3, &Device::flex());
    let copy = network.inference();
    let before = Plain::of(&network, &settings);
    let images = Tensor::<4>::ones([2, 1, 8, 8], &Device::flex());
    copy.forward_with(images, &Policy::silent(4, 2, 3), Stats::Update(1.0));
    assert_eq!(Plain::of(&network, &settings).weights, before.weights);
    assert_ne!(Plain::of(&copy.inference(), &settings).weights, before.weights);
}

/// Gives the statistics values of their own, so that a mistake in using them shows.
fn seasoned(network: Network) -> Network {
    let images = |number| {
        let [height, width] = [6, 6];
        let channels = network.conv0.conv.weight.dims()[1];
        let mut rng = rng(11, "season", number);
        let count = 8 * channels * height * width;
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_data(TensorData::new(values, [8, channels, height, width]), &Device::flex())
    };
    let silent = Policy::silent(network.groups, 1, 0);
    for number in 0..2 {
        network.forward_with(images(number), &silent, Stats::Update(0.7));
    }
    network.inference()
}

/// Steps that differ in decision and level, one of them partly silent.
fn some_policy(groups: usize, staleness: usize, steps: usize, dtype: Dtype) -> Policy {
    let levels = Levels { count: 3, min_percent: 50.0 };
    let count = Decision::count(groups);
    let step = |index: usize| {
        let decision = Decision::from_id((count - 1 + index * 5) % count, groups);
        Step::new(decision.unwrap(), index % 3)
    };
    let steps = (0..steps).map(step).collect();
    Policy { dtype, levels, steps, ..Policy::silent(groups, staleness, 0) }
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Feature maps of one group.
#[derive(Clone)]
struct Maps {
    values: Vec<f32>,
    channels: usize,
    height: usize,
    width: usize,
}

/// The first `kept` numbers as they arrive.
fn rounded(sent: &Maps, kept: usize, dtype: Dtype) -> Vec<f32> {
    let mut values = sent.values[..kept].to_vec();
    let plane = sent.height * sent.width;
    let largest = match dtype {
        Dtype::F32 => return values,
        Dtype::F16 => return values.iter().map(|&x| f16::from_f32(x).to_f32()).collect(),
        Dtype::I8 => 255.0,
        Dtype::I4 => 15.0,
    };
    for run in values.chunks_mut(if plane >= 32 { plane } else { kept.max(1) }) {
        let most = run.iter().copied().fold(0.0, f32::max);
        for x in run.iter_mut().filter(|x| **x > 0.0) {
            *x = (*x * (largest / most)).round_ties_even() * (most / largest);
        }
    }
    values
}

/// The network's weights by name, and loops over them.
struct Plain {
    weights: HashMap<String, Vec<f32>>,
    settings: NetConfig,
}

impl Plain {
    fn of(network: &Network, settings: &NetConfig) -> Plain {
        let mut plain = Plain { weights: HashMap::new(), settings: settings.clone() };
        let mut names = Names { plain: &mut plain, path: Vec::new() };
        network.visit(&mut names);
        plain
    }

    fn logits(&self, image: &[f32], policy: &Policy) -> Vec<f32> {
        let [channels, height, width] = self.settings.input;
        let image = Maps { values: image.to_vec(), channels, height, width };
        let stem = relu_of(self.conv_norm("conv0", &image, (0, 1), (3, 1, 1)));
        let groups = self.settings.groups;
        let mut x = vec![stem; groups];
        let mut sent: Vec<Maps> = Vec::new();
        for block in 0..self.settings.blocks() {
            let mut z: Vec<Maps> =
                (0..groups).map(|group| self.sum(block, group, &x[group])).collect();
            let step = block / policy.staleness;
            if step < policy.steps.len() {
                if block % policy.staleness == 0 {
                    sent = z.iter().cloned().map(relu_of).collect();
                }
                if block % policy.staleness == policy.staleness - 1 {
                    let step = &policy.steps[step];
                    for (from, &to) in step.decision.send_to().iter().enumerate() {
                        let keep = policy.levels.keep(step.level, sent[from].channels);
                        let kept = keep * sent[from].height * sent[from].width;
                        if from != to {
                            let arrived = rounded(&sent[from], kept, policy.dtype);
                            for (sum, value) in z[to].values.iter_mut().zip(arrived) {
                                *sum += value;
                            }
                        }
                    }
                }
            }
            x = z.into_iter().map(relu_of).collect();
        }
        let plane = x[0].height * x[0].width;
        let read = x.iter().take(self.settings.classified());
        let maps = read.flat_map(|group| group.values.chunks(plane));
        let pooled: Vec<f32> = maps.map(|map| map.iter().sum::<f32>() / plane as f32).collect();
        let weight = &self.weights["classifier.weight"];
        let classes = self.settings.classes;
        let mut logits = self.weights["classifier.bias"].clone();
        for (input, value) in pooled.iter().enumerate() {
            for class in 0..classes {
                logits[class] += value * weight[input * classes + class];
            }
        }
        logits
    }

    /// x + T(x) of one group.
    fn sum(&self, block: usize, group: usize, x: &Maps) -> Maps {
        let groups = self.settings.groups;
        let per_stage = self.settings.blocks_per_stage();
        let stride = if block > 0 && block.is_multiple_of(per_stage) { 2 } else { 1 };
        let name = |part: &str| format!("blocks.{block}.{part}");
        let shortcut = match self.weights.contains_key(&name("shortcut.conv.weight")) {
            true => self.conv_norm(&name("shortcut"), x, (group, groups), (1, stride, 1)),
            false => x.clone(),
        };
        let y = relu_of(self.conv_norm(&name("reduce"), x, (group, groups), (1, 1, 1)));
        let paths = match self.settings.family {
            Family::ResNeXt => self.settings.cardinality / groups,
            Family::ResNet => 1,
        };
        let y = relu_of(self.conv_norm(&name("spatial"), &y, (group, groups), (3, stride, paths)));
        let mut y = self.conv_norm(&name("expand"), &y, (group, groups), (1, 1, 1));
        y.values.iter_mut().zip(&shortcut.values).for_each(|(y, x)| *y += x);
        y
    }

    /// The part of a convolution and its batch norm that belongs to `group` of `groups`: kernel
    /// size, stride and number of paths within the group given.
    fn conv_norm(
        &self,
        name: &str,
        x: &Maps,
        (group, groups): (usize, usize),
        (kernel, stride, paths): (usize, usize, usize),
    ) -> Maps {
        let get = |part: &str| &self.weights[&format!("{name}.{part}")];
        let all = get("norm.gamma").len();
        let outputs = all / groups;
        let inputs = x.channels / paths;
        let around = kernel as isize / 2;
        let [height, width] = [x.height.div_ceil(stride), x.width.div_ceil(stride)];
        let mut values = Vec::new();
        for output in 0..outputs {
            let channel = group * outputs + output;
            let first = output / (outputs / paths) * inputs;
            let scale =
                get("norm.gamma")[channel] / (get("norm.running_var")[channel] + 1e-5).sqrt();
            let shift = get("norm.beta")[channel] - get("norm.running_mean")[channel] * scale;
            for (row, column) in
                (0..height).flat_map(|row| (0..width).map(move |column| (row, column)))
            {
                let mut sum = 0.0;
                for input in 0..inputs {
                    for (down, right) in
                        (0..kernel).flat_map(|down| (0..kernel).map(move |right| (down, right)))
                    {
                        let from_row = (row * stride + down) as isize - around;
                        let from_column = (column * stride + right) as isize - around;
                        let inside = (0..x.height as isize).contains(&from_row)
                            && (0..x.width as isize).contains(&from_column);
                        if inside {
                            let at = ((first + input) * x.height + from_row as usize) * x.width
                                + from_column as usize;
                            let weight =
                                ((channel * inputs + input) * kernel + down) * kernel + right;
                            sum += x.values[at] * get("conv.weight")[weight];
                        }
                    }
                }
                values.push(sum * scale + shift);
            }
        }
        Maps { values, channels: outputs, height, width }
    }
}

fn relu_of(mut maps: Maps) -> Maps {
    maps.values.iter_mut().for_each(|value| *value = value.max(0.0));
    maps
}

/// Collects weights by their place in the network.
struct Names<'a> {
    plain: &'a mut Plain,
    path: Vec<String>,
}

impl ModuleVisitor for Names<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val().try_into_vec_as().unwrap();
        self.plain.weights.insert(self.path.join("."), values);
    }
}
