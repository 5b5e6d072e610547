//! What a separable network spends its time on, in formulations of our own.
//!
//! On a CPU, without layout copies: [`conv_norm`] is a grouped convolution with batch norm, residual sum and ReLU;
//! [`exchange`] adds what groups send one another. On a GPU, out of burn's operations: [`same_conv`], a convolution, and
//! [`batch_norm`]. All are ordinary differentiable operations with gradients of their own; [`runs_on`] says whether a device is
//! the CPU. In inference with stored statistics and for export the network uses burn's layers, which give the
//! same to rounding.

mod conv;
mod fused;
mod gpu;
mod ops;
mod routes;
mod taps;

pub(crate) use gpu::{batch_norm, same_conv};
pub(crate) use ops::{ConvNormOptions, conv_norm, exchange, runs_on};
pub(crate) use routes::Routes;
