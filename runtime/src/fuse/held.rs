//! Ops that tract leaves as they are.
//!
//! [`hold`] wraps convolutions that the kernels may cover, and slices whose channels leave the model, in
//! [`Held`], an op that computes the same and that tract's rewriting passes know nothing about.

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::array::{Slice, StridedSlice};
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::{Conv as TractConv, KernelFormat};
use tract_onnx::tract_core::ops::nn::DataFormat;

/// An op that tract leaves alone until [`super::fuse`] has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held<O>(pub(super) O);

impl<O: TypedOp + Clone + Eq> Op for Held<O> {
    fn name(&self) -> StaticName {
        format!("Held{}", self.0.name()).into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        self.0.info()
    }

    op_as_typed_op!();
}

impl<O: TypedOp + Clone + Eq> EvalOp for Held<O> {
    op_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.0.eval(ctx, inputs)
    }
}

impl<O: TypedOp + Clone + Eq> TypedOp for Held<O> {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.output_facts(inputs)
    }

    as_op!();
}

/// Keeps tract from rewriting the convolutions that the kernels may cover, and from moving the choice of
/// channels that leave the model before what makes them: it would make them twice, once for those
/// channels and once for all.
///
/// # Errors
/// What tract says of the slices.
pub(crate) fn hold(model: &mut TypedModel) -> TractResult<()> {
    for id in 0..model.nodes.len() {
        // As ONNX has them, with bounds that are tensors.
        let node = model.node(id);
        let Some(slice) = node.op_as::<StridedSlice>().filter(|_| leaves(model, node)) else {
            continue;
        };
        if let Some(patch) = slice.declutter(model, node)? {
            patch.apply(model)?;
        }
    }
    for id in 0..model.nodes.len() {
        if let Some(held) = held(model, model.node(id)) {
            model.node_mut(id).op = held;
        }
    }
    Ok(())
}

fn held(model: &TypedModel, node: &TypedNode) -> Option<Box<dyn TypedOp>> {
    if let Some(conv) = node.op_as::<TractConv>().filter(|conv| is_covered(conv, node)) {
        return Some(Box::new(Held(conv.clone())));
    }
    let slice = node.op_as::<Slice>().filter(|slice| slice.axis == 1 && leaves(model, node))?;
    Some(Box::new(Held(slice.clone())))
}

fn is_covered(conv: &TractConv, node: &TypedNode) -> bool {
    let pools = &conv.pool_spec;
    conv.q_params.is_none()
        && pools.rank() == 2
        && pools.data_format == DataFormat::NCHW
        && conv.kernel_fmt == KernelFormat::OIHW
        && pools.dilations().iter().all(|&dilation| dilation == 1)
        && node.outputs.iter().all(|output| {
            output.fact.datum_type == f32::datum_type() && output.fact.shape.as_concrete().is_some()
        })
}

/// Whether an op's four-dimensional result is an output of the model, as it is or in another type.
fn leaves(model: &TypedModel, node: &TypedNode) -> bool {
    let is_output = |id: usize| model.outputs.iter().any(|outlet| outlet.node == id);
    let next = model.single_succ(node.id).ok().flatten();
    let is_cast = next.is_some_and(|next| next.op_is::<Cast>() && is_output(next.id));
    node.outputs[0].fact.rank() == 4 && (is_cast || is_output(node.id))
}
