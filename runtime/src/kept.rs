//! What a node keeps on disk of its cluster, for the day all of its nodes start again and one does not.
//!
//! [`Kept::open`] takes a folder of the user's and the node's own shard; below it, in one folder for each split and rank
//! (`<split, 16 digits>.<rank>`), lie the shards that peers have handed over, each named by its SHA-256
//! (`<sha256>.onnx`), and `complete.json`: the note that this split's cluster of so many nodes has once been
//! complete. Once it is written, what earlier splits have left is removed but for the last of them
//! ([`others`]). A file is written beside its place and moved there, so that after a power cut it is whole or
//! not there. Guarantees:
//!
//! - What is read back is what was written: a file that is not as its name says, or of another split, is
//!   ignored with a warning that names it, and nothing of it is removed but what was half written.
//! - A disk that is full or cannot be written costs a warning, the node nothing; [`Kept::write`] keeps what could
//!   not be written, for the next attempt.

mod others;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use snn_schemas::metadata::ShardInfo;
use tokio::sync::Notify;

use crate::agent::wire::hexadecimal;
use others::{IN_USE, InUse};

/// How long absent nodes are waited for after a start where nobody says otherwise: boards that get their
/// power back together start within a few seconds of each other.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);
/// Largest shard read back, in bytes: the largest that is fetched.
pub(crate) const MAX_SHARD: u64 = 1 << 30;
/// Most files looked at in a folder: one a rank is written, a few more may be of earlier builds.
const MAX_FILES: usize = 64;
/// Digits of the split in a folder's name: enough to tell splits apart; each file is checked besides.
const SPLIT_DIGITS: usize = 16;

const COMPLETE: &str = "complete.json";
const SHARD: &str = "onnx";
const PART: &str = "part";
/// Version of the note's form.
const VERSION: u32 = 1;

/// That the cluster of a split has been complete.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    split: String,
    nodes: usize,
}

/// The folder in which a node keeps what it learns of its cluster.
#[derive(Debug)]
pub struct Kept {
    /// The user's folder, with one in it for each split and rank.
    dir: PathBuf,
    folder: PathBuf,
    split: String,
    nodes: usize,
    grace: Duration,
    was_complete: bool,
    pending: Mutex<Pending>,
    wake: Notify,
    /// From when the folder is there.
    in_use: OnceLock<InUse>,
}

/// What is to be written.
#[derive(Debug, Default)]
struct Pending {
    shards: BTreeMap<usize, Bytes>,
    complete: bool,
}

impl Kept {
    /// The folder for a node with this shard below `dir`, and the shards that lie in it, whichever rank they are
    /// of. Nothing is written yet. After a start absent nodes are waited for for `grace`.
    pub fn open(dir: &Path, info: &ShardInfo, grace: Duration) -> (Kept, Vec<(PathBuf, Bytes)>) {
        let mut kept = Kept {
            dir: dir.to_owned(),
            folder: dir.join(format!("{}.{}", digits(&info.split), info.rank)),
            split: info.split.clone(),
            nodes: info.nodes,
            grace,
            was_complete: false,
            pending: Mutex::default(),
            wake: Notify::new(),
            in_use: OnceLock::new(),
        };
        if kept.folder.is_dir() {
            kept.mark();
        }
        let mut shards = Vec::new();
        for path in files(&kept.folder) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let read = match extension {
                Some(PART) => fs::remove_file(&path).map_err(|error| error.to_string()),
                _ if name == IN_USE => Ok(()),
                _ if name == COMPLETE => kept.read_note(&path).map(|()| kept.was_complete = true),
                Some(SHARD) => read_shard(&path).map(|bytes| shards.push((path.clone(), bytes))),
                _ => Err("not a file of this folder".to_owned()),
            };
            if let Err(reason) = read {
                ignored(&path, &reason);
            }
        }
        (kept, shards)
    }

    /// The folder with what is kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How long absent nodes are waited for after a start.
    pub fn grace(&self) -> Duration {
        self.grace
    }

    /// Whether a note said, when the folder was opened, that the cluster has been complete.
    pub fn was_complete(&self) -> bool {
        self.was_complete
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the shard of a rank written.
    pub(crate) fn shard(&self, rank: usize, bytes: Bytes) {
        self.pending().shards.insert(rank, bytes);
        self.wake.notify_one();
    }

    /// Has the note written that the cluster has been complete, if it was not there before.
    pub(crate) fn complete(&self) {
        if !self.was_complete {
            self.pending().complete = true;
            self.wake.notify_one();
        }
    }

    /// Returns when something is to be written; at once, if it came since this last returned.
    pub(crate) async fn wait(&self) {
        self.wake.notified().await;
    }

    /// Writes what is to be written, the note first: it takes least room. Blocks.
    ///
    /// # Errors
    /// What the system said first; what it was about is then to be written still.
    pub(crate) fn write(&self) -> Result<(), KeepError> {
        let (shards, complete) = {
            let pending = self.pending();
            (pending.shards.clone(), pending.complete)
        };
        let mut written = Ok(());
        if complete {
            let note = Note { version: VERSION, split: self.split.clone(), nodes: self.nodes };
            let text = serde_json::to_vec_pretty(&note).unwrap_or_default();
            match self.replace(COMPLETE, &text) {
                Ok(()) => self.pending().complete = false,
                Err(error) => written = Err(error),
            }
            // Where the disk is full, too: it may be by what is removed here, and the next attempt succeed.
            others::clear(&self.dir, digits(&self.split));
        }
        for (rank, bytes) in shards {
            let name = format!("{}.{SHARD}", hexadecimal(&Sha256::digest(&bytes)));
            match self.replace(&name, &bytes) {
                Ok(()) => drop(self.pending().shards.remove(&rank)),
                Err(error) => written = written.and(Err(error)),
            }
        }
        written
    }

    /// Writes a file beside its place and moves it there, for good: power may be cut right after.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), KeepError> {
        let path = self.folder.join(name);
        let beside = self.folder.join(format!("{name}.{PART}"));
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.folder)?;
            self.mark();
            let mut file = fs::File::create(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            fs::File::open(&self.folder)?.sync_all()
        };
        write().map_err(|source| {
            // What is left of it takes room that others may need.
            let _ = fs::remove_file(&beside);
            KeepError { path: path.clone(), source }
        })
    }

    /// Marks the folder as in use, if it is not yet. Without a mark others may remove it once it is old; what it keeps is then
    /// handed over anew.
    fn mark(&self) {
        if self.in_use.get().is_none() {
            match InUse::hold(&self.folder) {
                Ok(mark) => drop(self.in_use.set(mark)),
                Err(error) => {
                    tracing::debug!(folder = %self.folder.display(), %error, "not marked")
                }
            }
        }
    }

    fn read_note(&self, path: &Path) -> Result<(), String> {
        let note: Note = serde_json::from_slice(&read(path)?).map_err(|error| error.to_string())?;
        let own = Note { version: VERSION, split: self.split.clone(), nodes: self.nodes };
        match note == own {
            true => Ok(()),
            false => Err("of another cluster".to_owned()),
        }
    }
}

/// The digits of a split in its folders' names.
fn digits(split: &str) -> &str {
    split.get(..SPLIT_DIGITS).unwrap_or(split)
}

/// Says that a file counts for nothing, and why.
pub(crate) fn ignored(file: &Path, reason: &str) {
    tracing::warn!(file = %file.display(), reason, "kept file ignored");
}

/// A folder's files, in order of their names; none where there is no such folder.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            // Where there can be no folder, writing will say so.
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
                tracing::warn!(folder = %folder.display(), %error, "kept files not read");
            }
            return BTreeSet::new();
        }
    };
    entries.flatten().map(|entry| entry.path()).take(MAX_FILES).collect()
}

/// A shard that is as its name says.
fn read_shard(path: &Path) -> Result<Bytes, String> {
    let bytes = read(path)?;
    let found = hexadecimal(&Sha256::digest(&bytes));
    match path.file_stem().and_then(|stem| stem.to_str()) == Some(&found) {
        true => Ok(bytes.into()),
        false => Err(format!("its sha256 is {found}")),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        // A pipe would be waited for.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::other("not a file"));
        }
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(MAX_SHARD + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|error| error.to_string())?;
    match bytes.len() as u64 <= MAX_SHARD {
        true => Ok(bytes),
        false => Err(format!("more than {MAX_SHARD} bytes")),
    }
}

/// Why something is not kept.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(crate) struct KeepError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(rank: usize) -> ShardInfo {
        ShardInfo {
            rank,
            nodes: 2,
            entry: 0,
            groups: 2,
            split: "ab".repeat(32),
            source_sha256: "cd".repeat(32),
            policy_sha256: None,
            tool: "test".to_owned(),
        }
    }

    /// A folder that is removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("snn-kept-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Folder(path)
        }

        fn open(&self, rank: usize) -> (Kept, Vec<Bytes>) {
            let (kept, shards) = Kept::open(&self.0, &info(rank), DEFAULT_GRACE);
            (kept, shards.into_iter().map(|(_, bytes)| bytes).collect())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_kept_is_there_at_the_next_start() {
        let folder = Folder::new("next");
        let (kept, shards) = folder.open(0);
        assert!(shards.is_empty() && !kept.was_complete());
        kept.write().unwrap();
        assert!(!folder.0.exists(), "nothing to keep");
        kept.shard(1, Bytes::from_static(b"shard"));
        kept.complete();
        kept.write().unwrap();
        let (kept, shards) = folder.open(0);
        assert_eq!(shards, [&b"shard"[..]]);
        assert!(kept.was_complete());
        // Another rank has a folder of its own.
        let (other, shards) = folder.open(1);
        assert!(shards.is_empty() && !other.was_complete());
    }

    #[test]
    fn what_is_not_as_it_was_written_is_ignored() {
        let folder = Folder::new("ignored");
        let (kept, _) = folder.open(0);
        kept.shard(1, Bytes::from_static(b"shard"));
        kept.complete();
        kept.write().unwrap();
        let name = hexadecimal(&Sha256::digest(b"shard"));
        let shard = &kept.folder().join(format!("{name}.{SHARD}"));
        let note = &kept.folder().join(COMPLETE);
        let in_use = &kept.folder().join(IN_USE);
        assert!(files(kept.folder()) == [shard, note, in_use].map(PathBuf::from).into());
        let half = kept.folder().join("half.onnx.part");
        fs::write(&half, b"ha").unwrap();
        fs::create_dir(kept.folder().join("folder.onnx")).unwrap();
        fs::write(shard, b"shart").unwrap();
        let text = fs::read_to_string(note).unwrap();
        fs::write(note, text.replace("\"nodes\": 2", "\"nodes\": 3")).unwrap();
        let (again, shards) = folder.open(0);
        assert!(shards.is_empty() && !again.was_complete());
        assert!(!half.exists() && shard.exists() && note.exists());
        // What is written again takes its place.
        again.shard(1, Bytes::from_static(b"shard"));
        again.complete();
        again.write().unwrap();
        let (last, shards) = folder.open(0);
        assert_eq!((shards.len(), last.was_complete()), (1, true));
    }

    #[test]
    fn a_complete_cluster_clears_what_earlier_splits_have_left() {
        let folder = Folder::new("clears");
        let keep = |split: &str| {
            let info = ShardInfo { split: split.repeat(32), ..info(0) };
            let (kept, _) = Kept::open(&folder.0, &info, DEFAULT_GRACE);
            kept.shard(1, Bytes::from_static(b"shard"));
            kept.write().unwrap();
            kept
        };
        let splits = ["01", "02", "03", "04"];
        let left = splits.map(|split| keep(split).folder().to_owned());
        let kept = keep("ab");
        assert!(left.iter().all(|folder| folder.exists()), "not complete yet");
        kept.complete();
        kept.write().unwrap();
        let stay = left.iter().filter(|folder| folder.exists()).count();
        assert_eq!((stay, kept.folder().exists()), (others::SPLITS, true));
    }

    #[test]
    fn what_cannot_be_written_is_written_later() {
        let folder = Folder::new("later");
        // A file where a folder should be: root may write anywhere else.
        fs::write(&folder.0, b"").unwrap();
        let (kept, _) = folder.open(0);
        kept.shard(1, Bytes::from_static(b"shard"));
        kept.complete();
        let error = kept.write().unwrap_err().to_string();
        assert!(error.starts_with(&kept.folder().display().to_string()), "{error}");
        fs::remove_file(&folder.0).unwrap();
        kept.write().unwrap();
        let (kept, shards) = folder.open(0);
        assert_eq!((shards.len(), kept.was_complete()), (1, true));
    }
}
