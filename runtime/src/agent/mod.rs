//! Agents: processes that wait on devices for work, and what those who deploy say to them.
//!
//! An [`Agent`] keeps shards on its device's disk ([`store`]), runs nodes through a [`Launcher`], and
//! answers clients at addresses that stay the same while versions come and go ([`front`]). Whoever
//! deploys reaches it as a [`Remote`], with the messages of [`wire`]: both ends prove that they have
//! the cluster's key (mutual TLS), and without a key an agent listens on its own machine only. A
//! *version* is one `cluster.json`, named by its SHA-256, with the shards whose hashes it lists.
//!
//! Whoever deploys claims the agents first, so that nobody else changes them meanwhile; the claim of
//! somebody who is gone ends by itself ([`CLAIM_WITHIN`]). A version is sent, started beside the one that
//! runs, asked, made the current one, and only then is the old one drained and stopped. One that is started
//! but never becomes current ends by itself ([`TRIAL_WITHIN`]): whoever deployed it is gone. After a
//! restart an agent runs its current version.

pub mod wire;

pub mod front;
pub mod store;

mod claim;
mod error;
mod launch;
mod server;

mod remote;

pub use claim::CLAIM_WITHIN;
pub use error::AgentError;
pub use launch::{Launched, Launcher, NodeOrder};
pub use remote::{Remote, RemoteError, find};
pub use server::{Agent, AgentOptions, TRIAL_WITHIN};
pub use wire::{Description, NodeState, Settings, Version, VersionState};

/// Port an agent listens on where nobody says otherwise.
pub const AGENT_PORT: u16 = 7448;
/// Port at which an agent answers clients where nobody says otherwise.
pub const FRONT_PORT: u16 = 7447;
