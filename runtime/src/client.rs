//! The asking side: questions to a running cluster, at the address of any of its nodes.
//!
//! [`Client::connect`] takes a node's address; the client's questions reach the whole cluster through
//! that node. It gives what the cluster takes and gives ([`ClusterInfo`]), the answers to inference
//! requests, what each node has counted, and traces ([`Client::record`]). Every question has a deadline;
//! every answer is bounded in size before it is decoded. Dropping a client disconnects it.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use snn_schemas::manifest::Port;
use snn_schemas::wire;
use tokio::sync::{OnceCell, mpsc};
use zenoh::Session;
use zenoh::key_expr::KeyExpr;
use zenoh::query::{ConsolidationMode, QueryTarget};

use crate::key::ClusterKey;
use crate::transport::zenoh::{
    LinkError, client_config, into_bytes, one_line, parse_address, split_prefix,
};
use crate::watch::{Recording, recording, trace};
use crate::{Answer, NodeReport, Tensor};

/// How long a node may take to accept a connection: beyond it, nobody is there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How much longer an answer may take where a node dies meanwhile: until that is noticed, another has
/// loaded its shard, and the request was run again.
const TAKEOVER: Duration = Duration::from_secs(5);
/// Pause before a question that nobody answered is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How long nothing may be heard of a question before it is asked once more: whoever works on it says so
/// more often than twice in that time ([`WORKING_EVERY`](crate::questions::WORKING_EVERY)). Then twice as
/// long, and so on: silence may mean that the cluster has too much to do.
const SILENCE: Duration = Duration::from_millis(600);
/// What a question may take on the way, beyond the time given for its answer.
const TRAVEL: Duration = Duration::from_millis(500);
/// Largest question or answer that the process a client is connected to passes on packet by packet, in bytes.
/// One that is larger than the queue of a link would stop it: with a key it writes nothing while it reads.
const PASSED_ON: usize = 256 << 10;
/// How long whoever computes the entry rank may take to say what the model takes.
const DESCRIBE_WITHIN: Duration = Duration::from_millis(300);
/// How long an answer to a question that is passed on may take: less than whoever asked waits for it.
const PASSED_ON_WITHIN: Duration = Duration::from_secs(4);
/// Largest description or report accepted, in bytes: names of a thousand classes fit.
const MAX_JSON: usize = 1 << 20;

/// Key under which one process answers what is asked under `key`. Each has its own: where several answer
/// under one and the same, and one of them stops, zenoh 1.10 forgets to take it off the routes it has worked
/// out, and once that process dies questions are sent to nobody and end unanswered, at their deadline.
pub(crate) fn own_key(key: &str, process: &str) -> String {
    format!("{key}/{process}")
}

/// Key under which everybody is asked who answers under `key`.
pub(crate) fn all_keys(key: &str) -> String {
    format!("{key}/*")
}

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

/// Key under which the shard of a rank is handed out; of `*` those of all ranks.
pub(crate) fn shard_key(split: &str, rank: &str) -> String {
    format!("snn/{}/shard/{rank}", split_prefix(split))
}

/// Key under which a node reports.
pub(crate) fn report_key(split: &str, rank: usize) -> String {
    format!("snn/{}/report/{rank}", split_prefix(split))
}

/// Key under which all nodes are asked for their reports.
pub(crate) fn all_reports_key(split: &str) -> String {
    format!("snn/{}/report/*/*", split_prefix(split))
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

impl ClusterInfo {
    /// Most bytes of a question that the model can answer.
    pub(crate) fn question_bytes(&self) -> usize {
        let elements = |port: &Port| {
            let product = port.shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
            product.unwrap_or(usize::MAX)
        };
        wire::Infer::most_bytes(self.inputs.iter().map(elements))
    }
}

/// A cluster that is asked for inferences over a session.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    session: Session,
    split: String,
    everybody: Arc<OnceCell<KeyExpr<'static>>>,
    question_bytes: Arc<OnceCell<usize>>,
}

impl Asked {
    pub(crate) fn new(session: Session, split: String) -> Asked {
        Asked { session, split, everybody: Arc::default(), question_bytes: Arc::default() }
    }

    /// The session.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// The cluster's split.
    pub(crate) fn split(&self) -> &str {
        &self.split
    }

    /// Most bytes of a question that the model can answer; what a frame may have, until somebody says what
    /// the model takes.
    pub(crate) async fn question_bytes(&self) -> usize {
        let bytes = self.question_bytes.get_or_try_init(|| async {
            let key = all_keys(&info_key(&self.split));
            Ok::<_, AskError>(
                describe(&self.session, &key, DESCRIBE_WITHIN).await?.question_bytes(),
            )
        });
        bytes.await.copied().unwrap_or(wire::MAX_FRAME)
    }

    /// The key under which whoever computes the entry rank is asked. It is declared: of a key with `*` that
    /// nobody has declared zenoh works out for each question anew who answers under it.
    async fn everybody(&self) -> Result<KeyExpr<'static>, AskError> {
        let declared = self.everybody.get_or_try_init(|| async {
            self.session.declare_keyexpr(all_keys(&infer_key(&self.split))).await
        });
        let error = |error: zenoh::Error| AskError::Session { reason: one_line(&error) };
        declared.await.cloned().map_err(error)
    }
}

/// A connection to a cluster.
#[derive(Debug)]
pub struct Client {
    asked: Asked,
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
        let info = describe(&session, "snn/*/info/*", within).await?;
        Ok(Client { asked: Asked::new(session, info.split.clone()), info })
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
        let answers = ask(&self.asked.session, &key, Bytes::new(), within).await?;
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
        let key = all_keys(&key(&self.asked.split, &rank.to_string()));
        ask(&self.asked.session, &key, question, PASSED_ON_WITHIN).await
    }

    /// Disconnects.
    pub async fn close(&self) {
        if let Err(error) = self.asked.session.close().await {
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
    async fn key(self, asked: &Asked) -> Result<KeyExpr<'static>, AskError> {
        let door = match self {
            Way::Straight => None,
            // A router asks nobody, and passes on whatever it is given.
            Way::Door => asked.session.info().peers_zid().await.next(),
        };
        match door {
            Some(process) => {
                let key = KeyExpr::new(door_key(&asked.split, &process.to_string()));
                key.map_err(|error| AskError::Session { reason: one_line(&error) })
            }
            None => asked.everybody().await,
        }
    }
}

/// Asks a cluster for one inference. Asks again where its entry node dies meanwhile, and where nothing is
/// heard of the question for a while: it may have been sent to somebody who was about to die, or the answer
/// lost on the way back. Whoever is asked twice answers the same, and the first answer counts; a refusal
/// counts only once nobody else is working on the question.
pub(crate) async fn infer(
    cluster: &Asked,
    way: Way,
    inputs: Vec<Tensor>,
    within: Duration,
) -> Result<Answer, AskError> {
    let question = wire::Infer { within, inputs }.encode();
    let deadline = Instant::now() + within + TAKEOVER;
    let (hear, mut heard) = mpsc::unbounded_channel();
    let (mut asked, mut silence, mut refusal) = (0, SILENCE, None);
    loop {
        let key = way.key(cluster).await?;
        let left = deadline.saturating_duration_since(Instant::now());
        ask_once(&cluster.session, &key, question.clone(), left, hear.clone()).await?;
        asked += 1;
        while asked > 0 {
            // A question that has ended on its way has nothing more to say, and is not waited for.
            let left = deadline.saturating_duration_since(Instant::now()) + TRAVEL;
            match tokio::time::timeout(silence.min(left), heard.recv()).await {
                Ok(Some(Heard::Reply(reply))) => match wire::Reply::decode(reply?)? {
                    wire::Reply::Answer(answer) => return Ok(answer),
                    wire::Reply::Failure(reason) => refusal = Some(reason),
                    wire::Reply::Working => {}
                },
                Ok(Some(Heard::End)) => asked -= 1,
                // Never closed: this function has a sender itself.
                Ok(None) => break,
                Err(_) => {
                    tracing::debug!(?silence, "nothing is heard of a question");
                    silence *= 2;
                    break;
                }
            }
        }
        if let Some(reason) = refusal {
            return Err(AskError::Refused { reason });
        }
        if Instant::now() + ASK_AGAIN >= deadline {
            return Err(AskError::NoAnswer { within });
        }
        if asked == 0 {
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// What is heard of a question.
enum Heard {
    /// Somebody's reply.
    Reply(Result<Bytes, AskError>),
    /// Everybody who was asked has answered, or is gone.
    End,
}

/// Says [`Heard::End`] when it is dropped.
struct Hearing(mpsc::UnboundedSender<Heard>);

impl Drop for Hearing {
    fn drop(&mut self) {
        // Whoever asked may have its answer, and be gone.
        let _ = self.0.send(Heard::End);
    }
}

/// Asks everybody who answers under `key`, and tells `hear` of each reply, and of the end.
async fn ask_once(
    session: &Session,
    key: &KeyExpr<'static>,
    question: Bytes,
    within: Duration,
    hear: mpsc::UnboundedSender<Heard>,
) -> Result<(), AskError> {
    let hearing = Hearing(hear);
    let on_reply = move |reply: zenoh::query::Reply| {
        // An error reply is zenoh's own, at the end of the time given: it is no answer.
        if let Ok(sample) = reply.into_result() {
            let reply = into_bytes(sample.payload()).ok_or(AskError::TooLarge);
            let _ = hearing.0.send(Heard::Reply(reply));
        }
    };
    let asked = session
        .get(key)
        .payload(question)
        .target(QueryTarget::All)
        .consolidation(ConsolidationMode::None)
        .timeout(within + TRAVEL)
        .callback(on_reply);
    asked.await.map_err(|error| AskError::Session { reason: one_line(&error) })
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

/// What the model takes and gives, as the first says who answers under `key`. It is asked again until somebody
/// does: a session that has just joined, or that lost its peers for a moment, does not know of everybody yet.
///
/// # Errors
/// [`AskError::NoEntry`] when nobody has answered in time.
pub(crate) async fn describe(
    session: &Session,
    key: &str,
    within: Duration,
) -> Result<ClusterInfo, AskError> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Some(json) = ask(session, key, Bytes::new(), left).await?.first() {
            return parse(json);
        }
        if Instant::now() + ASK_AGAIN >= deadline {
            return Err(AskError::NoEntry);
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::questions::{Questions, answer_questions, queryable, reply};
    use crate::transport::zenoh::{Link, Options};

    const SPLIT: &str = "0123456789abcdef";
    /// Time given for an answer: what ends within less has not waited for it to pass.
    const WITHIN: Duration = Duration::from_secs(20);
    /// How long a machine with other work may take for what takes milliseconds.
    const SOON: Duration = Duration::from_secs(5);

    async fn link(peers: &[&Link]) -> Link {
        let peers = peers.iter().map(|link| link.address().to_owned()).collect();
        Link::open(&Options { peers, ..Options::default() }).await.unwrap()
    }

    async fn asked(link: &Link, name: &str) -> Questions {
        queryable(link, &own_key(&infer_key(SPLIT), name)).await.unwrap()
    }

    fn answer_of(number: f32) -> wire::Answer {
        let outputs = vec![Tensor::new(vec![1], vec![number]).unwrap()];
        wire::Answer { outputs, degraded: false }
    }

    async fn any_size() -> usize {
        wire::MAX_FRAME
    }

    /// Answers every question in its own time; counts them.
    fn answering(questions: Questions, number: f32, after: Duration) -> Arc<AtomicUsize> {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        tokio::spawn(answer_questions(questions, any_size, move |_, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move {
                tokio::time::sleep(after).await;
                Ok::<_, String>(answer_of(number))
            }
        }));
        count
    }

    /// Keeps questions as somebody does to whom they are sent in vain; after so many answers.
    fn losing(questions: Questions, lost: usize) {
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok(query) = questions.recv_async().await {
                if kept.len() < lost {
                    kept.push(query);
                    continue;
                }
                let key = questions.key_expr().to_string();
                reply(&query, key, wire::Reply::Answer(answer_of(2.0)).encode()).await;
            }
        });
    }

    fn cluster(link: &Link) -> Asked {
        Asked::new(link.session().clone(), SPLIT.to_owned())
    }

    async fn infer_through(link: &Link) -> (Result<f32, String>, Duration) {
        let start = Instant::now();
        let answer = infer(&cluster(link), Way::Straight, Vec::new(), WITHIN).await;
        let answer = answer.map(|answer| answer.outputs[0].data()[0]);
        (answer.map_err(|error| error.to_string()), start.elapsed())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_question_that_is_lost_is_asked_again() {
        let link = link(&[]).await;
        losing(asked(&link, "a").await, 2);
        let (answer, took) = infer_through(&link).await;
        assert_eq!(answer, Ok(2.0));
        assert!((3 * SILENCE..SOON).contains(&took), "{took:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_first_answer_counts_where_another_is_lost() {
        let link = link(&[]).await;
        losing(asked(&link, "a").await, usize::MAX);
        answering(asked(&link, "b").await, 3.0, Duration::ZERO);
        let (answer, took) = infer_through(&link).await;
        assert_eq!(answer, Ok(3.0));
        assert!(took < SILENCE, "{took:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_works_for_long_is_not_asked_again() {
        let link = link(&[]).await;
        let count = answering(asked(&link, "a").await, 4.0, 3 * SILENCE);
        assert_eq!(infer_through(&link).await.0, Ok(4.0));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refusal_counts_once_nobody_else_works() {
        let link = link(&[]).await;
        losing(asked(&link, "a").await, usize::MAX);
        let refusing = asked(&link, "b").await;
        tokio::spawn(answer_questions(refusing, any_size, |_, _| async {
            Err::<wire::Answer, _>("no")
        }));
        let (answer, took) = infer_through(&link).await;
        assert_eq!(answer, Err("no".to_owned()));
        assert!(took < SOON, "{took:?}");
        let slow = answering(asked(&link, "c").await, 5.0, 2 * SILENCE);
        assert_eq!(infer_through(&link).await.0, Ok(5.0));
        assert_eq!(slow.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_has_stopped_answering_and_dies_takes_no_question_along() {
        let (home, guest) = (link(&[]).await, link(&[]).await);
        let asker = link(&[&home, &guest]).await;
        answering(asked(&home, "home").await, 1.0, Duration::ZERO);
        let guests = asked(&guest, "guest").await;
        let stop = tokio::spawn(answer_questions(guests, any_size, |_, _| async {
            Ok::<_, String>(answer_of(1.0))
        }));
        // As inferences are asked for: zenoh keeps a route for a declared key.
        let key = cluster(&asker).everybody().await.unwrap();
        let question = wire::Infer { within: WITHIN, inputs: Vec::new() }.encode();
        let answers = async || {
            let start = Instant::now();
            let (hear, mut heard) = mpsc::unbounded_channel();
            ask_once(asker.session(), &key, question.clone(), SOON, hear).await.unwrap();
            let mut answers = 0;
            while let Some(Heard::Reply(_)) = heard.recv().await {
                answers += 1;
            }
            assert!(start.elapsed() < SOON, "{answers} answers after {:?}", start.elapsed());
            answers
        };
        let until = async |count: usize| {
            let deadline = Instant::now() + SOON;
            while answers().await != count {
                assert!(Instant::now() < deadline);
                tokio::time::sleep(ASK_AGAIN).await;
            }
        };
        until(2).await;
        stop.abort();
        until(1).await;
        guest.close().await.unwrap();
        for _ in 0..20 {
            assert_eq!(answers().await, 1);
        }
    }
}
