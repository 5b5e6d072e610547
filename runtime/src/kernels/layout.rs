//! From planar tensors to blocked ones and back, through f16 where that is what travels.
//!
//! [`block`] fills a blocked tensor from a planar one of f32 or f16, which may have fewer channels: the
//! others become zero. [`unblock`] takes some channels of a blocked tensor out as planar f32, or as f16
//! rounded to nearest even. Both turn whole vectors at a time, see [`super::turn`].

use half::f16;

use super::spec::{ConvError, Halo, expect};
use super::sum::{Sum, SumSpec, Term};
use super::turn::{Element, Planes, PlanesRun, planes_of};
use super::{Activation, Alone, Isa};

/// Elements of a planar tensor, `[batch, channels, pixels]`.
#[derive(Clone, Copy, Debug)]
pub enum Planar<'a> {
    /// As they are computed with.
    F32(&'a [f32]),
    /// As they travel.
    F16(&'a [f16]),
}

impl Planar<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Planar::F32(from) => from.len(),
            Planar::F16(from) => from.len(),
        }
    }
}

/// Elements of a planar tensor to be written.
#[derive(Debug)]
pub enum PlanarMut<'a> {
    /// As they are computed with.
    F32(&'a mut [f32]),
    /// As they travel.
    F16(&'a mut [f16]),
}

/// Fills `to`, `[batch, ceil(all / lanes), pixels, lanes]`, with the `channels` of `from` and, from
/// channel `channels` to the last lane, zeros.
///
/// # Errors
/// Sizes that do not fit each other, or an instruction set that the machine lacks.
pub fn block(
    from: Planar<'_>,
    [batch, channels, pixels]: [usize; 3],
    to: &mut [f32],
    isa: Isa,
) -> Result<(), ConvError> {
    let all = to.len().checked_div(batch * pixels).unwrap_or(0);
    if channels > all {
        return Err(ConvError::Spec("more channels than the blocks hold"));
    }
    let spec = SumSpec {
        batch,
        channels: all,
        image: [1, pixels],
        halo: Halo::default(),
        activation: Activation::None,
    };
    Sum::new(spec, isa)?.run(&[Term::Planar { elements: from, channels }], to, &Alone)
}

/// Fills `to`, `[batch, channels, pixels]`, from channel `first` on of the blocked tensor `from`,
/// `[batch, blocks, pixels, lanes]`.
///
/// # Errors
/// Sizes that do not fit each other, or an instruction set that the machine lacks.
pub fn unblock(
    from: &[f32],
    first: usize,
    sizes: [usize; 3],
    to: PlanarMut<'_>,
    isa: Isa,
) -> Result<(), ConvError> {
    match to {
        PlanarMut::F32(to) => unblock_as(from, first, sizes, to, isa),
        PlanarMut::F16(to) => unblock_as(from, first, sizes, to, isa),
    }
}

fn unblock_as<T: Element>(
    from: &[f32],
    first: usize,
    [batch, channels, pixels]: [usize; 3],
    to: &mut [T],
    isa: Isa,
) -> Result<(), ConvError> {
    if !isa.is_available() {
        return Err(ConvError::Isa(isa));
    }
    let lanes = isa.lanes();
    let blocks = from.len().checked_div(batch * pixels * lanes).unwrap_or(0);
    expect("the planar tensor", to.len(), batch * channels * pixels)?;
    expect("the blocked tensor", from.len(), batch * blocks * pixels * lanes)?;
    if first + channels > blocks * lanes {
        return Err(ConvError::Spec("more channels than the blocks hold"));
    }
    let kernel = planes_of::<T>(isa);
    for image in 0..batch {
        let mut channel = first;
        while channel < first + channels {
            let (block, lane) = (channel / lanes, channel % lanes);
            let count = (lanes - lane).min(first + channels - channel);
            let at = (image * channels + channel - first) * pixels;
            let run = PlanesRun {
                from: from[(image * blocks + block) * pixels * lanes..].as_ptr(),
                pixels,
                first: lane,
                to: Planes { from: to[at..].as_mut_ptr(), step: pixels, channels: count },
            };
            // SAFETY: the machine has the instructions; the block's pixels lie in `from` and the planes of
            // `count` channels in `to`, by the sizes checked above.
            unsafe { kernel(&run) };
            channel += count;
        }
    }
    Ok(())
}
