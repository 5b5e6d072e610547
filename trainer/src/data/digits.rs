//! The 1,797 handwritten digits that come with the crate.
//!
//! A line of the file is an image: 64 pixels of 0 to 16, and the digit. The file is in the order in
//! which it was collected, some writers after others. So the last third is the test set, mostly of
//! writers that the rest does not know.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;

use super::{Parts, Raw};
use crate::error::TrainError;

/// The digits; where they come from stands in the README beside the file.
const DIGITS: &[u8] = include_bytes!("../../../examples/data/digits.csv.gz");
/// The file that `--data DIR` holds instead of the embedded one.
const DIGITS_FILE: &str = "digits.csv.gz";
/// Largest text accepted after decompression: 240 times the digits, and a bound on a gzip bomb.
const MAX_TEXT: u64 = 64 << 20;
/// Height and width of a digit.
const DIGIT_SIZE: usize = 8;
/// A digit's pixel counts the black ones of 4×4: from 0 to this.
const DIGIT_MAX: f32 = 16.0;

/// Reads the digits, from `folder` where one is given.
///
/// # Errors
/// The file cannot be read, or a line of it is no digit.
pub(super) fn load(folder: Option<&Path>) -> Result<Parts, TrainError> {
    let mut gzip = Vec::new();
    if let Some(folder) = folder {
        let path = folder.join(DIGITS_FILE);
        File::open(&path)
            .and_then(|file| file.take(MAX_TEXT).read_to_end(&mut gzip))
            .map_err(TrainError::io(&path))?;
    }
    let mut text = String::new();
    GzDecoder::new(if folder.is_some() { &gzip } else { DIGITS })
        .take(MAX_TEXT)
        .read_to_string(&mut text)
        .map_err(|error| TrainError::Data(format!("{DIGITS_FILE}: {error}")))?;
    let mut train = parse(&text)?;
    let known = train.labels.len() - train.labels.len() / 3;
    let test = Raw {
        pixels: train.pixels.split_off(known * DIGIT_SIZE * DIGIT_SIZE),
        labels: train.labels.split_off(known),
        ..Raw::new(train.shape, DIGIT_MAX)
    };
    let classes = (0..10).map(|digit| digit.to_string()).collect();
    Ok(Parts { name: "digits".to_owned(), train, test, classes, skipped: Vec::new() })
}

fn parse(text: &str) -> Result<Raw, TrainError> {
    let pixels = DIGIT_SIZE * DIGIT_SIZE;
    let mut raw = Raw::new([1, DIGIT_SIZE, DIGIT_SIZE], DIGIT_MAX);
    for (index, line) in text.lines().enumerate() {
        let wrong = || {
            let number = index + 1;
            let expected = "64 pixels of 0 to 16 and a digit";
            TrainError::Data(format!("{DIGITS_FILE}: line {number}: expected {expected}"))
        };
        let values: Vec<u8> = line
            .split(',')
            .map(|value| value.trim().parse().ok())
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let (label, image) = values.split_last().ok_or_else(wrong)?;
        let fits =
            image.len() == pixels && image.iter().all(|pixel| f32::from(*pixel) <= DIGIT_MAX);
        if !fits || *label >= 10 {
            return Err(wrong());
        }
        raw.pixels.extend(image);
        raw.labels.push(usize::from(*label));
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_files_name_the_line() {
        let good = format!("{}3\n", "0,".repeat(64));
        assert_eq!(parse(&good).unwrap().labels, [3]);
        for bad in ["1,2,3\n".to_owned(), good.replace("0,3", "17,3"), good.replace(",3", ",x")] {
            let error = parse(&format!("{good}{bad}")).err().unwrap().to_string();
            assert!(error.contains("digits.csv.gz: line 2: expected 64 pixels"), "{error}");
        }
    }
}
