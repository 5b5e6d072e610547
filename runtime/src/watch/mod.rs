//! Watching a node: what it counts, when it did what, and what has happened to it.
//!
//! A node feeds a [`Histogram`] of latencies, a [`Recorder`] of spans and a [`Log`] of events while it
//! works; none of them waits for a reader. From them come Prometheus' text ([`metrics`]) and, of
//! several nodes on one time axis, a trace for Perfetto ([`trace`]), whose clocks [`clock`] compares. A
//! [`Recording`] is such a trace of a running cluster, over the network.
//! Everything kept here is bounded, and recording costs one load of a flag while it is off.

pub mod clock;
mod events;
mod histogram;
pub mod metrics;
mod recorder;
pub(crate) mod recording;
mod seldom;
pub mod trace;

pub use events::{Event, Log};
pub use histogram::{BOUNDS_MS, Histogram};
pub use recorder::{Kind, Lane, MAX_SPANS, Recorder, Span};
pub use recording::Recording;
pub(crate) use seldom::Seldom;
