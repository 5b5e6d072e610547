//! How a shard is fetched: who has it, whom of them to ask, and whether what came is what was named.
//!
//! [`Fetcher::fetch`] takes a rank, and which file its shard is where that is known; it asks everybody who has
//! the shard which file that is, fetches it from one of them, and from the next where it comes too late, is
//! another, or is not accepted. Where nobody knows which file is right, the one that most holders name is asked
//! for first. Guarantees:
//!
//! - A file is made of the answers of one holder to one fetch, all of which name the same file, and has the
//!   digest that they name.
//! - Who gave something else is not asked for that rank again, as long as it is remembered.
//! - How much of a file is on its way at once follows how soon answers come: a slow link is left to others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;
use zenoh::Session;
use zenoh::query::{ConsolidationMode, QueryTarget};

use super::chunk::{self, CHUNK, Head, Piece};
use crate::client::{all_keys, own_key, shard_key};
use crate::digest::Digest;
use crate::shelf::Refused;
use crate::transport::zenoh::one_line;

/// How long holders may take to say what they have: a round trip on any link, and a peer that has died
/// meanwhile is noticed.
const SAY_WITHIN: Duration = Duration::from_secs(2);
/// How long a holder may take for a piece.
const FETCH_WITHIN: Duration = Duration::from_secs(10);
/// Chunks on their way at once at most: together 256 KiB, what a link of 1 Gbit/s carries in 2 ms.
const IN_FLIGHT: usize = 8;
/// Bytes on their way at first, and least. Everything between two nodes shares one connection: on a link
/// of 1 Mbit/s these take a tenth of the time after which silence counts as death.
const LEAST: usize = 8 << 10;
/// An answer that comes within this was hardly waited for, and more is asked for; else less. On a link of
/// 1 Mbit/s the least takes longer, so that more is never on its way there.
const BRISK: Duration = Duration::from_millis(50);
/// Holders heard of for a rank: as many as connections are accepted.
const MAX_HOLDERS: usize = 64;
/// Digits of a process's name at most: zenoh's are 16 bytes.
const MAX_NAME: usize = 32;
/// Holders remembered that gave something wrong; then the first is forgotten.
const MAX_REFUSED: usize = 256;

/// A process that says it has a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    process: String,
    head: Head,
}

/// What has become of a fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fetched {
    /// The file, which has been accepted.
    File(Bytes),
    /// Nobody has the shard.
    Nowhere,
    /// Somebody says to have it, and was silent.
    Later,
}

/// Why a holder gave no file.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Failure {
    /// It did not answer in time.
    Silent,
    /// It gave something else.
    Wrong(String),
}

/// Fetches shards, and remembers who gave something else.
#[derive(Debug)]
pub(super) struct Fetcher {
    session: Session,
    split: String,
    /// Holders of one file are asked from this one on, so that not all processes ask the same.
    first: usize,
    refused: VecDeque<(usize, String)>,
    /// Ranks of which was said that not all holders name the same file.
    told: BTreeSet<usize>,
}

impl Fetcher {
    /// Fetches shards of a split for the process of a rank.
    pub(super) fn new(session: Session, split: String, rank: usize) -> Fetcher {
        let (refused, told) = (VecDeque::new(), BTreeSet::new());
        Fetcher { session, split, first: rank, refused, told }
    }

    /// Fetches the shard of a rank, `expected` where it is known, from one of those who have it, until one
    /// is accepted.
    ///
    /// # Errors
    /// A session that has ended.
    pub(super) async fn fetch(
        &mut self,
        rank: usize,
        expected: Option<Digest>,
        accept: impl Fn(Bytes) -> Result<(), Refused>,
    ) -> zenoh::Result<Fetched> {
        let holders = self.holders(rank).await?;
        let holders = self.choose(rank, holders, expected);
        let mut fetched = Fetched::Nowhere;
        for holder in holders {
            let wrong = match self.fetch_from(rank, &holder).await {
                Ok(file) => match accept(file.clone()) {
                    Ok(()) => return Ok(Fetched::File(file)),
                    Err(refused) => refused.to_string(),
                },
                Err(Failure::Wrong(reason)) => reason,
                Err(Failure::Silent) => {
                    tracing::debug!(rank, process = holder.process, "a shard's holder is silent");
                    fetched = Fetched::Later;
                    continue;
                }
            };
            self.refuse(rank, holder.process, &wrong);
        }
        Ok(fetched)
    }

    /// Who has the shard of a rank, and says which file it is.
    async fn holders(&self, rank: usize) -> zenoh::Result<Vec<Holder>> {
        let answers = self
            .session
            .get(all_keys(&shard_key(&self.split, &rank.to_string())))
            .payload(Piece::NOTHING.question())
            .target(QueryTarget::All)
            .consolidation(ConsolidationMode::None)
            .timeout(SAY_WITHIN)
            .await?;
        let mut holders = BTreeMap::new();
        while let Ok(answer) = answers.recv_async().await {
            // An error reply is zenoh's own, at the end of the time given: it is no answer.
            let Ok(sample) = answer.into_result() else { continue };
            let process =
                sample.key_expr().as_str().rsplit('/').next().filter(|name| is_name(name));
            if let Some(process) = process
                && let Some((head, _)) = chunk::read(sample.payload())
                && holders.len() < MAX_HOLDERS
            {
                holders.entry(process.to_owned()).or_insert(head);
            }
        }
        Ok(holders.into_iter().map(|(process, head)| Holder { process, head }).collect())
    }

    /// Whom to ask, in this order; says once a rank that not all name the same file, or the expected one.
    fn choose(
        &mut self,
        rank: usize,
        mut holders: Vec<Holder>,
        expected: Option<Digest>,
    ) -> Vec<Holder> {
        holders.retain(|holder| !self.has_refused(rank, &holder.process));
        let files = by_file(holders);
        let differ = match expected {
            Some(expected) => files.iter().any(|(head, _)| head.digest != expected),
            None => files.len() > 1,
        };
        if differ && self.told.insert(rank) {
            let expected = expected.map(Digest::short);
            tracing::warn!(rank, expected, named = in_words(&files), "peers name other shards");
        }
        let wanted = |head: &Head| expected.is_none_or(|expected| head.digest == expected);
        let files = files.into_iter().filter(|(head, _)| wanted(head));
        let holders = files.flat_map(|(head, mut processes)| {
            let first = self.first % processes.len();
            processes.rotate_left(first);
            processes.into_iter().map(move |process| Holder { process, head })
        });
        holders.collect()
    }

    fn has_refused(&self, rank: usize, process: &str) -> bool {
        self.refused.iter().any(|(of, who)| *of == rank && who == process)
    }

    /// Asks a holder for a rank's shard no more.
    fn refuse(&mut self, rank: usize, process: String, reason: &str) {
        tracing::warn!(rank, process, reason, "what a peer gave is not the shard");
        if self.refused.len() == MAX_REFUSED {
            self.refused.pop_front();
        }
        self.refused.push_back((rank, process));
    }

    /// Fetches a file from one holder, several pieces at once.
    async fn fetch_from(&self, rank: usize, holder: &Holder) -> Result<Bytes, Failure> {
        let key = own_key(&shard_key(&self.split, &rank.to_string()), &holder.process);
        let head = holder.head;
        let (mut pace, mut parts, mut asked) = (Pace::default(), Parts::default(), 0);
        // Dropped with the fetch, and what is still asked with it.
        let mut asking = JoinSet::new();
        loop {
            while asked < head.length && asking.len() < pace.in_flight() {
                let piece = Piece { from: asked, length: pace.chunk().min(head.length - asked) };
                asked += piece.length;
                asking.spawn(ask(self.session.clone(), key.clone(), head, piece));
            }
            // A panic has been reported by its hook.
            let Some(answered) = asking.join_next().await else { break };
            let (piece, part, took) = answered.map_err(|_| Failure::Silent)??;
            pace.learn(piece.length, took);
            parts.put(piece.from, part);
        }
        parts.finish(head.digest)
    }
}

/// Asks for a piece of a file; gives it, and how long that took.
async fn ask(
    session: Session,
    key: String,
    head: Head,
    piece: Piece,
) -> Result<(Piece, Bytes, Duration), Failure> {
    let wrong = |reason: &str| Failure::Wrong(reason.to_owned());
    let start = Instant::now();
    let answers = session
        .get(key)
        .payload(piece.question())
        .target(QueryTarget::All)
        .consolidation(ConsolidationMode::None)
        .timeout(FETCH_WITHIN)
        .await
        .map_err(|error| {
            tracing::debug!(reason = one_line(&error), "shard not asked for");
            Failure::Silent
        })?;
    while let Ok(answer) = answers.recv_async().await {
        // An error reply is zenoh's own, at the end of the time given: it is no answer.
        let Ok(sample) = answer.into_result() else { continue };
        let (found, part) =
            chunk::read(sample.payload()).ok_or_else(|| wrong("no piece of a file"))?;
        if found != head {
            return Err(wrong("a piece of another file"));
        }
        if part.len() != piece.length {
            return Err(wrong("not as much as was asked for"));
        }
        return Ok((piece, part, start.elapsed()));
    }
    Err(Failure::Silent)
}

/// Whether a process may be called so: anything else in a key would ask others.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// The files that are named, with those who name them in the order of their names: first what most name, of
/// as many the one that the lowest names.
fn by_file(holders: Vec<Holder>) -> Vec<(Head, Vec<String>)> {
    let mut files: BTreeMap<Head, Vec<String>> = BTreeMap::new();
    for Holder { process, head } in holders {
        files.entry(head).or_default().push(process);
    }
    files.values_mut().for_each(|processes| processes.sort());
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_by_key(|(_, processes)| (Reverse(processes.len()), processes.first().cloned()));
    files
}

/// `0123456789ab by a, b; ba9876543210 by c`.
fn in_words(files: &[(Head, Vec<String>)]) -> String {
    let file = |(head, processes): &(Head, Vec<String>)| {
        format!("{} by {}", head.digest.short(), processes.join(", "))
    };
    files.iter().map(file).collect::<Vec<_>>().join("; ")
}

/// How much of a file is on its way at once: more while answers come briskly, half as much when one does not.
#[derive(Debug)]
struct Pace {
    bytes: usize,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { bytes: LEAST }
    }
}

impl Pace {
    /// Bytes to ask for in one question.
    fn chunk(&self) -> usize {
        self.bytes.min(CHUNK)
    }

    /// Questions to ask at once.
    fn in_flight(&self) -> usize {
        (self.bytes / CHUNK).max(1)
    }

    fn learn(&mut self, bytes: usize, took: Duration) {
        self.bytes = match took < BRISK {
            true => (self.bytes + bytes).min(IN_FLIGHT * CHUNK),
            false => (self.bytes / 2).max(LEAST),
        };
    }
}

/// A file as it comes, in any order.
#[derive(Debug, Default)]
struct Parts {
    file: Vec<u8>,
    /// What has come of later places.
    early: BTreeMap<usize, Bytes>,
    hash: Sha256,
}

impl Parts {
    fn put(&mut self, from: usize, part: Bytes) {
        self.early.insert(from, part);
        while let Some(part) = self.early.remove(&self.file.len()) {
            self.hash.update(&part);
            self.file.extend_from_slice(&part);
        }
    }

    /// The file, if it is the one that was named.
    fn finish(self, expected: Digest) -> Result<Bytes, Failure> {
        let found = Digest::finish(self.hash);
        match found == expected {
            true => Ok(self.file.into()),
            false => Err(Failure::Wrong(format!("sha256 {}…", found.short()))),
        }
    }
}

#[cfg(test)]
mod tests;
