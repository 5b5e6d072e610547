//! The exchange rule of the paper (equations 2 and 3), evaluated naively on a described net.
//!
//! Takes a [`Net`], a policy and an image; gives the logits. It shares nothing with the compiler but
//! the policy's numbers: no graph, no ONNX, loops in place of a library. Each group is a feature map
//! of its own throughout, blocks are counted from 1 as in the paper.

#![allow(unreachable_pub, reason = "shared by test crates")]

use half::f16;
use snn_schemas::{Dtype, Policy};

use crate::fixtures::{
    Activation, Block, Conv, EPSILON, Net, SLOPE, Shortcut, norm, values, weights,
};

/// A feature map: channels, height, width, numbers.
#[derive(Clone)]
struct Map {
    c: usize,
    h: usize,
    w: usize,
    data: Vec<f32>,
}

impl Map {
    /// The number at a place, 0 outside.
    fn at(&self, c: usize, y: isize, x: isize) -> f32 {
        let inside = (0..self.h as isize).contains(&y) && (0..self.w as isize).contains(&x);
        if inside { self.data[(c * self.h + y as usize) * self.w + x as usize] } else { 0.0 }
    }
}

/// The logits of `net` for one image; `policy` says what the groups exchange.
pub fn logits(net: &Net, policy: Option<&Policy>, image: &[f32]) -> Vec<f32> {
    let [c, h, w] = net.image;
    let input = Map { c, h, w, data: image.to_vec() };
    let stem = Conv { out: net.stem, kernel: 3, stride: 1, inner: 1 };
    let mut stem = activate(conv(&input, "stem", stem, 0, 1), net.activation);
    if net.max_pool {
        stem = max_pool(&stem);
    }
    let mut streams = vec![stem; net.groups];
    // What each group sent at the step in progress.
    let mut sent: Vec<Option<Map>> = vec![None; net.groups];
    for (index, block) in net.blocks.iter().enumerate() {
        let number = index + 1;
        let sums: Vec<Map> = (0..net.groups).map(|g| sum(net, block, &streams[g], g)).collect();
        let step = policy.map(|policy| (policy, index / policy.staleness));
        let step = step.filter(|(policy, step)| *step < policy.steps.len());
        let mut received: Vec<Option<Map>> = vec![None; net.groups];
        if let Some((policy, step)) = step {
            let alpha = policy.staleness;
            if number == step * alpha + 1 {
                for group in 0..net.groups {
                    let features = activate(sums[group].clone(), net.activation);
                    sent[group] = Some(encode(features, policy, step));
                }
            }
            if number == step * alpha + alpha {
                for (from, &to) in policy.steps[step].decision.send_to().iter().enumerate() {
                    if from != to {
                        received[to] = sent[from].take();
                    }
                }
            }
        }
        streams = sums
            .into_iter()
            .zip(received)
            .map(|(mut sum, received)| {
                for (z, d) in sum.data.iter_mut().zip(received.iter().flat_map(|map| &map.data)) {
                    *z += d;
                }
                activate(sum, net.activation)
            })
            .collect();
    }
    classify(net, &streams[..net.classified])
}

/// What arrives of `features`: the first channels only, rounded if the policy says so.
fn encode(mut features: Map, policy: &Policy, step: usize) -> Map {
    // ⌊N p / 100⌋ in whole numbers: the levels of these tests are hundredths of a percent.
    let percent = policy.levels.percent(policy.steps[step].level);
    let keep = features.c * (percent * 100.0).round() as usize / 10_000;
    let plane = features.h * features.w;
    features.data[keep * plane..].fill(0.0);
    // Small planes share the scale of what is sent of the image.
    let run = if plane >= 32 { plane } else { keep * plane };
    for run in features.data[..keep * plane].chunks_mut(run.max(1)) {
        match policy.dtype_of(step) {
            Dtype::F32 => {}
            Dtype::F16 => run.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            Dtype::I8 => quantise(run, [255.0, 127.0]),
            Dtype::I4 => quantise(run, [15.0, 7.0]),
        }
    }
    features
}

/// Rounds to whole multiples of what makes the largest number the largest code, that without a sign
/// or that with one.
fn quantise(numbers: &mut [f32], [unsigned, signed]: [f32; 2]) {
    let most = numbers.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let is_signed = numbers.iter().any(|x| *x < 0.0);
    let largest = if is_signed { signed } else { unsigned };
    for x in numbers.iter_mut().filter(|x| **x != 0.0) {
        *x = (*x * (largest / most)).round_ties_even() * (most / largest);
    }
}

/// The residual sum of one group's block, before its activation.
fn sum(net: &Net, block: &Block, input: &Map, group: usize) -> Map {
    let mut x = input.clone();
    for (index, layer) in block.convs.iter().enumerate() {
        if index > 0 {
            x = activate(x, net.activation);
        }
        let name = format!("{}/conv{}", block.name, index + 1);
        x = conv(&x, &name, *layer, group, net.groups);
    }
    let shortcut = match block.shortcut {
        Shortcut::None => return x,
        Shortcut::Identity => input.clone(),
        Shortcut::Conv(stride) => {
            let layer = Conv { out: x.c, kernel: 1, stride, inner: 1 };
            conv(input, &format!("{}/shortcut", block.name), layer, group, net.groups)
        }
    };
    for (sum, value) in x.data.iter_mut().zip(shortcut.data) {
        *sum += value;
    }
    x
}

/// Group `group`'s share of a convolution of `groups` groups, with its batch norm.
fn conv(input: &Map, name: &str, layer: Conv, group: usize, groups: usize) -> Map {
    let Conv { out, kernel, stride, inner } = layer;
    let width = input.c / inner;
    let fan_in = width * kernel * kernel;
    let all = weights(name, groups * out * fan_in, fan_in);
    let [scale, shift, mean, var] = norm(name, groups * out);
    let pad = kernel / 2;
    let size = |extent: usize| (extent + 2 * pad - kernel) / stride + 1;
    let (h, w) = (size(input.h), size(input.w));
    let mut data = Vec::new();
    for o in 0..out {
        // Place of this channel among those of all groups.
        let channel = group * out + o;
        let first = o / (out / inner) * width;
        for y in 0..h {
            for x in 0..w {
                let mut total = 0.0;
                for c in 0..width {
                    for ky in 0..kernel {
                        for kx in 0..kernel {
                            let weight = all[((channel * width + c) * kernel + ky) * kernel + kx];
                            let (row, column) =
                                ((y * stride + ky) as isize, (x * stride + kx) as isize);
                            total += weight
                                * input.at(first + c, row - pad as isize, column - pad as isize);
                        }
                    }
                }
                let normal = (total - mean[channel]) / (var[channel] + EPSILON).sqrt();
                data.push(normal * scale[channel] + shift[channel]);
            }
        }
    }
    Map { c: out, h, w, data }
}

fn activate(mut map: Map, activation: Activation) -> Map {
    for x in &mut map.data {
        *x = match activation {
            Activation::Relu => x.max(0.0),
            Activation::LeakyRelu => {
                if *x < 0.0 {
                    SLOPE * *x
                } else {
                    *x
                }
            }
            Activation::Relu6 => x.clamp(0.0, 6.0),
            Activation::Sigmoid => 1.0 / (1.0 + (-*x).exp()),
            Activation::HardSigmoid => (*x / 6.0 + 0.5).clamp(0.0, 1.0),
            Activation::HardSwish => *x * (*x / 6.0 + 0.5).clamp(0.0, 1.0),
            Activation::Silu => *x / (1.0 + (-*x).exp()),
        };
    }
    map
}

/// 3×3, stride 2, padded by 1.
fn max_pool(input: &Map) -> Map {
    let (h, w) = (input.h.div_ceil(2), input.w.div_ceil(2));
    let mut data = Vec::new();
    for c in 0..input.c {
        for y in 0..h {
            for x in 0..w {
                let mut most = f32::NEG_INFINITY;
                for row in (2 * y).saturating_sub(1)..(2 * y + 2).min(input.h) {
                    for column in (2 * x).saturating_sub(1)..(2 * x + 2).min(input.w) {
                        most = most.max(input.at(c, row as isize, column as isize));
                    }
                }
                data.push(most);
            }
        }
    }
    Map { c: input.c, h, w, data }
}

/// Means over space, and the linear layer.
fn classify(net: &Net, features: &[Map]) -> Vec<f32> {
    let mean = |channel: &[f32]| channel.iter().sum::<f32>() / channel.len() as f32;
    let channels = features.iter().flat_map(|map| map.data.chunks(map.h * map.w));
    let means: Vec<f32> = channels.map(mean).collect();
    let weight = weights("head/fc", net.classes * means.len(), means.len());
    let bias = values("head/fc.bias", net.classes);
    let row = |class: usize| &weight[class * means.len()..][..means.len()];
    let product = |class| row(class).iter().zip(&means).map(|(w, x)| w * x).sum::<f32>();
    (0..net.classes).map(|class| product(class) + bias[class]).collect()
}
