//! A node on the network: its cluster on one side, those who ask on the other.
//!
//! [`Server::start`] takes an open [`Link`], a shard and the engine for it, and joins the cluster. The
//! entry node then answers inference requests and says what the model takes and gives; every node
//! reports what it has counted. A question that is too large, cannot be read, or comes while
//! [`MAX_ASKED`] others are being answered is refused with a reason; others are unharmed.
//! Shutting down, or dropping the server, ends every task it started.

use std::sync::Arc;

use bytes::Bytes;
use snn_schemas::wire::{self, Infer, Reply};
use tokio::task::JoinSet;
use zenoh::handlers::FifoChannelHandler;
use zenoh::query::{Query, Queryable};

use crate::client::{ClusterInfo, info_key, infer_key, report_key};
use crate::engine::Engine;
use crate::mailbox::MAX_WITHIN;
use crate::node::{Node, NodeReport, StartError};
use crate::shard::Shard;
use crate::transport::Transport;
use crate::transport::zenoh::{
    Identity, Link, LinkError, ZenohTransport, into_bytes, one_line, session_error,
};

/// Questions answered at once; each holds its input in memory until its answer is sent.
pub const MAX_ASKED: usize = 64;

/// A node on the network.
pub struct Server {
    node: Arc<Node>,
    link: Link,
    tasks: JoinSet<()>,
    // Last: peers hear that the node leaves once nobody is answered any more.
    transport: Arc<ZenohTransport>,
}

impl Server {
    /// Loads the shard, joins its cluster and answers from then on.
    ///
    /// # Errors
    /// What the engine cannot load, or why the link cannot be used.
    pub async fn start<E: Engine>(
        link: Link,
        shard: Shard,
        engine: impl FnOnce() -> E + Send + 'static,
    ) -> Result<Server, ServeError> {
        let info = shard.identity();
        let identity =
            Identity { split: info.split.clone(), rank: info.rank, nodes: info.nodes };
        let mut node = Node::load(&shard, engine).await?;
        // Joined first and ready to answer before anybody hears of the node.
        let mut tasks = JoinSet::new();
        let transport = Arc::new(link.join(&identity, node.sink()).await?);
        node.connect(Arc::clone(&transport) as Arc<dyn Transport>);
        let node = Arc::new(node);

        let report = queryable(&link, &report_key(&identity.split, identity.rank)).await?;
        tasks.spawn(answer_reports(report, Arc::clone(&node)));
        if node.is_entry() {
            let described = ClusterInfo {
                split: identity.split.clone(),
                nodes: identity.nodes,
                inputs: node.inputs().to_vec(),
                outputs: node.outputs().to_vec(),
                metadata: shard.metadata().to_vec(),
            };
            let described = Bytes::from(serde_json::to_vec(&described)?);
            let info = queryable(&link, &info_key(&identity.split)).await?;
            tasks.spawn(answer_info(info, described));
            let asked = queryable(&link, &infer_key(&identity.split)).await?;
            tasks.spawn(answer_questions(asked, Arc::clone(&node)));
        }
        Ok(Server { node, link, tasks, transport })
    }

    /// Ranks that are not there.
    pub fn missing(&self) -> Vec<usize> {
        self.node.missing().into_iter().collect()
    }

    /// What makes this node unable to take part, if anything does.
    pub fn fault(&self) -> Option<String> {
        self.node.fault()
    }

    /// What the node has counted.
    pub fn report(&self) -> NodeReport {
        self.node.report()
    }

    /// Leaves the cluster and ends every task and thread.
    pub async fn shutdown(self) {
        let Server { node, link, mut tasks, transport } = self;
        tasks.shutdown().await;
        if let Some(node) = Arc::into_inner(node) {
            node.shutdown().await;
        }
        drop(transport);
        if let Err(error) = link.close().await {
            tracing::debug!(%error, "session did not close cleanly");
        }
    }
}

type Questions = Queryable<FifoChannelHandler<Query>>;

async fn queryable(link: &Link, key: &str) -> Result<Questions, LinkError> {
    link.session().declare_queryable(key.to_owned()).complete(true).await.map_err(session_error)
}

async fn reply(query: &Query, key: String, payload: Bytes) {
    if let Err(error) = query.reply(key, payload).await {
        // Whoever asked has left, or its own deadline has passed.
        tracing::debug!(reason = one_line(&error), "answer not delivered");
    }
}

async fn answer_info(questions: Questions, described: Bytes) {
    while let Ok(query) = questions.recv_async().await {
        reply(&query, questions.key_expr().to_string(), described.clone()).await;
    }
}

async fn answer_reports(questions: Questions, node: Arc<Node>) {
    while let Ok(query) = questions.recv_async().await {
        match serde_json::to_vec(&node.report()) {
            Ok(report) => reply(&query, questions.key_expr().to_string(), report.into()).await,
            Err(error) => tracing::warn!(%error, "report not written"),
        }
    }
}

async fn answer_questions(questions: Questions, node: Arc<Node>) {
    let mut asked = JoinSet::new();
    let key = questions.key_expr().to_string();
    while let Ok(query) = questions.recv_async().await {
        while asked.try_join_next().is_some() {}
        let (node, key) = (Arc::clone(&node), key.clone());
        let is_full = asked.len() >= MAX_ASKED;
        asked.spawn(async move {
            let answer = match is_full {
                true => Reply::Failure(format!("{MAX_ASKED} questions are being answered already")),
                false => answer_question(&query, &node).await,
            };
            reply(&query, key, answer.encode()).await;
        });
    }
}

async fn answer_question(query: &Query, node: &Node) -> Reply {
    let question = query.payload().ok_or(wire::WireError::NoFrame).and_then(|payload| {
        let too_large = wire::WireError::TooLarge { bytes: payload.len() };
        Infer::decode(into_bytes(payload).ok_or(too_large)?)
    });
    match question {
        Err(error) => Reply::Failure(error.to_string()),
        Ok(Infer { within, inputs }) => match node.infer(inputs, within.min(MAX_WITHIN)).await {
            Ok(answer) => Reply::Answer(answer),
            Err(error) => Reply::Failure(error.to_string()),
        },
    }
}

/// Why a node cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The shard cannot be loaded.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The network cannot be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The description of the model cannot be written.
    #[error("description: {0}")]
    Json(#[from] serde_json::Error),
}
