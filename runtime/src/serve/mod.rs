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
//! this every process keeps the shards of all ranks, fetched from peers where it must be; with a folder
//! ([`Knowledge::keep_in`]) on disk too, so that after a start of all of them those who never return are
//! stood in for as well. [`Server::obstacle`] says why nobody is.
//!
//! Shutting down, or dropping the server, ends every task it started.

mod answers;
mod chunk;
mod fetch;
mod shards;
mod takeover;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use snn_schemas::cost;
use snn_schemas::metadata::ShardInfo;
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::answers::{Reruns, answer, ask_for_others};
pub use self::takeover::Obstacle;
use crate::client::{door_key, own_key, shard_key};
use crate::engine::Engine;
use crate::http::{Asker, ClusterAsker, Own};
use crate::knowledge::Knowledge;
use crate::membership::{Members, Role};
use crate::node::{Node, NodeReport, StartError};
use crate::questions::queryable;
use crate::shard::Shard;
use crate::shelf::Shelf;
use crate::transport::Transport;
use crate::transport::shaped::Port;
use crate::transport::zenoh::{Identity, Link, LinkError, Watch, ZenohTransport};
use crate::watch::Lane;

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
    /// Ranks whose shards were asked for, and nobody had.
    sought: Mutex<BTreeSet<usize>>,
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
        let process = Arc::new(Process {
            link,
            engines,
            options,
            info,
            knowledge,
            members,
            reruns: Reruns::new(options.takeover || options.degrade.is_some()),
            ranks: Mutex::default(),
            sought: Mutex::default(),
        });
        process.compute(process.knowledge.shard(), Role::Home).await?;
        let mut tasks = JoinSet::new();
        let shards = own_key(&shard_key(&process.info.split, "*"), &process.link.id());
        let questions = queryable(&process.link, &shards).await?;
        tasks.spawn(Arc::clone(&process).hand_out_shards(questions));
        let door = door_key(&process.info.split, &process.link.id());
        let door = queryable(&process.link, &door).await?;
        tasks.spawn(ask_for_others(process.link.clone(), process.info.split.clone(), door));
        if options.takeover {
            tasks.spawn(Arc::clone(&process).gather_shards());
            tasks.spawn(Arc::clone(&process).stand_in());
            tasks.spawn(Arc::clone(&process).keep_on_disk());
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

    /// Why nobody stands in for ranks that have been waited for long enough; nothing where nothing is kept on
    /// disk, or nobody is missing.
    pub fn obstacle(&self) -> Option<Obstacle> {
        self.process.obstacle(&self.missing())
    }

    /// What makes this process unable to take part, if anything does.
    pub fn fault(&self) -> Option<String> {
        let ranks = self.process.ranks();
        ranks.get(&self.process.info.rank).and_then(|home| home.node.fault())
    }

    /// Why a rank that this process computes is computed no more, if one's thread has panicked. As long as the
    /// process lives nobody stands in for that rank.
    pub fn crash(&self) -> Option<String> {
        self.process.ranks().values().find_map(|computed| computed.node.crash())
    }

    /// What this process has counted, a report for each rank it computes.
    pub fn reports(&self) -> Vec<NodeReport> {
        self.process.ranks().values().map(|computed| computed.node.report()).collect()
    }

    /// How often this process has taken over a rank.
    pub fn takeovers(&self) -> u64 {
        self.process.own().takeovers
    }

    /// Records from now on when each rank that is computed here computed, sent and waited, or does no more.
    pub fn record(&self, on: bool) {
        for computed in self.process.ranks().values() {
            match on {
                true => computed.node.recorder().start(),
                false => computed.node.recorder().stop(),
            }
        }
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

    fn sought(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.sought.lock().unwrap_or_else(PoisonError::into_inner)
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
