//! What lets four devices share the cores of one machine: each of them would have its own.
//!
//! Takes the nodes' processes. What carries frames runs before what computes, as it would on a device whose
//! network hardware interrupts it (a slowed node sleeps for most of the time that it computes, and so
//! makes up for being interrupted); both run before whatever else the machine does. Cores are kept from
//! falling asleep: waking a virtual one takes 50 µs and more, a third of the way between two nodes.
//! Needs `chrt` and the right to use it; without them everything stays as it is, and [`Classes`] says so.

use std::fs;
use std::hint;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde::{Deserialize, Serialize};

/// Real-time priorities of threads that compute, and of all others.
const COMPUTE: &str = "1";
const CARRY: &str = "2";
/// How the names of the threads that compute begin.
const COMPUTE_THREADS: &str = "snn-compute";

/// In which scheduling class the nodes ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Classes {
    /// Before everything else.
    RealTime,
    /// Beside whatever else the machine did.
    Ordinary,
}

/// Whether `chrt` did as it was told.
fn chrt(words: &[&str]) -> bool {
    let mut command = Command::new("chrt");
    command.args(words).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Puts processes before whatever else the machine does.
pub(crate) fn favour(processes: impl IntoIterator<Item = u32>) -> Classes {
    let favoured = processes.into_iter().all(|process| {
        let process = process.to_string();
        chrt(&["-a", "-r", "-p", CARRY, &process]) && compute_threads(&process)
    });
    if favoured { Classes::RealTime } else { Classes::Ordinary }
}

/// Puts the threads of a process that compute behind its others.
fn compute_threads(process: &str) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return false };
    threads.flatten().all(|thread| {
        let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        let number = thread.file_name();
        let Some(number) = number.to_str() else { return false };
        !name.starts_with(COMPUTE_THREADS) || chrt(&["-r", "-p", COMPUTE, number])
    })
}

/// Keeps every core awake until dropped, at no cost to anybody who wants it.
pub(crate) struct Awake {
    over: Arc<AtomicBool>,
}

impl Awake {
    pub(crate) fn start() -> Awake {
        let over = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            let over = Arc::clone(&over);
            thread::spawn(move || {
                // Only in a class that everybody else comes before.
                if own_number().is_some_and(|number| chrt(&["-i", "-p", "0", &number])) {
                    while !over.load(Ordering::Relaxed) {
                        hint::spin_loop();
                    }
                }
            });
        }
        Awake { over }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// The calling thread's number.
fn own_number() -> Option<String> {
    let link = fs::read_link(Path::new("/proc/thread-self")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}
