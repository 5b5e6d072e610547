//! The kernels as differentiable operations on tensors.
//!
//! burn asks for a trait over backends, an implementation for the CPU backend, and one for the same
//! under autodiff that registers the backward pass. [`conv_norm`] and [`exchange`] are what the
//! network calls.

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, ComputePropertyDone, Ops, OpsKind, OpsPrep};
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
    /// The operation's result, and what its backward pass needs.
    fn forward(
        [x, weight, gamma]: [FlexTensor; 3],
        beta: &FlexTensor,
        residual: Option<&FlexTensor>,
        options: ConvNormOptions,
    ) -> (FlexTensor, ConvNormState) {
        let op = ConvNorm { x: &x, weight: &weight, gamma: &gamma, options };
        let (out, saved) = op.forward(beta, residual);
        let kept = (residual.is_some() && options.relu).then(|| out.clone());
        let saved = Arc::new(saved);
        (out, ConvNormState { x, weight, gamma, out: kept, saved, options })
    }

    /// The gradients of x, weight, gamma, beta and the residual from that of the result.
    fn backward(self, grad: FlexTensor) -> [FlexTensor; 5] {
        let ConvNormState { x, weight, gamma, options, .. } = &self;
        let op = ConvNorm { x, weight, gamma, options: *options };
        let found = op.backward(&self.saved, self.out.as_ref(), &grad);
        [
            tensor(found.x, x),
            tensor(found.weight, weight),
            vector(found.gamma),
            vector(found.beta),
            match found.residual {
                Some(residual) => tensor(residual, &grad),
                None => grad,
            },
        ]
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
        let nodes = ops.parents.map(|node| node.map(|node| node.id));
        register::<Flex>(grads, nodes, ops.state.backward(grad));
    }
}

impl Backward<Flex, 5> for ConvNormResidual {
    type State = ConvNormState;

    fn backward(self, ops: Ops<ConvNormState, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let nodes = ops.parents.map(|node| node.map(|node| node.id));
        register::<Flex>(grads, nodes, ops.state.backward(grad));
    }
}

/// Adds the gradients `found` to those of the nodes that want one.
pub(super) fn register<B: Backend>(
    grads: &mut Gradients,
    nodes: impl IntoIterator<Item = Option<NodeId>>,
    found: impl IntoIterator<Item = FloatTensor<B>>,
) {
    for (node, grad) in nodes.into_iter().zip(found) {
        if let Some(node) = node {
            grads.register::<B>(node, grad);
        }
    }
}

/// Notes an operation down for the backward pass, where anybody will ask for it.
pub(super) fn record<B: Backend, C: CheckpointStrategy, O, S, const P: usize>(
    prepared: OpsPrep<O, B, S, C, P, ComputePropertyDone>,
    (out, state): (FloatTensor<B>, S),
) -> FloatTensor<Autodiff<B, C>>
where
    O: Backward<B, P, State = S>,
    S: Clone + Send + std::fmt::Debug + 'static,
{
    match prepared.stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(state, out),
        OpsKind::UnTracked(prepared) => prepared.finish(out),
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
        let [(x, nx), (weight, nw), (gamma, ng), (beta, nb)] =
            [x, weight, gamma, beta].map(|tensor| tensor.into_parts());
        let found = ConvNormState::forward([x, weight, gamma], &beta, None, options);
        record(ConvNormPlain.prepare::<C>([nx, nw, ng, nb]).compute_bound(), found)
    }

    fn conv_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        options: ConvNormOptions,
    ) -> FloatTensor<Self> {
        let [(x, nx), (weight, nw), (gamma, ng), (beta, nb), (residual, nr)] =
            [x, weight, gamma, beta, residual].map(|tensor| tensor.into_parts());
        let found = ConvNormState::forward([x, weight, gamma], &beta, Some(&residual), options);
        record(ConvNormResidual.prepare::<C>([nx, nw, ng, nb, nr]).compute_bound(), found)
    }

    fn exchange(
        base: FloatTensor<Self>,
        sent: FloatTensor<Self>,
        routes: Routes,
    ) -> FloatTensor<Self> {
        let [(base, nb), (sent, ns)] = [base, sent].map(|tensor| tensor.into_parts());
        let out = Flex::exchange(base, sent, routes.clone());
        let found = (out, ExchangeState { routes });
        record(ExchangeBackward.prepare::<C>([nb, ns]).compute_bound(), found)
    }
}

#[cfg(test)]
mod tests;
