//! Stage 5b: write each node's work as an ONNX model of its own, and the manifest beside them.
//!
//! Takes a [`Placed`] graph; gives one [`Shard`] a node. A shard holds its node's ops in execution
//! order, `SnnSend` and `SnnRecv` where edges were cut, only the weights it needs (sharing their
//! memory with the source file until they are written), and the shape of every tensor.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use snn_schemas::Codec;
use snn_schemas::metadata::{RECV_OP, SEND_OP, SNN_DOMAIN, SNN_OPSET, ShardInfo};
use snn_schemas::onnx::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto, attr_int,
    attr_ints, attr_string, tensor_proto::DataType,
};

use crate::graph::{Arg, ConstId, Graph, Op, TensorId, UNDEFINED};
use crate::placement::Placed;
use crate::read::Source;
use crate::schedule::{Action, Cut};

/// The ONNX model of one node.
#[derive(Clone, Debug)]
pub struct Shard {
    /// The node's rank.
    pub rank: usize,
    /// What the node does, in order.
    pub actions: Vec<Action>,
    /// The model.
    pub model: ModelProto,
}

impl Shard {
    /// The bytes of the shard's file.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.model.encode_to_vec()
    }
}

/// What all shards of a split have in common.
pub(crate) struct Common<'a> {
    pub(crate) placed: &'a Placed,
    pub(crate) cuts: &'a [Cut],
    pub(crate) opsets: &'a [OperatorSetIdProto],
    pub(crate) ir_version: i64,
    /// The source model's own metadata.
    pub(crate) metadata: &'a [(String, String)],
}

/// Writes the shard of `info.rank`, which does `actions`.
pub(crate) fn shard(common: &Common<'_>, info: &ShardInfo, actions: Vec<Action>) -> Shard {
    let mut writer = Writer::new(&common.placed.graph, common.cuts);
    if info.rank == common.placed.entry {
        writer.declare_edges();
    }
    for &action in &actions {
        writer.write(action);
    }
    let communicates =
        !writer.signals.is_empty() || writer.nodes.iter().any(|node| node.op_type() == RECV_OP);
    let mut opset_import = common.opsets.to_vec();
    if communicates {
        opset_import.push(OperatorSetIdProto {
            domain: Some(SNN_DOMAIN.to_owned()),
            version: Some(SNN_OPSET),
        });
    }
    let mut model = ModelProto {
        ir_version: Some(common.ir_version),
        producer_name: Some("snnc".to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        opset_import,
        graph: Some(writer.finish(&format!("shard_{}", info.rank))),
        ..ModelProto::default()
    };
    for (key, value) in common.metadata.iter().chain(&info.entries()) {
        model.set_metadata(key, value);
    }
    Shard { rank: info.rank, actions, model }
}

/// The description of a tensor whose type the reader has checked.
fn described(name: &str, elem: i32, shape: &[i64]) -> ValueInfoProto {
    ValueInfoProto::tensor(name, DataType::try_from(elem).unwrap_or(DataType::Float), shape)
}

/// The source model itself as the only shard, with its inputs' shapes and its metadata set.
pub(crate) fn verbatim(
    source: &Source,
    graph: &Graph,
    info: &ShardInfo,
    actions: Vec<Action>,
) -> Shard {
    let mut model = source.model.clone();
    if let Some(proto) = &mut model.graph {
        for &tensor in &graph.inputs {
            let known = graph.tensor(tensor);
            let shape: Vec<i64> = known.shape.iter().map(|&dim| dim as i64).collect();
            if let Some(input) = proto.input.iter_mut().find(|input| input.name() == known.name) {
                input.r#type = described(&known.name, known.elem, &shape).r#type;
            }
        }
    }
    for (key, value) in info.entries() {
        model.set_metadata(&key, &value);
    }
    Shard { rank: info.rank, actions, model }
}

/// Collects one shard's graph.
struct Writer<'a> {
    graph: &'a Graph,
    cuts: &'a [Cut],
    nodes: Vec<NodeProto>,
    constants: BTreeMap<ConstId, String>,
    constant_names: BTreeSet<String>,
    values: Vec<ValueInfoProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    signals: Vec<ValueInfoProto>,
    /// The tensor made last: what a receive waits behind.
    last: Option<TensorId>,
}

impl<'a> Writer<'a> {
    fn new(graph: &'a Graph, cuts: &'a [Cut]) -> Writer<'a> {
        Writer {
            graph,
            cuts,
            nodes: vec![],
            constants: BTreeMap::new(),
            constant_names: BTreeSet::new(),
            values: vec![],
            inputs: vec![],
            outputs: vec![],
            signals: vec![],
            last: None,
        }
    }

    /// A tensor's name in the file: an output of the model keeps the name it is known by.
    fn name(&self, tensor: TensorId) -> String {
        let own = &self.graph.tensor(tensor).name;
        let mut outputs = self.graph.outputs.iter();
        if self.graph.inputs.contains(&tensor) {
            return own.clone();
        }
        match outputs.clone().find(|(_, output)| *output == tensor) {
            Some((name, _)) => name.clone(),
            // What an exchange was added to may once have been the output of that name.
            None if outputs.any(|(name, _)| name == own) => format!("{own}/before"),
            None => own.clone(),
        }
    }

    fn value(&self, tensor: TensorId) -> ValueInfoProto {
        let known = self.graph.tensor(tensor);
        let shape: Vec<i64> = known.shape.iter().map(|&dim| dim as i64).collect();
        described(&self.name(tensor), known.elem, &shape)
    }

    /// The model's inputs and outputs, on the node where they arrive and leave.
    fn declare_edges(&mut self) {
        self.inputs = self.graph.inputs.iter().map(|&tensor| self.value(tensor)).collect();
        for (name, tensor) in &self.graph.outputs {
            let known = self.graph.tensor(*tensor);
            let shape: Vec<i64> = known.shape.iter().map(|&dim| dim as i64).collect();
            self.outputs.push(described(name, known.elem, &shape));
        }
        self.last = self.graph.inputs.first().copied();
    }

    fn write(&mut self, action: Action) {
        match action {
            Action::Compute(id) => {
                let op = self.graph.op(id);
                if let Some(proto) = &op.proto {
                    self.compute(proto.clone(), op);
                }
            }
            Action::Send(number) => self.send(number),
            Action::Receive(number) => self.receive(number),
        }
    }

    fn compute(&mut self, mut proto: NodeProto, op: &Op) {
        proto.input = op.inputs.iter().map(|&arg| self.argument(arg)).collect();
        let output = |&tensor: &TensorId| match self.graph.tensor(tensor).elem {
            UNDEFINED => String::new(),
            _ => self.name(tensor),
        };
        proto.output = op.outputs.iter().map(output).collect();
        self.nodes.push(proto);
        for &tensor in &op.outputs {
            if self.graph.tensor(tensor).elem != UNDEFINED {
                self.declare(tensor);
            }
        }
    }

    fn declare(&mut self, tensor: TensorId) {
        self.last = Some(tensor);
        if !self.graph.outputs.iter().any(|(_, output)| *output == tensor) {
            self.values.push(self.value(tensor));
        }
    }

    fn argument(&mut self, arg: Arg) -> String {
        match arg {
            Arg::Absent => String::new(),
            Arg::Tensor(tensor) => self.name(tensor),
            Arg::Const(id) => match self.constants.get(&id) {
                Some(name) => name.clone(),
                None => {
                    let name = self.constant_name(id);
                    self.constants.insert(id, name.clone());
                    name
                }
            },
        }
    }

    /// A name no other constant of the shard has; the source may have unnamed ones.
    fn constant_name(&mut self, id: ConstId) -> String {
        let wanted = match self.graph.constant(id).name() {
            "" => format!("constant_{}", self.constants.len()),
            name => name.to_owned(),
        };
        let mut name = wanted.clone();
        let mut suffix = 1;
        while !self.constant_names.insert(name.clone()) {
            suffix += 1;
            name = format!("{wanted}.{suffix}");
        }
        name
    }

    fn send(&mut self, number: usize) {
        let cut = self.cuts[number];
        let signal = format!("t{number}.sent");
        self.signals.push(ValueInfoProto::tensor(&signal, DataType::Int64, &[]));
        let input = vec![self.name(cut.sent)];
        self.nodes.push(self.communication(SEND_OP, number, cut.to, input, signal));
    }

    fn receive(&mut self, number: usize) {
        let cut = self.cuts[number];
        let behind = self.last.map(|tensor| self.name(tensor));
        let output = self.name(cut.tensor);
        let input = behind.into_iter().collect();
        self.nodes.push(self.communication(RECV_OP, number, cut.from, input, output));
        self.declare(cut.tensor);
    }

    fn communication(
        &self,
        op_type: &str,
        number: usize,
        peer: usize,
        input: Vec<String>,
        output: String,
    ) -> NodeProto {
        let cut = self.cuts[number];
        let tensor = self.graph.tensor(cut.tensor);
        let shape: Vec<i64> = tensor.shape.iter().map(|&dim| dim as i64).collect();
        let Codec { dtype, signed, packing } = cut.codec;
        let mut attribute = vec![
            attr_int("transfer", number as i64),
            attr_int("peer", peer as i64),
            attr_int("step", cut.taker.exchange.map_or(-1, |exchange| exchange.step as i64)),
            attr_int("keep", tensor.channels() as i64),
            attr_string("dtype", &dtype.to_string()),
            attr_ints("shape", &shape),
        ];
        if cut.codec.largest().is_some() {
            attribute.push(attr_int("signed", signed.into()));
        }
        if !packing.is_none() {
            attribute.push(attr_string("packing", &packing.to_string()));
        }
        NodeProto {
            name: Some(format!("{op_type}_t{number}")),
            op_type: Some(op_type.to_owned()),
            domain: Some(SNN_DOMAIN.to_owned()),
            input,
            output: vec![output],
            attribute,
            ..NodeProto::default()
        }
    }

    fn finish(mut self, name: &str) -> GraphProto {
        self.forward_aliases();
        let constant = |(id, name): (&ConstId, &String)| TensorProto {
            name: Some(name.clone()),
            ..self.graph.constant(*id).clone()
        };
        let mut output = self.outputs;
        output.extend(self.signals);
        GraphProto {
            name: Some(name.to_owned()),
            initializer: self.constants.iter().map(constant).collect(),
            node: self.nodes,
            input: self.inputs,
            output,
            value_info: self.values,
            ..GraphProto::default()
        }
    }

    /// Outputs that are another output or an input under a second name.
    fn forward_aliases(&mut self) {
        if self.outputs.is_empty() {
            return;
        }
        for (name, tensor) in &self.graph.outputs {
            let made = self.name(*tensor);
            if made != *name {
                let mut node = crate::graph::standard("Identity", name, vec![]);
                node.input = vec![made];
                node.output = vec![name.clone()];
                self.nodes.push(node);
            }
        }
    }
}
