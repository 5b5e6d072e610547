//! HTTP beside a node: the address it has, the pictures it takes, and a local cluster that only serves.
//!
//! Takes what the command line says of HTTP; claims the address before anything is loaded, answers
//! from then on (requests wait for the node to be part of its cluster), and ends before the node does.
//! Pictures become the model's input as those of `snn-run infer` do; what they take of memory is bounded
//! more narrowly, for it is strangers who send them.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use snn_runtime::Tensor;
use snn_runtime::client::ClusterInfo;
use snn_runtime::http::{Asker, Http, Limits, Tls};
use snn_runtime::key::ClusterKey;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::emulation::Emulation;
use super::infer::input_spec;
use super::local::{LocalCluster, LocalOptions};
use super::{args, input, trace};

/// Largest certificate or private key accepted, in bytes: a chain of a few takes ten thousand.
const MAX_PEM_BYTES: u64 = 64 << 10;

/// Where HTTP is served, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `PORT`, on this machine only, or `HOST:PORT`; port 0 takes a free one.
    pub address: String,
    /// How long a request may take, where it does not say itself.
    pub within: Duration,
    /// Whether it is HTTPS.
    pub encryption: Encryption,
}

/// How HTTP is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Encryption {
    /// Not at all.
    #[default]
    None,
    /// With certificates of the cluster's own authority, which is in its key.
    Cluster,
    /// With a certificate of the owner's own.
    Own {
        /// The certificate, PEM, followed by those of authorities in between.
        certificate: PathBuf,
        /// Its private key, PEM.
        private_key: PathBuf,
    },
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
        Ok(Settings { address: format!("{host}{port}"), ..self.clone() })
    }
}

/// An address claimed for a node.
pub(super) struct Claimed {
    http: Http,
    within: Duration,
    url: Url,
}

/// Claims the address; one that others can reach only where nothing is said there in the clear, or the
/// user's own word allows it. Where it is not allowed, `may_encrypt` says whether HTTPS could be asked for.
pub(super) async fn claim(
    settings: &Settings,
    key: Option<&ClusterKey>,
    insecure: bool,
    may_encrypt: bool,
) -> Result<Claimed> {
    let tls = settings.tls(key)?;
    let encrypted = tls.is_some();
    let scheme = if encrypted { "https" } else { "http" };
    let place = &settings.address;
    let port = place.rsplit_once(':').map_or(place.as_str(), |(_, port)| port);
    ensure!(port.parse::<u16>().is_ok(), "{scheme} on {place}: expected PORT or HOST:PORT");
    let http = Http::bind(place).await;
    let http = http.with_context(|| format!("{scheme} on {}", settings.address))?;
    let http = match tls {
        Some(tls) => http.encrypted(tls),
        None => http,
    };
    let url = Url { address: http.address(), encrypted };
    let encrypt = if may_encrypt { "--https in its place, " } else { "" };
    ensure!(
        encrypted || !url.is_open() || insecure,
        "http on {}: it is not encrypted and asks nobody who he is; give {encrypt}a port of \
         this machine only, behind a proxy, or --insecure",
        url.address
    );
    Ok(Claimed { http, within: settings.within, url })
}

impl Settings {
    /// What encrypts it.
    fn tls(&self, key: Option<&ClusterKey>) -> Result<Option<Tls>> {
        match (&self.encryption, key) {
            (Encryption::None, _) => Ok(None),
            (Encryption::Cluster, Some(key)) => Ok(Some(Tls::of_cluster(key).context("https")?)),
            (Encryption::Cluster, None) => bail!(
                "https on {}: it needs a certificate; give --key FILE, or --https-cert FILE and --https-key FILE",
                self.address
            ),
            (Encryption::Own { certificate, private_key }, _) => {
                let certificates = pem(certificate, |_| Ok(()))?;
                let key = pem(private_key, |file| crate::key::check_hidden(file, private_key))?;
                let of_files = || format!("{}: https", certificate.display());
                Ok(Some(Tls::of_pem(&certificates, &key).with_context(of_files)?))
            }
        }
    }
}

/// A file of certificates or of a key, once it has passed a check.
fn pem(path: &Path, check: impl Fn(&File) -> Result<()>) -> Result<Vec<u8>> {
    let read = || -> Result<Vec<u8>> {
        let file = File::open(path)?;
        check(&file)?;
        let mut bytes = Vec::new();
        file.take(MAX_PEM_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().context("https").with_context(|| path.display().to_string())
}

/// Where HTTP is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Url {
    /// The address, with its real port.
    pub(super) address: SocketAddr,
    encrypted: bool,
}

impl Url {
    fn is_open(&self) -> bool {
        !self.address.ip().is_loopback()
    }

    /// What is said of an address that others can reach.
    pub(super) fn warning(&self) -> Option<String> {
        let address = self.address;
        self.is_open().then(|| match self.encrypted {
            true => format!("https on {address} asks nobody who he is"),
            false => format!("http on {address} is not encrypted, and asks nobody who he is"),
        })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.encrypted { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.address)
    }
}

impl Claimed {
    /// Where it is answered.
    pub(super) fn url(&self) -> Url {
        self.url
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
        let array = input::picture(body, &spec)?;
        Ok(vec![Tensor::new(array.shape, array.data)?])
    };
    read().map_err(|error| crate::terminal::one_line(&error))
}

/// Runs `snn-run --local DIR --http ADDR`: serves until stopped.
pub(super) async fn local(local: args::Local) -> Result<ExitCode> {
    let folder = local.folder.display().to_string();
    if let Some(path) = &local.trace {
        super::check_place(path).context("trace")?;
    }
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
            let (within, encryption) = (Duration::ZERO, Encryption::None);
            let settings = Settings { address: address.into(), within, encryption };
            settings.of_rank(rank).map(|settings| settings.address).map_err(|e| e.to_string())
        };
        assert_eq!(of("8000", 3), Ok("8003".into()));
        assert_eq!(of("0.0.0.0:8000", 1), Ok("0.0.0.0:8001".into()));
        assert_eq!(of("[::1]:0", 2), Ok("[::1]:0".into()));
        assert_eq!(of("65535", 1), Err("65535: no port for rank 1".into()));
        assert_eq!(of("here", 1), Err("here: no port".into()));
    }
}
