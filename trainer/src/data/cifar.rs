//! CIFAR-10 and CIFAR-100, as they are distributed: as binary files or as Python pickles.
//!
//! Takes a folder that holds either, or the folder that the archives unpack to, and gives the
//! training and the test images. Binary files are records of one label byte (two for CIFAR-100: coarse
//! and fine) and 3,072 pixels; the names of the files may be longer than the distributed ones, as
//! `data_batch_1_first4000.bin`. A file whose length is no multiple of a record is refused.

use std::fs;
use std::path::{Path, PathBuf};

use super::pickle;
use super::{Parts, Raw};
use crate::error::TrainError;

/// Pixels of an image: three channels of 32×32.
const PIXELS: usize = 3 * 32 * 32;
/// Largest file read: CIFAR-100's training images, pickled with their file names, and some room.
const MAX_FILE: u64 = 400 << 20;

const NAMES_10: &str = "airplane automobile bird cat deer dog frog horse ship truck";
const NAMES_100: &str = "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly \
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin \
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man \
maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain \
plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake \
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip \
turtle wardrobe whale willow_tree wolf woman worm";

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ten,
    Hundred,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Ten => "cifar10",
            Kind::Hundred => "cifar100",
        }
    }

    /// Folders that its distributed archives unpack to.
    fn unpacked(self) -> [&'static str; 2] {
        match self {
            Kind::Ten => ["cifar-10-batches-bin", "cifar-10-batches-py"],
            Kind::Hundred => ["cifar-100-binary", "cifar-100-python"],
        }
    }

    /// Bytes of a record before its pixels; the last of them is the label.
    fn label_bytes(self) -> usize {
        match self {
            Kind::Ten => 1,
            Kind::Hundred => 2,
        }
    }

    fn classes(self) -> Vec<String> {
        let names = match self {
            Kind::Ten => NAMES_10,
            Kind::Hundred => NAMES_100,
        };
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// Key of the labels in a pickle.
    fn key(self) -> &'static str {
        match self {
            Kind::Ten => "labels",
            Kind::Hundred => "fine_labels",
        }
    }

    /// Whether a file of this name, without folder, holds training (true) or test images.
    fn part(self, name: &str) -> Option<bool> {
        let is = |word: &str| {
            name.split('.').next().is_some_and(|stem| stem.split('_').any(|part| part == word))
        };
        match self {
            Kind::Ten if name.starts_with("data_batch_") => Some(true),
            Kind::Ten if name.starts_with("test_batch") => Some(false),
            Kind::Hundred if is("train") => Some(true),
            Kind::Hundred if is("test") => Some(false),
            _ => None,
        }
    }
}

/// Reads both parts of a data set from `folder`.
///
/// # Errors
/// The folder cannot be read, lacks a part, or holds a file that is not what its name says.
pub(super) fn load(kind: Kind, folder: &Path) -> Result<Parts, TrainError> {
    let mut unpacked = kind.unpacked().into_iter().map(|name| folder.join(name));
    let inside = unpacked.find(|inside| inside.is_dir());
    let folder = inside.unwrap_or_else(|| folder.to_owned());
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .map_err(TrainError::io(&folder))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(TrainError::io(&folder))?;
    files.sort();
    let mut parts = [Raw::new([3, 32, 32], 255.0), Raw::new([3, 32, 32], 255.0)];
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(train) = kind.part(&name) else { continue };
        let length = fs::metadata(&path).map_err(TrainError::io(&path))?.len();
        if length > MAX_FILE {
            return Err(wrong(&path, "larger than any file of this data set"));
        }
        let bytes = fs::read(&path).map_err(TrainError::io(&path))?;
        let into = &mut parts[usize::from(!train)];
        match path.extension().is_some_and(|extension| extension == "bin") {
            true => binary(kind, &bytes, into).map_err(|reason| wrong(&path, reason))?,
            false => pickled(kind, &bytes, into).map_err(|reason| wrong(&path, &reason))?,
        }
    }
    let [train, test] = parts;
    for (part, what) in [(&train, "training"), (&test, "test")] {
        if part.labels.is_empty() {
            let name = kind.name();
            return Err(wrong(&folder, &format!("holds no {what} images of {name}")));
        }
    }
    Ok(Parts {
        name: kind.name().to_owned(),
        train,
        test,
        classes: kind.classes(),
        skipped: Vec::new(),
    })
}

fn wrong(path: &Path, reason: &str) -> TrainError {
    TrainError::Data(format!("{}: {reason}", path.display()))
}

fn binary(kind: Kind, bytes: &[u8], into: &mut Raw) -> Result<(), &'static str> {
    let record = kind.label_bytes() + PIXELS;
    if !bytes.len().is_multiple_of(record) {
        return Err("its length is no multiple of a record's: cut short, or of the other CIFAR");
    }
    let classes = kind.classes().len();
    for record in bytes.chunks_exact(record) {
        let (labels, pixels) = record.split_at(kind.label_bytes());
        let label = usize::from(labels[labels.len() - 1]);
        if label >= classes {
            return Err("a label is out of range");
        }
        into.pixels.extend(pixels);
        into.labels.push(label);
    }
    Ok(())
}

fn pickled(kind: Kind, bytes: &[u8], into: &mut Raw) -> Result<(), String> {
    let value = pickle::read(bytes)?;
    let labels = value.get(kind.key()).and_then(pickle::Value::ints);
    let labels = labels.ok_or(format!("has no list \"{}\"", kind.key()))?;
    let pixels = value.get("data").and_then(pickle::Value::array).ok_or("has no array \"data\"")?;
    if pixels.len() != labels.len() * PIXELS {
        return Err(format!("{} bytes of pixels for {} labels", pixels.len(), labels.len()));
    }
    let classes = kind.classes().len();
    for label in labels {
        let label = usize::try_from(label).ok().filter(|label| *label < classes);
        into.labels.push(label.ok_or("a label is out of range")?);
    }
    into.pixels.extend(pixels);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(labels: &[u8], pixel: u8) -> Vec<u8> {
        [labels, &[pixel; PIXELS]].concat()
    }

    #[test]
    fn there_are_ten_and_a_hundred_names() {
        assert_eq!(Kind::Ten.classes().len(), 10);
        assert_eq!(Kind::Hundred.classes().len(), 100);
        assert_eq!(Kind::Hundred.classes()[99], "worm");
    }

    #[test]
    fn binary_files_of_both_kinds_are_read_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
        write("data_batch_2.bin", record(&[9], 2));
        write("data_batch_1_first1.bin", record(&[3], 1));
        write("test_batch.bin", record(&[0], 7));
        write("batches.meta.txt", b"airplane".to_vec());
        let parts = load(Kind::Ten, folder.path()).unwrap();
        assert_eq!(parts.train.labels, [3, 9]);
        assert_eq!((parts.train.pixels[0], parts.train.pixels[PIXELS]), (1, 2));
        assert_eq!((parts.test.labels[0], parts.test.pixels[5]), (0, 7));
        let inside = folder.path().join("cifar-100-binary");
        fs::create_dir(&inside).unwrap();
        fs::write(inside.join("train.bin"), record(&[4, 60], 1)).unwrap();
        fs::write(inside.join("test.bin"), record(&[4, 61], 1)).unwrap();
        let parts = load(Kind::Hundred, folder.path()).unwrap();
        assert_eq!((parts.train.labels[0], parts.test.labels[0]), (60, 61));
    }

    #[test]
    fn pickles_are_read_as_distributed() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("cifar-10-batches-py");
        fs::create_dir(&inside).unwrap();
        let python2: &[u8] = include_bytes!("../../tests/data/python2_protocol2.pkl");
        let python3: &[u8] = include_bytes!("../../tests/data/python3_protocol4.pkl");
        fs::write(inside.join("data_batch_1"), python2).unwrap();
        fs::write(inside.join("test_batch"), python3).unwrap();
        let parts = load(Kind::Ten, folder.path()).unwrap();
        assert_eq!((parts.train.labels, parts.test.labels), (vec![6, 9], vec![6, 9]));
        assert_eq!(parts.train.pixels[PIXELS + 1], (7 * (PIXELS + 1) % 256) as u8);
        assert_eq!(parts.train.pixels, parts.test.pixels);
    }

    #[test]
    fn each_kind_is_found_beside_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, bytes: Vec<u8>| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        write("cifar-10-batches-bin/data_batch_1.bin", record(&[3], 1));
        write("cifar-10-batches-bin/test_batch.bin", record(&[4], 1));
        write("cifar-100-binary/train.bin", record(&[4, 60], 1));
        write("cifar-100-binary/test.bin", record(&[4, 61], 1));
        let parts = load(Kind::Hundred, folder.path()).unwrap();
        assert_eq!((parts.train.labels[0], parts.test.labels[0]), (60, 61));
        let parts = load(Kind::Ten, folder.path()).unwrap();
        assert_eq!((parts.train.labels[0], parts.test.labels[0]), (3, 4));
    }

    #[test]
    fn bad_folders_and_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let sentence = || load(Kind::Ten, folder.path()).err().unwrap().to_string();
        assert!(sentence().ends_with("holds no training images of cifar10"));
        let file = folder.path().join("data_batch_1.bin");
        fs::write(&file, &record(&[1], 0)[1..]).unwrap();
        assert!(sentence().contains("data_batch_1.bin: its length is no multiple"));
        fs::write(&file, record(&[10], 0)).unwrap();
        assert!(sentence().ends_with("data_batch_1.bin: a label is out of range"));
        fs::remove_file(&file).unwrap();
        fs::write(folder.path().join("data_batch_1"), b"cos\nsystem\n.").unwrap();
        assert!(sentence().ends_with("data_batch_1: has no list \"labels\""));
    }
}
