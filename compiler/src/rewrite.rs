//! The ordinary ops that the compiler itself adds to a graph, in the form the graph's op set wants.
//!
//! Takes tensors, gives the tensor the new op computes. Op sets before 10 (Slice) and 11 (Pad) hold
//! as attributes what later ones take as arguments; nobody outside this file needs to know.

use snn_schemas::onnx::attribute_proto::AttributeType;
use snn_schemas::onnx::{AttributeProto, NodeProto, TensorProto, attr_int, attr_ints};

use snn_schemas::Dtype;
use snn_schemas::codec::{self, Codec, Packing};

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

/// What arrives of a tensor that is quantised before it is sent, by the ops that say so, in order; the
/// last is what arrives. The arithmetic is that of [`snn_schemas::codec`], op by op.
pub(crate) fn quantise(
    graph: &mut Graph,
    tensor: TensorId,
    (dtype, signed): (Dtype, bool),
    label: &str,
    group: Option<GroupId>,
) -> Vec<TensorId> {
    let codec = Codec { dtype, signed, packing: Packing::None };
    let Some(largest) = codec.largest() else { return vec![] };
    let mut writer = Quantiser { graph, made: vec![], label, group };
    let magnitude = match signed {
        true => writer.op("Abs", "abs", vec![Arg::Tensor(tensor)], tensor),
        false => tensor,
    };
    let most = writer.reduce_max(magnitude);
    let largest = writer.number("largest", largest);
    let least = writer.number("least", codec::LEAST);
    let most = writer.op("Max", "most", vec![Arg::Tensor(most), least], most);
    let inverse = writer.op("Div", "inverse", vec![largest, Arg::Tensor(most)], most);
    let inputs = vec![Arg::Tensor(tensor), Arg::Tensor(inverse)];
    let scaled = writer.op("Mul", "scaled", inputs, tensor);
    let code = writer.round(scaled);
    let scale = writer.op("Div", "scale", vec![Arg::Tensor(most), largest], most);
    writer.op("Mul", dtype_name(dtype), vec![Arg::Tensor(code), Arg::Tensor(scale)], tensor);
    writer.made
}

/// The last op of a quantisation is called like the type that travels.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::I4 => "i4",
        _ => "i8",
    }
}

/// Writes the ops of one quantisation.
struct Quantiser<'a> {
    graph: &'a mut Graph,
    made: Vec<TensorId>,
    label: &'a str,
    group: Option<GroupId>,
}

impl Quantiser<'_> {
    /// An op whose result has the shape of `like`.
    fn op(&mut self, op_type: &str, what: &str, inputs: Vec<Arg>, like: TensorId) -> TensorId {
        let shape = self.graph.tensor(like).shape.clone();
        self.shaped(standard(op_type, &format!("{}/{what}", self.label), vec![]), inputs, shape)
    }

    fn shaped(&mut self, proto: NodeProto, inputs: Vec<Arg>, shape: Vec<usize>) -> TensorId {
        let name = proto.name.clone().unwrap_or_default();
        let spec = TensorSpec { name, shape, elem: FLOAT };
        let made = add(self.graph, proto, inputs, spec, self.group);
        self.made.push(made);
        made
    }

    fn number(&mut self, what: &str, value: f32) -> Arg {
        let name = format!("{}/{what}", self.label);
        Arg::Const(self.graph.add_const(TensorProto::f32(&name, &[1], &[value])))
    }

    /// The largest element of each run that shares a scale.
    fn reduce_max(&mut self, tensor: TensorId) -> TensorId {
        let mut shape = self.graph.tensor(tensor).shape.clone();
        let channel: usize = shape.iter().skip(2).product();
        let first = if shape.len() > 2 && Codec::run(&shape) == channel { 2 } else { 1 };
        shape.iter_mut().skip(first).for_each(|extent| *extent = 1);
        let axes: Vec<i64> = (first as i64..shape.len() as i64).collect();
        let name = format!("{}/max", self.label);
        let mut proto = standard("ReduceMax", &name, vec![attr_int("keepdims", 1)]);
        let mut inputs = vec![Arg::Tensor(tensor)];
        if self.graph.opset < 18 {
            proto.attribute.push(attr_ints("axes", &axes));
        } else {
            inputs.push(integers(self.graph, format!("{name}/axes"), &axes));
        }
        self.shaped(proto, inputs, shape)
    }

    /// Rounds to whole numbers, ties to even. Op sets before 11 have no Round: a number so large that
    /// one step is 1, added and taken away again, rounds in the same way.
    fn round(&mut self, tensor: TensorId) -> TensorId {
        if self.graph.opset >= 11 {
            return self.op("Round", "code", vec![Arg::Tensor(tensor)], tensor);
        }
        let large = self.number("to_whole", codec::TO_WHOLE);
        let added = self.op("Add", "large", vec![Arg::Tensor(tensor), large], tensor);
        self.op("Sub", "code", vec![Arg::Tensor(added), large], tensor)
    }
}

/// Whether the ops that made a tensor leave nothing below zero in it.
pub(crate) fn is_positive(graph: &Graph, tensor: TensorId) -> bool {
    let op = graph.op(graph.tensor(tensor).producer);
    match op.op_type() {
        "Relu" | "Sigmoid" | "HardSigmoid" | "Abs" | "Exp" | "Softplus" | "Softmax" => true,
        "Clip" => clips_at_zero(graph, op),
        "Slice" | "Identity" | "MaxPool" | "AveragePool" | "Dropout" | "Reshape" => {
            op.tensors().next().is_some_and(|input| is_positive(graph, input))
        }
        _ => false,
    }
}

fn clips_at_zero(graph: &Graph, op: &Op) -> bool {
    let given = op.proto.as_ref().and_then(|proto| proto.float("min"));
    let least = match op.inputs.get(1) {
        Some(Arg::Const(id)) => {
            graph.constant(*id).to_f32().ok().and_then(|values| values.first().copied())
        }
        _ => given,
    };
    least.is_some_and(|least| least >= 0.0)
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
