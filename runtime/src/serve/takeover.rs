//! Standing in for ranks whose own processes are gone, and giving them back.
//!
//! Takes what is announced of the cluster ([`Members`](crate::membership::Members)); computes the ranks that
//! [`hosts`] gives this process, from the shards on its shelf. Nobody is stood in for before the cluster has
//! been complete, as far as this process or any other knows. One that knows it from a note on disk alone
//! first waits for those who are absent: they may only start more slowly.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Process;
use crate::membership::{Homes, Role, hosts};
use crate::node::in_words;
use crate::shard::Shard;

/// Pause before a rank that could not be taken over is tried again.
const TAKE_AGAIN: Duration = Duration::from_secs(1);
/// How long a process that joins a cluster which has been complete looks for its peers before it stands
/// in for those of whom it hears nothing: they may be joining too, and take a moment to connect.
const GATHER: Duration = Duration::from_millis(1_500);

impl Process {
    /// Stands in for whoever is gone, as long as the server lives.
    pub(super) async fn stand_in(self: Arc<Self>) {
        let mut members = self.members.clone();
        let nodes = self.info.nodes;
        // A cluster that is still gathering misses nobody yet.
        if !self.knowledge.has_been_complete() {
            tokio::select! {
                complete = members.wait_for(|members| members.have_been_complete(nodes)) => {
                    if complete.is_err() {
                        return;
                    }
                }
                () = self.remember() => {
                    tracing::info!("the cluster was complete before this start");
                    self.note("the others have been waited for since the start".to_owned());
                }
            }
            self.knowledge.note_complete();
        }
        let _told = match self.link.announce_complete(&self.info.split).await {
            Ok(told) => told,
            // The session has ended, and this process with it.
            Err(error) => return tracing::debug!(%error, "nobody is stood in for"),
        };
        let known = members.wait_for(|members| members.are_known(nodes));
        if let Ok(Err(_)) = tokio::time::timeout(GATHER, known).await {
            return;
        }
        let own = self.link.id();
        let mut computed = hosts(nodes, &members.borrow().homes);
        loop {
            let view = members.borrow_and_update().homes.clone();
            self.reruns.note_change();
            let now = hosts(nodes, &view);
            for event in news(&computed, &now, &view) {
                self.note(event);
            }
            computed = now;
            let mine = computed.iter().filter(|(_, who)| who.contains(&own));
            let wanted: BTreeSet<usize> = mine.map(|(&rank, _)| rank).collect();
            let held: BTreeSet<usize> = self.ranks().keys().copied().collect();
            for &rank in held.difference(&wanted).filter(|&&rank| rank != self.info.rank) {
                tracing::info!(rank, "given back");
                self.note(format!("rank {rank} is given back"));
                self.leave(rank).await;
            }
            let mut failed = false;
            for &rank in wanted.difference(&held) {
                failed |= !self.take_over(rank).await;
            }
            let again = tokio::time::sleep(TAKE_AGAIN);
            tokio::select! {
                changed = members.changed() => if changed.is_err() { return },
                () = again, if failed => {}
            }
        }
    }

    /// Waits for those who are absent after a start, and returns where a note says that the cluster has been
    /// complete before.
    async fn remember(&self) {
        match self.knowledge.waits_until() {
            Some(until) if self.knowledge.was_complete() => {
                tokio::time::sleep_until(until.into()).await;
            }
            _ => std::future::pending().await,
        }
    }

    /// Why nobody stands in for those who are `missing`.
    pub(super) fn obstacle(&self, missing: &[usize]) -> Option<Obstacle> {
        let until = self.knowledge.waits_until().filter(|_| self.options.takeover)?;
        if Instant::now() < until || missing.is_empty() {
            return None;
        }
        if !self.knowledge.has_been_complete() {
            let noted = self.knowledge.was_complete();
            return (!noted).then(|| Obstacle::NeverComplete { ranks: missing.to_vec() });
        }
        let sought = self.sought();
        let ranks: Vec<usize> = missing.iter().copied().filter(|r| sought.contains(r)).collect();
        (!ranks.is_empty()).then_some(Obstacle::NoShard { ranks })
    }

    /// Begins to compute a rank whose own process is gone; whether that could be done.
    async fn take_over(&self, rank: usize) -> bool {
        let shard = self.shelf().get(rank).map(Shard::from_bytes);
        let Some(Ok(shard)) = shard else {
            tracing::debug!(rank, "cannot stand in: its shard is not here");
            return false;
        };
        tracing::info!(rank, "standing in");
        match self.compute(&shard, Role::Guest).await {
            Ok(()) => {
                if let Some(home) = self.ranks().get(&self.info.rank) {
                    home.node.note_takeover();
                    home.node.log().note(format!("standing in for rank {rank}"));
                }
                true
            }
            Err(error) => {
                tracing::warn!(rank, %error, "cannot stand in");
                false
            }
        }
    }
}

/// Why nobody stands in for ranks that are absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// As far as anybody knows the cluster has never been complete: it may still be gathering.
    NeverComplete {
        /// The ranks.
        ranks: Vec<usize>,
    },
    /// Nobody who is there has their shards.
    NoShard {
        /// The ranks.
        ranks: Vec<usize>,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NeverComplete { ranks } => {
                write!(
                    f,
                    "nobody stands in for {}: this cluster has not been complete before",
                    in_words(ranks)
                )
            }
            Obstacle::NoShard { ranks } => {
                write!(f, "nobody stands in for {}: no node has the shard", in_words(ranks))
            }
        }
    }
}

/// What has changed in who computes which rank, in one sentence a rank.
fn news(before: &Hosts, now: &Hosts, homes: &Homes) -> Vec<String> {
    let changed = now.iter().filter(|(rank, who)| before.get(rank) != Some(*who));
    let event = |(rank, who): (&usize, &BTreeSet<String>)| {
        let host = homes.iter().find(|(_, sessions)| !sessions.is_disjoint(who));
        host.map(|(host, _)| match host == rank {
            true => format!("rank {rank} is computed by its own node"),
            false => format!("the node of rank {host} stands in for rank {rank}"),
        })
    };
    changed.filter_map(event).collect()
}

/// The sessions that compute each rank.
type Hosts = BTreeMap<usize, BTreeSet<String>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_watch_are_told_who_computes_a_rank_now() {
        let homes = |present: &[(usize, &str)]| -> Homes {
            present.iter().map(|&(rank, session)| (rank, [session.to_owned()].into())).collect()
        };
        let (all, two) = (homes(&[(0, "a"), (1, "b"), (2, "c")]), homes(&[(0, "a"), (2, "c")]));
        let of = |homes: &Homes| hosts(3, homes);
        let died = news(&of(&all), &of(&two), &two);
        assert_eq!(died, ["the node of rank 0 stands in for rank 1"]);
        assert_eq!(news(&of(&two), &of(&all), &all), ["rank 1 is computed by its own node"]);
        assert!(news(&of(&all), &of(&all), &all).is_empty());
        let one = homes(&[(2, "c")]);
        let both =
            ["the node of rank 2 stands in for rank 0", "the node of rank 2 stands in for rank 1"];
        assert_eq!(news(&of(&two), &of(&one), &one), both);
    }
}
