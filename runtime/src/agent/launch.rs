//! What an agent runs nodes with: orders, and whoever turns them into processes.
//!
//! A [`Launcher`] takes a [`NodeOrder`] and gives a [`Launched`] node, which is kept running, says what it
//! is doing, and has ended once it is stopped or dropped.

use std::path::PathBuf;

use super::wire::{NodeState, Settings, Version};

/// What a node is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeOrder {
    /// The shard.
    pub shard: PathBuf,
    /// The version, by which its nodes look for each other.
    pub version: Version,
    /// Address to listen on.
    pub listen: String,
    /// Addresses of the other nodes.
    pub peers: Vec<String>,
    /// How it runs.
    pub settings: Settings,
}

/// Runs nodes.
pub trait Launcher: Send + Sync + 'static {
    /// Starts a node, and starts it again whenever it ends.
    ///
    /// # Errors
    /// Why there is none.
    fn launch(&self, order: NodeOrder) -> std::io::Result<Box<dyn Launched>>;
}

/// A node that is kept running. Dropping it ends it.
pub trait Launched: Send + Sync {
    /// What it is doing.
    fn state(&self) -> NodeState;
    /// Ends it, and waits for its end; blocks.
    fn stop(self: Box<Self>);
}
