//! What GPUs are quick at, out of burn's own operations.
//!
//! [`same_conv`] takes `[images, inputs, h, w]` and the weights `[outputs, inputs, 3, 3]` of a convolution that keeps
//! height and width, and computes it as a gradient: burn's gradient of a convolution's input is one large matrix product, its
//! convolution in f32 is not, and took five times as long where it was measured. [`batch_norm`] normalises over the batch
//! without turning the features around: whatever a GPU convolves lies channel by channel for each pixel, and stays so. Both
//! are differentiable, and give what burn's layers give to rounding; that is tested on the CPU, where nothing else uses them.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Shape, Tensor};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops};

use super::ops::{record, register};

/// The operations: without a backward pass the same on every backend that has burn's own.
#[backend_extension(Cube: cfg(feature = "gpu"), Flex, Autodiff)]
pub(crate) trait Formulated: Backend {
    /// A 3×3 convolution of stride 1 with a border of one.
    fn same_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        convolved::<Self>(x, weight)
    }

    /// Batch norm with the statistics of the batch.
    fn normed(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        NormedState::<Self>::forward([x, gamma, beta], epsilon).0
    }
}

impl Formulated for Flex {}

#[cfg(feature = "gpu")]
impl Formulated for burn::backend::Cube {}

/// The convolution of `x`, `[images, inputs, h, w]`, with `weight`, `[outputs, inputs, 3, 3]`: stride 1, a border of one.
pub(crate) fn same_conv(x: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::same_conv(x.into_dispatch(), weight.into_dispatch()))
}

/// `x`, `[images, channels, h, w]`, normalised over the batch; gamma and beta are `[channels]`.
pub(crate) fn batch_norm(x: Tensor<4>, [gamma, beta]: [Tensor<1>; 2], epsilon: f64) -> Tensor<4> {
    let (x, gamma, beta) = (x.into_dispatch(), gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(Dispatch::normed(x, gamma, beta, epsilon))
}

/// Stride 1 and a border of one.
fn same() -> ConvOptions<2> {
    ConvOptions::new([1, 1], [1, 1], [1, 1], 1)
}

/// The convolution as the gradient of one: of the one that takes outputs to inputs, with the taps the other way round.
fn convolved<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
    let [images, _, height, width] = x.shape().dims();
    let [outputs, _, _, _]: [usize; 4] = weight.shape().dims();
    // Read for its shape alone.
    let like = Shape::new([images, outputs, height, width]);
    let like = B::float_empty(like, &x.device(), x.dtype().into());
    let turned = B::float_swap_dims(B::float_flip(weight, &[2, 3]), 0, 1);
    B::conv2d_x_backward(like, turned, x, same())
}

#[derive(Debug)]
struct SameConv;

impl<B: Backend> Backward<B, 2> for SameConv {
    /// x and the weights.
    type State = [FloatTensor<B>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let ([x, weight], [to_x, to_weight]) = (ops.state, ops.parents);
        if let Some(node) = to_x {
            let found = B::conv2d_x_backward(x.clone(), weight.clone(), grad.clone(), same());
            grads.register::<B>(node.id, found);
        }
        if let Some(node) = to_weight {
            grads.register::<B>(node.id, B::conv2d_weight_backward(x, weight, grad, same()));
        }
    }
}

/// Features `[images, channels, h, w]` as `[images, h · w, channels]`, which is how a convolution leaves them.
fn rows<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [images, channels, height, width] = x.shape().dims();
    let shape = Shape::new([images, height * width, channels]);
    B::float_reshape(B::float_permute(x, &[0, 2, 3, 1]), shape)
}

/// The way back, to features of the shape `like`.
fn planes<B: Backend>(rows: FloatTensor<B>, like: &Shape) -> FloatTensor<B> {
    let [images, channels, height, width] = like.dims();
    let shape = Shape::new([images, height, width, channels]);
    B::float_permute(B::float_reshape(rows, shape), &[0, 3, 1, 2])
}

/// Each channel's mean, `[1, 1, channels]`: of an image first, so that there are many sums to take side by side.
fn mean<B: Backend>(rows: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mean_dim(B::float_mean_dim(rows, 1), 0)
}

/// A number a channel, `[channels]`, as `[1, 1, channels]`.
fn row<B: Backend>(vector: FloatTensor<B>) -> FloatTensor<B> {
    let [channels] = vector.shape().dims();
    B::float_reshape(vector, Shape::new([1, 1, channels]))
}

/// What the backward pass of batch norm needs.
#[derive(Clone, Debug)]
struct NormedState<B: Backend> {
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    /// Each channel's mean, `[1, 1, channels]`.
    mean: FloatTensor<B>,
    /// One over each channel's standard deviation, `[1, 1, channels]`.
    scale: FloatTensor<B>,
}

impl<B: Backend> NormedState<B> {
    /// The result, and what its backward pass needs.
    fn forward(
        [x, gamma, beta]: [FloatTensor<B>; 3],
        epsilon: f64,
    ) -> (FloatTensor<B>, NormedState<B>) {
        let shape = x.shape();
        let features = rows::<B>(x.clone());
        let mean_x = mean::<B>(features.clone());
        let centred = B::float_sub(features, mean_x.clone());
        let variance = mean::<B>(B::float_mul(centred.clone(), centred.clone()));
        let scale = B::float_recip(B::float_sqrt(B::float_add_scalar(variance, epsilon.into())));
        let factor = B::float_mul(scale.clone(), row::<B>(gamma.clone()));
        let out = B::float_add(B::float_mul(centred, factor), row::<B>(beta));
        (planes::<B>(out, &shape), NormedState { x, gamma, mean: mean_x, scale })
    }

    /// The gradients of x, gamma and beta from that of the result (Ioffe and Szegedy, 2015, section 3).
    fn backward(self, grad: FloatTensor<B>) -> [FloatTensor<B>; 3] {
        let shape = grad.shape();
        let [images, channels, height, width] = shape.dims();
        let grad = rows::<B>(grad);
        let centred = B::float_sub(rows::<B>(self.x), self.mean);
        let normed = B::float_mul(centred, self.scale.clone());
        let beta = mean::<B>(grad.clone());
        let gamma = mean::<B>(B::float_mul(grad.clone(), normed.clone()));
        let along = B::float_add(B::float_mul(normed, gamma.clone()), beta.clone());
        let factor = B::float_mul(self.scale, row::<B>(self.gamma));
        let x = B::float_mul(B::float_sub(grad, along), factor);
        let count = (images * height * width) as f64;
        let sums = |means: FloatTensor<B>| {
            B::float_reshape(B::float_mul_scalar(means, count.into()), Shape::new([channels]))
        };
        [planes::<B>(x, &shape), sums(gamma), sums(beta)]
    }
}

#[derive(Debug)]
struct Normed;

impl<B: Backend> Backward<B, 3> for Normed {
    type State = NormedState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let nodes = ops.parents.map(|node| node.map(|node| node.id));
        register::<B>(grads, nodes, ops.state.backward(grad));
    }
}

impl<B: Formulated, C: CheckpointStrategy> Formulated for Autodiff<B, C> {
    fn same_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let [(x, to_x), (weight, to_weight)] = [x, weight].map(|tensor| tensor.into_parts());
        let out = B::same_conv(x.clone(), weight.clone());
        record(SameConv.prepare::<C>([to_x, to_weight]).compute_bound(), (out, [x, weight]))
    }

    fn normed(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let [(x, to_x), (gamma, to_gamma), (beta, to_beta)] =
            [x, gamma, beta].map(|tensor| tensor.into_parts());
        let found = NormedState::<B>::forward([x, gamma, beta], epsilon);
        record(Normed.prepare::<C>([to_x, to_gamma, to_beta]).compute_bound(), found)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::module::{batch_norm_train, conv2d};
    use burn::tensor::{Device, Distribution};

    use super::*;

    fn drawn<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        let device = Device::flex().autodiff();
        Tensor::<D>::random(shape, Distribution::Uniform(-1.0, 1.0), &device).require_grad()
    }

    /// The largest difference, as a share of the largest number.
    fn apart<const D: usize>(one: Tensor<D>, other: Tensor<D>) -> f32 {
        let most = |tensor: Tensor<D>| tensor.abs().max().into_scalar::<f32>();
        most(one - other.clone()) / most(other)
    }

    #[test]
    fn a_convolution_is_a_gradient_with_the_taps_turned_round() {
        Device::flex().seed(1);
        for (images, inputs, outputs, height, width) in [(2, 3, 5, 4, 7), (3, 16, 16, 8, 8)] {
            let x = drawn([images, inputs, height, width]);
            let weight = drawn([outputs, inputs, 3, 3]);
            let toll = drawn([images, outputs, height, width]);
            let ours = same_conv(x.clone(), weight.clone());
            let burns = conv2d(x.clone(), weight.clone(), None, same());
            assert!(apart(ours.clone(), burns.clone()) < 1e-5);
            let ours = (ours * toll.clone()).sum().backward();
            let burns = (burns * toll).sum().backward();
            let grads = |tensor: &Tensor<4>| [&ours, &burns].map(|all| tensor.grad(all).unwrap());
            for [ours, burns] in [grads(&x), grads(&weight)] {
                assert!(apart(ours, burns) < 1e-5);
            }
        }
    }

    #[test]
    fn batch_norm_is_that_of_burn() {
        Device::flex().seed(1);
        for [images, channels, height, width] in [[2, 3, 4, 7], [5, 16, 3, 3]] {
            let x = drawn([images, channels, height, width]);
            let (gamma, beta) = (drawn([channels]), drawn([channels]));
            let toll = drawn([images, channels, height, width]);
            let ours = batch_norm(x.clone(), [gamma.clone(), beta.clone()], 1e-5);
            let burns = batch_norm_train(x.clone(), gamma.clone(), beta.clone(), 1e-5).output;
            assert!(apart(ours.clone(), burns.clone()) < 1e-5);
            let ours = (ours * toll.clone()).sum().backward();
            let burns = (burns * toll).sum().backward();
            let grads = |tensor: &Tensor<1>| [&ours, &burns].map(|all| tensor.grad(all).unwrap());
            for [ours, burns] in [grads(&gamma), grads(&beta)] {
                assert!(apart(ours, burns) < 1e-5);
            }
            assert!(apart(x.grad(&ours).unwrap(), x.grad(&burns).unwrap()) < 1e-5);
        }
    }
}
