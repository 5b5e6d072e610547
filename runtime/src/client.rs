//! The asking side: questions to a running cluster, at the address of any of its nodes.
//!
//! [`Client::connect`] takes a node's address; the client's questions reach the whole cluster through
//! that node. It gives what the cluster takes and gives ([`ClusterInfo`]), the answers to inference
//! requests, and what each node has counted. Every question has a deadline; every answer is bounded
//! in size before it is decoded. Dropping a client disconnects it.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use snn_schemas::manifest::Port;
use snn_schemas::wire;
use zenoh::Session;
use zenoh::query::{ConsolidationMode, QueryTarget};

use crate::key::ClusterKey;
use crate::transport::zenoh::{
    LinkError, client_config, into_bytes, one_line, parse_address, split_prefix,
};
use crate::watch::{clock, trace};
use crate::{Answer, NodeReport, Tensor};

/// How long a node may take to accept a connection: beyond it, nobody is there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How much longer an answer may take where a node dies meanwhile: until that is noticed, another has
/// loaded its shard, and the request was run again.
const TAKEOVER: Duration = Duration::from_secs(5);
/// Pause before a question that nobody answered is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// What a question may take on the way, beyond the time given for its answer.
const TRAVEL: Duration = Duration::from_millis(500);
/// Largest question or answer that the process a client is connected to passes on packet by packet, in bytes.
/// One that is larger than the queue of a link would stop it: with a key it writes nothing while it reads.
const PASSED_ON: usize = 256 << 10;
/// Largest description or report accepted, in bytes: names of a thousand classes fit.
const MAX_JSON: usize = 1 << 20;

/// Key under which the entry node describes its cluster.
pub(crate) fn info_key(split: &str) -> String {
    format!("snn/{}/info", split_prefix(split))
}

/// Key under which the entry node answers.
pub(crate) fn infer_key(split: &str) -> String {
    format!("snn/{}/infer", split_prefix(split))
}

/// Key under which a process of the cluster asks the cluster for others.
pub(crate) fn door_key(split: &str, process: &str) -> String {
    format!("snn/{}/door/{process}", split_prefix(split))
}

/// Key under which the shard of a rank is handed out.
pub(crate) fn shard_key(split: &str, rank: &str) -> String {
    format!("snn/{}/shard/{rank}", split_prefix(split))
}

/// Key under which a node reports.
pub(crate) fn report_key(split: &str, rank: usize) -> String {
    format!("snn/{}/report/{rank}", split_prefix(split))
}

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

/// A connection to a cluster.
#[derive(Debug)]
pub struct Client {
    session: Session,
    info: ClusterInfo,
}

impl Client {
    /// Connects to any of the nodes at `addresses` and asks what its cluster takes and gives. Where
    /// that node dies later, the others are connected to.
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
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answers = ask(&session, "snn/*/info", Bytes::new(), left).await?;
            if let Some(json) = answers.into_iter().next() {
                return Ok(Client { info: parse(&json)?, session });
            }
            if Instant::now() + ASK_AGAIN >= deadline {
                return Err(AskError::NoEntry);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
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
        infer(&self.session, &self.info.split, way, inputs, within).await
    }

    /// What each node has counted since it started, by rank; nodes that do not answer are left out.
    ///
    /// # Errors
    /// A connection that has ended, or a report that cannot be read.
    pub async fn reports(&self, within: Duration) -> Result<Vec<NodeReport>, AskError> {
        let key = format!("snn/{}/report/*", split_prefix(&self.info.split));
        let answers = ask(&self.session, &key, Bytes::new(), within).await?;
        let mut reports =
            answers.iter().map(parse).collect::<Result<Vec<NodeReport>, AskError>>()?;
        reports.sort_by_key(|report| report.rank);
        Ok(reports)
    }

    /// What each node has recorded since it was told to, on one time axis; nodes that do not answer
    /// are left out.
    ///
    /// # Errors
    /// A connection that has ended, or a record that cannot be read.
    pub async fn trace(&self, within: Duration) -> Result<Vec<trace::Aligned>, AskError> {
        clock::gather(&self.session, (&self.info.split, self.info.nodes), within).await
    }

    /// Disconnects.
    pub async fn close(&self) {
        if let Err(error) = self.session.close().await {
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

/// Who is asked for an inference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Whoever computes the entry rank; processes in between pass the question on.
    Straight,
    /// The process that the session is connected to, which asks whoever that is by itself.
    Door,
}

impl Way {
    /// The key to ask under.
    async fn key(self, session: &Session, split: &str) -> String {
        match self {
            Way::Straight => infer_key(split),
            // A router asks nobody, and passes on whatever it is given.
            Way::Door => match session.info().peers_zid().await.next() {
                Some(process) => door_key(split, &process.to_string()),
                None => infer_key(split),
            },
        }
    }
}

/// Asks a cluster for one inference; asks again where its entry node dies meanwhile.
pub(crate) async fn infer(
    session: &Session,
    split: &str,
    way: Way,
    inputs: Vec<Tensor>,
    within: Duration,
) -> Result<Answer, AskError> {
    let question = wire::Infer { within, inputs }.encode();
    let deadline = Instant::now() + within + TAKEOVER;
    loop {
        let key = way.key(session, split).await;
        // Where the entry node dies, the question ends without an answer, and another is asked.
        let left = deadline.saturating_duration_since(Instant::now());
        let answers = ask(session, &key, question.clone(), left).await?;
        if let Some(answer) = answers.into_iter().next() {
            return match wire::Reply::decode(answer)? {
                wire::Reply::Answer(answer) => Ok(answer),
                wire::Reply::Failure(reason) => Err(AskError::Refused { reason }),
            };
        }
        if Instant::now() + ASK_AGAIN >= deadline {
            return Err(AskError::NoAnswer { within });
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Asks everybody who answers under `key`, and gathers their answers until all have answered.
pub(crate) async fn ask(
    session: &Session,
    key: &str,
    question: Bytes,
    within: Duration,
) -> Result<Vec<Bytes>, AskError> {
    let error = |error: zenoh::Error| AskError::Session { reason: one_line(&error) };
    let replies = session
        .get(key)
        .payload(question)
        .target(QueryTarget::All)
        .consolidation(ConsolidationMode::None)
        .timeout(within + TRAVEL)
        .await
        .map_err(error)?;
    let mut answers = Vec::new();
    while let Ok(reply) = replies.recv_async().await {
        // An error reply is zenoh's own, at the end of the time given: it is no answer.
        if let Ok(sample) = reply.into_result() {
            answers.push(into_bytes(sample.payload()).ok_or(AskError::TooLarge)?);
        }
    }
    Ok(answers)
}

pub(crate) fn parse<T: for<'a> Deserialize<'a>>(json: &Bytes) -> Result<T, AskError> {
    if json.len() > MAX_JSON {
        return Err(AskError::TooLarge);
    }
    serde_json::from_slice(json).map_err(AskError::Json)
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
