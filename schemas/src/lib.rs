//! What crosses a file or process boundary in `snn`, and nothing else.
//!
//! Takes and gives bytes: ONNX models ([`onnx`]), communication policies ([`policy`]), cluster
//! manifests ([`manifest`]), wire frames ([`wire`]) and the features in them ([`codec`]); [`cost`] reckons
//! what a placement takes in time, [`reach`] which exchanges matter. Reading untrusted bytes gives an error of one sentence or a value whose
//! documented rules hold; it never panics and never allocates more than the bytes justify. The crate does
//! no I/O.

pub mod onnx;
pub mod policy;

pub mod manifest;
pub mod metadata;

pub mod codec;
pub mod wire;

pub mod cost;
pub mod reach;

/// Most groups, and so most nodes, a network may have. Eight groups already have 40,320 decisions a
/// step; devices beyond that are better served by a second cluster.
pub const MAX_GROUPS: usize = 8;

pub use codec::{Codec, Packing};
pub use manifest::Manifest;
pub use policy::{Decision, Dtype, Levels, Policy, Step};
pub use reach::Reach;
