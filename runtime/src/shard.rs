//! A shard, cut into what a node does: segments to compute, tensors to send and to receive.
//!
//! Takes the bytes of an ONNX file, a shard of `snnc split` or any model (then a cluster of one
//! node); gives a [`Program`]. Runs of standard ops between two sends or receives become segments,
//! each an ONNX model of its own. A tensor that outlives its segment, travels, or stands at the
//! model's edge has a [`Slot`]. What a program says has been checked: every slot is filled before it is
//! read, every transfer has a peer of the cluster and a size.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use snn_schemas::codec::Pixels;
use snn_schemas::metadata::{
    MetadataError, Normalisation, RECV_OP, SEND_OP, SNN_DOMAIN, ShardInfo,
};
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{self, GraphProto, ModelProto, NodeProto, OnnxError, ValueInfoProto};
use snn_schemas::wire::MAX_FRAME;
use snn_schemas::{Codec, Dtype, Packing};

use crate::digest::Digest;

/// Metadata key that only shards have.
const SHARD_KEY: &str = "snn.split";
/// Transfers of one cluster: a thousand exchanges of eight groups.
const MAX_TRANSFER: i64 = 1 << 16;

/// A tensor that outlives its segment: a place in a request's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

/// What is known of a slot's tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The tensor's name in the shard.
    pub name: String,
    /// Its shape where the file states it, batch first.
    pub shape: Option<Vec<usize>>,
    /// Its element type, where it is one that travels.
    pub dtype: Option<Dtype>,
}

/// A tensor that crosses between this node and another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// Number of the transfer in the cluster.
    pub transfer: u32,
    /// The other node's rank.
    pub peer: usize,
    /// The policy's step, where one asks for it.
    pub step: Option<usize>,
    /// How it is written on the wire.
    pub codec: Codec,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// Bytes of its payload, at most where the codec packs zeros.
    pub bytes: usize,
    /// Where the tensor is in a request's memory.
    pub slot: Slot,
}

/// One thing a node does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Computes a segment, by its index.
    Compute(usize),
    /// Hands a tensor to the transport.
    Send(Crossing),
    /// Takes a tensor from the mailbox.
    Receive(Crossing),
}

/// Standard ops between two sends or receives.
#[derive(Clone, Debug)]
pub struct Segment {
    /// The ops as a model: its inputs and outputs are the slots below, in order.
    pub model: ModelProto,
    /// Tensors it takes.
    pub inputs: Vec<Slot>,
    /// Tensors it gives.
    pub outputs: Vec<Slot>,
}

/// What a node does for one request.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// In order.
    pub steps: Vec<Step>,
    /// The segments that steps refer to.
    pub segments: Vec<Segment>,
    /// Every slot.
    pub slots: Vec<SlotInfo>,
    /// The model's inputs, on the entry node.
    pub inputs: Vec<Slot>,
    /// The model's outputs, on the entry node.
    pub outputs: Vec<Slot>,
    /// What the pixels of a picture are worth, where the model's input travels as such.
    pub pixels: Option<Arc<Pixels>>,
}

impl Program {
    /// What is known of a slot.
    pub fn slot(&self, slot: Slot) -> &SlotInfo {
        &self.slots[slot.0]
    }

    /// The tensors this node receives, in order.
    pub fn receives(&self) -> impl Iterator<Item = &Crossing> {
        self.steps.iter().filter_map(|step| match step {
            Step::Receive(crossing) => Some(crossing),
            _ => None,
        })
    }

    /// The tensors this node sends, in order.
    pub fn sends(&self) -> impl Iterator<Item = &Crossing> {
        self.steps.iter().filter_map(|step| match step {
            Step::Send(crossing) => Some(crossing),
            _ => None,
        })
    }
}

/// A shard, ready to be loaded by an engine.
#[derive(Clone, Debug)]
pub struct Shard {
    info: ShardInfo,
    digest: Digest,
    is_split: bool,
    metadata: Vec<(String, String)>,
    program: Program,
}

impl Shard {
    /// Reads an ONNX file. Weights share its memory.
    ///
    /// # Errors
    /// The bytes are no ONNX model, or a shard whose sends and receives make no sense.
    pub fn from_bytes(bytes: Bytes) -> Result<Shard, ShardError> {
        let digest = Digest::of(&bytes);
        let model = onnx::decode(bytes)?;
        let is_split = model.metadata(SHARD_KEY).is_some();
        let info = match is_split {
            true => ShardInfo::read(|key| model.metadata(key))?,
            false => alone(digest.to_string()),
        };
        let entry = |entry: &onnx::StringStringEntryProto| {
            (entry.key().to_owned(), entry.value().to_owned())
        };
        let metadata = model.metadata_props.iter().map(entry).collect();
        let mut program = Builder::new(&model, &info)?.build()?;
        program.pixels = pixels(&model, &program)?;
        Ok(Shard { info, digest, is_split, metadata, program })
    }

    /// Who the shard is; `None` for a model that was never split.
    pub fn info(&self) -> Option<&ShardInfo> {
        self.is_split.then_some(&self.info)
    }

    /// Who the node is that runs it: the shard's own word, or a cluster of one for a whole model.
    pub fn identity(&self) -> &ShardInfo {
        &self.info
    }

    /// Which file it is.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// What the node does.
    pub fn program(&self) -> &Program {
        &self.program
    }
}

/// A model that was never split: all of it on one node.
fn alone(sha256: String) -> ShardInfo {
    ShardInfo {
        rank: 0,
        nodes: 1,
        entry: 0,
        groups: 1,
        split: sha256.clone(),
        source_sha256: sha256,
        policy_sha256: None,
        tool: String::new(),
    }
}

fn is_communication(node: &NodeProto) -> bool {
    node.domain() == SNN_DOMAIN && matches!(node.op_type(), SEND_OP | RECV_OP)
}

/// Cuts one graph.
struct Builder<'a> {
    model: &'a ModelProto,
    graph: &'a GraphProto,
    info: &'a ShardInfo,
    values: HashMap<&'a str, &'a ValueInfoProto>,
    constants: HashMap<&'a str, usize>,
    /// Names with a slot.
    slots: HashMap<&'a str, Slot>,
    /// Slots that the steps so far have filled.
    filled: BTreeSet<Slot>,
    transfers: BTreeSet<u32>,
    program: Program,
}

impl<'a> Builder<'a> {
    fn new(model: &'a ModelProto, info: &'a ShardInfo) -> Result<Builder<'a>, ShardError> {
        let graph = model.graph.as_ref().ok_or(OnnxError::Incomplete { missing: "graph" })?;
        let described = graph.value_info.iter().chain(&graph.input).chain(&graph.output);
        let constants = graph.initializer.iter().enumerate();
        Ok(Builder {
            model,
            graph,
            info,
            values: described.map(|value| (value.name(), value)).collect(),
            constants: constants.map(|(index, tensor)| (tensor.name(), index)).collect(),
            slots: HashMap::new(),
            filled: BTreeSet::new(),
            transfers: BTreeSet::new(),
            program: Program::default(),
        })
    }

    fn build(mut self) -> Result<Program, ShardError> {
        let is_input = |input: &&ValueInfoProto| !self.constants.contains_key(input.name());
        let inputs: Vec<&ValueInfoProto> = self.graph.input.iter().filter(is_input).collect();
        for input in inputs {
            let slot = self.slot(input.name());
            self.filled.insert(slot);
            self.program.inputs.push(slot);
        }
        let graph = self.graph;
        let mut rest = graph.node.as_slice();
        while let Some(first) = rest.first() {
            let run = rest.iter().position(is_communication).unwrap_or(rest.len());
            if run > 0 {
                self.segment(&rest[..run], &rest[run..])?;
                rest = &rest[run..];
            } else {
                self.communicate(first)?;
                rest = &rest[1..];
            }
        }
        self.outputs()?;
        Ok(self.program)
    }

    /// The model's outputs; signals that sends give only order the file and are nobody's.
    fn outputs(&mut self) -> Result<(), ShardError> {
        let sends = self.graph.node.iter().filter(|node| is_communication(node));
        let signals: HashSet<&str> = sends
            .filter(|node| node.op_type() == SEND_OP)
            .flat_map(|node| node.output.iter().map(String::as_str))
            .collect();
        let graph = self.graph;
        for output in graph.output.iter().filter(|output| !signals.contains(output.name())) {
            let slot = self.slot(output.name());
            if !self.filled.contains(&slot) {
                return Err(ShardError::NotMade { tensor: output.name().to_owned() });
            }
            self.program.outputs.push(slot);
        }
        Ok(())
    }

    fn slot(&mut self, name: &'a str) -> Slot {
        if let Some(slot) = self.slots.get(name) {
            return *slot;
        }
        let slot = Slot(self.program.slots.len());
        let value = self.values.get(name);
        let dtype = match value.and_then(|value| value.element_type()) {
            Some(DataType::Float) => Some(Dtype::F32),
            Some(DataType::Float16) => Some(Dtype::F16),
            _ => None,
        };
        let shape = value.and_then(|value| value.shape()).and_then(|shape| {
            let extent = |extent: Option<i64>| usize::try_from(extent?).ok();
            shape.into_iter().map(extent).collect()
        });
        self.program.slots.push(SlotInfo { name: name.to_owned(), shape, dtype });
        self.slots.insert(name, slot);
        slot
    }

    /// The ops of `run` as a segment; `later` are the shard's ops behind it.
    fn segment(&mut self, run: &'a [NodeProto], later: &'a [NodeProto]) -> Result<(), ShardError> {
        let made: HashSet<&str> =
            run.iter().flat_map(|node| node.output.iter().map(String::as_str)).collect();
        let mut inputs: BTreeMap<Slot, &str> = BTreeMap::new();
        let mut constants: BTreeSet<usize> = BTreeSet::new();
        for name in run.iter().flat_map(names_taken) {
            if let Some(&index) = self.constants.get(name) {
                constants.insert(index);
            } else if !made.contains(name) {
                let slot = self.slot(name);
                if !self.filled.contains(&slot) {
                    return Err(ShardError::NotMade { tensor: name.to_owned() });
                }
                inputs.insert(slot, name);
            }
        }
        let wanted: HashSet<&str> = later
            .iter()
            .flat_map(names_taken)
            .chain(self.graph.output.iter().map(|output| output.name()))
            .collect();
        let mut outputs = Vec::new();
        for name in run.iter().flat_map(|node| node.output.iter().map(String::as_str)) {
            if !name.is_empty() && wanted.contains(name) {
                outputs.push((self.slot(name), name));
            }
        }
        self.filled.extend(outputs.iter().map(|(slot, _)| *slot));
        let described = |name: &str| match self.values.get(name) {
            Some(value) => (*value).clone(),
            None => ValueInfoProto { name: Some(name.to_owned()), ..ValueInfoProto::default() },
        };
        let graph = GraphProto {
            name: Some(format!("segment_{}", self.program.segments.len())),
            node: run.to_vec(),
            input: inputs.values().map(|name| described(name)).collect(),
            output: outputs.iter().map(|(_, name)| described(name)).collect(),
            initializer: constants.iter().map(|&at| self.graph.initializer[at].clone()).collect(),
            ..GraphProto::default()
        };
        let sets = self.model.opset_import.iter().filter(|set| set.domain() != SNN_DOMAIN);
        let model = ModelProto {
            ir_version: self.model.ir_version,
            opset_import: sets.cloned().collect(),
            graph: Some(graph),
            functions: self.model.functions.clone(),
            ..ModelProto::default()
        };
        self.program.steps.push(Step::Compute(self.program.segments.len()));
        self.program.segments.push(Segment {
            model,
            inputs: inputs.into_keys().collect(),
            outputs: outputs.into_iter().map(|(slot, _)| slot).collect(),
        });
        Ok(())
    }

    fn communicate(&mut self, node: &'a NodeProto) -> Result<(), ShardError> {
        let is_send = node.op_type() == SEND_OP;
        let name = if is_send { node.input.first() } else { node.output.first() };
        let wrong = |what: &'static str| ShardError::Communication {
            op: node.name().to_owned(),
            op_type: node.op_type().to_owned(),
            what,
        };
        let name = name.map(String::as_str).filter(|name| !name.is_empty());
        let slot = self.slot(name.ok_or(wrong("names no tensor"))?);
        let crossing = self.crossing(node, slot).map_err(wrong)?;
        if !self.transfers.insert(crossing.transfer) {
            return Err(wrong("has the transfer of another op"));
        }
        self.program.steps.push(match is_send {
            true if !self.filled.contains(&slot) => {
                return Err(ShardError::NotMade { tensor: self.program.slot(slot).name.clone() });
            }
            true => Step::Send(crossing),
            false => {
                self.filled.insert(slot);
                Step::Receive(crossing)
            }
        });
        Ok(())
    }

    fn crossing(&mut self, node: &NodeProto, slot: Slot) -> Result<Crossing, &'static str> {
        let transfer = node.int("transfer").filter(|id| (0..MAX_TRANSFER).contains(id));
        let transfer = transfer.ok_or("has no usable transfer")?;
        let peer = node.int("peer").and_then(|peer| usize::try_from(peer).ok());
        let usable = peer.filter(|&peer| peer < self.info.nodes && peer != self.info.rank);
        let codec = codec(node)?;
        let shape: Vec<usize> = node
            .ints("shape")
            .and_then(|dims| dims.iter().map(|&dim| usize::try_from(dim).ok()).collect())
            .ok_or("has no usable shape")?;
        // Decoded a tensor has four bytes an element at most, and must be no larger either.
        let decoded = Codec::plain(Dtype::F32).bytes(&shape).filter(|&bytes| bytes < MAX_FRAME);
        let bytes = decoded.and(codec.bytes(&shape)).filter(|&bytes| bytes < MAX_FRAME);
        let bytes = bytes.ok_or("is larger than a frame")?;
        // What is quantised is f32 on both nodes.
        let dtype = if codec.largest().is_some() { Dtype::F32 } else { codec.dtype };
        let info = &mut self.program.slots[slot.0];
        if info.dtype.is_some_and(|known| known != dtype) {
            return Err("has another dtype than its tensor");
        }
        if info.shape.as_ref().is_some_and(|known| *known != shape) {
            return Err("has another shape than its tensor");
        }
        info.dtype = Some(dtype);
        info.shape = Some(shape.clone());
        Ok(Crossing {
            transfer: transfer as u32,
            peer: usable.ok_or("names a peer that is not in the cluster")?,
            step: node.int("step").and_then(|step| usize::try_from(step).ok()),
            codec,
            shape,
            bytes,
            slot,
        })
    }
}

/// What pixels are worth, where pictures cross between nodes.
fn pixels(model: &ModelProto, program: &Program) -> Result<Option<Arc<Pixels>>, ShardError> {
    let mut crossings = program.receives().chain(program.sends());
    let picture = crossings.find(|crossing| crossing.codec.packing == Packing::Pixels);
    let Some(Crossing { shape, .. }) = picture else { return Ok(None) };
    let channels = shape.get(1).copied().unwrap_or(0);
    let normalisation = Normalisation::read(|key| model.metadata(key), channels)?;
    Ok(Some(Arc::new(Pixels::new(normalisation))))
}

/// How a send or receive says that its tensor is written.
fn codec(node: &NodeProto) -> Result<Codec, &'static str> {
    let dtype = node.text("dtype").and_then(|name| name.parse().ok());
    let packing = match node.text("packing") {
        Some(name) => name.parse().map_err(|_| "has no usable packing")?,
        None => Packing::None,
    };
    if packing == Packing::Pixels && dtype != Some(Dtype::F32) {
        return Err("has pixels that are no f32");
    }
    let signed = node.int("signed") != Some(0);
    Ok(Codec { dtype: dtype.ok_or("has no usable dtype")?, signed, packing })
}

/// Names a node takes, its subgraphs' included.
fn names_taken(node: &NodeProto) -> Vec<&str> {
    let mut names: Vec<&str> =
        node.input.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    let graphs =
        node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
    for graph in graphs {
        let inner: HashSet<&str> = graph
            .node
            .iter()
            .flat_map(|node| node.output.iter().map(String::as_str))
            .chain(graph.input.iter().map(|input| input.name()))
            .chain(graph.initializer.iter().map(|tensor| tensor.name()))
            .collect();
        let outputs = graph.output.iter().map(|output| output.name());
        let taken = graph.node.iter().flat_map(names_taken).chain(outputs);
        names.extend(taken.filter(|name| !inner.contains(name)));
    }
    names
}

/// Why a file cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The bytes are no ONNX model.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// The file says that it is a shard, but not which.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// A send or receive that makes no sense.
    #[error("op \"{op}\" ({op_type}) {what}")]
    Communication {
        /// The op.
        op: String,
        /// `SnnSend` or `SnnRecv`.
        op_type: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A tensor that is taken before anything gives it.
    #[error("tensor \"{tensor}\" is taken before it is made")]
    NotMade {
        /// The tensor.
        tensor: String,
    },
}
