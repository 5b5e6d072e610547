//! Files that are either whole or absent: checkpoints, and everything else a run leaves behind.
//!
//! A checkpoint is a list of named byte strings between a magic number and a checksum. Files are
//! written beside and renamed, so that a run killed at any moment, or one that meets a full disk,
//! leaves the last good file as it was. A file that was cut short or altered is refused in one
//! sentence.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use flate2::Crc;

use crate::error::TrainError;

/// Opens every checkpoint, its last byte being the version of the layout.
const MAGIC: &[u8; 8] = b"SNNCKPT\x01";
/// Length of the checksum that closes it.
const CHECKSUM: usize = 4;

/// Named parts of a checkpoint.
pub(crate) type Sections = BTreeMap<String, Vec<u8>>;

/// Writes `bytes` to `path` so that nobody ever sees half of them.
///
/// # Errors
/// The folder cannot be written to or the disk is full; what stood at `path` is still there.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    let written = File::create(beside)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(beside, path));
    written.map_err(|error| {
        // What could not be finished only takes room; that it may not be removable changes nothing.
        let _ = fs::remove_file(beside);
        TrainError::io(path)(error)
    })
}

/// Writes a checkpoint.
pub(crate) fn save(path: &Path, sections: &Sections) -> Result<(), TrainError> {
    write_whole(path, &encode(sections))
}

/// Reads a checkpoint; `None` if there is none.
pub(crate) fn load(path: &Path) -> Result<Option<Sections>, TrainError> {
    match fs::read(path) {
        Ok(bytes) => decode(&bytes).map(Some).ok_or_else(|| TrainError::Checkpoint {
            path: path.to_owned(),
            reason: "not a whole checkpoint of this version".to_owned(),
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TrainError::io(path)(error)),
    }
}

fn encode(sections: &Sections) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for (name, content) in sections {
        for part in [name.as_bytes(), content] {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        }
    }
    let checksum = checksum(&bytes);
    bytes.extend(checksum);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Sections> {
    let (body, stored) = bytes.split_at_checked(bytes.len().checked_sub(CHECKSUM)?)?;
    let mut rest = body.strip_prefix(MAGIC)?;
    if checksum(body) != stored {
        return None;
    }
    let mut sections = Sections::new();
    while !rest.is_empty() {
        let name = String::from_utf8(take(&mut rest)?.to_vec()).ok()?;
        sections.insert(name, take(&mut rest)?.to_vec());
    }
    Some(sections)
}

fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (part, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(part)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections() -> Sections {
        [("a".to_owned(), vec![1, 2, 3]), ("empty".to_owned(), vec![])].into()
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last.ckpt");
        assert_eq!(load(&path).unwrap(), None);
        save(&path, &sections()).unwrap();
        assert_eq!(load(&path).unwrap(), Some(sections()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn every_cut_and_every_altered_byte_is_noticed() {
        let whole = encode(&sections());
        assert!(decode(&whole).is_some());
        for end in 0..whole.len() {
            assert_eq!(decode(&whole[..end]), None, "cut at {end}");
            let mut altered = whole.clone();
            altered[end] ^= 0x10;
            assert_eq!(decode(&altered), None, "altered at {end}");
        }
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("last.ckpt");
        save(&path, &sections()).unwrap();
        // A folder where the file is to be written beside: creating it fails as a full disk would.
        fs::create_dir(folder.path().join("last.ckpt.part")).unwrap();
        let error = save(&path, &Sections::new()).unwrap_err().to_string();
        assert!(error.contains("last.ckpt: "), "{error}");
        assert_eq!(load(&path).unwrap(), Some(sections()));
    }
}
