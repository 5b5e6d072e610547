//! The codecs' loops: quantising, packing zeros, and both back.
//!
//! Takes and gives slices; what the bytes mean is the specification in [`codec`](super). Elements go eight at
//! a time through arrays of a fixed size, so that compilers make vector instructions of what is regular,
//! and nothing branches on a single element: which half of a ReLU's results is zero cannot be guessed. What moves
//! elements together or apart goes 64 bytes at a time where the processor can ([`wide`]).

use super::{LEAST, TO_WHOLE, wide};

/// Elements in one step: those of one byte of a mask.
const STEP: usize = 8;

/// Scale of a run and what a number is multiplied by to become a code.
pub(super) fn scale(numbers: &[f32], largest: f32) -> (f32, f32) {
    // In lanes, so that the maximum is found several at a time.
    let mut lanes = [LEAST; 16];
    let (chunks, rest) = numbers.as_chunks::<16>();
    for chunk in chunks {
        for (lane, number) in lanes.iter_mut().zip(chunk) {
            *lane = if number.abs() > *lane { number.abs() } else { *lane };
        }
    }
    let all = lanes.into_iter().chain(rest.iter().map(|number| number.abs()));
    let most = all.fold(LEAST, f32::max);
    (most / largest, largest / most)
}

/// Codes of a run, a byte each; gives its scale.
pub(super) fn quantise(numbers: &[f32], largest: f32, codes: &mut [u8]) -> f32 {
    let (scale, inverse) = scale(numbers, largest);
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = (number * inverse + TO_WHOLE).to_bits() as u8;
    }
    scale
}

/// Puts two codes in a byte; gives the bytes then used.
pub(super) fn halve(codes: &mut [u8]) -> usize {
    let steps = codes.len() / STEP;
    for step in 0..steps {
        let mut x = bytes_at(codes, STEP * step) & 0x0f0f_0f0f_0f0f_0f0f;
        x = (x | x >> 4) & 0x00ff_00ff_00ff_00ff;
        x = (x | x >> 8) & 0x0000_ffff_0000_ffff;
        let halves = ((x | x >> 16) as u32).to_le_bytes();
        codes[STEP / 2 * step..][..STEP / 2].copy_from_slice(&halves);
    }
    let bytes = codes.len().div_ceil(2);
    for at in steps * STEP / 2..bytes {
        let upper = codes.get(2 * at + 1).copied().unwrap_or(0);
        codes[at] = codes[2 * at] & 15 | upper << 4;
    }
    bytes
}

/// How many elements are not zero.
pub(super) fn kept<const SIZE: usize>(elements: &[u8]) -> usize {
    let elements = elements.as_chunks::<SIZE>().0;
    // Counted in bytes, which hold as many as a vector has lanes; 255 is the most that fits.
    let count = |part: &[[u8; SIZE]]| {
        part.iter().fold(0u8, |count, element| count + u8::from(*element != [0; SIZE]))
    };
    elements.chunks(255).map(|part| usize::from(count(part))).sum()
}

/// How many bits are set.
pub(super) fn ones(mask: &[u8]) -> usize {
    let (words, rest) = mask.as_chunks::<8>();
    let words: u32 = words.iter().map(|&word| u64::from_le_bytes(word).count_ones()).sum();
    words as usize + rest.iter().map(|byte| byte.count_ones() as usize).sum::<usize>()
}

/// What one byte of a mask says, worked out beforehand.
#[derive(Clone, Copy)]
struct Places {
    /// Its bits that are set, lowest first.
    set: [u8; STEP],
    /// For each bit how many lower ones are set; [`STEP`] for a bit that is not.
    rank: [u8; STEP],
    /// How many are set.
    count: usize,
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

/// A bit for each byte of eight that is not zero.
fn nonzero(bytes: [u8; STEP]) -> u8 {
    let x = u64::from_le_bytes(bytes);
    let low = 0x7f7f_7f7f_7f7f_7f7f;
    // The upper bit of each byte that is not zero, gathered in the topmost byte.
    let upper = (((x & low) + low) | x) & !low;
    ((upper >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

/// Fills the mask, the first `mask` bytes, and moves the elements that are not zero right behind it.
pub(super) fn pack<const SIZE: usize>(bytes: &mut [u8], mask: usize) {
    let (mask, elements) = bytes.split_at_mut(mask);
    let done = wide::pack::<SIZE>(elements, mask);
    pack_from::<SIZE>(elements, mask, done);
}

/// The same from a byte of the mask on, where so many elements are kept before.
fn pack_from<const SIZE: usize>(elements: &mut [u8], mask: &mut [u8], done: (usize, usize)) {
    let (steps, mut to) = match SIZE {
        1 => pack_bytes(elements, mask, done),
        _ => done,
    };
    let elements = elements.as_chunks_mut::<SIZE>().0;
    for (step, mask) in mask.iter_mut().enumerate().skip(steps) {
        let from = STEP * step;
        for bit in 0..(elements.len() - from).min(STEP) {
            let element = elements[from + bit];
            let there = element != [0; SIZE];
            *mask |= u8::from(there) << bit;
            elements[to] = element;
            to += usize::from(there);
        }
    }
}

/// The same for all whole steps of bytes; gives how many steps there were, and how many bytes are kept.
fn pack_bytes(bytes: &mut [u8], mask: &mut [u8], done: (usize, usize)) -> (usize, usize) {
    let (first, mut to) = done;
    let steps = bytes.len() / STEP;
    for (step, mask) in mask.iter_mut().enumerate().take(steps).skip(first) {
        let next = bytes_at(bytes, STEP * step).to_le_bytes();
        *mask = nonzero(next);
        let places = &PLACES[usize::from(*mask)];
        // Never beyond what has been read: as many bytes lie between as were zero.
        for (byte, bit) in bytes[to..to + STEP].iter_mut().zip(places.set) {
            *byte = next[usize::from(bit) % STEP];
        }
        to += places.count;
    }
    (steps, to)
}

/// Puts elements where the mask says, zeros elsewhere.
pub(super) fn unpack<const SIZE: usize>(mask: &[u8], body: &[u8], elements: &mut [u8]) {
    let done = wide::unpack::<SIZE>(mask, body, elements);
    unpack_from::<SIZE>(mask, body, elements, done);
}

/// The same from an element on, a whole number of steps, where so many of the body's are used before.
fn unpack_from<const SIZE: usize>(
    mask: &[u8],
    body: &[u8],
    elements: &mut [u8],
    (done, mut at): (usize, usize),
) {
    let body = body.as_chunks::<SIZE>().0;
    let elements = &mut elements.as_chunks_mut::<SIZE>().0[done..];
    for (elements, mask) in elements.chunks_mut(STEP).zip(&mask[done / STEP..]) {
        // What follows the eight is zero, for the bits that are not set.
        let mut next = [[0; SIZE]; 2 * STEP];
        match body[at..].first_chunk::<STEP>() {
            Some(chunk) => next[..STEP].copy_from_slice(chunk),
            None => next[..body.len() - at].copy_from_slice(&body[at..]),
        }
        let places = &PLACES[usize::from(*mask)];
        for (element, rank) in elements.iter_mut().zip(places.rank) {
            *element = next[usize::from(rank) % (2 * STEP)];
        }
        at += places.count;
    }
}

/// The codes of a body as numbers: a byte each or half of one, of which `mask` tells who is there.
pub(super) fn widen(form: (bool, bool), mask: Option<&[u8]>, body: &[u8], numbers: &mut [f32]) {
    let done = match (form, mask) {
        // A loop that compilers make vector instructions of.
        ((false, _), None) => (0, 0),
        _ => wide::widen(form, mask, body, numbers),
    };
    widen_from(form, mask, body, numbers, done);
}

/// The same from a number on, a whole number of steps, where so many codes are used before.
fn widen_from(
    (is_half, signed): (bool, bool),
    mask: Option<&[u8]>,
    body: &[u8],
    numbers: &mut [f32],
    (done, at): (usize, usize),
) {
    let upper = |code: u8| f32::from((code << 4) as i8 >> 4); // the sign fills the upper half
    let lower = |code: u8| f32::from(code as i8);
    let numbers = &mut numbers[done..];
    let mask = mask.map(|mask| &mask[done / STEP..]);
    let each = numbers.iter_mut().zip(&body[at.min(body.len())..]);
    match (is_half, signed) {
        (false, false) if mask.is_none() => each.for_each(|(to, code)| *to = f32::from(*code)),
        (false, true) if mask.is_none() => each.for_each(|(to, code)| *to = lower(*code)),
        (false, false) => widen_as((mask, body), at, numbers, bytes_at, f32::from),
        (false, true) => widen_as((mask, body), at, numbers, bytes_at, lower),
        (true, false) => widen_as((mask, body), at, numbers, halves_at, f32::from),
        (true, true) => widen_as((mask, body), at, numbers, halves_at, upper),
    }
}

/// The same for codes of which `codes_at` gives eight from a place on.
fn widen_as(
    (mask, body): (Option<&[u8]>, &[u8]),
    mut at: usize,
    numbers: &mut [f32],
    codes_at: impl Fn(&[u8], usize) -> u64,
    number: impl Fn(u8) -> f32,
) {
    let Some(mask) = mask else {
        for numbers in numbers.chunks_mut(STEP) {
            let codes = codes_at(body, at).to_le_bytes();
            numbers.iter_mut().zip(codes).for_each(|(to, code)| *to = number(code));
            at += STEP;
        }
        return;
    };
    // What follows the eight is zero, for the bits that are not set.
    let mut next = [0.0; 2 * STEP];
    for (numbers, &mask) in numbers.chunks_mut(STEP).zip(mask) {
        let codes = codes_at(body, at).to_le_bytes();
        next.iter_mut().zip(codes).for_each(|(next, code)| *next = number(code));
        let places = &PLACES[usize::from(mask)];
        for (to, rank) in numbers.iter_mut().zip(places.rank) {
            *to = next[usize::from(rank) % (2 * STEP)];
        }
        at += places.count;
    }
}

/// Eight bytes from a place on; zeros beyond the end.
fn bytes_at(body: &[u8], at: usize) -> u64 {
    let rest = body.get(at..).unwrap_or(&[]);
    u64::from_le_bytes(match rest.first_chunk::<STEP>() {
        Some(bytes) => *bytes,
        None => {
            let mut bytes = [0; STEP];
            bytes[..rest.len()].copy_from_slice(rest);
            bytes
        }
    })
}

/// Eight codes from a place on where two share a byte, each in a byte of its own.
fn halves_at(body: &[u8], at: usize) -> u64 {
    let mut x = bytes_at(body, at / 2) >> (at % 2 * 4) & 0xffff_ffff;
    x = (x | x << 16) & 0x0000_ffff_0000_ffff;
    x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
    (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes of which some are zero, alone and in runs.
    fn sparse() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![3 => Just(0), 2 => any::<u8>(), 1 => Just(0x80)];
        prop::collection::vec(byte, 0..700)
    }

    /// What packing gives by the wide loops and without them: mask and elements that are kept.
    fn packed<const SIZE: usize>(elements: &[u8]) -> [(Vec<u8>, Vec<u8>); 2] {
        let count = elements.len() / SIZE;
        let kept = SIZE * kept::<SIZE>(elements);
        let mask = count.div_ceil(STEP);
        let mut bytes = vec![0; mask];
        bytes.extend(&elements[..SIZE * count]);
        pack::<SIZE>(&mut bytes, mask);
        let (mut plain, mut plain_mask) = (elements[..SIZE * count].to_vec(), vec![0; mask]);
        pack_from::<SIZE>(&mut plain, &mut plain_mask, (0, 0));
        let wide = (bytes[..mask].to_vec(), bytes[mask..][..kept].to_vec());
        [wide, (plain_mask, plain[..kept].to_vec())]
    }

    proptest! {
        #[test]
        fn wide_loops_give_the_bytes_of_plain_ones(bytes in sparse()) {
            let [wide, plain] = packed::<1>(&bytes);
            prop_assert_eq!(wide, plain);
            let [wide, plain] = packed::<2>(&bytes);
            prop_assert_eq!(&wide, &plain);
            let (mask, body) = wide;
            let mut elements = [vec![1; bytes.len() / 2 * 2], vec![2; bytes.len() / 2 * 2]];
            unpack::<2>(&mask, &body, &mut elements[0]);
            unpack_from::<2>(&mask, &body, &mut elements[1], (0, 0));
            prop_assert_eq!(&elements[0], &elements[1]);
            prop_assert_eq!(&elements[0][..], &bytes[..bytes.len() / 2 * 2]);
        }

        #[test]
        fn wide_loops_give_the_numbers_of_plain_ones(
            bytes in sparse(),
            form in (any::<bool>(), any::<bool>()),
            masked in any::<bool>(),
        ) {
            let [(mask, body), _] = packed::<1>(&bytes);
            let (mask, mut body) = (masked.then_some(&mask[..]), if masked { body } else { bytes.clone() });
            if form.0 {
                let length = halve(&mut body);
                body.truncate(length);
            }
            let mut numbers = [vec![1.0; bytes.len()], vec![2.0; bytes.len()]];
            widen(form, mask, &body, &mut numbers[0]);
            widen_from(form, mask, &body, &mut numbers[1], (0, 0));
            let bits = |numbers: &[f32]| numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&numbers[0]), bits(&numbers[1]));
        }
    }
}
