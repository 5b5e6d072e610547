//! An agent's files: versions, how they were started, and which one is current.
//!
//! Takes the folder the agent may use; keeps in it `<version>/cluster.json`, `<version>/<shard>`,
//! `<version>/node.json` (rank, port, peers) and `current`; a version's nodes keep what they learn in a folder
//! of it, which goes with the version. A file is written beside its place, checked
//! by its SHA-256, and moved there whole; until then it is `<name>.part`, and goes on from its length.
//! Nothing a peer says becomes a path, but digits of a version, and names that a manifest may have.
//! One agent uses a folder at a time.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest};

use super::wire::{File, Settings, Version, hexadecimal};

/// Largest shard accepted, in bytes: what a protobuf message, and so an ONNX file, may have.
pub const MAX_SHARD_BYTES: u64 = 1 << 31;
/// Most versions kept: the current one, the one before, one that is being tried, and a few that were
/// left half way.
pub const MAX_VERSIONS: usize = 8;

const CURRENT: &str = "current";
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
        Ok(Store { dir, _lock: lock })
    }

    /// How much of a file is there, and whether it is whole.
    ///
    /// # Errors
    /// A shard whose manifest is not there.
    pub fn have(&self, version: &Version, file: File) -> Result<(u64, bool), StoreError> {
        let wanted = self.wanted(version, file)?;
        if let Ok(found) = fs::metadata(&wanted.path) {
            return Ok((found.len(), true));
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
        if let (length, true) = self.have(version, file)? {
            return Ok((length, true));
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
    /// It is not there, or has been changed on disk.
    pub fn shard(&self, version: &Version, rank: usize) -> Result<PathBuf, StoreError> {
        let wanted = self.wanted(version, File::Shard(rank))?;
        let path = wanted.path;
        let io = |source| StoreError::Io { path: path.clone(), source };
        let found = hash(&mut fs::File::open(&path).map_err(io)?).map_err(io)?;
        match found == wanted.sha256 {
            true => Ok(path),
            false => Err(StoreError::Hash { path, found, wanted: wanted.sha256 }),
        }
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
        Version::parse(fs::read_to_string(self.dir.join(CURRENT)).ok()?.trim())
    }

    /// Says which version runs after a restart; none, without one.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_current(&self, version: Option<&Version>) -> Result<(), StoreError> {
        let path = self.dir.join(CURRENT);
        match version {
            Some(version) => replace(&path, format!("{}\n", version.as_str()).as_bytes()),
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
    /// Too many versions.
    #[error("{MAX_VERSIONS} versions are kept already")]
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("snn-store-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn a_file_arrives_in_pieces_goes_on_where_it_ended_and_must_have_its_hash() {
        let folder = folder("pieces");
        let bytes = b"{\"not\": \"a manifest, but as good as any here\"}";
        let version = Version::of(bytes);
        let store = Store::open(&folder).unwrap();
        let put = |offset: usize, end: usize, last| {
            let piece = (offset as u64, &bytes[offset..end]);
            store.put(&version, File::Manifest, piece, last)
        };
        assert_eq!(store.have(&version, File::Manifest).unwrap(), (0, false));
        assert_eq!(put(0, 10, false).unwrap(), (10, false));
        // A gap is not written: the sender is told where to go on.
        assert_eq!(put(20, 30, false).unwrap(), (10, false));
        drop(store);
        let store = Store::open(&folder).unwrap();
        assert_eq!(store.have(&version, File::Manifest).unwrap(), (10, false));
        let put = |offset: usize, end: usize, last| {
            let piece = (offset as u64, &bytes[offset..end]);
            store.put(&version, File::Manifest, piece, last)
        };
        // The same piece twice does no harm.
        assert_eq!(put(5, 30, false).unwrap(), (30, false));
        assert_eq!(put(5, 30, false).unwrap(), (30, false));
        assert_eq!(put(29, bytes.len(), true).unwrap(), (bytes.len() as u64, true));
        assert!(matches!(
            store.put(&Version::of(b"other"), File::Manifest, (0, bytes), true),
            Err(StoreError::Hash { .. })
        ));
        assert_eq!(store.have(&Version::of(b"other"), File::Manifest).unwrap(), (0, false));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_folder_is_used_by_one_and_remembers_what_is_current() {
        let folder = folder("one");
        let store = Store::open(&folder).unwrap();
        assert!(matches!(Store::open(&folder), Err(StoreError::Taken { .. })));
        assert_eq!(store.current(), None);
        let version = Version::of(b"x");
        store.set_current(Some(&version)).unwrap();
        assert_eq!(store.current(), Some(version.clone()));
        assert!(matches!(store.shard(&version, 0), Err(StoreError::Io { .. })));
        store.set_current(None).unwrap();
        store.set_current(None).unwrap();
        assert_eq!(store.current(), None);
        for number in 0..MAX_VERSIONS {
            let bytes = number.to_string();
            let of = Version::of(bytes.as_bytes());
            store.put(&of, File::Manifest, (0, bytes.as_bytes()), true).unwrap();
        }
        let more = store.put(&version, File::Manifest, (0, b"x"), true);
        assert!(matches!(more, Err(StoreError::Full)));
        store.forget(&store.versions()[0]).unwrap();
        store.put(&version, File::Manifest, (0, b"x"), true).unwrap();
        fs::remove_dir_all(folder).unwrap();
    }
}
