//! Two small matrix kernels that every convolution here comes down to.
//!
//! A *plane* is an input laid out flat, a *tap* the offset at which it is read. [`accumulate`] gives
//! `out[m][q] = Σ_k weight[m][k] · x[taps[k] + q]`: an input is read where it lies, as often as there
//! are taps, and never rearranged into a matrix. [`correlate`] gives its adjoint in the weights,
//! `out[m][k] += Σ_q y[m][q] · x[taps[k] + q]`. Both keep a block of results in registers, on the
//! widest vectors the processor has.

use pulp::{Arch, Simd, WithSimd};

/// Rows of results kept in registers at once.
const ROWS: usize = 6;

/// What [`accumulate`] reads.
#[derive(Clone, Copy)]
pub(crate) struct Taps<'a> {
    /// Where each tap begins in `x`.
    pub(crate) offsets: &'a [usize],
    /// The planes.
    pub(crate) x: &'a [f32],
    /// Values a row of results has.
    pub(crate) length: usize,
}

/// Weights `[rows, taps]` in the order in which [`accumulate`] reads them: four rows' weights of a
/// tap beside each other. A last block may have fewer rows.
pub(crate) fn pack(weight: impl Fn(usize, usize) -> f32, rows: usize, taps: usize) -> Vec<f32> {
    let mut packed = Vec::with_capacity(rows * taps);
    for first in (0..rows).step_by(ROWS) {
        let block = ROWS.min(rows - first);
        for tap in 0..taps {
            packed.extend((first..first + block).map(|row| weight(row, tap)));
        }
    }
    packed
}

/// Writes the first `taps.length` values of each row of `out`, whose rows are `stride` apart.
pub(crate) fn accumulate(packed: &[f32], taps: Taps, out: &mut [f32], stride: usize) {
    struct Run<'a>(&'a [f32], Taps<'a>, &'a mut [f32], usize);
    impl WithSimd for Run<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Run(packed, taps, out, stride) = self;
            let count = taps.offsets.len();
            let blocks = packed.chunks(ROWS * count).zip(out.chunks_mut(ROWS * stride));
            for (weights, out) in blocks {
                match weights.len() / count {
                    6 => rows::<S, 6>(simd, weights, taps, out, stride),
                    5 => rows::<S, 5>(simd, weights, taps, out, stride),
                    4 => rows::<S, 4>(simd, weights, taps, out, stride),
                    3 => rows::<S, 3>(simd, weights, taps, out, stride),
                    2 => rows::<S, 2>(simd, weights, taps, out, stride),
                    _ => rows::<S, 1>(simd, weights, taps, out, stride),
                }
            }
        }
    }
    Arch::new().dispatch(Run(packed, taps, out, stride));
}

#[inline(always)]
fn rows<S: Simd, const M: usize>(
    simd: S,
    weights: &[f32],
    taps: Taps,
    out: &mut [f32],
    stride: usize,
) {
    let lanes = S::F32_LANES;
    let mut at = 0;
    while at + 2 * lanes <= taps.length {
        block::<S, M, 2>(simd, weights, taps, (at, out, stride));
        at += 2 * lanes;
    }
    while at + lanes <= taps.length {
        block::<S, M, 1>(simd, weights, taps, (at, out, stride));
        at += lanes;
    }
    let rest = taps.length - at;
    if rest > 0 {
        let mut sums = [simd.splat_f32s(0.0); M];
        for (&offset, weights) in taps.offsets.iter().zip(weights.chunks_exact(M)) {
            let x = simd.partial_load_f32s(&taps.x[offset + at..][..rest]);
            for m in 0..M {
                sums[m] = simd.mul_add_e_f32s(simd.splat_f32s(weights[m]), x, sums[m]);
            }
        }
        for (m, sum) in sums.into_iter().enumerate() {
            simd.partial_store_f32s(&mut out[m * stride + at..][..rest], sum);
        }
    }
}

/// `M` rows of `V` vectors.
#[inline(always)]
fn block<S: Simd, const M: usize, const V: usize>(
    simd: S,
    weights: &[f32],
    taps: Taps,
    (at, out, stride): (usize, &mut [f32], usize),
) {
    let width = V * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    for (&offset, weights) in taps.offsets.iter().zip(weights.chunks_exact(M)) {
        let (x, _) = S::as_simd_f32s(&taps.x[offset + at..][..width]);
        for m in 0..M {
            let weight = simd.splat_f32s(weights[m]);
            for v in 0..V {
                sums[m][v] = simd.mul_add_e_f32s(weight, x[v], sums[m][v]);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        let (out, _) = S::as_mut_simd_f32s(&mut out[m * stride + at..][..width]);
        out.copy_from_slice(sums);
    }
}

/// Adds to `out`, `[rows, taps]`, the products of the rows of `y`, which are `stride` apart, with
/// what each tap reads.
pub(crate) fn correlate(y: &[f32], stride: usize, taps: Taps, out: &mut [f32]) {
    struct Run<'a>(&'a [f32], usize, Taps<'a>, &'a mut [f32]);
    impl WithSimd for Run<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Run(y, stride, taps, out) = self;
            let count = taps.offsets.len();
            for (out, y) in out.chunks_mut(4 * count).zip(y.chunks(4 * stride)) {
                match out.len() / count {
                    4 => products::<S, 4>(simd, (y, stride), taps, out),
                    3 => products::<S, 3>(simd, (y, stride), taps, out),
                    2 => products::<S, 2>(simd, (y, stride), taps, out),
                    _ => products::<S, 1>(simd, (y, stride), taps, out),
                }
            }
        }
    }
    Arch::new().dispatch(Run(y, stride, taps, out));
}

#[inline(always)]
fn products<S: Simd, const M: usize>(simd: S, y: (&[f32], usize), taps: Taps, out: &mut [f32]) {
    let count = taps.offsets.len();
    let mut tap = 0;
    while tap + 3 <= count {
        product::<S, M, 3>(simd, y, taps, (out, tap));
        tap += 3;
    }
    while tap < count {
        product::<S, M, 1>(simd, y, taps, (out, tap));
        tap += 1;
    }
}

/// `M` rows by `K` taps.
#[inline(always)]
fn product<S: Simd, const M: usize, const K: usize>(
    simd: S,
    (y, stride): (&[f32], usize),
    taps: Taps,
    (out, tap): (&mut [f32], usize),
) {
    let length = taps.length;
    let mut sums = [[simd.splat_f32s(0.0); K]; M];
    let ys: [&[f32]; M] = std::array::from_fn(|m| &y[m * stride..][..length]);
    let xs: [&[f32]; K] = std::array::from_fn(|k| &taps.x[taps.offsets[tap + k]..][..length]);
    let y_parts = ys.map(|y| S::as_simd_f32s(y));
    let x_parts = xs.map(|x| S::as_simd_f32s(x));
    let whole = length / S::F32_LANES;
    for at in 0..whole {
        let x: [S::f32s; K] = std::array::from_fn(|k| x_parts[k].0[at]);
        for m in 0..M {
            let y = y_parts[m].0[at];
            for k in 0..K {
                sums[m][k] = simd.mul_add_e_f32s(y, x[k], sums[m][k]);
            }
        }
    }
    if whole * S::F32_LANES < length {
        let x: [S::f32s; K] = std::array::from_fn(|k| simd.partial_load_f32s(x_parts[k].1));
        for m in 0..M {
            let y = simd.partial_load_f32s(y_parts[m].1);
            for k in 0..K {
                sums[m][k] = simd.mul_add_e_f32s(y, x[k], sums[m][k]);
            }
        }
    }
    let count = taps.offsets.len();
    for m in 0..M {
        for k in 0..K {
            out[m * count + tap + k] += simd.reduce_sum_f32s(sums[m][k]);
        }
    }
}
