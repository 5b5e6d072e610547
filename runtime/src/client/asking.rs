//! How a cluster is asked: for an inference until somebody has answered, and for what many know.
//!
//! [`infer`] takes an [`Asked`] cluster and a model's inputs, and gives the answer or why there is none. It
//! asks again where a question seems lost; every question has a deadline. [`ask`] gathers the answers of
//! everybody who answers under a key.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use snn_schemas::codec::Pixels;
use snn_schemas::wire;
use tokio::sync::{OnceCell, mpsc};
use zenoh::Session;
use zenoh::key_expr::KeyExpr;
use zenoh::query::{ConsolidationMode, QueryTarget};

use super::keys::{all_keys, door_key, infer_key, info_key};
use super::{AskError, ClusterInfo};
use crate::transport::zenoh::{into_bytes, one_line};
use crate::{Answer, Tensor};

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
/// How long whoever computes the entry rank may take to say what the model takes.
const DESCRIBE_WITHIN: Duration = Duration::from_millis(300);
/// Largest description or report accepted, in bytes: names of a thousand classes fit.
const MAX_JSON: usize = 1 << 20;

/// A cluster that is asked for inferences over a session.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    session: Session,
    split: String,
    everybody: Arc<OnceCell<KeyExpr<'static>>>,
    model: Arc<OnceCell<Model>>,
}

/// What an [`Asked`] knows of its model.
#[derive(Debug)]
struct Model {
    info: Arc<ClusterInfo>,
    pixels: Option<Pixels>,
}

impl Model {
    fn new(info: ClusterInfo) -> Model {
        Model { pixels: info.pixels(), info: Arc::new(info) }
    }
}

impl Asked {
    pub(crate) fn new(session: Session, split: String) -> Asked {
        Asked { session, split, everybody: Arc::default(), model: Arc::default() }
    }

    /// A cluster whose model is known.
    pub(super) fn described(session: Session, info: ClusterInfo) -> Asked {
        let split = info.split.clone();
        let model = Arc::new(OnceCell::new_with(Some(Model::new(info))));
        Asked { session, split, everybody: Arc::default(), model }
    }

    /// The session.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// The cluster's split.
    pub(crate) fn split(&self) -> &str {
        &self.split
    }

    /// What the model takes and gives; asked for once.
    ///
    /// # Errors
    /// [`AskError::NoEntry`] when nobody has said so in time.
    pub(crate) async fn info(&self, within: Duration) -> Result<Arc<ClusterInfo>, AskError> {
        let model = self.model.get_or_try_init(|| async {
            let key = all_keys(&info_key(&self.split));
            Ok::<_, AskError>(Model::new(describe(&self.session, &key, within).await?))
        });
        Ok(Arc::clone(&model.await?.info))
    }

    /// Most bytes of a question that the model can answer; what a frame may have, until somebody says what
    /// the model takes.
    pub(crate) async fn question_bytes(&self) -> usize {
        let info = self.info(DESCRIBE_WITHIN).await;
        info.map_or(wire::MAX_FRAME, |info| info.question_bytes())
    }

    /// A question for inferences. A picture travels as its pixels, once the model is known to take one.
    fn question(&self, inputs: Vec<Tensor>, within: Duration) -> Bytes {
        let pixels = self.model.get().and_then(|model| model.pixels.as_ref());
        wire::Infer { within, inputs }.encode(pixels)
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
    let question = cluster.question(inputs, within);
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
pub(super) async fn describe(
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

#[cfg(test)]
mod tests;
