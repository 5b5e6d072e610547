//! From planar tensors to blocked ones and back, through f16 where that is what travels.
//!
//! [`block`] fills a blocked tensor from a planar one of f32 or f16, which may have fewer channels: the
//! others become zero. [`unblock`] takes some channels of a blocked tensor out as planar f32, or as f16
//! rounded to nearest even.

use half::f16;
use half::slice::HalfFloatSliceExt as _;

use super::conv::{ConvError, expect};

/// Elements of a planar tensor, `[batch, channels, pixels]`.
#[derive(Clone, Copy, Debug)]
pub enum Planar<'a> {
    /// As they are computed with.
    F32(&'a [f32]),
    /// As they travel.
    F16(&'a [f16]),
}

impl Planar<'_> {
    fn len(&self) -> usize {
        match self {
            Planar::F32(from) => from.len(),
            Planar::F16(from) => from.len(),
        }
    }
}

/// Pixels turned at once: what is read and written stays in the first cache.
const STRETCH: usize = 64;

/// Fills `to`, `[batch, ceil(all / lanes), pixels, lanes]`, with the `channels` of `from` and, from
/// channel `channels` to the last lane, zeros.
///
/// # Errors
/// Sizes that do not fit each other.
pub fn block(
    from: Planar<'_>,
    [batch, channels, pixels]: [usize; 3],
    to: &mut [f32],
    lanes: usize,
) -> Result<(), ConvError> {
    let blocks = to.len().checked_div(batch * pixels * lanes).unwrap_or(0);
    expect("the planar tensor", from.len(), batch * channels * pixels)?;
    expect("the blocked tensor", to.len(), batch * blocks * pixels * lanes)?;
    if channels > blocks * lanes {
        return Err(ConvError::Spec("more channels than the blocks hold"));
    }
    let mut wide = [0.0; STRETCH];
    for (at, to) in to.chunks_exact_mut(pixels * lanes).enumerate() {
        let (image, first) = (at / blocks, at % blocks * lanes);
        if first + lanes > channels {
            to.fill(0.0);
        }
        for (start, to) in to.chunks_mut(STRETCH * lanes).enumerate() {
            let count = to.len() / lanes;
            for channel in first..(first + lanes).min(channels) {
                let at = (image * channels + channel) * pixels + start * STRETCH;
                let row = match from {
                    Planar::F32(from) => &from[at..at + count],
                    Planar::F16(from) => {
                        from[at..at + count].convert_to_f32_slice(&mut wide[..count]);
                        &wide[..count]
                    }
                };
                for (to, &x) in to[channel - first..].iter_mut().step_by(lanes).zip(row) {
                    *to = x;
                }
            }
        }
    }
    Ok(())
}

/// An element of a planar tensor to be written.
pub trait Element: Copy {
    /// `from`, rounded to nearest even.
    fn round(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    fn round(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for f16 {
    fn round(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

/// Fills `to`, `[batch, channels, pixels]`, from channel `first` on of the blocked tensor `from`,
/// `[batch, blocks, pixels, lanes]`.
///
/// # Errors
/// Sizes that do not fit each other.
pub fn unblock<T: Element>(
    from: &[f32],
    first: usize,
    [batch, channels, pixels]: [usize; 3],
    to: &mut [T],
    lanes: usize,
) -> Result<(), ConvError> {
    let blocks = from.len().checked_div(batch * pixels * lanes).unwrap_or(0);
    expect("the planar tensor", to.len(), batch * channels * pixels)?;
    expect("the blocked tensor", from.len(), batch * blocks * pixels * lanes)?;
    if first + channels > blocks * lanes {
        return Err(ConvError::Spec("more channels than the blocks hold"));
    }
    let mut row = [0.0; STRETCH];
    for (at, to) in to.chunks_exact_mut(pixels.max(1)).enumerate() {
        let (image, channel) = (at / channels, first + at % channels);
        let block = image * blocks + channel / lanes;
        let from = &from[block * pixels * lanes..][..pixels * lanes];
        for (start, to) in to.chunks_mut(STRETCH).enumerate() {
            let from = from[start * STRETCH * lanes + channel % lanes..].iter().step_by(lanes);
            let row = &mut row[..to.len()];
            row.iter_mut().zip(from).for_each(|(row, &x)| *row = x);
            T::round(row, to);
        }
    }
    Ok(())
}
