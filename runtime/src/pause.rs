//! Pauses that end on time: what emulated devices and links wait with.
//!
//! Takes a moment; returns at it, some microseconds late on an idle machine. A thread that sleeps is
//! woken late: by 25 µs in a real-time class on a core that is awake, by 100 µs and more where the kernel
//! bundles its timers and the core is a virtual one that has gone to sleep, and some of the pauses here are
//! no longer than that. So sleeps end early by what recent ones were late by, and the rest is waited for awake,
//! giving way to whoever else wants the core.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Mean of what recent sleeps were late by, in ns; at first, what is usual.
static LATE: AtomicU64 = AtomicU64::new(60_000);
/// Lateness that one sleep is believed: more is somebody else's use of the core.
const BELIEVED: Duration = Duration::from_micros(200);
/// Sleeps that the mean is of, about.
const MEMORY: u64 = 16;

/// What a sleep should end early by.
pub(crate) fn early() -> Duration {
    Duration::from_nanos(LATE.load(Ordering::Relaxed) * 3 / 2)
}

/// Tells of a sleep that should have ended at `wanted` and has just ended.
pub(crate) fn woken(wanted: Instant) {
    let late = wanted.elapsed().min(BELIEVED).as_nanos() as u64;
    // Two that tell at once may lose one of them: it is a mean.
    let mean = LATE.load(Ordering::Relaxed);
    LATE.store((mean * (MEMORY - 1) + late) / MEMORY, Ordering::Relaxed);
}

/// Returns at `end`, at once where that is past; gives how late that was.
pub(crate) fn until(end: Instant) -> Duration {
    let left = end.saturating_duration_since(Instant::now());
    if let Some(sleep) = left.checked_sub(early()) {
        let wake = Instant::now() + sleep;
        thread::sleep(sleep);
        woken(wake);
    }
    loop {
        let now = Instant::now();
        match now >= end {
            true => return now - end,
            false => thread::yield_now(),
        }
    }
}
