//! HTTP beside a node: the address it has, the pictures it takes, and a local cluster that only serves.
//!
//! Takes what the command line says of HTTP; claims the address before anything is loaded, answers
//! from then on (requests wait for the node to be part of its cluster), and ends before the node does.
//! Pictures become the model's
//! input as those of `snn-run infer` do.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use snn_runtime::Tensor;
use snn_runtime::client::ClusterInfo;
use snn_runtime::http::{Asker, Http, Limits};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::emulation::Emulation;
use super::infer::input_spec;
use super::local::{LocalCluster, LocalOptions};
use super::{args, input, trace};

/// Where HTTP is served, and how long a request may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `PORT`, on this machine only, or `HOST:PORT`; port 0 takes a free one.
    pub address: String,
    /// How long a request may take, where it does not say itself.
    pub within: Duration,
}

impl Settings {
    /// The same on the port of another rank: port + rank, so that a cluster on one machine has
    /// ports in a row; a free port stays one.
    ///
    /// # Errors
    /// An address without a port, or a port beyond the last.
    pub fn of_rank(&self, rank: usize) -> Result<Settings> {
        let (host, port) = match self.address.rsplit_once(':') {
            Some((host, port)) => (format!("{host}:"), port),
            None => (String::new(), self.address.as_str()),
        };
        let port: u16 = port.parse().with_context(|| format!("{}: no port", self.address))?;
        let port = match port {
            0 => Some(0),
            _ => u16::try_from(rank).ok().and_then(|rank| port.checked_add(rank)),
        };
        let port = port.with_context(|| format!("{}: no port for rank {rank}", self.address))?;
        Ok(Settings { address: format!("{host}{port}"), within: self.within })
    }
}

/// An address claimed for a node.
pub(super) struct Claimed {
    http: Http,
    within: Duration,
}

/// Claims the address; one that others can reach only where the user's own word allows it.
pub(super) async fn claim(settings: &Settings, insecure: bool) -> Result<Claimed> {
    let http = Http::bind(&settings.address).await;
    let http = http.with_context(|| format!("http on {}", settings.address))?;
    let address = http.address();
    ensure!(
        address.ip().is_loopback() || insecure,
        "http on {address}: it is not encrypted and asks nobody who he is; give a port of this \
         machine only, behind a proxy, or --insecure"
    );
    Ok(Claimed { http, within: settings.within })
}

impl Claimed {
    /// The address, with its real port.
    pub(super) fn address(&self) -> SocketAddr {
        self.http.address()
    }

    /// Answers from now on.
    pub(super) fn serve(self, asker: Arc<dyn Asker>) -> Serving {
        let limits = Limits { within: self.within, ..Limits::of_cluster(asker.nodes()) };
        let stop = CancellationToken::new();
        let task = self.http.serve(asker, Arc::new(picture), limits, stop.clone());
        Serving { task: tokio::spawn(task), stop }
    }
}

/// HTTP that is being answered; dropping it ends it.
pub(super) struct Serving {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Serving {
    /// Takes no more requests, and lets those at hand finish for a moment.
    pub(super) async fn stop(mut self) {
        self.stop.cancel();
        // A panic of the task has been reported by its hook.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A picture as the model's input.
fn picture(body: &Bytes, info: &ClusterInfo) -> Result<Vec<Tensor>, String> {
    let read = || -> Result<Vec<Tensor>> {
        let spec = input_spec(&info.inputs, &info.metadata).context("model")?;
        let array = input::picture(body.to_vec(), &spec)?;
        Ok(vec![Tensor::new(array.shape, array.data)?])
    };
    read().map_err(|error| crate::terminal::one_line(&error))
}

/// What is said of an address that others can reach.
pub(super) fn warning(address: SocketAddr) -> Option<String> {
    let open = !address.ip().is_loopback();
    open.then(|| format!("http on {address} is not encrypted, and asks nobody who he is"))
}

/// Runs `snn-run --local DIR --http ADDR`: serves until stopped.
pub(super) async fn local(local: args::Local) -> Result<ExitCode> {
    let folder = local.folder.display().to_string();
    let emulation = Emulation::new(local.device.as_ref(), local.link, local.threads)?;
    let options = LocalOptions {
        threads: local.threads,
        http: local.http.clone(),
        insecure: local.insecure,
        trace: local.trace.is_some(),
        emulation,
        ..LocalOptions::default()
    };
    let start = async { LocalCluster::start(&local.folder, options).await };
    let cluster = tokio::select! {
        cluster = start => cluster?,
        stopped = super::interrupted() => return stopped.map(|()| ExitCode::SUCCESS),
    };
    let addresses = cluster.http_addresses();
    ensure!(!addresses.is_empty(), "{folder}: no node says where it serves");
    for (rank, address) in addresses.iter().enumerate() {
        super::progress(format_args!("rank {rank}: http://{address}"));
    }
    tokio::select! {
        stopped = super::interrupted() => stopped?,
        error = cluster.failure() => return Err(error),
    }
    if let Some(path) = &local.trace {
        trace::write(&cluster.trace().await?, path)?;
    }
    cluster.stop().await.context(folder)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_ports_in_a_row() {
        let of = |address: &str, rank| {
            let settings = Settings { address: address.into(), within: Duration::ZERO };
            settings.of_rank(rank).map(|settings| settings.address).map_err(|e| e.to_string())
        };
        assert_eq!(of("8000", 3), Ok("8003".into()));
        assert_eq!(of("0.0.0.0:8000", 1), Ok("0.0.0.0:8001".into()));
        assert_eq!(of("[::1]:0", 2), Ok("[::1]:0".into()));
        assert_eq!(of("65535", 1), Err("65535: no port for rank 1".into()));
        assert_eq!(of("here", 1), Err("here: no port".into()));
    }
}
