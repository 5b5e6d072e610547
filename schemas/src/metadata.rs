//! Keys of ONNX `metadata_props` that `snn` writes and reads, and the values behind them.
//!
//! Takes and gives key–value pairs of text. A model carries how its input was normalised
//! ([`Normalisation`]) and its class names; a shard carries who it is ([`ShardInfo`]). Anything
//! else in a model's metadata belongs to its author and is carried along untouched.

use std::fmt::Write as _;

/// Domain of the ops `SnnSend` and `SnnRecv`.
pub const SNN_DOMAIN: &str = "org.snn";
/// Version of that domain.
pub const SNN_OPSET: i64 = 1;
/// Op type that hands a tensor to another node.
pub const SEND_OP: &str = "SnnSend";
/// Op type that waits for a tensor of another node.
pub const RECV_OP: &str = "SnnRecv";

/// Mean of each input channel, subtracted from pixels scaled to 0 … 1: `"0.49,0.48,0.45"`.
pub const MEAN: &str = "snn.mean";
/// Standard deviation of each input channel, by which pixels are then divided.
pub const STD: &str = "snn.std";
/// Whether a model's metadata says how pictures become its input.
pub fn is_normalised<'a>(get: impl Fn(&str) -> Option<&'a str>) -> bool {
    get(MEAN).is_some() || get(STD).is_some()
}

/// Names of the classes, comma-separated, in output order.
pub const CLASSES: &str = "snn.classes";

const RANK: &str = "snn.rank";
const NODES: &str = "snn.nodes";
const ENTRY: &str = "snn.entry";
const GROUPS: &str = "snn.groups";
const SPLIT: &str = "snn.split";
const SOURCE: &str = "snn.source_sha256";
const POLICY: &str = "snn.policy_sha256";
const TOOL: &str = "snn.tool";

/// How an image becomes the model's input: `(pixel / 255 − mean) / std`, a channel at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalisation {
    /// Mean a channel.
    pub mean: Vec<f32>,
    /// Standard deviation a channel, never 0.
    pub std: Vec<f32>,
}

impl Normalisation {
    /// Leaves pixels as they are, between 0 and 1.
    pub fn identity(channels: usize) -> Normalisation {
        Normalisation { mean: vec![0.0; channels], std: vec![1.0; channels] }
    }

    /// Reads the model's normalisation; the identity where its metadata names none.
    ///
    /// # Errors
    /// The key whose value is no list of `channels` usable numbers.
    pub fn read<'a>(
        get: impl Fn(&str) -> Option<&'a str>,
        channels: usize,
    ) -> Result<Normalisation, MetadataError> {
        let numbers = |key: &'static str, default: f32| match get(key) {
            None => Ok(vec![default; channels]),
            Some(text) => parse_list(text)
                .filter(|list| list.len() == channels && list.iter().all(|x| x.is_finite()))
                .ok_or(MetadataError::Value { key, found: text.to_owned() }),
        };
        let normalisation = Normalisation { mean: numbers(MEAN, 0.0)?, std: numbers(STD, 1.0)? };
        if normalisation.std.contains(&0.0) {
            return Err(MetadataError::Value { key: STD, found: "0".to_owned() });
        }
        Ok(normalisation)
    }

    /// The value of a pixel in a channel: what anybody who normalises gives, bit for bit.
    pub fn value(&self, channel: usize, pixel: u8) -> f32 {
        (f32::from(pixel) / 255.0 - self.mean[channel]) / self.std[channel]
    }

    /// The metadata entries that [`Normalisation::read`] reads back.
    pub fn entries(&self) -> [(String, String); 2] {
        [(MEAN.to_owned(), format_list(&self.mean)), (STD.to_owned(), format_list(&self.std))]
    }
}

/// Who a shard is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardInfo {
    /// The node that runs it, from 0.
    pub rank: usize,
    /// Nodes of the cluster.
    pub nodes: usize,
    /// Rank that takes the input and gives the output.
    pub entry: usize,
    /// G.
    pub groups: usize,
    /// Identity of the split, 64 hexadecimal digits: shards of one cluster share it.
    pub split: String,
    /// SHA-256 of the source model file.
    pub source_sha256: String,
    /// SHA-256 of the policy file, where there was one.
    pub policy_sha256: Option<String>,
    /// Name and version of the tool that wrote the shard.
    pub tool: String,
}

impl ShardInfo {
    /// Reads what [`ShardInfo::entries`] wrote.
    ///
    /// # Errors
    /// The first key that is missing or makes no sense: the file is no shard.
    pub fn read<'a>(get: impl Fn(&str) -> Option<&'a str>) -> Result<ShardInfo, MetadataError> {
        let text = |key: &'static str| get(key).ok_or(MetadataError::Missing { key });
        let number = |key: &'static str| {
            let found = text(key)?;
            found.parse().map_err(|_| MetadataError::Value { key, found: found.to_owned() })
        };
        let split = text(SPLIT)?;
        if split.len() != 64 || !split.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(MetadataError::Value { key: SPLIT, found: split.to_owned() });
        }
        let info = ShardInfo {
            rank: number(RANK)?,
            nodes: number(NODES)?,
            entry: number(ENTRY)?,
            groups: number(GROUPS)?,
            split: split.to_owned(),
            source_sha256: text(SOURCE)?.to_owned(),
            policy_sha256: get(POLICY).map(str::to_owned),
            tool: text(TOOL)?.to_owned(),
        };
        if info.nodes == 0 || info.nodes > crate::MAX_GROUPS {
            return Err(MetadataError::Value { key: NODES, found: info.nodes.to_string() });
        }
        for (key, rank) in [(RANK, info.rank), (ENTRY, info.entry)] {
            if rank >= info.nodes {
                return Err(MetadataError::Value { key, found: rank.to_string() });
            }
        }
        Ok(info)
    }

    /// The metadata entries of a shard.
    pub fn entries(&self) -> Vec<(String, String)> {
        let mut entries = vec![
            (RANK, self.rank.to_string()),
            (NODES, self.nodes.to_string()),
            (ENTRY, self.entry.to_string()),
            (GROUPS, self.groups.to_string()),
            (SPLIT, self.split.clone()),
            (SOURCE, self.source_sha256.clone()),
        ];
        entries.extend(self.policy_sha256.clone().map(|hash| (POLICY, hash)));
        entries.push((TOOL, self.tool.clone()));
        entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

fn parse_list(text: &str) -> Option<Vec<f32>> {
    text.split(',').map(|item| item.trim().parse().ok()).collect()
}

fn format_list(list: &[f32]) -> String {
    let mut text = String::new();
    for (index, value) in list.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        // Writing to a String cannot end in an error.
        let _ = write!(text, "{comma}{value}");
    }
    text
}

/// Why a model's metadata cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetadataError {
    /// A key that a shard must have.
    #[error("metadata \"{key}\" is missing: not a shard written by snnc split")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value that makes no sense.
    #[error("metadata \"{key}\" has the unusable value \"{found}\"")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
    },
}
