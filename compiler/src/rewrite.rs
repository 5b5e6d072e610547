//! The ordinary ops that the compiler itself adds to a graph, in the form the graph's op set wants.
//!
//! Takes tensors, gives the tensor the new op computes. Op sets before 10 (Slice) and 11 (Pad) hold
//! as attributes what later ones take as arguments; nobody outside this file needs to know.

use snn_schemas::onnx::attribute_proto::AttributeType;
use snn_schemas::onnx::{AttributeProto, NodeProto, TensorProto, attr_int, attr_ints};

use crate::graph::{Arg, FLOAT, Graph, GroupId, Op, OpId, TensorId, TensorSpec, standard};

/// Adds `proto` on the given arguments, of one result.
fn add(
    graph: &mut Graph,
    proto: NodeProto,
    inputs: Vec<Arg>,
    output: TensorSpec,
    group: Option<GroupId>,
) -> TensorId {
    let op = Op { proto: Some(proto), inputs, outputs: vec![], group, exchange: None };
    graph.add_one(op, output)
}

fn integers(graph: &mut Graph, name: String, values: &[i64]) -> Arg {
    Arg::Const(graph.add_const(TensorProto::i64(&name, &[values.len() as i64], values)))
}

/// An op that gives a constant.
pub(crate) fn constant(name: &str, value: TensorProto) -> NodeProto {
    let value = AttributeProto {
        name: Some("value".to_owned()),
        r#type: Some(AttributeType::Tensor as i32),
        t: Some(value),
        ..AttributeProto::default()
    };
    standard("Constant", name, vec![value])
}

/// Joins tensors along the channels.
pub(crate) fn concat(
    graph: &mut Graph,
    pieces: &[TensorId],
    output: TensorSpec,
    group: Option<GroupId>,
) -> TensorId {
    let proto = standard("Concat", &output.name, vec![attr_int("axis", 1)]);
    let inputs = pieces.iter().map(|&piece| Arg::Tensor(piece)).collect();
    add(graph, proto, inputs, output, group)
}

/// The channels `start .. start + length`; the tensor itself where that is all of it.
pub(crate) fn select(
    graph: &mut Graph,
    tensor: TensorId,
    start: usize,
    length: usize,
    group: Option<GroupId>,
) -> TensorId {
    let source = graph.tensor(tensor);
    if start == 0 && length == source.channels() {
        return tensor;
    }
    let name = format!("{}[{}..{}]", source.name, start, start + length);
    // Two takers in one group share what is cut.
    let cut = |&op: &OpId| graph.op(op).group == group && graph.op(op).op_type() == "Slice";
    let cuts = graph.consumers(tensor).into_iter().filter(cut).map(|op| graph.op(op).outputs[0]);
    if let Some(same) = cuts.into_iter().find(|&cut| graph.tensor(cut).name == name) {
        return same;
    }
    let mut spec = TensorSpec { name, shape: source.shape.clone(), elem: source.elem };
    spec.shape[1] = length;
    let (start, end) = (start as i64, (start + length) as i64);
    let mut inputs = vec![Arg::Tensor(tensor)];
    let mut attributes = vec![];
    if graph.opset < 10 {
        attributes.push(attr_ints("starts", &[start]));
        attributes.push(attr_ints("ends", &[end]));
        attributes.push(attr_ints("axes", &[1]));
    } else {
        for (what, value) in [("starts", start), ("ends", end), ("axes", 1)] {
            inputs.push(integers(graph, format!("{}/{what}", spec.name), &[value]));
        }
    }
    let proto = standard("Slice", &spec.name, attributes);
    add(graph, proto, inputs, spec, group)
}

/// The same values as another element type, under the name `name`.
pub(crate) fn cast(
    graph: &mut Graph,
    tensor: TensorId,
    elem: i32,
    name: String,
    group: Option<GroupId>,
) -> TensorId {
    let spec = TensorSpec { name, shape: graph.tensor(tensor).shape.clone(), elem };
    let to = attr_int("to", i64::from(elem));
    let proto = standard("Cast", &spec.name, vec![to]);
    add(graph, proto, vec![Arg::Tensor(tensor)], spec, group)
}

/// The tensor with zero channels behind its own, `channels` in all; itself where none are missing.
pub(crate) fn pad_channels(
    graph: &mut Graph,
    tensor: TensorId,
    channels: usize,
    name: String,
    group: Option<GroupId>,
) -> TensorId {
    let source = graph.tensor(tensor);
    let missing = channels - source.channels();
    if missing == 0 {
        return tensor;
    }
    let mut spec = TensorSpec { name, shape: source.shape.clone(), elem: source.elem };
    spec.shape[1] = channels;
    let rank = spec.shape.len();
    let mut pads = vec![0i64; 2 * rank];
    pads[rank + 1] = missing as i64;
    let mut inputs = vec![Arg::Tensor(tensor)];
    let mut attributes = vec![];
    if graph.opset < 11 {
        attributes.push(attr_ints("pads", &pads));
    } else {
        inputs.push(integers(graph, format!("{}/pads", spec.name), &pads));
    }
    let proto = standard("Pad", &spec.name, attributes);
    add(graph, proto, inputs, spec, group)
}

/// The sum of two tensors of one shape.
pub(crate) fn sum(
    graph: &mut Graph,
    left: TensorId,
    right: TensorId,
    name: String,
    group: Option<GroupId>,
) -> TensorId {
    let spec = TensorSpec { name, shape: graph.tensor(left).shape.clone(), elem: FLOAT };
    let proto = standard("Add", &spec.name, vec![]);
    add(graph, proto, vec![Arg::Tensor(left), Arg::Tensor(right)], spec, group)
}

/// A second copy of an op that takes `new` where the first takes `old`; gives its first result.
pub(crate) fn copy_with(
    graph: &mut Graph,
    op: OpId,
    replaced: &std::collections::BTreeMap<TensorId, TensorId>,
    suffix: &str,
) -> TensorId {
    let mut copy = graph.op(op).clone();
    let outputs = copy.outputs.clone();
    for arg in &mut copy.inputs {
        if let Arg::Tensor(tensor) = arg {
            *tensor = *replaced.get(tensor).unwrap_or(tensor);
        }
    }
    if let Some(proto) = &mut copy.proto {
        proto.name = Some(format!("{}{suffix}", graph.op_name(op)));
    }
    let specs = outputs
        .iter()
        .map(|&tensor| {
            let tensor = graph.tensor(tensor);
            let name = format!("{}{suffix}", tensor.name);
            TensorSpec { name, shape: tensor.shape.clone(), elem: tensor.elem }
        })
        .collect();
    let id = graph.add(copy, specs);
    graph.op(id).outputs[0]
}
