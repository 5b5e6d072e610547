//! What those who deploy ask an agent, and what it answers: the whole protocol.
//!
//! A message is a question to the key [`AGENT_KEY`] of the agent's zenoh session, or its answer:
//!
//! | bytes | |
//! |---|---|
//! | 4 | `SNNA` |
//! | 1 | version of this format: 2 |
//! | 16 | [`Asker`]: whoever asks; an answer carries that of its question |
//! | 4 | length of the header, little-endian, at most [`MAX_HEADER`] |
//! | … | header: a [`Request`] or a [`Reply`] as JSON |
//! | … | a piece of a file, at most [`MAX_CHUNK`] bytes; only after [`Request::Put`] |
//!
//! Whoever changes anything claims the agent first ([`Request::Claim`]): two who deploy at once are kept
//! apart. Every request may be repeated: a lost answer does no harm. Files are sent in pieces from where the
//! agent's copy ends ([`Reply::Have`]), so that a broken link costs a piece. Anything else than the
//! above is refused with one sentence ([`Reply::Refused`]) before any of it is kept.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::http::MAX_WITHIN;

/// Key under which an agent answers. Sessions with agents join nobody else.
pub(crate) const AGENT_KEY: &str = "snn/agent";
/// Largest header, in bytes: the description of every version an agent keeps.
pub const MAX_HEADER: usize = 64 << 10;
/// Largest piece of a file, in bytes: what a slow link carries in a second or so, and what an agent
/// holds in memory for it.
pub const MAX_CHUNK: usize = 256 << 10;
/// Largest message.
pub const MAX_MESSAGE: usize = PREFIX + MAX_HEADER + MAX_CHUNK;
/// Most peers of a node, and so of a start order.
pub const MAX_PEERS: usize = snn_schemas::MAX_GROUPS;

const MAGIC: &[u8; 4] = b"SNNA";
const FORMAT: u8 = 2;
const PREFIX: usize = 25;

/// Whoever asks: a number that nobody else has at the time, such as a session's.
pub type Asker = [u8; 16];

/// Longest name of whoever deploys, in characters: it is shown on one line.
pub const MAX_NAME: usize = 100;
/// Longest time of [`Settings`], in ms: as long as any request over HTTP may take.
pub const MAX_SETTING_MS: u64 = MAX_WITHIN.as_millis() as u64;

/// A version: SHA-256 of its `cluster.json`, 64 lower-case hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

impl Version {
    /// The version of a manifest's bytes.
    pub fn of(manifest: &[u8]) -> Version {
        Version(sha256(manifest))
    }

    /// Reads 64 hexadecimal digits; `None` for anything else.
    pub fn parse(text: &str) -> Option<Version> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let fits = text.len() == 64 && text.bytes().all(digit);
        fits.then(|| Version(text.to_owned()))
    }

    /// All of its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Version {
    /// The first eight digits: enough for people to tell versions apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0.get(..8).unwrap_or(&self.0))
    }
}

impl TryFrom<String> for Version {
    type Error = WireError;

    fn try_from(text: String) -> Result<Version, WireError> {
        Version::parse(&text).ok_or(WireError::Version)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.0
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum File {
    /// `cluster.json`. It comes first: what the others must be stands in it.
    Manifest,
    /// The shard of a rank.
    Shard(usize),
}

/// How the nodes of a version run, as whoever deploys it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long a node waits for a tensor before it goes on without it, in ms; as long as the request
    /// may take where there is none.
    pub degrade_ms: Option<u64>,
    /// How long a request over HTTP may take where it does not say itself, in ms; what the agent was
    /// started with where there is none.
    pub within_ms: Option<u64>,
}

impl Settings {
    /// Whether each time is between 1 and [`MAX_SETTING_MS`].
    pub fn are_sound(&self) -> bool {
        let times = [self.degrade_ms, self.within_ms];
        times.iter().flatten().all(|ms| (1..=MAX_SETTING_MS).contains(ms))
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ms: Option<u64>| ms.map_or_else(|| "none".to_owned(), |ms| format!("{ms} ms"));
        let (degrade, within) = (ms(self.degrade_ms), ms(self.within_ms));
        write!(f, "degrade {degrade}, deadline {within}")
    }
}

/// What an agent is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who it is and what it runs. Answered with [`Reply::Described`].
    Describe {},
    /// Let nobody else change anything, until [`Request::Release`] or until nothing has been heard of
    /// the asker for [`CLAIM_WITHIN`](super::CLAIM_WITHIN). Refused while somebody else has claimed it.
    Claim {
        /// Who it is, for people.
        by: String,
    },
    /// Let others change things again.
    Release {},
    /// How much of a file it has that is as it should be. Answered with [`Reply::Have`].
    Have {
        /// The version.
        version: Version,
        /// The file.
        file: File,
    },
    /// A piece of a file: what the agent has from `offset` on is replaced. Answered with
    /// [`Reply::Have`]; refused where the last piece makes a file of another hash.
    Put {
        /// The version.
        version: Version,
        /// The file.
        file: File,
        /// Where the piece begins.
        offset: u64,
        /// Whether the file ends with it.
        last: bool,
    },
    /// A port that is free for a node. Answered with [`Reply::Reserved`].
    Reserve {},
    /// Run a rank, beside whatever runs.
    Start {
        /// The version.
        version: Version,
        /// The rank.
        rank: usize,
        /// Port to listen on.
        port: u16,
        /// Addresses of the other nodes.
        peers: Vec<String>,
        /// How it runs.
        #[serde(default)]
        settings: Settings,
    },
    /// Answer clients with this version from now on, and start it after a restart.
    Activate {
        /// The version.
        version: Version,
    },
    /// How many requests of clients a version that is no longer current still answers. Answered with
    /// [`Reply::Draining`].
    Drain {
        /// The version.
        version: Version,
    },
    /// End the nodes of a version.
    Stop {
        /// The version.
        version: Version,
    },
    /// Remove the files of a version that does not run.
    Forget {
        /// The version.
        version: Version,
    },
}

impl Request {
    /// Whether an agent is another afterwards, so that it must have been claimed.
    pub fn changes(&self) -> bool {
        match self {
            Request::Describe {} | Request::Claim { .. } | Request::Release {} => false,
            Request::Have { .. } | Request::Drain { .. } => false,
            Request::Put { .. } | Request::Reserve {} | Request::Start { .. } => true,
            Request::Activate { .. } | Request::Stop { .. } | Request::Forget { .. } => true,
        }
    }
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Who it is and what it runs.
    Described {
        /// The description.
        agent: Box<Description>,
    },
    /// How much of a file there is.
    Have {
        /// Bytes from the beginning.
        length: u64,
        /// Whether it is whole, and its hash the right one.
        complete: bool,
    },
    /// A port.
    Reserved {
        /// Its number.
        port: u16,
    },
    /// How many requests are still being answered.
    Draining {
        /// Their number.
        requests: usize,
    },
    /// Done.
    Done {},
    /// Not done.
    Refused {
        /// Why, in one sentence.
        reason: String,
    },
}

/// An agent, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Name of the device.
    pub name: String,
    /// Version of the software.
    pub software: String,
    /// URL at which it serves HTTP, if it does.
    pub http: Option<String>,
    /// Where it answers `snn-run infer`, if it does.
    pub front: Option<String>,
    /// The version that clients are answered with.
    pub current: Option<Version>,
    /// Every version it has.
    pub versions: Vec<VersionState>,
}

/// A version on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionState {
    /// The version.
    pub version: Version,
    /// The rank it is to run there, where it has ever been started.
    pub rank: Option<usize>,
    /// Port of its node.
    pub port: Option<u16>,
    /// How its node runs.
    #[serde(default)]
    pub settings: Settings,
    /// What the node is doing.
    pub state: NodeState,
}

/// What a node is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Nothing: only the files are there.
    Stopped,
    /// It loads, or waits for its peers.
    Starting,
    /// It has met all of its peers.
    Ready,
    /// It has ended, and is started again.
    Failed {
        /// Why, in one sentence.
        reason: String,
    },
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeState::Stopped => f.write_str("stopped"),
            NodeState::Starting => f.write_str("starting"),
            NodeState::Ready => f.write_str("ready"),
            NodeState::Failed { reason } => write!(f, "failed: {reason}"),
        }
    }
}

/// Writes a message.
pub(crate) fn encode(
    asker: &Asker,
    header: &impl Serialize,
    piece: &[u8],
) -> Result<Bytes, WireError> {
    let header = serde_json::to_vec(header).map_err(WireError::Json)?;
    if header.len() > MAX_HEADER || piece.len() > MAX_CHUNK {
        return Err(WireError::TooLarge { bytes: PREFIX + header.len() + piece.len() });
    }
    let length = u32::try_from(header.len()).unwrap_or(u32::MAX).to_le_bytes();
    Ok([MAGIC, &[FORMAT][..], asker, &length, &header, piece].concat().into())
}

/// Reads a message: who asks, the header, and the piece of a file after it.
pub(crate) fn decode<T: for<'a> Deserialize<'a>>(
    message: &Bytes,
) -> Result<(Asker, T, Bytes), WireError> {
    if message.len() > MAX_MESSAGE {
        return Err(WireError::TooLarge { bytes: message.len() });
    }
    let (prefix, rest) = message.split_at_checked(PREFIX).ok_or(WireError::Short)?;
    if !prefix.starts_with(MAGIC) {
        return Err(WireError::Magic);
    }
    if prefix[4] != FORMAT {
        return Err(WireError::Format { found: prefix[4] });
    }
    let (Some(asker), Some(length)) = (prefix[5..].first_chunk(), prefix.last_chunk()) else {
        return Err(WireError::Short);
    };
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_HEADER {
        return Err(WireError::TooLarge { bytes: length });
    }
    let (header, piece) = rest.split_at_checked(length).ok_or(WireError::Short)?;
    if piece.len() > MAX_CHUNK {
        return Err(WireError::TooLarge { bytes: piece.len() });
    }
    let header = serde_json::from_slice(header).map_err(WireError::Json)?;
    Ok((*asker, header, message.slice(PREFIX + length..)))
}

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// It ends early.
    #[error("the message is cut short")]
    Short,
    /// It is something else.
    #[error("not a message to or from an agent")]
    Magic,
    /// Another version of this format.
    #[error("message of format {found}, expected {FORMAT}")]
    Format {
        /// The format found.
        found: u8,
    },
    /// Beyond a limit.
    #[error("a message, header or piece of {bytes} bytes is larger than allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// A header that is none.
    #[error("header: {0}")]
    Json(#[source] serde_json::Error),
    /// A version that is none.
    #[error("a version has 64 hexadecimal digits")]
    Version,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKER: Asker = [7; 16];

    fn put() -> Request {
        let version = Version::of(b"manifest");
        Request::Put { version, file: File::Shard(2), offset: 7, last: true }
    }

    #[test]
    fn messages_read_back_and_stand_as_documented() {
        let message = encode(&ASKER, &put(), b"piece").unwrap();
        assert_eq!(message[..21], [&b"SNNA\x02"[..], &ASKER].concat());
        let length = message.len() - PREFIX - 5;
        assert_eq!(message[21..25], (length as u32).to_le_bytes());
        let header = std::str::from_utf8(&message[PREFIX..PREFIX + length]).unwrap();
        let version = sha256(b"manifest");
        let expected = format!(
            r#"{{"ask":"put","version":"{version}","file":{{"shard":2}},"offset":7,"last":true}}"#
        );
        assert_eq!(header, expected);
        let (asker, request, piece) = decode::<Request>(&message).unwrap();
        assert_eq!((asker, request, &piece[..]), (ASKER, put(), &b"piece"[..]));
    }

    #[test]
    fn anything_else_is_refused() {
        let message = encode(&ASKER, &put(), b"piece").unwrap();
        for length in 0..message.len() - 5 {
            assert!(decode::<Request>(&message.slice(..length)).is_err(), "{length} bytes");
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = message.to_vec();
            bytes[at] = byte;
            decode::<Request>(&bytes.into()).unwrap_err().to_string()
        };
        assert_eq!(with(0, b'X'), "not a message to or from an agent");
        assert_eq!(with(4, 1), "message of format 1, expected 2");
        assert!(with(24, 255).ends_with(" bytes is larger than allowed"));
        assert!(with(PREFIX, b'!').starts_with("header: "));
        assert!(encode(&ASKER, &put(), &vec![0; MAX_CHUNK + 1]).is_err());
        assert!(decode::<Request>(&vec![0; MAX_MESSAGE + 1].into()).is_err());
        let unknown =
            encode(&ASKER, &serde_json::json!({ "ask": "reserve", "more": 1 }), b"").unwrap();
        assert!(decode::<Request>(&unknown).is_err());
        assert_eq!(Version::parse("../../etc/passwd"), None);
        assert_eq!(Version::parse(&"A".repeat(64)), None);
    }
}
