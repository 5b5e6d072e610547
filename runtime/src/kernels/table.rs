//! Which function computes a strip: one for each instruction set and tile.
//!
//! Takes an instruction set, the blocks and pixels of a tile and the layout; gives a kernel compiled
//! for exactly that, with every loop over them unrolled.

use super::Isa;
use super::lanes::{Lanes, Plain};
use super::strip::{self, Kernel, Strip};

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
use super::lanes::Neon;

/// Registers that a dense tile may use for sums: blocks it is deep → pixels it is wide.
pub(crate) fn widest(isa: Isa, blocks: usize) -> usize {
    match (isa, blocks) {
        // 32 registers: sums, the weights of each block, one broadcast.
        (Isa::Avx512, 1) => 16,
        (Isa::Avx512, _) => 8,
        // 16 registers.
        (Isa::Avx2, 1) => 12,
        (Isa::Avx2, _) => 6,
        // 32 registers in pairs.
        (Isa::Neon, 1) => 12,
        (Isa::Neon, _) => 6,
        // SSE2 or what the compiler makes of it.
        (Isa::Plain, 1) => 6,
        (Isa::Plain, _) => 3,
    }
}

/// A function for each instruction set, compiled for it, that hands on to the generic one.
macro_rules! compiled {
    ($dense:ident, $lanes:ident, $isa:ty $(, $feature:literal)*) => {
        $(#[target_feature(enable = $feature)])*
        unsafe fn $dense<const OB: usize, const PX: usize, const PLANAR: bool>(strip: &Strip<'_>) {
            // SAFETY: the caller's promise.
            unsafe { strip::dense::<$isa, OB, PX, PLANAR>(strip) }
        }

        $(#[target_feature(enable = $feature)])*
        unsafe fn $lanes<const PX: usize, const KW: usize>(strip: &Strip<'_>) {
            // SAFETY: the caller's promise.
            unsafe { strip::lanes::<$isa, PX, KW>(strip) }
        }
    };
}

compiled!(dense_plain, lanes_plain, Plain);
#[cfg(target_arch = "x86_64")]
compiled!(dense_avx2, lanes_avx2, Avx2, "avx2", "fma");
#[cfg(target_arch = "x86_64")]
compiled!(dense_avx512, lanes_avx512, Avx512, "avx512f");
#[cfg(target_arch = "aarch64")]
compiled!(dense_neon, lanes_neon, Neon, "neon");

macro_rules! dense_of_width {
    ($function:ident, $ob:literal, $px:expr, $planar:literal, $($width:literal)*) => {
        match $px {
            $($width => Some($function::<$ob, $width, $planar> as Kernel),)*
            _ => None,
        }
    };
}

/// The instance of `$function` for a tile; `$one` and `$two` are the widths that there are.
macro_rules! choose_dense {
    ($function:ident, $ob:expr, $px:expr, $planar:expr, [$($one:literal)*], [$($two:literal)*]) => {
        match ($ob, $planar) {
            (1, false) => dense_of_width!($function, 1, $px, false, $($one)*),
            (1, true) => dense_of_width!($function, 1, $px, true, $($one)*),
            (2, false) => dense_of_width!($function, 2, $px, false, $($two)*),
            (2, true) => dense_of_width!($function, 2, $px, true, $($two)*),
            _ => None,
        }
    };
}

/// A dense kernel of `ob` blocks and `px` pixels, at most [`widest`].
pub(crate) fn dense(isa: Isa, ob: usize, px: usize, planar: bool) -> Option<Kernel> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => choose_dense!(dense_avx512, ob, px, planar,
            [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16], [1 2 3 4 5 6 7 8 9 10 11 12 13 14]),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => choose_dense!(dense_avx2, ob, px, planar,
            [1 2 3 4 5 6 7 8 9 10 11 12], [1 2 3 4 5 6]),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => choose_dense!(dense_neon, ob, px, planar,
            [1 2 3 4 5 6 7 8 9 10 11 12], [1 2 3 4 5 6]),
        _ => choose_dense!(dense_plain, ob, px, planar, [1 2 3 4 5 6], [1 2 3]),
    }
}

/// Pixels of the widest tile for narrow groups.
pub(crate) fn widest_lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 8,
        Isa::Avx2 | Isa::Neon => 8,
        Isa::Plain => 4,
    }
}

macro_rules! lanes_of_width {
    ($function:ident, $px:expr, $kw:literal, $($width:literal)*) => {
        match $px {
            $($width => Some($function::<$width, $kw> as Kernel),)*
            _ => None,
        }
    };
}

macro_rules! choose_lanes {
    ($function:ident, $px:expr, $kw:expr, $($width:literal)*) => {
        match $kw {
            3 => lanes_of_width!($function, $px, 3, $($width)*),
            _ => lanes_of_width!($function, $px, 0, $($width)*),
        }
    };
}

/// A kernel for narrow groups, of `px` pixels, at most [`widest_lanes`]; `row` is the length of a row
/// of taps whose pixels are neighbours.
pub(crate) fn lanes(isa: Isa, px: usize, row: usize) -> Option<Kernel> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => choose_lanes!(lanes_avx512, px, row,
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => choose_lanes!(lanes_avx2, px, row, 1 2 3 4 5 6 7 8),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => choose_lanes!(lanes_neon, px, row, 1 2 3 4 5 6 7 8),
        _ => choose_lanes!(lanes_plain, px, row, 1 2 3 4),
    }
}

/// f32 in a vector of `isa`: channels of a block.
pub(crate) fn width(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Avx512::WIDTH,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Avx2::WIDTH,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Neon::WIDTH,
        _ => Plain::WIDTH,
    }
}
