//! What tells one file from every other: its SHA-256.
//!
//! Takes bytes, or 64 hexadecimal digits as a manifest has them; gives a [`Digest`], which prints as such
//! digits and travels as 32 bytes. [`OtherFile`] says that a file is not the one that is meant.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::agent::wire::hexadecimal;

/// Digits that people are shown: enough to tell files apart.
const SHORT: usize = 12;

/// SHA-256 of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; Digest::BYTES]);

impl Digest {
    /// Bytes of a digest.
    pub const BYTES: usize = 32;

    /// The digest of a file's bytes.
    pub fn of(file: &[u8]) -> Digest {
        Digest(Sha256::digest(file).into())
    }

    /// The digest of all that has been put into `hash`.
    pub(crate) fn finish(hash: Sha256) -> Digest {
        Digest(hash.finalize().into())
    }

    /// Reads 64 hexadecimal digits; `None` for anything else.
    pub fn parse(text: &str) -> Option<Digest> {
        let is_hexadecimal = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if text.len() != 2 * Digest::BYTES || !is_hexadecimal {
            return None;
        }
        let mut bytes = [0; Digest::BYTES];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(Digest(bytes))
    }

    /// The digest that travels as these bytes.
    pub(crate) fn from_bytes(bytes: [u8; Digest::BYTES]) -> Digest {
        Digest(bytes)
    }

    /// The bytes as which it travels.
    pub(crate) fn as_bytes(&self) -> &[u8; Digest::BYTES] {
        &self.0
    }

    /// Its first twelve digits.
    pub fn short(self) -> String {
        self.to_string().chars().take(SHORT).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A file that is not the one that is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sha256 {}…, expected {}…", found.short(), expected.short())]
pub struct OtherFile {
    /// The file's digest.
    pub found: Digest,
    /// The digest it should have.
    pub expected: Digest,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_read_back_and_nothing_else_is_read() {
        let digest = Digest::of(b"abc");
        let digits = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest.to_string(), digits);
        assert_eq!(digest.short(), "ba7816bf8f01");
        assert_eq!(Digest::parse(digits), Some(digest));
        assert_eq!(Digest::from_bytes(*digest.as_bytes()), digest);
        let long = format!("{digits}0");
        for other in ["", &digits[1..], &long, &digits.replace('b', "+"), &"ä".repeat(32)] {
            assert_eq!(Digest::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_file_hashed_piece_by_piece_has_the_same_digest() {
        let mut hash = Sha256::new();
        hash.update(b"a");
        hash.update(b"bc");
        assert_eq!(Digest::finish(hash), Digest::of(b"abc"));
    }
}
