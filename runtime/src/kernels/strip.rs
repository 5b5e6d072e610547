//! The innermost loops: a strip of output pixels, whole in registers.
//!
//! A strip is a run of neighbouring pixels of one output row, `OB` blocks of output channels deep,
//! computed in tiles of `PX` pixels whose `OB · PX` vectors of sums stay in registers. [`dense`] reads
//! one input channel at a time and multiplies it with a vector of output channels; [`lanes`] is for
//! groups narrower than a vector, where an input vector is multiplied with itself shuffled. Both add
//! what is to be added and apply the activation before the sums are written, once. `STEP` is how many
//! input pixels lie between those of neighbouring output pixels.

#![allow(clippy::needless_range_loop, reason = "register arrays are indexed together")]

use super::Activation;
use super::lanes::Lanes;

/// What a strip is computed from. Steps and offsets count f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strip<'a> {
    /// First pixel under the kernel's first tap, first block or plane of the group.
    pub input: *const f32,
    /// Packed weights, in the order the loops run.
    pub weights: *const f32,
    /// `OB` vectors.
    pub bias: *const f32,
    /// First pixel of the first output block.
    pub output: *mut f32,
    /// Same for each tensor to be added; null where there is none.
    pub addends: [*const f32; 2],
    /// Tiles in the strip.
    pub tiles: usize,
    /// Offset of each kernel tap.
    pub taps: &'a [usize],
    /// Blocks of input channels; 1 where the input is planar.
    pub blocks: usize,
    /// Channels of the last block; of all where the input is planar.
    pub last: usize,
    /// From one block to the next; between planes where the input is planar.
    pub input_step: usize,
    /// From one output block to the next.
    pub output_step: usize,
    /// From one block to the next of what is added.
    pub addend_step: usize,
    /// What is done with the sums.
    pub activation: Activation,
    /// [`lanes`]: a vector of lane numbers for each channel of a group.
    pub shuffles: &'a [i32],
}

/// A function that computes strips: [`dense`] or [`lanes`] for one instruction set and tile.
pub(crate) type Kernel = unsafe fn(&Strip<'_>);

/// Every output channel of a group depends on every input channel of it.
///
/// # Safety
/// The machine has `L`'s instructions; every address that the strip's steps lead to is valid.
#[inline(always)]
pub(crate) unsafe fn dense<
    L: Lanes,
    const OB: usize,
    const PX: usize,
    const PLANAR: bool,
    const STEP: usize,
>(
    strip: &Strip<'_>,
) {
    let pixel = STEP * if PLANAR { 1 } else { L::WIDTH };
    let channel = if PLANAR { strip.input_step } else { 1 };
    for tile in 0..strip.tiles {
        let first = tile * PX;
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = start::<L, OB, PX>(strip);
            let mut weights = strip.weights;
            for block in 0..strip.blocks {
                let channels = if block + 1 == strip.blocks { strip.last } else { L::WIDTH };
                let input = strip.input.add(first * pixel + block * strip.input_step);
                for &tap in strip.taps {
                    let mut from = input.add(tap);
                    for _ in 0..channels {
                        let mut vectors = [L::splat(0.0); OB];
                        for o in 0..OB {
                            vectors[o] = L::load(weights.add(o * L::WIDTH));
                        }
                        for p in 0..PX {
                            let x = L::splat(*from.add(p * pixel));
                            for o in 0..OB {
                                sums[o][p] = L::fma(x, vectors[o], sums[o][p]);
                            }
                        }
                        weights = weights.add(OB * L::WIDTH);
                        from = from.add(channel);
                    }
                }
            }
            finish::<L, OB, PX>(strip, first, sums);
        }
    }
}

/// Groups of as many output as input channels that divide a vector; one, where it is depthwise.
///
/// # Safety
/// As for [`dense`]; the input is blocked. `KW` is the length of a row of taps at neighbouring pixels,
/// 1 where each tap is by itself.
#[inline(always)]
pub(crate) unsafe fn lanes<L: Lanes, const PX: usize, const KW: usize, const STEP: usize>(
    strip: &Strip<'_>,
) {
    let channels = strip.shuffles.len() / L::WIDTH;
    for tile in 0..strip.tiles {
        let first = tile * PX;
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = start::<L, 1, PX>(strip);
            let input = strip.input.add(first * STEP * L::WIDTH);
            match channels {
                1 => neighbours::<L, PX, KW, STEP, true>(strip, input, &mut sums[0]),
                _ => neighbours::<L, PX, KW, STEP, false>(strip, input, &mut sums[0]),
            }
            finish::<L, 1, PX>(strip, first, sums);
        }
    }
}

/// A vector of the input, shuffled for channel `i` of each group where there is more than one.
#[inline(always)]
unsafe fn shuffled<L: Lanes, const DEPTHWISE: bool>(
    strip: &Strip<'_>,
    from: *const f32,
    i: usize,
) -> L::V {
    // SAFETY: the caller's promise.
    unsafe {
        match DEPTHWISE {
            true => L::load(from),
            false => L::permute(L::load(from), strip.shuffles.as_ptr().add(i * L::WIDTH)),
        }
    }
}

/// A row of neighbouring taps at a time: a vector, once shuffled, serves `KW` pixels.
#[inline(always)]
unsafe fn neighbours<
    L: Lanes,
    const PX: usize,
    const KW: usize,
    const STEP: usize,
    const DEPTHWISE: bool,
>(
    strip: &Strip<'_>,
    input: *const f32,
    sums: &mut [L::V; PX],
) {
    let channels = if DEPTHWISE { 1 } else { strip.shuffles.len() / L::WIDTH };
    let mut weights = strip.weights;
    // SAFETY: the caller's promise.
    unsafe {
        for taps in strip.taps.chunks_exact(KW) {
            let from = input.add(taps[0]);
            for i in 0..channels {
                let mut vectors = [L::splat(0.0); KW];
                for k in 0..KW {
                    vectors[k] = L::load(weights.add((k * channels + i) * L::WIDTH));
                }
                // Each vector of the input once: it lies under tap `k` of pixel `p` where
                // `p · STEP + k` is its column.
                for ahead in 0..PX + (KW - 1) / STEP {
                    for side in 0..STEP {
                        let x = ahead * STEP + side;
                        if x >= (PX - 1) * STEP + KW {
                            continue;
                        }
                        let v = shuffled::<L, DEPTHWISE>(strip, from.add(x * L::WIDTH), i);
                        for back in 0..(KW - 1) / STEP + 1 {
                            let k = back * STEP + side;
                            if k < KW && ahead >= back && ahead - back < PX {
                                let p = ahead - back;
                                sums[p] = L::fma(v, vectors[k], sums[p]);
                            }
                        }
                    }
                }
            }
            weights = weights.add(KW * channels * L::WIDTH);
        }
    }
}

/// Sums begin with the bias.
#[inline(always)]
unsafe fn start<L: Lanes, const OB: usize, const PX: usize>(strip: &Strip<'_>) -> [[L::V; PX]; OB] {
    // SAFETY: the caller's promise: `OB` vectors of bias.
    unsafe {
        let mut sums = [[L::splat(0.0); PX]; OB];
        for o in 0..OB {
            sums[o] = [L::load(strip.bias.add(o * L::WIDTH)); PX];
        }
        sums
    }
}

/// Adds, activates and writes.
#[inline(always)]
unsafe fn finish<L: Lanes, const OB: usize, const PX: usize>(
    strip: &Strip<'_>,
    first: usize,
    mut sums: [[L::V; PX]; OB],
) {
    // SAFETY: the caller's promise: every block's pixels are there.
    unsafe {
        for addend in strip.addends {
            if addend.is_null() {
                continue;
            }
            for o in 0..OB {
                let from = addend.add(o * strip.addend_step + first * L::WIDTH);
                for p in 0..PX {
                    sums[o][p] = L::add(sums[o][p], L::load(from.add(p * L::WIDTH)));
                }
            }
        }
        for o in 0..OB {
            let to = strip.output.add(o * strip.output_step + first * L::WIDTH);
            activate::<L, PX>(strip.activation, &mut sums[o]);
            for p in 0..PX {
                L::store(to.add(p * L::WIDTH), sums[o][p]);
            }
        }
    }
}

/// `activation` of each vector. A NaN stays one or becomes a bound, as in the scalar formula.
///
/// # Safety
/// The machine has `L`'s instructions.
#[inline(always)]
pub(crate) unsafe fn activate<L: Lanes, const N: usize>(activation: Activation, v: &mut [L::V; N]) {
    // SAFETY: the caller's promise.
    unsafe {
        match activation {
            Activation::None => {}
            Activation::Clamp { low, high } => {
                let (low, high) = (L::splat(low), L::splat(high));
                for x in v {
                    *x = L::min(L::max(*x, low), high);
                }
            }
            Activation::Leaky { slope } => {
                let (zero, slope) = (L::splat(0.0), L::splat(slope));
                for x in v {
                    *x = L::fma(L::min(*x, zero), slope, L::max(*x, zero));
                }
            }
            Activation::HardSwish => {
                let (zero, one) = (L::splat(0.0), L::splat(1.0));
                let (sixth, half) = (L::splat(1.0 / 6.0), L::splat(0.5));
                for x in v {
                    *x = L::mul(*x, L::max(zero, L::min(one, L::fma(*x, sixth, half))));
                }
            }
        }
    }
}
