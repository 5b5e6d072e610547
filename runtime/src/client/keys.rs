//! Keys under which the processes of a cluster answer.
//!
//! Each takes a cluster's split, or what stands in its place, and gives a key of its own; a rank or a process where
//! several answer.

use crate::transport::zenoh::split_prefix;

/// Key under which one process answers what is asked under `key`. Each has its own: where several answer
/// under one and the same, and one of them stops, zenoh 1.10 forgets to take it off the routes it has worked
/// out, and once that process dies questions are sent to nobody and end unanswered, at their deadline.
pub(crate) fn own_key(key: &str, process: &str) -> String {
    format!("{key}/{process}")
}

/// Key under which everybody is asked who answers under `key`.
pub(crate) fn all_keys(key: &str) -> String {
    format!("{key}/*")
}

/// Key under which the entry node describes its cluster.
pub(crate) fn info_key(split: &str) -> String {
    format!("snn/{}/info", split_prefix(split))
}

/// Key under which the entry node answers.
pub(crate) fn infer_key(split: &str) -> String {
    format!("snn/{}/infer", split_prefix(split))
}

/// Key under which a process of the cluster asks the cluster for others.
pub(crate) fn door_key(split: &str, process: &str) -> String {
    format!("snn/{}/door/{process}", split_prefix(split))
}

/// Key under which the shard of a rank is handed out; of `*` those of all ranks.
pub(crate) fn shard_key(split: &str, rank: &str) -> String {
    format!("snn/{}/shard/{rank}", split_prefix(split))
}

/// Key under which a node reports.
pub(crate) fn report_key(split: &str, rank: usize) -> String {
    format!("snn/{}/report/{rank}", split_prefix(split))
}

/// Key under which all nodes are asked for their reports.
pub(crate) fn all_reports_key(split: &str) -> String {
    format!("snn/{}/report/*/*", split_prefix(split))
}
