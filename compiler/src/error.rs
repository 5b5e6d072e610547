//! What can be wrong with a model, a policy or a placement, a variant a rule.
//!
//! Every message is one line: stage, op or tensor, reason. The binary puts the file in front.

use snn_schemas::onnx::OnnxError;

/// Why a model cannot be compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The bytes are no ONNX model.
    #[error("read: {0}")]
    Onnx(#[from] OnnxError),
    /// The graph contradicts itself.
    #[error("read: {0}")]
    Malformed(String),
    /// Part of the weights is in other files.
    #[error(
        "read: tensor \"{tensor}\" has its data in the file \"{location}\"; save the model as one file"
    )]
    ExternalData {
        /// The tensor.
        tensor: String,
        /// Where its data is.
        location: String,
    },
    /// An input whose shape is not known.
    #[error("shapes: input \"{input}\" has the dynamic shape [{shape}]; give --input-shape")]
    DynamicShape {
        /// The input.
        input: String,
        /// Its shape as the model states it.
        shape: String,
    },
    /// `--input-shape` does not fit the model.
    #[error("shapes: input \"{input}\" is [{expected}], --input-shape says {given:?}")]
    InputShape {
        /// The input.
        input: String,
        /// Shape in the model.
        expected: String,
        /// Shape that was given.
        given: Vec<usize>,
    },
    /// An op of unknown type.
    #[error("shapes: op \"{op}\" has the unknown type {op_type}")]
    UnknownOp {
        /// The op.
        op: String,
        /// Its type, with its domain.
        op_type: String,
    },
    /// Shape inference ended in an error.
    #[error("shapes: {0}")]
    Inference(String),
    /// The shape of a tensor does not follow from the model.
    #[error(
        "shapes: the shape of \"{tensor}\" (op \"{op}\", {op_type}) does not follow from the model"
    )]
    NoShape {
        /// The tensor.
        tensor: String,
        /// The op that gives it.
        op: String,
        /// Its type.
        op_type: String,
    },
    /// An op that needs features of several groups.
    #[error("groups: op \"{op}\" mixes all {groups} groups ({detail})")]
    Mixes {
        /// The op.
        op: String,
        /// G.
        groups: usize,
        /// Its type and the reason.
        detail: String,
    },
    /// No op works on groups at all.
    #[error("groups: no op of the model works on {} independent groups of channels", .groups.map_or("2 to 8".to_owned(), |groups| groups.to_string()))]
    NoGroups {
        /// How many were asked for.
        groups: Option<usize>,
    },
    /// An op that holds other graphs cannot be rewritten.
    #[error("groups: op \"{op}\" ({op_type}) holds a graph of its own, which cannot be split")]
    Subgraph {
        /// The op.
        op: String,
        /// Its type.
        op_type: String,
    },
    /// G is out of range.
    #[error("groups: {found} groups asked for, expected 2 to 8")]
    GroupCount {
        /// What was asked for.
        found: usize,
    },
    /// The policy is for another number of groups.
    #[error("policy: made for {policy} groups, the model has {model}")]
    PolicyGroups {
        /// The policy's groups.
        policy: usize,
        /// The model's.
        model: usize,
    },
    /// The policy is for another number of blocks.
    #[error(
        "policy: {found} steps, expected {expected} (⌊{blocks} blocks / staleness {staleness}⌋)"
    )]
    PolicySteps {
        /// Steps in the policy.
        found: usize,
        /// Steps that fit the model.
        expected: usize,
        /// Blocks of the model.
        blocks: usize,
        /// α.
        staleness: usize,
    },
    /// A policy for a model that cannot exchange.
    #[error("policy: given for a model without groups: {0}")]
    PolicyWithoutGroups(#[source] Box<CompileError>),
    /// The two ends of a step differ in shape.
    #[error(
        "exchange: step {step} sends {sent_shape:?} after {sent} but {added} adds to {added_shape:?}; choose a staleness that keeps both in one stage"
    )]
    CrossesStride {
        /// The step.
        step: usize,
        /// Block that sends.
        sent: String,
        /// Its shape.
        sent_shape: Vec<usize>,
        /// Block that receives.
        added: String,
        /// Its shape.
        added_shape: Vec<usize>,
    },
    /// More nodes than groups, or none.
    #[error("placement: {nodes} nodes for {groups} groups, expected 1 to {groups}")]
    Nodes {
        /// Nodes asked for.
        nodes: usize,
        /// G.
        groups: usize,
    },
    /// A placement list of the wrong length.
    #[error("placement: {found} entries, expected {groups}, one a group")]
    PlacementLength {
        /// Entries given.
        found: usize,
        /// G.
        groups: usize,
    },
    /// Ranks that leave a gap.
    #[error(
        "placement: node {missing} gets no group; ranks must run from 0 to {last} without gaps"
    )]
    PlacementGap {
        /// The rank nobody is placed on.
        missing: usize,
        /// The highest rank named.
        last: usize,
    },
    /// A stage gave a graph that breaks its rules: a fault of the compiler.
    #[error("verify: {0}")]
    Verify(String),
}
