//! A whole cluster on this machine: one process a shard, over loopback.
//!
//! [`LocalCluster::start`] takes the folder of a split; it starts the current executable (or another
//! one) once a shard and gives a running cluster that answers. An executable that may be started so
//! calls [`serve_if_child`] first thing in its `main`.
//!
//! How the processes talk. The parent gives a child its orders as JSON in the environment variable
//! [`ORDERS`]. The child binds a free port and says so in a line on its standard output, before it
//! loads anything; the parent hands the addresses of the children so far to the next one. No port is
//! chosen beforehand. A child's standard input is a pipe that the parent holds and never writes to:
//! its end is the order to stop.
//!
//! Guarantees: no child outlives its cluster. They are stopped when it is stopped or dropped, for
//! whatever reason, and killed where they take longer than [`STOP_GRACE`]; where the parent is killed
//! the kernel closes the pipes, and they end by themselves. A child that dies makes requests end with
//! an error that names its rank.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use snn_runtime::NodeReport;
use snn_runtime::client::{Client, ClusterInfo};
use snn_runtime::watch::trace::Aligned;
use tokio::sync::{mpsc, oneshot, watch};

use super::emulation::Emulation;
use super::http::Settings;
use super::input::Array;
use super::serve::{self, Progress, Setup};

/// Environment variable that makes a process a child: its orders, as JSON.
pub const ORDERS: &str = "SNN_LOCAL_NODE";
/// How long children may take to end before they are killed: shutting a session down takes
/// milliseconds, the segment that is being computed perhaps a second.
pub const STOP_GRACE: Duration = Duration::from_secs(3);
/// How long a child may take to bind a port: it has loaded nothing yet.
const LISTEN_WITHIN: Duration = Duration::from_secs(20);
/// How long a request that fails waits for the news that a child has died, which explains it better.
const NEWS_GRACE: Duration = Duration::from_millis(300);
/// Longest line taken from a child: an error message fits.
const MAX_LINE: u64 = 16 << 10;
/// News queued from all children: a handful each.
const NEWS_QUEUE: usize = 64;
/// Pause between looks at whether a child has ended.
const POLL: Duration = Duration::from_millis(5);

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
        children.0.iter().map(|node| node.process.id()).collect()
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

/// What a child says, a line each, and that it has ended.
#[derive(Debug)]
pub(super) enum News {
    Listening(String),
    Http(SocketAddr),
    Ready,
    Failed(String),
    Ended,
}

pub(super) type Sender = mpsc::Sender<(usize, News)>;
type Receiver = mpsc::Receiver<(usize, News)>;

/// What a child is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) shard: PathBuf,
    pub(super) peers: Vec<String>,
    pub(super) threads: usize,
    pub(super) http: Option<Settings>,
    /// Whether its HTTP may be open beyond this machine.
    pub(super) insecure: bool,
    pub(super) trace: bool,
    pub(super) emulation: Emulation,
    /// Address to listen on, where that is not the loopback interface.
    pub(super) listen: Option<String>,
    /// For nodes of an agent, which serve other machines too.
    pub(super) device: Option<Device>,
}

/// What a node of an agent is told besides.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Device {
    /// The cluster's key file.
    pub(super) key: Option<PathBuf>,
    /// Whether to listen beyond this machine without a key.
    pub(super) insecure: bool,
    /// Name by which the nodes of the cluster look for each other.
    pub(super) cluster: String,
    /// How long a tensor is waited for, where not as long as the request may take.
    pub(super) degrade: Option<Duration>,
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
        let shard = node.shard.display();
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
            drop(node.lifeline.take());
        }
        let deadline = Instant::now() + STOP_GRACE;
        let mut failed = None;
        for node in &mut self.0 {
            let status = node.wait_until(deadline);
            if status.is_none() {
                node.kill();
            }
            if !status.is_some_and(|status| status.success()) {
                failed.get_or_insert(node.rank);
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

/// One child. Its pipe and its process end together, see [`Children`].
#[derive(Debug)]
pub(super) struct NodeProcess {
    rank: usize,
    shard: PathBuf,
    process: Child,
    lifeline: Option<ChildStdin>,
}

impl NodeProcess {
    pub(super) fn spawn(
        rank: usize,
        orders: &Orders,
        options: &LocalOptions,
        tell: Sender,
    ) -> Result<Self> {
        let executable = match &options.executable {
            Some(path) => path.clone(),
            None => env::current_exe().context("own executable")?,
        };
        let launcher = options.hosts.get(rank).map_or(&[][..], |host| &host.launcher);
        let mut words = launcher.iter().map(OsString::as_os_str).chain([executable.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        // A child takes no arguments; the shard only tells readers of process lists who it is.
        command.args(&options.leading_args).arg(&orders.shard);
        command.env(ORDERS, serde_json::to_string(orders)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // Ctrl-C in a terminal reaches the parent alone, which then stops the children in order.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut process =
            command.spawn().with_context(|| format!("start {}", executable.display()))?;
        let lifeline = process.stdin.take();
        if let Some(output) = process.stdout.take() {
            // Ends when the child's output does, which is when the child does.
            thread::Builder::new()
                .name(format!("snn-child-{rank}"))
                .spawn(move || read_lines(rank, output, &tell))?;
        }
        Ok(NodeProcess { rank, shard: orders.shard.clone(), process, lifeline })
    }

    pub(super) fn wait_until(&mut self, deadline: Instant) -> Option<std::process::ExitStatus> {
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

impl NodeProcess {
    /// Tells it to stop, waits, and kills it where it takes longer than [`STOP_GRACE`]. Blocks.
    pub(super) fn end(&mut self) {
        drop(self.lifeline.take());
        if self.wait_until(Instant::now() + STOP_GRACE).is_none() {
            self.kill();
        }
    }

    fn kill(&mut self) {
        // An error means that it has just ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read_lines(rank: usize, output: ChildStdout, tell: &Sender) {
    let mut output = BufReader::new(output);
    let mut line = String::new();
    loop {
        line.clear();
        let read = output.by_ref().take(MAX_LINE).read_line(&mut line);
        if !read.is_ok_and(|bytes| bytes > 0) {
            break;
        }
        let news = match line.trim_end().split_once(' ') {
            Some(("listening", address)) => News::Listening(address.to_owned()),
            Some(("http", address)) => match address.parse() {
                Ok(address) => News::Http(address),
                Err(_) => News::Failed(format!("no address: {address}")),
            },
            Some(("failed", reason)) => News::Failed(reason.to_owned()),
            None if line.trim_end() == "ready" => News::Ready,
            _ => News::Failed("this executable does not serve as a node".to_owned()),
        };
        if tell.blocking_send((rank, news)).is_err() {
            return;
        }
    }
    // Nobody listens any more when the cluster is being stopped.
    let _ = tell.blocking_send((rank, News::Ended));
}

/// Serves a shard where this process was started as a node by [`LocalCluster`], and gives its exit
/// code when it is done; gives `None` at once in any other process. To be called first in `main`.
pub fn serve_if_child() -> Option<ExitCode> {
    let orders = env::var(ORDERS).ok()?;
    super::start_logging();
    let done =
        serde_json::from_str(&orders).context("orders").and_then(|orders| serve_child(&orders));
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed {}", crate::terminal::one_line(&error)));
            ExitCode::from(crate::terminal::EXIT_ERROR)
        }
    })
}

fn serve_child(orders: &Orders) -> Result<()> {
    let stopped = follow_lifeline()?;
    let device = orders.device.as_ref();
    let setup = Setup {
        shard: orders.shard.clone(),
        listen: orders.listen.clone(),
        peers: orders.peers.clone(),
        timeout: None,
        threads: orders.threads,
        key: device.and_then(|device| device.key.clone()),
        insecure: device.map_or(orders.listen.is_some(), |device| device.insecure),
        cluster: device.map(|device| device.cluster.clone()),
        // Where a process of one machine dies, that is worth knowing, not hiding.
        takeover: device.is_some(),
        degrade: device.and_then(|device| device.degrade),
        http: orders.http.clone(),
        open_http: orders.insecure,
        trace: orders.trace,
        trace_file: None,
        through_router: false,
        emulation: orders.emulation,
    };
    let tell = |progress: Progress<'_>| match progress {
        Progress::Listening(address) => say(&format!("listening {address}")),
        Progress::Http(address) => say(&format!("http {address}")),
        Progress::Waiting(_) | Progress::StandingIn(_) | Progress::Through(_) => {}
        Progress::Ready => say("ready"),
    };
    let stop = async {
        // The thread that holds the other end never drops it unused.
        let _ = stopped.await;
    };
    super::block_on(serve::serve(&setup, &tell, stop))
}

/// Watches standard input; its end means that the parent wants this process to end, or has ended
/// itself. A process that takes longer than [`STOP_GRACE`] then is cut off.
fn follow_lifeline() -> Result<oneshot::Receiver<()>> {
    let (stop, stopped) = oneshot::channel();
    let watch = move || {
        // Nothing is ever written: whatever ends this, the parent is gone.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = stop.send(());
        thread::sleep(STOP_GRACE);
        exit_now();
    };
    thread::Builder::new().name("snn-lifeline".to_owned()).spawn(watch)?;
    Ok(stopped)
}

#[allow(clippy::exit, reason = "the last resort against a process that nobody owns any more")]
fn exit_now() {
    std::process::exit(i32::from(crate::terminal::EXIT_ERROR));
}

/// Tells the parent something. A parent that is gone is noticed by the lifeline.
fn say(line: &str) {
    let mut output = io::stdout().lock();
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}
