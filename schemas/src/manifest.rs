//! The manifest of a cluster (`cluster.json`): what `snnc split` wrote beside its shards.
//!
//! Takes and gives the JSON of the file. It names every node, every transfer with its exact size,
//! the hashes that tell two splits apart, and both costs. The shards alone suffice to run; the
//! manifest is what people, `snnc show` and a process that starts a whole cluster read.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::MAX_GROUPS;
use crate::codec::{Codec, Packing};
use crate::cost::Piece;
use crate::policy::Dtype;

/// File name of the manifest inside the folder of a split.
pub const MANIFEST_FILE: &str = "cluster.json";

/// The only version of the manifest there is so far.
pub const MANIFEST_VERSION: u32 = 1;

/// Largest manifest accepted, in bytes: thousands of transfers fit, a mistaken file does not.
pub const MAX_MANIFEST_BYTES: usize = 64 << 20;

/// A split network: its nodes, what they send each other, and what that costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "snn cluster manifest")]
pub struct Manifest {
    /// Version of this format: 1.
    pub version: u32,
    /// Name and version of the tool that wrote it.
    pub tool: String,
    /// Identity of the split: hash of source, policy, placement and input shape, in hexadecimal.
    /// Shards work together only if they carry the same one.
    pub split: String,
    /// SHA-256 of the source model file, in hexadecimal.
    pub source_sha256: String,
    /// SHA-256 of the policy file, in hexadecimal; absent when split without a policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_sha256: Option<String>,
    /// G, the number of groups; 1 for a model that is not separable.
    pub groups: usize,
    /// α, blocks computed per exchange; absent when split without a policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staleness: Option<usize>,
    /// Node of each group: `placement[g]` is the rank that computes group g.
    pub placement: Vec<usize>,
    /// Rank that takes the model's input and gives its output.
    pub entry: usize,
    /// The model's inputs, in order.
    pub inputs: Vec<Port>,
    /// The model's outputs, in order.
    pub outputs: Vec<Port>,
    /// One entry a node, by rank.
    pub nodes: Vec<NodeEntry>,
    /// Blocks of the trunk, in order; empty for a model that is not separable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockEntry>,
    /// What crosses between nodes, in the order in which it is sent.
    pub transfers: Vec<Transfer>,
    /// Both costs, never mixed.
    pub cost: Cost,
    /// The source model's own metadata (normalisation, class names), as it was found.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metadata: Vec<(String, String)>,
    /// The policy's provenance, as it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provenance: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A tensor at the model's edge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Name in the model.
    pub name: String,
    /// Shape, batch first.
    pub shape: Vec<usize>,
}

/// One node and its shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeEntry {
    /// The node's rank, from 0.
    pub rank: usize,
    /// Shard file, relative to the manifest.
    pub shard: String,
    /// SHA-256 of the shard file, in hexadecimal.
    pub sha256: String,
    /// Where the node listens (`tcp/192.168.1.11:7447`), for networks without discovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// What the node does for one request, in order: operations computed, transfers sent and received;
    /// what a prediction of its time needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schedule: Vec<Piece>,
}

/// A block of the trunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockEntry {
    /// Name of the block's output in the source model.
    pub name: String,
    /// Shape of one group's output.
    pub shape: Vec<usize>,
    /// Groups that compute the block; the others' results would reach no output.
    pub groups: Vec<usize>,
}

/// A tensor that crosses between two nodes once an inference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// Number of the transfer: t0, t1, …
    pub id: u32,
    /// Sending rank.
    pub from: usize,
    /// Receiving rank.
    pub to: usize,
    /// Group whose features are sent; absent for what belongs to none (the input, say).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_group: Option<usize>,
    /// Group that takes them; absent where stem or head does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_group: Option<usize>,
    /// The policy's step; absent for what no step asks for (the input, say).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<usize>,
    /// Name of the tensor that is sent.
    pub tensor: String,
    /// Shape as it travels (channels already cut to `keep`).
    pub shape: Vec<usize>,
    /// Channels sent.
    pub keep: usize,
    /// Channels the sender's tensor has.
    pub channels: usize,
    /// Element type on the wire.
    pub dtype: Dtype,
    /// Which elements travel in less: `zeros`, or `pixels` for an input that is a picture; when absent, none.
    #[serde(default, skip_serializing_if = "Packing::is_none")]
    pub packing: Packing,
    /// Bytes of tensor data that cross, scales included: exact, but an upper bound where `packing` is
    /// `zeros`, for how many elements are zero depends on the input, and where it is `pixels` those of a
    /// picture; an input that is none takes four times as many.
    pub bytes: u64,
}

/// What an inference costs in communication, by both measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// The paper's measure.
    pub paper: PaperCost,
    /// Bytes that really cross.
    pub wire: WireCost,
}

/// The paper's measure: sends counted against a ring all-reduce, tensor sizes ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PaperCost {
    /// Blocks of the trunk.
    pub blocks: usize,
    /// Share of a ring all-reduce after every block, 0 to 1.
    pub fraction: f64,
}

/// Bytes per inference, after operations that no output needs are gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WireCost {
    /// Bytes that the policy's steps send between nodes; with packing at most.
    pub exchange_bytes: u64,
    /// All other bytes between nodes: the input, a stem that is sent, a gathered head.
    pub other_bytes: u64,
    /// Bytes the policy would send if no operation were dropped and every group had its own node.
    pub planned_bytes: u64,
    /// Bytes of a ring all-reduce in f32 after every block among G nodes.
    pub ring_bytes: u64,
    /// `exchange_bytes / ring_bytes`, 0 to 1; 0 without a ring to compare with.
    pub fraction: f64,
}

impl Transfer {
    /// How it is written, but for the sign, which changes no size.
    pub fn codec(&self) -> Codec {
        Codec { packing: self.packing, ..Codec::plain(self.dtype) }
    }

    /// Bytes of tensor data that mostly cross, as [`Codec::bytes_with_zeros`] reckons them.
    pub fn bytes_with_zeros(&self, zeros: f64) -> u64 {
        let bytes = self.codec().bytes_with_zeros(&self.shape, zeros);
        bytes.map_or(self.bytes, |bytes| bytes as u64)
    }
}

impl Manifest {
    /// Reads a manifest and checks that its numbers fit together.
    ///
    /// # Errors
    /// What is wrong, in one sentence.
    pub fn from_json(json: &[u8]) -> Result<Manifest, ManifestError> {
        if json.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge { bytes: json.len() });
        }
        let manifest: Manifest = serde_json::from_slice(json).map_err(ManifestError::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Writes the manifest, indented, with a final newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    fn check(&self) -> Result<(), ManifestError> {
        let nodes = self.nodes.len();
        let rank = |what: &'static str, rank: usize| match rank < nodes {
            true => Ok(()),
            false => Err(ManifestError::Rank { what, rank, nodes }),
        };
        if self.version != MANIFEST_VERSION {
            return Err(ManifestError::Version { found: self.version });
        }
        if nodes == 0 || nodes > MAX_GROUPS {
            return Err(ManifestError::Nodes { found: nodes });
        }
        if self.placement.len() != self.groups {
            let (found, groups) = (self.placement.len(), self.groups);
            return Err(ManifestError::Placement { found, groups });
        }
        for (index, node) in self.nodes.iter().enumerate() {
            if node.rank != index {
                return Err(ManifestError::RankOrder { index, found: node.rank });
            }
            // A shard is looked for beside its manifest and nowhere else.
            if Path::new(&node.shard).file_name() != Some(std::ffi::OsStr::new(&node.shard)) {
                return Err(ManifestError::ShardPath { rank: index, path: node.shard.clone() });
            }
        }
        rank("entry", self.entry)?;
        self.placement.iter().try_for_each(|&at| rank("placement", at))?;
        let group = |what: &'static str, group: usize| match group < self.groups {
            true => Ok(()),
            false => Err(ManifestError::Group { what, group, groups: self.groups }),
        };
        for block in &self.blocks {
            block.groups.iter().try_for_each(|&of| group("block", of))?;
        }
        for transfer in &self.transfers {
            rank("transfer", transfer.from)?;
            rank("transfer", transfer.to)?;
            let ends = [transfer.from_group, transfer.to_group];
            ends.into_iter().flatten().try_for_each(|of| group("transfer", of))?;
            let added_in = |step: usize| step.checked_add(1)?.checked_mul(self.staleness?);
            if let Some(step) = transfer.step
                && added_in(step).is_none_or(|block| block == 0 || block > self.blocks.len())
            {
                let (id, blocks) = (transfer.id, self.blocks.len());
                return Err(ManifestError::Step { id, step, blocks });
            }
            if transfer.codec().stated_bytes(&transfer.shape).map(|n| n as u64)
                != Some(transfer.bytes)
            {
                return Err(ManifestError::Bytes { id: transfer.id, bytes: transfer.bytes });
            }
        }
        self.check_schedules()
    }

    fn check_schedules(&self) -> Result<(), ManifestError> {
        let pieces =
            self.nodes.iter().flat_map(|node| node.schedule.iter().map(|p| (node.rank, p)));
        for (rank, piece) in pieces {
            let (id, end): (_, fn(&Transfer) -> usize) = match *piece {
                Piece::Compute(_) => continue,
                Piece::Send(id) => (id, |transfer| transfer.from),
                Piece::Receive(id) => (id, |transfer| transfer.to),
            };
            let transfer = self.transfers.get(id as usize);
            if !transfer.is_some_and(|t| t.id == id && end(t) == rank) {
                return Err(ManifestError::Schedule { rank, id });
            }
        }
        Ok(())
    }

    /// Bytes a node sends and receives per inference.
    pub fn traffic(&self, rank: usize) -> (u64, u64) {
        let sum = |mine: &dyn Fn(&Transfer) -> bool| {
            let mine = self.transfers.iter().filter(|t| mine(t));
            mine.fold(0, |sum: u64, t| sum.saturating_add(t.bytes))
        };
        (sum(&|t| t.from == rank), sum(&|t| t.to == rank))
    }
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not JSON, a missing or unknown key, or a value of the wrong type.
    #[error("{0}")]
    Json(#[source] serde_json::Error),
    /// The file is larger than [`MAX_MANIFEST_BYTES`].
    #[error("{bytes} bytes are more than the {MAX_MANIFEST_BYTES} a manifest may have")]
    TooLarge {
        /// Size of the file.
        bytes: usize,
    },
    /// Made for a newer or an unknown format.
    #[error("version {found}, expected {MANIFEST_VERSION}")]
    Version {
        /// The file's version.
        found: u32,
    },
    /// No nodes, or more than there can be groups.
    #[error("{found} nodes, expected 1 to {MAX_GROUPS}")]
    Nodes {
        /// Nodes listed.
        found: usize,
    },
    /// Nodes are not listed by rank.
    #[error("node {index} has rank {found}, expected {index}")]
    RankOrder {
        /// Place in the list.
        index: usize,
        /// Rank found there.
        found: usize,
    },
    /// A rank that no node has.
    #[error("{what} names rank {rank}, but there are {nodes} nodes")]
    Rank {
        /// Which field.
        what: &'static str,
        /// The rank it names.
        rank: usize,
        /// Nodes listed.
        nodes: usize,
    },
    /// Not one entry a group.
    #[error("placement has {found} entries, expected {groups}, one a group")]
    Placement {
        /// Entries listed.
        found: usize,
        /// G.
        groups: usize,
    },
    /// A group that does not exist.
    #[error("{what} names group {group}, but there are {groups} groups")]
    Group {
        /// Which field.
        what: &'static str,
        /// The group it names.
        group: usize,
        /// G.
        groups: usize,
    },
    /// A step whose block does not exist.
    #[error("transfer t{id}: step {step} lies beyond the {blocks} blocks")]
    Step {
        /// The transfer.
        id: u32,
        /// Its step.
        step: usize,
        /// Blocks listed.
        blocks: usize,
    },
    /// A schedule that sends or receives what the node does not.
    #[error("schedule of rank {rank}: transfer t{id} is not its own")]
    Schedule {
        /// The node.
        rank: usize,
        /// The transfer.
        id: u32,
    },
    /// A shard path that leaves the manifest's folder.
    #[error("shard of rank {rank} is {path:?}, expected a file name")]
    ShardPath {
        /// The node.
        rank: usize,
        /// The path that was given.
        path: String,
    },
    /// A transfer whose size does not follow from its shape.
    #[error("transfer t{id}: {bytes} bytes do not follow from its shape and dtype")]
    Bytes {
        /// The transfer.
        id: u32,
        /// The size that was given.
        bytes: u64,
    },
}
