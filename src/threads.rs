//! The network's threads: with a key reading and writing share one, as zenoh's TLS needs.
//!
//! A zenoh TLS link (1.10) reads and writes one rustls stream, each from a task of its own, and nothing
//! keeps them apart: on two threads a write meets a connection that a read has half changed, fails with
//! "handshake not complete", and the link is lost with the frames on it, every few hundred requests under
//! load. Both on one thread never meet. It has a price: what one process passes on for another has to fit the
//! queue of its link (16 batches), because nothing is written while what is read waits for room in it. So
//! a process without a key keeps its threads. Zenoh takes this from its environment only, which is read
//! once, so a process that lacks it becomes itself again with it.

use std::env;
use std::ffi::OsStr;

/// Variable in which zenoh looks for its threads.
const VARIABLE: &str = "ZENOH_RUNTIME";
/// Reading on the one thread that writes.
const ONE_THREAD: &str = "(rx: (handover: tx), tx: (worker_threads: 1))";

/// Sees to it that zenoh reads and writes on one thread where the command line names a key and nobody has
/// said otherwise. To be called before anything is started: the process may begin anew.
pub fn share_one() {
    if env::var_os(VARIABLE).is_some() || !env::args_os().any(|word| names_key(&word)) {
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

/// Whether a word of a command line is the option for the cluster's key.
fn names_key(word: &OsStr) -> bool {
    word == "--key" || word.as_encoded_bytes().starts_with(b"--key=")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_named_in_one_word_or_two() {
        for (word, expected) in
            [("--key", true), ("--key=c.key", true), ("--keys", false), ("key", false)]
        {
            assert_eq!(names_key(OsStr::new(word)), expected, "{word}");
        }
    }
}
