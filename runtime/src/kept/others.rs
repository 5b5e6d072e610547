//! Room on disk: what earlier splits have left beside a node's own folder.
//!
//! [`InUse::hold`] marks a folder as one that a living process uses: a file in it that is locked until the mark is dropped,
//! or the process ends however it does, and whose time says when the folder was last taken up.
//! [`clear`] removes what other splits have left but for the [`SPLITS`] last used. Guarantees:
//!
//! - What a living process uses stays, as old as it may be: two clusters may share a folder.
//! - Nothing is removed but files that a node writes, and a folder that is then empty; links are not followed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{COMPLETE, PART, SHARD, SPLIT_DIGITS};

/// Other splits whose folders are left alone: the one before, should it come back, and one more.
pub(super) const SPLITS: usize = 2;

/// The file that marks a folder.
pub(super) const IN_USE: &str = "in-use";

/// A folder's mark.
#[derive(Debug)]
pub(super) struct InUse {
    /// Locked, together with others that use the folder, as long as it is open.
    _file: File,
}

impl InUse {
    /// Marks a folder that exists as in use from now on.
    ///
    /// # Errors
    /// What the system says where the file cannot be written or locked, or is removed at this moment.
    pub(super) fn hold(folder: &Path) -> io::Result<InUse> {
        let path = folder.join(IN_USE);
        let file = open(&path)?;
        // Whoever removes the folder has it locked, and what would be locked after that is no file of the folder any more.
        file.try_lock_shared()?;
        if !path.exists() {
            return Err(io::ErrorKind::NotFound.into());
        }
        file.set_modified(SystemTime::now())?;
        Ok(InUse { _file: file })
    }
}

fn open(mark: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(mark)
}

/// Removes from the folder `dir` what splits other than `own` (its folders' first digits) have left, but for the
/// [`SPLITS`] last used and what is in use. What cannot be read or removed stays.
pub(super) fn clear(dir: &Path, own: &str) {
    let mut splits = BTreeMap::<String, (SystemTime, Vec<PathBuf>)>::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let split = name.to_str().and_then(split_of).filter(|split| *split != own);
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let (Some(split), true) = (split, is_folder) {
            let (last, folders) =
                splits.entry(split.to_owned()).or_insert((SystemTime::UNIX_EPOCH, Vec::new()));
            *last = (*last).max(last_used(&entry.path()));
            folders.push(entry.path());
        }
    }
    let mut splits: Vec<_> = splits.into_values().collect();
    splits.sort_by_key(|(last, _)| std::cmp::Reverse(*last));
    for folder in splits.into_iter().skip(SPLITS).flat_map(|(_, folders)| folders) {
        match remove(&folder) {
            Ok(()) => {
                tracing::info!(folder = %folder.display(), "kept for an earlier split: removed")
            }
            Err(error) => tracing::debug!(folder = %folder.display(), %error, "not removed"),
        }
    }
}

/// The split's digits of a folder's name, if it is one that a node gives: `<digits>.<rank>`.
fn split_of(name: &str) -> Option<&str> {
    let (split, rank) = name.split_once('.')?;
    let is_split = split.len() == SPLIT_DIGITS && split.bytes().all(|b| b.is_ascii_hexdigit());
    let is_rank = !rank.is_empty() && rank.bytes().all(|b| b.is_ascii_digit());
    (is_split && is_rank).then_some(split)
}

/// When a folder was last taken up; one from before there were marks, when it was last written to.
fn last_used(folder: &Path) -> SystemTime {
    [folder.join(IN_USE), folder.to_owned()]
        .iter()
        .find_map(|path| fs::metadata(path).and_then(|data| data.modified()).ok())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Removes a folder that nobody uses.
fn remove(folder: &Path) -> io::Result<()> {
    let mark = folder.join(IN_USE);
    // Held until the folder is gone, so that nobody takes it up meanwhile.
    let last_used = last_used(folder);
    let file = open(&mark)?;
    file.try_lock()?;
    let mut is_ours = true;
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if entry.file_name() == COMPLETE || matches!(extension, Some(SHARD | PART)) {
            fs::remove_file(&path)?;
        } else {
            is_ours &= entry.file_name() == IN_USE;
        }
    }
    if !is_ours {
        // The mark stays with what is not ours, so that the folder does not count as new.
        return file.set_modified(last_used);
    }
    fs::remove_file(&mark)?;
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A folder that is removed at the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let path =
                std::env::temp_dir().join(format!("snn-others-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).unwrap();
            Dir(path)
        }

        /// What a split whose digits are all `digit` has left, used so many minutes ago.
        fn left(&self, digit: char, rank: usize, minutes: u64) -> PathBuf {
            let digits = String::from(digit).repeat(SPLIT_DIGITS);
            let folder = self.0.join(format!("{digits}.{rank}"));
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("00.onnx"), b"shard").unwrap();
            fs::write(folder.join(COMPLETE), b"{}").unwrap();
            let mark = File::create(folder.join(IN_USE)).unwrap();
            mark.set_modified(SystemTime::now() - Duration::from_secs(60 * minutes)).unwrap();
            folder
        }

        fn clear(&self) {
            clear(&self.0, &"a".repeat(SPLIT_DIGITS));
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_last_splits_and_the_own_stay() {
        let dir = Dir::new("last");
        let own = dir.left('a', 0, 900);
        let newest = [dir.left('b', 0, 30), dir.left('b', 1, 800), dir.left('c', 2, 40)];
        let old = [dir.left('d', 0, 50), dir.left('d', 3, 60), dir.left('e', 0, 70)];
        dir.clear();
        assert!(own.exists() && newest.iter().all(|folder| folder.join("00.onnx").exists()));
        assert!(old.iter().all(|folder| !folder.exists()));
    }

    #[test]
    fn what_is_in_use_stays() {
        let dir = Dir::new("use");
        let (_, _) = (dir.left('b', 0, 1), dir.left('c', 0, 1));
        let used = dir.left('d', 0, 50);
        let first = InUse::hold(&used).unwrap();
        let second = InUse::hold(&used).unwrap();
        // Used again, it is the newest; as if that were long ago:
        first._file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        drop(first);
        dir.clear();
        assert!(used.join("00.onnx").exists());
        drop(second);
        dir.clear();
        assert!(!used.exists());
    }

    #[test]
    fn what_no_node_wrote_stays() {
        let dir = Dir::new("foreign");
        let (_, _) = (dir.left('b', 0, 1), dir.left('c', 0, 1));
        let mixed = dir.left('d', 0, 50);
        fs::write(mixed.join("notes.txt"), b"mine").unwrap();
        let foreign = ["photos", "dddddddddddddddd", "dddddddddddddddd.x", "dd.0"];
        for name in foreign {
            fs::create_dir(dir.0.join(name)).unwrap();
            fs::write(dir.0.join(name).join("00.onnx"), b"mine").unwrap();
        }
        fs::write(dir.0.join("eeeeeeeeeeeeeeee.0"), b"a file").unwrap();
        dir.clear();
        assert!(mixed.join("notes.txt").exists() && !mixed.join("00.onnx").exists());
        // What is left of it takes no place from others.
        let (newest, old) = (dir.left('f', 0, 0), dir.left('e', 1, 2));
        dir.clear();
        assert!(newest.exists() && !old.exists());
        assert!(foreign.iter().all(|name| dir.0.join(name).join("00.onnx").exists()));
        assert!(dir.0.join("eeeeeeeeeeeeeeee.0").exists());
    }
}
