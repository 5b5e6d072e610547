//! An agent's files: versions, how they were started, and which one is current.
//!
//! Takes the folder the agent may use; keeps in it `<version>/cluster.json`, `<version>/<shard>`,
//! `<version>/node.json` (rank, port, peers), `current` and `previous`; a version's nodes keep what they learn
//! in a folder of it, which goes with the version. A file is written beside its place, checked
//! by its SHA-256, and moved there whole; until then it is `<name>.part`, and goes on from its length. One
//! that has been changed on disk is removed when it is asked for or used.
//! Nothing a peer says becomes a path, but digits of a version, and names that a manifest may have.
//! One agent uses a folder at a time.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest};

use super::wire::{File, Settings, Version, hexadecimal};

/// Largest shard accepted, in bytes: what a protobuf message, and so an ONNX file, may have.
pub const MAX_SHARD_BYTES: u64 = 1 << 31;
/// Most versions kept: the current one, the one before, one that is being tried, and a few that were
/// left half way.
pub const MAX_VERSIONS: usize = 8;

/// How long a file that was read and was as it should be counts as such, unless it is changed: longer than
/// any agent is waited for before it is asked again, so that each question is not another reading.
const CHECKED_FOR: Duration = Duration::from_secs(60);

const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
const ORDER: &str = "node.json";
const LOCK: &str = "lock";
const PART: &str = "part";

/// How a version was started, to start it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// The rank.
    pub rank: usize,
    /// Port to listen on.
    pub port: u16,
    /// Addresses of the other nodes.
    pub peers: Vec<String>,
    /// How it runs.
    #[serde(default)]
    pub settings: Settings,
}

/// The folder of an agent.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// The file that was last found to be as it should be.
    checked: Mutex<Option<Checked>>,
    // Held as long as the store is: the lock goes with it.
    _lock: fs::File,
}

impl Store {
    /// Opens the folder, and makes it where it is missing.
    ///
    /// # Errors
    /// What the system says, or that another agent uses it.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let at = |source| StoreError::Io { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(at)?;
        let dir = dir.canonicalize().map_err(at)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(LOCK));
        let lock = lock.map_err(at)?;
        if lock.try_lock().is_err() {
            return Err(StoreError::Taken { path: dir });
        }
        Ok(Store { dir, checked: Mutex::default(), _lock: lock })
    }

    /// How much of a file is there, and whether it is whole and of the right hash. One that is not any more is
    /// removed, so that it is sent again.
    ///
    /// # Errors
    /// A shard whose manifest is not there.
    pub fn have(&self, version: &Version, file: File) -> Result<(u64, bool), StoreError> {
        let wanted = self.wanted(version, file)?;
        if let Ok(found) = fs::metadata(&wanted.path) {
            match self.check(&wanted, &found) {
                Ok(()) => return Ok((found.len(), true)),
                Err(error) => tracing::warn!(%error, "a file is removed, to be sent again"),
            }
        }
        let part = fs::metadata(wanted.part());
        Ok((part.map_or(0, |part| part.len()), false))
    }

    /// Writes a piece of a file at `offset`, and drops what lies beyond it; with the last piece the
    /// file is checked and takes its place. Gives what [`Store::have`] does.
    ///
    /// # Errors
    /// A piece that would leave a gap, a file too large or of another hash, a full disk.
    pub fn put(
        &self,
        version: &Version,
        file: File,
        (offset, piece): (u64, &[u8]),
        last: bool,
    ) -> Result<(u64, bool), StoreError> {
        let wanted = self.wanted(version, file)?;
        if let Ok(found) = fs::metadata(&wanted.path) {
            return Ok((found.len(), true));
        }
        let part = wanted.part();
        let end = offset.saturating_add(piece.len() as u64);
        if end > wanted.limit {
            return Err(StoreError::TooLarge { path: wanted.path, limit: wanted.limit });
        }
        let folder = self.dir.join(version.as_str());
        if !folder.exists() && self.versions().len() >= MAX_VERSIONS {
            return Err(StoreError::Full);
        }
        let io = |source| StoreError::Io { path: part.clone(), source };
        fs::create_dir_all(&folder).map_err(io)?;
        let mut open = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&part)
            .map_err(io)?;
        let length = open.metadata().map_err(io)?.len();
        if offset > length {
            return Ok((length, false));
        }
        open.set_len(offset).map_err(io)?;
        open.seek(SeekFrom::Start(offset)).map_err(io)?;
        open.write_all(piece).map_err(io)?;
        if last {
            let found = hash(&mut open).map_err(io)?;
            if found != wanted.sha256 {
                // Nothing of it can be trusted.
                fs::remove_file(&part).map_err(io)?;
                return Err(StoreError::Hash { path: wanted.path, found, wanted: wanted.sha256 });
            }
            open.sync_all().map_err(io)?;
            fs::rename(&part, &wanted.path).map_err(io)?;
        }
        Ok((end, last))
    }

    /// The manifest of a version.
    ///
    /// # Errors
    /// It is not there, or is none.
    pub fn manifest(&self, version: &Version) -> Result<Manifest, StoreError> {
        let path = self.dir.join(version.as_str()).join(MANIFEST_FILE);
        let bytes = fs::read(&path).map_err(|source| StoreError::Io { path: path.clone(), source });
        Manifest::from_json(&bytes?)
            .map_err(|error| StoreError::Manifest { path, reason: error.to_string() })
    }

    /// The file of a rank's shard, which must be whole and of the right hash.
    ///
    /// # Errors
    /// It is not there, or has been changed on disk: it is then removed, so that it is sent again.
    pub fn shard(&self, version: &Version, rank: usize) -> Result<PathBuf, StoreError> {
        let wanted = self.wanted(version, File::Shard(rank))?;
        wanted.check_or_remove()?;
        Ok(wanted.path)
    }

    /// How a version was started, if it ever was.
    pub fn order(&self, version: &Version) -> Option<Order> {
        let bytes = fs::read(self.dir.join(version.as_str()).join(ORDER)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Keeps how a version is started.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_order(&self, version: &Version, order: &Order) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(order).unwrap_or_default();
        replace(&self.dir.join(version.as_str()).join(ORDER), &text)
    }

    /// The version that runs after a restart.
    pub fn current(&self) -> Option<Version> {
        self.named(CURRENT)
    }

    /// The version that was current before the one that is, or before none was.
    pub fn previous(&self) -> Option<Version> {
        self.named(PREVIOUS)
    }

    fn named(&self, file: &str) -> Option<Version> {
        Version::parse(fs::read_to_string(self.dir.join(file)).ok()?.trim())
    }

    /// Says which version runs after a restart; none, without one. The one until now is the previous one.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_current(&self, version: Option<&Version>) -> Result<(), StoreError> {
        let line = |version: &Version| format!("{}\n", version.as_str());
        if let Some(until_now) = self.current().filter(|current| version != Some(current)) {
            replace(&self.dir.join(PREVIOUS), line(&until_now).as_bytes())?;
        }
        let path = self.dir.join(CURRENT);
        match version {
            Some(version) => replace(&path, line(version).as_bytes()),
            None => match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(StoreError::Io { path, source })
                }
                _ => Ok(()),
            },
        }
    }

    /// Every version there is, or a part of, in order of their names.
    pub fn versions(&self) -> Vec<Version> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut versions: Vec<Version> =
            entries.filter_map(|entry| Version::parse(entry.file_name().to_str()?)).collect();
        versions.sort();
        versions
    }

    /// Removes the files of a version.
    ///
    /// # Errors
    /// What the system says.
    pub fn forget(&self, version: &Version) -> Result<(), StoreError> {
        let path = self.dir.join(version.as_str());
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::Io { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Removes versions until there is a place for another, oldest first, where `version` needs one: none that
    /// is current, was it before, or `runs`. Gives those that are gone.
    ///
    /// # Errors
    /// What the system says.
    pub fn make_room(
        &self,
        version: &Version,
        runs: impl Fn(&Version) -> bool,
    ) -> Result<Vec<Version>, StoreError> {
        let mut versions = self.versions();
        let surplus = (versions.len() + 1).saturating_sub(MAX_VERSIONS);
        if versions.contains(version) || surplus == 0 {
            return Ok(Vec::new());
        }
        let kept = [self.current(), self.previous()];
        versions.retain(|other| !kept.iter().flatten().any(|kept| kept == other) && !runs(other));
        versions.sort_by_key(|other| self.touched(other));
        versions.truncate(surplus);
        versions.iter().try_for_each(|old| self.forget(old))?;
        Ok(versions)
    }

    /// When a file of a version last came or went.
    fn touched(&self, version: &Version) -> Option<SystemTime> {
        fs::metadata(self.dir.join(version.as_str())).and_then(|folder| folder.modified()).ok()
    }

    /// Whether a file that is there is as it should be; it is removed where it is not. Whoever asks gives up
    /// on an agent that reads a large file for longer, and asks again: then it is not read again.
    fn check(&self, wanted: &Wanted, found: &fs::Metadata) -> Result<(), StoreError> {
        let changed = found.modified().ok();
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |known: &Checked| {
            let same = known.path == wanted.path && known.length == found.len();
            same && known.changed == changed && known.when.elapsed() < CHECKED_FOR
        };
        if checked.as_ref().is_some_and(is_known) {
            return Ok(());
        }
        wanted.check_or_remove()?;
        let (path, length) = (wanted.path.clone(), found.len());
        *checked = Some(Checked { path, length, changed, when: Instant::now() });
        Ok(())
    }

    fn wanted(&self, version: &Version, file: File) -> Result<Wanted, StoreError> {
        let folder = self.dir.join(version.as_str());
        match file {
            File::Manifest => Ok(Wanted {
                path: folder.join(MANIFEST_FILE),
                sha256: version.as_str().to_owned(),
                limit: MAX_MANIFEST_BYTES as u64,
            }),
            File::Shard(rank) => {
                let manifest = self.manifest(version)?;
                let nodes = manifest.nodes.len();
                let node = manifest.nodes.into_iter().nth(rank);
                let node = node.ok_or(StoreError::Rank { rank, nodes })?;
                Ok(Wanted {
                    path: folder.join(node.shard),
                    sha256: node.sha256,
                    limit: MAX_SHARD_BYTES,
                })
            }
        }
    }
}

/// What a file must be.
struct Wanted {
    path: PathBuf,
    sha256: String,
    limit: u64,
}

impl Wanted {
    fn part(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".");
        name.push(PART);
        name.into()
    }

    /// Reads the file, and removes it where it is another or cannot be read: nothing else would replace it.
    fn check_or_remove(&self) -> Result<(), StoreError> {
        let io = |source| StoreError::Io { path: self.path.clone(), source };
        let mut file = fs::File::open(&self.path).map_err(io)?;
        let wrong = match hash(&mut file) {
            Ok(found) if found == self.sha256 => return Ok(()),
            Ok(found) => {
                let (path, wanted) = (self.path.clone(), self.sha256.clone());
                StoreError::Hash { path, found, wanted }
            }
            Err(source) => io(source),
        };
        fs::remove_file(&self.path).map_err(io)?;
        Err(wrong)
    }
}

/// A file that has been read and was as it should be.
#[derive(Debug)]
struct Checked {
    path: PathBuf,
    length: u64,
    changed: Option<SystemTime>,
    when: Instant,
}

fn hash(file: &mut fs::File) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut piece = vec![0; 64 << 10];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hexadecimal(&digest.finalize())),
            read => digest.update(&piece[..read]),
        }
    }
}

/// Writes a file beside its place and moves it there: after a power cut it is the old or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let beside = path.with_extension(PART);
    let write = || -> io::Result<()> {
        let mut file = fs::File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| StoreError::Io { path: path.to_owned(), source })
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The system's answer.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// Another agent is there.
    #[error("{}: another agent uses this folder", path.display())]
    Taken {
        /// The folder.
        path: PathBuf,
    },
    /// Another file than the one that was announced.
    #[error("{}: sha256 {found}, expected {wanted}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The hash it should have.
        wanted: String,
    },
    /// A manifest that is none.
    #[error("{}: manifest: {reason}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A rank the version has not.
    #[error("rank {rank}, but the version has {nodes} nodes")]
    Rank {
        /// The rank.
        rank: usize,
        /// Its nodes.
        nodes: usize,
    },
    /// A file without end.
    #[error("{}: more than the {limit} bytes such a file may have", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// Too many versions, none of which may go.
    #[error("{MAX_VERSIONS} versions are kept already")]
    Full,
}

#[cfg(test)]
mod tests;
