//! The network's threads: reading and writing share one, as zenoh's TLS needs.
//!
//! A zenoh TLS link (1.10) reads and writes one rustls stream, each from a task of its own, and nothing
//! keeps them apart: on two threads a write meets a connection that a read has half changed, fails with
//! "handshake not complete", and the link is lost with the frames on it, every few hundred requests under
//! load. Both on one thread never meet. Zenoh takes this from its environment only, which is read once,
//! so a process that lacks it becomes itself again with it.

use std::env;

/// Variable in which zenoh looks for its threads.
const VARIABLE: &str = "ZENOH_RUNTIME";
/// Reading on the one thread that writes.
const ONE_THREAD: &str = "(rx: (handover: tx), tx: (worker_threads: 1))";

/// Sees to it that zenoh reads and writes on one thread, where nobody has said otherwise. To be called
/// before anything is started: the process may begin anew.
pub fn share_one() {
    if env::var_os(VARIABLE).is_some() {
        return;
    }
    #[cfg(unix)]
    if let Ok(executable) = env::current_exe() {
        use std::os::unix::process::CommandExt as _;
        let mut again = std::process::Command::new(executable);
        let mut words = env::args_os();
        if let Some(name) = words.next() {
            again.arg0(name);
        }
        // Returns only where it fails; then the process goes on as it is, which works, but less well.
        let error = again.args(words).env(VARIABLE, ONE_THREAD).exec();
        tracing::debug!(%error, "the network keeps its threads");
    }
}
