//! Ops on blocked tensors.
//!
//! Each is a [`Compute`]: what it does to a kept tensor that it is given to fill. [`Filling`] makes an
//! op of tract's of it, and its result's type and shape are known before it runs.

use std::fmt::{self, Debug};
use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;

use super::facts::elements;
use super::memory::Results;
use crate::kernels::{Conv, Planar, Workers, block, unblock};

/// A computation with one result, of a shape known beforehand.
pub(super) trait Compute: Clone + Debug + PartialEq + Send + Sync + 'static {
    /// The op's name.
    const NAME: &'static str;

    /// Writes every element of `output` that anybody reads.
    ///
    /// # Errors
    /// Inputs of another type or size.
    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()>;
}

/// An op that computes `C` into a kept tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Filling<C> {
    compute: C,
    results: Results,
}

impl<C: Compute> Filling<C> {
    pub(super) fn new(compute: C, results: Results) -> Filling<C> {
        Filling { compute, results }
    }
}

impl<C: Compute> Eq for Filling<C> {}

impl<C: Compute> Op for Filling<C> {
    fn name(&self) -> StaticName {
        C::NAME.into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{:?}", self.compute)])
    }

    fn validation(&self) -> Validation {
        Validation::Rounding
    }

    op_as_typed_op!();
}

impl<C: Compute> EvalOp for Filling<C> {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        Ok(tvec!(self.results.filled(|output| self.compute.fill(&inputs, output))?))
    }
}

impl<C: Compute> TypedOp for Filling<C> {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

/// An op's first input.
fn first(inputs: &[TValue]) -> TractResult<&TValue> {
    inputs.first().context("an op without an input")
}

/// A convolution with bias, sums and activation.
#[derive(Clone)]
pub(super) struct Fused {
    pub conv: Arc<Conv>,
    pub workers: Arc<dyn Workers + Send>,
}

impl Debug for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.conv.spec())
    }
}

impl PartialEq for Fused {
    fn eq(&self, other: &Fused) -> bool {
        Arc::ptr_eq(&self.conv, &other.conv)
    }
}

impl Compute for Fused {
    const NAME: &'static str = "BlockedConv";

    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()> {
        let input = elements::<f32>(first(inputs)?)?;
        let addends = inputs[1..].iter().map(|addend| elements::<f32>(addend));
        let addends = addends.collect::<TractResult<TVec<&[f32]>>>()?;
        let mut output = output.try_as_plain_ram_mut()?;
        self.conv.run(input, &addends, output.as_slice_mut::<f32>()?, &*self.workers)?;
        Ok(())
    }
}

/// Planar to blocked, from f32 or f16.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ToBlocks {
    /// Of the planar tensor; other lanes become zero.
    pub channels: usize,
}

impl Compute for ToBlocks {
    const NAME: &'static str = "ToBlocks";

    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()> {
        let input = first(inputs)?;
        let from = match input.datum_type() == f16::datum_type() {
            true => Planar::F16(elements::<f16>(input)?),
            false => Planar::F32(elements::<f32>(input)?),
        };
        let &[batch, _, height, width, lanes] = output.shape() else { bail!("is not blocked") };
        let mut output = output.try_as_plain_ram_mut()?;
        let sizes = [batch, self.channels, height * width];
        block(from, sizes, output.as_slice_mut::<f32>()?, lanes)?;
        Ok(())
    }
}

/// Blocked to planar, to f32 or f16.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ToPlanes {
    /// The first channel taken.
    pub first: usize,
}

impl Compute for ToPlanes {
    const NAME: &'static str = "ToPlanes";

    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()> {
        let input = first(inputs)?;
        let from = elements::<f32>(input)?;
        let &[batch, _, height, width, lanes] = input.shape() else { bail!("is not blocked") };
        let sizes = [batch, output.shape()[1], height * width];
        let datum = output.datum_type();
        let mut output = output.try_as_plain_ram_mut()?;
        match datum == f16::datum_type() {
            true => unblock(from, self.first, sizes, output.as_slice_mut::<f16>()?, lanes)?,
            false => unblock(from, self.first, sizes, output.as_slice_mut::<f32>()?, lanes)?,
        }
        Ok(())
    }
}

/// A blocked tensor times a number for each channel, itself blocked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scale;

impl Compute for Scale {
    const NAME: &'static str = "BlockedScale";

    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()> {
        let [input, factors] = inputs else { bail!("a product of other than two tensors") };
        let &[_, _, height, width, lanes] = output.shape() else { bail!("is not blocked") };
        let (from, factors) = (elements::<f32>(input)?, elements::<f32>(factors)?);
        let mut output = output.try_as_plain_ram_mut()?;
        let plane = height * width * lanes;
        let to = output.as_slice_mut::<f32>()?.chunks_exact_mut(plane);
        let blocks = from.chunks_exact(plane).zip(factors.chunks_exact(lanes));
        for (to, (from, factors)) in to.zip(blocks) {
            for (to, from) in to.chunks_exact_mut(lanes).zip(from.chunks_exact(lanes)) {
                for ((to, from), factor) in to.iter_mut().zip(from).zip(factors) {
                    *to = from * factor;
                }
            }
        }
        Ok(())
    }
}

/// Sums over all pixels of each channel of a blocked tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sums;

impl Compute for Sums {
    const NAME: &'static str = "BlockedSums";

    fn fill(&self, inputs: &[TValue], output: &mut Tensor) -> TractResult<()> {
        let input = first(inputs)?;
        let &[_, _, height, width, lanes] = input.shape() else { bail!("is not blocked") };
        let from = elements::<f32>(input)?;
        let mut output = output.try_as_plain_ram_mut()?;
        let to = output.as_slice_mut::<f32>()?.chunks_exact_mut(lanes);
        for (to, from) in to.zip(from.chunks_exact(height * width * lanes)) {
            to.fill(0.0);
            for from in from.chunks_exact(lanes) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
        }
        Ok(())
    }
}
