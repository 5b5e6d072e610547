//! Inputs and outputs on disk: `.npy` arrays and images, read into what the model takes.
//!
//! Takes the path of a `.npy` file (f32, row-major, batch first) or of a PNG or JPEG image, told
//! apart by their first bytes, and an [`InputSpec`]; gives one [`Array`] a request, each of exactly
//! the model's shape. Images are resized to the model's height and width, made grey where it has one
//! channel, and normalised as its metadata says. Sizes are bounded before anything is decoded.
//! Arrays are written as `.npy` through a neighbouring file, so that a failure leaves no half of one.

use std::fs;
use std::io::{self, Cursor, Read as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use image::imageops::FilterType;
use image::{DynamicImage, ImageFormat, ImageReader, Limits};
use npyz::WriterBuilder as _;
use snn_schemas::metadata::Normalisation;

/// Largest input file read, in bytes: a thousand large images fit, a mistaken file does not.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// Largest image side, in pixels: beyond any camera, far below what exhausts a small device.
pub const MAX_IMAGE_SIDE: u32 = 16_384;
/// Largest decoded image of a file, in bytes: 64 megapixels and more.
const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// Largest decoded picture of somebody else, in bytes: 22 megapixels, twice a telephone's.
pub const MAX_PICTURE_BYTES: u64 = 64 << 20;
/// Most memory that a picture takes on its way to the model, in times of its largest decoded size: itself,
/// and beside it at most a progressive JPEG's bytes and coefficients, 2 2/3 bytes each, or what it is scaled by.
pub const TIMES_PICTURE: u64 = 4;
/// Bytes of a pixel that is being scaled: four numbers.
const SCALED_PIXEL_BYTES: u64 = 16;
/// Longest header of a `.npy` file: the format's own first version ends there.
const MAX_NPY_HEADER: usize = u16::MAX as usize;

const NPY_MAGIC: &[u8] = b"\x93NUMPY";

/// Numbers with a shape, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array {
    /// Length of each axis, batch first.
    pub shape: Vec<usize>,
    /// As many numbers as the shape says.
    pub data: Vec<f32>,
}

/// What a model takes: its input's shape and how pixels become numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct InputSpec {
    /// Length of each axis, batch first.
    pub shape: Vec<usize>,
    /// How an image's pixels are scaled.
    pub normalisation: Normalisation,
}

/// Reads a file into requests of the model's batch.
///
/// # Errors
/// What the file is, and what was expected.
pub fn read(path: &Path, spec: &InputSpec) -> Result<Vec<Array>> {
    let bytes = read_bounded(path)?;
    if bytes.starts_with(NPY_MAGIC) {
        return into_requests(parse_npy(&bytes)?, &spec.shape);
    }
    match image_format(&bytes) {
        Some(format) => Ok(vec![request((&bytes, format), spec, MAX_IMAGE_BYTES)?]),
        None => bail!("not a .npy, PNG or JPEG file"),
    }
}

/// Turns the bytes of a PNG or JPEG image, whoever sends them, into a request. Takes at most
/// [`TIMES_PICTURE`] times [`MAX_PICTURE_BYTES`] of memory.
///
/// # Errors
/// What the bytes are, or why the model takes no images, or none so large.
pub fn picture(bytes: &[u8], spec: &InputSpec) -> Result<Array> {
    let format = image_format(bytes).context("not a PNG or JPEG image")?;
    request((bytes, format), spec, MAX_PICTURE_BYTES)
}

/// A request from an image that is decoded into at most `most` bytes.
fn request(encoded: (&[u8], ImageFormat), spec: &InputSpec, most: u64) -> Result<Array> {
    let image = decode(encoded, most)?;
    let (width, height) = (image.width(), image.height());
    let is_scaled = spec.shape.get(2..) != Some(&[height as usize, width as usize][..]);
    // Scaling works on rows of the image's width, as many as the model's input has.
    let rows = spec.shape.get(2).map_or(0, |&rows| rows as u64);
    let scaled = u64::from(width).saturating_mul(rows).saturating_mul(SCALED_PIXEL_BYTES);
    let fits = !is_scaled || scaled <= most * (TIMES_PICTURE - 1);
    ensure!(fits, "image: {width} pixels wide, too many to be scaled");
    from_image(&image, spec)
}

fn image_format(bytes: &[u8]) -> Option<ImageFormat> {
    let taken = |format: &ImageFormat| matches!(format, ImageFormat::Png | ImageFormat::Jpeg);
    image::guess_format(bytes).ok().filter(taken)
}

/// Reads a `.npy` file of any shape.
///
/// # Errors
/// What the file is, when it is no `.npy` file of row-major f32.
pub fn read_npy(path: &Path) -> Result<Array> {
    parse_npy(&read_bounded(path)?)
}

/// Writes an array as `.npy`, replacing the file at once or not at all.
///
/// # Errors
/// What the file system says.
pub fn write_npy(path: &Path, array: &Array) -> io::Result<()> {
    let shape: Vec<u64> = array.shape.iter().map(|&length| length as u64).collect();
    let mut bytes = Vec::with_capacity(array.data.len() * 4 + 128);
    let mut writer =
        npyz::WriteOptions::new().default_dtype().shape(&shape).writer(&mut bytes).begin_nd()?;
    writer.extend(array.data.iter().copied())?;
    writer.finish()?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut partial = name.to_owned();
    partial.push(".partial");
    let partial = path.with_file_name(partial);
    fs::write(&partial, bytes)
        .and_then(|()| fs::rename(&partial, path))
        .inspect_err(|_| drop(fs::remove_file(&partial)))
}

/// Numbers of a standard normal distribution, the same for the same seed: an input for timing.
pub fn noise(shape: &[usize], seed: u64) -> Array {
    let mut state = seed;
    let mut uniform = || {
        // SplitMix64: enough for test data, and the same on every machine.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    };
    // The sum of twelve uniform numbers less six has mean 0 and variance 1.
    let mut normal = || (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    let data = (0..shape.iter().product()).map(|_| normal()).collect();
    Array { shape: shape.to_vec(), data }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    let fits = bytes.len() as u64 <= MAX_FILE_BYTES;
    ensure!(fits, "more than {MAX_FILE_BYTES} bytes, the most an input may have");
    Ok(bytes)
}

fn parse_npy(bytes: &[u8]) -> Result<Array> {
    ensure!(bytes.starts_with(NPY_MAGIC), "not a .npy file");
    check_header_length(bytes)?;
    let mut rest = bytes;
    let header = npyz::NpyHeader::from_reader(&mut rest).context(".npy header")?;
    let dtype = header.dtype().descr();
    let dtype = dtype.trim_matches('\'');
    ensure!(matches!(dtype, "<f4" | ">f4"), ".npy dtype {dtype}, expected <f4 (float32)");
    let row_major = header.order() == npyz::Order::C;
    ensure!(row_major, ".npy in Fortran order, expected C order");
    let shape: Vec<usize> = header.shape().iter().map(|&length| length as usize).collect();
    let numbers = shape.iter().try_fold(1usize, |n, &length| n.checked_mul(length));
    let complete = numbers.and_then(|n| n.checked_mul(4)) == Some(rest.len());
    ensure!(complete, ".npy of shape {shape:?} with {} bytes of numbers", rest.len());
    let file = npyz::NpyFile::with_header(header, rest);
    let data = file.into_vec::<f32>().context(".npy numbers")?;
    Ok(Array { shape, data })
}

/// Bounds the header before the parser allocates what its length field asks for.
fn check_header_length(bytes: &[u8]) -> Result<()> {
    let field = |at: usize, width: usize| {
        let digits = bytes.get(at..at + width)?;
        Some(digits.iter().rev().fold(0usize, |n, &digit| n << 8 | usize::from(digit)))
    };
    let length = match bytes.get(6) {
        Some(1) => field(8, 2),
        _ => field(8, 4),
    };
    let sound = length.is_some_and(|length| length <= MAX_NPY_HEADER.min(bytes.len()));
    ensure!(sound, ".npy header cut short, or longer than {MAX_NPY_HEADER} bytes");
    Ok(())
}

fn into_requests(array: Array, expected: &[usize]) -> Result<Vec<Array>> {
    let (&batch, item) = expected.split_first().context("the model's input has no batch axis")?;
    let fits = match array.shape.split_first() {
        Some((&found, rest)) => rest == item && found > 0 && batch > 0 && found % batch == 0,
        None => false,
    };
    ensure!(
        fits,
        "shape {:?}, expected {expected:?} or a multiple of it along axis 0",
        array.shape
    );
    let size = expected.iter().product();
    let requests = array.data.chunks(size);
    Ok(requests.map(|part| Array { shape: expected.to_vec(), data: part.to_vec() }).collect())
}

fn decode((bytes, format): (&[u8], ImageFormat), most: u64) -> Result<DynamicImage> {
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_IMAGE_SIDE);
    limits.max_image_height = Some(MAX_IMAGE_SIDE);
    limits.max_alloc = Some(most);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    reader.decode().context("image")
}

fn from_image(image: &DynamicImage, spec: &InputSpec) -> Result<Array> {
    let &[1, channels @ (1 | 3), height, width] = spec.shape.as_slice() else {
        let shape = &spec.shape;
        bail!("an image, but the model's input is {shape:?}, not [1, 1 or 3, height, width]");
    };
    let (w, h) = (width as u32, height as u32);
    let scaled = match (image.width(), image.height()) == (w, h) {
        true => image.clone(),
        false => image.resize_exact(w, h, FilterType::Triangle),
    };
    let pixels = match channels {
        1 => scaled.into_luma8().into_raw(),
        _ => scaled.into_rgb8().into_raw(),
    };
    let mut data = Vec::with_capacity(pixels.len());
    for channel in 0..channels {
        let plane = pixels.iter().skip(channel).step_by(channels);
        data.extend(plane.map(|&pixel| spec.normalisation.value(channel, pixel)));
    }
    Ok(Array { shape: spec.shape.clone(), data })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(shape: &[usize]) -> InputSpec {
        InputSpec { shape: shape.to_vec(), normalisation: Normalisation::identity(shape[1]) }
    }

    fn npy(array: &Array) -> Vec<u8> {
        let folder = std::env::temp_dir().join(format!("snn-input-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{:p}.npy", array));
        write_npy(&path, array).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(path).unwrap();
        bytes
    }

    #[test]
    fn an_array_reads_back_and_splits_into_requests_of_the_batch() {
        let array = Array { shape: vec![2, 1, 2, 2], data: (0..8).map(|n| n as f32).collect() };
        let read = parse_npy(&npy(&array)).unwrap();
        assert_eq!(read, array);
        let requests = into_requests(read, &[1, 1, 2, 2]).unwrap();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].data, [4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn a_wrong_shape_says_what_was_expected() {
        let array = Array { shape: vec![1, 3, 2, 2], data: vec![0.0; 12] };
        let error = into_requests(array, &[1, 1, 2, 2]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "shape [1, 3, 2, 2], expected [1, 1, 2, 2] or a multiple of it along axis 0"
        );
    }

    #[test]
    fn every_cut_and_every_flipped_header_byte_gives_an_error_or_an_array() {
        let bytes = npy(&Array { shape: vec![1, 1, 2, 2], data: vec![1.0; 4] });
        for length in 0..bytes.len() {
            assert!(parse_npy(&bytes[..length]).is_err(), "{length}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                let _ = parse_npy(&changed);
            }
        }
    }

    #[test]
    fn other_types_are_named() {
        let mut bytes = npy(&Array { shape: vec![2], data: vec![1.0; 2] });
        let at = bytes.windows(3).position(|w| w == b"<f4").unwrap();
        bytes[at + 2] = b'8';
        assert_eq!(
            parse_npy(&bytes).unwrap_err().to_string(),
            ".npy dtype <f8, expected <f4 (float32)"
        );
    }

    #[test]
    fn an_image_is_resized_and_normalised_a_channel_at_a_time() {
        let image =
            DynamicImage::ImageRgb8(image::RgbImage::from_pixel(4, 4, image::Rgb([255, 0, 51])));
        let mut spec = spec(&[1, 3, 2, 2]);
        spec.normalisation.mean = vec![0.5, 0.0, 0.2];
        spec.normalisation.std = vec![0.5, 1.0, 0.1];
        let array = from_image(&image, &spec).unwrap();
        assert_eq!(array.shape, [1, 3, 2, 2]);
        assert_eq!(array.data[..8], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!(array.data[8..].iter().all(|x| x.abs() < 1e-6));
    }

    fn encoded(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(width, height).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn a_picture_beyond_the_memory_for_one_is_refused() {
        let small = spec(&[1, 3, 2, 2]);
        let mut jpeg = encoded(8, 8, ImageFormat::Jpeg);
        assert!(picture(&jpeg, &small).is_ok());
        // Height and width follow the frame's marker, its length and its precision.
        let frame = jpeg.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        let side = 6000u16;
        assert!(3 * u64::from(side).pow(2) > MAX_PICTURE_BYTES);
        jpeg[frame + 5..frame + 9].copy_from_slice(&[side.to_be_bytes(); 2].concat());
        let refused = format!("{:#}", picture(&jpeg, &small).unwrap_err());
        assert_eq!(refused, "image: Memory limit exceeded");

        let wide = encoded(MAX_IMAGE_SIDE, 1, ImageFormat::Png);
        assert!(picture(&wide, &small).is_ok());
        let refused = picture(&wide, &spec(&[1, 3, 1024, 2])).unwrap_err().to_string();
        assert_eq!(refused, "image: 16384 pixels wide, too many to be scaled");
    }

    #[test]
    fn noise_is_the_same_for_the_same_seed_and_roughly_normal() {
        let array = noise(&[1, 3, 32, 32], 7);
        assert_eq!(array, noise(&[1, 3, 32, 32], 7));
        assert_ne!(array, noise(&[1, 3, 32, 32], 8));
        let mean = array.data.iter().sum::<f32>() / array.data.len() as f32;
        assert!(mean.abs() < 0.1, "{mean}");
    }
}
