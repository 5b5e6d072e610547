//! Questions that arrive at a link: who may ask under which key, and how inferences are answered.
//!
//! [`queryable`] takes a key and gives the [`Questions`] asked under it; [`answer_questions`] takes those
//! for inferences and whatever infers, and answers each. A question that is larger than the model's inputs
//! need (it is not even copied), cannot be read, or comes while [`MAX_ASKED`] others are being answered is
//! refused with a reason; others are unharmed. Whoever waits longer for an answer is told every
//! [`WORKING_EVERY`] that it is being worked on.
//! It ends with the link, or when it is dropped, and its answers with it.

use std::fmt::Display;
use std::time::Duration;

use bytes::Bytes;
use snn_schemas::wire::{self, Infer, Reply};
use tokio::task::JoinSet;
use zenoh::bytes::ZBytes;
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

/// Answers with what `infer` makes of a question's inputs within its time, several at once. A question may
/// have as many bytes as `limit` says.
pub(crate) async fn answer_questions<F, E, L>(
    questions: Questions,
    limit: impl Fn() -> L + Clone + Send + 'static,
    infer: impl Fn(Vec<wire::Tensor>, Duration) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Result<wire::Answer, E>> + Send,
    E: Display,
    L: Future<Output = usize> + Send,
{
    let mut answering = JoinSet::new();
    let key = questions.key_expr().to_string();
    while let Ok(query) = questions.recv_async().await {
        while answering.try_join_next().is_some() {}
        let is_full = answering.len() >= MAX_ASKED;
        let (key, limit, infer) = (key.clone(), limit.clone(), infer.clone());
        answering.spawn(async move {
            let limit = limit();
            let question = match is_full {
                true => Err(format!("{MAX_ASKED} questions are being answered already")),
                false => {
                    let limit = limit.await;
                    read(query.payload(), limit)
                }
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

/// Reads a question of `limit` bytes at most.
fn read(payload: Option<&ZBytes>, limit: usize) -> Result<Infer, String> {
    let payload = payload.ok_or_else(|| wire::WireError::NoFrame.to_string())?;
    let bytes = Some(payload).filter(|payload| payload.len() <= limit).and_then(into_bytes);
    let bytes = bytes.ok_or_else(|| {
        let found = payload.len();
        format!("a question of {found} bytes, but the model's inputs take {limit} at most")
    })?;
    Infer::decode(bytes, limit).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use snn_schemas::wire::Tensor;

    use super::*;

    #[test]
    fn a_question_that_is_larger_than_the_inputs_need_is_refused_unread() {
        let inputs = vec![Tensor::new(vec![1, 2], vec![1.0, 2.0]).unwrap()];
        let question = Infer { within: Duration::from_secs(1), inputs };
        let payload = ZBytes::from(question.encode(None));
        let limit = Infer::most_bytes([2]);
        assert_eq!(read(Some(&payload), limit), Ok(question));
        // It is no question either: its size alone counts.
        let large = ZBytes::from(vec![0_u8; limit + 1]);
        let expected = format!(
            "a question of {} bytes, but the model's inputs take {limit} at most",
            limit + 1
        );
        assert_eq!(read(Some(&large), limit), Err(expected));
        assert_eq!(read(None, limit), Err("not a frame".to_owned()));
    }
}
