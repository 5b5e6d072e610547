//! Images, as the network takes them.
//!
//! Takes the name of a data set (and a folder, where its files lie elsewhere) and gives [`Data`]:
//! training, validation and test images, normalised with the training images' own mean and
//! standard deviation. The split depends on the seed and on nothing else; no image is in two parts.
//! Files are read with limits and refused with the line that is wrong.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use flate2::read::GzDecoder;
use rand::RngExt;
use rand::seq::SliceRandom;
use snn_schemas::metadata::Normalisation;

use crate::config::{Config, DataConfig, DatasetName};
use crate::error::TrainError;
use crate::seed::{Rng, rng};

/// The digits; where they come from stands in the README beside the file.
const DIGITS: &[u8] = include_bytes!("../../examples/data/digits.csv.gz");
/// The file that `--data DIR` holds instead of the embedded one.
const DIGITS_FILE: &str = "digits.csv.gz";
/// Largest text accepted after decompression: 240 times the digits, and a bound on a gzip bomb.
const MAX_TEXT: u64 = 64 << 20;
/// Height and width of a digit.
const DIGIT_SIZE: usize = 8;
/// A digit's pixel counts the black ones of 4×4: from 0 to this.
const DIGIT_MAX: f32 = 16.0;

/// Normalised images and their labels.
#[derive(Clone, Debug)]
pub struct Dataset {
    images: Vec<f32>,
    shape: [usize; 3],
    labels: Vec<usize>,
    /// Value of a black pixel after normalisation, a channel: what shifting an image brings in.
    black: Vec<f32>,
}

impl Dataset {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Channels, height and width of an image.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// All pixels, normalised, in the order `[image, channel, row, column]`.
    pub fn images(&self) -> &[f32] {
        &self.images
    }

    /// Class of each image, an index into [`Data::classes`].
    pub fn labels(&self) -> &[usize] {
        &self.labels
    }

    /// The pixels of image `index`, `[channel, row, column]`.
    pub fn image(&self, index: usize) -> &[f32] {
        let size = self.shape.iter().product::<usize>();
        &self.images[index * size..(index + 1) * size]
    }

    /// The images `indices` as a batch, with their labels.
    pub fn batch(&self, indices: &[usize], device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
        let pixels = indices.iter().flat_map(|&index| self.image(index)).copied().collect();
        self.tensors(pixels, indices, device)
    }

    /// The same, each image moved by up to `shift` pixels along both axes at random.
    pub fn shifted(
        &self,
        indices: &[usize],
        shift: usize,
        rng: &mut Rng,
        device: &Device,
    ) -> (Tensor<4>, Tensor<1, Int>) {
        let mut pixels = Vec::with_capacity(indices.len() * self.shape.iter().product::<usize>());
        for &index in indices {
            let most = shift as i64;
            let [rows, columns] = [(); 2].map(|()| rng.random_range(-most..=most) as isize);
            self.push_moved(index, rows, columns, &mut pixels);
        }
        self.tensors(pixels, indices, device)
    }

    fn push_moved(&self, index: usize, rows: isize, columns: isize, into: &mut Vec<f32>) {
        let [_, height, width] = self.shape;
        for (plane, &black) in self.image(index).chunks_exact(height * width).zip(&self.black) {
            for y in 0..height {
                for x in 0..width {
                    let from_y = y.checked_add_signed(rows).filter(|&y| y < height);
                    let from_x = x.checked_add_signed(columns).filter(|&x| x < width);
                    into.push(from_y.zip(from_x).map_or(black, |(y, x)| plane[y * width + x]));
                }
            }
        }
    }

    fn tensors(
        &self,
        pixels: Vec<f32>,
        indices: &[usize],
        device: &Device,
    ) -> (Tensor<4>, Tensor<1, Int>) {
        let [channels, height, width] = self.shape;
        let labels: Vec<i64> = indices.iter().map(|&index| self.labels[index] as i64).collect();
        let shape = [indices.len(), channels, height, width];
        (
            Tensor::from_data(TensorData::new(pixels, shape), device), // [batch, channels, h, w]
            Tensor::from_data(TensorData::new(labels, [indices.len()]), device), // [batch]
        )
    }
}

/// A data set in its three parts.
#[derive(Clone, Debug)]
pub struct Data {
    /// What it is called in `best.json`.
    pub name: String,
    /// For gradients and batch-norm statistics.
    pub train: Dataset,
    /// For rewards and choices.
    pub validation: Dataset,
    /// For one figure at the very end.
    pub test: Dataset,
    /// Names of the classes, in the order of the network's outputs.
    pub classes: Vec<String>,
    /// How pixels between 0 and 1 became the images.
    pub normalisation: Normalisation,
}

impl Data {
    /// Loads the data set a configuration names, from `folder` where one is given.
    ///
    /// # Errors
    /// A file cannot be read or makes no sense, or its images are not what `config.net` expects.
    pub fn load(config: &Config, folder: Option<&Path>) -> Result<Data, TrainError> {
        let DatasetName::Digits = config.data.name;
        let data = match folder {
            None => digits(DIGITS, &config.data, config.seed)?,
            Some(folder) => {
                let path = folder.join(DIGITS_FILE);
                let mut bytes = Vec::new();
                File::open(&path)
                    .and_then(|file| file.take(MAX_TEXT).read_to_end(&mut bytes))
                    .map_err(TrainError::io(&path))?;
                digits(&bytes, &config.data, config.seed)?
            }
        };
        data.check(config)?;
        Ok(data)
    }

    /// Checks that a network of `config` takes these images and tells these classes apart.
    ///
    /// # Errors
    /// What the settings say and what the data is, where the two differ.
    pub fn check(&self, config: &Config) -> Result<(), TrainError> {
        let (name, shape, classes) = (&self.name, self.train.shape, self.classes.len());
        if shape != config.net.input || classes != config.net.classes {
            let (input, expected) = (config.net.input, config.net.classes);
            return Err(TrainError::Data(format!(
                "{name} has images {shape:?} of {classes} classes, net.input is {input:?} and net.classes {expected}"
            )));
        }
        match [&self.train, &self.validation, &self.test].iter().any(|part| part.is_empty()) {
            true => Err(TrainError::Data(format!("{name}: a part of the split is empty"))),
            false => Ok(()),
        }
    }
}

/// Raw images: pixels between 0 and 1, not yet normalised.
struct Raw {
    images: Vec<f32>,
    labels: Vec<usize>,
}

/// The digits: 64 pixels of 0 to 16 and the class a line, as gzip-compressed CSV.
///
/// The file is in the order in which it was collected, some writers after others. So the last third
/// is the test set, mostly of writers that the rest does not know; of the rest `validation` are drawn
/// by the seed.
fn digits(gzip: &[u8], settings: &DataConfig, seed: u64) -> Result<Data, TrainError> {
    let mut text = String::new();
    GzDecoder::new(gzip)
        .take(MAX_TEXT)
        .read_to_string(&mut text)
        .map_err(|error| TrainError::Data(format!("{DIGITS_FILE}: {error}")))?;
    let raw = parse_digits(&text)?;
    let count = raw.labels.len();
    let known = count - count / 3;
    let mut order: Vec<usize> = (0..known).collect();
    order.shuffle(&mut rng(seed, "split", 0));
    let held = (known as f64 * settings.validation).round() as usize;
    let (validation, train) = order.split_at(held);
    let test: Vec<usize> = (known..count).collect();
    let shape = [1, DIGIT_SIZE, DIGIT_SIZE];
    let normalisation = measure(&raw, shape, train);
    let part = |indices: &[usize]| gather(&raw, shape, indices, &normalisation);
    Ok(Data {
        name: "digits".to_owned(),
        train: part(train),
        validation: part(validation),
        test: part(&test),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        normalisation,
    })
}

fn parse_digits(text: &str) -> Result<Raw, TrainError> {
    let pixels = DIGIT_SIZE * DIGIT_SIZE;
    let mut raw = Raw { images: Vec::new(), labels: Vec::new() };
    for (index, line) in text.lines().enumerate() {
        let wrong = || {
            let number = index + 1;
            let expected = "64 pixels of 0 to 16 and a digit";
            TrainError::Data(format!("{DIGITS_FILE}: line {number}: expected {expected}"))
        };
        let values: Vec<f32> = line
            .split(',')
            .map(|value| value.trim().parse().ok())
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let (label, image) = values.split_last().ok_or_else(wrong)?;
        let fits = image.len() == pixels && image.iter().all(|x| (0.0..=DIGIT_MAX).contains(x));
        if !fits || !(0.0..10.0).contains(label) || label.fract() != 0.0 {
            return Err(wrong());
        }
        raw.images.extend(image.iter().map(|pixel| pixel / DIGIT_MAX));
        raw.labels.push(*label as usize);
    }
    Ok(raw)
}

/// Mean and standard deviation of each channel over the images `indices`.
fn measure(raw: &Raw, shape: [usize; 3], indices: &[usize]) -> Normalisation {
    let [channels, height, width] = shape;
    let plane = height * width;
    let mut normalisation = Normalisation::identity(channels);
    for channel in 0..channels {
        let pixels = || {
            indices.iter().flat_map(move |image| {
                let start = (image * channels + channel) * plane;
                raw.images[start..start + plane].iter().map(|&pixel| f64::from(pixel))
            })
        };
        let count = (indices.len() * plane).max(1) as f64;
        let mean = pixels().sum::<f64>() / count;
        let variance = pixels().map(|pixel| (pixel - mean).powi(2)).sum::<f64>() / count;
        normalisation.mean[channel] = mean as f32;
        // A channel of one value stays as it is: there is nothing to scale.
        normalisation.std[channel] = if variance > 0.0 { variance.sqrt() as f32 } else { 1.0 };
    }
    normalisation
}

fn gather(raw: &Raw, shape: [usize; 3], indices: &[usize], by: &Normalisation) -> Dataset {
    let plane = shape[1] * shape[2];
    let size = shape[0] * plane;
    let scale = |channel: usize, pixel: f32| (pixel - by.mean[channel]) / by.std[channel];
    let mut images = Vec::with_capacity(indices.len() * size);
    for &index in indices {
        let image = &raw.images[index * size..(index + 1) * size];
        images.extend(image.iter().enumerate().map(|(at, &pixel)| scale(at / plane, pixel)));
    }
    let labels = indices.iter().map(|&index| raw.labels[index]).collect();
    let black = (0..shape[0]).map(|channel| scale(channel, 0.0)).collect();
    Dataset { images, shape, labels, black }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digits_split_by_seed_and_never_overlap() {
        let data = Data::load(&Config::digits(), None).unwrap();
        assert_eq!([data.train.len(), data.validation.len(), data.test.len()], [1078, 120, 599]);
        let again = Data::load(&Config::digits(), None).unwrap();
        assert_eq!(data.train.labels(), again.train.labels());
        let other = Data::load(&Config { seed: 2, ..Config::digits() }, None).unwrap();
        assert_ne!(data.validation.images(), other.validation.images());
        assert_eq!(data.test.labels(), other.test.labels());
        for digit in 0..10 {
            for part in [&data.train, &data.validation, &data.test] {
                assert!(part.labels().contains(&digit));
            }
        }
    }

    #[test]
    fn training_images_have_mean_zero_and_deviation_one() {
        let data = Data::load(&Config::digits(), None).unwrap();
        let count = data.train.images().len() as f32;
        let mean = data.train.images().iter().sum::<f32>() / count;
        let square = data.train.images().iter().map(|x| x * x).sum::<f32>() / count;
        assert!(mean.abs() < 1e-3 && (square - 1.0).abs() < 1e-3, "{mean} {square}");
        let pixel = data.test.image(0)[3] * data.normalisation.std[0] + data.normalisation.mean[0];
        assert!((pixel * 16.0 - (pixel * 16.0).round()).abs() < 1e-3);
    }

    #[test]
    fn a_moved_image_is_filled_with_black() {
        let dataset = Dataset {
            images: vec![1.0, 2.0, 3.0, 4.0],
            shape: [1, 2, 2],
            labels: vec![0],
            black: vec![-1.0],
        };
        let mut moved = Vec::new();
        dataset.push_moved(0, 1, -1, &mut moved);
        assert_eq!(moved, [-1.0, 3.0, -1.0, -1.0]);
    }

    #[test]
    fn bad_files_name_the_line() {
        let good = format!("{}3\n", "0,".repeat(64));
        assert_eq!(parse_digits(&good).unwrap().labels, [3]);
        for bad in ["1,2,3\n".to_owned(), good.replace("0,3", "17,3"), good.replace(",3", ",x")] {
            let error = parse_digits(&format!("{good}{bad}")).err().unwrap().to_string();
            assert!(error.contains("digits.csv.gz: line 2: expected 64 pixels"), "{error}");
        }
    }

    #[test]
    fn a_network_for_other_images_is_refused() {
        let mut config = Config::digits();
        config.net.input = [3, 32, 32];
        let error = Data::load(&config, None).unwrap_err().to_string();
        assert!(error.contains("digits has images [1, 8, 8] of 10 classes"), "{error}");
    }
}
