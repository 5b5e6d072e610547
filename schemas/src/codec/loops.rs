//! The codecs' loops: quantising, packing zeros, and both back.
//!
//! Takes and gives slices; what the bytes mean is the specification in [`codec`](super). Elements go eight at
//! a time through arrays of a fixed size, so that compilers make vector instructions of what is regular,
//! and nothing branches on a single element: which half of a ReLU's results is zero cannot be guessed. What moves
//! elements together or apart is written against [`eights`](super::eights), and goes 64 bytes at a time where the
//! processor can ([`wide`]).

#![allow(unsafe_code, reason = "an instruction set's operations are unsafe for other processors")]

use super::eights::{self, Eight, Eights, Loop, Numbers, Places, STEP};
use super::{LEAST, TO_WHOLE, wide};

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

/// A loop over elements that stay as they are.
trait Move {
    /// Bytes of an element: 1, 2 or 4.
    const ELEMENT: usize;

    /// Runs over eights of `BYTES`.
    ///
    /// # Safety
    /// The processor has the instruction set, and `BYTES` is eight times [`Move::ELEMENT`].
    unsafe fn eights<E: Eight<BYTES>, const BYTES: usize>(self);
}

impl<M: Move> Loop for M {
    #[inline(always)]
    unsafe fn run<E: Eights>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match M::ELEMENT {
                1 => self.eights::<E, 8>(),
                2 => self.eights::<E, 16>(),
                _ => self.eights::<E, 32>(),
            }
        }
    }
}

/// Fills the mask, the first `mask` bytes, and moves the elements that are not zero right behind it.
pub(super) fn pack<const SIZE: usize>(bytes: &mut [u8], mask: usize) {
    let (mask, elements) = bytes.split_at_mut(mask);
    let done = wide::pack::<SIZE>(elements, mask);
    eights::run(Pack::<SIZE> { elements, mask, done });
}

/// Packing from a byte of the mask on, where so many elements are kept before.
struct Pack<'a, const SIZE: usize> {
    elements: &'a mut [u8],
    mask: &'a mut [u8],
    done: (usize, usize),
}

impl<const SIZE: usize> Move for Pack<'_, SIZE> {
    const ELEMENT: usize = SIZE;

    #[inline(always)]
    unsafe fn eights<E: Eight<BYTES>, const BYTES: usize>(self) {
        let Pack { elements, mask, done: (first, mut to) } = self;
        for (step, mask) in mask.iter_mut().enumerate().skip(first) {
            let next = array_at::<BYTES>(elements, BYTES * step);
            // SAFETY, here and below: the caller's promise.
            *mask = unsafe { E::nonzero(next) };
            let places = Places::of(*mask);
            // Never beyond what has been read: as many elements lie between as were zero.
            let room = &mut elements[SIZE * to..];
            match room.first_chunk_mut() {
                Some(room) => unsafe { E::pick(next, places.set, room) },
                None => {
                    let mut last = [0; BYTES];
                    unsafe { E::pick(next, places.set, &mut last) };
                    room.copy_from_slice(&last[..room.len()]);
                }
            }
            to += places.count;
        }
    }
}

/// Puts elements where the mask says, zeros elsewhere.
pub(super) fn unpack<const SIZE: usize>(mask: &[u8], body: &[u8], elements: &mut [u8]) {
    let done = wide::unpack::<SIZE>(mask, body, elements);
    eights::run(Unpack::<SIZE> { mask, body, elements, done });
}

/// Unpacking from an element on, a whole number of steps, where so many of the body's are used before.
struct Unpack<'a, const SIZE: usize> {
    mask: &'a [u8],
    body: &'a [u8],
    elements: &'a mut [u8],
    done: (usize, usize),
}

impl<const SIZE: usize> Move for Unpack<'_, SIZE> {
    const ELEMENT: usize = SIZE;

    #[inline(always)]
    unsafe fn eights<E: Eight<BYTES>, const BYTES: usize>(self) {
        let Unpack { mask, body, elements, done: (done, mut at) } = self;
        let mut masks = mask[done / STEP..].iter();
        let (whole, rest) = elements[SIZE * done..].as_chunks_mut::<BYTES>();
        let mut last = [[0; BYTES]];
        for part in [whole, &mut last] {
            for (elements, &mask) in part.iter_mut().zip(&mut masks) {
                let places = Places::of(mask);
                let next = array_at::<BYTES>(body, SIZE * at);
                // SAFETY: the caller's promise.
                unsafe { E::pick(next, places.rank, elements) };
                at += places.count;
            }
        }
        rest.copy_from_slice(&last[0][..rest.len()]);
    }
}

/// The codes of a body as numbers: a byte each or half of one, of which `mask` tells who is there.
pub(super) fn widen(form: (bool, bool), mask: Option<&[u8]>, body: &[u8], numbers: &mut [f32]) {
    // Compilers make vector instructions of these.
    let each = numbers.iter_mut().zip(body);
    match (form, mask) {
        ((false, false), None) => each.for_each(|(number, code)| *number = f32::from(*code)),
        ((false, true), None) => each.for_each(|(number, code)| *number = f32::from(*code as i8)),
        _ => {
            let done = wide::widen(form, mask, body, numbers);
            eights::run(Widen { form, mask, body, numbers, done });
        }
    }
}

/// Widening from a number on, a whole number of steps, where so many codes are used before.
struct Widen<'a> {
    form: (bool, bool),
    mask: Option<&'a [u8]>,
    body: &'a [u8],
    numbers: &'a mut [f32],
    done: (usize, usize),
}

impl Loop for Widen<'_> {
    #[inline(always)]
    unsafe fn run<E: Eights>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.form {
                (false, false) => self.codes::<E, false>(array_at),
                (false, true) => self.codes::<E, true>(array_at),
                (true, false) => self.codes::<E, false>(halves_at::<false>),
                (true, true) => self.codes::<E, true>(halves_at::<true>),
            }
        }
    }
}

impl Widen<'_> {
    /// Widens codes of which `codes_at` gives eight from a place on.
    #[inline(always)]
    unsafe fn codes<E: Numbers, const SIGNED: bool>(
        self,
        codes_at: impl Fn(&[u8], usize) -> [u8; STEP],
    ) {
        let Widen { mask, body, numbers, done: (done, mut at), .. } = self;
        let mut masks = mask.map(|mask| mask[done / STEP..].iter());
        let (whole, rest) = numbers[done..].as_chunks_mut::<STEP>();
        let mut last = [[0.0; STEP]];
        for part in [whole, &mut last] {
            // SAFETY, of both: the caller's promise.
            let Some(masks) = &mut masks else {
                for numbers in part {
                    unsafe { E::numbers::<SIGNED>(codes_at(body, at), numbers) };
                    at += STEP;
                }
                continue;
            };
            for (numbers, &mask) in part.iter_mut().zip(masks) {
                let places = Places::of(mask);
                unsafe { E::picked::<SIGNED>(codes_at(body, at), places.rank, numbers) };
                at += places.count;
            }
        }
        rest.copy_from_slice(&last[0][..rest.len()]);
    }
}

/// The bytes of an array from a place on; zeros beyond the end.
#[inline(always)]
fn array_at<const BYTES: usize>(bytes: &[u8], at: usize) -> [u8; BYTES] {
    let rest = bytes.get(at..).unwrap_or(&[]);
    match rest.first_chunk() {
        Some(bytes) => *bytes,
        None => padded(rest),
    }
}

/// Apart, or compilers make one copy of any length of both.
#[cold]
#[inline(never)]
fn padded<const BYTES: usize>(rest: &[u8]) -> [u8; BYTES] {
    let mut padded = [0; BYTES];
    padded[..rest.len()].copy_from_slice(rest);
    padded
}

/// Eight bytes from a place on; zeros beyond the end.
#[inline(always)]
fn bytes_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// Eight codes from a place on where two share a byte, each in a byte of its own.
#[inline(always)]
fn halves_at<const SIGNED: bool>(body: &[u8], at: usize) -> [u8; STEP] {
    let mut x = bytes_at(body, at / 2) >> (at % 2 * 4) & 0xffff_ffff;
    x = (x | x << 16) & 0x0000_ffff_0000_ffff;
    x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
    x = (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f;
    if SIGNED {
        // (c ^ 8) − 8 in each byte, which the topmost bit keeps from borrowing of its neighbour.
        let upper = 0x8080_8080_8080_8080;
        x = (((x ^ 0x0808_0808_0808_0808) | upper) - 0x0808_0808_0808_0808) ^ upper;
    }
    x.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::eights::{Isa, run_on};
    use super::*;

    /// Bytes of which some are zero, alone and in runs.
    fn sparse() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![3 => Just(0), 2 => any::<u8>(), 1 => Just(0x80)];
        prop::collection::vec(byte, 0..700)
    }

    /// Mask and elements that are kept, bit by bit.
    fn defined<const SIZE: usize>(elements: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let elements = elements.as_chunks::<SIZE>().0;
        let mut mask = vec![0; elements.len().div_ceil(STEP)];
        for (at, _) in elements.iter().enumerate().filter(|(_, e)| **e != [0; SIZE]) {
            mask[at / STEP] |= 1 << (at % STEP);
        }
        (mask, elements.iter().filter(|e| **e != [0; SIZE]).flatten().copied().collect())
    }

    /// Packs elements in every way there is, and unpacks them.
    fn there_and_back<const SIZE: usize>(elements: &[u8]) {
        let elements = &elements[..elements.len() / SIZE * SIZE];
        let (mask, kept) = defined::<SIZE>(elements);
        assert_eq!(super::kept::<SIZE>(elements) * SIZE, kept.len());
        let mut bytes = [vec![0; mask.len()], elements.to_vec()].concat();
        pack::<SIZE>(&mut bytes, mask.len());
        assert_eq!(bytes[..mask.len() + kept.len()], [&mask[..], &kept].concat());
        for isa in Isa::available() {
            let (mut there, mut elements) = (vec![0; mask.len()], elements.to_vec());
            run_on(isa, Pack::<SIZE> { elements: &mut elements, mask: &mut there, done: (0, 0) });
            assert_eq!((there, &elements[..kept.len()]), (mask.clone(), &kept[..]));
        }
        let mut back = vec![1; elements.len()];
        unpack::<SIZE>(&mask, &kept, &mut back);
        assert_eq!(back, elements);
        for isa in Isa::available() {
            let mut back = vec![1; elements.len()];
            run_on(
                isa,
                Unpack::<SIZE> { mask: &mask, body: &kept, elements: &mut back, done: (0, 0) },
            );
            assert_eq!(back, elements);
        }
    }

    proptest! {
        #[test]
        fn packing_keeps_what_is_not_zero_and_unpacking_is_its_inverse(bytes in sparse()) {
            there_and_back::<1>(&bytes);
            there_and_back::<2>(&bytes);
            there_and_back::<4>(&bytes);
        }

        #[test]
        fn codes_become_their_numbers(
            bytes in sparse(),
            form in (any::<bool>(), any::<bool>()),
            masked in any::<bool>(),
        ) {
            let codes: Vec<u8> = match form {
                (true, _) => bytes.iter().map(|byte| byte & 15).collect(),
                (false, _) => bytes,
            };
            let number = |&code: &u8| match form {
                (true, true) => f32::from((code << 4) as i8 >> 4),
                (false, true) => f32::from(code as i8),
                (_, false) => f32::from(code),
            };
            let expected: Vec<f32> = codes.iter().map(number).collect();
            let (mask, kept) = defined::<1>(&codes);
            let (mask, mut body) = if masked { (Some(&mask[..]), kept) } else { (None, codes) };
            if form.0 {
                let length = halve(&mut body);
                body.truncate(length);
            }
            let mut numbers = vec![f32::NAN; expected.len()];
            widen(form, mask, &body, &mut numbers);
            prop_assert_eq!(&numbers, &expected);
            for isa in Isa::available() {
                let mut numbers = vec![f32::NAN; expected.len()];
                run_on(isa, Widen { form, mask, body: &body, numbers: &mut numbers, done: (0, 0) });
                assert_eq!(numbers, expected);
            }
        }
    }

    /// Least times in µs of plain Rust and of what else the processor has, AVX-512 aside:
    /// `cargo test --release -p snn-schemas --lib how_long -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    #[allow(clippy::print_stdout, reason = "what is measured is to be read")]
    fn how_long_the_loops_take() {
        const COUNT: usize = 57_344;
        fn times(name: &str, mut timed: impl FnMut(Isa)) {
            print!("{name:14}");
            for isa in Isa::available() {
                let mut least = f64::INFINITY;
                for _ in 0..400 {
                    let start = std::time::Instant::now();
                    timed(isa);
                    least = least.min(start.elapsed().as_secs_f64() * 1e6);
                }
                print!("  {isa:?} {least:5.1}");
            }
            println!();
        }
        // Which are zero follows no pattern that a branch could learn.
        let mut state = 1u64;
        let mut code = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if state >> 63 == 1 { (state >> 40) as u8 & 15 | 1 } else { 0 }
        };
        let codes: Vec<u8> = (0..COUNT).map(|_| code()).collect();
        let halves: Vec<u8> = codes.iter().flat_map(|&code| [code, code]).collect();
        let (mask, kept) = defined::<1>(&codes);
        let (_, kept_halves) = defined::<2>(&halves);
        let mut nibbles = kept.clone();
        let length = halve(&mut nibbles);
        let (mut memory, mut there, mut numbers) = (halves.clone(), mask.clone(), vec![0.0; COUNT]);

        times("i8 packed", |isa| {
            let elements = &mut memory[..COUNT];
            elements.copy_from_slice(&codes);
            run_on(isa, Pack::<1> { elements, mask: &mut there, done: (0, 0) });
        });
        times("f16 packed", |isa| {
            memory.copy_from_slice(&halves);
            run_on(isa, Pack::<2> { elements: &mut memory, mask: &mut there, done: (0, 0) });
        });
        times("f16 unpacked", |isa| {
            let elements = &mut memory;
            run_on(isa, Unpack::<2> { mask: &mask, body: &kept_halves, elements, done: (0, 0) });
        });
        for (name, is_half, mask, body) in [
            ("i8", false, None, &codes[..]),
            ("i8 unpacked", false, Some(&mask[..]), &kept),
            ("i4", true, None, &codes),
            ("i4 unpacked", true, Some(&mask), &nibbles[..length]),
        ] {
            times(name, |isa| {
                let form = (is_half, false);
                run_on(isa, Widen { form, mask, body, numbers: &mut numbers, done: (0, 0) });
            });
        }
    }
}
