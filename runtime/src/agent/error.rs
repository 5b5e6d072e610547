//! What an agent refuses or cannot do, in one sentence each: whoever deploys is told, and the log.

use std::time::Duration;

use super::store::StoreError;
use super::wire::{self, MAX_PEERS, Settings, Version};
use crate::client::AskError;
use crate::transport::zenoh::LinkError;

/// What an agent cannot do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// An address, or the network.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A message that is none.
    #[error(transparent)]
    Wire(#[from] wire::WireError),
    /// A cluster that does not answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// No port is free.
    #[error("no port: {0}")]
    Port(#[source] std::io::Error),
    /// A node cannot be started.
    #[error("node: {0}")]
    Launch(#[source] std::io::Error),
    /// More peers than a cluster can have.
    #[error("{found} peers, at most {MAX_PEERS} are possible")]
    Peers {
        /// Peers given.
        found: usize,
    },
    /// A time of nothing, or of more than a minute.
    #[error("{settings}: expected 1 to {} ms", wire::MAX_SETTING_MS)]
    Settings {
        /// The settings.
        settings: Settings,
    },
    /// Somebody else is at work.
    #[error(
        "{by} is deploying here; should that have died, others may in {} s",
        left.as_secs_f32().ceil()
    )]
    Claimed {
        /// Who it is.
        by: String,
        /// How long without a word until others may.
        left: Duration,
    },
    /// Whoever asks has not claimed the agent, or another has meanwhile.
    #[error("changed by nobody but who has claimed it")]
    Unclaimed,
    /// The version runs.
    #[error("version {version} runs")]
    Runs {
        /// The version.
        version: Version,
    },
    /// The version does not run.
    #[error("version {version} does not run")]
    Stopped {
        /// The version.
        version: Version,
    },
}
