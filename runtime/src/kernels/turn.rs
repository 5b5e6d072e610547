//! Pixels to channels and back: the loops between planar and blocked tensors, in registers.
//!
//! [`sum`] takes a run of pixels of one block from any number of tensors, planar or blocked, adds and
//! activates them and writes them blocked. [`planes`] writes a run of pixels of one block as planes.
//! Both turn as many pixels at once as a vector has lanes: that many vectors are transposed between
//! reading and writing, so that every access is of neighbours. What remains of a run goes through memory
//! of a vector's size, and nothing beyond the run is touched. [`sums`] and [`planes_of`] name the function
//! compiled for an instruction set.

#![allow(clippy::needless_range_loop, reason = "register arrays are indexed together")]

use half::f16;

use super::lanes::{Lanes, Plain, WIDEST};
use super::strip::activate;
use super::{Activation, Isa};

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
use super::lanes::Neon;

/// Elements that planes are made of.
pub(crate) trait Element: Copy {
    /// The one that zeros are read as.
    const ZERO: Self;

    /// Reads a vector.
    ///
    /// # Safety
    /// As for [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V;

    /// Writes a vector, rounded to nearest even.
    ///
    /// # Safety
    /// As for [`Lanes::store`].
    unsafe fn store<L: Lanes>(to: *mut Self, v: L::V);
}

impl Element for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load(from) }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(to: *mut f32, v: L::V) {
        // SAFETY: the caller's promise.
        unsafe { L::store(to, v) }
    }
}

impl Element for f16 {
    const ZERO: f16 = f16::ZERO;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f16) -> L::V {
        // SAFETY: the caller's promise.
        unsafe { L::load_half(from) }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(to: *mut f16, v: L::V) {
        // SAFETY: the caller's promise.
        unsafe { L::store_half(to, v) }
    }
}

/// Planes of the channels of one block, at the first pixel of a run. Steps count elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes<T> {
    /// The first channel's pixel.
    pub from: T,
    /// From one channel to the next.
    pub step: usize,
    /// How many there are; the block's other channels count as zero.
    pub channels: usize,
}

/// What is added, at the first pixel of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// Vectors of the block.
    Blocked(*const f32),
    /// Planes of f32.
    F32(Planes<*const f32>),
    /// Planes of f16.
    F16(Planes<*const f16>),
}

/// A run of pixels of one block of a sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SumRun<'a> {
    /// What is added, in this order; at least one.
    pub parts: &'a [Part],
    /// Pixels.
    pub pixels: usize,
    /// What follows.
    pub activation: Activation,
    /// The result's first pixel; may be where a blocked part is.
    pub to: *mut f32,
}

/// A run of pixels of one block that become planes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlanesRun<T> {
    /// The block's first pixel.
    pub from: *const f32,
    /// Pixels.
    pub pixels: usize,
    /// The block's first channel taken.
    pub first: usize,
    /// Where the channels go.
    pub to: Planes<*mut T>,
}

/// Adds, activates and writes a run.
///
/// # Safety
/// The machine has `L`'s instructions; every pointer is valid for the run.
#[inline(always)]
unsafe fn sum<L: Lanes>(run: &SumRun<'_>) {
    let whole = run.pixels / L::WIDTH * L::WIDTH;
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..whole).step_by(L::WIDTH) {
            sum_tile::<L, true>(run, first, L::WIDTH);
        }
        if whole < run.pixels {
            sum_tile::<L, false>(run, whole, run.pixels - whole);
        }
    }
}

/// `count` pixels of a sum, at most a vector's lanes, and exactly that many where `FULL`.
#[inline(always)]
unsafe fn sum_tile<L: Lanes, const FULL: bool>(run: &SumRun<'_>, first: usize, count: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = part::<L, FULL>(&run.parts[0], first, count);
        for more in &run.parts[1..] {
            let more = part::<L, FULL>(more, first, count);
            for p in 0..L::WIDTH {
                sums[p] = L::add(sums[p], more[p]);
            }
        }
        activate::<L, WIDEST>(run.activation, &mut sums);
        for p in 0..L::WIDTH {
            if FULL || p < count {
                L::store(run.to.add((first + p) * L::WIDTH), sums[p]);
            }
        }
    }
}

#[inline(always)]
unsafe fn part<L: Lanes, const FULL: bool>(
    part: &Part,
    first: usize,
    count: usize,
) -> [L::V; WIDEST] {
    // SAFETY: the caller's promise.
    unsafe {
        match part {
            Part::Blocked(from) => {
                let mut pixels = [L::splat(0.0); WIDEST];
                for p in 0..L::WIDTH {
                    if FULL || p < count {
                        pixels[p] = L::load(from.add((first + p) * L::WIDTH));
                    }
                }
                pixels
            }
            Part::F32(planes) => turned::<L, f32, FULL>(planes, first, count),
            Part::F16(planes) => turned::<L, f16, FULL>(planes, first, count),
        }
    }
}

/// Pixels of planes, as vectors of channels.
#[inline(always)]
unsafe fn turned<L: Lanes, T: Element, const FULL: bool>(
    planes: &Planes<*const T>,
    first: usize,
    count: usize,
) -> [L::V; WIDEST] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut rows = [L::splat(0.0); WIDEST];
        for c in 0..L::WIDTH {
            if c >= planes.channels {
                continue;
            }
            let from = planes.from.add(c * planes.step + first);
            rows[c] = match FULL {
                true => T::load::<L>(from),
                false => {
                    let mut rest = [T::ZERO; WIDEST];
                    std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), count);
                    T::load::<L>(rest.as_ptr())
                }
            };
        }
        L::transpose(&mut rows);
        rows
    }
}

/// Writes a run as planes.
///
/// # Safety
/// As for [`sum`].
#[inline(always)]
unsafe fn planes<L: Lanes, T: Element>(run: &PlanesRun<T>) {
    let whole = run.pixels / L::WIDTH * L::WIDTH;
    // SAFETY: the caller's promise.
    unsafe {
        for first in (0..whole).step_by(L::WIDTH) {
            planes_tile::<L, T, true>(run, first, L::WIDTH);
        }
        if whole < run.pixels {
            planes_tile::<L, T, false>(run, whole, run.pixels - whole);
        }
    }
}

#[inline(always)]
unsafe fn planes_tile<L: Lanes, T: Element, const FULL: bool>(
    run: &PlanesRun<T>,
    first: usize,
    count: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut rows = part::<L, FULL>(&Part::Blocked(run.from), first, count);
        L::transpose(&mut rows);
        for c in 0..L::WIDTH {
            if c < run.first || c - run.first >= run.to.channels {
                continue;
            }
            let to = run.to.from.add((c - run.first) * run.to.step + first);
            match FULL {
                true => T::store::<L>(to, rows[c]),
                false => {
                    let mut rest = [T::ZERO; WIDEST];
                    T::store::<L>(rest.as_mut_ptr(), rows[c]);
                    std::ptr::copy_nonoverlapping(rest.as_ptr(), to, count);
                }
            }
        }
    }
}

macro_rules! compiled {
    ($sum:ident, $planes:ident, $isa:ty $(, $feature:literal)*) => {
        $(#[target_feature(enable = $feature)])*
        unsafe fn $sum(run: &SumRun<'_>) {
            // SAFETY: the caller's promise.
            unsafe { sum::<$isa>(run) }
        }

        $(#[target_feature(enable = $feature)])*
        unsafe fn $planes<T: Element>(run: &PlanesRun<T>) {
            // SAFETY: the caller's promise.
            unsafe { planes::<$isa, T>(run) }
        }
    };
}

compiled!(sum_plain, planes_plain, Plain);
#[cfg(target_arch = "x86_64")]
compiled!(sum_avx2, planes_avx2, Avx2, "avx2", "fma", "f16c");
#[cfg(target_arch = "x86_64")]
compiled!(sum_avx512, planes_avx512, Avx512, "avx512f");
#[cfg(target_arch = "aarch64")]
compiled!(sum_neon, planes_neon, Neon, "neon");

/// [`sum`] for an instruction set.
pub(crate) fn sums(isa: Isa) -> unsafe fn(&SumRun<'_>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => sum_avx512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => sum_avx2,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => sum_neon,
        _ => sum_plain,
    }
}

/// [`planes`] for an instruction set.
pub(crate) fn planes_of<T: Element>(isa: Isa) -> unsafe fn(&PlanesRun<T>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => planes_avx512::<T>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => planes_avx2::<T>,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => planes_neon::<T>,
        _ => planes_plain::<T>,
    }
}
