//! Weights of half precision: a network rounded to them, and a model that stores them.
//!
//! Large weights are those of convolutions and of the classifier; biases and what belongs to batch norm, a
//! number a channel, keep theirs. [`halved`] rounds a network's; [`store`] takes an exported
//! graph and stores them as float16, each under its own name and with a cast behind it. Of a network
//! that is rounded already, what is stored is it, to the bit.

use std::collections::HashSet;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{FloatDType, Tensor};
use half::f16;
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{GraphProto, NodeProto, TensorProto, attr_int};

use crate::error::TrainError;
use crate::net::Network;

/// Ends the names of convolutions' and the classifier's weights.
const WEIGHT: &str = ".weight";
/// Ends the name of a weight that was widened again.
const WIDE: &str = "/f32";

/// The network with its large weights rounded to half precision.
pub(crate) fn halved(network: Network) -> Network {
    network.map(&mut Halve)
}

struct Halve;

impl ModuleMapper for Halve {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match D {
            // A number a channel, or a class.
            0 | 1 => param,
            _ => param.map(|weight| weight.cast(FloatDType::F16).cast(FloatDType::F32)),
        }
    }
}

/// Stores the large weights of `graph` as float16.
///
/// # Errors
/// A weight does not fill its shape.
pub(super) fn store(graph: &mut GraphProto) -> Result<(), TrainError> {
    let mut stored = HashSet::new();
    let mut nodes = Vec::with_capacity(graph.node.len());
    for weight in graph.initializer.iter_mut().filter(|tensor| tensor.name().ends_with(WEIGHT)) {
        let name = weight.name().to_owned();
        let halves = weight.to_f32()?.into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes());
        *weight = TensorProto::raw(&name, DataType::Float16, &weight.dims, halves.collect());
        let wide = format!("{name}{WIDE}");
        let attribute = vec![attr_int("to", DataType::Float as i64)];
        let cast = NodeProto::new("Cast", &wide, &[name.as_str()], &[wide.as_str()]);
        nodes.push(NodeProto { attribute, ..cast });
        stored.insert(name);
    }
    for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
        if stored.contains(input.as_str()) {
            input.push_str(WIDE);
        }
    }
    nodes.append(&mut graph.node);
    graph.node = nodes;
    Ok(())
}
