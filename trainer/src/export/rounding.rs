//! What features lose on their way, as ordinary ops of an exported model.
//!
//! Takes a graph in which the exchanges of a policy are exact, a channel gather, a mask and an addition
//! a step, and rounds in it what arrives as each step's features travel: by a cast to f16 and back, or by
//! the ops of a quantisation, the arithmetic of [`snn_schemas::codec`] op by op, as the compiler
//! writes it. Rounding stands behind the mask: what is not sent has no part in a scale, and zero stays zero.

use std::collections::HashSet;

use snn_schemas::codec::LEAST;
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{GraphProto, NodeProto, TensorProto, attr_int};
use snn_schemas::{Codec, Dtype, Policy};

use crate::error::TrainError;

/// A step that moves something, as far as rounding asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    codec: Codec,
    groups: usize,
    /// Channels, height and width of one group's features.
    shape: [usize; 3],
    /// Whether each channel has a scale of its own; else all that a group sends share one.
    by_channel: bool,
}

impl Sent {
    /// Step `step` of `policy` for features of this shape a group, or `None` if nothing moves.
    pub(super) fn of(policy: &Policy, step: usize, shape: [usize; 3]) -> Option<Sent> {
        let [channels, height, width] = shape;
        let chosen = &policy.steps[step];
        let keep = policy.levels.keep(chosen.level, channels);
        let moves = keep > 0 && chosen.decision.sends().next().is_some();
        let by_channel = Codec::run(&[1, keep, height, width]) == height * width;
        let codec = policy.codec_of(step);
        moves.then_some(Sent { codec, groups: policy.groups, shape, by_channel })
    }
}

/// Rounds what each exchange of `graph` brings; `steps` are those that move something, in order.
///
/// Nothing else in these networks is gathered.
///
/// # Errors
/// The graph has another number of exchanges.
pub(super) fn round(graph: &mut GraphProto, steps: &[Sent]) -> Result<(), TrainError> {
    let nodes = std::mem::take(&mut graph.node);
    let gathers = nodes.iter().filter(|node| node.op_type() == "Gather");
    let gathered: HashSet<String> = gathers.flat_map(|node| node.output.clone()).collect();
    let masks = |node: &NodeProto| {
        node.op_type() == "Mul" && node.input.iter().any(|input| gathered.contains(input))
    };
    let found = nodes.iter().filter(|&node| masks(node)).count();
    if found != steps.len() {
        let expected = steps.len();
        return Err(TrainError::Model(format!("has {found} exchanges, the policy {expected}")));
    }
    let mut steps = steps.iter();
    let mut writer = Writer { nodes: vec![], constants: vec![], label: String::new() };
    for node in nodes {
        let step = if masks(&node) { steps.next() } else { None };
        match step {
            Some(sent) if sent.codec.dtype != Dtype::F32 => writer.arrive(node, sent),
            _ => writer.nodes.push(node),
        }
    }
    graph.node = writer.nodes;
    graph.initializer.extend(writer.constants);
    Ok(())
}

/// Writes ops, each named after the tensor that is rounded and what it gives.
struct Writer {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    label: String,
}

impl Writer {
    /// `mask`, and what arrives of its result under its result's name.
    fn arrive(&mut self, mask: NodeProto, sent: &Sent) {
        self.label = mask.output.first().cloned().unwrap_or_default();
        let exact = format!("{}/exact", self.label);
        let (name, output) = (Some(exact.clone()), vec![exact.clone()]);
        self.nodes.push(NodeProto { name, output, ..mask });
        match sent.codec.largest() {
            Some(largest) => self.quantise(&exact, sent, largest),
            None => {
                let half = self.cast("f16", &exact, DataType::Float16);
                self.cast("f32", &half, DataType::Float);
            }
        }
        if let Some(last) = self.nodes.last_mut() {
            last.output = vec![self.label.clone()];
        }
    }

    /// What closes a block is a ReLU's, so no magnitude has to be taken.
    fn quantise(&mut self, exact: &str, sent: &Sent, largest: f32) {
        let Sent { groups, shape: [channels, height, width], by_channel, .. } = *sent;
        let features = match by_channel {
            true => exact.to_owned(),
            false => self.reshape("groups", exact, [groups, channels, height, width]),
        };
        let axes: &[i64] = if by_channel { &[2, 3] } else { &[1, 2, 3] };
        let axes = self.integers("axes", axes);
        let largest = self.number("largest", largest);
        let least = self.number("least", LEAST);
        let max = self.op("ReduceMax", "max", &[&features, &axes]);
        let most = self.op("Max", "most", &[&max, &least]);
        let inverse = self.op("Div", "inverse", &[&largest, &most]);
        let scaled = self.op("Mul", "scaled", &[&features, &inverse]);
        let code = self.op("Round", "code", &[&scaled]);
        let scale = self.op("Div", "scale", &[&most, &largest]);
        let arrived = self.op("Mul", "arrived", &[&code, &scale]);
        if !by_channel {
            self.reshape("together", &arrived, [1, groups * channels, height, width]);
        }
    }

    /// An op; gives its result's name.
    fn op(&mut self, op_type: &str, what: &str, inputs: &[&str]) -> String {
        let name = format!("{}/{what}", self.label);
        self.nodes.push(NodeProto::new(op_type, &name, inputs, &[name.as_str()]));
        name
    }

    fn cast(&mut self, what: &str, input: &str, kind: DataType) -> String {
        let name = self.op("Cast", what, &[input]);
        if let Some(node) = self.nodes.last_mut() {
            node.attribute.push(attr_int("to", kind as i64));
        }
        name
    }

    fn reshape(&mut self, what: &str, input: &str, shape: [usize; 4]) -> String {
        let shape = self.integers(&format!("{what}/shape"), &shape.map(|extent| extent as i64));
        self.op("Reshape", what, &[input, &shape])
    }

    fn integers(&mut self, what: &str, values: &[i64]) -> String {
        let name = format!("{}/{what}", self.label);
        self.constants.push(TensorProto::i64(&name, &[values.len() as i64], values));
        name
    }

    fn number(&mut self, what: &str, value: f32) -> String {
        let name = format!("{}/{what}", self.label);
        self.constants.push(TensorProto::f32(&name, &[1], &[value]));
        name
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use snn_schemas::onnx::{self, ModelProto, OperatorSetIdProto, ValueInfoProto};
    use snn_schemas::{Decision, Levels, Step};

    use super::*;
    use crate::exchange::received;
    use crate::judge::host;

    /// Two groups that send each other their first channels.
    fn swap(dtype: Dtype, level: usize) -> Policy {
        let levels = Levels { count: 3, min_percent: 50.0 };
        let steps = vec![Step::new(Decision::new(vec![1, 0]).unwrap(), level)];
        Policy { dtype, levels, steps, ..Policy::silent(2, 1, 0) }
    }

    /// The gather and the mask of such a step, as the exporter writes them.
    fn exact(shape: [usize; 3], keep: usize) -> GraphProto {
        let [channels, height, width] = shape.map(|extent| extent as i64);
        let dims = [1, 2 * channels, height, width];
        let source: Vec<i64> = (channels..2 * channels).chain(0..channels).collect();
        let half = (0..shape[0]).map(|channel| f32::from(channel < keep));
        let mask: Vec<f32> = half.clone().chain(half).collect();
        let gather = NodeProto::new("Gather", "gather", &["sent", "source"], &["gather"]);
        GraphProto {
            name: Some("exchange".to_owned()),
            node: vec![
                NodeProto { attribute: vec![attr_int("axis", 1)], ..gather },
                NodeProto::new("Mul", "arrives", &["gather", "mask"], &["arrives"]),
            ],
            initializer: vec![
                TensorProto::i64("source", &[2 * channels], &source),
                TensorProto::f32("mask", &[1, 2 * channels, 1, 1], &mask),
            ],
            input: vec![ValueInfoProto::tensor("sent", DataType::Float, &dims)],
            output: vec![ValueInfoProto::tensor("arrives", DataType::Float, &dims)],
            ..GraphProto::default()
        }
    }

    /// What the graph gives, op by op: tract's optimiser divides by multiplying with a reciprocal.
    fn evaluated(graph: GraphProto, dims: [usize; 4], values: &[f32]) -> Vec<f32> {
        use tract_onnx::prelude::*;

        let opset = OperatorSetIdProto { version: Some(18), ..OperatorSetIdProto::default() };
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset],
            graph: Some(graph),
            ..ModelProto::default()
        };
        let bytes = onnx::encode(&model);
        let model = tract_onnx::onnx().model_for_read(&mut bytes.as_slice()).unwrap();
        let plan = model.into_typed().unwrap().into_runnable().unwrap();
        let sent = Tensor::from_shape(&dims, values).unwrap();
        let outputs = plan.run(tvec!(sent.into())).unwrap();
        outputs[0].to_plain_array_view::<f32>().unwrap().iter().copied().collect()
    }

    #[test]
    fn what_arrives_is_what_training_simulates_to_the_bit() {
        // Planes that have a scale each, and planes that share one.
        for (height, width) in [(5, 8), (2, 3)] {
            let shape = [4, height, width];
            let dims = [1, 8, height, width];
            let numbers = (0..8 * height * width).map(|i| (i as f32).sin().max(0.0) * 1.7);
            let numbers: Vec<f32> = numbers.collect();
            for (dtype, level, keep) in
                [(Dtype::F32, 1, 3), (Dtype::F16, 2, 4), (Dtype::I8, 2, 4), (Dtype::I4, 1, 3)]
            {
                let policy = swap(dtype, level);
                let sent = Sent::of(&policy, 0, shape).unwrap();
                let mut graph = exact(shape, keep);
                round(&mut graph, &[sent]).unwrap();
                let found = evaluated(graph, dims, &numbers);
                let data = TensorData::new(numbers.clone(), dims);
                let tensor = burn::tensor::Tensor::<4>::from_data(data, &host());
                let arrived = received(tensor, &policy, 0).unwrap();
                let expected: Vec<f32> = arrived.try_into_vec_as().unwrap();
                assert!(found == expected, "{dtype} {height}×{width}");
            }
        }
    }

    #[test]
    fn an_exchange_that_nobody_knows_of_is_an_error() {
        let mut graph = exact([4, 2, 3], 4);
        let error = round(&mut graph, &[]).unwrap_err().to_string();
        assert_eq!(error, "model: has 1 exchanges, the policy 0");
        assert!(Sent::of(&Policy::silent(2, 1, 1), 0, [4, 2, 3]).is_none());
    }
}
