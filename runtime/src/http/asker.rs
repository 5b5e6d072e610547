//! How HTTP reaches a cluster: a trait, and its implementation on a node.
//!
//! An [`Asker`] says what the model takes, runs requests, and tells how the cluster is. A process of
//! the cluster ([`ClusterAsker`]) asks as a client would, over the session it has anyway: so whoever
//! computes the entry rank answers, and a request outlives the process that began it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use snn_schemas::metadata::ShardInfo;
use zenoh::Session;

use crate::client::{self, AskError, Asked, ClusterInfo, Way, all_reports_key, ask, parse};
use crate::node::NodeReport;
use crate::transport::BoxFuture;
use crate::watch::Event;
use crate::{Answer, Tensor};

/// How long nodes may take to report: longer, and they count as silent.
const REPORT_WITHIN: Duration = Duration::from_millis(300);

/// Why there is no answer, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unanswered(pub String);

impl From<AskError> for Unanswered {
    fn from(error: AskError) -> Unanswered {
        Unanswered(error.to_string())
    }
}

/// Reaches a cluster.
pub trait Asker: Send + Sync + 'static {
    /// What the cluster takes and gives.
    ///
    /// Gives [`Unanswered`] while nobody who knows is there.
    fn model(&self, within: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>>;

    /// Runs one request; ends within `within`, or soon after: it is dropped [`OVERDUE`](super::OVERDUE) later.
    fn infer(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Answer, Unanswered>>;

    /// What each node has counted, by rank; nodes that do not answer are left out.
    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>>;

    /// What this process knows of itself.
    fn own(&self) -> Own;

    /// How long a request may take where it does not say itself, if whoever serves the model says so;
    /// else that is the limit HTTP was started with.
    fn within(&self) -> Option<Duration> {
        None
    }

    /// How many nodes the cluster has.
    fn nodes(&self) -> usize;
}

/// What a process knows of itself, without asking anybody.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// What each of its ranks has counted.
    pub reports: Vec<NodeReport>,
    /// Ranks that nobody computes.
    pub missing: BTreeSet<usize>,
    /// What has happened lately, newest first.
    pub events: Vec<Event>,
    /// How often it has taken over a rank.
    pub takeovers: u64,
}

/// Tells what a process knows of itself.
type TellOwn = Box<dyn Fn() -> Own + Send + Sync>;

/// A process's way to its cluster.
pub struct ClusterAsker {
    asked: Asked,
    nodes: usize,
    own: TellOwn,
}

impl ClusterAsker {
    /// The way to the cluster of `info`, over the session of a process that `own` tells of.
    pub(crate) fn new(session: Session, info: &ShardInfo, own: TellOwn) -> ClusterAsker {
        let asked = Asked::new(session, info.split.clone());
        ClusterAsker { asked, nodes: info.nodes, own }
    }

    async fn ask_reports(&self) -> Vec<NodeReport> {
        let key = all_reports_key(self.asked.split());
        let answers =
            ask(self.asked.session(), &key, Bytes::new(), REPORT_WITHIN).await.unwrap_or_default();
        let mut reports: Vec<NodeReport> =
            answers.iter().filter_map(|answer| parse(answer).ok()).collect();
        reports.sort_by_key(|report| report.rank);
        reports
    }
}

impl Asker for ClusterAsker {
    fn model(&self, within: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
        Box::pin(async move { Ok(self.asked.info(within).await?) })
    }

    fn infer(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Answer, Unanswered>> {
        // The process that computes the entry rank answers, whoever that is, this one included.
        Box::pin(async move {
            let way = Way::Straight;
            Ok(client::infer(&self.asked, way, inputs, within).await?)
        })
    }

    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
        Box::pin(self.ask_reports())
    }

    fn own(&self) -> Own {
        (self.own)()
    }

    fn nodes(&self) -> usize {
        self.nodes
    }
}
