//! One node: a shard, its peers, and the signals that end it.
//!
//! Takes a shard and where its peers may be; binds at once, loads, joins the cluster, says what it
//! waits for and when it is ready, and serves until it is told to stop. The `cluster.json` beside the
//! shard, where there is one, gives addresses, must be of the same split, and says which files the shards
//! are: the node's own, and those that it finds or is handed over.
//! Ends with an error when peers are missing past the timeout, when a node of another split
//! appears, or when computing panics: a process that lives on keeps others from standing in for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use snn_runtime::Shard;
use snn_runtime::digest::Digest;
use snn_runtime::http::Relay;
use snn_runtime::knowledge::Knowledge;
use snn_runtime::serve::{Obstacle, Server, ServerOptions};
use snn_runtime::transport::zenoh::{DEFAULT_LISTEN, FROZEN_AFTER, Link, Options};
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, NodeEntry};
use snn_schemas::metadata::ShardInfo;

use super::emulation::{self, Emulation};
use super::{args, http, trace};

/// Where a node listens that others may reach: on every interface, on a free port.
const ANYWHERE: &str = "0.0.0.0:0";
/// How often the list of missing peers is looked at, to say what has changed.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long missing peers that a router may stand between are waited for before the cluster is looked for
/// behind it: on one network nodes meet within a few hundred ms.
const ROUTER_AFTER: Duration = Duration::from_secs(1);
/// How long ending may take: leaving the cluster takes milliseconds, a segment perhaps a second.
const STOP_WITHIN: Duration = Duration::from_secs(3);

/// How long a node that was frozen may take to listen again where it did.
const REJOIN_WITHIN: Duration = Duration::from_secs(10);

/// What a node is started with.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    /// The shard.
    pub(super) shard: PathBuf,
    /// Address to listen on; the manifest's, else a free port on this machine, where there is none.
    pub(super) listen: Option<String>,
    /// Addresses of other nodes, beside those of the manifest.
    pub(super) peers: Vec<String>,
    /// How long missing peers are waited for.
    pub(super) timeout: Option<Duration>,
    /// Compute threads.
    pub(super) threads: usize,
    /// The cluster's key file.
    pub(super) key: Option<PathBuf>,
    /// Whether to listen beyond this machine without a key.
    pub(super) insecure: bool,
    /// Name by which the nodes of the cluster look for each other, where whoever started them has
    /// given all addresses: those of the manifest are then not used. The split otherwise.
    pub(super) cluster: Option<String>,
    /// Whether to stand in for nodes that are gone.
    pub(super) takeover: bool,
    /// Where to keep what a restart of all nodes needs, and how long absent ones are waited for then.
    pub(super) keep: Option<(PathBuf, Duration)>,
    /// How long a tensor is waited for, where not as long as the request may take.
    pub(super) degrade: Option<Duration>,
    /// Where to serve HTTP.
    pub(super) http: Option<http::Settings>,
    /// Whether others than this machine may ask over HTTP.
    pub(super) open_http: bool,
    /// Whether whoever started the node could have asked for HTTPS.
    pub(super) may_encrypt: bool,
    /// Whether to record what happens when.
    pub(super) trace: bool,
    /// Where to write it at the end.
    pub(super) trace_file: Option<PathBuf>,
    /// What it is slowed down to.
    pub(super) emulation: Emulation,
    /// Whether the cluster is reached through a router, as may turn out.
    pub(super) through_router: bool,
}

/// How far a node has come.
#[derive(Debug)]
pub(super) enum Progress<'a> {
    /// It can be connected to at this address.
    Listening(&'a str),
    /// It reaches its cluster through the router at this address, and cannot be connected to.
    Through(&'a str),
    /// HTTP will be answered at this address.
    Http(http::Url),
    /// These ranks are missing.
    Waiting(&'a BTreeSet<usize>),
    /// Everybody is there, or somebody stands in for them.
    Ready,
    /// This node stands in for these ranks.
    StandingIn(&'a BTreeSet<usize>),
    /// Nobody stands in for ranks that have been waited for, and why.
    Unaided(&'a Obstacle),
}

/// Runs `snn-run SHARD.onnx`.
pub(super) async fn node(node: args::Node) -> Result<ExitCode> {
    if let Some(path) = &node.trace {
        super::check_place(path).context("trace")?;
    }
    let emulation = Emulation::new(node.device.as_ref(), node.link, node.threads)?;
    let (has_key, insecure) = (node.key.is_some(), node.insecure);
    let setup = Setup {
        emulation,
        shard: node.shard,
        listen: node.listen,
        peers: node.peers,
        timeout: node.timeout,
        threads: node.threads,
        key: node.key,
        insecure: node.insecure,
        cluster: None,
        takeover: node.takeover,
        keep: node.keep,
        degrade: node.degrade,
        http: node.http,
        open_http: node.insecure,
        may_encrypt: true,
        trace: node.trace.is_some(),
        trace_file: node.trace,
        through_router: false,
    };
    let tell = |progress: Progress<'_>| match progress {
        Progress::Listening(address) => {
            super::progress(format_args!("listening on {address}"));
            super::warn_without_key(has_key, insecure);
        }
        Progress::Through(address) => {
            super::progress(format_args!("through the router at {address}"));
        }
        Progress::Http(url) => {
            super::progress(url);
            if let Some(warning) = url.warning() {
                super::progress(warning);
            }
        }
        Progress::Waiting(missing) => {
            super::progress(format_args!("waiting for {}", ranks(missing)));
        }
        Progress::Ready => super::progress("ready"),
        Progress::StandingIn(taken) if taken.is_empty() => {
            super::progress("standing in for nobody")
        }
        Progress::StandingIn(taken) => {
            super::progress(format_args!("standing in for {}", ranks(taken)));
        }
        Progress::Unaided(obstacle) => super::progress(obstacle),
    };
    let stop = async {
        if let Err(error) = super::interrupted().await {
            super::complain(&crate::terminal::one_line(&error));
        }
    };
    serve(&setup, &tell, stop).await?;
    Ok(ExitCode::SUCCESS)
}

/// Serves a shard until `stop` is done. Tells `tell` how far it has come.
///
/// A process that was frozen, or whose machine slept, while others could stand in for it joins again as
/// a new one, with what it knows of its cluster: its peers have closed their ends of its connections, and
/// what it holds of them is stale. Its HTTP stays open meanwhile, and requests wait.
/// The trace file then tells of the time since. So does a node that finds itself alone with a router: it
/// joins through it, as a client.
pub(super) async fn serve(
    setup: &Setup,
    tell: &(dyn Fn(Progress<'_>) + Sync),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let file = setup.shard.display().to_string();
    tokio::pin!(stop);
    let mut setup = setup.clone();
    let mut rejoining_until = None;
    let knowledge = read(&setup).with_context(|| file.clone())?;
    let ShardInfo { nodes, rank, .. } = *knowledge.shard().identity();
    let relay = Arc::new(Relay::new(nodes, rank));
    let mut http = match &setup.http {
        Some(settings) => {
            let key = setup.key.as_deref().map(crate::key::read).transpose()?;
            let (open, may_encrypt) = (setup.open_http, setup.may_encrypt);
            let claimed = http::claim(settings, key.as_ref(), open, may_encrypt).await;
            let claimed = claimed.with_context(|| file.clone())?;
            tell(Progress::Http(claimed.url()));
            Some(claimed.serve(Arc::clone(&relay) as Arc<_>))
        }
        None => None,
    };
    loop {
        let started = tokio::select! {
            () = &mut stop => return Ok(()),
            started = start(&setup, &knowledge, tell) => started,
        };
        let server = match started {
            Ok(started) => started,
            // What listened there before may take a moment to be gone.
            Err(_) if rejoining_until.is_some_and(|until| Instant::now() < until) => {
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
            Err(error) => return Err(error.context(file)),
        };
        relay.switch(Some(server.asker()));
        let left = tokio::select! {
            () = &mut stop => Ok(Left::Stopped),
            left = stay(&server, &setup, tell) => left.with_context(|| file.clone()),
        };
        // Should it join again, it is where it was.
        if !setup.through_router {
            setup.listen = Some(server.address().to_owned());
        }
        let rejoins = matches!(left, Ok(Left::Frozen | Left::AloneWithRouter));
        match http.take_if(|_| !rejoins) {
            Some(http) => http.stop().await,
            None => relay.switch(None),
        }
        let written = match &setup.trace_file {
            Some(path) if !rejoins => trace::write(&trace::by_wall_clock(server.lanes()), path),
            _ => Ok(()),
        };
        let ended = tokio::time::timeout(STOP_WITHIN, server.shutdown()).await;
        if ended.is_err() {
            tracing::warn!("the node took too long to end and was left");
        }
        if !rejoins {
            return left.map(drop).and(written);
        }
        setup.through_router |= matches!(left, Ok(Left::AloneWithRouter));
        tracing::info!(through_router = setup.through_router, "joins again");
        rejoining_until = Some(Instant::now() + REJOIN_WITHIN);
    }
}

/// Why a node no longer serves.
#[derive(Clone, Copy, Debug)]
enum Left {
    /// It was told to stop.
    Stopped,
    /// It stood still for so long that its peers may have given it up.
    Frozen,
    /// It is connected to a router, and not to the peers it waits for.
    AloneWithRouter,
}

fn read(setup: &Setup) -> Result<Arc<Knowledge>> {
    let bytes = Bytes::from(fs::read(&setup.shard).context("read")?);
    let mut knowledge = Knowledge::new(bytes).context("shard")?;
    if let Some(manifest) = beside(setup.folder(), knowledge.shard()).context("addresses")? {
        let named = format!("not the shard that {MANIFEST_FILE} beside it names");
        knowledge.expect(digests(&manifest)?).context(named)?;
    }
    if let Some((dir, grace)) = &setup.keep {
        knowledge.keep_in(dir, *grace);
    }
    Ok(Arc::new(knowledge))
}

async fn start(
    setup: &Setup,
    knowledge: &Arc<Knowledge>,
    tell: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Server> {
    let shard = knowledge.shard();
    let folder = setup.folder();
    let manifest = beside(folder, shard).context("addresses")?;
    let options = options(setup, shard, manifest.as_ref())?;
    let link = Link::open(&options).await?;
    match setup.through_router {
        true => tell(Progress::Through(link.address())),
        false => tell(Progress::Listening(link.address())),
    }
    let Emulation { times, link: slowed } = setup.emulation;
    let threads = setup.threads;
    let engines = Arc::new(move || emulation::engine(threads, times));
    let Setup { takeover, trace, degrade, .. } = *setup;
    let options = ServerOptions { takeover, trace, degrade, link: slowed };
    if let Some(manifest) = manifest.filter(|_| setup.takeover) {
        for rank in knowledge.shelf().missing() {
            // A device may have been given its own shard only; peers have the others.
            let file = manifest.nodes.iter().find(|node| node.rank == rank);
            let bytes = file.and_then(|node| fs::read(folder.join(&node.shard)).ok());
            if let Some(Err(reason)) = bytes.map(|b| knowledge.shelf().offer(rank, b.into())) {
                tracing::warn!(rank, %reason, "the shard beside the node's own is not used");
            }
        }
    }
    Server::start(link, Arc::clone(knowledge), engines, options).await.context("load")
}

/// Waits for the peers, then for a fault, a panic or a freeze, which is for ever on a sound cluster.
async fn stay(
    server: &Server,
    setup: &Setup,
    tell: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Left> {
    let start = Instant::now();
    let deadline = setup.timeout.map(|timeout| start + timeout);
    let mut told = None;
    let mut told_taken = BTreeSet::new();
    let mut told_obstacle = None;
    loop {
        // Others may meet by multicast; somebody who was named is meant to be of the same cluster.
        if let Some(fault) = server.fault().filter(|_| !setup.is_open()) {
            bail!("peers: {fault}");
        }
        if let Some(crash) = server.crash() {
            bail!("compute: {crash}");
        }
        let missing: BTreeSet<usize> = server.missing().into_iter().collect();
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let ever_ready = told.as_ref().is_some_and(BTreeSet::is_empty);
        if !missing.is_empty() && late && !ever_ready {
            bail!("peers: {} missing after {} s", ranks(&missing), seconds(setup.timeout));
        }
        // An agent's node must be reached at its own address.
        let may_move = !setup.through_router && setup.cluster.is_none() && !ever_ready;
        if may_move
            && !missing.is_empty()
            && start.elapsed() > ROUTER_AFTER
            && server.meets_router().await
        {
            return Ok(Left::AloneWithRouter);
        }
        let taken = server.stands_in_for();
        if taken != told_taken {
            tell(Progress::StandingIn(&taken));
            told_taken = taken;
            told = None;
        }
        if told.as_ref() != Some(&missing) {
            match missing.is_empty() {
                true => tell(Progress::Ready),
                false => tell(Progress::Waiting(&missing)),
            }
            told = Some(missing);
        }
        let obstacle = server.obstacle();
        if obstacle != told_obstacle {
            if let Some(obstacle) = &obstacle {
                tell(Progress::Unaided(obstacle));
            }
            told_obstacle = obstacle;
        }
        let looked = Instant::now();
        tokio::time::sleep(LOOK_EVERY).await;
        if setup.takeover && looked.elapsed() > LOOK_EVERY + FROZEN_AFTER {
            return Ok(Left::Frozen);
        }
    }
}

impl Setup {
    /// Where the shard lies.
    fn folder(&self) -> &Path {
        self.shard.parent().unwrap_or(Path::new(""))
    }

    /// Whether the node can be reached from other machines, and so looks for them.
    fn is_open(&self) -> bool {
        self.key.is_some() || self.insecure
    }
}

fn seconds(timeout: Option<Duration>) -> f64 {
    timeout.unwrap_or_default().as_secs_f64()
}

/// The manifest beside a shard, where there is one, which must be of the same split.
fn beside(folder: &Path, shard: &Shard) -> Result<Option<Manifest>> {
    let Some(info) = shard.info().filter(|_| folder.join(MANIFEST_FILE).exists()) else {
        return Ok(None);
    };
    let manifest = read_manifest(folder)?;
    ensure!(
        manifest.split == info.split,
        "{MANIFEST_FILE} beside it is of split {}, the shard of {}",
        short(&manifest.split),
        short(&info.split)
    );
    Ok(Some(manifest))
}

/// Which file the shard of each rank is. Of a model that nobody has split a manifest says nothing.
fn digests(manifest: &Manifest) -> Result<BTreeMap<usize, Digest>> {
    let named = manifest.nodes.iter().filter(|node| !node.sha256.is_empty());
    let digest = |node: &NodeEntry| -> Result<(usize, Digest)> {
        let digest = Digest::parse(&node.sha256).with_context(|| {
            format!("{MANIFEST_FILE} beside it: sha256 of rank {} is none", node.rank)
        })?;
        Ok((node.rank, digest))
    };
    named.map(digest).collect()
}

/// Where the node listens and connects to, from the command line and the manifest beside the shard.
fn options(setup: &Setup, shard: &Shard, manifest: Option<&Manifest>) -> Result<Options> {
    let mut peers = setup.peers.clone();
    let mut own = None;
    let manifest = manifest.filter(|_| setup.cluster.is_none());
    for node in manifest.into_iter().flat_map(|manifest| &manifest.nodes) {
        match node.rank == shard.identity().rank {
            true => own = node.address.clone(),
            false => peers.extend(node.address.clone()),
        }
    }
    let everywhere = if setup.is_open() { ANYWHERE } else { DEFAULT_LISTEN };
    let listen = setup.listen.clone().or(own).unwrap_or_else(|| everywhere.to_owned());
    let key = setup.key.as_deref().map(crate::key::read).transpose()?;
    let name = setup.cluster.as_ref().unwrap_or(&shard.identity().split);
    let scout = setup.is_open().then(|| name.clone());
    let (insecure, through_router) = (setup.insecure, setup.through_router);
    Ok(Options { listen, peers, key, insecure, scout, through_router })
}

/// Reads the manifest of a folder.
pub(super) fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST_FILE);
    let read = || -> Result<Manifest> {
        let mut bytes = Vec::new();
        let file = fs::File::open(&path)?;
        file.take(MAX_MANIFEST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        Ok(Manifest::from_json(&bytes)?)
    };
    read().context("manifest").with_context(|| path.display().to_string())
}

/// The beginning of a split's identity, enough to tell two apart.
fn short(split: &str) -> &str {
    split.get(..8).unwrap_or(split)
}

/// Ranks in words: `rank 2`, `ranks 2, 3`.
pub(super) fn ranks(ranks: &BTreeSet<usize>) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match list.len() {
        1 => format!("rank {}", list[0]),
        _ => format!("ranks {}", list.join(", ")),
    }
}

#[cfg(test)]
mod tests;
