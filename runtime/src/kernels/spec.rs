//! What is convolved: [`ConvSpec`], and what is wrong with one that makes no convolution.
//!
//! Takes sizes as a model states them; gives the output's extent, and the form that is computed: a
//! 1×1 convolution that moves nothing sees one long row. [`Halo`] are the zeros that a tensor is stored with.

use super::{Activation, Isa};

/// Rows and columns of zeros around an image, stored with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Halo {
    /// Rows above.
    pub top: usize,
    /// Columns before.
    pub left: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns after.
    pub right: usize,
}

impl Halo {
    /// Whether there is none.
    pub fn is_none(self) -> bool {
        self == Halo::default()
    }

    /// On each side the larger of two.
    pub fn max(self, other: Halo) -> Halo {
        Halo {
            top: self.top.max(other.top),
            left: self.left.max(other.left),
            bottom: self.bottom.max(other.bottom),
            right: self.right.max(other.right),
        }
    }

    /// Whether `other` fits into it.
    pub(super) fn covers(self, other: Halo) -> bool {
        self.max(other) == self
    }

    /// Height and width of an image with its halo.
    pub fn around(self, [height, width]: [usize; 2]) -> [usize; 2] {
        [height + self.top + self.bottom, width + self.left + self.right]
    }
}

/// What is convolved, and how. Dilation is 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvSpec {
    /// Images.
    pub batch: usize,
    /// Channels taken.
    pub input: usize,
    /// Channels given.
    pub output: usize,
    /// Groups that do not mix.
    pub groups: usize,
    /// Height and width of the input, without its margin.
    pub image: [usize; 2],
    /// Zeros stored around the input, for its padding.
    pub margin: Halo,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Rows and columns from one output pixel to the next.
    pub stride: [usize; 2],
    /// Zeros taken to stand around the input.
    pub pads: Halo,
    /// Zeros that stand around the output: they are left as they are.
    pub halo: Halo,
    /// Whether the input is planar.
    pub planar: bool,
    /// What follows the sums.
    pub activation: Activation,
}

impl ConvSpec {
    /// Height and width of the output, without its halo.
    pub fn extent(&self) -> Option<[usize; 2]> {
        let padded = self.pads.around(self.image);
        let mut extent = [0; 2];
        for axis in 0..2 {
            let free = padded[axis].checked_sub(self.kernel[axis])?;
            extent[axis] = free.checked_div(self.stride[axis])? + 1;
        }
        Some(extent)
    }
}

/// Why a convolution cannot be computed here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConvError {
    /// Sizes that make no convolution.
    #[error("{0}")]
    Spec(&'static str),
    /// The machine lacks the instruction set.
    #[error("{0:?} is not available")]
    Isa(Isa),
    /// A tensor of another size than the convolution's.
    #[error("{what} has {found} elements, expected {expected}")]
    Size {
        /// Which tensor.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// Elements it should have.
        expected: usize,
    },
}

pub(super) fn expect(what: &'static str, found: usize, expected: usize) -> Result<(), ConvError> {
    match found == expected {
        true => Ok(()),
        false => Err(ConvError::Size { what, found, expected }),
    }
}

pub(super) fn check(spec: ConvSpec) -> Result<ConvSpec, ConvError> {
    let counts = [spec.batch, spec.input, spec.output, spec.groups];
    let extents = [spec.image, spec.kernel, spec.stride].concat();
    if counts.into_iter().chain(extents).any(|count| count == 0) {
        return Err(ConvError::Spec("something is 0"));
    }
    if !spec.input.is_multiple_of(spec.groups) || !spec.output.is_multiple_of(spec.groups) {
        return Err(ConvError::Spec("groups do not divide the channels"));
    }
    Ok(spec)
}

/// A 1×1 convolution that moves nothing sees one long row.
pub(super) fn flat(spec: ConvSpec) -> ConvSpec {
    let still = spec.kernel == [1, 1] && spec.stride == [1, 1];
    match still && [spec.pads, spec.halo, spec.margin].into_iter().all(Halo::is_none) {
        true => ConvSpec { image: [1, spec.image[0] * spec.image[1]], ..spec },
        false => spec,
    }
}

/// Output channels of a group and input channels of it.
pub(super) fn of_group(spec: &ConvSpec) -> [usize; 2] {
    [spec.output / spec.groups, spec.input / spec.groups]
}
