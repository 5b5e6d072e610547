//! AutoAugment's policy for CIFAR: two operations on an image, drawn from 25 pairs.
//!
//! Takes an image of three channels of bytes, `[channel, row, column]`, and changes it in place. The
//! pairs, their probabilities and magnitudes are those published with the method (reference 20 of the
//! paper); each operation gives what the Python Imaging Library gives, with the nearest pixel where
//! pixels are moved, and grey where nothing is moved to.

use rand::RngExt;

use crate::seed::Rng;

/// What is moved in from outside an image.
const GREY: u8 = 128;
/// Magnitudes are steps from 0 to this.
const LAST: f32 = 9.0;

/// Something done to an image.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Color,
    Posterize,
    Solarize,
    Contrast,
    Sharpness,
    Brightness,
    AutoContrast,
    Equalize,
    Invert,
}

use Op::*;

/// An operation, the chance in tenths that it is done, and its magnitude, 0 to 9.
type Chance = (Op, u32, u8);

/// The 25 pairs.
const PAIRS: [[Chance; 2]; 25] = [
    [(Invert, 1, 7), (Contrast, 2, 6)],
    [(Rotate, 7, 2), (TranslateX, 3, 9)],
    [(Sharpness, 8, 1), (Sharpness, 9, 3)],
    [(ShearY, 5, 8), (TranslateY, 7, 9)],
    [(AutoContrast, 5, 8), (Equalize, 9, 2)],
    [(ShearY, 2, 7), (Posterize, 3, 7)],
    [(Color, 4, 3), (Brightness, 6, 7)],
    [(Sharpness, 3, 9), (Brightness, 7, 9)],
    [(Equalize, 6, 5), (Equalize, 5, 1)],
    [(Contrast, 6, 7), (Sharpness, 6, 5)],
    [(Color, 7, 7), (TranslateX, 5, 8)],
    [(Equalize, 3, 7), (AutoContrast, 4, 8)],
    [(TranslateY, 4, 3), (Sharpness, 2, 6)],
    [(Brightness, 9, 6), (Color, 2, 8)],
    [(Solarize, 5, 2), (Invert, 0, 3)],
    [(Equalize, 2, 0), (AutoContrast, 6, 0)],
    [(Equalize, 2, 8), (Equalize, 6, 4)],
    [(Color, 9, 9), (Equalize, 6, 6)],
    [(AutoContrast, 8, 4), (Solarize, 2, 8)],
    [(Brightness, 1, 3), (Color, 7, 0)],
    [(Solarize, 4, 5), (AutoContrast, 9, 3)],
    [(TranslateY, 9, 9), (TranslateY, 7, 9)],
    [(AutoContrast, 9, 2), (Solarize, 8, 3)],
    [(Equalize, 8, 8), (Invert, 1, 3)],
    [(TranslateY, 7, 9), (AutoContrast, 9, 1)],
];

/// An image of three channels.
pub(super) struct Image {
    /// `[channel, row, column]`.
    pub(super) pixels: Vec<u8>,
    /// Rows.
    pub(super) height: usize,
    /// Columns.
    pub(super) width: usize,
}

/// Does one of the pairs to `image`.
pub(super) fn augment(image: &mut Image, rng: &mut Rng) {
    for (op, tenths, magnitude) in PAIRS[rng.random_range(0..PAIRS.len())] {
        let done = rng.random_range(0..10) < tenths;
        let sign = if rng.random::<bool>() { 1.0 } else { -1.0 };
        if done {
            apply(image, op, f32::from(magnitude) / LAST, sign);
        }
    }
}

/// Does `op` with a strength of 0 to 1; `sign` turns what has a direction.
fn apply(image: &mut Image, op: Op, strength: f32, sign: f32) {
    let (width, height) = (image.width as f32, image.height as f32);
    // Published for images of 331 pixels, moved by 150 at most.
    let part = sign * strength * 150.0 / 331.0;
    let factor = 1.0 + sign * strength * 0.9;
    match op {
        ShearY => image.transform([1.0, 0.0, 0.0, sign * strength * 0.3, 1.0, 0.0]),
        TranslateX => image.transform([1.0, 0.0, part * width, 0.0, 1.0, 0.0]),
        TranslateY => image.transform([1.0, 0.0, 0.0, 0.0, 1.0, part * height]),
        Rotate => {
            let angle = -(sign * strength * 30.0).to_radians();
            let (sin, cos) = angle.sin_cos();
            let (x, y) = (width / 2.0, height / 2.0);
            image.transform([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]);
        }
        Color => {
            let grey = image.grey();
            image.blend(&[&grey[..], &grey, &grey].concat(), factor);
        }
        Contrast => {
            let grey = image.grey();
            let sum: f64 = grey.iter().map(|pixel| f64::from(*pixel)).sum();
            let mean = (sum / grey.len().max(1) as f64 + 0.5) as u8;
            image.blend(&vec![mean; image.pixels.len()], factor);
        }
        Brightness => image.blend(&vec![0; image.pixels.len()], factor),
        Sharpness => image.blend(&image.smooth(), factor),
        Posterize => {
            let bits = (8.0 - 4.0 * strength).round() as u32;
            image.pixels.iter_mut().for_each(|pixel| *pixel &= !(0xff_u32 >> bits) as u8);
        }
        Solarize => {
            let from = 256.0 * (1.0 - strength);
            let bright = |pixel: &&mut u8| f32::from(**pixel) >= from;
            image.pixels.iter_mut().filter(bright).for_each(|pixel| *pixel = 255 - *pixel);
        }
        Invert => image.pixels.iter_mut().for_each(|pixel| *pixel = 255 - *pixel),
        AutoContrast => image.each_channel(stretch),
        Equalize => image.each_channel(equalize),
    }
}

impl Image {
    fn plane(&self) -> usize {
        (self.height * self.width).max(1)
    }

    /// Takes each pixel from where the matrix says: `x' = a·x + b·y + c`, `y' = d·x + e·y + f`, at
    /// pixels' middles.
    fn transform(&mut self, [a, b, c, d, e, f]: [f32; 6]) {
        let (height, width) = (self.height, self.width);
        for plane in self.pixels.chunks_exact_mut(height * width) {
            let before = plane.to_vec();
            for (at, pixel) in plane.iter_mut().enumerate() {
                let (x, y) = ((at % width) as f32 + 0.5, (at / width) as f32 + 0.5);
                let (from_x, from_y) = ((a * x + b * y + c).floor(), (d * x + e * y + f).floor());
                let inside =
                    (0.0..width as f32).contains(&from_x) && (0.0..height as f32).contains(&from_y);
                *pixel =
                    if inside { before[from_y as usize * width + from_x as usize] } else { GREY };
            }
        }
    }

    /// How bright each pixel is.
    fn grey(&self) -> Vec<u8> {
        let plane = self.plane();
        let channel = |index: usize| self.pixels[index * plane..][..plane].iter();
        let mix = |((red, green), blue): ((&u8, &u8), &u8)| {
            let sum = 19595 * u32::from(*red) + 38470 * u32::from(*green) + 7471 * u32::from(*blue);
            ((sum + 0x8000) >> 16) as u8
        };
        channel(0).zip(channel(1)).zip(channel(2)).map(mix).collect()
    }

    /// Each pixel's mean with its neighbours, itself counted five times; the border stays.
    fn smooth(&self) -> Vec<u8> {
        let (height, width) = (self.height, self.width);
        let mut smooth = self.pixels.clone();
        for (plane, out) in
            self.pixels.chunks_exact(height * width).zip(smooth.chunks_exact_mut(height * width))
        {
            for y in 1..height.saturating_sub(1) {
                for x in 1..width.saturating_sub(1) {
                    let rows = [y - 1, y, y + 1].map(|row| &plane[row * width + x - 1..][..3]);
                    let sum: u32 = rows.concat().into_iter().map(u32::from).sum();
                    let sum = sum + 4 * u32::from(plane[y * width + x]);
                    out[y * width + x] = (sum as f32 / 13.0 + 0.5) as u8;
                }
            }
        }
        smooth
    }

    /// Away from `other` by a factor above 1, towards it by one below.
    fn blend(&mut self, other: &[u8], factor: f32) {
        for (pixel, other) in self.pixels.iter_mut().zip(other) {
            let other = f32::from(*other);
            *pixel = (other + factor * (f32::from(*pixel) - other)).clamp(0.0, 255.0) as u8;
        }
    }

    /// Replaces each channel's values by a table made from how often they occur.
    fn each_channel(&mut self, table: fn(&[u32; 256]) -> Option<[u8; 256]>) {
        let plane = self.plane();
        for plane in self.pixels.chunks_exact_mut(plane) {
            let mut counts = [0; 256];
            plane.iter().for_each(|pixel| counts[usize::from(*pixel)] += 1);
            if let Some(table) = table(&counts) {
                plane.iter_mut().for_each(|pixel| *pixel = table[usize::from(*pixel)]);
            }
        }
    }
}

/// The darkest becomes black, the brightest white.
fn stretch(counts: &[u32; 256]) -> Option<[u8; 256]> {
    let low = counts.iter().position(|count| *count > 0)?;
    let high = counts.iter().rposition(|count| *count > 0).filter(|high| *high > low)?;
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|value| (value as f64 * scale + offset).clamp(0.0, 255.0) as u8))
}

/// All values become equally frequent, as far as a table can do it.
fn equalize(counts: &[u32; 256]) -> Option<[u8; 256]> {
    let last = counts.iter().rposition(|count| *count > 0)?;
    let step = (counts.iter().sum::<u32>() - counts[last]) / 255;
    if step == 0 {
        return None;
    }
    let mut sum = step / 2;
    Some(std::array::from_fn(|value| {
        let level = (sum / step).min(255) as u8;
        sum += counts[value];
        level
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::rng;

    /// Operation, magnitude, sign, and the CRC-32 of what Pillow 13 makes of [`image`].
    const CASES: [(Op, u8, f32, u32); 39] = [
        (ShearY, 3, 1.0, 0x13931f85),
        (TranslateX, 3, 1.0, 0x8c405e2a),
        (TranslateY, 3, 1.0, 0x4321fa45),
        (Rotate, 3, 1.0, 0xd0624161),
        (Color, 3, 1.0, 0xc4c89df7),
        (Contrast, 3, 1.0, 0x3ac03554),
        (Brightness, 3, 1.0, 0xf18e7838),
        (Sharpness, 3, 1.0, 0xfaa2dadf),
        (Posterize, 3, 1.0, 0x28772951),
        (Solarize, 3, 1.0, 0x32f19227),
        (ShearY, 9, 1.0, 0x08683e7f),
        (TranslateX, 9, 1.0, 0xbcfdf0c2),
        (TranslateY, 9, 1.0, 0xe50db4a9),
        (Rotate, 9, 1.0, 0x581e5792),
        (Color, 9, 1.0, 0x9033f672),
        (Contrast, 9, 1.0, 0xf1238c47),
        (Brightness, 9, 1.0, 0x7fc568e1),
        (Sharpness, 9, 1.0, 0xa1dfcb8d),
        (Posterize, 9, 1.0, 0x43a9fa37),
        (Solarize, 9, 1.0, 0x2b7707be),
        (ShearY, 3, -1.0, 0xe122e283),
        (TranslateX, 3, -1.0, 0x5b62c0fa),
        (TranslateY, 3, -1.0, 0xb364dfe6),
        (Rotate, 3, -1.0, 0x53410491),
        (Color, 3, -1.0, 0x30a28606),
        (Contrast, 3, -1.0, 0x263ac015),
        (Brightness, 3, -1.0, 0x3e979a96),
        (Sharpness, 3, -1.0, 0xdb1d04d1),
        (ShearY, 9, -1.0, 0x5852cb6b),
        (TranslateX, 9, -1.0, 0xfd1c9f6a),
        (TranslateY, 9, -1.0, 0xd4616033),
        (Rotate, 9, -1.0, 0x66cf0fc6),
        (Color, 9, -1.0, 0xa8208d4a),
        (Contrast, 9, -1.0, 0xfd6221b1),
        (Brightness, 9, -1.0, 0x4fd755ec),
        (Sharpness, 9, -1.0, 0xeb64c282),
        (AutoContrast, 0, 1.0, 0x737a6465),
        (Equalize, 0, 1.0, 0xec7c6aa4),
        (Invert, 0, 1.0, 0x2b7707be),
    ];

    fn image() -> Image {
        let (height, width) = (16, 18);
        let pixel = |at: usize| {
            let (c, y, x) = (at / (height * width), at / width % height, at % width);
            (30 + (x * x * 3 + y * 7 * (c + 1) + x * y * (3 - c) + c * 40) % 190) as u8
        };
        Image { pixels: (0..3 * height * width).map(pixel).collect(), height, width }
    }

    #[test]
    fn every_operation_gives_what_pillow_gives() {
        let mut wrong = Vec::new();
        for (op, magnitude, sign, expected) in CASES {
            let mut image = image();
            apply(&mut image, op, f32::from(magnitude) / LAST, sign);
            let mut crc = flate2::Crc::new();
            crc.update(&image.pixels);
            if crc.sum() != expected {
                wrong.push((op, magnitude, sign));
            }
        }
        assert_eq!(wrong, []);
    }

    #[test]
    fn all_pairs_are_drawn_as_often_as_they_should_be() {
        let mut rng = rng(1, "test", 0);
        let (mut unchanged, before) = (0, image().pixels);
        for _ in 0..2000 {
            let mut image = image();
            augment(&mut image, &mut rng);
            assert_eq!(image.pixels.len(), before.len());
            unchanged += usize::from(image.pixels == before);
        }
        // The mean over the pairs of the chance that neither operation is done is 0.2, and two of the
        // operations change nothing at magnitude 0.
        assert!((300..600).contains(&unchanged), "{unchanged}");
    }
}
