//! Runs models in tract: whole ones, and all shards of a split in one process.
//!
//! Takes models as they would be written to files; gives the first output. [`play`] cuts each shard
//! at its `SnnSend` and `SnnRecv`, runs the segments between them, and hands tensors over by a map.
//! It checks on the way that what is sent is what the op's attributes and the manifest announce.

#![allow(unreachable_pub, reason = "shared by test crates")]

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::BytesMut;
use snn_compiler::Split;
use snn_schemas::metadata::{RECV_OP, SEND_OP};
use snn_schemas::onnx::{
    GraphProto, ModelProto, NodeProto, ValueInfoProto, decode, encode, tensor_proto::DataType,
};
use snn_schemas::{Codec, Packing};
use tract_onnx::prelude::*;

/// Runs a whole model on one image.
pub fn run(model: &ModelProto, shape: &[usize], image: &[f32]) -> Vec<f32> {
    let input = Tensor::from_shape(shape, image).expect("an image of that shape");
    floats(&evaluate(model, vec![input])[0])
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_plain_array_view::<f32>().expect("floats").iter().copied().collect()
}

fn evaluate(model: &ModelProto, inputs: Vec<Tensor>) -> Vec<Tensor> {
    let plan = tract_onnx::onnx()
        .model_for_read(&mut encode(model).as_slice())
        .and_then(|model| model.into_optimized())
        .and_then(|model| model.into_runnable())
        .unwrap_or_else(|error| panic!("tract takes the model: {error:?}"));
    let inputs = inputs.into_iter().map(Into::into).collect();
    let outputs = plan.run(inputs).unwrap_or_else(|error| panic!("tract runs: {error:?}"));
    outputs.into_iter().map(TValue::into_tensor).collect()
}

/// Runs all shards of a split side by side on one image; gives the entry's output.
pub fn play(split: &Split, shape: &[usize], image: &[f32]) -> Vec<f32> {
    let mut nodes: Vec<Player> =
        split.shards.iter().map(|shard| Player::new(shard.to_bytes())).collect();
    let input = Tensor::from_shape(shape, image).expect("an image of that shape");
    let entry = split.manifest.entry;
    nodes[entry].tensors.insert(split.manifest.inputs[0].name.clone(), input);
    let mut mail: BTreeMap<i64, Tensor> = BTreeMap::new();
    let mut announced: BTreeMap<i64, u64> =
        split.manifest.transfers.iter().map(|t| (i64::from(t.id), t.bytes)).collect();
    while nodes.iter().any(|node| node.at < node.proto.node.len()) {
        let mut moved = false;
        for node in &mut nodes {
            moved |= node.advance(&mut mail, &mut announced);
        }
        assert!(moved, "every node waits for another");
    }
    assert!(mail.is_empty() && announced.is_empty(), "sent but not taken, or never sent");
    floats(&nodes[entry].tensors[&split.manifest.outputs[0].name])
}

/// One node: its shard, how far it has come, and the tensors it has.
struct Player {
    model: ModelProto,
    proto: GraphProto,
    at: usize,
    tensors: HashMap<String, Tensor>,
}

impl Player {
    fn new(shard: Vec<u8>) -> Player {
        let mut model = decode(shard.into()).expect("a shard is a model");
        let proto = model.graph.take().expect("a shard has a graph");
        Player { model, proto, at: 0, tensors: HashMap::new() }
    }

    /// Goes on until a tensor that is not there yet; says whether anything was done.
    fn advance(
        &mut self,
        mail: &mut BTreeMap<i64, Tensor>,
        announced: &mut BTreeMap<i64, u64>,
    ) -> bool {
        let start = self.at;
        while let Some(node) = self.proto.node.get(self.at).cloned() {
            let transfer = node.int("transfer").unwrap_or(-1);
            match node.op_type() {
                SEND_OP => {
                    let tensor = &self.tensors[&node.input[0]];
                    check(&node, tensor);
                    let (bytes, arrived) = travel(&node, tensor);
                    let announced = announced.remove(&transfer).expect("an announced transfer");
                    match node.text("packing") {
                        None => assert_eq!(announced, bytes, "t{transfer}"),
                        Some(_) => assert!(bytes <= announced, "t{transfer}: {bytes}"),
                    }
                    mail.insert(transfer, arrived);
                    self.at += 1;
                }
                RECV_OP => match mail.remove(&transfer) {
                    Some(tensor) => {
                        check(&node, &tensor);
                        self.tensors.insert(node.output[0].clone(), tensor);
                        self.at += 1;
                    }
                    None => break,
                },
                _ => self.segment(),
            }
        }
        self.at > start
    }

    /// Runs the standard ops from here to the next send or receive.
    fn segment(&mut self) {
        let crosses = |node: &NodeProto| matches!(node.op_type(), SEND_OP | RECV_OP);
        let rest = &self.proto.node[self.at..];
        let length = rest.iter().position(crosses).unwrap_or(rest.len());
        let (ops, later) = rest.split_at(length);
        let made: Vec<&String> = ops.iter().flat_map(|op| &op.output).collect();
        let taken: HashSet<&String> = ops.iter().flat_map(|op| &op.input).collect();
        let mut wanted: HashSet<&str> =
            later.iter().flat_map(|op| &op.input).map(String::as_str).collect();
        wanted.extend(self.proto.output.iter().map(|output| output.name()));
        let outputs: Vec<String> =
            made.iter().filter(|name| wanted.contains(name.as_str())).map(|&n| n.clone()).collect();
        let mut inputs: Vec<&String> =
            taken.iter().filter(|name| self.tensors.contains_key(**name)).copied().collect();
        inputs.sort();
        let graph = GraphProto {
            name: Some("segment".to_owned()),
            node: ops.to_vec(),
            initializer: self
                .proto
                .initializer
                .iter()
                .filter(|t| taken.contains(&t.name().to_owned()))
                .cloned()
                .collect(),
            input: inputs.iter().map(|&name| described(name, &self.tensors[name])).collect(),
            output: outputs
                .iter()
                .map(|name| ValueInfoProto { name: Some(name.clone()), ..Default::default() })
                .collect(),
            ..GraphProto::default()
        };
        let model = ModelProto { graph: Some(graph), ..self.model.clone() };
        let arguments = inputs.iter().map(|&name| self.tensors[name].clone()).collect();
        let results = evaluate(&model, arguments);
        self.tensors.extend(outputs.into_iter().zip(results));
        self.at += length;
    }
}

fn described(name: &str, tensor: &Tensor) -> ValueInfoProto {
    let dims: Vec<i64> = tensor.shape().iter().map(|&dim| dim as i64).collect();
    let elem =
        if tensor.datum_type() == f16::datum_type() { DataType::Float16 } else { DataType::Float };
    ValueInfoProto::tensor(name, elem, &dims)
}

/// Bytes that cross, and what arrives of a tensor.
fn travel(node: &NodeProto, tensor: &Tensor) -> (u64, Tensor) {
    let codec = Codec {
        dtype: node.text("dtype").and_then(|name| name.parse().ok()).expect("a dtype"),
        signed: node.int("signed") == Some(1),
        packing: node.text("packing").map_or(Packing::None, |name| name.parse().expect("known")),
    };
    let mut payload = BytesMut::new();
    let mut arrived = tensor.clone();
    if codec.largest().is_none() {
        codec.put_elements(tensor.as_bytes(), &mut payload);
        codec.read_elements(&payload, arrived.as_bytes_mut()).expect("its own payload");
    } else {
        let run = Codec::run(tensor.shape());
        let mut numbers = floats(tensor);
        codec.put_numbers(&numbers, run, &mut payload);
        codec.read_numbers(&payload, run, &mut numbers).expect("its own payload");
        arrived = Tensor::from_shape(tensor.shape(), &numbers).expect("the same shape");
    }
    (payload.len() as u64, arrived)
}

/// A transfer op announces its tensor.
fn check(node: &NodeProto, tensor: &Tensor) {
    let shape: Vec<i64> = tensor.shape().iter().map(|&dim| dim as i64).collect();
    assert_eq!(node.ints("shape"), Some(shape.as_slice()), "{}", node.name());
    let quantised = matches!(node.text("dtype"), Some("i8" | "i4"));
    match tensor.datum_type() == f16::datum_type() {
        true => assert_eq!(node.text("dtype"), Some("f16"), "{}", node.name()),
        false => assert!(quantised || node.text("dtype") == Some("f32"), "{}", node.name()),
    }
    assert_eq!(node.int("signed").is_some(), quantised, "{}", node.name());
    assert_eq!(node.int("keep"), shape.get(1).copied(), "{}", node.name());
}
