//! The shards of a cluster, kept by every node, so that any can stand in for any other.
//!
//! Takes shards from wherever they are found: the node's own folder, or peers. Gives them by rank. A
//! shard is kept only if it is of the same split and of the rank it is offered for, whoever offers it; and,
//! where it is known which file a rank's shard is ([`Shelf::expect`]), only if it is that file.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::digest::{Digest, OtherFile};
use crate::shard::{Shard, ShardError};

/// Shards of one split, as the bytes of their files.
#[derive(Debug)]
pub struct Shelf {
    split: String,
    nodes: usize,
    expected: BTreeMap<usize, Digest>,
    shards: Mutex<BTreeMap<usize, (Digest, Bytes)>>,
}

impl Shelf {
    /// A shelf with one shard, for all of its split.
    pub fn new(shard: &Shard, bytes: Bytes) -> Shelf {
        let info = shard.identity();
        let shards = Mutex::new(BTreeMap::from([(info.rank, (shard.digest(), bytes))]));
        let (split, nodes) = (info.split.clone(), info.nodes);
        Shelf { split, nodes, expected: BTreeMap::new(), shards }
    }

    fn shards(&self) -> MutexGuard<'_, BTreeMap<usize, (Digest, Bytes)>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps from now on only these files as the shards of their ranks.
    ///
    /// # Errors
    /// A shard that is here already, and is another file.
    pub fn expect(&mut self, expected: BTreeMap<usize, Digest>) -> Result<(), OtherFile> {
        self.expected = expected;
        let shards = self.shards();
        shards.iter().try_for_each(|(&rank, (found, _))| self.check(rank, *found))
    }

    /// Which file the shard of a rank is, where that is known.
    pub fn expected(&self, rank: usize) -> Option<Digest> {
        self.expected.get(&rank).copied()
    }

    fn check(&self, rank: usize, found: Digest) -> Result<(), OtherFile> {
        match self.expected(rank) {
            Some(expected) if expected != found => Err(OtherFile { found, expected }),
            _ => Ok(()),
        }
    }

    /// Keeps a shard, if it is the one of `rank`.
    ///
    /// # Errors
    /// Why it is not.
    pub fn offer(&self, rank: usize, bytes: Bytes) -> Result<(), Refused> {
        let shard = self.read(&bytes)?;
        match shard.identity().rank {
            found if found == rank => self.keep(&shard, bytes),
            found => Err(Refused::Rank { found }),
        }
    }

    /// Keeps a shard of whichever rank.
    ///
    /// # Errors
    /// Why it is none of this split's.
    pub fn take(&self, bytes: Bytes) -> Result<(), Refused> {
        let shard = self.read(&bytes)?;
        self.keep(&shard, bytes)
    }

    fn read(&self, bytes: &Bytes) -> Result<Shard, Refused> {
        let shard = Shard::from_bytes(bytes.clone())?;
        match shard.identity().split == self.split {
            true => Ok(shard),
            false => Err(Refused::Split),
        }
    }

    fn keep(&self, shard: &Shard, bytes: Bytes) -> Result<(), Refused> {
        let (rank, digest) = (shard.identity().rank, shard.digest());
        self.check(rank, digest)?;
        self.shards().entry(rank).or_insert((digest, bytes));
        Ok(())
    }

    /// The file of a rank's shard.
    pub fn get(&self, rank: usize) -> Option<Bytes> {
        self.held(rank).map(|(_, bytes)| bytes)
    }

    /// The file of a rank's shard, and its digest.
    pub fn held(&self, rank: usize) -> Option<(Digest, Bytes)> {
        self.shards().get(&rank).cloned()
    }

    /// Ranks whose shards are not here.
    pub fn missing(&self) -> Vec<usize> {
        let shards = self.shards();
        (0..self.nodes).filter(|rank| !shards.contains_key(rank)).collect()
    }
}

/// Why a shard is not kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// A file that is no shard.
    #[error(transparent)]
    NoShard(#[from] ShardError),
    /// A shard of another split.
    #[error("a shard of another split")]
    Split,
    /// A shard of another rank.
    #[error("a shard of rank {found}")]
    Rank {
        /// Its rank.
        found: usize,
    },
    /// Another file than the one that is known to be the rank's shard.
    #[error(transparent)]
    File(#[from] OtherFile),
}

#[cfg(test)]
mod tests {
    use snn_schemas::metadata::ShardInfo;
    use snn_schemas::onnx::{GraphProto, ModelProto, OperatorSetIdProto, encode};

    use super::*;

    /// A shard that does nothing, of a split and a rank; with another note it is another file.
    fn file(split: &str, rank: usize, note: &str) -> Bytes {
        let set = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
        let mut model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![set],
            graph: Some(GraphProto::default()),
            ..ModelProto::default()
        };
        let info = ShardInfo {
            rank,
            nodes: 3,
            entry: 0,
            groups: 3,
            split: split.repeat(32),
            source_sha256: "cd".repeat(32),
            policy_sha256: None,
            tool: note.to_owned(),
        };
        for (key, value) in info.entries() {
            model.set_metadata(&key, &value);
        }
        encode(&model).into()
    }

    fn shelf() -> Shelf {
        let own = file("ab", 0, "own");
        Shelf::new(&Shard::from_bytes(own.clone()).unwrap(), own)
    }

    #[track_caller]
    fn assert_refused(refused: Result<(), Refused>, expected: &str) {
        assert_eq!(refused.unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_shard_is_kept_under_its_own_rank_alone() {
        let (shelf, one) = (shelf(), file("ab", 1, ""));
        assert_refused(shelf.offer(2, one.clone()), "a shard of rank 1");
        assert_refused(shelf.offer(1, file("ba", 1, "")), "a shard of another split");
        assert!(matches!(shelf.offer(1, Bytes::from_static(b"garbage")), Err(Refused::NoShard(_))));
        assert_eq!(shelf.missing(), [1, 2]);
        shelf.offer(1, one.clone()).unwrap();
        // The first that is right stays.
        shelf.take(file("ab", 1, "later")).unwrap();
        assert_eq!(shelf.held(1), Some((Digest::of(&one), one)));
        assert_eq!(shelf.missing(), [2]);
    }

    #[test]
    fn where_the_file_is_known_no_other_is_kept() {
        let (right, wrong) = (file("ab", 1, "right"), file("ab", 1, "wrong"));
        let (found, expected) = (Digest::of(&wrong), Digest::of(&right));
        let mut shelf = shelf();
        shelf.expect(BTreeMap::from([(1, expected)])).unwrap();
        let sentence = format!("sha256 {}…, expected {}…", found.short(), expected.short());
        assert_refused(shelf.offer(1, wrong.clone()), &sentence);
        assert_refused(shelf.take(wrong), &sentence);
        shelf.take(right.clone()).unwrap();
        assert_eq!(shelf.get(1), Some(right));
        // Of a rank that nothing is known of any will do.
        shelf.offer(2, file("ab", 2, "any")).unwrap();
    }

    #[test]
    fn a_shard_that_is_here_must_be_the_one_expected() {
        let mut shelf = shelf();
        let found = Digest::of(&file("ab", 0, "own"));
        shelf.expect(BTreeMap::from([(0, found), (1, Digest::of(b"one"))])).unwrap();
        let expected = Digest::of(b"another");
        let refused = shelf.expect(BTreeMap::from([(0, expected)]));
        assert_eq!(refused, Err(OtherFile { found, expected }));
    }
}
