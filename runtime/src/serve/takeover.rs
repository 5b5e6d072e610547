//! Standing in for ranks whose own processes are gone, and giving them back.
//!
//! Takes what is announced of the cluster ([`Members`](crate::membership::Members)); computes the ranks that
//! [`hosts`] gives this process, from the shards on its shelf. Nobody is stood in for before the cluster has
//! been complete, as far as this process or any other knows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::Process;
use crate::membership::{Role, hosts};
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
            let complete = members.wait_for(|members| members.have_been_complete(nodes)).await;
            if complete.is_err() {
                return;
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
        loop {
            let view = members.borrow_and_update().homes.clone();
            self.reruns.note_change();
            let mine = hosts(nodes, &view).into_iter().filter(|(_, who)| who.contains(&own));
            let wanted: BTreeSet<usize> = mine.map(|(rank, _)| rank).collect();
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

    async fn take_over(&self, rank: usize) -> bool {
        let shard = self.shelf().get(rank).map(Shard::from_bytes);
        let Some(Ok(shard)) = shard else {
            tracing::warn!(rank, "cannot stand in: its shard is not here");
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
