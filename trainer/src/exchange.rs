//! What groups send one another, simulated inside the one network that is trained.
//!
//! Takes a block's output `[batch, G·c, h, w]` and a step of a policy, and gives what arrives: D of
//! equations 2 and 3, of the same shape. Group i's first `keep` channels, rounded as the wire rounds
//! them, stand at group s(i); everything else is zero, also where a group sends to itself. It is one
//! gather and one product, whatever G is. Gradients pass the rounding as if it were not there.
//! A relaxed step ([`Relaxed`]) is a matrix product instead, and gradients flow into who sends what to whom.

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use snn_schemas::codec::LEAST;
use snn_schemas::{Codec, Dtype, Policy};

use crate::kernels::{self, Routes};

/// What the groups of a network exchange.
#[derive(Clone, Copy)]
pub(crate) struct Exchange<'a> {
    /// The steps, and how features travel.
    pub(crate) policy: &'a Policy,
    /// The same steps as numbers that gradients flow into.
    pub(crate) relaxed: Option<&'a [Relaxed]>,
}

/// A step of a policy as numbers that gradients flow into.
#[derive(Clone, Debug)]
pub(crate) struct Relaxed {
    /// `[G, G]`: how much of group i's features goes to group j. Of a step of a policy 1 for j = s(i), else 0.
    pub(crate) routes: Tensor<2>,
    /// `[levels]`: how much each level is in use. Of a step of a policy 1 for its level, else 0.
    pub(crate) levels: Tensor<1>,
}

impl Exchange<'_> {
    /// `base` plus what step `step` brings to each group of what the groups sent.
    pub(crate) fn arrive(self, base: Tensor<4>, sent: Tensor<4>, step: usize) -> Tensor<4> {
        match self.relaxed {
            Some(relaxed) => base + mixed(sent, self.policy, step, &relaxed[step]),
            None => arrive(base, sent, self.policy, step),
        }
    }
}

/// What a relaxed step brings to each group: the groups' features, rounded, in the mixture that the
/// step says. Nothing comes back to the group that it is from.
fn mixed(sent: Tensor<4>, policy: &Policy, step: usize, relaxed: &Relaxed) -> Tensor<4> {
    let [images, channels, height, width] = sent.dims();
    let (groups, plane) = (policy.groups, height * width);
    let group = channels / groups;
    let levels = policy.levels;
    let keeps = |level: usize| levels.keep(level, group);
    let kept: Vec<f32> = (0..levels.count)
        .flat_map(|level| (0..group).map(move |channel| f32::from(channel < keeps(level))))
        .collect();
    let device = sent.device();
    let kept = Tensor::<2>::from_data(TensorData::new(kept, [levels.count, group]), &device);
    let kept = relaxed.levels.clone().unsqueeze::<2>().matmul(kept); // [1, channels of a group]
    let others = Tensor::<2>::ones([groups, groups], &device) - Tensor::eye(groups, &device);
    let routes = (relaxed.routes.clone() * others).transpose(); // [to, from]
    let features = rounded(sent, policy, step, group).reshape([images, groups, group, plane]);
    let features =
        (features * kept.reshape([1, 1, group, 1])).reshape([images, groups, group * plane]);
    let arrived = routes.unsqueeze::<3>().expand([images, groups, groups]).matmul(features);
    arrived.reshape([images, channels, height, width])
}

/// `base` plus what step `step` of `policy` brings to each group of what the groups sent.
fn arrive(base: Tensor<4>, sent: Tensor<4>, policy: &Policy, step: usize) -> Tensor<4> {
    if kernels::runs_on(&base.device()) {
        let [_, channels, _, _] = base.dims();
        return match Routes::new(policy, step, channels / policy.groups) {
            Some(routes) => kernels::exchange(base, sent, routes),
            None => base,
        };
    }
    match received(sent, policy, step) {
        Some(arrived) => base + arrived,
        None => base,
    }
}

/// What step `step` of `policy` brings to each group, or `None` if no group sends.
///
/// `sent` is the un-exchanged output of the block after which the step is sent.
pub(crate) fn received(sent: Tensor<4>, policy: &Policy, step: usize) -> Option<Tensor<4>> {
    let [_, channels, _, _] = sent.dims();
    let group = channels / policy.groups;
    let (source, arrives) = routes(policy, step, group)?;
    let device = sent.device();
    let source = Tensor::<1, Int>::from_data(TensorData::new(source, [channels]), &device);
    let rounded = rounded(sent, policy, step, group);
    Some(rounded.select(1, source) * mask(arrives, &device)) // [batch, G·c, h, w]
}

/// The features of groups of `group` channels, rounded as the wire rounds them at step `step`.
fn rounded(sent: Tensor<4>, policy: &Policy, step: usize, group: usize) -> Tensor<4> {
    let keep = policy.levels.keep(policy.steps[step].level, group);
    match policy.dtype_of(step) {
        Dtype::F16 => straight_through(sent, |x| x.cast(FloatDType::F16).cast(FloatDType::F32)),
        Dtype::I8 | Dtype::I4 if keep > 0 => {
            let codec = policy.codec_of(step);
            straight_through(sent, |x| quantise(x, codec, group, keep))
        }
        Dtype::F32 | Dtype::I8 | Dtype::I4 => sent,
    }
}

/// For each channel of the result the channel it is taken from, and 1 if it arrives or 0 if not.
fn routes(policy: &Policy, step: usize, channels: usize) -> Option<(Vec<i64>, Vec<f32>)> {
    let step = &policy.steps[step];
    let keep = policy.levels.keep(step.level, channels);
    let mut source: Vec<i64> = (0..(policy.groups * channels) as i64).collect();
    let mut arrives = vec![0.0; policy.groups * channels];
    for (from, to) in step.decision.sends() {
        for channel in 0..channels {
            source[to * channels + channel] = (from * channels + channel) as i64;
        }
        arrives[to * channels..][..keep].fill(1.0);
    }
    arrives.contains(&1.0).then_some((source, arrives))
}

fn mask(arrives: Vec<f32>, device: &Device) -> Tensor<4> {
    let channels = arrives.len();
    Tensor::from_data(TensorData::new(arrives, [1, channels, 1, 1]), device)
}

/// Rounds by `round`; the gradient passes unchanged.
///
/// `x − x` is zero and adding zero changes nothing, so the value is exactly the rounded one. Without
/// the detour autodiff would round the gradient to f16 as well, and lose the small ones, or find that
/// whole numbers have none at all.
fn straight_through(x: Tensor<4>, round: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
    let plain = x.clone().detach();
    let rounded = round(plain.clone());
    match x.is_autodiff() {
        true => rounded + (x - plain),
        false => rounded,
    }
}

/// What arrives of the first `keep` channels of groups of `group` channels: the arithmetic of
/// [`snn_schemas::codec`]. The other channels are not sent, and anything.
fn quantise(x: Tensor<4>, codec: Codec, group: usize, keep: usize) -> Tensor<4> {
    let Some(largest) = codec.largest() else { return x };
    let [images, channels, height, width] = x.dims();
    let plane = height * width;
    let runs = match Codec::run(&[1, keep, height, width]) == plane {
        true => x.clone().reshape([images * channels, plane]),
        false => x.clone().reshape([images * channels / group, group * plane]),
    };
    let [count, run] = runs.dims();
    let sent = runs.clone().narrow(1, 0, run.min(keep * plane));
    let most = sent.abs().max_dim(1).clamp_min(LEAST); // [images · runs, 1]
    let largest = Tensor::<2>::full([count, 1], largest, &x.device());
    let codes = (runs * (largest.clone() / most.clone())).round();
    (codes * (most / largest)).reshape([images, channels, height, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;
    use snn_schemas::{Decision, Levels, Step};

    fn policy(send_to: &[usize], level: usize, dtype: Dtype) -> Policy {
        let decision = Decision::new(send_to.to_vec()).unwrap();
        let steps = vec![Step::new(decision, level)];
        let levels = Levels { count: 3, min_percent: 50.0 };
        Policy { dtype, levels, steps, ..Policy::silent(send_to.len(), 1, 0) }
    }

    fn row(values: &[f32]) -> Tensor<4> {
        let device = Device::flex();
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len(), 1, 1]), &device)
    }

    fn values(tensor: Tensor<4>) -> Vec<f32> {
        tensor.try_into_vec_as().unwrap()
    }

    #[test]
    fn kept_channels_arrive_where_the_decision_says() {
        let sent = row(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let cycle = received(sent.clone(), &policy(&[1, 2, 0], 2, Dtype::F32), 0).unwrap();
        assert_eq!(values(cycle), [5.0, 6.0, 1.0, 2.0, 3.0, 4.0]);
        let half = received(sent.clone(), &policy(&[1, 0, 2], 0, Dtype::F32), 0).unwrap();
        assert_eq!(values(half), [3.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(received(sent, &policy(&[0, 1, 2], 2, Dtype::F32), 0).is_none());
    }

    #[test]
    fn f16_rounds_to_nearest_even_exactly() {
        let tie_down = 1.0 + 2.0_f32.powi(-11);
        let tie_up = 1.0 + 3.0 * 2.0_f32.powi(-11);
        let small = 5.0e-8_f32;
        let sent = [0.1, tie_down, tie_up, small, 1e-9, 1234.567, 65504.0, 0.0];
        let arrived = values(received(row(&sent), &policy(&[1, 0], 2, Dtype::F16), 0).unwrap());
        let swapped = sent[4..].iter().chain(&sent[..4]);
        let expected: Vec<f32> = swapped.map(|&x| f16::from_f32(x).to_f32()).collect();
        assert_eq!(arrived, expected);
        assert_eq!(arrived[5], 1.0);
    }

    #[test]
    fn codes_arrive_as_the_codec_writes_them() {
        // Planes that have a scale each, and planes that share one.
        for (height, width) in [(5, 8), (2, 3)] {
            let (group, plane, images) = (4, height * width, 2);
            let count = images * 2 * group * plane;
            let numbers: Vec<f32> =
                (0..count).map(|i| ((i * 37 % 101) as f32 - 30.0).max(0.0) * 0.173).collect();
            let device = Device::flex();
            let data = TensorData::new(numbers.clone(), [images, 2 * group, height, width]);
            let sent = Tensor::<4>::from_data(data, &device);
            for (dtype, level, keep) in [(Dtype::I8, 2, 4), (Dtype::I4, 1, 3)] {
                let policy = policy(&[1, 0], level, dtype);
                let arrived = values(received(sent.clone(), &policy, 0).unwrap());
                let codec = policy.codec_of(0);
                let run = Codec::run(&[1, keep, height, width]);
                let mut expected = vec![0.0; count];
                for half in 0..2 * images {
                    let from = &numbers[half * group * plane..][..keep * plane];
                    let to = &mut expected[(half ^ 1) * group * plane..][..keep * plane];
                    let mut payload = bytes::BytesMut::new();
                    codec.put_numbers(from, run, &mut payload);
                    codec.read_numbers(&payload, run, to).unwrap();
                }
                assert!(arrived == expected, "{dtype} {height}×{width}");
            }
        }
    }

    #[test]
    fn the_gradient_passes_the_rounding_unchanged() {
        let sent = row(&[0.1, 0.2, 0.3, 0.4]).autodiff().require_grad();
        let arrived = received(sent.clone(), &policy(&[1, 0], 0, Dtype::F16), 0).unwrap();
        let tiny = 3e-9; // less than half of the least f16 above zero
        let grads = (arrived * tiny).sum().backward();
        assert_eq!(values(sent.grad(&grads).unwrap()), [tiny, 0.0, tiny, 0.0]);
    }
}
