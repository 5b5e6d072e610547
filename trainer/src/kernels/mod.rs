//! What a separable network spends its time on, computed for CPUs without layout copies.
//!
//! [`conv_norm`] is a grouped convolution with batch norm, residual sum and ReLU; [`exchange`] adds
//! what groups send one another. Both are ordinary differentiable operations on tensors of the CPU
//! device ([`runs_on`]), with gradients of their own; on other devices, in inference with stored
//! statistics and for export the network uses burn's layers, which give the same to rounding.

mod conv;
mod fused;
mod ops;
mod routes;
mod taps;

pub(crate) use ops::{ConvNormOptions, conv_norm, exchange, runs_on};
pub(crate) use routes::Routes;
