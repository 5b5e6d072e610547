//! What groups send one another, simulated inside the one network that is trained.
//!
//! Takes a block's output `[batch, G·c, h, w]` and a step of a policy, and gives what arrives: D of
//! equations 2 and 3, of the same shape. Group i's first `keep` channels, rounded as the wire rounds
//! them, stand at group s(i); everything else is zero, also where a group sends to itself. It is one
//! gather and one product, whatever G is. Gradients pass the rounding as if it were not there.

use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use snn_schemas::{Dtype, Policy};

use crate::kernels::{self, Routes};

/// `base` plus what step `step` of `policy` brings to each group of what the groups sent.
pub(crate) fn arrive(base: Tensor<4>, sent: Tensor<4>, policy: &Policy, step: usize) -> Tensor<4> {
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
    let (source, arrives) = routes(policy, step, channels / policy.groups)?;
    let device = sent.device();
    let rounded = match policy.dtype {
        Dtype::F16 => through_f16(sent),
        Dtype::F32 => sent,
    };
    let source = Tensor::<1, Int>::from_data(TensorData::new(source, [channels]), &device);
    Some(rounded.select(1, source) * mask(arrives, &device)) // [batch, G·c, h, w]
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

/// Rounds to the nearest f16 (ties to even) and widens again; the gradient passes unchanged.
///
/// `x − x` is zero and adding zero changes nothing, so the value is exactly the rounded one. Without
/// the detour autodiff would round the gradient to f16 as well, and lose the small ones.
fn through_f16(x: Tensor<4>) -> Tensor<4> {
    let plain = x.clone().detach();
    let rounded = plain.clone().cast(FloatDType::F16).cast(FloatDType::F32);
    match x.is_autodiff() {
        true => rounded + (x - plain),
        false => rounded,
    }
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
    fn the_gradient_passes_the_rounding_unchanged() {
        let sent = row(&[0.1, 0.2, 0.3, 0.4]).autodiff().require_grad();
        let arrived = received(sent.clone(), &policy(&[1, 0], 0, Dtype::F16), 0).unwrap();
        let tiny = 3e-9; // less than half of the least f16 above zero
        let grads = (arrived * tiny).sum().backward();
        assert_eq!(values(sent.grad(&grads).unwrap()), [tiny, 0.0, tiny, 0.0]);
    }
}
