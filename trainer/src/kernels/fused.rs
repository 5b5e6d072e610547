//! Convolution, batch norm over the batch, a residual sum and a ReLU, as one operation.
//!
//! [`forward`] gives `relu(norm(conv(x)) + residual)`, either end of it optional, and what
//! [`backward`] needs again; that gives the gradients of every input. A tensor is read and written as
//! seldom as the statistics allow, which is what small groups spend their time on. Images are dealt
//! out in parts whose number depends on the batch alone, and sums over parts are made in order: the
//! result does not depend on the number of threads.

use pulp::Arch;
use rayon::prelude::*;

use super::conv::{Scratch, Shape, Weights};

/// Parts a batch is dealt out in, at most: enough for many cores, few enough that a copy of the
/// weights' gradient each costs little.
const PARTS: usize = 16;
/// Sums are made in this many lanes side by side: the width of the widest vectors.
const LANES: usize = 16;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fused {
    /// The convolution.
    pub(crate) shape: Shape,
    /// Added to the variance.
    pub(crate) epsilon: f32,
    /// Whether a ReLU closes it.
    pub(crate) relu: bool,
}

/// What goes in besides images and weights.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// `[images, groups · inputs, h, w]`.
    pub(crate) x: &'a [f32],
    /// `[groups · outputs, inputs, k, k]`.
    pub(crate) weight: &'a [f32],
    /// `[groups · outputs]`.
    pub(crate) gamma: &'a [f32],
}

/// What [`forward`] leaves for [`backward`] besides its inputs and its result.
#[derive(Clone, Debug, Default)]
pub(crate) struct Saved {
    /// The convolution's output, `[images, groups · outputs, h, w]`.
    pub(crate) y: Vec<f32>,
    /// A channel's factor: gamma over its deviation.
    pub(crate) scale: Vec<f32>,
    /// What is added after: beta less the scaled mean.
    pub(crate) shift: Vec<f32>,
    /// A channel's mean.
    pub(crate) mean: Vec<f32>,
    /// One over a channel's deviation.
    pub(crate) inverse: Vec<f32>,
}

/// What [`backward`] gives.
pub(crate) struct Backward {
    pub(crate) x: Vec<f32>,
    pub(crate) weight: Vec<f32>,
    pub(crate) gamma: Vec<f32>,
    pub(crate) beta: Vec<f32>,
    /// Gradient of the residual, where a ReLU makes it differ from that of the result.
    pub(crate) residual: Option<Vec<f32>>,
}

/// Computes the result.
pub(crate) fn forward(
    fused: Fused,
    inputs: Inputs,
    beta: &[f32],
    residual: Option<&[f32]>,
) -> (Vec<f32>, Saved) {
    let Fused { shape, epsilon, relu } = fused;
    let weights = Weights::new(shape, inputs.weight);
    let images = inputs.x.len() / shape.in_image();
    let each = images.div_ceil(PARTS).max(1);
    let channels = shape.groups * shape.outputs;
    let plane = shape.out_plane();
    let mut y = vec![0.0; images * shape.out_image()];
    let mut moments = vec![(0.0_f32, 0.0_f32); images * channels];
    y.par_chunks_mut(each * shape.out_image())
        .zip(moments.par_chunks_mut(each * channels))
        .zip(inputs.x.par_chunks(each * shape.in_image()))
        .for_each(|((y, moments), x)| {
            let mut scratch = Scratch::new(shape);
            let groups = x.chunks_exact(shape.inputs * shape.in_plane());
            let outs = y.chunks_exact_mut(shape.outputs * plane);
            let moments = moments.chunks_exact_mut(shape.outputs);
            for (index, ((x, y), moments)) in groups.zip(outs).zip(moments).enumerate() {
                scratch.lower_input(shape, x);
                scratch.forward(&weights, index % shape.groups, y);
                for (y, moment) in y.chunks_exact(plane).zip(moments) {
                    *moment = moments_of(y);
                }
            }
        });
    let mut out = vec![0.0; y.len()];
    let moments = Moments { of: &moments, images, plane };
    let saved = moments.saved(y, (inputs.gamma, beta), epsilon);
    let (scale, shift, y) = (&saved.scale, &saved.shift, &saved.y);
    let part = each * shape.out_image();
    out.par_chunks_mut(part).enumerate().for_each(|(index, out)| {
        let start = index * part;
        let y = &y[start..][..out.len()];
        let residual = residual.map(|residual| &residual[start..][..out.len()]);
        Arch::new().dispatch(|| finish(out, y, residual, (scale, shift, plane, relu)));
    });
    (out, saved)
}

/// Mean, and sum of squared distances from it, of each image's channels.
struct Moments<'a> {
    /// `[images, channels]`.
    of: &'a [(f32, f32)],
    images: usize,
    /// Values of a channel of an image.
    plane: usize,
}

impl Moments<'_> {
    /// Normalises the batch: what `y` is scaled and shifted by, channel by channel.
    fn saved(&self, y: Vec<f32>, (gamma, beta): (&[f32], &[f32]), epsilon: f32) -> Saved {
        let Moments { images, plane, .. } = *self;
        let channels = gamma.len();
        let mut saved = Saved { y, ..Saved::default() };
        for (channel, (gamma, beta)) in gamma.iter().zip(beta).enumerate() {
            let of_channel = || self.of[channel..].iter().step_by(channels);
            let mean = of_channel().map(|moment| f64::from(moment.0)).sum::<f64>() / images as f64;
            // Spread within images, and of the images' means around the batch's.
            let spread = |moment: &(f32, f32)| {
                f64::from(moment.1) + plane as f64 * (f64::from(moment.0) - mean).powi(2)
            };
            let variance = of_channel().map(spread).sum::<f64>() / (images * plane) as f64;
            let inverse = 1.0 / (variance + f64::from(epsilon)).sqrt();
            let scale = f64::from(*gamma) * inverse;
            saved.scale.push(scale as f32);
            saved.shift.push((f64::from(*beta) - mean * scale) as f32);
            saved.mean.push(mean as f32);
            saved.inverse.push(inverse as f32);
        }
        saved
    }
}

/// `out = relu(y · scale + shift + residual)`; what is no number stays none, so that losses show it.
#[inline(always)]
fn finish(
    out: &mut [f32],
    y: &[f32],
    residual: Option<&[f32]>,
    (scale, shift, plane, relu): (&[f32], &[f32], usize, bool),
) {
    let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
    // `f32::max` would make 0 of what is no number.
    let at_least = |value: f32| if value < floor { floor } else { value };
    let channels = scale.len();
    for (index, (out, y)) in out.chunks_exact_mut(plane).zip(y.chunks_exact(plane)).enumerate() {
        let (scale, shift) = (scale[index % channels], shift[index % channels]);
        match residual {
            Some(residual) => {
                let residual = &residual[index * plane..][..plane];
                for ((out, y), residual) in out.iter_mut().zip(y).zip(residual) {
                    *out = at_least(y * scale + shift + residual);
                }
            }
            None => out.iter_mut().zip(y).for_each(|(out, y)| *out = at_least(y * scale + shift)),
        }
    }
}

/// Mean, and sum of squared distances from it.
fn moments_of(values: &[f32]) -> (f32, f32) {
    Arch::new().dispatch(|| {
        let mean = sum(values.len(), |at| values[at]) / values.len() as f32;
        let spread = sum(values.len(), |at| (values[at] - mean) * (values[at] - mean));
        (mean, spread)
    })
}

/// Σ value(0 … count − 1), in [`LANES`] partial sums.
#[inline(always)]
fn sum(count: usize, value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = count / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += value(at + lane);
        }
    }
    let rest: f32 = (whole..count).map(value).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Computes the gradients of all inputs from that of the result, `grad`.
///
/// `out` is the result, needed where there is a residual: elsewhere its sign follows from `y`.
pub(crate) fn backward(
    fused: Fused,
    inputs: Inputs,
    (saved, out): (&Saved, Option<&[f32]>),
    grad: &[f32],
) -> Backward {
    let masked = fused.relu && out.is_some();
    let (sums, through) = channel_sums(fused, (saved, out), grad);
    let channels = saved.scale.len();
    let total = |channel: usize, which: fn(&(f32, f32)) -> f32| {
        sums[channel..].iter().step_by(channels).map(|sums| f64::from(which(sums))).sum::<f64>()
    };
    let beta: Vec<f64> = (0..channels).map(|channel| total(channel, |sums| sums.0)).collect();
    let gamma: Vec<f64> = (0..channels).map(|channel| total(channel, |sums| sums.1)).collect();
    let count = (sums.len() / channels * fused.shape.out_plane()) as f64;
    // dy = scale · (grad − mean(grad) − ŷ · mean(grad · ŷ)) = a · grad + b · y + c.
    let affine: Vec<[f32; 3]> = (0..channels)
        .map(|channel| {
            let a = f64::from(saved.scale[channel]);
            let (mean, inverse) =
                (f64::from(saved.mean[channel]), f64::from(saved.inverse[channel]));
            let b = -a * gamma[channel] * inverse / count;
            [a as f32, b as f32, (-a * beta[channel] / count - b * mean) as f32]
        })
        .collect();
    let arriving = Arriving {
        grad: if masked { &through } else { grad },
        affine: &affine,
        saved,
        relu: fused.relu && !masked,
    };
    let (x, weight) = through_convolution(fused.shape, inputs, arriving);
    Backward {
        x,
        weight,
        gamma: gamma.into_iter().map(|value| value as f32).collect(),
        beta: beta.into_iter().map(|value| value as f32).collect(),
        residual: masked.then_some(through),
    }
}

/// Σ grad and Σ grad · ŷ of each image's channels, after the ReLU; and, where there is a residual
/// before the ReLU, what of `grad` passes it.
fn channel_sums(
    fused: Fused,
    (saved, out): (&Saved, Option<&[f32]>),
    grad: &[f32],
) -> (Vec<(f32, f32)>, Vec<f32>) {
    let Fused { shape, relu, .. } = fused;
    let (channels, plane) = (shape.groups * shape.outputs, shape.out_plane());
    let images = grad.len() / shape.out_image();
    let each = images.div_ceil(PARTS).max(1);
    let masked = relu && out.is_some();
    let mut through = vec![0.0; if masked { grad.len() } else { 0 }];
    let mut sums = vec![(0.0_f32, 0.0_f32); images * channels];
    let part = each * shape.out_image();
    let sum_part = |index: usize, sums: &mut [(f32, f32)], through: &mut [f32]| {
        let start = index * part;
        for (at, sums) in sums.iter_mut().enumerate() {
            let range = start + at * plane..start + (at + 1) * plane;
            let (grad, y) = (&grad[range.clone()], &saved.y[range.clone()]);
            let channel = at % channels;
            let (mean, inverse) = (saved.mean[channel], saved.inverse[channel]);
            *sums = Arch::new().dispatch(|| match out {
                Some(out) if relu => {
                    let (out, through) = (&out[range.clone()], &mut through[at * plane..][..plane]);
                    for ((through, grad), out) in through.iter_mut().zip(grad).zip(out) {
                        *through = if *out > 0.0 { *grad } else { 0.0 };
                    }
                    two_sums(through, y, (mean, inverse))
                }
                _ if relu => {
                    let (scale, shift) = (saved.scale[channel], saved.shift[channel]);
                    two_sums_masked(grad, y, (mean, inverse), (scale, shift))
                }
                _ => two_sums(grad, y, (mean, inverse)),
            });
        }
    };
    let parts = sums.par_chunks_mut(each * channels);
    match masked {
        true => parts
            .zip(through.par_chunks_mut(part))
            .enumerate()
            .for_each(|(index, (sums, through))| sum_part(index, sums, through)),
        false => parts.enumerate().for_each(|(index, sums)| sum_part(index, sums, &mut [])),
    }
    (sums, through)
}

/// The gradient that arrives at a convolution's output, as it is worked out row by row.
#[derive(Clone, Copy)]
struct Arriving<'a> {
    /// That of the result, after the ReLU where [`Arriving::relu`] is false.
    grad: &'a [f32],
    /// A channel's a, b and c: a · grad + b · y + c.
    affine: &'a [[f32; 3]],
    saved: &'a Saved,
    /// Whether the ReLU is still to be gone through: open where `y · scale + shift` is above zero.
    relu: bool,
}

impl Arriving<'_> {
    /// Fills `scratch` with what arrives at the output channels of the group that is the `place`th
    /// of all images' groups.
    fn fill(&self, scratch: &mut Scratch, shape: Shape, place: usize) {
        let plane = shape.out_plane();
        for channel in 0..shape.outputs {
            let all = place % shape.groups * shape.outputs + channel;
            let [a, b, c] = self.affine[all];
            let start = (place * shape.outputs + channel) * plane;
            let (grad, y) = (&self.grad[start..][..plane], &self.saved.y[start..][..plane]);
            let mask = self.relu.then(|| (self.saved.scale[all], self.saved.shift[all]));
            Arch::new().dispatch(|| {
                let width = shape.out_width();
                let rows = grad.chunks_exact(width).zip(y.chunks_exact(width));
                for (row, (grad, y)) in rows.enumerate() {
                    let to = scratch.gradient_row(shape, channel, row);
                    let values = to.iter_mut().zip(grad).zip(y);
                    match mask {
                        Some((scale, shift)) => values.for_each(|((to, grad), y)| {
                            let open = y * scale + shift > 0.0;
                            *to = a * if open { *grad } else { 0.0 } + (b * y + c);
                        }),
                        None => values.for_each(|((to, grad), y)| *to = a * grad + (b * y + c)),
                    }
                }
            });
        }
    }
}

/// The gradients of a convolution's images and of its weights.
fn through_convolution(shape: Shape, inputs: Inputs, arriving: Arriving) -> (Vec<f32>, Vec<f32>) {
    let weights = Weights::new(shape, inputs.weight);
    let images = inputs.x.len() / shape.in_image();
    let each = images.div_ceil(PARTS).max(1);
    let ins = shape.inputs * shape.in_plane();
    let mut x = vec![0.0; inputs.x.len()];
    let mut partial = vec![0.0; images.div_ceil(each) * inputs.weight.len()];
    x.par_chunks_mut(each * shape.in_image())
        .zip(partial.par_chunks_mut(inputs.weight.len().max(1)))
        .enumerate()
        .for_each(|(index, (dx, dw))| {
            let mut scratch = Scratch::new(shape);
            let first = index * each * shape.groups;
            for (at, dx) in dx.chunks_exact_mut(ins).enumerate() {
                let group = at % shape.groups;
                arriving.fill(&mut scratch, shape, first + at);
                scratch.lower_input(shape, &inputs.x[(first + at) * ins..][..ins]);
                let dw = &mut dw[group * shape.weights()..][..shape.weights()];
                scratch.weight_gradient(&weights, dw);
                scratch.input_gradient(&weights, group, dx);
            }
        });
    let mut weight = vec![0.0; inputs.weight.len()];
    for partial in partial.chunks_exact(inputs.weight.len().max(1)) {
        weight.iter_mut().zip(partial).for_each(|(sum, partial)| *sum += partial);
    }
    (x, weight)
}

/// Σ grad and Σ grad · ŷ.
#[inline(always)]
fn two_sums(grad: &[f32], y: &[f32], (mean, inverse): (f32, f32)) -> (f32, f32) {
    let y = &y[..grad.len()];
    let plain = sum(grad.len(), |at| grad[at]);
    (plain, sum(grad.len(), |at| grad[at] * (y[at] - mean)) * inverse)
}

/// The same where `y · scale + shift` is above zero.
#[inline(always)]
fn two_sums_masked(
    grad: &[f32],
    y: &[f32],
    (mean, inverse): (f32, f32),
    (scale, shift): (f32, f32),
) -> (f32, f32) {
    let y = &y[..grad.len()];
    let open = |at: usize| if y[at] * scale + shift > 0.0 { grad[at] } else { 0.0 };
    let plain = sum(grad.len(), open);
    (plain, sum(grad.len(), |at| open(at) * (y[at] - mean)) * inverse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_goes_through_the_relu() {
        let y = [-1.0, f32::NAN, 2.0, f32::INFINITY, f32::NEG_INFINITY, -0.5];
        let residual = [0.5, 0.0, f32::NAN, 0.0, 0.0, 1.0];
        let finished = |residual: Option<&[f32]>, relu: bool| {
            let mut out = [7.0_f32; 6];
            finish(&mut out, &y, residual, (&[1.0, 1.0], &[0.0, 0.0], 3, relu));
            out.map(|value| value.to_string())
        };
        assert_eq!(finished(None, true), ["0", "NaN", "2", "inf", "0", "0"]);
        assert_eq!(finished(Some(&residual), true), ["0", "NaN", "NaN", "inf", "0", "0.5"]);
        assert_eq!(finished(None, false), ["-1", "NaN", "2", "inf", "-inf", "-0.5"]);
    }
}
