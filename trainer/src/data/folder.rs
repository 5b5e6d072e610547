//! Images in folders: `train/CLASS/*.png|jpg` and `test/CLASS/*.png|jpg`.
//!
//! Classes are the folders' names in order, images the files' names in order, so that the same
//! folders give the same data. Files are decoded side by side, and scaled to the network's size as
//! `snn-run` scales what it is asked about. One that cannot be decoded is left out and named; more than
//! one in a hundred is an error, and so is a class whose name has a comma, which separates names in a
//! model's metadata.

use std::fs;
use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use rayon::prelude::*;

use super::{Parts, Raw};
use crate::error::TrainError;

/// Of so many images one may be broken.
const BROKEN_ONE_IN: usize = 100;

/// Reads both parts from `folder`; images are `shape`, with one channel grey, with three in colour.
///
/// # Errors
/// A folder cannot be read, the parts have different classes, a class has a comma in its name, or
/// too many images are broken.
pub(super) fn load(folder: &Path, shape: [usize; 3]) -> Result<Parts, TrainError> {
    let wrong = |reason: String| TrainError::Data(format!("{}: {reason}", folder.display()));
    if ![1, 3].contains(&shape[0]) {
        return Err(wrong(format!("images have 1 or 3 channels, net.input has {}", shape[0])));
    }
    let [train, test] = ["train", "test"].map(|part| folder.join(part));
    let classes = entries(&train, Path::is_dir)?;
    let names = |paths: &[PathBuf]| paths.iter().map(|path| name(path)).collect::<Vec<_>>();
    let classes_of_test = entries(&test, Path::is_dir)?;
    if names(&classes) != names(&classes_of_test) {
        return Err(wrong("train and test have different classes".to_owned()));
    }
    if let Some(class) = names(&classes).iter().find(|class| class.contains(',')) {
        let reason = format!("class {class:?}: a comma separates names in a model's metadata");
        return Err(wrong(reason));
    }
    let mut skipped = Vec::new();
    let train = part(&classes, shape, &mut skipped)?;
    let test = part(&classes_of_test, shape, &mut skipped)?;
    let all = train.labels.len() + test.labels.len() + skipped.len();
    if skipped.len() * BROKEN_ONE_IN > all {
        let (count, first) = (skipped.len(), &skipped[0]);
        return Err(wrong(format!("{count} of {all} images cannot be used, the first: {first}")));
    }
    let called = name(folder);
    Ok(Parts { name: called, train, test, classes: names(&classes), skipped })
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn entries(folder: &Path, wanted: fn(&Path) -> bool) -> Result<Vec<PathBuf>, TrainError> {
    let paths = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
    let mut paths: Vec<PathBuf> = paths.map_err(TrainError::io(folder))?;
    paths.retain(|path| wanted(path));
    paths.sort();
    Ok(paths)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    ["png", "jpg", "jpeg"].contains(&extension.as_str())
}

fn part(
    classes: &[PathBuf],
    shape: [usize; 3],
    skipped: &mut Vec<String>,
) -> Result<Raw, TrainError> {
    let mut files = Vec::new();
    for (label, class) in classes.iter().enumerate() {
        files.extend(entries(class, is_image)?.into_iter().map(|path| (path, label)));
    }
    let decoded: Vec<Result<Vec<u8>, String>> =
        files.par_iter().map(|(path, _)| decode(path, shape)).collect();
    let mut raw = Raw::new(shape, 255.0);
    for (decoded, (path, label)) in decoded.into_iter().zip(files) {
        match decoded {
            Ok(pixels) => {
                raw.pixels.extend(pixels);
                raw.labels.push(label);
            }
            Err(reason) => skipped.push(format!("{}: {reason}", path.display())),
        }
    }
    Ok(raw)
}

/// Pixels in the order `[channel, row, column]`.
fn decode(path: &Path, [channels, height, width]: [usize; 3]) -> Result<Vec<u8>, String> {
    let image = image::open(path).map_err(|error| error.to_string())?;
    let (width, height) = (width as u32, height as u32);
    let image = match (image.width(), image.height()) == (width, height) {
        true => image,
        false => image.resize_exact(width, height, FilterType::Triangle),
    };
    let mixed = match channels {
        1 => image.into_luma8().into_raw(),
        _ => image.into_rgb8().into_raw(),
    };
    let of_channel = |channel| mixed.iter().skip(channel).step_by(channels).copied();
    Ok((0..channels).flat_map(of_channel).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, path: &str, size: u32, pixel: [u8; 3]) {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::RgbImage::from_pixel(size, size, image::Rgb(pixel)).save(path).unwrap();
    }

    #[test]
    fn classes_and_images_are_in_order_and_channels_apart() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "train/b/0.png", 2, [1, 2, 3]);
        write(folder.path(), "train/a/1.png", 2, [4, 5, 6]);
        write(folder.path(), "train/a/0.PNG", 2, [7, 8, 9]);
        write(folder.path(), "test/a/0.png", 2, [0, 0, 0]);
        write(folder.path(), "test/b/0.png", 2, [0, 0, 0]);
        fs::write(folder.path().join("train/a/notes.txt"), "no image").unwrap();
        let parts = load(folder.path(), [3, 2, 2]).unwrap();
        assert_eq!(parts.classes, ["a", "b"]);
        assert_eq!(parts.train.labels, [0, 0, 1]);
        assert_eq!(parts.train.pixels[..12], [7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9]);
        assert_eq!(load(folder.path(), [1, 2, 2]).unwrap().train.pixels.len(), 12);
    }

    #[test]
    fn images_are_scaled_to_the_size_of_the_network() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "train/a/0.png", 7, [10, 20, 30]);
        write(folder.path(), "test/a/0.png", 2, [1, 2, 3]);
        let halves =
            image::RgbImage::from_fn(8, 4, |x, _| image::Rgb([if x < 4 { 0 } else { 200 }; 3]));
        halves.save(folder.path().join("test/a/1.png")).unwrap();
        let parts = load(folder.path(), [3, 2, 2]).unwrap();
        assert_eq!(parts.train.pixels, [10, 10, 10, 10, 20, 20, 20, 20, 30, 30, 30, 30]);
        assert_eq!(parts.test.pixels[..12], [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);
        // A row of the first channel: dark, then light.
        let row = &parts.test.pixels[12..14];
        assert!(row[0] < 30 && row[1] > 170, "{row:?}");
    }

    #[test]
    fn a_class_with_a_comma_in_its_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "train/cat, wild/0.png", 1, [1, 1, 1]);
        write(folder.path(), "test/cat, wild/0.png", 1, [1, 1, 1]);
        let error = load(folder.path(), [3, 1, 1]).err().unwrap().to_string();
        let expected = ": class \"cat, wild\": a comma separates names in a model's metadata";
        assert!(error.ends_with(expected) && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn a_broken_image_is_named_and_more_than_one_percent_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        for index in 0..100 {
            write(folder.path(), &format!("train/a/{index:03}.png"), 1, [1, 1, 1]);
        }
        write(folder.path(), "test/a/0.png", 1, [1, 1, 1]);
        fs::write(folder.path().join("train/a/broken.png"), "no image").unwrap();
        let parts = load(folder.path(), [3, 1, 1]).unwrap();
        assert_eq!((parts.train.labels.len(), parts.skipped.len()), (100, 1));
        assert!(parts.skipped[0].contains("broken.png: "), "{}", parts.skipped[0]);
        fs::write(folder.path().join("test/a/empty.jpg"), "").unwrap();
        let error = load(folder.path(), [3, 1, 1]).err().unwrap().to_string();
        assert!(error.contains("2 of 103 images cannot be used"), "{error}");
        fs::create_dir(folder.path().join("train/b")).unwrap();
        let error = load(folder.path(), [3, 1, 1]).err().unwrap().to_string();
        assert!(error.ends_with("train and test have different classes"), "{error}");
    }
}
