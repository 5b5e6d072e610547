//! The agent itself: it answers those who deploy, one request after another, and keeps its nodes.
//!
//! Takes [`AgentOptions`], a [`Launcher`] that turns orders into running nodes, and the [`Front`] that
//! clients ask. Gives an [`Agent`] that is bound, and does its work in [`Agent::run`]. A version that
//! has been started and is not made current within [`TRIAL_WITHIN`] of the last word about it is ended.
//! Nothing is changed but by whoever has claimed the agent.
//! When `run` ends every node has ended.

use std::collections::BTreeMap;
use std::net::{TcpListener, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use zenoh::query::Query;

use super::claim::Claim;
use super::error::AgentError;
use super::front::{Backend, Front};
use super::launch::{Launched, Launcher, NodeOrder};
use super::store::{Order, Store, StoreError};
use super::wire::{
    self, AGENT_KEY, Asker, Description, MAX_MESSAGE, MAX_PEERS, NodeState, Reply, Request,
    Version, VersionState,
};
use crate::key::ClusterKey;
use crate::questions::{Questions, queryable, reply};
use crate::transport::zenoh::{Link, Options, into_bytes, parse_address, place};

/// How long a version that has been started may stay without becoming current, and without a word
/// from whoever deploys it.
pub const TRIAL_WITHIN: Duration = Duration::from_secs(60);
/// How long the cluster of a version that is made current may take to answer this agent.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How often the agent looks after its nodes.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest reason of a failed node that is passed on, in characters: one line.
const MAX_REASON: usize = 500;

/// What an agent is started with.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Name of the device, for people.
    pub name: String,
    /// Version of the software, for people.
    pub software: String,
    /// Address to listen on.
    pub listen: String,
    /// The cluster's key.
    pub key: Option<ClusterKey>,
    /// Whether to listen beyond this machine without a key.
    pub insecure: bool,
    /// Folder for shards and state.
    pub dir: PathBuf,
    /// Addresses that its nodes connect to, in addition to each other's.
    pub peers: Vec<String>,
    /// Where HTTP is served, for people.
    pub http: Option<String>,
    /// Where `snn-run infer` is answered, for people.
    pub front: Option<String>,
}

/// A version whose node runs.
struct Running {
    launched: Box<dyn Launched>,
    order: Order,
    /// When somebody last said anything about it.
    touched: Instant,
}

/// An agent, bound to its address.
pub struct Agent {
    options: AgentOptions,
    link: Link,
    questions: Questions,
    store: Store,
    launcher: Box<dyn Launcher>,
    front: Arc<Front>,
    claim: Claim,
    running: BTreeMap<Version, Running>,
    /// Versions that were current, with the requests they still answer.
    retired: BTreeMap<Version, Arc<Backend>>,
    /// Connects the front after a restart.
    resuming: JoinSet<()>,
}

impl Agent {
    /// Binds the address and opens the folder.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn open(
        options: AgentOptions,
        launcher: Box<dyn Launcher>,
        front: Arc<Front>,
    ) -> Result<Agent, AgentError> {
        for peer in &options.peers {
            parse_address(peer, options.key.as_ref())?;
        }
        let store = Store::open(&options.dir)?;
        let link = Link::open_apart(&Options {
            listen: options.listen.clone(),
            peers: Vec::new(),
            key: options.key.clone(),
            insecure: options.insecure,
            scout: (options.key.is_some() || options.insecure)
                .then(|| scout_name(options.key.as_ref())),
            through_router: false,
        })
        .await?;
        let questions = queryable(&link, AGENT_KEY).await?;
        let (claim, running, retired, resuming) = Default::default();
        let agent = Agent {
            options,
            link,
            questions,
            store,
            launcher,
            front,
            claim,
            running,
            retired,
            resuming,
        };
        Ok(agent)
    }

    /// The address, with its real port.
    pub fn address(&self) -> &str {
        self.link.address()
    }

    /// Runs the current version, and does what it is asked to, until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        self.resume();
        // A task of its own: a node that does not report must not keep others waiting.
        let mut looking = JoinSet::new();
        looking.spawn(look_after(Arc::clone(&self.front)));
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let query = tokio::select! {
                () = stop.cancelled() => break,
                _ = look.tick() => None,
                query = self.questions.recv_async() => match query {
                    Ok(query) => Some(query),
                    Err(_) => break,
                },
            };
            match query {
                Some(query) => self.answer(&query).await,
                None => self.end_trials().await,
            }
        }
        looking.shutdown().await;
        self.resuming.shutdown().await;
        self.front.switch(None);
        for version in self.running.keys().cloned().collect::<Vec<_>>() {
            self.end(&version).await;
        }
        if let Err(error) = self.link.close().await {
            tracing::debug!(%error, "session did not close cleanly");
        }
    }

    /// Starts the version that was current when the agent last ended.
    fn resume(&mut self) {
        let Some(version) = self.store.current() else { return };
        let Some(order) = self.store.order(&version) else { return };
        if let Err(error) = self.launch(&version, order.clone()) {
            tracing::warn!(%version, %error, "the current version does not start");
            return;
        }
        let addresses = self.addresses(&order);
        let (front, key) = (Arc::clone(&self.front), self.options.key.clone());
        self.resuming.spawn(async move {
            loop {
                let of = (version.clone(), order.rank, order.settings);
                match Backend::connect(of, &addresses, key.as_ref(), CONNECT_WITHIN).await {
                    Ok(backend) => {
                        front.switch(Some(backend));
                        return;
                    }
                    Err(error) => tracing::debug!(%error, "the cluster does not answer yet"),
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
    }

    async fn answer(&mut self, query: &Query) {
        let payload = query.payload().filter(|payload| payload.len() <= MAX_MESSAGE);
        let message = payload.and_then(into_bytes).unwrap_or_default();
        let (asker, answer) = match wire::decode::<Request>(&message) {
            Ok((asker, request, piece)) => (asker, self.hear(asker, request, piece).await),
            Err(error) => (Asker::default(), Err(error.into())),
        };
        let answer = answer.unwrap_or_else(|error: AgentError| {
            tracing::warn!(%error, "request refused");
            Reply::Refused { reason: error.to_string() }
        });
        match wire::encode(&asker, &answer, &[]) {
            Ok(answer) => reply(query, AGENT_KEY.to_owned(), answer).await,
            Err(error) => tracing::warn!(%error, "answer not written"),
        }
    }

    /// Does what is asked by whoever may ask for it.
    async fn hear(
        &mut self,
        asker: Asker,
        request: Request,
        piece: Bytes,
    ) -> Result<Reply, AgentError> {
        if request.changes() {
            self.claim.check(&asker)?;
        }
        self.touch(&asker);
        let answer = match request {
            Request::Claim { by } => self.claim.make(asker, &by).map(|()| Reply::Done {}),
            Request::Release {} => {
                self.claim.release(&asker);
                Ok(Reply::Done {})
            }
            other => self.obey(other, piece).await,
        };
        // What was asked for may have taken its time.
        self.touch(&asker);
        answer
    }

    /// Notes that whoever has claimed the agent is there.
    fn touch(&mut self, asker: &Asker) {
        if self.claim.touch(asker) {
            let now = Instant::now();
            self.running.values_mut().for_each(|running| running.touched = now);
        }
    }

    async fn obey(&mut self, request: Request, piece: Bytes) -> Result<Reply, AgentError> {
        let have = |(length, complete)| Reply::Have { length, complete };
        match request {
            Request::Describe {} => Ok(Reply::Described { agent: Box::new(self.description()) }),
            Request::Claim { .. } | Request::Release {} => Ok(Reply::Done {}), // heard already
            Request::Have { version, file } => {
                let look = || self.store.have(&version, file);
                Ok(have(tokio::task::block_in_place(look)?))
            }
            Request::Put { version, file, offset, last } => {
                let put = || {
                    self.make_room(&version)?;
                    self.store.put(&version, file, (offset, &piece[..]), last)
                };
                Ok(have(tokio::task::block_in_place(put)?))
            }
            Request::Reserve {} => Ok(Reply::Reserved { port: self.free_port()? }),
            Request::Start { version, rank, port, peers, settings } => {
                self.start(&version, Order { rank, port, peers, settings }).await
            }
            Request::Activate { version } => self.activate(version).await,
            Request::Drain { version } => {
                let requests = self.retired.get(&version).map_or(0, Backend::requests);
                Ok(Reply::Draining { requests })
            }
            Request::Stop { version } => {
                if self.store.current().as_ref() == Some(&version) {
                    self.resuming.shutdown().await;
                    self.store.set_current(None)?;
                    self.retire(None);
                }
                self.end(&version).await;
                Ok(Reply::Done {})
            }
            Request::Forget { version } => {
                if self.running.contains_key(&version) {
                    return Err(AgentError::Runs { version });
                }
                self.store.forget(&version)?;
                Ok(Reply::Done {})
            }
        }
    }

    /// Removes old versions that nobody needs where a new one needs a place.
    fn make_room(&self, version: &Version) -> Result<(), StoreError> {
        let runs =
            |other: &Version| self.running.contains_key(other) || self.retired.contains_key(other);
        for version in self.store.make_room(version, runs)? {
            tracing::info!(%version, "removed, to make room for another");
        }
        Ok(())
    }

    fn description(&self) -> Description {
        let state = |version: Version| {
            let running = self.running.get(&version);
            let order = running.map(|r| r.order.clone()).or_else(|| self.store.order(&version));
            VersionState {
                rank: order.as_ref().map(|order| order.rank),
                port: order.as_ref().map(|order| order.port),
                settings: order.map(|order| order.settings).unwrap_or_default(),
                state: running
                    .map_or(NodeState::Stopped, |running| short(running.launched.state())),
                version,
            }
        };
        Description {
            name: self.options.name.clone(),
            software: self.options.software.clone(),
            http: self.options.http.clone(),
            front: self.options.front.clone(),
            current: self.store.current(),
            versions: self.store.versions().into_iter().map(state).collect(),
        }
    }

    /// A port that is free on the host the agent listens on.
    fn free_port(&self) -> Result<u16, AgentError> {
        let host = self.host();
        let sockets = format!("{host}:0").to_socket_addrs().map_err(AgentError::Port)?;
        let probe = TcpListener::bind(sockets.collect::<Vec<_>>().as_slice());
        let address = probe.and_then(|probe| probe.local_addr()).map_err(AgentError::Port)?;
        Ok(address.port())
    }

    /// The host part of the agent's own address; its nodes listen there too.
    fn host(&self) -> &str {
        let place = place(self.link.address());
        place.rsplit_once(':').map_or(place, |(host, _)| host)
    }

    async fn start(&mut self, version: &Version, order: Order) -> Result<Reply, AgentError> {
        if let Some(running) = self.running.get_mut(version) {
            // A request whose answer was lost, or a version that is deployed again.
            let of = |order: &Order| (order.rank, order.port, order.settings);
            if of(&running.order) == of(&order) {
                running.touched = Instant::now();
                return Ok(Reply::Done {});
            }
            return Err(AgentError::Runs { version: version.clone() });
        }
        if order.peers.len() > MAX_PEERS {
            return Err(AgentError::Peers { found: order.peers.len() });
        }
        for peer in &order.peers {
            parse_address(peer, self.options.key.as_ref())?;
        }
        if !order.settings.are_sound() {
            return Err(AgentError::Settings { settings: order.settings });
        }
        self.store.set_order(version, &order)?;
        tokio::task::block_in_place(|| self.launch(version, order))?;
        Ok(Reply::Done {})
    }

    /// Runs a node, of a shard that is as it should be.
    fn launch(&mut self, version: &Version, order: Order) -> Result<(), AgentError> {
        let node = NodeOrder {
            shard: self.store.shard(version, order.rank)?,
            version: version.clone(),
            listen: format!("{}:{}", self.host(), order.port),
            peers: order.peers.iter().chain(&self.options.peers).cloned().collect(),
            settings: order.settings,
        };
        let launched = self.launcher.launch(node).map_err(AgentError::Launch)?;
        let running = Running { launched, order, touched: Instant::now() };
        self.running.insert(version.clone(), running);
        Ok(())
    }

    async fn activate(&mut self, version: Version) -> Result<Reply, AgentError> {
        let Some(running) = self.running.get_mut(&version) else {
            return Err(AgentError::Stopped { version });
        };
        running.touched = Instant::now();
        let order = running.order.clone();
        self.resuming.shutdown().await;
        let current = self.front.current();
        if current.is_none_or(|current| *current.version() != version) {
            let backend = match self.retired.remove(&version) {
                Some(backend) => backend,
                None => {
                    let key = self.options.key.as_ref();
                    let of = (version.clone(), order.rank, order.settings);
                    let addresses = self.addresses(&order);
                    Backend::connect(of, &addresses, key, CONNECT_WITHIN).await?
                }
            };
            self.retire(Some(backend));
        }
        self.store.set_current(Some(&version))?;
        Ok(Reply::Done {})
    }

    /// Answers with `next` from now on, and keeps the version before until it is stopped.
    fn retire(&mut self, next: Option<Arc<Backend>>) {
        if let Some(old) = self.front.switch(next) {
            self.retired.insert(old.version().clone(), old);
        }
    }

    /// Addresses at which this agent asks a version: its own node's first.
    fn addresses(&self, order: &Order) -> Vec<String> {
        let host = match self.host() {
            "0.0.0.0" => "127.0.0.1",
            "[::]" => "[::1]",
            host => host,
        };
        let own = format!("{host}:{}", order.port);
        std::iter::once(own).chain(order.peers.iter().cloned()).collect()
    }

    async fn end(&mut self, version: &Version) {
        if let Some(backend) = self.retired.remove(version) {
            backend.close().await;
        }
        if let Some(Running { launched, .. }) = self.running.remove(version) {
            // A panic while it stops has been reported by its hook.
            let _ = tokio::task::spawn_blocking(move || launched.stop()).await;
        }
    }

    async fn end_trials(&mut self) {
        let current = self.store.current();
        let over = |(version, running): (&Version, &Running)| {
            let trial = current.as_ref() != Some(version) && !self.retired.contains_key(version);
            (trial && running.touched.elapsed() > TRIAL_WITHIN).then(|| version.clone())
        };
        let over: Vec<Version> = self.running.iter().filter_map(over).collect();
        for version in over {
            tracing::warn!(%version, "whoever deployed it is gone: it is ended");
            self.end(&version).await;
        }
    }
}

async fn look_after(front: Arc<Front>) {
    loop {
        front.look().await;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// A state whose reason is one line.
fn short(state: NodeState) -> NodeState {
    match state {
        NodeState::Failed { reason } => {
            NodeState::Failed { reason: reason.chars().take(MAX_REASON).collect() }
        }
        other => other,
    }
}

/// The name by which agents are found: that of the key they have.
pub(super) fn scout_name(key: Option<&ClusterKey>) -> String {
    key.map_or_else(|| "agents".to_owned(), ClusterKey::fingerprint)
}
