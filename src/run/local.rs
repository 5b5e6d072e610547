//! A whole cluster on this machine: one process a shard, over loopback.
//!
//! [`LocalCluster::start`] takes the folder of a split; it starts the current executable (or another
//! one) once a shard and gives a running cluster that answers. An executable that may be started so
//! calls [`serve_if_child`] first thing in its `main`.
//!
//! Guarantees: no child outlives its cluster. They are stopped when it is stopped or dropped, for
//! whatever reason, and killed where they take longer than [`STOP_GRACE`]; where the parent is killed
//! the kernel closes the pipes, and they end by themselves. A child that dies makes requests end with
//! an error that names its rank.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use snn_runtime::NodeReport;
use snn_runtime::client::{Client, ClusterInfo};
use snn_runtime::watch::trace::Aligned;
use tokio::sync::{mpsc, watch};

pub use super::child::{ORDERS, STOP_GRACE, serve_if_child};

use super::child::{News, NodeProcess, Orders, Receiver, Sender};
use super::emulation::Emulation;
use super::http::Settings;
use super::input::Array;
use super::serve;

/// How long a child may take to bind a port: it has loaded nothing yet.
const LISTEN_WITHIN: Duration = Duration::from_secs(20);
/// How long a request that fails waits for the news that a child has died, which explains it better.
const NEWS_GRACE: Duration = Duration::from_millis(300);
/// News queued from all children: a handful each.
const NEWS_QUEUE: usize = 64;

/// How a local cluster is started.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Executable that becomes the nodes; its `main` calls [`serve_if_child`]. The current one if `None`.
    pub executable: Option<PathBuf>,
    /// Arguments that come first (they mean nothing to a child).
    pub leading_args: Vec<OsString>,
    /// Compute threads a node.
    pub threads: usize,
    /// How long the cluster may take until every node is ready: large models take a while to load.
    pub ready_within: Duration,
    /// How long a request may take.
    pub answer_within: Duration,
    /// Where rank 0 serves HTTP; the others on the ports that follow.
    pub http: Option<Settings>,
    /// Whether others than this machine may ask over HTTP.
    pub insecure: bool,
    /// Whether the nodes record what happens when.
    pub trace: bool,
    /// What the nodes are slowed down to.
    pub emulation: Emulation,
    /// Where each node runs, by rank; all of them here, on the loopback interface, if there are none.
    pub hosts: Vec<Host>,
}

/// Where a node of a local cluster runs: in a network of its own, say, on this machine.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Command that starts another command there (`ip netns exec NAME`); none for this very place.
    pub launcher: Vec<OsString>,
    /// Address to listen on there. Beyond the loopback interface anybody may take part.
    pub listen: String,
}

impl Default for LocalOptions {
    fn default() -> LocalOptions {
        LocalOptions {
            executable: None,
            leading_args: Vec::new(),
            threads: 1,
            ready_within: Duration::from_secs(120),
            answer_within: Duration::from_secs(60),
            http: None,
            insecure: false,
            trace: false,
            emulation: Emulation::default(),
            hosts: Vec::new(),
        }
    }
}

/// A cluster of processes on this machine, ready to answer.
#[derive(Debug)]
pub struct LocalCluster {
    client: Client,
    answer_within: Duration,
    http: Vec<SocketAddr>,
    lost: watch::Receiver<Option<Lost>>,
    // Last, so that the client is gone before the children are told to stop.
    children: Mutex<Children>,
}

impl LocalCluster {
    /// Starts every shard of the folder and waits until all of them are ready.
    ///
    /// # Errors
    /// What is wrong with the folder, or with the first node that does not come up.
    pub async fn start(folder: &Path, options: LocalOptions) -> Result<LocalCluster> {
        let manifest = serve::read_manifest(folder)?;
        let shards: Vec<PathBuf> = manifest.nodes.iter().map(|n| folder.join(&n.shard)).collect();
        let deadline = Instant::now() + options.ready_within;
        let (sender, mut news) = mpsc::channel(NEWS_QUEUE);
        let mut children = Children::default();
        let places = start_children(&mut children, &shards, &options, (&sender, &mut news)).await?;
        drop(sender);
        wait_ready(&mut children, &mut news, deadline).await?;

        let entry = std::slice::from_ref(&places[manifest.entry].address);
        let connected = Client::connect(entry, None, remaining(deadline)).await;
        let client = connected.context("entry node")?;
        let (tell, lost) = watch::channel(None);
        // Ends by itself with the last child, whose reader holds the other end.
        tokio::spawn(watch_children(news, tell));
        let children = Mutex::new(children);
        let http = places.iter().filter_map(|place| place.http).collect();
        Ok(LocalCluster { client, answer_within: options.answer_within, http, lost, children })
    }

    /// What the cluster takes and gives.
    pub fn info(&self) -> &ClusterInfo {
        self.client.info()
    }

    /// Runs one request; gives the outputs in the model's order.
    ///
    /// # Errors
    /// The node's answer, or which node has died.
    pub async fn infer(&self, inputs: &[Array]) -> Result<Vec<Array>> {
        let answer = async { super::infer::ask(&self.client, inputs, self.answer_within).await };
        let failure = tokio::select! {
            biased;
            lost = self.next_loss() => return Err(self.explain(lost)),
            answer = answer => match answer {
                Ok(answer) => return Ok(super::infer::arrays(answer)),
                Err(failure) => failure,
            },
        };
        match tokio::time::timeout(NEWS_GRACE, self.next_loss()).await {
            Ok(lost) => Err(self.explain(lost)),
            Err(_) => Err(failure),
        }
    }

    /// What each node has counted so far, by rank.
    ///
    /// # Errors
    /// A node that does not answer.
    pub async fn reports(&self) -> Result<Vec<NodeReport>> {
        let reports = self.client.reports(self.answer_within).await?;
        let (found, nodes) = (reports.len(), self.info().nodes);
        match found == nodes {
            true => Ok(reports),
            false => bail!("{found} of {nodes} nodes report"),
        }
    }

    /// What the nodes have recorded, on one time axis.
    ///
    /// # Errors
    /// A node that does not answer.
    pub async fn trace(&self) -> Result<Vec<Aligned>> {
        let lanes = self.client.trace(self.answer_within).await?;
        let (found, nodes) = (lanes.len(), self.info().nodes);
        match found == nodes {
            true => Ok(lanes),
            false => bail!("{found} of {nodes} nodes gave what they recorded"),
        }
    }

    /// Where the nodes serve HTTP, by rank; nowhere unless asked to.
    pub fn http_addresses(&self) -> &[SocketAddr] {
        &self.http
    }

    /// Waits until a node dies, and says which and why.
    pub async fn failure(&self) -> anyhow::Error {
        let lost = self.next_loss().await;
        self.explain(lost)
    }

    /// Process ids of the nodes, by rank.
    pub fn process_ids(&self) -> Vec<u32> {
        let children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.0.iter().map(NodeProcess::id).collect()
    }

    /// Stops every node and waits for its end.
    ///
    /// # Errors
    /// A node that did not end cleanly.
    pub async fn stop(self) -> Result<()> {
        let LocalCluster { client, children, .. } = self;
        client.close().await;
        let children = children.into_inner().unwrap_or_else(PoisonError::into_inner);
        tokio::task::spawn_blocking(move || children.stop()).await?
    }

    /// Waits for the first child to die; for ever while none does.
    async fn next_loss(&self) -> Lost {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(found) => found.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    fn explain(&self, lost: Lost) -> anyhow::Error {
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children.explain(&lost)
    }
}

/// A child that has ended, and what it said last.
#[derive(Clone, Debug, Default)]
struct Lost {
    rank: usize,
    reason: Option<String>,
}

/// Where a child can be reached.
#[derive(Debug)]
struct Place {
    address: String,
    http: Option<SocketAddr>,
}

async fn start_children(
    children: &mut Children,
    shards: &[PathBuf],
    options: &LocalOptions,
    (sender, news): (&Sender, &mut Receiver),
) -> Result<Vec<Place>> {
    let mut places: Vec<Place> = Vec::with_capacity(shards.len());
    for (rank, shard) in shards.iter().enumerate() {
        let orders = Orders {
            shard: shard.clone(),
            peers: places.iter().map(|place| place.address.clone()).collect(),
            threads: options.threads,
            http: options.http.as_ref().map(|http| http.of_rank(rank)).transpose()?,
            insecure: options.insecure,
            trace: options.trace,
            device: None,
            emulation: options.emulation,
            listen: options.hosts.get(rank).map(|host| host.listen.clone()),
        };
        children.0.push(NodeProcess::spawn(rank, &orders, options, sender.clone())?);
        places.push(wait_listening(children, rank, news).await?);
    }
    Ok(places)
}

async fn wait_listening(
    children: &mut Children,
    awaited: usize,
    news: &mut Receiver,
) -> Result<Place> {
    let deadline = Instant::now() + LISTEN_WITHIN;
    let mut http = None;
    loop {
        match next_news(news, deadline).await {
            Some((rank, News::Http(address))) if rank == awaited => http = Some(address),
            Some((rank, News::Listening(address))) if rank == awaited => {
                return Ok(Place { address, http });
            }
            Some((rank, News::Failed(reason))) => {
                return Err(children.explain(&Lost { rank, reason: Some(reason) }));
            }
            Some((rank, News::Ended)) => return Err(children.explain(&Lost { rank, reason: None })),
            Some(_) => {}
            None => bail!("rank {awaited}: no address within {} s", LISTEN_WITHIN.as_secs()),
        }
    }
}

async fn wait_ready(children: &mut Children, news: &mut Receiver, deadline: Instant) -> Result<()> {
    let mut waiting: BTreeSet<usize> = (0..children.0.len()).collect();
    while !waiting.is_empty() {
        match next_news(news, deadline).await {
            Some((rank, News::Ready)) => drop(waiting.remove(&rank)),
            Some((rank, News::Failed(reason))) => {
                return Err(children.explain(&Lost { rank, reason: Some(reason) }));
            }
            Some((rank, News::Ended)) => return Err(children.explain(&Lost { rank, reason: None })),
            Some((_, News::Http(_) | News::Listening(_))) => {}
            None => bail!("{} not ready in time", serve::ranks(&waiting)),
        }
    }
    Ok(())
}

async fn next_news(news: &mut Receiver, deadline: Instant) -> Option<(usize, News)> {
    tokio::time::timeout_at(deadline.into(), news.recv()).await.ok().flatten()
}

async fn watch_children(mut news: Receiver, tell: watch::Sender<Option<Lost>>) {
    while let Some((rank, event)) = news.recv().await {
        let reason = match event {
            News::Failed(reason) => Some(reason),
            News::Ended => None,
            News::Listening(_) | News::Http(_) | News::Ready => continue,
        };
        tell.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert(Lost { rank, reason });
            first
        });
    }
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// The processes of a cluster; dropping it stops them.
#[derive(Debug, Default)]
struct Children(Vec<NodeProcess>);

impl Children {
    /// Why a child ended, as well as can be told.
    fn explain(&mut self, lost: &Lost) -> anyhow::Error {
        if let Some(reason) = &lost.reason {
            return anyhow!("{reason}");
        }
        let Some(node) = self.0.get_mut(lost.rank) else {
            return anyhow!("rank {} ended", lost.rank);
        };
        // Its output has ended, so the process has, or is about to.
        let status = node.wait_until(Instant::now() + NEWS_GRACE);
        let how = status.map_or("without a word".to_owned(), |status| status.to_string());
        let shard = node.shard().display();
        anyhow!("{shard}: node: rank {} ended unexpectedly ({how})", lost.rank)
    }

    /// Tells all of them to stop, waits, kills what is left. Blocks for [`STOP_GRACE`] at most.
    fn stop(mut self) -> Result<()> {
        let failed = self.end();
        self.0.clear();
        match failed {
            None => Ok(()),
            Some(rank) => bail!("rank {rank} did not end cleanly"),
        }
    }

    fn end(&mut self) -> Option<usize> {
        for node in &mut self.0 {
            node.tell_to_stop();
        }
        let deadline = Instant::now() + STOP_GRACE;
        let mut failed = None;
        for node in &mut self.0 {
            let status = node.wait_until(deadline);
            if status.is_none() {
                node.kill();
            }
            if !status.is_some_and(|status| status.success()) {
                failed.get_or_insert(node.rank());
            }
        }
        failed
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.end();
    }
}
