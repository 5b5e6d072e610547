//! Eight elements and the byte of a mask that says which of them are there, as each instruction set moves them.
//!
//! A [`Loop`] is written once against [`Eights`]; [`run`] has it compiled for AVX2, NEON, or in plain Rust, whichever the
//! processor has. Guarantee: all give the same, to the bit.
//!
//! Operations are `unsafe`: whoever calls them has made sure that the processor has the instructions. They are always
//! inlined into a function compiled for these.

#![allow(unsafe_code, reason = "vector instructions are reached through std::arch alone")]

/// Elements in one step: those of one byte of a mask.
pub(super) const STEP: usize = 8;

/// What one byte of a mask says, worked out beforehand.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Its bits that are set, lowest first; then zeros.
    pub set: [u8; STEP],
    /// For each bit how many lower ones are set; [`STEP`] for a bit that is not.
    pub rank: [u8; STEP],
    /// How many are set.
    pub count: usize,
}

impl Places {
    /// Those of a byte.
    #[inline(always)]
    pub(super) fn of(mask: u8) -> &'static Places {
        &PLACES[usize::from(mask)]
    }
}

/// [`Places`] of every byte. With them neither packing nor unpacking has to decide anything.
static PLACES: [Places; 256] = places();

const fn places() -> [Places; 256] {
    let mut all = [Places { set: [0; STEP], rank: [STEP as u8; STEP], count: 0 }; 256];
    let mut mask = 0;
    while mask < all.len() {
        let mut bit = 0;
        while bit < STEP {
            if mask >> bit & 1 == 1 {
                let count = all[mask].count;
                all[mask].set[count] = bit as u8;
                all[mask].rank[bit] = count as u8;
                all[mask].count += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    all
}

/// Eight elements of together `BYTES` bytes: 8, 16 or 32.
pub(super) trait Eight<const BYTES: usize> {
    /// A bit for each element that is not zero, the first's lowest.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn nonzero(elements: [u8; BYTES]) -> u8;

    /// Place `i` is given element `from[i]`, or zero where that is [`STEP`], the most it may be.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn pick(elements: [u8; BYTES], from: [u8; STEP], places: &mut [u8; BYTES]);
}

/// Eight codes of a byte each, as numbers.
pub(super) trait Numbers: Eight<STEP> {
    /// A number for each code.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn numbers<const SIGNED: bool>(codes: [u8; STEP], numbers: &mut [f32; STEP]);

    /// The same for the codes that [`Eight::pick`] picks.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn picked<const SIGNED: bool>(
        codes: [u8; STEP],
        from: [u8; STEP],
        numbers: &mut [f32; STEP],
    ) {
        let mut picked = [0; STEP];
        // SAFETY: the caller's promise.
        unsafe {
            Self::pick(codes, from, &mut picked);
            Self::numbers::<SIGNED>(picked, numbers);
        }
    }
}

/// An instruction set.
pub(super) trait Eights: Eight<8> + Eight<16> + Eight<32> + Numbers {}

impl<E: Eight<8> + Eight<16> + Eight<32> + Numbers> Eights for E {}

/// What runs on any instruction set.
pub(super) trait Loop {
    /// Runs on one; to be inlined always, into a function compiled for it.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn run<E: Eights>(self);
}

/// Runs a loop on the best instruction set of this processor.
pub(super) fn run(it: impl Loop) {
    run_on(Isa::available().next().unwrap_or(Isa::Plain), it);
}

/// Runs a loop on one of [`Isa::available`].
pub(super) fn run_on(isa: Isa, it: impl Loop) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn compiled_for_avx2(it: impl Loop) {
        // SAFETY: the caller's promise.
        unsafe { it.run::<Avx2>() }
    }
    // SAFETY, of all three: the processor has the instructions.
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { compiled_for_avx2(it) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { it.run::<Neon>() },
        _ => unsafe { it.run::<Plain>() },
    }
}

/// An instruction set that there are [`Eights`] for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    Avx2,
    Neon,
    Plain,
}

impl Isa {
    /// Those of this processor, fastest first.
    pub(super) fn available() -> impl Iterator<Item = Isa> {
        [Isa::Avx2, Isa::Neon, Isa::Plain].into_iter().filter(|isa| match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 => false,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Plain => true,
        })
    }
}

/// What every machine can do. What is picked goes to its place at once: what was written element by element could not
/// be read as a vector right after.
pub(super) struct Plain;

impl Eight<8> for Plain {
    #[inline(always)]
    unsafe fn nonzero(elements: [u8; 8]) -> u8 {
        let x = u64::from_le_bytes(elements);
        let low = 0x7f7f_7f7f_7f7f_7f7f;
        // The upper bit of each byte that is not zero, gathered in the topmost byte.
        let upper = (((x & low) + low) | x) & !low;
        ((upper >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
    }

    #[inline(always)]
    unsafe fn pick(elements: [u8; 8], from: [u8; STEP], places: &mut [u8; 8]) {
        pick(&elements.map(|byte| [byte]), from, places);
    }
}

impl Eight<16> for Plain {
    #[inline(always)]
    unsafe fn nonzero(elements: [u8; 16]) -> u8 {
        nonzero::<2>(&elements)
    }

    #[inline(always)]
    unsafe fn pick(elements: [u8; 16], from: [u8; STEP], places: &mut [u8; 16]) {
        pick::<2>(elements.as_chunks().0, from, places);
    }
}

impl Eight<32> for Plain {
    #[inline(always)]
    unsafe fn nonzero(elements: [u8; 32]) -> u8 {
        nonzero::<4>(&elements)
    }

    #[inline(always)]
    unsafe fn pick(elements: [u8; 32], from: [u8; STEP], places: &mut [u8; 32]) {
        pick::<4>(elements.as_chunks().0, from, places);
    }
}

#[inline(always)]
fn nonzero<const SIZE: usize>(elements: &[u8]) -> u8 {
    let elements = elements.as_chunks::<SIZE>().0.iter().enumerate();
    elements.fold(0, |mask, (bit, element)| mask | u8::from(*element != [0; SIZE]) << bit)
}

#[inline(always)]
fn pick<const SIZE: usize>(elements: &[[u8; SIZE]], from: [u8; STEP], places: &mut [u8]) {
    // What follows the eight is zero.
    let mut next = [[0; SIZE]; 2 * STEP];
    next[..STEP].copy_from_slice(elements);
    for (place, from) in places.as_chunks_mut().0.iter_mut().zip(from) {
        *place = next[usize::from(from) % (2 * STEP)];
    }
}

#[inline(always)]
fn number<const SIGNED: bool>(code: u8) -> f32 {
    if SIGNED { f32::from(code as i8) } else { f32::from(code) }
}

impl Numbers for Plain {
    #[inline(always)]
    unsafe fn numbers<const SIGNED: bool>(codes: [u8; STEP], numbers: &mut [f32; STEP]) {
        numbers.iter_mut().zip(codes).for_each(|(place, code)| *place = number::<SIGNED>(code));
    }

    /// Numbers first, which are read as they were written: one by one.
    #[inline(always)]
    unsafe fn picked<const SIGNED: bool>(
        codes: [u8; STEP],
        from: [u8; STEP],
        numbers: &mut [f32; STEP],
    ) {
        let mut next = [0.0; 2 * STEP];
        next.iter_mut().zip(codes).for_each(|(place, code)| *place = number::<SIGNED>(code));
        for (number, from) in numbers.iter_mut().zip(from) {
            *number = next[usize::from(from) % (2 * STEP)];
        }
    }
}

/// Bytes looked up in a vector.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Avx2, Eight, Numbers, STEP};

    // SAFETY, of all blocks here: the caller's promise that the instructions are there; memory is that of arrays as
    // long as what is read or written.

    #[inline(always)]
    unsafe fn low(bytes: [u8; STEP]) -> __m128i {
        unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
    }

    impl Eight<8> for Avx2 {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 8]) -> u8 {
            unsafe { !_mm_movemask_epi8(_mm_cmpeq_epi8(low(elements), _mm_setzero_si128())) as u8 }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 8], from: [u8; STEP], places: &mut [u8; 8]) {
            // The eighth byte, behind those that were loaded, is zero.
            unsafe {
                let vector = _mm_shuffle_epi8(low(elements), low(from));
                _mm_storel_epi64(places.as_mut_ptr().cast(), vector);
            }
        }
    }

    impl Eight<16> for Avx2 {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 16]) -> u8 {
            unsafe {
                let vector = _mm_loadu_si128(elements.as_ptr().cast());
                let zero = _mm_cmpeq_epi16(vector, _mm_setzero_si128());
                !_mm_movemask_epi8(_mm_packs_epi16(zero, zero)) as u8
            }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 16], from: [u8; STEP], places: &mut [u8; 16]) {
            unsafe {
                let vector = _mm_loadu_si128(elements.as_ptr().cast());
                // Element i is bytes 2i and 2i + 1. The eighth's places get their topmost bit, which means zero; all
                // others lie below it, and of them the lower four bits count.
                let twice = _mm_add_epi8(low(from), low(from));
                let bytes = _mm_add_epi8(_mm_unpacklo_epi8(twice, twice), _mm_set1_epi16(0x7170));
                _mm_storeu_si128(places.as_mut_ptr().cast(), _mm_shuffle_epi8(vector, bytes));
            }
        }
    }

    impl Eight<32> for Avx2 {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 32]) -> u8 {
            unsafe {
                let vector = _mm256_loadu_si256(elements.as_ptr().cast());
                let zero = _mm256_cmpeq_epi32(vector, _mm256_setzero_si256());
                !_mm256_movemask_ps(_mm256_castsi256_ps(zero)) as u8
            }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 32], from: [u8; STEP], places: &mut [u8; 32]) {
            unsafe {
                let vector = _mm256_loadu_si256(elements.as_ptr().cast());
                let from = _mm256_cvtepu8_epi32(low(from));
                let there = _mm256_cmpgt_epi32(_mm256_set1_epi32(STEP as i32), from);
                let vector = _mm256_permutevar8x32_epi32(vector, from);
                let vector = _mm256_and_si256(vector, there);
                _mm256_storeu_si256(places.as_mut_ptr().cast(), vector);
            }
        }
    }

    impl Numbers for Avx2 {
        #[inline(always)]
        unsafe fn numbers<const SIGNED: bool>(codes: [u8; STEP], numbers: &mut [f32; STEP]) {
            unsafe {
                let codes = match SIGNED {
                    true => _mm256_cvtepi8_epi32(low(codes)),
                    false => _mm256_cvtepu8_epi32(low(codes)),
                };
                _mm256_storeu_ps(numbers.as_mut_ptr(), _mm256_cvtepi32_ps(codes));
            }
        }
    }
}

/// Bytes looked up in one or two vectors, where what lies beyond them is zero.
#[cfg(target_arch = "aarch64")]
pub(super) struct Neon;

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::{Eight, Neon, Numbers, STEP};

    // SAFETY, of all blocks here: every aarch64 has the instructions; memory is that of arrays as long as what is
    // read or written.

    /// A bit for each lane whose bits are all set.
    #[inline(always)]
    unsafe fn bits(there: uint8x8_t) -> u8 {
        const BIT: [u8; STEP] = [1, 2, 4, 8, 16, 32, 64, 128];
        unsafe { vaddv_u8(vand_u8(there, vld1_u8(BIT.as_ptr()))) }
    }

    impl Eight<8> for Neon {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 8]) -> u8 {
            unsafe {
                let vector = vld1_u8(elements.as_ptr());
                bits(vtst_u8(vector, vector))
            }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 8], from: [u8; STEP], places: &mut [u8; 8]) {
            unsafe {
                let vector = vtbl1_u8(vld1_u8(elements.as_ptr()), vld1_u8(from.as_ptr()));
                vst1_u8(places.as_mut_ptr(), vector);
            }
        }
    }

    impl Eight<16> for Neon {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 16]) -> u8 {
            unsafe {
                let vector = vreinterpretq_u16_u8(vld1q_u8(elements.as_ptr()));
                bits(vmovn_u16(vtstq_u16(vector, vector)))
            }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 16], from: [u8; STEP], places: &mut [u8; 16]) {
            unsafe {
                // Element i is bytes 2i and 2i + 1: in a lane of two bytes 0x0202 · i + 0x0100.
                let from = vmovl_u8(vld1_u8(from.as_ptr()));
                let bytes = vaddq_u16(vmulq_n_u16(from, 0x0202), vdupq_n_u16(0x0100));
                let vector = vqtbl1q_u8(vld1q_u8(elements.as_ptr()), vreinterpretq_u8_u16(bytes));
                vst1q_u8(places.as_mut_ptr(), vector);
            }
        }
    }

    impl Eight<32> for Neon {
        #[inline(always)]
        unsafe fn nonzero(elements: [u8; 32]) -> u8 {
            unsafe {
                let [low, high] = [0, 16].map(|at| {
                    let half = vreinterpretq_u32_u8(vld1q_u8(elements.as_ptr().add(at)));
                    vmovn_u32(vtstq_u32(half, half))
                });
                bits(vmovn_u16(vcombine_u16(low, high)))
            }
        }

        #[inline(always)]
        unsafe fn pick(elements: [u8; 32], from: [u8; STEP], places: &mut [u8; 32]) {
            unsafe {
                let halves = vld1q_u8_x2(elements.as_ptr());
                let from = vmovl_u8(vld1_u8(from.as_ptr()));
                let from = [vmovl_u16(vget_low_u16(from)), vmovl_u16(vget_high_u16(from))];
                for (at, from) in from.into_iter().enumerate() {
                    // Element i is bytes 4i to 4i + 3: in a lane of four bytes 0x04040404 · i + 0x03020100.
                    let bytes = vaddq_u32(vmulq_n_u32(from, 0x0404_0404), vdupq_n_u32(0x0302_0100));
                    let vector = vqtbl2q_u8(halves, vreinterpretq_u8_u32(bytes));
                    vst1q_u8(places.as_mut_ptr().add(16 * at), vector);
                }
            }
        }
    }

    impl Numbers for Neon {
        #[inline(always)]
        unsafe fn numbers<const SIGNED: bool>(codes: [u8; STEP], numbers: &mut [f32; STEP]) {
            unsafe {
                let codes = vld1_u8(codes.as_ptr());
                // Lanes of two bytes hold a byte's numbers, with a sign and without.
                let codes = match SIGNED {
                    true => vmovl_s8(vreinterpret_s8_u8(codes)),
                    false => vreinterpretq_s16_u16(vmovl_u8(codes)),
                };
                let low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(codes)));
                let high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(codes)));
                vst1q_f32(numbers.as_mut_ptr(), low);
                vst1q_f32(numbers.as_mut_ptr().add(4), high);
            }
        }
    }
}
