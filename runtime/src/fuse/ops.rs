//! Computations on blocked tensors, one result each.
//!
//! Each is a [`Compute`]: what it does with elements it is given, to memory it is given to fill. Shapes
//! are known when it is made. [`super::run`] makes ops of tract's of them.

use std::fmt::{self, Debug};
use std::sync::Arc;

use crate::kernels::{
    Addend, Conv, ConvError, Isa, Planar, PlanarMut, Sum, Term, Workers, block, unblock,
};

/// What a computation reads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand<'a> {
    /// A tensor's elements.
    Elements(Planar<'a>),
    /// What the result's own memory holds.
    Result,
}

impl<'a> Operand<'a> {
    fn numbers(&self) -> Result<&'a [f32], ConvError> {
        match self {
            Operand::Elements(Planar::F32(numbers)) => Ok(numbers),
            _ => Err(ConvError::Spec("an input is not f32")),
        }
    }
}

fn numbers(output: PlanarMut<'_>) -> Result<&mut [f32], ConvError> {
    match output {
        PlanarMut::F32(numbers) => Ok(numbers),
        PlanarMut::F16(_) => Err(ConvError::Spec("the output is not f32")),
    }
}

/// A computation with one result, of a shape known beforehand.
pub(super) trait Compute: Debug + Send + Sync {
    /// The computation's name.
    fn name(&self) -> &'static str;

    /// Whether an input without halo, of the result's shape, may lie in the result's own memory: each
    /// element is then read before it is overwritten, and not again.
    fn may_overwrite(&self, _input: usize) -> bool {
        false
    }

    /// Writes every element of `output` that anybody reads.
    ///
    /// # Errors
    /// Inputs of another type or size.
    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError>;
}

/// A convolution with bias, sums and activation.
pub(super) struct Fused {
    pub conv: Conv,
    pub workers: Arc<dyn Workers + Send>,
}

impl Debug for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.conv.spec())
    }
}

impl Compute for Fused {
    fn name(&self) -> &'static str {
        "BlockedConv"
    }

    fn may_overwrite(&self, input: usize) -> bool {
        input > 0 && self.conv.spec().halo.is_none()
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        let (input, added) = inputs.split_first().ok_or(ConvError::Spec("no input"))?;
        let mut addends = [Addend::Output; 2];
        for (addend, added) in addends.iter_mut().zip(added) {
            if let Operand::Elements(_) = added {
                *addend = Addend::Elements(added.numbers()?);
            }
        }
        let addends = &addends[..added.len().min(2)];
        self.conv.run(input.numbers()?, addends, numbers(output)?, &*self.workers)
    }
}

/// A sum of blocked and planar tensors with its activation.
pub(super) struct Added {
    pub sum: Sum,
    /// For each term: how many channels it has where it is planar.
    pub planar: Vec<Option<usize>>,
    pub workers: Arc<dyn Workers + Send>,
}

impl Debug for Added {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.sum.spec(), self.planar)
    }
}

impl Compute for Added {
    fn name(&self) -> &'static str {
        "BlockedSum"
    }

    fn may_overwrite(&self, input: usize) -> bool {
        self.planar[input].is_none() && self.sum.spec().halo.is_none()
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        let mut terms = [Term::Result; crate::kernels::MOST_TERMS];
        for ((term, operand), planar) in terms.iter_mut().zip(inputs).zip(&self.planar) {
            *term = match (operand, *planar) {
                (Operand::Result, _) => Term::Result,
                (Operand::Elements(elements), Some(channels)) => {
                    Term::Planar { elements: *elements, channels }
                }
                (Operand::Elements(_), None) => Term::Blocked(operand.numbers()?),
            };
        }
        let count = inputs.len().min(terms.len());
        self.sum.run(&terms[..count], numbers(output)?, &*self.workers)
    }
}

/// Planar to blocked, from f32 or f16.
#[derive(Debug)]
pub(super) struct ToBlocks {
    /// Images, channels and pixels of the planar tensor; other lanes become zero.
    pub sizes: [usize; 3],
    pub isa: Isa,
}

impl Compute for ToBlocks {
    fn name(&self) -> &'static str {
        "ToBlocks"
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        match inputs {
            [Operand::Elements(from)] => block(*from, self.sizes, numbers(output)?, self.isa),
            _ => Err(ConvError::Spec("other than one input")),
        }
    }
}

/// Blocked to planar, to f32 or f16.
#[derive(Debug)]
pub(super) struct ToPlanes {
    /// The first channel taken.
    pub first: usize,
    /// Images, channels and pixels of the planar tensor.
    pub sizes: [usize; 3],
    pub isa: Isa,
}

impl Compute for ToPlanes {
    fn name(&self) -> &'static str {
        "ToPlanes"
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        let [from] = inputs else { return Err(ConvError::Spec("other than one input")) };
        unblock(from.numbers()?, self.first, self.sizes, output, self.isa)
    }
}

/// A blocked tensor times a number for each channel, itself blocked.
#[derive(Debug)]
pub(super) struct Scale {
    pub pixels: usize,
    pub lanes: usize,
}

impl Compute for Scale {
    fn name(&self) -> &'static str {
        "BlockedScale"
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        let [from, factors] = inputs else {
            return Err(ConvError::Spec("a product of other than two tensors"));
        };
        let lanes = self.lanes;
        let to = numbers(output)?.chunks_exact_mut(self.pixels * lanes);
        let from = from.numbers()?.chunks_exact(self.pixels * lanes);
        for (to, (from, factors)) in to.zip(from.zip(factors.numbers()?.chunks_exact(lanes))) {
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
#[derive(Debug)]
pub(super) struct Sums {
    pub pixels: usize,
    pub lanes: usize,
}

impl Compute for Sums {
    fn name(&self) -> &'static str {
        "BlockedSums"
    }

    fn fill(&self, inputs: &[Operand<'_>], output: PlanarMut<'_>) -> Result<(), ConvError> {
        let [from] = inputs else { return Err(ConvError::Spec("other than one input")) };
        let from = from.numbers()?.chunks_exact(self.pixels * self.lanes);
        for (to, from) in numbers(output)?.chunks_exact_mut(self.lanes).zip(from) {
            to.fill(0.0);
            for from in from.chunks_exact(self.lanes) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
            }
        }
        Ok(())
    }
}
