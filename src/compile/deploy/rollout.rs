//! From what runs to what shall run, or back: the steps of a deployment.
//!
//! Takes a bundle, a plan and the trials. In order: the shards are sent; the nodes start beside those
//! that run; when all are ready each is asked the trials; the agents switch; requests that the old
//! version still answers are waited for; the old version is stopped, and kept on disk, older ones are
//! removed. When anything fails before the end of the switch every agent goes back to what it served
//! before, and the new version is removed.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use snn_runtime::Answer;
use snn_runtime::agent::wire::{File, Request};
use snn_runtime::agent::{NodeState, Remote, Version};
use snn_runtime::client::Client;
use snn_runtime::key::ClusterKey;

use super::all;
use super::bundle::Bundle;
use super::plan::Plan;
use super::trial::{TOLERANCE, Trial};

/// How long an agent may be out of reach: a device that restarts, or a cable that is moved.
const ORDER_WITHIN: Duration = Duration::from_secs(60);
/// How long one question to a new cluster may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// How often a question is asked again whose answer was degraded.
const WHOLE_ATTEMPTS: usize = 50;
/// Pause between looks at whether something is done.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long requests of the old version may still take: the longest a client may ask for, and a
/// takeover.
const DRAIN_WITHIN: Duration = Duration::from_secs(70);

/// How a deployment ended.
pub(super) enum Outcome {
    /// The new version answers, rightly.
    Serves {
        /// Bytes that were sent.
        sent: u64,
        /// Bytes that the agents had already.
        kept: u64,
        /// Largest difference to the right answers.
        difference: f32,
        /// Where clients ask, by rank.
        addresses: Vec<String>,
    },
    /// It answered wrongly; what ran before runs again.
    Wrong {
        /// In one sentence.
        reason: String,
    },
}

/// A deployment.
pub(super) struct Rollout<'a> {
    pub(super) bundle: &'a Bundle,
    pub(super) plan: &'a Plan,
    pub(super) key: Option<&'a ClusterKey>,
    /// How long the nodes may take to start.
    pub(super) within: Duration,
}

type Tell<'a> = &'a (dyn Fn(&str) + Sync);

impl Rollout<'_> {
    /// Goes through all steps. Tells what is done.
    pub(super) async fn run(&self, trials: &[Trial], tell: Tell<'_>) -> Result<Outcome> {
        let (sent, kept) = self.send().await?;
        tell(&format!(
            "sent {sent} B{}",
            match kept {
                0 => String::new(),
                kept => format!(", {kept} B were there"),
            }
        ));
        let tried = self.try_out(trials, tell).await;
        match tried {
            Ok(Tried { difference, wrong: None }) => {
                self.retire(tell).await?;
                Ok(Outcome::Serves { sent, kept, difference, addresses: self.fronts() })
            }
            Ok(Tried { wrong: Some(reason), .. }) => {
                self.roll_back().await.with_context(|| format!("{reason}, then"))?;
                Ok(Outcome::Wrong { reason })
            }
            Err(error) => match self.roll_back().await {
                Ok(()) => Err(error.context("rolled back")),
                Err(other) => Err(other.context(crate::terminal::one_line(&error))),
            },
        }
    }

    fn version(&self) -> &Version {
        &self.bundle.version
    }

    fn remotes(&self) -> impl Iterator<Item = Arc<Remote>> {
        self.plan.places.iter().map(|place| Arc::clone(&place.remote))
    }

    /// Sends every agent what it has not got; gives bytes sent and bytes that were there.
    async fn send(&self) -> Result<(u64, u64)> {
        let tasks: Vec<_> = self
            .remotes()
            .zip(&self.bundle.shards)
            .enumerate()
            .map(|(rank, (remote, shard))| {
                let (path, length) = (shard.path.clone(), shard.bytes);
                let manifest = self.bundle.manifest_bytes.clone();
                let version = self.version().clone();
                async move {
                    let all = manifest.len() as u64;
                    let what = (&version, File::Manifest);
                    remote.send(what, Cursor::new(manifest), all, ORDER_WITHIN).await?;
                    let file = std::fs::File::open(&path)
                        .with_context(|| format!("{}: read", path.display()))?;
                    let what = (&version, File::Shard(rank));
                    let sent = remote.send(what, file, length, ORDER_WITHIN).await;
                    sent.with_context(|| path.display().to_string())
                }
            })
            .collect();
        let mut total = (0, 0);
        for sent in all(tasks).await? {
            let sent = sent?;
            total = (total.0 + sent.sent, total.1 + sent.kept);
        }
        Ok(total)
    }

    /// Starts, waits, asks, and switches if the answers are right.
    async fn try_out(&self, trials: &[Trial], tell: Tell<'_>) -> Result<Tried> {
        let addresses = self.start().await?;
        self.wait_ready().await?;
        tell("started beside what runs");
        let tried = self.ask(&addresses, trials).await?;
        if tried.wrong.is_none() {
            tell(&format!("answers as it should (largest difference {:.1e})", tried.difference));
            let version = self.version().clone();
            self.order_all(|_| Request::Activate { version: version.clone() }).await?;
            tell("switched");
        }
        Ok(tried)
    }

    /// Starts the nodes; gives their addresses.
    async fn start(&self) -> Result<Vec<String>> {
        let mut addresses = Vec::new();
        for (rank, place) in self.plan.places.iter().enumerate() {
            let port = match place.port(self.version(), rank) {
                Some(port) => port,
                None => place.remote.reserve(ORDER_WITHIN).await?,
            };
            addresses.push((port, format!("{}:{port}", place.remote.host())));
        }
        let version = self.version().clone();
        self.order_all(|rank| {
            let others = addresses.iter().enumerate().filter(|(other, _)| *other != rank);
            Request::Start {
                version: version.clone(),
                rank,
                port: addresses[rank].0,
                peers: others.map(|(_, (_, address))| address.clone()).collect(),
                settings: self.plan.settings,
            }
        })
        .await?;
        Ok(addresses.into_iter().map(|(_, address)| address).collect())
    }

    /// Gives every agent of the plan an order, all at the same time.
    async fn order_all(&self, request: impl Fn(usize) -> Request) -> Result<()> {
        let tasks = self.remotes().enumerate().map(|(rank, remote)| {
            let request = request(rank);
            async move { remote.order(&request, ORDER_WITHIN).await }
        });
        for done in all(tasks.collect::<Vec<_>>()).await? {
            done?;
        }
        Ok(())
    }

    async fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + self.within;
        loop {
            let mut waiting = Vec::new();
            for (rank, place) in self.plan.places.iter().enumerate() {
                let agent = place.remote.describe(ORDER_WITHIN).await?;
                let mut states = agent.versions.into_iter();
                let state = states.find(|state| state.version == *self.version());
                match state.map(|state| state.state) {
                    Some(NodeState::Ready) => {}
                    Some(NodeState::Failed { reason }) => bail!("{}: {reason}", agent.name),
                    Some(NodeState::Starting) => waiting.push(format!("rank {rank}")),
                    Some(NodeState::Stopped) | None => {
                        bail!("{}: rank {rank} is not running", agent.name)
                    }
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let within = self.within.as_secs();
                bail!("{} not ready within {within} s", waiting.join(", "));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Asks every node every trial.
    async fn ask(&self, addresses: &[String], trials: &[Trial]) -> Result<Tried> {
        let mut difference: f32 = 0.0;
        for (rank, address) in addresses.iter().enumerate() {
            let at = || format!("rank {rank} at {address}");
            let address = std::slice::from_ref(address);
            let client = Client::connect(address, self.key, self.within).await.with_context(at)?;
            for trial in trials {
                let answer = self.whole_answer(&client, trial).await.with_context(at)?;
                let off = trial.difference(&answer.outputs);
                difference = difference.max(off);
                if off > TOLERANCE {
                    let reason = format!(
                        "the cluster answers wrongly: off by {off:.1e} of the largest number, asked at {} \
                         (tolerance {TOLERANCE:.0e})",
                        at()
                    );
                    return Ok(Tried { difference, wrong: Some(reason) });
                }
            }
            client.close().await;
        }
        Ok(Tried { difference, wrong: None })
    }

    /// An answer for which every tensor was there in time: a degraded one tells nothing.
    async fn whole_answer(&self, client: &Client, trial: &Trial) -> Result<Answer> {
        for _ in 0..WHOLE_ATTEMPTS {
            let answer = client.infer(trial.inputs.clone(), ANSWER_WITHIN).await?;
            if !answer.degraded {
                return Ok(answer);
            }
        }
        let wait = self.plan.settings.degrade_ms.unwrap_or_default();
        bail!("{WHOLE_ATTEMPTS} answers were degraded: tensors take longer than {wait} ms")
    }

    /// Drains and stops every other version, everywhere.
    async fn retire(&self, tell: Tell<'_>) -> Result<()> {
        let version = self.version();
        let mut others = BTreeSet::new();
        for place in self.plan.everybody() {
            let running = place.before.versions.iter();
            let running = running.filter(|state| state.state != NodeState::Stopped);
            others.extend(running.map(|state| state.version.clone()));
        }
        others.remove(version);
        for place in &self.plan.spare {
            // It has no part in the new version: it stops answering.
            for old in &others {
                let request = Request::Stop { version: old.clone() };
                place.remote.order(&request, ORDER_WITHIN).await?;
            }
        }
        for old in &others {
            self.drain(old, DRAIN_WITHIN).await?;
            self.order_all(|_| Request::Stop { version: old.clone() }).await?;
            tell(&format!("version {old} has answered its last request and is stopped"));
        }
        self.tidy().await;
        Ok(())
    }

    /// Waits until nobody waits for an answer of `version` any more.
    async fn drain(&self, version: &Version, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        for remote in self.remotes() {
            while remote.draining(version, ORDER_WITHIN).await? > 0 && Instant::now() < deadline {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(())
    }

    /// Removes versions that are neither the new one nor the one before.
    async fn tidy(&self) {
        for place in &self.plan.places {
            let known = place.before.versions.iter().map(|state| &state.version);
            let old = known.filter(|version| {
                *version != self.version() && Some(*version) != place.before.current.as_ref()
            });
            for version in old {
                let forget = Request::Forget { version: version.clone() };
                if let Err(error) = place.remote.order(&forget, ORDER_WITHIN).await {
                    tracing::debug!(%error, "an old version stays on disk");
                }
            }
        }
    }

    /// Back to what every agent served before.
    async fn roll_back(&self) -> Result<()> {
        let version = self.version();
        let mut failed = None;
        for place in &self.plan.places {
            let before = place.before.current.as_ref().filter(|before| *before != version);
            if let Some(before) = before {
                let back = Request::Activate { version: before.clone() };
                if let Err(error) = place.remote.order(&back, ORDER_WITHIN).await {
                    failed.get_or_insert(anyhow!(error));
                }
            }
        }
        let served_before =
            self.plan.everybody().any(|place| place.before.current.as_ref() == Some(version));
        if !served_before {
            // Whoever was answered by it meanwhile gets the answer.
            self.drain(version, Duration::from_secs(5)).await?;
            for remote in self.remotes() {
                for request in [
                    Request::Stop { version: version.clone() },
                    Request::Forget { version: version.clone() },
                ] {
                    if let Err(error) = remote.order(&request, ORDER_WITHIN).await {
                        failed.get_or_insert(anyhow!(error));
                    }
                }
            }
        }
        match failed {
            Some(error) => Err(error.context("roll back")),
            None => Ok(()),
        }
    }

    /// Where clients ask, by rank.
    fn fronts(&self) -> Vec<String> {
        let front = |place: &super::plan::Place| {
            let port = place.before.front.as_deref()?.rsplit_once(':')?.1;
            Some(format!("{}:{port}", place.remote.host()))
        };
        self.plan.places.iter().filter_map(front).collect()
    }
}

/// What asking the new cluster gave.
struct Tried {
    difference: f32,
    wrong: Option<String>,
}
