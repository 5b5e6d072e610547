//! The side of those who deploy: agents found on the network, and what is asked of them.
//!
//! [`find`] gives the addresses of agents that have the same key; a [`Remote`] is one agent, asked over
//! a session of its own. Questions are asked again until they are answered or their time is up, and
//! files go on where the agent's copy ends: a link that breaks meanwhile costs time, nothing else.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use bytes::Bytes;
use zenoh::Session;
use zenoh::config::WhatAmI;

use super::server::scout_name;
use super::wire::{
    self, AGENT_KEY, Asker, Description, File, MAX_CHUNK, MAX_MESSAGE, Reply, Request, Version,
};
use crate::client::{AskError, ask, reach};
use crate::key::ClusterKey;
use crate::transport::zenoh::{
    LinkError, client_config, one_line, parse_address, place, scout_config,
};

/// How long an agent may take to accept a connection.
const REACH_WITHIN: Duration = Duration::from_secs(3);
/// How long a question may wait for its answer before it is asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// Pause before a question is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Most agents that are looked at: more than any cluster has nodes.
const MAX_FOUND: usize = 64;

/// Addresses of the agents that answer a call on the local network, in order, one an agent.
///
/// # Errors
/// A network that cannot be called on.
pub async fn find(key: Option<&ClusterKey>, within: Duration) -> Result<Vec<String>, RemoteError> {
    let error = |error: zenoh::Error| RemoteError::Scout { reason: one_line(&error) };
    let scout = zenoh::scout(WhatAmI::Peer, scout_config(&scout_name(key))?).await;
    let scout = scout.map_err(error)?;
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let deadline = tokio::time::Instant::now() + within;
    while let Ok(Ok(hello)) = tokio::time::timeout_at(deadline, scout.recv_async()).await {
        if found.len() < MAX_FOUND {
            let locators = hello.locators().iter().map(ToString::to_string).collect();
            found.insert(hello.zid().to_string(), locators);
        }
    }
    scout.stop();
    let mut addresses = Vec::new();
    for locators in found.into_values() {
        for locator in locators {
            // Anybody may have answered the call: connecting tells who has the key.
            let Ok(address) = parse_address(&locator, key) else { continue };
            if reach(address.clone(), REACH_WITHIN).await.is_ok() {
                addresses.push(place(&address).to_owned());
                break;
            }
        }
    }
    addresses.sort();
    // Whoever answers may give another's address for his.
    addresses.dedup();
    Ok(addresses)
}

/// What has been sent of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes that were there already.
    pub kept: u64,
    /// Bytes that were sent.
    pub sent: u64,
}

/// An agent.
#[derive(Debug)]
pub struct Remote {
    address: String,
    session: Session,
}

impl Remote {
    /// Connects to the agent at an address, `HOST:PORT`.
    ///
    /// # Errors
    /// Nobody listens there, or nobody who has the key.
    pub async fn connect(address: &str, key: Option<&ClusterKey>) -> Result<Remote, RemoteError> {
        let full = parse_address(address, key)?;
        reach(full.clone(), REACH_WITHIN).await?;
        let opened = zenoh::open(client_config(std::slice::from_ref(&full), key)?);
        let nobody = || RemoteError::NoAgent { address: address.to_owned() };
        let session = tokio::time::timeout(ANSWER_WITHIN, opened).await.map_err(|_| nobody())?;
        let session = session.map_err(|error| {
            tracing::debug!(reason = one_line(&error), "no session");
            nobody()
        })?;
        let remote = Remote { address: place(&full).to_owned(), session };
        remote.describe(ANSWER_WITHIN).await.map_err(|error| match error {
            RemoteError::Silent { .. } => nobody(),
            other => other,
        })?;
        Ok(remote)
    }

    /// Its address, `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its host.
    pub fn host(&self) -> &str {
        self.address.rsplit_once(':').map_or(&self.address, |(host, _)| host)
    }

    /// Who it is and what it runs.
    ///
    /// # Errors
    /// No answer within `within`.
    pub async fn describe(&self, within: Duration) -> Result<Description, RemoteError> {
        match self.ask(&Request::Describe {}, &[], within).await? {
            Reply::Described { agent } => Ok(*agent),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Asks something that is answered with [`Reply::Done`].
    ///
    /// # Errors
    /// The agent's refusal, or no answer within `within`.
    pub async fn order(&self, request: &Request, within: Duration) -> Result<(), RemoteError> {
        match self.ask(request, &[], within).await? {
            Reply::Done {} => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// A port that is free on the device.
    ///
    /// # Errors
    /// As [`Remote::order`].
    pub async fn reserve(&self, within: Duration) -> Result<u16, RemoteError> {
        match self.ask(&Request::Reserve {}, &[], within).await? {
            Reply::Reserved { port } => Ok(port),
            other => Err(self.unexpected(&other)),
        }
    }

    /// How many requests of clients a version still answers.
    ///
    /// # Errors
    /// As [`Remote::order`].
    pub async fn draining(
        &self,
        version: &Version,
        within: Duration,
    ) -> Result<usize, RemoteError> {
        match self.ask(&Request::Drain { version: version.clone() }, &[], within).await? {
            Reply::Draining { requests } => Ok(requests),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sends what the agent has not got of a file of `length` bytes. Each piece may take `within`.
    ///
    /// # Errors
    /// A file that cannot be read, the agent's refusal, or no answer in time.
    pub async fn send<R: Read + Seek>(
        &self,
        (version, file): (&Version, File),
        mut content: R,
        length: u64,
        within: Duration,
    ) -> Result<Sent, RemoteError> {
        let read = |source| RemoteError::Read { source };
        let first =
            self.ask(&Request::Have { version: version.clone(), file }, &[], within).await?;
        let Reply::Have { length: kept, complete } = first else {
            return Err(self.unexpected(&first));
        };
        if complete {
            return Ok(Sent { kept: length, sent: 0 });
        }
        // The last byte is always sent: with it the agent checks the whole.
        let kept = if kept < length { kept } else { 0 };
        let (mut at, mut sent) = (kept, 0);
        let mut piece = vec![0; MAX_CHUNK];
        loop {
            content.seek(SeekFrom::Start(at)).map_err(read)?;
            let size = usize::try_from(length - at).map_or(MAX_CHUNK, |left| left.min(MAX_CHUNK));
            content.read_exact(&mut piece[..size]).map_err(read)?;
            let last = at + size as u64 == length;
            let put = Request::Put { version: version.clone(), file, offset: at, last };
            match self.ask(&put, &piece[..size], within).await? {
                Reply::Have { complete: true, .. } => {
                    return Ok(Sent { kept, sent: sent + size as u64 });
                }
                Reply::Have { length: have, .. } if have < length => at = have,
                other => return Err(self.unexpected(&other)),
            }
            sent += size as u64;
        }
    }

    /// Asks, again and again, until there is an answer.
    async fn ask(
        &self,
        request: &Request,
        piece: &[u8],
        within: Duration,
    ) -> Result<Reply, RemoteError> {
        let message = wire::encode(&self.asker(), request, piece)?;
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answers =
                ask(&self.session, AGENT_KEY, message.clone(), left.min(ANSWER_WITHIN)).await?;
            if let Some(answer) = answers.into_iter().next() {
                return self.read(&answer);
            }
            if Instant::now() + ASK_AGAIN >= deadline {
                return Err(RemoteError::Silent { address: self.address.clone(), within });
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Asks with bytes as they are, once; gives the answer as it is, if there is one within `within`.
    /// Nothing is checked on this side: it shows what an agent makes of anything.
    ///
    /// # Errors
    /// The session has ended.
    pub async fn ask_raw(
        &self,
        message: Bytes,
        within: Duration,
    ) -> Result<Option<Bytes>, RemoteError> {
        Ok(ask(&self.session, AGENT_KEY, message, within).await?.into_iter().next())
    }

    fn read(&self, answer: &Bytes) -> Result<Reply, RemoteError> {
        if answer.len() > MAX_MESSAGE {
            return Err(wire::WireError::TooLarge { bytes: answer.len() }.into());
        }
        match wire::decode::<Reply>(answer)? {
            (_, Reply::Refused { reason }, _) => {
                Err(RemoteError::Refused { address: self.address.clone(), reason })
            }
            (_, reply, _) => Ok(reply),
        }
    }

    /// The session's own number: another of each process and agent.
    fn asker(&self) -> Asker {
        self.session.zid().to_le_bytes()
    }

    fn unexpected(&self, reply: &Reply) -> RemoteError {
        let reason = format!("unexpected answer {reply:?}");
        RemoteError::Refused { address: self.address.clone(), reason }
    }

    /// Disconnects.
    pub async fn close(&self) {
        if let Err(error) = self.session.close().await {
            tracing::debug!(reason = one_line(&error), "session did not close cleanly");
        }
    }
}

/// Why an agent cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// An address of another form.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Nobody listens, or the session has ended.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A message that is none.
    #[error(transparent)]
    Wire(#[from] wire::WireError),
    /// The local network cannot be called on.
    #[error("looking for agents: {reason}")]
    Scout {
        /// Zenoh's answer.
        reason: String,
    },
    /// Somebody listens there, but does not answer as an agent.
    #[error("{address}: no agent answers there, or none that has this key")]
    NoAgent {
        /// The address.
        address: String,
    },
    /// It answers no more.
    #[error("{address}: no answer within {} s", within.as_secs())]
    Silent {
        /// The address.
        address: String,
        /// How long it was waited for.
        within: Duration,
    },
    /// The agent's own reason.
    #[error("{address}: {reason}")]
    Refused {
        /// The address.
        address: String,
        /// In one sentence.
        reason: String,
    },
    /// The file that is sent cannot be read.
    #[error("read: {source}")]
    Read {
        /// The system's answer.
        source: std::io::Error,
    },
}

impl RemoteError {
    /// Whether nothing that was heard is of an agent with the same key: nobody, or somebody else, is there.
    pub fn is_of_stranger(&self) -> bool {
        matches!(self, RemoteError::NoAgent { .. } | RemoteError::Ask(_) | RemoteError::Wire(_))
    }
}
