//! The codecs' loops for processors that move the elements of a mask together in one instruction (AVX-512 VBMI2).
//!
//! Each takes what its namesake in [`loops`](super::loops) takes, does as much of it as whole vectors reach, and gives
//! how far it came: `(0, 0)` on other processors. Guarantee: bytes and numbers are those of the other loops, to the bit.

#![cfg_attr(
    target_arch = "x86_64",
    allow(unsafe_code, reason = "vector instructions are reached through std::arch alone")
)]

/// Packs elements; gives the bytes of the mask that are filled and the elements that are kept.
pub(super) fn pack<const SIZE: usize>(elements: &mut [u8], mask: &mut [u8]) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        // SAFETY: the processor has the instructions.
        return match SIZE {
            1 => unsafe { avx512::pack_bytes(elements, mask) },
            2 => unsafe { avx512::pack_halves(elements, mask) },
            _ => (0, 0),
        };
    }
    let _ = (elements, mask);
    (0, 0)
}

/// Unpacks elements; gives how many are in their places, and how many of the body's they took.
pub(super) fn unpack<const SIZE: usize>(
    mask: &[u8],
    body: &[u8],
    elements: &mut [u8],
) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if SIZE == 2 && avx512::is_there() {
        // SAFETY: the processor has the instructions.
        return unsafe { avx512::unpack_halves(mask, body, elements) };
    }
    let _ = (mask, body, elements);
    (0, 0)
}

/// Makes numbers of codes; gives how many numbers there are, and how many codes they took.
pub(super) fn widen(
    form: (bool, bool),
    mask: Option<&[u8]>,
    body: &[u8],
    numbers: &mut [f32],
) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        // SAFETY: the processor has the instructions.
        return unsafe { avx512::widen(form, mask, body, numbers) };
    }
    let _ = (form, mask, body, numbers);
    (0, 0)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    /// Bytes of a vector.
    const BYTES: usize = 64;
    /// Elements of two bytes in one.
    const HALVES: usize = BYTES / 2;

    pub(super) fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi2")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    pub(super) fn pack_bytes(bytes: &mut [u8], mask: &mut [u8]) -> (usize, usize) {
        let (mut step, mut to) = (0, 0);
        for mask in mask.as_chunks_mut::<8>().0 {
            let Some(next) = bytes[BYTES * step..].first_chunk() else { break };
            let next = load(next);
            let there = _mm512_test_epi8_mask(next, next);
            *mask = there.to_le_bytes();
            // Never beyond what has been read: as many bytes lie between as were zero.
            if let Some(place) = bytes[to..].first_chunk_mut() {
                store(place, _mm512_maskz_compress_epi8(there, next));
            }
            to += there.count_ones() as usize;
            step += 1;
        }
        (8 * step, to)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    pub(super) fn pack_halves(bytes: &mut [u8], mask: &mut [u8]) -> (usize, usize) {
        let (mut step, mut to) = (0, 0);
        for mask in mask.as_chunks_mut::<4>().0 {
            let Some(next) = bytes[BYTES * step..].first_chunk() else { break };
            let next = load(next);
            let there = _mm512_test_epi16_mask(next, next);
            *mask = there.to_le_bytes();
            if let Some(place) = bytes[2 * to..].first_chunk_mut() {
                store(place, _mm512_maskz_compress_epi16(there, next));
            }
            to += there.count_ones() as usize;
            step += 1;
        }
        (4 * step, to)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    pub(super) fn unpack_halves(mask: &[u8], body: &[u8], elements: &mut [u8]) -> (usize, usize) {
        let (mut done, mut at) = (0, 0);
        for (place, mask) in elements.as_chunks_mut().0.iter_mut().zip(mask.as_chunks().0) {
            let there = u32::from_le_bytes(*mask);
            store(place, _mm512_maskz_expand_epi16(there, load_from(body, 2 * at)));
            at += there.count_ones() as usize;
            done += HALVES;
        }
        (done, at)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    pub(super) fn widen(
        (is_half, signed): (bool, bool),
        mask: Option<&[u8]>,
        body: &[u8],
        numbers: &mut [f32],
    ) -> (usize, usize) {
        let (mut done, mut at) = (0, 0);
        for numbers in numbers.as_chunks_mut::<BYTES>().0 {
            let there = match mask.map(|mask| mask[done / 8..].first_chunk()) {
                Some(Some(mask)) => u64::from_le_bytes(*mask),
                Some(None) => break,
                None => u64::MAX,
            };
            let codes = match is_half {
                true => halves_from(body, at, signed),
                false => load_from(body, at),
            };
            let codes = _mm512_maskz_expand_epi8(there, codes);
            let quarters = [
                _mm512_extracti32x4_epi32::<0>(codes),
                _mm512_extracti32x4_epi32::<1>(codes),
                _mm512_extracti32x4_epi32::<2>(codes),
                _mm512_extracti32x4_epi32::<3>(codes),
            ];
            for (numbers, codes) in numbers.as_chunks_mut::<16>().0.iter_mut().zip(quarters) {
                let codes = match signed {
                    true => _mm512_cvtepi8_epi32(codes),
                    false => _mm512_cvtepu8_epi32(codes),
                };
                // SAFETY: as many numbers as the vector has lanes.
                unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), _mm512_cvtepi32_ps(codes)) };
            }
            at += there.count_ones() as usize;
            done += BYTES;
        }
        (done, at)
    }

    /// 64 codes from the `at`th on of which two share a byte, each in a byte of its own.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    fn halves_from(body: &[u8], at: usize, signed: bool) -> __m512i {
        let words = |from| _mm512_cvtepu8_epi16(_mm512_castsi512_si256(load_from(body, from)));
        let pairs = match at.is_multiple_of(2) {
            true => words(at / 2),
            false => {
                let (first, second) = (words(at / 2), words(at / 2 + 1));
                let moved =
                    _mm512_or_si512(_mm512_srli_epi16::<4>(first), _mm512_slli_epi16::<4>(second));
                _mm512_and_si512(moved, _mm512_set1_epi16(0xff))
            }
        };
        let spread = _mm512_or_si512(pairs, _mm512_slli_epi16::<4>(pairs));
        let codes = _mm512_and_si512(spread, _mm512_set1_epi8(0x0f));
        match signed {
            true => {
                let sign = _mm512_set1_epi8(8);
                _mm512_sub_epi8(_mm512_xor_si512(codes, sign), sign)
            }
            false => codes,
        }
    }

    /// 64 bytes from a place on; zeros beyond the end.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    fn load_from(bytes: &[u8], at: usize) -> __m512i {
        let rest = bytes.get(at..).unwrap_or(&[]);
        match rest.first_chunk() {
            Some(chunk) => load(chunk),
            None => {
                let mut padded = [0; BYTES];
                padded[..rest.len()].copy_from_slice(rest);
                load(&padded)
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    fn load(bytes: &[u8; BYTES]) -> __m512i {
        // SAFETY: as many bytes as a vector has.
        unsafe { _mm512_loadu_epi8(bytes.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi2")]
    fn store(bytes: &mut [u8; BYTES], vector: __m512i) {
        // SAFETY: as many bytes as a vector has.
        unsafe { _mm512_storeu_epi8(bytes.as_mut_ptr().cast(), vector) }
    }
}
