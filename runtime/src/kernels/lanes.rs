//! Vectors of one instruction set, seen through one small trait.
//!
//! The kernels are written once against [`Lanes`]; an implementation for each instruction set says how
//! wide a vector is and which instruction an operation is. [`Plain`] needs nothing but Rust, and
//! type-checks every kernel on every machine; the others exist where their instructions do.
//!
//! Operations are `unsafe`: whoever calls them has made sure that the machine has the instructions
//! ([`super::Isa::is_available`]) and that pointers are valid for a whole vector. They are always inlined
//! into a function compiled for that instruction set.

#![allow(clippy::needless_range_loop, reason = "register arrays are indexed together")]

use half::f16;
use half::slice::HalfFloatSliceExt as _;

/// Most lanes of any instruction set.
pub(crate) const WIDEST: usize = 16;

/// A vector of `WIDTH` f32, and what the kernels do with it.
pub(crate) trait Lanes: Copy + 'static {
    /// The vector.
    type V: Copy;
    /// f32 in a vector: the channels of a block.
    const WIDTH: usize;

    /// Reads a vector; no alignment is asked for.
    ///
    /// # Safety
    /// `from` is valid for reading `WIDTH` elements.
    unsafe fn load(from: *const f32) -> Self::V;

    /// Writes a vector; no alignment is asked for.
    ///
    /// # Safety
    /// `to` is valid for writing `WIDTH` elements.
    unsafe fn store(to: *mut f32, v: Self::V);

    /// The same number in every lane.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn splat(x: f32) -> Self::V;

    /// `a · b + c`, rounded once where the machine can.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;

    /// `a + b`.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;

    /// `a − b`.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;

    /// `a · b`.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;

    /// The larger of two, lane by lane; where one is no number, either.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;

    /// The smaller of two, lane by lane; where one is no number, either.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;

    /// Lane `l` takes lane `from[l]`.
    ///
    /// # Safety
    /// `from` is valid for reading `WIDTH` numbers, each below `WIDTH`.
    unsafe fn permute(v: Self::V, from: *const i32) -> Self::V;

    /// Lane `l` of vector `r` becomes lane `r` of vector `l`, for the first `WIDTH` vectors.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn transpose(rows: &mut [Self::V; WIDEST]);

    /// Reads a vector of halves, widened.
    ///
    /// # Safety
    /// `from` is valid for reading `WIDTH` elements.
    #[inline(always)]
    unsafe fn load_half(from: *const f16) -> Self::V {
        let mut wide = [0.0; WIDEST];
        // SAFETY: the caller's promise; `wide` holds a vector.
        unsafe {
            let halves = std::slice::from_raw_parts(from, Self::WIDTH);
            halves.convert_to_f32_slice(&mut wide[..Self::WIDTH]);
            Self::load(wide.as_ptr())
        }
    }

    /// Writes a vector as halves, rounded to nearest even.
    ///
    /// # Safety
    /// `to` is valid for writing `WIDTH` elements.
    #[inline(always)]
    unsafe fn store_half(to: *mut f16, v: Self::V) {
        let mut wide = [0.0; WIDEST];
        // SAFETY: the caller's promise; `wide` holds a vector.
        unsafe {
            Self::store(wide.as_mut_ptr(), v);
            let halves = std::slice::from_raw_parts_mut(to, Self::WIDTH);
            halves.convert_from_f32_slice(&wide[..Self::WIDTH]);
        }
    }
}

/// Eight lanes in plain Rust: what every machine can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plain;

impl Lanes for Plain {
    type V = [f32; 8];
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller's promise; an array of f32 read without alignment.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 8]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], mut c: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            c[l] += a[l] * b[l];
        }
        c
    }

    #[inline(always)]
    unsafe fn add(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            a[l] += b[l];
        }
        a
    }

    #[inline(always)]
    unsafe fn sub(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            a[l] -= b[l];
        }
        a
    }

    #[inline(always)]
    unsafe fn mul(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            a[l] *= b[l];
        }
        a
    }

    #[inline(always)]
    unsafe fn max(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            a[l] = if a[l] > b[l] { a[l] } else { b[l] };
        }
        a
    }

    #[inline(always)]
    unsafe fn min(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for l in 0..8 {
            a[l] = if a[l] < b[l] { a[l] } else { b[l] };
        }
        a
    }

    #[inline(always)]
    unsafe fn permute(v: [f32; 8], from: *const i32) -> [f32; 8] {
        let mut out = v;
        for (l, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise: eight numbers below eight.
            *out = v[unsafe { *from.add(l) } as usize & 7];
        }
        out
    }

    #[inline(always)]
    unsafe fn transpose(rows: &mut [[f32; 8]; WIDEST]) {
        for r in 0..8 {
            for l in 0..r {
                (rows[r][l], rows[l][r]) = (rows[l][r], rows[r][l]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{Lanes, WIDEST};

    /// Sixteen lanes of AVX-512F.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx512;

    // SAFETY, for every block below: the caller has promised that the machine has the instruction
    // set, and that pointers are valid for a vector.
    impl Lanes for Avx512 {
        type V = __m512;
        const WIDTH: usize = 16;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m512) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_ps(to, v) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_min_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn permute(v: __m512, from: *const i32) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_permutexvar_ps(_mm512_loadu_si512(from.cast()), v) }
        }

        #[inline(always)]
        unsafe fn transpose(rows: &mut [__m512; WIDEST]) {
            // SAFETY: see above.
            unsafe {
                let mut quads = *rows;
                for at in (0..16).step_by(4) {
                    let [a, b, c, d] = [rows[at], rows[at + 1], rows[at + 2], rows[at + 3]];
                    let pairs = [
                        _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
                        _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
                        _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
                        _mm512_castps_pd(_mm512_unpackhi_ps(c, d)),
                    ];
                    // Quarter `q` of `quads[at + k]`: lane `4 q + k` of the four rows.
                    quads[at] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[2]));
                    quads[at + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[2]));
                    quads[at + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[1], pairs[3]));
                    quads[at + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[1], pairs[3]));
                }
                for k in 0..4 {
                    let [a, b, c, d] = [quads[k], quads[4 + k], quads[8 + k], quads[12 + k]];
                    let even = _mm512_shuffle_f32x4::<0x88>(a, b);
                    let odd = _mm512_shuffle_f32x4::<0xdd>(a, b);
                    let more_even = _mm512_shuffle_f32x4::<0x88>(c, d);
                    let more_odd = _mm512_shuffle_f32x4::<0xdd>(c, d);
                    rows[k] = _mm512_shuffle_f32x4::<0x88>(even, more_even);
                    rows[4 + k] = _mm512_shuffle_f32x4::<0x88>(odd, more_odd);
                    rows[8 + k] = _mm512_shuffle_f32x4::<0xdd>(even, more_even);
                    rows[12 + k] = _mm512_shuffle_f32x4::<0xdd>(odd, more_odd);
                }
            }
        }

        #[inline(always)]
        unsafe fn load_half(from: *const f16) -> __m512 {
            // SAFETY: see above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn store_half(to: *mut f16, v: __m512) {
            // SAFETY: see above.
            unsafe {
                let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
                _mm256_storeu_si256(to.cast(), halves);
            }
        }
    }

    /// Eight lanes of AVX2 with FMA.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Avx2;

    impl Lanes for Avx2 {
        type V = __m256;
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, v: __m256) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(to, v) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn min(a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_min_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn permute(v: __m256, from: *const i32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_permutevar8x32_ps(v, _mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn transpose(rows: &mut [__m256; WIDEST]) {
            // SAFETY: see above.
            unsafe {
                let mut quads = *rows;
                for at in (0..8).step_by(4) {
                    let [a, b, c, d] = [rows[at], rows[at + 1], rows[at + 2], rows[at + 3]];
                    let pairs = [
                        _mm256_castps_pd(_mm256_unpacklo_ps(a, b)),
                        _mm256_castps_pd(_mm256_unpackhi_ps(a, b)),
                        _mm256_castps_pd(_mm256_unpacklo_ps(c, d)),
                        _mm256_castps_pd(_mm256_unpackhi_ps(c, d)),
                    ];
                    // Half `h` of `quads[at + k]`: lane `4 h + k` of the four rows.
                    quads[at] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[0], pairs[2]));
                    quads[at + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[0], pairs[2]));
                    quads[at + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pairs[1], pairs[3]));
                    quads[at + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pairs[1], pairs[3]));
                }
                for k in 0..4 {
                    rows[k] = _mm256_permute2f128_ps::<0x20>(quads[k], quads[4 + k]);
                    rows[4 + k] = _mm256_permute2f128_ps::<0x31>(quads[k], quads[4 + k]);
                }
            }
        }

        #[inline(always)]
        unsafe fn load_half(from: *const f16) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }

        #[inline(always)]
        unsafe fn store_half(to: *mut f16, v: __m256) {
            // SAFETY: see above.
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
                _mm_storeu_si128(to.cast(), halves);
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use arm::Neon;

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::aarch64::*;

    use super::{Lanes, WIDEST};

    /// Eight lanes in two NEON registers.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Neon;

    // SAFETY, for every block below: NEON is part of every aarch64 machine Rust knows, and the caller
    // has promised that pointers are valid for a vector.
    impl Lanes for Neon {
        type V = float32x4x2_t;
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn load(from: *const f32) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vld1q_f32(from), vld1q_f32(from.add(4))) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, v: float32x4x2_t) {
            // SAFETY: see above.
            unsafe {
                vst1q_f32(to, v.0);
                vst1q_f32(to.add(4), v.1);
            }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x)) }
        }

        #[inline(always)]
        unsafe fn fma(a: float32x4x2_t, b: float32x4x2_t, c: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn add(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn sub(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn mul(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn max(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vmaxq_f32(a.0, b.0), vmaxq_f32(a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn min(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
            // SAFETY: see above.
            unsafe { float32x4x2_t(vminq_f32(a.0, b.0), vminq_f32(a.1, b.1)) }
        }

        #[inline(always)]
        unsafe fn permute(v: float32x4x2_t, from: *const i32) -> float32x4x2_t {
            let mut lanes = [0.0; 8];
            let mut out = [0.0; 8];
            // SAFETY: see above; `from` holds eight numbers below eight.
            unsafe {
                Self::store(lanes.as_mut_ptr(), v);
                for (l, out) in out.iter_mut().enumerate() {
                    *out = lanes[*from.add(l) as usize & 7];
                }
                Self::load(out.as_ptr())
            }
        }

        #[inline(always)]
        unsafe fn transpose(rows: &mut [float32x4x2_t; WIDEST]) {
            // SAFETY: see above.
            unsafe {
                let from = *rows;
                for at in [0, 4] {
                    let low = quads([0, 1, 2, 3].map(|r| from[at + r].0));
                    let high = quads([0, 1, 2, 3].map(|r| from[at + r].1));
                    for k in 0..4 {
                        if at == 0 {
                            (rows[k].0, rows[4 + k].0) = (low[k], high[k]);
                        } else {
                            (rows[k].1, rows[4 + k].1) = (low[k], high[k]);
                        }
                    }
                }
            }
        }
    }

    /// Four vectors of four, transposed.
    ///
    /// # Safety
    /// None: NEON is part of the machine.
    #[inline(always)]
    unsafe fn quads([a, b, c, d]: [float32x4_t; 4]) -> [float32x4_t; 4] {
        // SAFETY: see above.
        unsafe {
            let pairs = [
                vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                vreinterpretq_f64_f32(vtrn2q_f32(a, b)),
                vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                vreinterpretq_f64_f32(vtrn2q_f32(c, d)),
            ];
            [
                vreinterpretq_f32_f64(vtrn1q_f64(pairs[0], pairs[2])),
                vreinterpretq_f32_f64(vtrn1q_f64(pairs[1], pairs[3])),
                vreinterpretq_f32_f64(vtrn2q_f64(pairs[0], pairs[2])),
                vreinterpretq_f32_f64(vtrn2q_f64(pairs[1], pairs[3])),
            ]
        }
    }
}
