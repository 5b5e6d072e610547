//! Pauses that end on time: what emulated devices and links wait with.
//!
//! Takes a moment; returns at it, some microseconds late on an idle machine. A thread that sleeps is
//! woken 50 to 100 µs late by the kernel's timer slack, as long as some of the pauses here are: the end
//! of each is waited for awake, giving way to whoever else wants the core.

use std::thread;
use std::time::{Duration, Instant};

/// What a sleep is ended early by: the kernel's timer slack of 50 µs and the time to wake up.
const EARLY: Duration = Duration::from_micros(90);

/// Returns at `end`, at once where that is past.
pub(crate) fn until(end: Instant) {
    let left = end.saturating_duration_since(Instant::now());
    if left > EARLY {
        thread::sleep(left - EARLY);
    }
    while Instant::now() < end {
        thread::yield_now();
    }
}
