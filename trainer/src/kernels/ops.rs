//! The kernels as differentiable operations on tensors.
//!
//! burn asks for a trait over backends, an implementation for the CPU backend, and one for the same
//! under autodiff that registers the backward pass. [`conv_norm`] and [`exchange`] are what the
//! network calls.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_flex::FlexTensor;

use super::conv::Shape;
use super::fused::{self, Fused, Inputs, Saved};
use super::routes::Routes;

/// What a convolution with its batch norm is, besides its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ConvNormOptions {
    /// Groups of channels that do not see each other.
    pub(crate) groups: usize,
    /// 1 or 2, along both axes.
    pub(crate) stride: usize,
    /// Added to the variance.
    pub(crate) epsilon: f64,
    /// Whether a ReLU closes it.
    pub(crate) relu: bool,
}

/// The operations burn's backends do not have.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait Kernels: Backend {
    /// `relu(norm(conv(x)))`.
    fn conv_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        options: ConvNormOptions,
    ) -> FloatTensor<Self>;

    /// `relu(norm(conv(x)) + residual)`.
    fn conv_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        options: ConvNormOptions,
    ) -> FloatTensor<Self>;

    /// `base` plus what arrives of `sent`.
    fn exchange(
        base: FloatTensor<Self>,
        sent: FloatTensor<Self>,
        routes: Routes,
    ) -> FloatTensor<Self>;
}

/// Whether tensors of `device` can be given to these operations.
pub(crate) fn runs_on(device: &Device) -> bool {
    *device == Device::flex() || *device == Device::flex().autodiff()
}

/// `relu(norm(conv(x)) + residual)`, batch norm over the batch; the ReLU where `options` ask for it.
///
/// The kernel is 1×1, or 3×3 with a border of one; its stride is 1 or 2.
pub(crate) fn conv_norm(
    x: Tensor<4>,
    weight: Tensor<4>,
    [gamma, beta]: [Tensor<1>; 2],
    residual: Option<Tensor<4>>,
    options: ConvNormOptions,
) -> Tensor<4> {
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    let (gamma, beta) = (gamma.into_dispatch(), beta.into_dispatch());
    Tensor::from_dispatch(match residual {
        None => Dispatch::conv_norm(x, weight, gamma, beta, options),
        Some(residual) => {
            Dispatch::conv_norm_add(x, weight, gamma, beta, residual.into_dispatch(), options)
        }
    })
}

/// `base` plus what arrives of `sent`, both `[images, groups · channels, h, w]`.
pub(crate) fn exchange(base: Tensor<4>, sent: Tensor<4>, routes: Routes) -> Tensor<4> {
    let (base, sent) = (base.into_dispatch(), sent.into_dispatch());
    Tensor::from_dispatch(Dispatch::exchange(base, sent, routes))
}

/// The values of a tensor in order, copied only if they lie otherwise.
struct Values(FlexTensor);

impl Values {
    fn of(tensor: &FlexTensor) -> Values {
        Values(if tensor.is_contiguous() { tensor.clone() } else { tensor.to_contiguous() })
    }

    fn get(&self) -> &[f32] {
        // A contiguous tensor is always a slice.
        self.0.as_slice::<f32>().unwrap_or_default()
    }
}

fn tensor(values: Vec<f32>, like: &FlexTensor) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, like.shape()))
}

fn shaped(values: Vec<f32>, dims: [usize; 4]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, dims))
}

fn vector(values: Vec<f32>) -> FlexTensor {
    let count = values.len();
    FlexTensor::from_data(TensorData::new(values, [count]))
}

/// The inputs of a convolution with batch norm.
struct ConvNorm<'a> {
    x: &'a FlexTensor,
    weight: &'a FlexTensor,
    gamma: &'a FlexTensor,
    options: ConvNormOptions,
}

impl ConvNorm<'_> {
    fn fused(&self) -> Fused {
        let [_, channels, height, width] = self.x.shape().dims();
        let [outputs, inputs, kernel, _] = self.weight.shape().dims();
        let ConvNormOptions { groups, stride, epsilon, relu } = self.options;
        debug_assert_eq!(channels, groups * inputs);
        let outputs = outputs / groups;
        let shape = Shape { groups, inputs, outputs, height, width, kernel, stride };
        Fused { shape, epsilon: epsilon as f32, relu }
    }

    fn forward(&self, beta: &FlexTensor, residual: Option<&FlexTensor>) -> (FlexTensor, Saved) {
        let fused = self.fused();
        let [x, weight, gamma] = [self.x, self.weight, self.gamma].map(Values::of);
        let inputs = Inputs { x: x.get(), weight: weight.get(), gamma: gamma.get() };
        let residual = residual.map(Values::of);
        let residual = residual.as_ref().map(Values::get);
        let (out, saved) = fused::forward(fused, inputs, Values::of(beta).get(), residual);
        let [images, _, _, _]: [usize; 4] = self.x.shape().dims();
        let shape = fused.shape;
        let dims = [images, shape.groups * shape.outputs, shape.out_height(), shape.out_width()];
        (shaped(out, dims), saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        out: Option<&FlexTensor>,
        grad: &FlexTensor,
    ) -> fused::Backward {
        let [x, weight, gamma] = [self.x, self.weight, self.gamma].map(Values::of);
        let inputs = Inputs { x: x.get(), weight: weight.get(), gamma: gamma.get() };
        let out = out.map(Values::of);
        let out = out.as_ref().map(Values::get);
        fused::backward(self.fused(), inputs, (saved, out), Values::of(grad).get())
    }
}

impl Kernels for Flex {
    fn conv_norm(
        x: FlexTensor,
        weight: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        options: ConvNormOptions,
    ) -> FlexTensor {
        ConvNorm { x: &x, weight: &weight, gamma: &gamma, options }.forward(&beta, None).0
    }

    fn conv_norm_add(
        x: FlexTensor,
        weight: FlexTensor,
        gamma: FlexTensor,
        beta: FlexTensor,
        residual: FlexTensor,
        options: ConvNormOptions,
    ) -> FlexTensor {
        ConvNorm { x: &x, weight: &weight, gamma: &gamma, options }
            .forward(&beta, Some(&residual))
            .0
    }

    fn exchange(base: FlexTensor, sent: FlexTensor, routes: Routes) -> FlexTensor {
        let [_, _, height, width]: [usize; 4] = base.shape().dims();
        let values = routes.add(Values::of(&base).get(), Values::of(&sent).get(), height * width);
        tensor(values, &base)
    }
}

/// What the backward pass of a convolution needs.
#[derive(Clone, Debug)]
struct ConvNormState {
    x: FlexTensor,
    weight: FlexTensor,
    gamma: FlexTensor,
    /// The result, where a residual was added before the ReLU.
    out: Option<FlexTensor>,
    saved: Arc<Saved>,
    options: ConvNormOptions,
}

impl ConvNormState {
    fn gradients(&self, grad: &FlexTensor) -> fused::Backward {
        let ConvNormState { x, weight, gamma, options, .. } = self;
        let op = ConvNorm { x, weight, gamma, options: *options };
        op.backward(&self.saved, self.out.as_ref(), grad)
    }
}

/// Without a residual.
#[derive(Debug)]
struct ConvNormPlain;

/// With a residual.
#[derive(Debug)]
struct ConvNormResidual;

impl Backward<Flex, 4> for ConvNormPlain {
    type State = ConvNormState;

    fn backward(self, ops: Ops<ConvNormState, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let state = ops.state;
        let found = state.gradients(&grad);
        let found = [
            tensor(found.x, &state.x),
            tensor(found.weight, &state.weight),
            vector(found.gamma),
            vector(found.beta),
        ];
        for (node, grad) in ops.parents.into_iter().zip(found) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, grad);
            }
        }
    }
}

impl Backward<Flex, 5> for ConvNormResidual {
    type State = ConvNormState;

    fn backward(self, ops: Ops<ConvNormState, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let state = ops.state;
        let found = state.gradients(&grad);
        let residual = match found.residual {
            Some(residual) => tensor(residual, &grad),
            None => grad,
        };
        let found = [
            tensor(found.x, &state.x),
            tensor(found.weight, &state.weight),
            vector(found.gamma),
            vector(found.beta),
            residual,
        ];
        for (node, grad) in ops.parents.into_iter().zip(found) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, grad);
            }
        }
    }
}

/// What the backward pass of an exchange needs.
#[derive(Clone, Debug)]
struct ExchangeState {
    routes: Routes,
}

#[derive(Debug)]
struct ExchangeBackward;

impl Backward<Flex, 2> for ExchangeBackward {
    type State = ExchangeState;

    fn backward(self, ops: Ops<ExchangeState, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let [base, sent] = ops.parents;
        if let Some(node) = sent {
            let [_, _, height, width]: [usize; 4] = grad.shape().dims();
            let values = ops.state.routes.gradient(Values::of(&grad).get(), height * width);
            grads.register::<Flex>(node.id, tensor(values, &grad));
        }
        if let Some(node) = base {
            grads.register::<Flex>(node.id, grad);
        }
    }
}

impl<C: CheckpointStrategy> Kernels for Autodiff<Flex, C> {
    fn conv_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        options: ConvNormOptions,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let (gamma, gamma_node) = gamma.into_parts();
        let (beta, beta_node) = beta.into_parts();
        let op = ConvNorm { x: &x, weight: &weight, gamma: &gamma, options };
        let (out, saved) = op.forward(&beta, None);
        let nodes = [x_node, weight_node, gamma_node, beta_node];
        match ConvNormPlain.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let saved = Arc::new(saved);
                prep.finish(ConvNormState { x, weight, gamma, out: None, saved, options }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn conv_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        options: ConvNormOptions,
    ) -> FloatTensor<Self> {
        let (x, x_node) = x.into_parts();
        let (weight, weight_node) = weight.into_parts();
        let (gamma, gamma_node) = gamma.into_parts();
        let (beta, beta_node) = beta.into_parts();
        let (residual, residual_node) = residual.into_parts();
        let op = ConvNorm { x: &x, weight: &weight, gamma: &gamma, options };
        let (out, saved) = op.forward(&beta, Some(&residual));
        let nodes = [x_node, weight_node, gamma_node, beta_node, residual_node];
        match ConvNormResidual.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let kept = options.relu.then(|| out.clone());
                let saved = Arc::new(saved);
                prep.finish(ConvNormState { x, weight, gamma, out: kept, saved, options }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn exchange(
        base: FloatTensor<Self>,
        sent: FloatTensor<Self>,
        routes: Routes,
    ) -> FloatTensor<Self> {
        let (base, base_node) = base.into_parts();
        let (sent, sent_node) = sent.into_parts();
        let out = Flex::exchange(base, sent, routes.clone());
        match ExchangeBackward.prepare::<C>([base_node, sent_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(ExchangeState { routes }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::relu;
    use burn::tensor::module::{batch_norm_train, conv2d};
    use burn::tensor::ops::ConvOptions;
    use rand::RngExt;
    use snn_schemas::{Dtype, Policy};

    use super::*;
    use crate::seed::{Rng, rng};

    /// Values between −1 and 2: about half of what a ReLU sees is cut off.
    fn random<const D: usize>(shape: [usize; D], rng: &mut Rng) -> Tensor<D> {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..2.0)).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
    }

    /// What gradients may differ by, relative to the largest of a tensor.
    const TOLERANCE: f32 = 1e-4;

    /// Result, then the gradients of x, weight, gamma, beta and residual.
    type Found = Vec<(&'static str, Vec<f32>)>;

    struct Layer {
        name: &'static str,
        groups: usize,
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
        relu: bool,
        residual: bool,
    }

    /// Every kind of layer the network has, and sizes that fill no vector.
    const LAYERS: [Layer; 8] = [
        Layer {
            name: "stem",
            groups: 1,
            channels: [3, 16],
            kernel: 3,
            stride: 1,
            relu: true,
            residual: false,
        },
        Layer {
            name: "reduce",
            groups: 4,
            channels: [16, 8],
            kernel: 1,
            stride: 1,
            relu: true,
            residual: false,
        },
        Layer {
            name: "spatial",
            groups: 4,
            channels: [16, 16],
            kernel: 3,
            stride: 1,
            relu: true,
            residual: false,
        },
        Layer {
            name: "strided",
            groups: 4,
            channels: [16, 16],
            kernel: 3,
            stride: 2,
            relu: true,
            residual: false,
        },
        Layer {
            name: "depthwise",
            groups: 8,
            channels: [8, 8],
            kernel: 3,
            stride: 2,
            relu: true,
            residual: false,
        },
        Layer {
            name: "expand",
            groups: 4,
            channels: [8, 20],
            kernel: 1,
            stride: 1,
            relu: true,
            residual: true,
        },
        Layer {
            name: "open",
            groups: 2,
            channels: [6, 10],
            kernel: 1,
            stride: 1,
            relu: false,
            residual: true,
        },
        Layer {
            name: "shortcut",
            groups: 2,
            channels: [6, 10],
            kernel: 1,
            stride: 2,
            relu: false,
            residual: false,
        },
    ];

    impl Layer {
        fn run(&self, [height, width]: [usize; 2], by_kernels: bool) -> Found {
            let mut rng = rng(5, self.name, height);
            let [inputs, outputs] = self.channels;
            let x = random([5, inputs, height, width], &mut rng).require_grad();
            let shape = [outputs, inputs / self.groups, self.kernel, self.kernel];
            let weight = random(shape, &mut rng).require_grad();
            let gamma = random([outputs], &mut rng).require_grad();
            let beta = random([outputs], &mut rng).require_grad();
            let out = [5, outputs, height.div_ceil(self.stride), width.div_ceil(self.stride)];
            let residual = random(out, &mut rng).require_grad();
            let added = self.residual.then(|| residual.clone());
            let weighing = random(out, &mut rng);
            let Layer { groups, stride, relu: close, kernel, .. } = *self;
            let y = if by_kernels {
                let options = ConvNormOptions { groups, stride, epsilon: 1e-5, relu: close };
                conv_norm(x.clone(), weight.clone(), [gamma.clone(), beta.clone()], added, options)
            } else {
                let options = ConvOptions::new([stride; 2], [kernel / 2; 2], [1, 1], groups);
                let y = conv2d(x.clone(), weight.clone(), None, options);
                let y = batch_norm_train(y, gamma.clone(), beta.clone(), 1e-5).output;
                let y = match added {
                    Some(residual) => y + residual,
                    None => y,
                };
                if close { relu(y) } else { y }
            };
            let grads = (y.clone() * weighing).sum().backward();
            let vec4 = |tensor: Tensor<4>| tensor.try_into_vec_as::<f32>().unwrap();
            let vec1 = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
            let mut found = vec![
                ("out", vec4(y)),
                ("x", vec4(x.grad(&grads).unwrap())),
                ("weight", vec4(weight.grad(&grads).unwrap())),
                ("gamma", vec1(gamma.grad(&grads).unwrap())),
                ("beta", vec1(beta.grad(&grads).unwrap())),
            ];
            if self.residual {
                found.push(("residual", vec4(residual.grad(&grads).unwrap())));
            }
            found
        }
    }

    #[test]
    fn results_and_gradients_are_those_of_burns_layers() {
        for layer in &LAYERS {
            for size in [[8, 8], [5, 7], [12, 9], [1, 2]] {
                let found = layer.run(size, true);
                for ((what, found), (_, expected)) in found.iter().zip(layer.run(size, false)) {
                    let largest =
                        expected.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
                    assert_eq!(found.len(), expected.len());
                    for (found, expected) in found.iter().zip(&expected) {
                        let off = (found - expected).abs() / largest;
                        assert!(
                            off < TOLERANCE,
                            "{} {size:?} {what}: {found}, not {expected}",
                            layer.name
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_exchange_and_its_gradients_are_those_of_the_plain_formulation() {
        let text = br#"{"version":1,"groups":3,"staleness":1,"dtype":"f16","decisions":[[3,4],[1,0],[0,8]]}"#;
        let mut policy = Policy::from_json(text).unwrap();
        let mut rng = rng(5, "exchange", 0);
        let mut random = || random([4, 9, 3, 5], &mut rng).require_grad();
        for dtype in [Dtype::F16, Dtype::F32, Dtype::I8, Dtype::I4] {
            policy.dtype = dtype;
            for step in 0..2 {
                let (base, sent, weighing) = (random(), random(), random());
                let routes = Routes::new(&policy, step, 3).unwrap();
                let fast = exchange(base.clone(), sent.clone(), routes);
                let arrived = crate::exchange::received(sent.clone(), &policy, step).unwrap();
                let plain = base.clone() + arrived;
                let gradients = |out: Tensor<4>| {
                    let grads = (out.clone() * weighing.clone()).sum().backward();
                    [out, base.grad(&grads).unwrap(), sent.grad(&grads).unwrap()]
                        .map(|tensor| tensor.try_into_vec_as::<f32>().unwrap())
                };
                assert!(gradients(fast) == gradients(plain), "{dtype} step {step}");
            }
        }
        assert_eq!(Routes::new(&policy, 2, 3), None, "a silent step moves nothing");
    }

    #[test]
    fn the_result_does_not_depend_on_the_number_of_threads() {
        let layer = &LAYERS[5];
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| layer.run([12, 9], true))
        };
        assert!(with(1) == with(3));
    }
}
