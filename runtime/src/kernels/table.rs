//! Which function computes a strip: one for each instruction set and tile.
//!
//! Takes an instruction set, the blocks and pixels of a tile and the layout; gives a kernel compiled
//! for exactly that, with every loop over them unrolled.

use super::Isa;
use super::conv::winograd::{self, Given, Taken, Transforms};
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
    ($dense:ident, $lanes:ident, $take:ident, $give:ident, $isa:ty $(, $feature:literal)*) => {
        $(#[target_feature(enable = $feature)])*
        unsafe fn $dense<
            const OB: usize,
            const PX: usize,
            const PLANAR: bool,
            const STEP: usize,
        >(
            strip: &Strip<'_>,
        ) {
            // SAFETY: the caller's promise.
            unsafe { strip::dense::<$isa, OB, PX, PLANAR, STEP>(strip) }
        }

        $(#[target_feature(enable = $feature)])*
        unsafe fn $lanes<const PX: usize, const KW: usize, const STEP: usize>(strip: &Strip<'_>) {
            // SAFETY: the caller's promise.
            unsafe { strip::lanes::<$isa, PX, KW, STEP>(strip) }
        }

        $(#[target_feature(enable = $feature)])*
        unsafe fn $take(taken: &Taken) {
            // SAFETY: the caller's promise.
            unsafe { winograd::take::<$isa>(taken) }
        }

        $(#[target_feature(enable = $feature)])*
        unsafe fn $give(given: &Given) {
            // SAFETY: the caller's promise.
            unsafe { winograd::give::<$isa>(given) }
        }
    };
}

compiled!(dense_plain, lanes_plain, take_plain, give_plain, Plain);
#[cfg(target_arch = "x86_64")]
compiled!(dense_avx2, lanes_avx2, take_avx2, give_avx2, Avx2, "avx2", "fma");
#[cfg(target_arch = "x86_64")]
compiled!(dense_avx512, lanes_avx512, take_avx512, give_avx512, Avx512, "avx512f");
#[cfg(target_arch = "aarch64")]
compiled!(dense_neon, lanes_neon, take_neon, give_neon, Neon, "neon");

macro_rules! dense_of_width {
    ($function:ident, $ob:literal, $px:expr, $planar:literal, $step:literal, $($width:literal)*) => {
        match $px {
            $($width => Some($function::<$ob, $width, $planar, $step> as Kernel),)*
            _ => None,
        }
    };
}

/// The instance of `$function` for a tile; `$one` and `$two` are the widths that there are.
macro_rules! choose_dense {
    ($function:ident, $ob:expr, $px:expr, $planar:expr, $step:expr,
     [$($one:literal)*], [$($two:literal)*]) => {
        match ($ob, $planar, $step) {
            (1, false, 1) => dense_of_width!($function, 1, $px, false, 1, $($one)*),
            (1, false, 2) => dense_of_width!($function, 1, $px, false, 2, $($one)*),
            (1, true, 1) => dense_of_width!($function, 1, $px, true, 1, $($one)*),
            (2, false, 1) => dense_of_width!($function, 2, $px, false, 1, $($two)*),
            (2, false, 2) => dense_of_width!($function, 2, $px, false, 2, $($two)*),
            (2, true, 1) => dense_of_width!($function, 2, $px, true, 1, $($two)*),
            _ => None,
        }
    };
}

/// Largest distance of pixels that there are kernels for.
pub(crate) const WIDEST_STEP: usize = 2;

/// A dense kernel of `ob` blocks and `px` pixels, at most [`widest`]; `step` pixels of the input lie
/// between those of neighbouring ones: at most [`WIDEST_STEP`], and 1 where the input is planar.
pub(crate) fn dense(isa: Isa, ob: usize, px: usize, planar: bool, step: usize) -> Option<Kernel> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => choose_dense!(dense_avx512, ob, px, planar, step,
            [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16], [1 2 3 4 5 6 7 8 9 10 11 12 13 14]),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => choose_dense!(dense_avx2, ob, px, planar, step,
            [1 2 3 4 5 6 7 8 9 10 11 12], [1 2 3 4 5 6]),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => choose_dense!(dense_neon, ob, px, planar, step,
            [1 2 3 4 5 6 7 8 9 10 11 12], [1 2 3 4 5 6]),
        _ => choose_dense!(dense_plain, ob, px, planar, step, [1 2 3 4 5 6], [1 2 3]),
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
    ($function:ident, $px:expr, $kw:literal, $step:literal, $($width:literal)*) => {
        match $px {
            $($width => Some($function::<$width, $kw, $step> as Kernel),)*
            _ => None,
        }
    };
}

macro_rules! choose_lanes {
    ($function:ident, $px:expr, $row:expr, $step:expr, $($width:literal)*) => {
        match ($row, $step) {
            (3, 1) => lanes_of_width!($function, $px, 3, 1, $($width)*),
            (5, 1) => lanes_of_width!($function, $px, 5, 1, $($width)*),
            (3, 2) => lanes_of_width!($function, $px, 3, 2, $($width)*),
            (5, 2) => lanes_of_width!($function, $px, 5, 2, $($width)*),
            (_, 1) => lanes_of_width!($function, $px, 1, 1, $($width)*),
            (_, 2) => lanes_of_width!($function, $px, 1, 2, $($width)*),
            _ => None,
        }
    };
}

/// A kernel for narrow groups, of `px` pixels, at most [`widest_lanes`]; `row` is the length of a row
/// of taps whose pixels are neighbours, `step` as for [`dense`].
pub(crate) fn lanes(isa: Isa, px: usize, row: usize, step: usize) -> Option<Kernel> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => choose_lanes!(lanes_avx512, px, row, step,
            1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => choose_lanes!(lanes_avx2, px, row, step, 1 2 3 4 5 6 7 8),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => choose_lanes!(lanes_neon, px, row, step, 1 2 3 4 5 6 7 8),
        _ => choose_lanes!(lanes_plain, px, row, step, 1 2 3 4),
    }
}

/// Winograd's transforms.
pub(crate) fn transforms(isa: Isa) -> Transforms {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Transforms { take: take_avx512, give: give_avx512 },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Transforms { take: take_avx2, give: give_avx2 },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Transforms { take: take_neon, give: give_neon },
        _ => Transforms { take: take_plain, give: give_plain },
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
