//! The one graph every stage works on: a vertex is an op, an edge is a tensor.
//!
//! Takes ops with their ordered arguments and gives a petgraph DAG whose edges always agree with
//! them. Weights are constants beside the graph, never edges. An op belongs to at most one group.
//! Ids are newtypes that print small (`g1`, `b12`); iteration order depends only on the order in
//! which ops were added, so everything derived from a graph is deterministic.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;

use bytes::Bytes;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::{EdgeRef, IntoEdgeReferences};
use snn_schemas::onnx::{AttributeProto, NodeProto, TensorProto};
use snn_schemas::{Dtype, Packing};

/// ONNX's number for no type: an optional result nobody asked for.
pub const UNDEFINED: i32 = 0;
/// ONNX's number for 32-bit floats.
pub const FLOAT: i32 = 1;
/// ONNX's number for 16-bit floats.
pub const FLOAT16: i32 = 10;

/// Vertex of the graph.
pub type OpId = NodeIndex;

/// A tensor: what one op gives and others take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorId(pub(crate) usize);

/// A constant: weights, or a small tensor of settings such as a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConstId(pub(crate) usize);

/// One of the independent feature streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub usize);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// An argument of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A tensor another op gives.
    Tensor(TensorId),
    /// A constant.
    Const(ConstId),
    /// An optional argument left out.
    Absent,
}

impl Arg {
    /// The tensor, if it is one.
    pub fn tensor(self) -> Option<TensorId> {
        match self {
            Arg::Tensor(id) => Some(id),
            _ => None,
        }
    }
}

/// The exchange an op is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The policy's step.
    pub step: usize,
    /// Channels the sending group's tensor has.
    pub channels: usize,
    /// What becomes of zeros where its tensor crosses between nodes.
    pub packing: Packing,
}

/// A tensor that is what a codec makes of another: quantised and back, by ordinary ops.
///
/// Where it is taken on another node, the source is sent, the codec does what the ops say, and they
/// are not computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Coded {
    /// What is quantised.
    pub source: TensorId,
    /// The ops between the two, in order.
    pub ops: Vec<OpId>,
    /// Element type on the wire.
    pub dtype: Dtype,
    /// Whether elements may be negative.
    pub signed: bool,
}

/// A vertex: an ONNX node, or the model's input.
#[derive(Clone, Debug)]
pub struct Op {
    /// The ONNX node without its inputs and outputs; `None` for an input of the model.
    pub proto: Option<NodeProto>,
    /// Arguments in ONNX order.
    pub inputs: Vec<Arg>,
    /// Results in ONNX order.
    pub outputs: Vec<TensorId>,
    /// The group that computes it; none for stem and head.
    pub group: Option<GroupId>,
    /// Set on the ops that an exchange added.
    pub exchange: Option<Exchange>,
}

impl Op {
    /// ONNX op type, `"Input"` for an input of the model.
    pub fn op_type(&self) -> &str {
        self.proto.as_ref().map_or("Input", |proto| proto.op_type.as_deref().unwrap_or(""))
    }

    /// The op's name; its first output's where the model names none.
    pub fn name<'a>(&'a self, graph: &'a Graph) -> &'a str {
        let own = self.proto.as_ref().and_then(|proto| proto.name.as_deref()).unwrap_or("");
        match (own, self.outputs.first()) {
            ("", Some(&first)) => &graph.tensor(first).name,
            (own, _) => own,
        }
    }

    /// An integer attribute.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.proto.as_ref()?.int(name)
    }

    /// An attribute that is a list of integers.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.proto.as_ref()?.ints(name)
    }

    /// The arguments that are tensors.
    pub fn tensors(&self) -> impl Iterator<Item = TensorId> + '_ {
        self.inputs.iter().filter_map(|arg| arg.tensor())
    }
}

/// What is known of a tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Unique in its graph.
    pub name: String,
    /// Static shape, batch first.
    pub shape: Vec<usize>,
    /// ONNX element type.
    pub elem: i32,
    /// The op that gives it.
    pub producer: OpId,
}

impl Tensor {
    /// Size of the channel axis; 1 for tensors without one.
    pub fn channels(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.elements() * elem_size(self.elem) as u64
    }
}

/// Name, shape and element type of a tensor yet to be made.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Wanted name; a suffix is added where it is taken.
    pub name: String,
    /// Static shape.
    pub shape: Vec<usize>,
    /// ONNX element type.
    pub elem: i32,
}

/// Ops, tensors and constants of one model.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    dag: StableDiGraph<Op, TensorId>,
    tensors: Vec<Tensor>,
    consts: Vec<TensorProto>,
    names: BTreeSet<String>,
    /// The model's inputs, in order.
    pub inputs: Vec<TensorId>,
    /// The model's outputs, in order: the name each is known by, and the tensor.
    pub outputs: Vec<(String, TensorId)>,
    /// Tensors that stand for what arrives of a quantised one.
    pub coded: BTreeMap<TensorId, Coded>,
    /// Version of the standard op set.
    pub opset: i64,
    /// Channels of the pictures that the model takes, where its metadata says how they become numbers.
    pub normalised: Option<usize>,
}

impl Graph {
    /// An empty graph for ops of version `opset`.
    pub fn new(opset: i64) -> Graph {
        Graph { opset, ..Graph::default() }
    }

    /// Whether a tensor is an input that pictures are made into by a rule in the model's metadata.
    pub fn is_picture(&self, tensor: TensorId) -> bool {
        let known = self.tensor(tensor);
        let channels = known.shape.get(1).filter(|_| known.shape.len() == 4).copied();
        let fits = channels.is_some() && channels == self.normalised && known.elem == FLOAT;
        fits && self.inputs.contains(&tensor)
    }

    /// Adds an input of the model.
    pub fn add_input(&mut self, spec: TensorSpec) -> TensorId {
        let op = Op { proto: None, inputs: vec![], outputs: vec![], group: None, exchange: None };
        let id = self.add(op, vec![spec]);
        let tensor = self.op(id).outputs[0];
        self.inputs.push(tensor);
        tensor
    }

    /// Adds an op; its `outputs` are made from `outputs`, the edges from its arguments.
    pub fn add(&mut self, mut op: Op, outputs: Vec<TensorSpec>) -> OpId {
        let arguments: Vec<TensorId> = op.tensors().collect();
        op.outputs.clear();
        let id = self.dag.add_node(op);
        for tensor in arguments {
            self.dag.add_edge(self.tensors[tensor.0].producer, id, tensor);
        }
        for TensorSpec { name, shape, elem } in outputs {
            let name = self.unique(name);
            self.dag[id].outputs.push(TensorId(self.tensors.len()));
            self.tensors.push(Tensor { name, shape, elem, producer: id });
        }
        self.tell_apart(id);
        id
    }

    /// Gives an op of our own, which is called like its result, the name that result really got.
    fn tell_apart(&mut self, id: OpId) {
        let Some(&first) = self.dag[id].outputs.first() else { return };
        let given = &self.tensors[first.0].name;
        if let Some(proto) = &mut self.dag[id].proto
            && let Some(own) = proto.name.clone()
            && given.strip_prefix(&own).is_some_and(|rest| rest.starts_with('.'))
            && given[own.len() + 1..].bytes().all(|byte| byte.is_ascii_digit())
        {
            proto.name = Some(given.clone());
        }
    }

    /// Adds an op with one result and gives that.
    pub fn add_one(&mut self, op: Op, output: TensorSpec) -> TensorId {
        let id = self.add(op, vec![output]);
        self.dag[id].outputs[0]
    }

    /// Adds a constant.
    pub fn add_const(&mut self, proto: TensorProto) -> ConstId {
        self.consts.push(proto);
        ConstId(self.consts.len() - 1)
    }

    fn unique(&mut self, wanted: String) -> String {
        let mut name = wanted.clone();
        let mut suffix = 1;
        while !self.names.insert(name.clone()) {
            suffix += 1;
            name = format!("{wanted}.{suffix}");
        }
        name
    }

    /// The op behind an id.
    pub fn op(&self, id: OpId) -> &Op {
        &self.dag[id]
    }

    /// Name of the op behind an id, for messages.
    pub fn op_name(&self, id: OpId) -> &str {
        self.op(id).name(self)
    }

    /// What is known of a tensor.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0]
    }

    /// A constant's tensor.
    pub fn constant(&self, id: ConstId) -> &TensorProto {
        &self.consts[id.0]
    }

    /// Number of tensors ever made; ids are below it.
    pub fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// All ops, in the order in which they were added.
    pub fn ops(&self) -> impl Iterator<Item = OpId> + '_ {
        self.dag.node_indices()
    }

    /// Edges as (producer, consumer, tensor), for the verifier.
    pub(crate) fn edges(&self) -> impl Iterator<Item = (OpId, OpId, TensorId)> + '_ {
        self.dag.edge_references().map(|edge| (edge.source(), edge.target(), *edge.weight()))
    }

    /// The ops that take a tensor, each once, in the order in which they were added.
    pub fn consumers(&self, tensor: TensorId) -> Vec<OpId> {
        let producer = self.tensor(tensor).producer;
        let edges = self.dag.edges_directed(producer, Direction::Outgoing);
        let users: BTreeSet<OpId> =
            edges.filter(|edge| *edge.weight() == tensor).map(|edge| edge.target()).collect();
        users.into_iter().collect()
    }

    /// The ops whose results an op takes, each once.
    pub fn producers(&self, op: OpId) -> BTreeSet<OpId> {
        self.dag.neighbors_directed(op, Direction::Incoming).collect()
    }

    /// The ops that take any of an op's results, each once.
    pub fn successors(&self, op: OpId) -> BTreeSet<OpId> {
        self.dag.neighbors_directed(op, Direction::Outgoing).collect()
    }

    /// Marks the op behind a tensor as part of an exchange.
    pub fn mark(&mut self, tensor: TensorId, exchange: Exchange) {
        let producer = self.tensor(tensor).producer;
        self.dag[producer].exchange = Some(exchange);
    }

    /// Lets the `users` of `old` (and the model's outputs) take `new` instead.
    pub fn replace(&mut self, old: TensorId, new: TensorId, users: &[OpId]) {
        let producer = self.tensor(old).producer;
        let new_producer = self.tensor(new).producer;
        for &user in users {
            let mut arguments = 0;
            for arg in &mut self.dag[user].inputs {
                if *arg == Arg::Tensor(old) {
                    *arg = Arg::Tensor(new);
                    arguments += 1;
                }
            }
            let stale: Vec<_> = self
                .dag
                .edges_connecting(producer, user)
                .filter(|edge| *edge.weight() == old)
                .map(|edge| edge.id())
                .collect();
            for edge in stale {
                self.dag.remove_edge(edge);
            }
            for _ in 0..arguments {
                self.dag.add_edge(new_producer, user, new);
            }
        }
        for (_, output) in &mut self.outputs {
            if *output == old {
                *output = new;
            }
        }
    }

    /// A topological order; among ops that are ready the one added first comes first.
    pub fn order(&self) -> Vec<OpId> {
        let mut waiting: BTreeMap<OpId, usize> =
            self.ops().map(|op| (op, self.producers(op).len())).collect();
        let ready = waiting.iter().filter(|(_, count)| **count == 0);
        let mut ready: BinaryHeap<Reverse<OpId>> = ready.map(|(op, _)| Reverse(*op)).collect();
        let mut order = Vec::with_capacity(waiting.len());
        while let Some(Reverse(op)) = ready.pop() {
            order.push(op);
            for next in self.successors(op) {
                if let Some(count) = waiting.get_mut(&next) {
                    *count -= 1;
                    if *count == 0 {
                        ready.push(Reverse(next));
                    }
                }
            }
        }
        order
    }

    /// Takes an edge away and leaves the argument: what the verifier must notice.
    #[cfg(test)]
    pub(crate) fn cut_edge(&mut self, from: OpId, to: OpId) {
        let edge = self.dag.find_edge(from, to).expect("an edge");
        self.dag.remove_edge(edge);
    }

    /// Gives a tensor a name that may be taken: what the verifier must notice.
    #[cfg(test)]
    pub(crate) fn rename(&mut self, tensor: TensorId, name: &str) {
        self.tensors[tensor.0].name = name.to_owned();
    }

    /// Removes every op that no output needs. Inputs of the model stay.
    pub fn remove_dead(&mut self) {
        let mut live: BTreeSet<OpId> = BTreeSet::new();
        let mut queue: Vec<OpId> =
            self.outputs.iter().map(|(_, tensor)| self.tensor(*tensor).producer).collect();
        while let Some(op) = queue.pop() {
            if live.insert(op) {
                queue.extend(self.producers(op));
            }
        }
        self.dag.retain_nodes(|dag, op| dag[op].proto.is_none() || live.contains(&op));
    }
}

/// A standard op as our own stages add it.
pub(crate) fn standard(op_type: &str, name: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        name: Some(name.to_owned()),
        op_type: Some(op_type.to_owned()),
        attribute: attributes,
        ..NodeProto::default()
    }
}

/// Bytes one element of an ONNX type takes; 0 for types without a fixed size in bytes.
pub fn elem_size(elem: i32) -> usize {
    match elem {
        2 | 3 | 9 => 1,
        4 | 5 | 10 | 16 => 2,
        1 | 6 | 12 => 4,
        7 | 11 | 13 | 14 => 8,
        15 => 16,
        _ => 0,
    }
}

/// Number of elements a constant has.
pub(crate) fn const_elements(proto: &TensorProto) -> usize {
    proto.dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).product()
}

/// The part `start .. start + length` of a constant's `axis`, sharing its memory where it can.
///
/// The constant must have its data in `raw_data`, as every constant read from a file has.
pub(crate) fn slice_const(
    proto: &TensorProto,
    axis: usize,
    start: usize,
    length: usize,
    name: String,
) -> TensorProto {
    let dim = |index: usize| usize::try_from(proto.dims[index]).unwrap_or(0);
    let inner: usize = (axis + 1..proto.dims.len()).map(dim).product::<usize>()
        * elem_size(proto.data_type.unwrap_or(0));
    let outer: usize = (0..axis).map(dim).product();
    let raw = proto.raw_data.clone().unwrap_or_default();
    let piece = |row: usize| {
        let from = (row * dim(axis) + start) * inner;
        raw.slice(from..from + length * inner)
    };
    let data = match outer {
        1 => piece(0),
        _ => Bytes::from((0..outer).flat_map(|row| piece(row).to_vec()).collect::<Vec<u8>>()),
    };
    let mut dims = proto.dims.clone();
    dims[axis] = length as i64;
    TensorProto {
        dims,
        name: Some(name),
        data_type: proto.data_type,
        raw_data: Some(data),
        ..TensorProto::default()
    }
}
