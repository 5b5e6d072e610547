//! What computes segments: a trait, and tract behind it.
//!
//! An [`Engine`] loads a [`Program`] and gives an [`Executor`], which holds the memory of every
//! request in progress. Between its segments a tensor stays there in whatever form the engine likes;
//! only what travels, enters or leaves is written and read: as plain little-endian elements, or, to and
//! from other nodes, as the transfer's codec says. An executor lives on one thread; what leaves is given
//! out as a tensor of its own, which any thread may encode.

pub mod slowed;
pub mod tract;

use std::sync::Arc;

use bytes::BytesMut;

use snn_schemas::Codec;

use crate::shard::{Program, Slot};

/// Memory of one request within an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job(pub usize);

/// Turns programs into something that computes.
pub trait Engine {
    /// Loads a program: everything that can be prepared before the first request is.
    ///
    /// # Errors
    /// A segment that the engine cannot compute.
    fn load(&mut self, program: &Program) -> Result<Box<dyn Executor>, EngineError>;
}

impl Engine for Box<dyn Engine> {
    fn load(&mut self, program: &Program) -> Result<Box<dyn Executor>, EngineError> {
        (**self).load(program)
    }
}

/// Computes a loaded program for any number of requests.
pub trait Executor {
    /// Memory for a request: empty slots.
    fn begin(&mut self) -> Job;

    /// Gives a request's memory back.
    fn end(&mut self, job: Job);

    /// Fills a slot with a tensor from another node, from the payload that `codec` wrote.
    ///
    /// # Errors
    /// The payload is of another tensor.
    fn receive(
        &mut self,
        job: Job,
        slot: Slot,
        codec: Codec,
        payload: &[u8],
    ) -> Result<(), EngineError>;

    /// Fills a slot with a tensor's elements, row-major and little-endian.
    ///
    /// # Errors
    /// Not as many bytes as the slot's tensor has.
    fn write(&mut self, job: Job, slot: Slot, elements: &[u8]) -> Result<(), EngineError>;

    /// Computes a segment, whose inputs have been filled.
    ///
    /// # Errors
    /// What the engine says.
    fn compute(&mut self, job: Job, segment: usize) -> Result<(), EngineError>;

    /// A tensor for another node. The slot may be empty afterwards, where nobody else reads it.
    ///
    /// # Errors
    /// The slot is empty.
    fn send(&mut self, job: Job, slot: Slot) -> Result<Arc<dyn Outgoing>, EngineError>;

    /// Appends a tensor's elements, row-major and little-endian.
    ///
    /// # Errors
    /// The slot is empty.
    fn read(&mut self, job: Job, slot: Slot, into: &mut BytesMut) -> Result<(), EngineError>;

    /// Shape of a slot's tensor, once it is filled.
    ///
    /// # Errors
    /// The slot is empty.
    fn shape(&self, job: Job, slot: Slot) -> Result<Vec<usize>, EngineError>;
}

/// A tensor on its way to another node: it outlives its request, and any thread may encode it.
pub trait Outgoing: Send + Sync {
    /// Appends the tensor as `codec` writes it.
    ///
    /// # Errors
    /// Its elements are not of a type that `codec` takes.
    fn put(&self, codec: Codec, into: &mut BytesMut) -> Result<(), String>;

    /// Its elements.
    ///
    /// # Errors
    /// They are not f32.
    fn numbers(&self) -> Result<&[f32], String>;
}

/// Why a segment cannot be loaded or computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The engine cannot load a segment.
    #[error("segment {segment}: {reason}")]
    Load {
        /// Which one.
        segment: usize,
        /// The engine's answer.
        reason: String,
    },
    /// The model takes or gives something else than f32.
    #[error("{what} \"{name}\" is {found}, expected f32 of a fixed shape")]
    Edge {
        /// `input` or `output`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What it is.
        found: String,
    },
    /// The engine failed while computing.
    #[error("segment {segment}: {reason}")]
    Compute {
        /// Which segment.
        segment: usize,
        /// The engine's answer.
        reason: String,
    },
    /// A tensor of another size, or none at all.
    #[error("tensor \"{name}\": {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}
