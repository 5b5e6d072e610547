//! The asking side: questions to a running cluster, at the address of any of its nodes.
//!
//! [`Client::connect`] takes a node's address; the client's questions reach the whole cluster through
//! that node. It gives what the cluster takes and gives ([`ClusterInfo`]), the answers to inference
//! requests, what each node has counted, and traces ([`Client::record`]). Every question has a deadline;
//! every answer is bounded in size before it is decoded. Dropping a client disconnects it.

use std::collections::BTreeMap;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use snn_schemas::codec::Pixels;
use snn_schemas::manifest::Port;
use snn_schemas::metadata::Normalisation;
use snn_schemas::wire;

use crate::key::ClusterKey;
use crate::transport::zenoh::{LinkError, client_config, one_line, parse_address};
use crate::watch::{Recording, recording, trace};
use crate::{Answer, NodeReport, Tensor};

mod asking;
mod keys;

use asking::describe;
pub(crate) use asking::{Asked, Way, ask, infer, parse};
pub(crate) use keys::{
    all_keys, all_reports_key, door_key, infer_key, info_key, own_key, report_key, shard_key,
};

/// How long a node may take to accept a connection: beyond it, nobody is there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Largest question or answer that the process a client is connected to passes on packet by packet, in bytes.
/// One that is larger than the queue of a link would keep it from reading anything else meanwhile.
const PASSED_ON: usize = 256 << 10;
/// How long an answer to a question that is passed on may take: less than whoever asked waits for it.
const PASSED_ON_WITHIN: Duration = Duration::from_secs(4);

/// What a cluster takes and gives, as its entry node describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Identity of the split, 64 hexadecimal digits.
    pub split: String,
    /// Nodes of the cluster.
    pub nodes: usize,
    /// The model's inputs, in order.
    pub inputs: Vec<Port>,
    /// The model's outputs, in order.
    pub outputs: Vec<Port>,
    /// The model's metadata: normalisation, class names, its author's own.
    pub metadata: Vec<(String, String)>,
}

impl ClusterInfo {
    /// Most bytes of a question that the model can answer.
    pub(crate) fn question_bytes(&self) -> usize {
        let elements = |port: &Port| {
            let product = port.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
            product.unwrap_or(usize::MAX)
        };
        wire::Infer::most_bytes(self.inputs.iter().map(elements))
    }

    /// What pixels are worth to a model that takes a picture.
    fn pixels(&self) -> Option<Pixels> {
        let [Port { shape, .. }] = self.inputs.as_slice() else { return None };
        let [_, channels, _, _] = *shape.as_slice() else { return None };
        let metadata: BTreeMap<&str, &str> =
            self.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let get = |key: &str| metadata.get(key).copied();
        let normalisation =
            (channels <= wire::MAX_CHANNELS).then(|| Normalisation::read(get, channels).ok());
        normalisation.flatten().map(Pixels::new)
    }
}

/// A connection to a cluster.
#[derive(Debug)]
pub struct Client {
    asked: Asked,
    info: Arc<ClusterInfo>,
}

impl Client {
    /// Connects to any of the nodes at `addresses` and asks what its cluster takes and gives. Where
    /// that node dies later, the others are connected to.
    ///
    /// Published TLS links of zenoh (1.10) are read and written on two threads with nothing between them. This workspace
    /// has mended ones (`runtime/zenoh-link-tls`); a workspace of one's own that connects with a key needs the same entry
    /// in its `[patch.crates-io]`, or `ZENOH_RUNTIME="(rx: (handover: tx), tx: (worker_threads: 1))"` in its environment.
    ///
    /// # Errors
    /// [`AskError::Connect`] when nobody listens there; [`AskError::Strange`] when somebody else does;
    /// [`AskError::NoEntry`] when a node is there,
    /// but its cluster's entry node is not.
    pub async fn connect(
        addresses: &[String],
        key: Option<&ClusterKey>,
        within: Duration,
    ) -> Result<Client, AskError> {
        let addresses: Vec<String> = addresses
            .iter()
            .map(|address| parse_address(address, key))
            .collect::<Result<_, LinkError>>()?;
        let mut reached = Err(AskError::NoAddress);
        for address in &addresses {
            reached = reach(address.clone(), within.min(CONNECT_WITHIN)).await;
            if reached.is_ok() {
                break;
            }
        }
        reached?;
        let opened = zenoh::open(client_config(&addresses, key)?);
        let session = match tokio::time::timeout(within.max(CONNECT_WITHIN), opened).await {
            Ok(Ok(session)) => session,
            Ok(Err(error)) => {
                tracing::debug!(reason = one_line(&error), "session not opened");
                return Err(AskError::Strange);
            }
            Err(_) => return Err(AskError::NoAnswer { within }),
        };
        let info = describe(&session, "snn/*/info/*", within).await?;
        let asked = Asked::described(session, info);
        Ok(Client { info: asked.info(within).await?, asked })
    }

    /// What the cluster takes and gives.
    pub fn info(&self) -> &ClusterInfo {
        &self.info
    }

    /// Asks for one inference.
    ///
    /// # Errors
    /// The cluster's refusal in its own words, or that there was no answer in time.
    pub async fn infer(&self, inputs: Vec<Tensor>, within: Duration) -> Result<Answer, AskError> {
        let outputs = self.info.outputs.iter().map(|port| port.shape.iter().product::<usize>());
        let inputs_bytes = inputs.iter().map(|input| size_of_val(input.data()));
        let bytes = inputs_bytes.sum::<usize>().max(outputs.sum::<usize>() * size_of::<f32>());
        let way = if bytes > PASSED_ON { Way::Door } else { Way::Straight };
        infer(&self.asked, way, inputs, within).await
    }

    /// What each node has counted since it started, by rank; nodes that do not answer are left out.
    ///
    /// # Errors
    /// A connection that has ended, or a report that cannot be read.
    pub async fn reports(&self, within: Duration) -> Result<Vec<NodeReport>, AskError> {
        let key = all_reports_key(&self.info.split);
        let answers = ask(self.asked.session(), &key, Bytes::new(), within).await?;
        let mut reports =
            answers.iter().map(parse).collect::<Result<Vec<NodeReport>, AskError>>()?;
        reports.sort_by_key(|report| report.rank);
        Ok(reports)
    }

    /// What each node that records for itself has recorded since it was told to, on one time axis; nodes
    /// that do not answer are left out.
    ///
    /// # Errors
    /// A connection that has ended, or a record that cannot be read.
    pub async fn trace(&self, within: Duration) -> Result<Vec<trace::Aligned>, AskError> {
        recording::gather(&self.asked, self.info.nodes, None, within).await
    }

    /// Has every node that is there record from now on.
    ///
    /// # Errors
    /// [`AskError::Refused`] where a node records another trace, [`AskError::NoAnswer`] where none answers.
    pub async fn record(&self) -> Result<Recording, AskError> {
        Recording::begin(self.asked.clone(), self.info.nodes).await
    }

    /// Asks whoever answers under `key` of the cluster and a rank, for somebody else.
    pub(crate) async fn pass_on(
        &self,
        key: fn(&str, &str) -> String,
        rank: usize,
        question: Bytes,
    ) -> Result<Vec<Bytes>, AskError> {
        let key = all_keys(&key(self.asked.split(), &rank.to_string()));
        ask(self.asked.session(), &key, question, PASSED_ON_WITHIN).await
    }

    /// Disconnects.
    pub async fn close(&self) {
        if let Err(error) = self.asked.session().close().await {
            tracing::debug!(reason = one_line(&error), "session did not close cleanly");
        }
    }
}

/// Whether somebody listens there: the system's answer is clearer than zenoh's.
pub(crate) async fn reach(address: String, within: Duration) -> Result<(), AskError> {
    let connect = {
        let address = address.clone();
        move || {
            let place = address.split_once('/').map_or(address.as_str(), |(_, place)| place);
            let mut last = std::io::ErrorKind::AddrNotAvailable.into();
            for socket in place.to_socket_addrs()? {
                match TcpStream::connect_timeout(&socket, within) {
                    Ok(_) => return Ok(()),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    };
    match tokio::task::spawn_blocking(connect).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(AskError::Connect { address, source }),
        Err(_) => Err(AskError::Connect { address, source: std::io::ErrorKind::Other.into() }),
    }
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// An address of another form, or a setting that zenoh does not take.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Nobody listens at the address.
    #[error("nobody listens on {address}: {source}")]
    Connect {
        /// The address.
        address: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Nobody to ask.
    #[error("no address of a node is given")]
    NoAddress,
    /// Somebody listens, but is no node, or has another key.
    #[error("no node answers there, or none with the same key")]
    Strange,
    /// The session has ended.
    #[error("zenoh: {reason}")]
    Session {
        /// Zenoh's answer.
        reason: String,
    },
    /// The node is there, but not the one that answers.
    #[error("nobody serves the model yet")]
    NoEntry,
    /// Nothing came in time.
    #[error("no answer within {} s", within.as_secs_f64())]
    NoAnswer {
        /// The time given.
        within: Duration,
    },
    /// The cluster's own reason.
    #[error("{reason}")]
    Refused {
        /// In one sentence.
        reason: String,
    },
    /// An answer beyond every limit.
    #[error("the answer is too large")]
    TooLarge,
    /// A description or report that is none.
    #[error("the answer cannot be read: {0}")]
    Json(#[source] serde_json::Error),
    /// An answer that is none.
    #[error("the answer cannot be read: {0}")]
    Wire(#[from] wire::WireError),
}
