//! Questions that arrive at a link: who may ask under which key, and how inferences are answered.
//!
//! [`queryable`] takes a key and gives the [`Questions`] asked under it; [`answer_questions`] takes those
//! for inferences and whatever infers, and answers each. A question that is too large, cannot be
//! read, or comes while [`MAX_ASKED`] others are being answered is refused with a reason; others are
//! unharmed. Whoever waits longer for an answer is told every [`WORKING_EVERY`] that it is being worked on.
//! It ends with the link, or when it is dropped, and its answers with it.

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
use snn_schemas::wire::{self, Infer, Reply};
use tokio::task::JoinSet;
use zenoh::handlers::FifoChannelHandler;
use zenoh::query::{Query, Queryable};

use crate::mailbox::MAX_WITHIN;
use crate::transport::zenoh::{Link, LinkError, into_bytes, one_line, session_error};

/// Questions answered at once; each holds its input in memory until its answer is sent.
pub const MAX_ASKED: usize = 64;

/// How often those who wait are told that their question has arrived: answers of most networks take less,
/// and nothing is said of them.
pub(crate) const WORKING_EVERY: Duration = Duration::from_millis(250);

pub(crate) type Questions = Queryable<FifoChannelHandler<Query>>;

pub(crate) async fn queryable(link: &Link, key: &str) -> Result<Questions, LinkError> {
    link.session().declare_queryable(key.to_owned()).complete(true).await.map_err(session_error)
}

pub(crate) async fn reply(query: &Query, key: String, payload: Bytes) {
    if let Err(error) = query.reply(key, payload).await {
        // Whoever asked has left, or its own deadline has passed.
        tracing::debug!(reason = one_line(&error), "answer not delivered");
    }
}

/// Answers with what `infer` makes of a question's inputs within its time, several at once.
pub(crate) async fn answer_questions<F, E>(
    questions: Questions,
    infer: impl Fn(Vec<wire::Tensor>, Duration) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Result<wire::Answer, E>> + Send,
    E: Display,
{
    let mut answering = JoinSet::new();
    let key = questions.key_expr().to_string();
    while let Ok(query) = questions.recv_async().await {
        while answering.try_join_next().is_some() {}
        let is_full = answering.len() >= MAX_ASKED;
        let (key, infer) = (key.clone(), infer.clone());
        answering.spawn(async move {
            let question = match is_full {
                true => Err(format!("{MAX_ASKED} questions are being answered already")),
                false => read(&query).map_err(|error| error.to_string()),
            };
            let answer = match question {
                Ok(Infer { within, inputs }) => {
                    let answer = infer(inputs, within.min(MAX_WITHIN));
                    let answer = async { answer.await.map_err(|error| error.to_string()) };
                    telling(&query, &key, answer).await
                }
                Err(reason) => Err(reason),
            };
            let answer = answer.map_or_else(Reply::Failure, Reply::Answer);
            reply(&query, key, answer.encode()).await;
        });
    }
}

/// Waits for an answer, and tells whoever asked that it is being worked on.
async fn telling<T>(query: &Query, key: &str, answer: impl Future<Output = T>) -> T {
    tokio::pin!(answer);
    loop {
        match tokio::time::timeout(WORKING_EVERY, &mut answer).await {
            Ok(answer) => return answer,
            Err(_) => reply(query, key.to_owned(), Reply::Working.encode()).await,
        }
    }
}

fn read(query: &Query) -> Result<Infer, wire::WireError> {
    let payload = query.payload().ok_or(wire::WireError::NoFrame)?;
    let too_large = wire::WireError::TooLarge { bytes: payload.len() };
    Infer::decode(into_bytes(payload).ok_or(too_large)?)
}
