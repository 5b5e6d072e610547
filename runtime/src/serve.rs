//! A node on the network: its cluster on one side, those who ask on the other.
//!
//! [`Server::start`] takes an open [`Link`], a shard and the engine for it, and joins the cluster. The
//! entry node then answers inference requests and says what the model takes and gives; every node
//! reports what it has counted. A question that is too large, cannot be read, or comes while
//! [`MAX_ASKED`] others are being answered is refused with a reason; others are unharmed.
//! Shutting down, or dropping the server, ends every task it started.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::wire;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use zenoh::Wait as _;
use zenoh::query::{Query, Queryable};

use crate::client::{ClusterInfo, info_key, infer_key, report_key};
use crate::transport::zenoh::{Identity, Link, LinkError, into_bytes, one_line, session_error};

/// Questions answered at once; each holds its input in memory until its answer is sent.
pub const MAX_ASKED: usize = 64;
/// Longest time a question may give its answer: memory is not held for ever.
pub const MAX_WITHIN: Duration = Duration::from_secs(600);
