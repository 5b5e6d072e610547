//! Traces of a running cluster: what nodes record is switched on, switched off and collected over the
//! network.
//!
//! A node answers [`Question`]s with [`Reply`]s under a key of its own rank ([`answer`]). It records for one
//! asker at a time, no more spans than [`MAX_SPANS`], and forgets all of it once nothing was heard of him
//! for [`UNHEARD`]. On the asker's side a [`Recording`] begins at every node or at none, is kept alive while
//! something runs ([`Recording::during`]), and gives the lanes on one time axis. They travel in pieces
//! of [`PIECE`] spans, so whoever passes them on needs little room.

use std::convert::Infallible;
use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zenoh::query::Query;

use super::clock::{clock_key, compare};
use super::recorder::{Lane, MAX_SPANS, Piece, Recorder};
use super::trace::Aligned;
use crate::client::{AskError, Asked, all_keys, ask, parse};
use crate::questions::{Questions, reply};
use crate::transport::zenoh::{into_bytes, split_prefix};

/// How long a node records without having heard of the asker: several times as long as he pauses.
pub(crate) const UNHEARD: Duration = Duration::from_secs(15);
/// How often an asker says that he still wants it.
const RENEW_EVERY: Duration = Duration::from_secs(4);
/// How long a node may take to answer: a piece takes half a second on a link of 1 Mbit/s.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a rank may stay silent when a recording begins: a session that has just joined does not know of
/// everybody yet.
const MEET_WITHIN: Duration = Duration::from_secs(1);
/// Pause before who was silent is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Spans that travel at once: at most 80 KB, which the queue of any link takes.
const PIECE: usize = 1 << 10;
/// Largest question read, in bytes: three numbers fit several times.
const MAX_QUESTION: usize = 256;

/// Key under which a node is asked to record.
pub(crate) fn trace_key(split: &str, rank: &str) -> String {
    format!("snn/{}/trace/{rank}", split_prefix(split))
}

/// What a node is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Question {
    /// To record from now on for the asker `id`.
    Begin { id: u64 },
    /// To go on.
    Renew { id: u64 },
    /// To record no more, and keep what it has.
    Halt { id: u64 },
    /// For what it has recorded from the span numbered `from` on; for itself where there is no asker.
    Piece { id: Option<u64>, from: u64 },
    /// To record no more, and keep nothing.
    Forget { id: u64 },
}

/// What a node answers.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    /// It has done so.
    Done,
    /// It has not, and why.
    Refused(String),
    /// Some of what it has recorded.
    Piece(Piece),
}

/// Answers whoever asks what a node records; ends a recording of whose asker nothing is heard for `unheard`.
pub(crate) async fn answer(questions: Questions, recorder: &Recorder, unheard: Duration) {
    loop {
        let query = tokio::select! {
            query = questions.recv_async() => query,
            () = until(recorder.ends_at()) => {
                recorder.expire(Instant::now());
                continue;
            }
        };
        let Ok(query) = query else { return };
        let answer = match read(&query) {
            Some(question) => answer_to(recorder, question, Instant::now(), unheard),
            None => Reply::Refused("the question cannot be read".to_owned()),
        };
        match serde_json::to_vec(&answer) {
            Ok(answer) => reply(&query, questions.key_expr().to_string(), answer.into()).await,
            Err(error) => tracing::warn!(%error, "record not written"),
        }
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

fn read(query: &Query) -> Option<Question> {
    let payload = query.payload().filter(|payload| payload.len() <= MAX_QUESTION)?;
    serde_json::from_slice(&into_bytes(payload)?).ok()
}

fn answer_to(recorder: &Recorder, question: Question, now: Instant, unheard: Duration) -> Reply {
    let ends = now + unheard;
    let done = match question {
        Question::Begin { id } => match recorder.begin(id, now, ends) {
            Ok(()) => true,
            Err(busy) => return Reply::Refused(busy.to_string()),
        },
        Question::Renew { id } => recorder.renew(id, ends),
        Question::Halt { id } => recorder.renew(id, ends) && recorder.halt(id),
        Question::Forget { id } => recorder.forget(id),
        Question::Piece { id, from } => match recorder.piece(id, from, PIECE) {
            Some(piece) => return Reply::Piece(piece),
            None => false,
        },
    };
    match done {
        true => Reply::Done,
        false => Reply::Refused("nothing is recorded for this asker".to_owned()),
    }
}

/// A trace that the nodes of a cluster record, from [`Client::record`](crate::client::Client::record) on. One
/// that is dropped, or whose process ends, ends by itself a while later.
#[derive(Debug)]
pub struct Recording {
    asked: Asked,
    nodes: usize,
    id: u64,
}

impl Recording {
    /// Has every node that is there record.
    pub(crate) async fn begin(asked: Asked, nodes: usize) -> Result<Recording, AskError> {
        let id = RandomState::new().hash_one(nodes);
        let recording = Recording { asked, nodes, id };
        let begun = recording.begin_all().await;
        match begun {
            Ok(0) => Err(AskError::NoAnswer { within: ANSWER_WITHIN }),
            Ok(_) => Ok(recording),
            Err(error) => {
                recording.give_up().await;
                Err(error)
            }
        }
    }

    /// The number of ranks that record; one after another, so that of two askers one has all of them. Who does
    /// not answer is asked again for a while.
    async fn begin_all(&self) -> Result<usize, AskError> {
        let deadline = Instant::now() + MEET_WITHIN;
        let mut silent: Vec<usize> = (0..self.nodes).collect();
        loop {
            let mut still = Vec::new();
            for rank in silent {
                if !self.begin_at(rank).await? {
                    still.push(rank);
                }
            }
            if still.is_empty() || Instant::now() >= deadline {
                return Ok(self.nodes - still.len());
            }
            silent = still;
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Whether whoever computes a rank records it.
    async fn begin_at(&self, rank: usize) -> Result<bool, AskError> {
        let answers = put(&self.asked, rank, Question::Begin { id: self.id }).await?;
        if let Some(Reply::Refused(reason)) =
            answers.iter().find(|answer| matches!(answer, Reply::Refused(_)))
        {
            return Err(AskError::Refused { reason: format!("node {rank}: {reason}") });
        }
        Ok(answers.contains(&Reply::Done))
    }

    /// Waits for `work`, and has the nodes go on recording until then.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            done = work => done,
            never = self.renew() => match never {},
        }
    }

    async fn renew(&self) -> Infallible {
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            self.tell(Question::Renew { id: self.id }).await;
        }
    }

    /// Ends the recording, and gives what every node has recorded, by rank and on one time axis. Left out
    /// are ranks whose nodes are gone, or have come back meanwhile.
    ///
    /// # Errors
    /// A connection that has ended, or a record that cannot be read.
    pub async fn collect(self) -> Result<Vec<Aligned>, AskError> {
        self.tell(Question::Halt { id: self.id }).await;
        let lanes = gather(&self.asked, self.nodes, Some(self.id), ANSWER_WITHIN);
        let lanes = self.during(lanes).await;
        self.tell(Question::Forget { id: self.id }).await;
        lanes
    }

    /// Ends the recording; the nodes forget it.
    pub async fn give_up(self) {
        self.tell(Question::Forget { id: self.id }).await;
    }

    /// Tells every node; one that hears nothing of it ends by itself.
    async fn tell(&self, question: Question) {
        for rank in 0..self.nodes {
            if let Err(error) = put(&self.asked, rank, question).await {
                tracing::debug!(rank, %error, "not told");
            }
        }
    }
}

/// What the nodes of a cluster have recorded for an asker, or for themselves, on the time axis of whoever
/// gathers it; nodes that do not answer are left out.
pub(crate) async fn gather(
    asked: &Asked,
    nodes: usize,
    id: Option<u64>,
    within: Duration,
) -> Result<Vec<Aligned>, AskError> {
    let epoch = Instant::now();
    let mut lanes = Vec::new();
    for rank in 0..nodes {
        let key = all_keys(&clock_key(asked.split(), &rank.to_string()));
        let compared = compare(asked.session(), &key, epoch).await?;
        let Some((offset, uncertainty)) = compared else { continue };
        if let Some(lane) = lane(asked, rank, id, within).await? {
            lanes.push(Aligned { lane, offset, uncertainty });
        }
    }
    Ok(lanes)
}

/// What a node has recorded up to now, put together from its pieces; `None` where it does not give it.
async fn lane(
    asked: &Asked,
    rank: usize,
    id: Option<u64>,
    within: Duration,
) -> Result<Option<Lane>, AskError> {
    let mut lane = Lane { rank, ..Lane::default() };
    let (mut from, mut end) = (0, None);
    loop {
        let question = Question::Piece { id, from };
        let answers = put_within(asked, rank, question, within).await?;
        let mut pieces = answers.into_iter().filter_map(|answer| match answer {
            Reply::Piece(piece) => Some(piece),
            _ => None,
        });
        // Two processes may compute a rank for a moment: all pieces are from the same.
        let is_next = |piece: &Piece| end.is_none() || piece.unix_ns == lane.unix_ns;
        let Some(piece) = pieces.find(is_next) else { return Ok(None) };
        let end = *end.get_or_insert(piece.end);
        lane.unix_ns = piece.unix_ns;
        lane.dropped += piece.from.saturating_sub(from);
        from = piece.from.saturating_add(piece.spans.len() as u64);
        let is_last = piece.spans.is_empty() || from >= end;
        lane.spans.extend(piece.spans);
        if is_last || lane.spans.len() >= MAX_SPANS {
            return Ok(Some(lane));
        }
    }
}

async fn put(asked: &Asked, rank: usize, question: Question) -> Result<Vec<Reply>, AskError> {
    put_within(asked, rank, question, ANSWER_WITHIN).await
}

/// Asks whoever computes a rank.
async fn put_within(
    asked: &Asked,
    rank: usize,
    question: Question,
    within: Duration,
) -> Result<Vec<Reply>, AskError> {
    let key = all_keys(&trace_key(asked.split(), &rank.to_string()));
    let question = serde_json::to_vec(&question).map_err(AskError::Json)?;
    let answers = ask(asked.session(), &key, Bytes::from(question), within).await?;
    answers.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::client::own_key;
    use crate::questions::queryable;
    use crate::transport::zenoh::{Link, Options};
    use crate::watch::{Kind, clock};

    const SPLIT: &str = "0123456789abcdef";
    /// How long a machine with other work may take for what takes milliseconds.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// What each of these ranks records with, and who asks them; a recording ends `unheard` after the last
    /// word of its asker.
    async fn recorders(ranks: &[usize], unheard: Duration) -> (Vec<Arc<Recorder>>, Link) {
        let link = Link::open(&Options::default()).await.unwrap();
        let mut recorders = Vec::new();
        for rank in ranks.iter().map(usize::to_string) {
            let recorder = Arc::new(Recorder::default());
            let own = |key: String| own_key(&key, "node");
            let lanes = queryable(&link, &own(trace_key(SPLIT, &rank))).await.unwrap();
            let times = queryable(&link, &own(clock_key(SPLIT, &rank))).await.unwrap();
            let (records, tells) = (Arc::clone(&recorder), Arc::clone(&recorder));
            tokio::spawn(async move { answer(lanes, &records, unheard).await });
            tokio::spawn(async move { clock::answer(times, &tells).await });
            recorders.push(recorder);
        }
        (recorders, link)
    }

    fn asked(link: &Link) -> Asked {
        Asked::new(link.session().clone(), SPLIT.to_owned())
    }

    async fn begin(link: &Link, nodes: usize) -> Result<Recording, String> {
        let begun = Recording::begin(asked(link), nodes).await;
        begun.map_err(|error| error.to_string())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_node_that_is_there_gives_its_lane_whole() {
        let (recorders, link) = recorders(&[0, 2], UNHEARD).await;
        let recording = begin(&link, 3).await.unwrap();
        assert!(recorders.iter().all(|recorder| recorder.is_on()));
        let many = 2 * PIECE as u32 + 1;
        (0..many).for_each(|id| recorders[1].instant(Kind::Arrived, id, 7));
        let lanes = recording.collect().await.unwrap();
        let of = |aligned: &Aligned| (aligned.lane.rank, aligned.lane.spans.len());
        assert_eq!(lanes.iter().map(of).collect::<Vec<_>>(), [(0, 0), (2, many as usize)]);
        assert!((0..many).eq(lanes[1].lane.spans.iter().map(|span| span.id)));
        assert_eq!(lanes[1].lane.dropped, 0);
        // Nothing is left of it.
        assert!(recorders.iter().all(|recorder| !recorder.is_on() && recorder.ends_at().is_none()));
        assert_eq!(recorders[1].lane(2).spans, []);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_second_asker_is_refused_and_leaves_the_first_alone() {
        let (recorders, link) = recorders(&[0, 1], UNHEARD).await;
        let first = begin(&link, 2).await.unwrap();
        let refused = begin(&link, 2).await.unwrap_err();
        assert_eq!(refused, "node 0: another trace is being recorded");
        assert!(recorders.iter().all(|recorder| recorder.is_on()));
        first.give_up().await;
        assert!(recorders.iter().all(|recorder| !recorder.is_on()));
        // What begins at one node and not at the other ends there.
        recorders[1].start();
        let refused = begin(&link, 2).await.unwrap_err();
        assert_eq!(refused, "node 1: it records its own trace");
        assert_eq!((recorders[0].is_on(), recorders[1].is_on()), (false, true));
        assert_eq!(gather(&asked(&link), 2, None, PATIENCE).await.unwrap().len(), 2);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_forgets_an_asker_who_has_vanished() {
        let (recorders, link) = recorders(&[0], Duration::from_millis(100)).await;
        drop(begin(&link, 1).await.unwrap());
        recorders[0].instant(Kind::Arrived, 0, 7);
        let deadline = Instant::now() + PATIENCE;
        while recorders[0].is_on() {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!((recorders[0].lane(0).spans, recorders[0].ends_at()), (vec![], None));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn where_nobody_is_nothing_is_recorded() {
        let (_, link) = recorders(&[], UNHEARD).await;
        assert_eq!(begin(&link, 2).await.unwrap_err(), "no answer within 5 s");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_no_question_is_refused() {
        let (recorders, link) = recorders(&[0], UNHEARD).await;
        let key = all_keys(&trace_key(SPLIT, "0"));
        let long = format!(r#"{{"begin":{{"id":1}}}}{}"#, " ".repeat(MAX_QUESTION));
        for question in ["", "{}", r#"{"begin":{"id":-1}}"#, "[[[[", long.as_str()] {
            let question = Bytes::copy_from_slice(question.as_bytes());
            let answers = ask(link.session(), &key, question, PATIENCE).await.unwrap();
            let refused = r#"{"refused":"the question cannot be read"}"#;
            assert_eq!(answers, [Bytes::from_static(refused.as_bytes())]);
        }
        assert!(!recorders[0].is_on());
    }

    #[test]
    fn a_piece_fits_the_queue_of_any_link() {
        let span = crate::watch::Span {
            kind: Kind::Request,
            id: u32::MAX,
            request: u64::MAX,
            start: u64::MAX,
            end: u64::MAX,
        };
        let (from, end, unix_ns) = (u64::MAX, u64::MAX, u64::MAX);
        let piece = Reply::Piece(Piece { spans: vec![span; PIECE], from, end, unix_ns });
        let json = serde_json::to_vec(&piece).unwrap();
        assert!(json.len() <= 81_000, "{} bytes", json.len());
        assert_eq!(serde_json::from_slice::<Reply>(&json).unwrap(), piece);
    }
}
