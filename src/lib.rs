//! Runs one neural network on several small devices, faster than on any one of them.
//!
//! What the two binaries do, as a library: [`compile`] is behind `snnc`, [`run`] behind `snn-run`. Each
//! takes parsed arguments and gives an exit code; examples and tests start clusters with
//! [`run::local`]. The work itself is done by the crates `snn-compiler` and `snn-runtime`.

pub mod compile;

pub mod run;

pub mod chart;
mod key;
pub mod terminal;
