//! How a shard's file travels: the question for a piece of it, and the answer.
//!
//! Numbers are little-endian. A question of no bytes asks who has the file.
//!
//! | | |
//! |---|---|
//! | question | place in the file `u64`, bytes wanted `u32` |
//! | answer | SHA-256 of the whole file, its length `u64`, then the bytes, [`CHUNK`] at most |
//!
//! Any bytes at all give a question or an answer, or none; nothing longer is copied.

use bytes::{BufMut as _, Bytes, BytesMut};
use zenoh::bytes::ZBytes;

use crate::digest::Digest;
use crate::kept::MAX_SHARD;
use crate::transport::zenoh::into_bytes;

/// Most bytes of a file in one answer: with what zenoh adds half a batch of its 64 KiB, so that no answer
/// is cut into fragments and a tensor waits for no more than that.
pub(super) const CHUNK: usize = 32 << 10;
/// Bytes of a question.
const QUESTION: usize = 12;
/// Bytes of an answer before those of the file.
const HEAD: usize = Digest::BYTES + 8;

/// Which file an answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Head {
    /// The whole file's digest.
    pub(super) digest: Digest,
    /// Its length in bytes: 1 to [`MAX_SHARD`].
    pub(super) length: usize,
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it begins.
    pub(super) from: usize,
    /// Its bytes.
    pub(super) length: usize,
}

impl Piece {
    /// Nothing of a file: the question who has it.
    pub(super) const NOTHING: Piece = Piece { from: 0, length: 0 };

    /// The question for it.
    pub(super) fn question(self) -> Bytes {
        let mut question = BytesMut::with_capacity(QUESTION);
        question.put_u64_le(self.from as u64);
        // No piece is larger than a chunk.
        question.put_u32_le(self.length as u32);
        question.freeze()
    }

    /// Reads a question; `None` for anything else.
    pub(super) fn read(payload: &ZBytes) -> Option<Piece> {
        let bytes = Some(payload).filter(|bytes| bytes.len() == QUESTION).and_then(into_bytes)?;
        let (from, length) = bytes.split_first_chunk()?;
        let length = u32::from_le_bytes(length.try_into().ok()?);
        Some(Piece {
            from: usize::try_from(u64::from_le_bytes(*from)).ok()?,
            length: usize::try_from(length).ok()?,
        })
    }
}

/// The answer to a question for a piece of `file`: as much of it as there is, and may travel at once.
pub(super) fn answer(digest: Digest, file: &[u8], piece: Piece) -> Bytes {
    let from = piece.from.min(file.len());
    let end = file.len().min(from.saturating_add(piece.length.min(CHUNK)));
    let mut answer = BytesMut::with_capacity(HEAD + end - from);
    answer.extend_from_slice(digest.as_bytes());
    answer.put_u64_le(file.len() as u64);
    answer.extend_from_slice(&file[from..end]);
    answer.freeze()
}

/// Reads an answer; `None` for anything else, and for a file that is empty or too large.
pub(super) fn read(payload: &ZBytes) -> Option<(Head, Bytes)> {
    let fits = |payload: &&ZBytes| (HEAD..=HEAD + CHUNK).contains(&payload.len());
    let bytes = Some(payload).filter(fits).and_then(into_bytes)?;
    let (digest, rest) = bytes.split_first_chunk::<{ Digest::BYTES }>()?;
    let length = u64::from_le_bytes(*rest.first_chunk()?);
    let head = Head { digest: Digest::from_bytes(*digest), length: usize::try_from(length).ok()? };
    (1..=MAX_SHARD).contains(&length).then(|| (head, bytes.slice(HEAD..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Bytes {
        (0..3 * CHUNK + 5).map(|at| (at % 251) as u8).collect::<Vec<_>>().into()
    }

    #[test]
    fn a_file_is_put_together_from_its_chunks() {
        let file = file();
        let digest = Digest::of(&file);
        let mut whole = Vec::new();
        while whole.len() < file.len() {
            let piece = Piece { from: whole.len(), length: CHUNK + 1 };
            let asked = Piece::read(&piece.question().into()).unwrap();
            assert_eq!(asked, piece);
            let (head, part) = read(&answer(digest, &file, asked).into()).unwrap();
            assert_eq!(head, Head { digest, length: file.len() });
            assert!((1..=CHUNK).contains(&part.len()));
            whole.extend_from_slice(&part);
        }
        assert_eq!(whole, file);
    }

    #[test]
    fn who_has_a_file_and_who_is_asked_beyond_its_end_gives_none_of_it() {
        let file = file();
        let beyond = Piece { from: usize::MAX, length: usize::MAX };
        for piece in [Piece::NOTHING, beyond] {
            let (head, part) = read(&answer(Digest::of(&file), &file, piece).into()).unwrap();
            assert_eq!((head.length, part.len()), (file.len(), 0));
        }
    }

    #[test]
    fn what_is_no_question_and_no_answer_is_not_read() {
        let bytes = |length: usize| ZBytes::from(vec![1_u8; length]);
        for length in [0, QUESTION - 1, QUESTION + 1, 1 << 20] {
            assert_eq!(Piece::read(&bytes(length)), None, "{length}");
        }
        for length in [0, HEAD - 1, HEAD + CHUNK + 1] {
            assert_eq!(read(&bytes(length)), None, "{length}");
        }
        // A file without end, and one that is empty.
        assert_eq!(read(&bytes(HEAD)), None);
        assert_eq!(read(&answer(Digest::of(b""), b"", Piece::NOTHING).into()), None);
    }
}
