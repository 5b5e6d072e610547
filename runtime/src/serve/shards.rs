//! How shards get around: every process asks its peers for those it lacks, hands out those it has, and keeps
//! on disk what it was given, where it has a folder for that.
//!
//! A shard travels in chunks, one a question; whoever answers first is taken at his word until the whole is
//! there, and the shelf keeps it only if it is what it should be.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use zenoh::query::{ConsolidationMode, QueryTarget};

use super::Process;
use crate::client::shard_key;
use crate::kept::{Kept, MAX_SHARD};
use crate::questions::{Questions, reply};
use crate::transport::zenoh::{into_bytes, one_line};

/// How long peers may take to hand over a shard.
const FETCH_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of a shard that travel at once. Everything between two nodes shares one connection: on a link
/// of 1 Mbit/s these take a tenth of the time after which silence counts as death.
const CHUNK: usize = 8 << 10;
/// Pause before missing shards are asked for again, where nobody has come or gone meanwhile.
const FETCH_AGAIN: Duration = Duration::from_millis(500);
/// Pause before what could not be written to disk is tried again: a full disk may be emptied.
const KEEP_AGAIN: Duration = Duration::from_secs(60);

impl Process {
    /// Fetches the shards of all ranks from whoever has them, as soon as he is there: should he be gone
    /// before, nobody could stand in for him.
    pub(super) async fn gather_shards(self: Arc<Self>) {
        let mut members = self.members.clone();
        loop {
            // What has come by now is looked for at once.
            members.mark_unchanged();
            let missing = self.shelf().missing();
            if missing.is_empty() {
                return;
            }
            for rank in missing {
                match self.fetch(rank).await {
                    Ok(true) => drop(self.sought().remove(&rank)),
                    Ok(false) => drop(self.sought().insert(rank)),
                    Err(error) => {
                        tracing::debug!(rank, reason = one_line(&error), "shard not fetched");
                    }
                }
            }
            let changed = tokio::time::timeout(FETCH_AGAIN, members.changed()).await;
            if let Ok(Err(_)) = changed {
                return;
            }
        }
    }

    /// Fetches one shard, a chunk after another, from whoever answers first; whether anybody has it.
    async fn fetch(&self, rank: usize) -> zenoh::Result<bool> {
        let mut file = Vec::new();
        while let Some((length, chunk)) = self.fetch_chunk(rank, file.len()).await? {
            file.extend_from_slice(&chunk);
            if file.len() >= length {
                let file = Bytes::from(file);
                match (self.shelf().offer(rank, file.clone()), self.knowledge.kept()) {
                    (true, Some(kept)) => kept.shard(rank, file),
                    (true, None) => {}
                    (false, _) => tracing::warn!(rank, "what peers gave is not the shard"),
                }
                return Ok(true);
            }
        }
        Ok(!file.is_empty())
    }

    /// Writes to disk what is to be kept, as long as the server lives.
    pub(super) async fn keep_on_disk(self: Arc<Self>) {
        let Some(kept) = self.knowledge.kept() else { return };
        let mut was_told = false;
        loop {
            let knowledge = Arc::clone(&self.knowledge);
            let write = move || knowledge.kept().map_or(Ok(()), Kept::write);
            // A panic has been reported by its hook.
            let written = tokio::task::spawn_blocking(write).await.unwrap_or(Ok(()));
            let failed = written.is_err();
            match written {
                Err(error) if !was_told => {
                    tracing::warn!(%error, "not kept: tried again every minute")
                }
                Err(error) => tracing::debug!(%error, "not kept"),
                Ok(()) => {}
            }
            was_told = failed;
            tokio::select! {
                () = kept.wait() => {}
                () = tokio::time::sleep(KEEP_AGAIN), if failed => {}
            }
        }
    }

    /// The length of a shard, and what stands in it from `from` on.
    async fn fetch_chunk(&self, rank: usize, from: usize) -> zenoh::Result<Option<(usize, Bytes)>> {
        let key = shard_key(&self.info.split, &rank.to_string());
        let answers = self
            .link
            .session()
            .get(key)
            .payload((from as u64).to_le_bytes().to_vec())
            .target(QueryTarget::All)
            .consolidation(ConsolidationMode::None)
            .timeout(FETCH_WITHIN)
            .await?;
        while let Ok(answer) = answers.recv_async().await {
            let bytes = answer.into_result().ok().and_then(|sample| into_bytes(sample.payload()));
            if let Some((length, chunk)) = bytes.as_ref().and_then(read_chunk)
                && (from as u64..=MAX_SHARD).contains(&(length as u64))
            {
                return Ok(Some((length, chunk)));
            }
        }
        Ok(None)
    }

    /// Gives shards to those who ask for them.
    pub(super) async fn hand_out_shards(self: Arc<Self>, questions: Questions) {
        while let Ok(query) = questions.recv_async().await {
            let asked =
                query.key_expr().as_str().rsplit('/').next().and_then(|rank| rank.parse().ok());
            if let Some(rank) = asked.filter(|&rank| rank < self.info.nodes)
                && let Some(bytes) = self.shelf().get(rank)
            {
                let chunk = chunk(&bytes, query.payload().and_then(into_bytes));
                reply(&query, shard_key(&self.info.split, &rank.to_string()), chunk).await;
            }
        }
    }
}

/// A chunk of a file as it travels: the file's length, and what stands from the asked place on.
fn chunk(file: &Bytes, question: Option<Bytes>) -> Bytes {
    let from = question.and_then(|bytes| bytes[..].try_into().ok()).map_or(0, u64::from_le_bytes);
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(file.len());
    let part = &file[from..file.len().min(from.saturating_add(CHUNK))];
    [&(file.len() as u64).to_le_bytes()[..], part].concat().into()
}

/// Reads a chunk; `None` for anything else, and for one that brings nothing.
fn read_chunk(bytes: &Bytes) -> Option<(usize, Bytes)> {
    let length = bytes.get(..8)?.try_into().ok().map(u64::from_le_bytes)?;
    let part = bytes.slice(8..);
    (!part.is_empty()).then_some((usize::try_from(length).ok()?, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_put_together_from_its_chunks() {
        let file = Bytes::from((0..3 * CHUNK + 5).map(|at| (at % 251) as u8).collect::<Vec<_>>());
        let mut whole = Vec::new();
        while whole.len() < file.len() {
            let question = Bytes::from((whole.len() as u64).to_le_bytes().to_vec());
            let (length, part) = read_chunk(&chunk(&file, Some(question))).unwrap();
            assert_eq!(length, file.len());
            assert!(part.len() <= CHUNK);
            whole.extend_from_slice(&part);
        }
        assert_eq!(whole, file);
        let beyond = Bytes::from(u64::MAX.to_le_bytes().to_vec());
        assert_eq!(read_chunk(&chunk(&file, Some(beyond))), None);
        assert_eq!(read_chunk(&Bytes::from_static(b"short")), None);
    }
}
