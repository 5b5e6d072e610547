//! Runs the shards of a split network, computing while tensors travel.
//!
//! Takes shards as `snnc split` writes them; gives nodes that answer together. A [`Shard`] is cut at
//! its sends and receives into segments of standard ops, which an [`Engine`] computes. A [`Node`]
//! goes through its shard's steps on a thread of its own: a send leaves with the transport while the
//! next segment runs, a receive takes its tensor from the [`mailbox`], and waits only if it is not
//! there yet. [`transport`]s carry frames between nodes, [`serve`] and [`client`] connect a cluster
//! with those who ask it.
//!
//! Nothing is printed and nothing exits. Every wait has a deadline, every task an owner, and every
//! buffer that a peer fills a named limit.

pub mod digest;
pub mod shard;

pub mod engine;
mod fuse;
pub mod kernels;
mod pause;
pub mod profile;

pub mod key;
pub mod mailbox;
pub mod transport;

pub mod watch;

pub mod node;

pub mod kept;
pub mod knowledge;
pub mod membership;
pub mod questions;
pub mod serve;
pub mod shelf;

pub mod client;
pub mod http;

pub mod agent;

pub use engine::tract::TractEngine;
pub use engine::{Engine, EngineError, Executor};
pub use node::{InferError, Node, NodeReport};
pub use shard::{Shard, ShardError};
pub use snn_schemas::wire::{Answer, Tensor};

#[cfg(target_endian = "big")]
compile_error!("tensors are read and written as they stand in memory, which must be little-endian");
