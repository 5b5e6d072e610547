//! A process on the network: the ranks it computes on one side, those who ask on the other.
//!
//! [`Server::start`] takes an open [`Link`], what the process knows ([`Knowledge`]: its shard, to begin
//! with) and engines for it, and joins the cluster. The process that computes the entry rank answers
//! inference requests ([`questions`](crate::questions)) and says what the model takes and gives; every
//! rank reports what it has counted.
//!
//! With [`ServerOptions::takeover`] a process stands in for ranks whose own processes are gone, as
//! [`membership`](crate::membership) tells, once the cluster has been complete; requests that a loss
//! interrupts are run again from their inputs. It gives a rank back when its own process returns. For
//! this every process keeps the shards of all ranks, fetched from peers where it must be.
//!
//! Shutting down, or dropping the server, ends every task it started.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::cost;
use snn_schemas::metadata::ShardInfo;
use snn_schemas::wire;
use tokio::sync::watch;
use tokio::task::JoinSet;
use zenoh::query::{ConsolidationMode, QueryTarget};

use crate::client::{ClusterInfo, infer_key, info_key, report_key, shard_key};
use crate::engine::Engine;
use crate::http::{Asker, ClusterAsker, Own};
use crate::knowledge::Knowledge;
use crate::membership::{Members, Role, hosts};
use crate::node::{InferError, Node, NodeReport, StartError};
use crate::questions::{Questions, answer_questions, queryable, reply};
use crate::shard::Shard;
use crate::shelf::Shelf;
use crate::transport::Transport;
use crate::transport::shaped::Port;
use crate::transport::zenoh::{
    Identity, Link, LinkError, Watch, ZenohTransport, into_bytes, one_line,
};
use crate::watch::{Lane, clock};

/// How often a request is begun again after a node was lost: each time another must have died.
const MAX_ATTEMPTS: usize = 8;
/// How long peers may take to hand over a shard.
const FETCH_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of a shard that travel at once. Everything between two nodes shares one connection: on a link
/// of 1 Mbit/s these take a tenth of the time after which silence counts as death.
const CHUNK: usize = 8 << 10;
/// Largest shard fetched from peers, in bytes.
const MAX_SHARD: usize = 1 << 30;
/// Pause before missing shards are asked for: they may be beside the own one, or their owners still
/// be starting.
const FETCH_AGAIN: Duration = Duration::from_millis(500);
/// Pause before a rank that could not be taken over is tried again.
const TAKE_AGAIN: Duration = Duration::from_secs(1);
/// How long a process that joins a cluster which has been complete looks for its peers before it stands
/// in for those of whom it hears nothing: they may be joining too, and take a moment to connect.
const GATHER: Duration = Duration::from_millis(1_500);
/// How long after a node came or went its peers may still disagree about their links, and lose frames
/// by it: a handshake's time, twice.
const SETTLE: Duration = Duration::from_secs(3);

/// Makes an engine for a rank, on the thread that computes.
pub type EngineMaker = Arc<dyn Fn() -> Box<dyn Engine> + Send + Sync>;

/// How a process serves.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServerOptions {
    /// Whether it stands in for ranks whose own processes are gone.
    pub takeover: bool,
    /// Whether it records when it computed, sent and waited.
    pub trace: bool,
    /// How long it waits for a tensor before it goes on without it; until the request's end where
    /// there is no such time.
    pub degrade: Option<Duration>,
    /// The link that its frames are slowed down to, for trying out a network that is not there.
    pub link: Option<cost::Link>,
}

/// A process on the network.
pub struct Server {
    process: Arc<Process>,
    tasks: JoinSet<()>,
    _watch: Watch,
}

/// What the tasks of a server share.
struct Process {
    link: Link,
    engines: EngineMaker,
    options: ServerOptions,
    info: ShardInfo,
    knowledge: Arc<Knowledge>,
    members: watch::Receiver<Members>,
    reruns: Reruns,
    ranks: Mutex<BTreeMap<usize, Computed>>,
}

/// When a request that failed is run again from its inputs.
#[derive(Clone, Default)]
struct Reruns {
    /// Whether anything can have changed for the better once a node is lost.
    can_go_on: bool,
    /// When a node came or went, if one ever did.
    changed: Arc<Mutex<Option<Instant>>>,
}

impl Reruns {
    fn note_change(&self) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a node has come or gone since shortly before `start`.
    fn unsettled_since(&self, start: Instant) -> bool {
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        changed.is_some_and(|changed| changed + SETTLE > start)
    }
}

/// A rank that this process computes.
struct Computed {
    node: Arc<Node>,
    // Dropped before the transport: nobody is answered once the rank is left.
    answering: JoinSet<()>,
    transport: Arc<ZenohTransport>,
}

impl Server {
    /// Loads the shard, joins its cluster and answers from then on. A process that joins again brings
    /// what it knew.
    ///
    /// # Errors
    /// What the engine cannot load, or why the link cannot be used.
    pub async fn start(
        link: Link,
        knowledge: Arc<Knowledge>,
        engines: EngineMaker,
        options: ServerOptions,
    ) -> Result<Server, ServeError> {
        let info = knowledge.shard().identity().clone();
        let (members, watch) = link.members(&info.split).await?;
        let ranks = Mutex::default();
        let can_go_on = options.takeover || options.degrade.is_some();
        let reruns = Reruns { can_go_on, ..Reruns::default() };
        let process = Process { link, engines, options, info, knowledge, members, reruns, ranks };
        let process = Arc::new(process);
        process.compute(process.knowledge.shard(), Role::Home).await?;
        let mut tasks = JoinSet::new();
        let questions = queryable(&process.link, &shard_key(&process.info.split, "*")).await?;
        tasks.spawn(Arc::clone(&process).hand_out_shards(questions));
        if options.takeover {
            tasks.spawn(Arc::clone(&process).gather_shards());
            tasks.spawn(Arc::clone(&process).stand_in());
        }
        Ok(Server { process, tasks, _watch: watch })
    }

    /// The address that other nodes can connect to, with its real port; the router's where the cluster
    /// is reached through one.
    pub fn address(&self) -> &str {
        self.process.link.address()
    }

    /// Whether one of those connected is a router.
    pub async fn meets_router(&self) -> bool {
        self.process.link.meets_router().await
    }

    /// Ranks that nobody computes.
    pub fn missing(&self) -> Vec<usize> {
        let ranks = self.process.ranks();
        let home = ranks.get(&self.process.info.rank);
        home.map(|home| home.node.missing().into_iter().collect()).unwrap_or_default()
    }

    /// Ranks that this process stands in for.
    pub fn stands_in_for(&self) -> BTreeSet<usize> {
        let own = self.process.info.rank;
        self.process.ranks().keys().copied().filter(|&rank| rank != own).collect()
    }

    /// What makes this process unable to take part, if anything does.
    pub fn fault(&self) -> Option<String> {
        let ranks = self.process.ranks();
        ranks.get(&self.process.info.rank).and_then(|home| home.node.fault())
    }

    /// What this process has counted, a report for each rank it computes.
    pub fn reports(&self) -> Vec<NodeReport> {
        self.process.ranks().values().map(|computed| computed.node.report()).collect()
    }

    /// How often this process has taken over a rank.
    pub fn takeovers(&self) -> u64 {
        self.process.own().takeovers
    }

    /// What this process has recorded, a lane for each rank it computes.
    pub fn lanes(&self) -> Vec<Lane> {
        let ranks = self.process.ranks();
        ranks.iter().map(|(&rank, computed)| computed.node.recorder().lane(rank)).collect()
    }

    /// The way to the cluster for those who ask this process, over HTTP say.
    pub fn asker(&self) -> Arc<dyn Asker> {
        let process = Arc::downgrade(&self.process);
        let own = move || process.upgrade().map(|process| process.own()).unwrap_or_default();
        let (session, info) = (self.process.link.session().clone(), &self.process.info);
        Arc::new(ClusterAsker::new(session, info, Box::new(own)))
    }

    /// Leaves the cluster and ends every task and thread.
    pub async fn shutdown(mut self) {
        self.tasks.shutdown().await;
        let ranks: Vec<usize> = self.process.ranks().keys().copied().collect();
        for rank in ranks {
            self.process.leave(rank).await;
        }
        if let Err(error) = self.process.link.close().await {
            tracing::debug!(%error, "session did not close cleanly");
        }
    }
}

impl Process {
    fn ranks(&self) -> MutexGuard<'_, BTreeMap<usize, Computed>> {
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shelf(&self) -> &Shelf {
        self.knowledge.shelf()
    }

    /// What this process knows of itself.
    fn own(&self) -> Own {
        let ranks = self.ranks();
        let home = ranks.get(&self.info.rank).map(|home| &home.node);
        Own {
            reports: ranks.values().map(|computed| computed.node.report()).collect(),
            missing: home.map(|home| home.missing()).unwrap_or_default(),
            events: home.map(|home| home.log().latest()).unwrap_or_default(),
            takeovers: home.map(|home| home.report().takeovers).unwrap_or_default(),
        }
    }

    /// Notes what has happened, for those who watch.
    fn note(&self, event: String) {
        if let Some(home) = self.ranks().get(&self.info.rank) {
            home.node.log().note(event);
        }
    }

    /// Begins to compute a rank.
    async fn compute(&self, shard: &Shard, role: Role) -> Result<(), ServeError> {
        let info = shard.identity();
        let identity =
            Identity { split: info.split.clone(), rank: info.rank, nodes: info.nodes, role };
        let engines = Arc::clone(&self.engines);
        // Loaded before anybody hears of it: from then on it is waited for.
        let mut node = Node::load(shard, move || engines()).await?;
        if role == Role::Guest {
            node.note_guest_of(self.info.rank);
        }
        if self.options.trace {
            node.recorder().start();
        }
        if let Some(wait) = self.options.degrade {
            node.degrade_after(wait);
        }
        let port = self.options.link.map(Port::new).transpose().map_err(ServeError::Thread)?;
        let sink = port.as_ref().map_or(node.sink(), |port| port.sink(node.sink()));
        let transport = Arc::new(self.link.join(&identity, sink).await?);
        let outwards = Arc::clone(&transport) as Arc<dyn Transport>;
        node.connect(match port {
            Some(port) => Arc::new(port.transport(outwards)),
            None => outwards,
        });
        let node = Arc::new(node);
        let mut answering = JoinSet::new();
        let reruns = self.reruns.clone();
        answering.spawn(answer(self.link.clone(), shard.clone(), Arc::clone(&node), reruns));
        self.ranks().insert(info.rank, Computed { node, answering, transport });
        Ok(())
    }

    /// Ends computing a rank.
    async fn leave(&self, rank: usize) {
        let computed = self.ranks().remove(&rank);
        let Some(Computed { node, mut answering, transport }) = computed else { return };
        answering.shutdown().await;
        if let Some(node) = Arc::into_inner(node) {
            node.shutdown().await;
        }
        drop(transport);
    }

    /// Stands in for whoever is gone, as long as the server lives.
    async fn stand_in(self: Arc<Self>) {
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

    /// Fetches the shards of all ranks from whoever has them.
    async fn gather_shards(self: Arc<Self>) {
        loop {
            tokio::time::sleep(FETCH_AGAIN).await;
            let missing = self.shelf().missing();
            if missing.is_empty() {
                return;
            }
            for rank in missing {
                if let Err(error) = self.fetch(rank).await {
                    tracing::debug!(rank, reason = one_line(&error), "shard not fetched");
                }
            }
        }
    }

    /// Fetches one shard, a chunk after another, from whoever answers first.
    async fn fetch(&self, rank: usize) -> zenoh::Result<()> {
        let mut file = Vec::new();
        while let Some((length, chunk)) = self.fetch_chunk(rank, file.len()).await? {
            file.extend_from_slice(&chunk);
            if file.len() >= length {
                if !self.shelf().offer(rank, file.into()) {
                    tracing::warn!(rank, "what peers gave is not the shard");
                }
                return Ok(());
            }
        }
        Ok(())
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
                && (from..=MAX_SHARD).contains(&length)
            {
                return Ok(Some((length, chunk)));
            }
        }
        Ok(None)
    }

    /// Gives shards to those who ask for them.
    async fn hand_out_shards(self: Arc<Self>, questions: Questions) {
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

/// Answers whoever asks a rank, as long as it is computed here.
async fn answer(link: Link, shard: Shard, node: Arc<Node>, reruns: Reruns) {
    if let Err(error) = try_answer(&link, &shard, &node, reruns).await {
        tracing::warn!(%error, "nobody can ask this rank");
    }
}

async fn try_answer(
    link: &Link,
    shard: &Shard,
    node: &Arc<Node>,
    reruns: Reruns,
) -> Result<(), ServeError> {
    let info = shard.identity();
    let reports = queryable(link, &report_key(&info.split, info.rank)).await?;
    let times = queryable(link, &clock::clock_key(&info.split, info.rank)).await?;
    let lanes = queryable(link, &clock::trace_key(&info.split, info.rank)).await?;
    let watched = async {
        tokio::join!(
            answer_reports(reports, node),
            answer_watchers(times, node, clock::time_of),
            answer_watchers(lanes, node, clock::lane_of),
        );
    };
    if info.rank != info.entry {
        watched.await;
        return Ok(());
    }
    let described = ClusterInfo {
        split: info.split.clone(),
        nodes: info.nodes,
        inputs: node.inputs().to_vec(),
        outputs: node.outputs().to_vec(),
        metadata: shard.metadata().to_vec(),
    };
    let described = Bytes::from(serde_json::to_vec(&described)?);
    let about = queryable(link, &info_key(&info.split)).await?;
    let asked = queryable(link, &infer_key(&info.split)).await?;
    let asks = Arc::clone(node);
    let answered = answer_questions(asked, move |inputs, within| {
        let (node, reruns) = (Arc::clone(&asks), reruns.clone());
        async move { infer(&node, inputs, within, &reruns).await }
    });
    tokio::join!(watched, answer_info(about, described), answered);
    Ok(())
}

async fn answer_info(questions: Questions, described: Bytes) {
    while let Ok(query) = questions.recv_async().await {
        reply(&query, questions.key_expr().to_string(), described.clone()).await;
    }
}

async fn answer_reports(questions: Questions, node: &Node) {
    while let Ok(query) = questions.recv_async().await {
        match serde_json::to_vec(&node.report()) {
            Ok(report) => reply(&query, questions.key_expr().to_string(), report.into()).await,
            Err(error) => tracing::warn!(%error, "report not written"),
        }
    }
}

async fn answer_watchers(questions: Questions, node: &Node, answer: fn(&Node) -> Option<Bytes>) {
    while let Ok(query) = questions.recv_async().await {
        match answer(node) {
            Some(answer) => reply(&query, questions.key_expr().to_string(), answer).await,
            None => tracing::warn!("record not written"),
        }
    }
}

/// Runs a request; from its inputs again where a node was lost meanwhile, and another stands in or
/// the others may go on without it. A request that ran out of time while nodes came and went is given
/// its time once more: frames are lost, too, where two nodes disagree on whether their link stands.
async fn infer(
    node: &Node,
    inputs: Vec<wire::Tensor>,
    within: Duration,
    reruns: &Reruns,
) -> Result<wire::Answer, InferError> {
    let start = Instant::now();
    let mut attempts = 1;
    let mut was_late = false;
    loop {
        let error = match node.infer(inputs.clone(), within).await {
            Err(error) if reruns.can_go_on && attempts < MAX_ATTEMPTS => error,
            answer => return answer,
        };
        let late = matches!(error, InferError::Late { .. } | InferError::Missing { .. });
        match error {
            InferError::PeerLost { .. } => {}
            _ if late && !was_late && reruns.unsettled_since(start) => was_late = true,
            _ => return Err(error),
        }
        tracing::debug!(%error, "request is run again");
        attempts += 1;
    }
}

/// Why a process cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The shard cannot be loaded.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The network cannot be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The system gives no thread for a slowed link.
    #[error("no thread for the link: {0}")]
    Thread(#[source] std::io::Error),
    /// The description of the model cannot be written.
    #[error("description: {0}")]
    Json(#[from] serde_json::Error),
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
