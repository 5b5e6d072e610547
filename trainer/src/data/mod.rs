//! Images, as the network takes them.
//!
//! Takes the name of a data set (and a folder, where its files lie elsewhere) and gives [`Data`]:
//! training, validation and test images, normalised with the training images' own mean and
//! standard deviation. The split depends on the seed and on nothing else; no image is in two parts.
//! Files are read with limits and refused with the line that is wrong.

mod autoaugment;
mod cifar;
mod digits;
mod folder;
pub(crate) mod loader;
mod pickle;

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::RngExt;
use rand::seq::SliceRandom;
use sha2::{Digest, Sha256};
use snn_schemas::metadata::Normalisation;

use crate::config::{Augmentation, Config, DataConfig, DatasetName};
use crate::error::TrainError;
use crate::seed::{Rng, rng};

/// Normalised images and their labels.
#[derive(Clone, Debug)]
pub struct Dataset {
    images: Vec<f32>,
    shape: [usize; 3],
    labels: Vec<usize>,
    /// Value of a black pixel after normalisation, a channel: what shifting an image brings in.
    black: Vec<f32>,
    /// Value of a white one.
    white: Vec<f32>,
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

    /// The same, each image moved, turned and scaled at random, as far as `most` allows.
    pub fn augmented(
        &self,
        indices: &[usize],
        most: &Augmentation,
        rng: &mut Rng,
        device: &Device,
    ) -> (Tensor<4>, Tensor<1, Int>) {
        self.tensors(self.prepare(indices, most, rng), indices, device)
    }

    /// The pixels of [`Dataset::augmented`].
    pub(crate) fn prepare(
        &self,
        indices: &[usize],
        most: &Augmentation,
        rng: &mut Rng,
    ) -> Vec<f32> {
        let mut pixels = Vec::with_capacity(indices.len() * self.shape.iter().product::<usize>());
        for &index in indices {
            let changed = most.autoaugment.then(|| self.autoaugmented(index, rng));
            let image = changed.as_deref().unwrap_or(self.image(index));
            let shift = most.shift as i64;
            let [rows, columns] = [(); 2].map(|()| rng.random_range(-shift..=shift) as isize);
            let [turn, zoom] = [(); 2].map(|()| rng.random_range(-1.0..=1.0_f64));
            let mirrored = most.flip && rng.random::<bool>();
            let start = pixels.len();
            match most.rotate > 0.0 || most.zoom > 0.0 {
                false => self.push_moved(image, rows, columns, &mut pixels),
                true => {
                    let angle = (turn * most.rotate).to_radians();
                    // The exponent makes larger and smaller equally likely.
                    let scale = (1.0 + most.zoom).powf(zoom);
                    self.push_warped(image, [rows, columns], (angle, scale), &mut pixels);
                }
            }
            if mirrored {
                pixels[start..].chunks_exact_mut(self.shape[2]).for_each(<[f32]>::reverse);
            }
        }
        pixels
    }

    /// AutoAugment works on bytes: back to these, and to normalised pixels again.
    fn autoaugmented(&self, index: usize, rng: &mut Rng) -> Vec<f32> {
        let [_, height, width] = self.shape;
        let span = |channel: usize| self.white[channel] - self.black[channel];
        let planes = self.image(index).chunks_exact(height * width).enumerate();
        let bytes = planes.flat_map(|(channel, plane)| {
            let byte = move |pixel: &f32| {
                ((pixel - self.black[channel]) / span(channel) * 255.0).round() as u8
            };
            plane.iter().map(byte)
        });
        let mut image = autoaugment::Image { pixels: bytes.collect(), height, width };
        autoaugment::augment(&mut image, rng);
        let planes = image.pixels.chunks_exact(height * width).enumerate();
        planes
            .flat_map(|(channel, plane)| {
                let pixel =
                    move |byte: &u8| self.black[channel] + f32::from(*byte) / 255.0 * span(channel);
                plane.iter().map(pixel)
            })
            .collect()
    }

    fn push_moved(&self, image: &[f32], rows: isize, columns: isize, into: &mut Vec<f32>) {
        let [_, height, width] = self.shape;
        for (plane, &black) in image.chunks_exact(height * width).zip(&self.black) {
            for y in 0..height {
                for x in 0..width {
                    let from_y = y.checked_add_signed(rows).filter(|&y| y < height);
                    let from_x = x.checked_add_signed(columns).filter(|&x| x < width);
                    into.push(from_y.zip(from_x).map_or(black, |(y, x)| plane[y * width + x]));
                }
            }
        }
    }

    /// Turns around the middle by `angle` and scales by `scale`, between pixels bilinearly.
    fn push_warped(
        &self,
        image: &[f32],
        [rows, columns]: [isize; 2],
        (angle, scale): (f64, f64),
        into: &mut Vec<f32>,
    ) {
        let [_, height, width] = self.shape;
        let middle = [(height as f64 - 1.0) / 2.0, (width as f64 - 1.0) / 2.0];
        let (sin, cos) = (angle.sin() / scale, angle.cos() / scale);
        for (plane, &black) in image.chunks_exact(height * width).zip(&self.black) {
            let at = |y: isize, x: isize| {
                let inside = (0..height as isize).contains(&y) && (0..width as isize).contains(&x);
                if inside { plane[y as usize * width + x as usize] } else { black }
            };
            for y in 0..height {
                for x in 0..width {
                    let (down, right) = (y as f64 - middle[0], x as f64 - middle[1]);
                    let from_y = middle[0] + down * cos - right * sin + rows as f64;
                    let from_x = middle[1] + down * sin + right * cos + columns as f64;
                    let (top, left) = (from_y.floor(), from_x.floor());
                    let (part_y, part_x) = ((from_y - top) as f32, (from_x - left) as f32);
                    let (top, left) = (top as isize, left as isize);
                    let upper = at(top, left) * (1.0 - part_x) + at(top, left + 1) * part_x;
                    let lower = at(top + 1, left) * (1.0 - part_x) + at(top + 1, left + 1) * part_x;
                    into.push(upper * (1.0 - part_y) + lower * part_y);
                }
            }
        }
    }

    /// `pixels`, made of the images `indices`, as a batch with their labels.
    pub(crate) fn tensors(
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
    /// Files that could not be used, with the reason.
    pub skipped: Vec<String>,
    /// SHA-256 of all pixels and labels as they came from the files, in hexadecimal.
    pub sha256: String,
}

/// Files that are named of those that could not be used; the run's `run.json` has all.
const NAMED: usize = 3;

impl Data {
    /// Loads the data set a configuration names, from `folder` where one is given.
    ///
    /// # Errors
    /// A file cannot be read or makes no sense, or its images are not what `config.net` expects.
    pub fn load(config: &Config, folder: Option<&Path>) -> Result<Data, TrainError> {
        let name = config.data.name;
        let parts = match (name, folder) {
            (DatasetName::Digits, folder) => digits::load(folder)?,
            (DatasetName::Cifar10, Some(folder)) => cifar::load(cifar::Kind::Ten, folder)?,
            (DatasetName::Cifar100, Some(folder)) => cifar::load(cifar::Kind::Hundred, folder)?,
            (DatasetName::Folder, Some(folder)) => folder::load(folder, config.net.input)?,
            (_, None) => {
                return Err(TrainError::Data(format!(
                    "{name}: its folder has to be given with --data"
                )));
            }
        };
        let data = split(parts, &config.data, config.seed);
        data.check(config)?;
        Ok(data)
    }

    /// How many files could not be used, and the first of them; nothing where all could.
    pub(crate) fn left_out(&self) -> Option<String> {
        let (count, named) = (self.skipped.len(), self.skipped.len().min(NAMED));
        let noun = if count == 1 { "image is" } else { "images are" };
        let names = self.skipped[..named].join("; ");
        let rest =
            if count > named { format!("; and {} more", count - named) } else { String::new() };
        (count > 0).then(|| format!("{count} {noun} left out: {names}{rest}"))
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

/// Images as they lie in files: bytes.
struct Raw {
    /// `[image, channel, row, column]`.
    pixels: Vec<u8>,
    labels: Vec<usize>,
    shape: [usize; 3],
    /// The pixel that means 1.
    white: f32,
}

impl Raw {
    fn new(shape: [usize; 3], white: f32) -> Raw {
        Raw { pixels: Vec::new(), labels: Vec::new(), shape, white }
    }
}

/// A data set as it lies in files: what is for training is not yet split.
struct Parts {
    name: String,
    train: Raw,
    test: Raw,
    classes: Vec<String>,
    /// Files that could not be used, with the reason.
    skipped: Vec<String>,
}

/// Draws the validation images by seed, and normalises all by what is left.
fn split(parts: Parts, settings: &DataConfig, seed: u64) -> Data {
    let known = parts.train.labels.len();
    let mut order: Vec<usize> = (0..known).collect();
    order.shuffle(&mut rng(seed, "split", 0));
    let held = (known as f64 * settings.validation).round() as usize;
    let (validation, train) = order.split_at(held.min(known));
    let normalisation = measure(&parts.train, train);
    let sha256 = fingerprint([&parts.train, &parts.test]);
    let all: Vec<usize> = (0..parts.test.labels.len()).collect();
    Data {
        name: parts.name,
        train: gather(&parts.train, train, &normalisation),
        validation: gather(&parts.train, validation, &normalisation),
        test: gather(&parts.test, &all, &normalisation),
        classes: parts.classes,
        normalisation,
        skipped: parts.skipped,
        sha256,
    }
}

fn fingerprint(parts: [&Raw; 2]) -> String {
    let mut hash = Sha256::new();
    for raw in parts {
        hash.update((raw.labels.len() as u64).to_le_bytes());
        raw.labels.iter().for_each(|label| hash.update((*label as u64).to_le_bytes()));
        hash.update(&raw.pixels);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Mean and standard deviation of each channel over the images `indices`.
fn measure(raw: &Raw, indices: &[usize]) -> Normalisation {
    let [channels, height, width] = raw.shape;
    let plane = height * width;
    let mut normalisation = Normalisation::identity(channels);
    for channel in 0..channels {
        let pixels = || {
            indices.iter().flat_map(move |image| {
                let start = (image * channels + channel) * plane;
                raw.pixels[start..start + plane]
                    .iter()
                    .map(|&pixel| f64::from(f32::from(pixel) / raw.white))
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

fn gather(raw: &Raw, indices: &[usize], by: &Normalisation) -> Dataset {
    let shape = raw.shape;
    let plane = shape[1] * shape[2];
    let size = shape[0] * plane;
    let scale = |channel: usize, pixel: f32| (pixel - by.mean[channel]) / by.std[channel];
    let mut images = Vec::with_capacity(indices.len() * size);
    for &index in indices {
        let image = &raw.pixels[index * size..(index + 1) * size];
        let pixels = image.iter().enumerate();
        images.extend(pixels.map(|(at, &pixel)| scale(at / plane, f32::from(pixel) / raw.white)));
    }
    let labels = indices.iter().map(|&index| raw.labels[index]).collect();
    let all = |pixel: f32| (0..shape[0]).map(|channel| scale(channel, pixel)).collect();
    Dataset { images, shape, labels, black: all(0.0), white: all(1.0) }
}

#[cfg(test)]
mod tests;
