//! Convolution on channel-blocked tensors, for the instruction set at hand.
//!
//! A *blocked* tensor is `[batch, blocks, height, width, lanes]`: channel `c` is lane `c % lanes` of block
//! `c / lanes`, and `lanes` is the width of a vector ([`Isa::lanes`]). Lanes beyond the last channel
//! hold anything and are never read. A *planar* one is the ordinary `[batch, channels, height, width]`.
//!
//! [`Conv`] packs weights once and computes a convolution with its bias, up to two tensors to add, and
//! an activation; [`Sum`] adds planar and blocked tensors and activates what comes of it; [`layout`] turns
//! planar into blocked and back, to and from f16 where asked.
//! Everything here is safe to call: sizes are checked before a kernel runs, and an [`Isa`] can only be had where the
//! machine has its instructions. The kernels inside are the crate's only unsafe code.

#![allow(
    unsafe_code,
    reason = "vector instructions and unchecked addresses in the innermost loops"
)]

pub mod conv;
pub mod layout;
pub mod spec;
pub mod sum;

mod gather;
mod lanes;
mod peak;
mod strip;
mod table;
#[cfg(test)]
mod tests;
mod turn;

pub use conv::{Addend, Conv};
pub use layout::{Planar, PlanarMut, block, unblock};
pub use peak::fma_loop;
pub use spec::{ConvError, ConvSpec, Halo};
pub use sum::{MOST_TERMS, Sum, SumSpec, Term};

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512F: 16 channels a block.
    Avx512,
    /// AVX2, FMA and F16C: 8 channels a block.
    Avx2,
    /// NEON: 8 channels a block, in pairs of registers.
    Neon,
    /// Plain Rust: 8 channels a block.
    Plain,
}

impl Isa {
    /// All of them, fastest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Plain];

    /// The fastest that this machine has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Plain)
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Plain => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Channels of a block.
    pub fn lanes(self) -> usize {
        table::width(self)
    }
}

/// What follows a convolution and its sums, element by element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `min(max(x, low), high)`: ReLU is 0 … ∞.
    Clamp {
        /// Smallest result.
        low: f32,
        /// Largest result.
        high: f32,
    },
    /// `x` where it is positive, `slope · x` elsewhere.
    Leaky {
        /// Factor of what is negative.
        slope: f32,
    },
    /// `x · min(max(x / 6 + ½, 0), 1)`.
    HardSwish,
}

/// Who computes a kernel's tasks.
pub trait Workers: Sync {
    /// How many compute at once.
    fn count(&self) -> usize;

    /// Does tasks 0 … `tasks − 1`, each once, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));

    /// Does `whole`, which may call [`Workers::run`] many times, where that costs least.
    fn within(&self, whole: &mut (dyn FnMut() + Send)) {
        whole();
    }
}

/// The caller's own thread.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Workers for Alone {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Sixteen f32 on one cache line: memory whose vectors never straddle two.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// f32 that begin on a cache line.
#[derive(Clone, Debug, Default)]
pub struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl Aligned {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Aligned {
        let mut aligned = Aligned::default();
        aligned.resize(len);
        aligned
    }

    /// Makes room for `len` elements; those that were there stay, new ones are zero.
    pub fn resize(&mut self, len: usize) {
        if len.div_ceil(16) > self.lines.len() {
            self.lines.resize(len.div_ceil(16), Line::default());
        }
        self.len = len;
    }

    /// The elements.
    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: `lines` holds at least `len` f32 without padding between them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// The elements, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as above, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Memory that several tasks write, each its own part.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: tasks write disjoint parts, and the memory outlives them: `Workers::run` returns when all
// are done.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}
