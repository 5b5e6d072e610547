//! A picture on its way: the pixels that a model's input was made of, a byte each instead of four.
//!
//! Takes a model's [`Normalisation`]; writes numbers as the pixels they are the values of, and reads them
//! back. What arrives is bit for bit what was sent: every number is compared with the value of its pixel,
//! and where one differs (an input that was no picture, or was changed) all travel as they are. The form says
//! which: 2 for pixels, 0 for numbers.

use bytes::{BufMut as _, BytesMut};

use super::{ALL, Codec, CodecError, Packing};
use crate::metadata::Normalisation;
use crate::policy::Dtype;

/// Form of a payload of pixels.
pub(super) const PIXELS: u8 = 2;

/// What each pixel is worth in each channel of a model's input.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    normalisation: Normalisation,
    /// The values of the 256 pixels, a channel each.
    values: Vec<[f32; 256]>,
}

impl Pixels {
    /// How a model's input travels that is a picture.
    pub const CODEC: Codec = Codec { dtype: Dtype::F32, signed: true, packing: Packing::Pixels };

    /// The values of all pixels.
    pub fn new(normalisation: Normalisation) -> Pixels {
        let channels = 0..normalisation.mean.len();
        let value = |channel, pixel| normalisation.value(channel, pixel);
        let values =
            channels.map(|channel| std::array::from_fn(|pixel| value(channel, pixel as u8)));
        Pixels { values: values.collect(), normalisation }
    }

    /// How the model's input is made of them.
    pub fn normalisation(&self) -> &Normalisation {
        &self.normalisation
    }

    /// Appends the payload of a tensor `[images, channels, …]`.
    pub fn put(&self, numbers: &[f32], shape: &[usize], payload: &mut BytesMut) {
        let start = payload.len();
        payload.put_u8(PIXELS);
        if self.put_pixels(numbers, shape, payload) {
            return;
        }
        payload.truncate(start);
        payload.put_u8(ALL);
        payload.reserve(4 * numbers.len());
        numbers.iter().for_each(|number| payload.put_f32_le(*number));
    }

    /// Appends the pixels of a tensor `[images, channels, …]`, a byte each; nothing, and false, where a number
    /// is the value of none.
    pub fn put_pixels(&self, numbers: &[f32], shape: &[usize], bytes: &mut BytesMut) -> bool {
        let start = bytes.len();
        bytes.put_bytes(0, numbers.len());
        let pixels = &mut bytes[start..];
        let size = plane(shape);
        let mut planes = numbers.chunks(size).zip(pixels.chunks_mut(size)).enumerate();
        let channels = self.values.len().max(1);
        let found = planes.all(|(at, (from, to))| self.find(at % channels, from, to));
        if !found {
            bytes.truncate(start);
        }
        found
    }

    /// The values of pixels, as many as `numbers`, which is a tensor `[images, channels, …]`.
    pub fn read_pixels(&self, pixels: &[u8], shape: &[usize], numbers: &mut [f32]) {
        let size = plane(shape);
        let planes = numbers.chunks_mut(size).zip(pixels.chunks(size));
        for ((to, from), values) in planes.zip(self.values.iter().cycle()) {
            to.iter_mut().zip(from).for_each(|(to, &pixel)| *to = values[usize::from(pixel)]);
        }
    }

    /// The pixels of a plane; false where a number is the value of none.
    fn find(&self, channel: usize, numbers: &[f32], pixels: &mut [u8]) -> bool {
        let Some(values) = self.values.get(channel) else { return false };
        let (mean, std) = (self.normalisation.mean[channel], self.normalisation.std[channel]);
        let mut differ = false;
        for (pixel, &number) in pixels.iter_mut().zip(numbers) {
            // Near enough for the nearest; a cast saturates.
            *pixel = ((number * std + mean) * 255.0 + 0.5) as u8;
            differ |= values[usize::from(*pixel)].to_bits() != number.to_bits();
        }
        !differ
    }

    /// Reads a payload into `numbers`, a tensor of `shape`.
    ///
    /// # Errors
    /// A payload of another size or form.
    pub fn read(
        &self,
        payload: &[u8],
        shape: &[usize],
        numbers: &mut [f32],
    ) -> Result<(), CodecError> {
        Pixels::CODEC.check(payload, shape)?;
        let (form, body) = payload.split_first().ok_or(CodecError::CutShort)?;
        if *form == ALL {
            for (number, bytes) in numbers.iter_mut().zip(body.as_chunks().0) {
                *number = f32::from_le_bytes(*bytes);
            }
            return Ok(());
        }
        self.read_pixels(body, shape, numbers);
        Ok(())
    }
}

/// Elements of one channel of one image.
fn plane(shape: &[usize]) -> usize {
    shape.iter().skip(2).product::<usize>().max(1)
}
