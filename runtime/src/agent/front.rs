//! Where clients ask a device whatever version it runs: the addresses stay, the version changes.
//!
//! A [`Front`] stands before one cluster at a time, and is an [`Asker`], so HTTP is answered through
//! it; [`answer`] does the same for `snn-run infer`, and passes on what is asked for a trace. A request
//! is answered by the version that was current when it came: [`Front::switch`] gives the old one back,
//! still connected, and [`Backend::requests`] tells how many requests it still has to answer. So a
//! version is replaced without a failed request, and without a connection that clients lose.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use snn_schemas::wire::MAX_FRAME;

use super::wire::{Settings, Version};
use crate::client::{AskError, Client, ClusterInfo, door_key, infer_key, info_key, own_key};
use crate::http::{Asker, Own, Unanswered};
use crate::key::ClusterKey;
use crate::questions::{Questions, answer_questions, queryable, reply};
use crate::transport::BoxFuture;
use crate::transport::zenoh::{Link, LinkError, into_bytes};
use crate::watch::Log;
use crate::watch::clock::clock_key;
use crate::watch::recording::trace_key;
use crate::{Answer, NodeReport, Tensor};

/// What a front calls its cluster, in the place of a split that may change.
const FRONT: &str = "front";
/// How long nodes may take to report: longer, and they count as silent.
const REPORT_WITHIN: Duration = Duration::from_millis(300);

/// A version that can be asked.
#[derive(Debug)]
pub struct Backend {
    version: Version,
    rank: usize,
    settings: Settings,
    client: Client,
    info: Arc<ClusterInfo>,
    reports: Mutex<Vec<NodeReport>>,
}

impl Backend {
    /// Connects to the cluster of which `addresses` are nodes, the device's own, of `rank`, first.
    ///
    /// # Errors
    /// Nobody answers there within `within`.
    pub async fn connect(
        (version, rank, settings): (Version, usize, Settings),
        addresses: &[String],
        key: Option<&ClusterKey>,
        within: Duration,
    ) -> Result<Arc<Backend>, AskError> {
        let client = Client::connect(addresses, key, within).await?;
        let (info, reports) = (Arc::new(client.info().clone()), Mutex::default());
        let backend = Backend { version, rank, settings, client, info, reports };
        // Who asks whether it is ready once it is current must not be told that all nodes are missing.
        backend.ask_reports().await;
        Ok(Arc::new(backend))
    }

    /// The version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// How many requests it still has to answer, once it is current no more and `self` is the only
    /// other one who holds it.
    pub fn requests(self: &Arc<Self>) -> usize {
        Arc::strong_count(self) - 1
    }

    /// Disconnects.
    pub async fn close(&self) {
        self.client.close().await;
    }

    async fn ask_reports(&self) -> Vec<NodeReport> {
        let reports = self.client.reports(REPORT_WITHIN).await.unwrap_or_default();
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&reports);
        reports
    }

    fn own(&self) -> (Vec<NodeReport>, BTreeSet<usize>) {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        let there: BTreeSet<usize> = reports.iter().map(|report| report.rank).collect();
        let missing = (0..self.info.nodes).filter(|rank| !there.contains(rank)).collect();
        (reports.iter().filter(|report| report.rank == self.rank).cloned().collect(), missing)
    }
}

/// Who computes a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    /// Its own process.
    Home,
    /// The process of another rank.
    Guest(usize),
    /// Nobody.
    Empty,
}

impl Seat {
    /// Who computes each of `nodes` ranks, by what those that are there report.
    fn all(nodes: usize, reports: &[NodeReport]) -> Vec<Seat> {
        let mut seats = vec![Seat::Empty; nodes];
        for report in reports {
            if let Some(seat) = seats.get_mut(report.rank) {
                *seat = report.guest_of.map_or(Seat::Home, Seat::Guest);
            }
        }
        seats
    }

    /// What is said when it becomes so.
    fn news(self, rank: usize) -> String {
        match self {
            Seat::Home => format!("rank {rank} is there"),
            Seat::Guest(host) => format!("rank {rank} is gone, the node of rank {host} stands in"),
            Seat::Empty => format!("rank {rank} is gone"),
        }
    }
}

/// What clients ask.
#[derive(Default)]
pub struct Front {
    current: RwLock<Option<Arc<Backend>>>,
    /// Who computed each rank of a version when last seen.
    seats: Mutex<Option<(Version, Vec<Seat>)>>,
    log: Log,
}

impl Front {
    /// Answers with another version from now on, or with none; gives the one before.
    pub fn switch(&self, next: Option<Arc<Backend>>) -> Option<Arc<Backend>> {
        self.log.note(match &next {
            Some(next) => format!("version {} answers", next.version),
            None => "nothing answers any more".to_owned(),
        });
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut current, next)
    }

    /// The version that answers.
    pub fn current(&self) -> Option<Arc<Backend>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the nodes how they are, so that [`Asker::own`] knows.
    pub async fn look(&self) {
        if let Some(backend) = self.current() {
            let reports = backend.ask_reports().await;
            self.note_seats(&backend, &reports);
        }
    }

    /// Notes which ranks have another place than when last seen.
    fn note_seats(&self, backend: &Backend, reports: &[NodeReport]) {
        let now = Seat::all(backend.info.nodes, reports);
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((version, before)) = seats.as_ref()
            && *version == backend.version
        {
            for (rank, (seat, _)) in
                now.iter().zip(before).enumerate().filter(|(_, (now, before))| now != before)
            {
                self.log.note(seat.news(rank));
            }
        }
        *seats = Some((backend.version.clone(), now));
    }

    fn backend(&self) -> Result<Arc<Backend>, Unanswered> {
        self.current().ok_or_else(|| Unanswered("nothing is deployed here".to_owned()))
    }

    async fn ask(&self, inputs: Vec<Tensor>, within: Duration) -> Result<Answer, Unanswered> {
        // Held until the answer is there: so the version counts it.
        let backend = self.backend()?;
        Ok(backend.client.infer(inputs, within).await?)
    }
}

impl Asker for Front {
    fn model(&self, _: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
        Box::pin(async { Ok(Arc::clone(&self.backend()?.info)) })
    }

    fn infer(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Answer, Unanswered>> {
        Box::pin(self.ask(inputs, within))
    }

    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
        Box::pin(async {
            match self.current() {
                Some(backend) => backend.ask_reports().await,
                None => Vec::new(),
            }
        })
    }

    fn own(&self) -> Own {
        let events = self.log.latest();
        match self.current() {
            Some(backend) => {
                let (reports, missing) = backend.own();
                let takeovers = reports.iter().map(|report| report.takeovers).sum();
                Own { reports, missing, events, takeovers }
            }
            // Rank 0 of nothing: so that nobody counts it as ready.
            None => Own { missing: BTreeSet::from([0]), events, ..Own::default() },
        }
    }

    fn within(&self) -> Option<Duration> {
        self.current()?.settings.within_ms.map(Duration::from_millis)
    }

    fn nodes(&self) -> usize {
        self.current().map_or(0, |backend| backend.info.nodes)
    }
}

/// Answers, at the address of `link`, what [`Client`]s ask, until it is dropped. Those whose inputs are too
/// large to be passed on ask at its door, as at a node's.
///
/// # Errors
/// A link that has ended.
pub async fn answer(link: Link, front: Arc<Front>) -> Result<(), LinkError> {
    let about = queryable(&link, &own_key(&info_key(FRONT), &link.id())).await?;
    let asked = queryable(&link, &own_key(&infer_key(FRONT), &link.id())).await?;
    let door = queryable(&link, &door_key(FRONT, &link.id())).await?;
    let times = queryable(&link, &own_key(&clock_key(FRONT, "*"), &link.id())).await?;
    let lanes = queryable(&link, &own_key(&trace_key(FRONT, "*"), &link.id())).await?;
    let (asks, describes) = (Arc::clone(&front), Arc::clone(&front));
    // Without a version every question is refused for that.
    let limit = move || {
        let info = describes.current().map(|backend| Arc::clone(&backend.info));
        std::future::ready(info.map_or(MAX_FRAME, |info| info.question_bytes()))
    };
    let ask = move |inputs, within| {
        let front = Arc::clone(&asks);
        async move { front.ask(inputs, within).await }
    };
    tokio::join!(
        pass_on(times, &link, &front, clock_key),
        pass_on(lanes, &link, &front, trace_key),
        async {
            while let Ok(query) = about.recv_async().await {
                // Without a version there is nothing to tell: the question ends unanswered.
                if let Some(info) = describe(&front) {
                    reply(&query, about.key_expr().to_string(), info).await;
                }
            }
        },
        answer_questions(asked, limit.clone(), ask.clone()),
        answer_questions(door, limit, ask),
    );
    Ok(())
}

/// Passes on to the version that answers what is asked of one of its ranks.
async fn pass_on(questions: Questions, link: &Link, front: &Front, key: fn(&str, &str) -> String) {
    while let Ok(query) = questions.recv_async().await {
        // Held until the answer is there: so the version counts it.
        let Some(backend) = front.current() else { continue };
        let rank = rank_of(query.key_expr().as_str());
        let Some(rank) = rank.filter(|&rank| rank < backend.info.nodes) else { continue };
        let question = query.payload().and_then(into_bytes).unwrap_or_default();
        match backend.client.pass_on(key, rank, question).await {
            Ok(answers) => {
                let key = own_key(&key(FRONT, &rank.to_string()), &link.id());
                for answer in answers {
                    reply(&query, key.clone(), answer).await;
                }
            }
            Err(error) => tracing::debug!(rank, %error, "not passed on"),
        }
    }
}

/// The rank in the key of a question: what stands before the process that is asked.
fn rank_of(key: &str) -> Option<usize> {
    key.rsplit('/').nth(1)?.parse().ok()
}

fn describe(front: &Front) -> Option<Bytes> {
    let mut info = ClusterInfo::clone(&front.current()?.info);
    FRONT.clone_into(&mut info.split);
    serde_json::to_vec(&info).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_of_a_question_stands_in_its_key() {
        assert_eq!(rank_of(&own_key(&trace_key(FRONT, "12"), "*")), Some(12));
        assert_eq!(rank_of(&own_key(&clock_key(FRONT, "*"), "*")), None);
        assert_eq!(rank_of("3"), None);
    }

    #[test]
    fn who_computes_a_rank_is_read_from_the_reports() {
        let report = |rank, guest_of| NodeReport { rank, guest_of, ..NodeReport::default() };
        let seats = Seat::all(4, &[report(0, None), report(2, Some(0)), report(9, None)]);
        assert_eq!(seats, [Seat::Home, Seat::Empty, Seat::Guest(0), Seat::Empty]);
        assert_eq!(seats[2].news(2), "rank 2 is gone, the node of rank 0 stands in");
    }
}
