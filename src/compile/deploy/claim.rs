//! One who deploys at a time: every agent is claimed before anything is changed, and released after.
//!
//! Takes the agents; gives a [`Claim`] that says something to each of them every few seconds, so that
//! they know their deployer is alive. Agents are claimed one after another, in the order of their names,
//! so that of two who begin at once one gets all of those they share. A claim that is dropped, or whose
//! process dies, ends by itself ([`CLAIM_WITHIN`](snn_runtime::agent::CLAIM_WITHIN)).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use snn_runtime::agent::wire::Request;
use snn_runtime::agent::{CLAIM_WITHIN, Remote};
use tokio::task::JoinSet;

use super::plan::{Place, describe};

/// How often each agent hears that whoever claimed it is alive: several times before it stops believing.
const SPEAK_EVERY: Duration = Duration::from_secs(4);
/// How long an agent may take to be claimed: it answers one request after another.
const CLAIM_ANSWER: Duration = Duration::from_secs(30);
/// How long a release may take; a claim that is not released ends by itself.
const RELEASE_WITHIN: Duration = Duration::from_secs(2);

/// Agents that nobody else changes.
pub(super) struct Claim {
    agents: Vec<Arc<Remote>>,
    speaking: JoinSet<()>,
}

impl Claim {
    /// Claims all of them, or none.
    pub(super) async fn take(agents: &[Arc<Remote>]) -> Result<Claim> {
        let mut places = describe(agents).await?;
        let order = |place: &Place| (place.before.name.clone(), place.remote.address().to_owned());
        places.sort_by_key(order);
        let mut claim = Claim { agents: Vec::new(), speaking: JoinSet::new() };
        for Place { remote, before } in places {
            let request = Request::Claim { by: name() };
            if let Err(error) = remote.order(&request, CLAIM_ANSWER).await {
                claim.release().await;
                return Err(error).context(before.name);
            }
            claim.speaking.spawn(speak(Arc::clone(&remote), request));
            claim.agents.push(remote);
        }
        Ok(claim)
    }

    /// Lets others change the agents.
    pub(super) async fn release(mut self) {
        self.speaking.shutdown().await;
        let releasing = self.agents.into_iter().map(|remote| async move {
            if let Err(error) = remote.order(&Request::Release {}, RELEASE_WITHIN).await {
                tracing::debug!(%error, "a claim is left to end by itself");
            }
        });
        releasing.collect::<JoinSet<()>>().join_all().await;
    }
}

async fn speak(remote: Arc<Remote>, request: Request) {
    loop {
        tokio::time::sleep(SPEAK_EVERY).await;
        if let Err(error) = remote.order(&request, CLAIM_WITHIN).await {
            // If another has claimed it, the next change is refused with his name.
            tracing::debug!(%error, "an agent does not hear");
        }
    }
}

/// Who deploys, as others are told: user, machine and process.
fn name() -> String {
    let user = std::env::var("USER").ok().filter(|user| !user.is_empty());
    let user = user.unwrap_or_else(|| "somebody".to_owned());
    let at_host = crate::run::host_name().map(|host| format!("@{host}")).unwrap_or_default();
    format!("{user}{at_host} (process {})", std::process::id())
}
