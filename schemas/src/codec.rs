//! How features are written while they travel, and the specification of those bytes.
//!
//! A [`Codec`] is an element type and a packing. Takes numbers, gives the payload of a tensor frame,
//! and back; the runtime calls it on what it sends, training on what it simulates, so both round
//! alike. A payload is, in this order, little-endian:
//!
//! | part | present | bytes |
//! |---|---|---|
//! | scales | i8, i4 | an `f32` for each run of [`Codec::run`] elements |
//! | form | packing `zeros` | 1: 0 all elements follow, 1 a mask and the elements that are not zero |
//! | mask | form 1 | ⌈n/8⌉: bit i mod 8 of byte ⌊i/8⌋ is set where element i is not zero |
//! | elements | always | f32 and f16 4 and 2 each; i8 1; i4 a half, the lower half of a byte first |
//!
//! **Quantising** (i8, i4): with m the largest magnitude of a run, at least 10⁻³⁰, and L the largest code
//! (255 and 15 where nothing is negative, 127 and 7 with a sign), an element x travels as
//! q = round(x · (L / m)), ties to even, and arrives as q · (m / L), each operation rounded to f32. What is
//! sent closes a block, so it is mostly a ReLU's result: then no code is wasted on a sign. Zero
//! stays exactly zero. Any bytes give numbers or an error of one sentence.

use bytes::{BufMut as _, BytesMut};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::policy::Dtype;

/// Least magnitude a scale is made of: a run of zeros needs one too.
pub const LEAST: f32 = 1e-30;
/// Fewest elements of a channel that has a scale of its own: four bytes beside them are an eighth of
/// their bytes at most. Smaller ones share the scale of their image.
pub const LEAST_RUN: usize = 32;

/// 1.5 · 2²³: a number between ±2²² added to it lands where one step is 1, rounded to even.
pub const TO_WHOLE: f32 = 12_582_912.0;
/// Form of a payload that has all elements.
const ALL: u8 = 0;
/// Form of a payload that has a mask and the elements that are not zero.
const MASKED: u8 = 1;

/// How elements that are zero travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Like all others.
    #[default]
    None,
    /// As a bit each, where that is shorter: half of what a ReLU gives is zero.
    Zeros,
}

impl Packing {
    /// Whether elements travel unpacked, for serde.
    pub fn is_none(&self) -> bool {
        *self == Packing::None
    }
}

impl std::fmt::Display for Packing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Packing::None => "none",
            Packing::Zeros => "zeros",
        })
    }
}

impl std::str::FromStr for Packing {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Packing, CodecError> {
        match text {
            "none" => Ok(Packing::None),
            "zeros" => Ok(Packing::Zeros),
            other => Err(CodecError::Packing { found: other.to_owned() }),
        }
    }
}

/// How the elements of one tensor travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Codec {
    /// Element type on the wire.
    pub dtype: Dtype,
    /// Whether elements may be negative; decides what the codes of `i8` and `i4` stand for.
    pub signed: bool,
    /// What becomes of zeros.
    pub packing: Packing,
}

impl Codec {
    /// Elements as they are, of type `dtype`.
    pub fn plain(dtype: Dtype) -> Codec {
        Codec { dtype, signed: true, packing: Packing::None }
    }

    /// L, the largest code; `None` for floating-point types, which have no scale.
    pub fn largest(&self) -> Option<f32> {
        match (self.dtype, self.signed) {
            (Dtype::F32 | Dtype::F16, _) => None,
            (Dtype::I8, false) => Some(255.0),
            (Dtype::I8, true) => Some(127.0),
            (Dtype::I4, false) => Some(15.0),
            (Dtype::I4, true) => Some(7.0),
        }
    }

    /// Elements of a tensor `[images, channels, …]` that share a scale: a channel's, or an image's
    /// where channels have fewer than [`LEAST_RUN`]. On the 8×8 features of `examples/models/digits.onnx` a
    /// scale a channel leaves 0.6 of the error that a scale an image does, for 6 % more bytes in i8.
    pub fn run(shape: &[usize]) -> usize {
        let image: usize = shape.iter().skip(1).product();
        let channel: usize = shape.iter().skip(2).product();
        match shape.len() > 2 && channel >= LEAST_RUN {
            true => channel,
            false => image,
        }
    }

    /// Bytes of a payload of `shape`; an upper bound where [`Codec::is_exact`] says so, and `None`
    /// beyond what can be counted.
    pub fn bytes(&self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))?;
        let scales = match self.largest() {
            Some(_) => elements.checked_div(Codec::run(shape)).unwrap_or(0).checked_mul(4)?,
            None => 0,
        };
        let form = usize::from(self.packing == Packing::Zeros);
        self.body(elements)?.checked_add(scales)?.checked_add(form)
    }

    /// Whether every payload of one shape has the same size.
    pub fn is_exact(&self) -> bool {
        self.packing == Packing::None
    }

    /// Bytes of `elements` elements alone.
    fn body(&self, elements: usize) -> Option<usize> {
        elements.checked_mul(self.dtype.bits()).map(|bits| bits.div_ceil(8))
    }

    /// Appends the payload of elements that are of the type that travels already (f32, f16).
    pub fn put_elements(&self, elements: &[u8], payload: &mut BytesMut) {
        let size = self.dtype.bits().div_ceil(8);
        let start = payload.len();
        self.open(elements.len() / size, payload);
        payload.extend_from_slice(elements);
        self.close(start, elements.len() / size, payload);
    }

    /// Appends the payload of numbers that are quantised on the way: scales, then codes. A run of `run`
    /// elements shares a scale; numbers beyond the last whole run are not sent.
    pub fn put_numbers(&self, numbers: &[f32], run: usize, payload: &mut BytesMut) {
        let Some(largest) = self.largest() else {
            return self.put_elements(&little_endian(numbers), payload);
        };
        let runs = numbers.len() / run.max(1);
        let count = runs * run;
        let scales = payload.len();
        payload.put_bytes(0, runs * 4);
        let start = payload.len();
        self.open(count, payload);
        let codes = payload.len();
        payload.put_bytes(0, count);
        let (head, codes) = payload.split_at_mut(codes);
        let scales = head[scales..start].as_chunks_mut::<4>().0;
        let runs = numbers.chunks_exact(run.max(1)).zip(codes.chunks_exact_mut(run.max(1)));
        for ((numbers, codes), scale) in runs.zip(scales) {
            *scale = quantise(numbers, largest, codes).to_le_bytes();
        }
        self.close(start, count, payload);
    }

    /// Writes room for the form and the mask of `count` elements, where there are such.
    fn open(&self, count: usize, payload: &mut BytesMut) {
        if self.packing == Packing::Zeros {
            payload.put_bytes(ALL, 1 + count.div_ceil(8));
        }
    }

    /// Packs the `count` elements behind what [`Codec::open`] wrote at `start`; an i4 has a byte so far.
    fn close(&self, start: usize, count: usize, payload: &mut BytesMut) {
        let body = match self.packing {
            Packing::None => start,
            Packing::Zeros => {
                let (mask, size) = (count.div_ceil(8), self.dtype.bits().div_ceil(8));
                let packed = &mut payload[start + 1..];
                let kept = match size {
                    4 => kept::<4>(&packed[mask..]),
                    2 => kept::<2>(&packed[mask..]),
                    _ => kept::<1>(&packed[mask..]),
                };
                let masked = (kept * self.dtype.bits()).div_ceil(8) + mask;
                if masked < (count * self.dtype.bits()).div_ceil(8) {
                    match size {
                        4 => pack::<4>(packed, mask),
                        2 => pack::<2>(packed, mask),
                        _ => pack::<1>(packed, mask),
                    }
                    payload[start] = MASKED;
                    payload.truncate(start + 1 + mask + kept * size);
                    start + 1 + mask
                } else {
                    packed.copy_within(mask.., 0);
                    let end = payload.len() - mask;
                    payload.truncate(end);
                    start + 1
                }
            }
        };
        if self.dtype == Dtype::I4 {
            let halves = halve(&mut payload[body..]);
            payload.truncate(body + halves);
        }
    }

    /// The scales of a payload and its elements, apart.
    ///
    /// # Errors
    /// A payload that is not of `count` elements with a scale each `run`.
    fn open_payload<'a>(
        &self,
        payload: &'a [u8],
        count: usize,
        run: usize,
    ) -> Result<(&'a [[u8; 4]], Elements<'a>), CodecError> {
        let scales = match self.largest() {
            Some(_) => count.checked_div(run).unwrap_or(0) * 4,
            None => 0,
        };
        let (scales, rest) = payload.split_at_checked(scales).ok_or(CodecError::CutShort)?;
        let (form, rest) = match self.packing {
            Packing::None => (ALL, rest),
            Packing::Zeros => {
                rest.split_first().map(|(&f, r)| (f, r)).ok_or(CodecError::CutShort)?
            }
        };
        let (mask, body, kept) = match form {
            ALL => (None, rest, count),
            MASKED => {
                let mask = rest.split_at_checked(count.div_ceil(8)).ok_or(CodecError::CutShort)?;
                let kept = mask.0.iter().map(|byte| byte.count_ones() as usize).sum();
                let last = mask.0.last().copied().unwrap_or(0);
                if !count.is_multiple_of(8) && last >> (count % 8) != 0 {
                    return Err(CodecError::Mask);
                }
                (Some(mask.0), mask.1, kept)
            }
            found => return Err(CodecError::Form { found }),
        };
        match self.body(kept) == Some(body.len()) {
            true => Ok((scales.as_chunks().0, Elements { mask, body })),
            false => Err(CodecError::Size { found: body.len(), elements: kept }),
        }
    }

    /// Whether `payload` is one of a tensor of `shape`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, payload: &[u8], shape: &[usize]) -> Result<(), CodecError> {
        let elements: usize = shape.iter().product();
        self.open_payload(payload, elements, Codec::run(shape)).map(|_| ())
    }

    /// Reads the payload of elements that stay of the type that travelled (f32, f16) into `elements`.
    ///
    /// # Errors
    /// A payload of another size or form.
    pub fn read_elements(&self, payload: &[u8], elements: &mut [u8]) -> Result<(), CodecError> {
        let size = self.dtype.bits().div_ceil(8);
        let (_, Elements { mask, body }) = self.open_payload(payload, elements.len() / size, 0)?;
        match (mask, size) {
            (None, _) if body.len() == elements.len() => elements.copy_from_slice(body),
            (None, _) => return Err(CodecError::CutShort),
            (Some(mask), 4) => unpack::<4>(mask, body, elements),
            (Some(mask), 2) => unpack::<2>(mask, body, elements),
            (Some(mask), _) => unpack::<1>(mask, body, elements),
        }
        Ok(())
    }

    /// Reads the payload of quantised numbers (i8, i4), of which `run` share a scale, into `numbers`.
    ///
    /// # Errors
    /// A payload of another size or form, or a codec of another type.
    pub fn read_numbers(
        &self,
        payload: &[u8],
        run: usize,
        numbers: &mut [f32],
    ) -> Result<(), CodecError> {
        let run = run.max(1);
        let (scales, elements) = self.open_payload(payload, numbers.len(), run)?;
        match (self.dtype, self.signed) {
            (Dtype::I8, false) => elements.numbers(numbers, |body, at| f32::from(body[at])),
            (Dtype::I8, true) => elements.numbers(numbers, |body, at| f32::from(body[at] as i8)),
            (Dtype::I4, false) => elements.numbers(numbers, |body, at| f32::from(half(body, at))),
            (Dtype::I4, true) => elements.numbers(numbers, |body, at| {
                f32::from((half(body, at) << 4) as i8 >> 4) // the sign fills the upper half
            }),
            (Dtype::F32 | Dtype::F16, _) => return Err(CodecError::Unscaled),
        }
        for (numbers, &scale) in numbers.chunks_exact_mut(run).zip(scales) {
            let scale = f32::from_le_bytes(scale);
            numbers.iter_mut().for_each(|number| *number *= scale);
        }
        Ok(())
    }

    /// Rounds numbers as they arrive; f16 and f32 are left alone.
    pub fn round(&self, numbers: &mut [f32], run: usize) {
        let Some(largest) = self.largest() else { return };
        for numbers in numbers.chunks_mut(run.max(1)) {
            let (scale, inverse) = scale(numbers, largest);
            for number in numbers {
                *number = ((*number * inverse + TO_WHOLE) - TO_WHOLE) * scale;
            }
        }
    }
}

/// The elements of a payload, with the mask of those that are there.
struct Elements<'a> {
    mask: Option<&'a [u8]>,
    body: &'a [u8],
}

impl Elements<'_> {
    /// The codes as numbers, `code` read at a place of the body. The body fits the mask.
    fn numbers(&self, numbers: &mut [f32], code: impl Fn(&[u8], usize) -> f32) {
        let Some(mask) = self.mask else {
            let all = numbers.iter_mut().enumerate();
            return all.for_each(|(at, number)| *number = code(self.body, at));
        };
        let mut at = 0;
        for (numbers, &mask) in numbers.chunks_mut(8).zip(mask) {
            for (bit, number) in numbers.iter_mut().enumerate() {
                let there = mask >> bit & 1 == 1;
                *number = if there { code(self.body, at) } else { 0.0 };
                at += usize::from(there);
            }
        }
    }
}

/// The code at a place where two share a byte.
fn half(body: &[u8], at: usize) -> u8 {
    body[at / 2] >> (at % 2 * 4) & 15
}

/// Scale of a run and what a number is multiplied by to become a code.
fn scale(numbers: &[f32], largest: f32) -> (f32, f32) {
    // In lanes, so that the maximum is found eight at a time.
    let mut lanes = [LEAST; 8];
    let (chunks, rest) = numbers.as_chunks::<8>();
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
fn quantise(numbers: &[f32], largest: f32, codes: &mut [u8]) -> f32 {
    let (scale, inverse) = scale(numbers, largest);
    for (code, number) in codes.iter_mut().zip(numbers) {
        *code = (number * inverse + TO_WHOLE).to_bits() as u8;
    }
    scale
}

/// Puts two codes in a byte; gives the bytes then used.
fn halve(codes: &mut [u8]) -> usize {
    let bytes = codes.len().div_ceil(2);
    for at in 0..bytes {
        let upper = codes.get(2 * at + 1).copied().unwrap_or(0);
        codes[at] = codes[2 * at] & 15 | upper << 4;
    }
    bytes
}

/// How many elements are not zero.
fn kept<const SIZE: usize>(elements: &[u8]) -> usize {
    elements.as_chunks::<SIZE>().0.iter().filter(|element| **element != [0; SIZE]).count()
}

/// Fills the mask, the first `mask` bytes, and moves the elements that are not zero right behind it.
fn pack<const SIZE: usize>(bytes: &mut [u8], mask: usize) {
    let (mask, elements) = bytes.split_at_mut(mask);
    let elements = elements.as_chunks_mut::<SIZE>().0;
    let mut to = 0;
    for (byte, mask) in mask.iter_mut().enumerate() {
        let from = byte * 8;
        for bit in 0..(elements.len() - from).min(8) {
            let element = elements[from + bit];
            let there = element != [0; SIZE];
            *mask |= u8::from(there) << bit;
            elements[to] = element;
            to += usize::from(there);
        }
    }
}

/// Puts elements where the mask says, zeros elsewhere.
fn unpack<const SIZE: usize>(mask: &[u8], body: &[u8], elements: &mut [u8]) {
    let body = body.as_chunks::<SIZE>().0;
    let mut at = 0;
    for (elements, mask) in elements.as_chunks_mut::<SIZE>().0.chunks_mut(8).zip(mask) {
        for (bit, element) in elements.iter_mut().enumerate() {
            let there = mask >> bit & 1 == 1;
            *element = if there { body[at] } else { [0; SIZE] };
            at += usize::from(there);
        }
    }
}

fn little_endian(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Why bytes are no payload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A packing that does not exist.
    #[error("packing \"{found}\", expected \"none\" or \"zeros\"")]
    Packing {
        /// The name that was given.
        found: String,
    },
    /// The payload ends before its elements.
    #[error("payload cut short")]
    CutShort,
    /// A form that does not exist.
    #[error("payload of the unknown form {found}")]
    Form {
        /// Its number.
        found: u8,
    },
    /// The mask names elements beyond the last.
    #[error("the mask has more bits than there are elements")]
    Mask,
    /// More or fewer bytes than elements.
    #[error("{found} bytes are not {elements} elements")]
    Size {
        /// Bytes that follow the mask.
        found: usize,
        /// Elements that must be in them.
        elements: usize,
    },
    /// The codec has no scales.
    #[error("elements that are not quantised are no numbers yet")]
    Unscaled,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn codec(dtype: Dtype, signed: bool, packing: Packing) -> Codec {
        Codec { dtype, signed, packing }
    }

    fn payload(codec: Codec, numbers: &[f32], run: usize) -> BytesMut {
        let mut payload = BytesMut::new();
        codec.put_numbers(numbers, run, &mut payload);
        payload
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_bytes_of_each_form_are_these() {
        let numbers = [0.0, 127.5, 255.0, 0.4, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        // 127.5 is a tie and goes to the even 128; the scale is 1.
        let plain = payload(codec(Dtype::I8, false, Packing::None), &numbers, 12);
        assert_eq!(hex(&plain), "0000803f".to_owned() + "0080ff000000030000000000");
        let packed = payload(codec(Dtype::I8, false, Packing::Zeros), &numbers, 12);
        assert_eq!(hex(&packed), "0000803f".to_owned() + "01" + "4600" + "80ff03");
        let halves = payload(codec(Dtype::I4, true, Packing::None), &[7.0, -7.0, 1.0, 0.0], 2);
        assert_eq!(hex(&halves), "0000803f2549123e".to_owned() + "9707");
        let mut f16 = BytesMut::new();
        codec(Dtype::F16, true, Packing::Zeros)
            .put_elements(&[0, 0, 0, 0x3c, 0, 0, 0, 0], &mut f16);
        assert_eq!(hex(&f16), "0102003c");
        // A mask that would not pay is left out.
        let full = payload(codec(Dtype::I8, false, Packing::Zeros), &[1.0, 2.0], 2);
        assert_eq!(full[4..], [ALL, 128, 255]);
    }

    #[test]
    fn a_run_of_zeros_stays_zeros() {
        for dtype in [Dtype::I8, Dtype::I4] {
            let codec = codec(dtype, false, Packing::None);
            let payload = payload(codec, &[0.0; 40], 40);
            let mut numbers = [1.0; 40];
            codec.read_numbers(&payload, 40, &mut numbers).unwrap();
            assert_eq!(numbers, [0.0; 40]);
        }
    }

    #[test]
    fn what_is_no_payload_is_named() {
        let zeros = codec(Dtype::I8, false, Packing::Zeros);
        let says = |bytes: &[u8]| zeros.check(bytes, &[1, 10]).unwrap_err().to_string();
        assert_eq!(says(&[0, 0, 0]), "payload cut short");
        assert_eq!(says(&[0; 4]), "payload cut short");
        assert_eq!(says(&[0, 0, 0, 0, 2]), "payload of the unknown form 2");
        assert_eq!(says(&[0, 0, 0, 0, 1, 1]), "payload cut short");
        let beyond = "the mask has more bits than there are elements";
        assert_eq!(says(&[0, 0, 0, 0, 1, 1, 4, 1, 1]), beyond);
        assert_eq!(says(&[0, 0, 0, 0, 1, 3, 0, 9]), "1 bytes are not 2 elements");
        assert_eq!(says(&[0, 0, 0, 0, 0, 1]), "1 bytes are not 10 elements");
        assert!(zeros.check(&[0, 0, 0, 0, 1, 3, 0, 9, 9], &[1, 10]).is_ok());
    }

    #[test]
    fn channels_have_scales_of_their_own_where_that_is_cheap() {
        assert_eq!(Codec::run(&[2, 64, 8, 8]), 64);
        assert_eq!(Codec::run(&[2, 64, 2, 2]), 256);
        assert_eq!(Codec::run(&[2, 64]), 64);
        assert_eq!(Codec::run(&[2, 64, 100]), 100);
        let bytes = |dtype, packing, shape: &[usize]| codec(dtype, false, packing).bytes(shape);
        assert_eq!(bytes(Dtype::I8, Packing::None, &[1, 64, 32, 32]), Some(65_536 + 256));
        assert_eq!(bytes(Dtype::I4, Packing::None, &[1, 3, 7, 7]), Some(74 + 12));
        assert_eq!(bytes(Dtype::F16, Packing::Zeros, &[1, 64, 32, 32]), Some(131_073));
        assert_eq!(bytes(Dtype::I8, Packing::None, &[usize::MAX, 2]), None);
        assert_eq!(bytes(Dtype::I8, Packing::None, &[0, 3, 8, 8]), Some(0));
    }

    /// Features: half of them zero, of very different sizes.
    fn features(signed: bool) -> impl Strategy<Value = Vec<f32>> {
        let number = prop_oneof![Just(0.0f32), 0.0f32..1.0, 0.0f32..1e4];
        let sign = prop_oneof![Just(1.0f32), Just(if signed { -1.0 } else { 1.0 })];
        proptest::collection::vec((number, sign).prop_map(|(x, sign)| x * sign), 0..200)
    }

    proptest! {
        #[test]
        fn numbers_arrive_as_training_rounds_them(
            (signed, numbers) in any::<bool>().prop_flat_map(|s| (Just(s), features(s))),
            four: bool, zeros: bool, run in 1usize..70,
        ) {
            let dtype = if four { Dtype::I4 } else { Dtype::I8 };
            let packing = if zeros { Packing::Zeros } else { Packing::None };
            let codec = codec(dtype, signed, packing);
            let numbers = &numbers[..numbers.len() / run * run];
            let payload = payload(codec, numbers, run);
            let mut arrived = vec![f32::NAN; numbers.len()];
            codec.read_numbers(&payload, run, &mut arrived).unwrap();
            let mut rounded = numbers.to_vec();
            codec.round(&mut rounded, run);
            prop_assert_eq!(&arrived, &rounded);
            let largest = codec.largest().unwrap();
            for (sent, arrived) in numbers.chunks(run).zip(arrived.chunks(run)) {
                let most = sent.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (sent, arrived) in sent.iter().zip(arrived) {
                    prop_assert!((sent - arrived).abs() <= 0.5001 * most / largest);
                }
            }
            let shape = [numbers.len() / run, run];
            let bound = codec.bytes(&shape).unwrap();
            prop_assert!(payload.len() <= bound);
            prop_assert!(!codec.is_exact() || payload.len() == bound);
            prop_assert!(codec.check(&payload, &shape).is_ok());
        }

        #[test]
        fn elements_arrive_bit_by_bit(
            elements in proptest::collection::vec(prop_oneof![Just(0u16), any::<u16>()], 0..200),
            wide: bool, zeros: bool,
        ) {
            let dtype = if wide { Dtype::F32 } else { Dtype::F16 };
            let packing = if zeros { Packing::Zeros } else { Packing::None };
            let codec = codec(dtype, true, packing);
            let mut bytes: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
            bytes.truncate(bytes.len() / 4 * 4);
            let mut payload = BytesMut::new();
            codec.put_elements(&bytes, &mut payload);
            let mut arrived = vec![7; bytes.len()];
            codec.read_elements(&payload, &mut arrived).unwrap();
            prop_assert_eq!(&arrived, &bytes);
            let bound = codec.bytes(&[bytes.len() * 8 / dtype.bits()]).unwrap();
            prop_assert!(payload.len() <= bound);
        }

        #[test]
        fn any_bytes_give_numbers_or_an_error(
            bytes in proptest::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..100),
            dtype in prop_oneof![
                Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::I8), Just(Dtype::I4),
            ],
            signed: bool, zeros: bool, count in 0usize..40, run in 0usize..9,
        ) {
            let packing = if zeros { Packing::Zeros } else { Packing::None };
            let codec = codec(dtype, signed, packing);
            let _ = codec.read_numbers(&bytes, run, &mut vec![0.0; count]);
            let _ = codec.read_elements(&bytes, &mut vec![0; count]);
            let _ = codec.check(&bytes, &[count]);
            let mut again = BytesMut::new();
            let wild: Vec<f32> = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
            codec.put_numbers(&wild, run, &mut again);
        }
    }
}
