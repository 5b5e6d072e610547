//! Convolutions that tract leaves as they are.
//!
//! [`hold`] wraps those that the kernels may cover in [`Held`], an op that computes the same and that
//! tract's rewriting passes know nothing about.

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::cnn::{Conv as TractConv, KernelFormat};
use tract_onnx::tract_core::ops::nn::DataFormat;

/// A convolution that tract leaves alone until [`super::fuse`] has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held(pub(super) TractConv);

impl Op for Held {
    fn name(&self) -> StaticName {
        "HeldConv".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        self.0.info()
    }

    op_as_typed_op!();
}

impl EvalOp for Held {
    op_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.0.eval(ctx, inputs)
    }
}

impl TypedOp for Held {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.output_facts(inputs)
    }

    as_op!();
}

/// Keeps tract from rewriting the convolutions that the kernels may cover.
pub(crate) fn hold(model: &mut TypedModel) {
    for node in &mut model.nodes {
        let Some(conv) = node.op_as::<TractConv>() else { continue };
        let pools = &conv.pool_spec;
        let covered = conv.q_params.is_none()
            && pools.rank() == 2
            && pools.data_format == DataFormat::NCHW
            && conv.kernel_fmt == KernelFormat::OIHW
            && pools.dilations().iter().all(|&dilation| dilation == 1)
            && node.outputs.iter().all(|output| {
                output.fact.datum_type == f32::datum_type()
                    && output.fact.shape.as_concrete().is_some()
            });
        if covered {
            node.op = Box::new(Held(conv.clone()));
        }
    }
}
