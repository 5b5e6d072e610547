//! tract's convolutions, replaced by the kernels of this crate.
//!
//! [`hold`] goes through a typed model before tract declutters it and keeps tract from rewriting
//! convolutions into products. [`fuse`] takes the decluttered model and gives the same computation in
//! which a convolution, its bias and scale, up to two tensors added to it and its activation are one
//! computation on blocked tensors (see [`crate::kernels`]), so are other sums of tensors and their
//! activation, and in which tensors are turned from planar to blocked and back only where an op
//! without a blocked form needs it. Computations that follow each other are one op of tract's. What
//! the kernels don't cover is given back to tract.
//!
//! A blocked tensor is an f32 one of shape `[batch, blocks, height, width, lanes]`. Results differ from
//! tract's by the order of additions only; casts to f16 round to nearest even, as tract's do.

mod builder;
mod chain;
mod facts;
mod held;
mod join;
mod memory;
mod ops;
mod rules;
mod run;
mod sum;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::TractErrorContext as _;

use self::builder::Builder;
pub(crate) use self::facts::elements;
pub(crate) use self::held::hold;
pub(crate) use self::memory::{Memory, Results};
use crate::kernels::{Isa, Workers};

/// How a model is fused.
#[derive(Clone)]
pub(crate) struct Fusion {
    /// Which kernels.
    pub isa: Isa,
    /// Who runs them.
    pub workers: Arc<dyn Workers + Send>,
    /// Where results are kept.
    pub memory: Memory,
}

/// Which tensors at a model's edge are blocked: their channels, or `None`.
pub(crate) type Edges = Vec<Option<usize>>;

/// What a model's surroundings are to its inputs and outputs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Around<'a> {
    /// Which inputs are blocked; those that are not named are not.
    pub blocked: &'a [Option<usize>],
    /// Which inputs nobody reads after the model: their memory may become a result's.
    pub ending: &'a [bool],
    /// Which outputs may be blocked.
    pub free: &'a [bool],
}

/// Fuses `model`; gives the new model and which of its outputs are blocked.
///
/// # Errors
/// What tract says of the new model.
pub(crate) fn fuse(
    model: &TypedModel,
    fusion: &Fusion,
    around: &Around<'_>,
) -> TractResult<(TypedModel, Edges)> {
    let order = model.eval_order()?;
    let mut builder = Builder::new(model, fusion, &order);
    builder.sources(around.blocked)?;
    for &id in &order {
        builder.translate(id).with_context(|| format!("fusing {}", model.node(id)))?;
    }
    builder.finish(around)
}
