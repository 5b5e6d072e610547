//! One node: a shard, its peers, and the signals that end it.
//!
//! Takes a shard and where its peers may be; binds at once, loads, joins the cluster, says what it
//! waits for and when it is ready, and serves until it is told to stop. The `cluster.json` beside the
//! shard, where there is one, gives addresses, and must be of the same split.
//! Ends with an error when peers are missing past the timeout, or when a node of another split
//! appears.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use snn_runtime::serve::Server;
use snn_runtime::transport::zenoh::{DEFAULT_LISTEN, Link, Options};
use snn_runtime::Shard;
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest};

use super::args;

/// How often the list of missing peers is looked at, to say what has changed.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long ending may take: leaving the cluster takes milliseconds, a segment perhaps a second.
const STOP_WITHIN: Duration = Duration::from_secs(3);

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
}

/// How far a node has come.
#[derive(Debug)]
pub(super) enum Progress<'a> {
    /// It can be connected to at this address.
    Listening(&'a str),
    /// These ranks are missing.
    Waiting(&'a BTreeSet<usize>),
    /// Everybody is there.
    Ready,
}

/// Runs `snn-run SHARD.onnx`.
pub(super) async fn node(node: args::Node) -> Result<ExitCode> {
    let setup = Setup {
        shard: node.shard,
        listen: node.listen,
        peers: node.peers,
        timeout: node.timeout,
        threads: node.threads,
    };
    let tell = |progress: Progress<'_>| match progress {
        Progress::Listening(address) => super::progress(format_args!("listening on {address}")),
        Progress::Waiting(missing) => {
            super::progress(format_args!("waiting for {}", ranks(missing)));
        }
        Progress::Ready => super::progress("ready"),
    };
    let stop = async {
        if let Err(error) = super::interrupted().await {
            super::complain(&super::one_line(&error));
        }
    };
    serve(&setup, &tell, stop).await?;
    Ok(ExitCode::SUCCESS)
}

/// Serves a shard until `stop` is done. Tells `tell` how far it has come.
pub(super) async fn serve(
    setup: &Setup,
    tell: &(dyn Fn(Progress<'_>) + Sync),
    stop: impl Future<Output = ()>,
) -> Result<()> {
    let file = setup.shard.display().to_string();
    tokio::pin!(stop);
    let server = tokio::select! {
        () = &mut stop => return Ok(()),
        server = start(setup, tell) => server.with_context(|| file.clone())?,
    };
    let done = tokio::select! {
        () = &mut stop => Ok(()),
        done = stay(&server, setup.timeout, tell) => done.with_context(|| file),
    };
    let ended = tokio::time::timeout(STOP_WITHIN, server.shutdown()).await;
    if ended.is_err() {
        tracing::warn!("the node took too long to end and was left");
    }
    done
}

async fn start(setup: &Setup, tell: &(dyn Fn(Progress<'_>) + Sync)) -> Result<Server> {
    let bytes = fs::read(&setup.shard).context("read")?;
    let shard = Shard::from_bytes(bytes.into()).context("shard")?;
    let options = options(setup, &shard).context("addresses")?;
    let link = Link::open(&options).await.context("listen")?;
    tell(Progress::Listening(link.address()));
    let threads = setup.threads;
    let engine = move || snn_runtime::TractEngine::new(threads);
    Server::start(link, shard, engine).await.context("load")
}

/// Waits for the peers, then for a fault, which is for ever on a sound cluster.
async fn stay(
    server: &Server,
    timeout: Option<Duration>,
    tell: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<()> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut told = None;
    loop {
        if let Some(fault) = server.fault() {
            bail!("peers: {fault}");
        }
        let missing: BTreeSet<usize> = server.missing().into_iter().collect();
        let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let ever_ready = told.as_ref().is_some_and(BTreeSet::is_empty);
        if !missing.is_empty() && late && !ever_ready {
            bail!("peers: {} missing after {} s", ranks(&missing), seconds(timeout));
        }
        if told.as_ref() != Some(&missing) {
            match missing.is_empty() {
                true => tell(Progress::Ready),
                false => tell(Progress::Waiting(&missing)),
            }
            told = Some(missing);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn seconds(timeout: Option<Duration>) -> f64 {
    timeout.unwrap_or_default().as_secs_f64()
}

/// Where the node listens and connects to, from the command line and the manifest beside the shard.
fn options(setup: &Setup, shard: &Shard) -> Result<Options> {
    let folder = setup.shard.parent().unwrap_or(Path::new(""));
    let manifest = match folder.join(MANIFEST_FILE).exists() {
        true => Some(read_manifest(folder)?),
        false => None,
    };
    let mut peers = setup.peers.clone();
    let mut own = None;
    if let (Some(manifest), Some(info)) = (manifest, shard.info()) {
        ensure!(
            manifest.split == info.split,
            "{MANIFEST_FILE} beside it is of split {}, the shard of {}",
            short(&manifest.split),
            short(&info.split)
        );
        for node in manifest.nodes {
            match node.rank == info.rank {
                true => own = node.address,
                false => peers.extend(node.address),
            }
        }
    }
    let listen = setup.listen.clone().or(own).unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
    Ok(Options { listen, peers })
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
