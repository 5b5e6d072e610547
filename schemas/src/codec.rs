//! How features are written while they travel, and the specification of those bytes.
//!
//! A [`Codec`] is an element type and a packing. Takes numbers, gives the payload of a tensor frame,
//! and back; the runtime calls it on what it sends, training on what it simulates, so both round
//! alike. A payload is, in this order, little-endian:
//!
//! | part | present | bytes |
//! |---|---|---|
//! | scales | i8, i4 | an `f32` for each run of [`Codec::run`] elements |
//! | form | packing `zeros`, `pixels` | 1: 0 all elements follow, 1 a mask and the elements that are not zero, 2 pixels |
//! | mask | form 1 | ⌈n/8⌉: bit i mod 8 of byte ⌊i/8⌋ is set where element i is not zero |
//! | elements | always | f32 and f16 4 and 2 each; i8 1; i4 a half, the lower half of a byte first; a pixel 1 |
//!
//! **Quantising** (i8, i4): with m the largest magnitude of a run, at least 10⁻³⁰, and L the largest code
//! (255 and 15 where nothing is negative, 127 and 7 with a sign), an element x travels as
//! q = round(x · (L / m)), ties to even, and arrives as q · (m / L), each operation rounded to f32. What is
//! sent closes a block, so it is mostly a ReLU's result: then no code is wasted on a sign. Zero
//! stays exactly zero. Any bytes give numbers or an error of one sentence.

mod eights;
mod loops;
mod pixels;
mod wide;

use bytes::{BufMut as _, BytesMut};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use pixels::Pixels;

use crate::policy::Dtype;
use loops::{halve, kept, pack, quantise, scale, unpack};
use pixels::PIXELS;

/// Least magnitude a scale is made of: a run of zeros needs one too.
pub const LEAST: f32 = 1e-30;
/// Fewest elements of a channel that has a scale of its own: four bytes beside them are an eighth of
/// their bytes at most. Smaller ones share the scale of their image.
pub const LEAST_RUN: usize = 32;
/// Share of features taken for zero where nobody says otherwise: what a ReLU leaves of numbers around zero.
pub const LIKELY_ZEROS: f64 = 0.5;

/// 1.5 · 2²³: a number between ±2²² added to it lands where one step is 1, rounded to even.
pub const TO_WHOLE: f32 = 12_582_912.0;
/// Form of a payload that has all elements.
const ALL: u8 = 0;
/// Form of a payload that has a mask and the elements that are not zero.
const MASKED: u8 = 1;

/// How elements travel that need less than their type has: those that are zero, mostly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Like all others.
    #[default]
    None,
    /// As a bit each, where that is shorter: half of what a ReLU gives is zero.
    Zeros,
    /// Like all others; the numbers of a picture travel as its [`Pixels`]. For a model's input only.
    Pixels,
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
            Packing::Pixels => "pixels",
        })
    }
}

impl std::str::FromStr for Packing {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Packing, CodecError> {
        match text {
            "none" => Ok(Packing::None),
            "zeros" => Ok(Packing::Zeros),
            "pixels" => Ok(Packing::Pixels),
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
        let form = usize::from(self.packing != Packing::None);
        self.body(elements)?.checked_add(scales)?.checked_add(form)
    }

    /// Bytes that a payload of `shape` mostly has, for predictions: with [`LIKELY_ZEROS`] of the elements zero
    /// where zeros are packed, and all of them pixels where they may be.
    pub fn likely_bytes(&self, shape: &[usize]) -> Option<usize> {
        self.bytes_with_zeros(shape, LIKELY_ZEROS)
    }

    /// The same with another share of zeros, 0 to 1.
    pub fn bytes_with_zeros(&self, shape: &[usize], zeros: f64) -> Option<usize> {
        let all = self.bytes(shape)?;
        let elements: usize = shape.iter().product();
        let body = self.body(elements)?;
        Some(match self.packing {
            Packing::None => all,
            Packing::Zeros => {
                let kept = (body as f64 * (1.0 - zeros)).ceil() as usize;
                all.min(all - body + elements.div_ceil(8) + kept)
            }
            Packing::Pixels => all - body + elements,
        })
    }

    /// Bytes that a manifest states for a payload of `shape`: the upper bound where zeros are packed, those
    /// of a picture where pixels are.
    pub fn stated_bytes(&self, shape: &[usize]) -> Option<usize> {
        match self.packing {
            Packing::None | Packing::Zeros => self.bytes(shape),
            Packing::Pixels => self.likely_bytes(shape),
        }
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
        match self.packing {
            Packing::None => {}
            Packing::Zeros => payload.put_bytes(ALL, 1 + count.div_ceil(8)),
            Packing::Pixels => payload.put_u8(ALL),
        }
    }

    /// Packs the `count` elements behind what [`Codec::open`] wrote at `start`; an i4 has a byte so far.
    fn close(&self, start: usize, count: usize, payload: &mut BytesMut) {
        let body = match self.packing {
            Packing::None => start,
            Packing::Pixels => start + 1,
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
            Packing::Zeros | Packing::Pixels => {
                rest.split_first().map(|(&f, r)| (f, r)).ok_or(CodecError::CutShort)?
            }
        };
        let (mask, body, kept) = match form {
            ALL => (None, rest, count),
            PIXELS if self.packing == Packing::Pixels => match rest.len() == count {
                true => return Ok((&[], Elements { mask: None, body: rest })),
                false => return Err(CodecError::Size { found: rest.len(), elements: count }),
            },
            MASKED if self.packing == Packing::Zeros => {
                let mask = rest.split_at_checked(count.div_ceil(8)).ok_or(CodecError::CutShort)?;
                let kept = loops::ones(mask.0);
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
    /// A payload of another size or form, or a codec of another type.
    pub fn read_elements(&self, payload: &[u8], elements: &mut [u8]) -> Result<(), CodecError> {
        if self.largest().is_some() {
            return Err(CodecError::Scaled);
        }
        let size = self.dtype.bits().div_ceil(8);
        let (_, Elements { mask, body }) = self.open_payload(payload, elements.len() / size, 0)?;
        match (mask, size) {
            (None, _) if body.len() == elements.len() => elements.copy_from_slice(body),
            (None, _) => return Err(CodecError::CutShort),
            (Some(mask), 4) => unpack::<4>(mask, body, elements),
            (Some(mask), _) => unpack::<2>(mask, body, elements),
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
        let Elements { mask, body } = elements;
        match self.dtype {
            Dtype::I8 => loops::widen((false, self.signed), mask, body, numbers),
            Dtype::I4 => loops::widen((true, self.signed), mask, body, numbers),
            Dtype::F32 | Dtype::F16 => return Err(CodecError::Unscaled),
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

fn little_endian(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Why bytes are no payload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// A packing that does not exist.
    #[error("packing \"{found}\", expected \"none\", \"zeros\" or \"pixels\"")]
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
    /// The codec has scales.
    #[error("elements that are quantised are numbers only with their scales")]
    Scaled,
}

#[cfg(test)]
mod tests;
