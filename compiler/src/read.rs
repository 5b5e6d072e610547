//! Stage 1: an ONNX file becomes a [`Graph`] in one normal form.
//!
//! Takes the model as any exporter wrote it; gives a graph in which weights are constants wherever
//! they stood (initializers, Constant ops, inputs with a default), every shape is static, what
//! follows from shapes alone is computed, and ops that do nothing at inference (Identity, Dropout)
//! are gone. Ops no output needs are dropped. The rest is untouched: names, attributes, order.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use snn_schemas::metadata::{Normalisation, is_normalised};
use snn_schemas::onnx::{
    self, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_proto,
};

use crate::error::CompileError;
use crate::fold::fold;
use crate::graph::{Arg, Graph, Op, TensorId, TensorSpec, UNDEFINED, elem_size};
use crate::shapes::{self, Facts};

/// A model file, decoded.
#[derive(Clone, Debug)]
pub struct Source {
    /// The model, all of it.
    pub model: ModelProto,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

impl Source {
    /// Decodes a model file; weights share its memory.
    ///
    /// # Errors
    /// The bytes are no ONNX model, or its weights are elsewhere.
    pub fn from_bytes(bytes: Bytes) -> Result<Source, CompileError> {
        let sha256 = crate::sha256(&bytes);
        let model = onnx::decode(bytes)?;
        if let Some(graph) = &model.graph {
            check_names(graph)?;
            let constants = graph.node.iter().flat_map(|node| &node.attribute);
            let constants = constants.filter_map(|attribute| attribute.t.as_ref());
            graph.initializer.iter().chain(constants).try_for_each(check_location)?;
        }
        Ok(Source { model, sha256 })
    }
}

/// Messages are one line: names that would break them are no names.
fn check_names(graph: &GraphProto) -> Result<(), CompileError> {
    let node = |node: &'_ NodeProto| {
        let own = [node.name(), node.op_type(), node.domain()].map(str::to_owned);
        let attributes = node.attribute.iter().map(|attribute| attribute.name().to_owned());
        let tensors = node.input.iter().chain(&node.output).cloned();
        own.into_iter().chain(attributes).chain(tensors).collect::<Vec<String>>()
    };
    let values = graph.input.iter().chain(&graph.output).map(|value| value.name().to_owned());
    let names = values.chain(graph.initializer.iter().map(|tensor| tensor.name().to_owned()));
    match names.chain(graph.node.iter().flat_map(node)).find(|n| n.contains(char::is_control)) {
        Some(name) => {
            Err(CompileError::Malformed(format!("the name {name:?} has control characters")))
        }
        None => Ok(()),
    }
}

/// Weights must stand in the file itself.
fn check_location(tensor: &TensorProto) -> Result<(), CompileError> {
    if tensor.data_location() != tensor_proto::DataLocation::External {
        return Ok(());
    }
    let location = tensor.external_data.iter().find(|entry| entry.key() == "location");
    Err(CompileError::ExternalData {
        tensor: tensor.name().to_owned(),
        location: location.map_or("?", |entry| entry.value()).to_owned(),
    })
}

/// Name of an op for messages: its own, or its first result's.
pub(crate) fn node_name(node: &NodeProto) -> &str {
    match node.name() {
        "" => node.output.first().map_or("", String::as_str),
        name => name,
    }
}

/// Whether an op holds graphs of its own, as If and Loop do.
fn holds_graph(node: &NodeProto) -> bool {
    node.attribute.iter().any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty())
}

/// A model in normal form.
#[derive(Clone, Debug)]
pub struct Model {
    /// The model's ops and tensors.
    pub graph: Graph,
    /// Op sets the source imports.
    pub opsets: Vec<snn_schemas::onnx::OperatorSetIdProto>,
    /// ONNX IR version of the source.
    pub ir_version: i64,
    /// An op that holds graphs of its own, if there is one: (name, type).
    pub subgraph: Option<(String, String)>,
}

/// Reads a model; `input_shape` fixes its first input where that is dynamic.
///
/// # Errors
/// The variants of [`CompileError`] whose messages begin with `read` and `shapes`.
pub fn read(source: &Source, input_shape: Option<&[usize]>) -> Result<Model, CompileError> {
    let model = &source.model;
    let Some(proto) = model.graph.as_ref() else {
        return Err(CompileError::Malformed("the model holds no graph".to_owned()));
    };
    check_outputs(proto)?;
    let inputs = shapes::fix_inputs(proto, input_shape)?;
    let facts = shapes::infer(model, &inputs)?;
    let opset = model.opset_import.iter().find(|set| matches!(set.domain(), "" | "ai.onnx"));
    let mut reader = Reader {
        graph: Graph::new(opset.map_or(1, |set| set.version())),
        facts,
        names: HashMap::new(),
    };
    reader.read_graph(proto, &inputs)?;
    let mut graph = reader.graph;
    graph.remove_dead();
    graph.normalised = normalised(model, &graph);
    let subgraph = proto.node.iter().find(|node| holds_graph(node));
    Ok(Model {
        graph,
        opsets: model.opset_import.clone(),
        ir_version: model.ir_version(),
        subgraph: subgraph.map(|node| (node_name(node).into(), node.op_type().into())),
    })
}

/// Channels of the input that the model's metadata says how to make of a picture.
fn normalised(model: &ModelProto, graph: &Graph) -> Option<usize> {
    let get = |key: &str| model.metadata(key);
    let shapes = graph.inputs.iter().map(|&tensor| &graph.tensor(tensor).shape);
    let mut channels = shapes.filter(|shape| shape.len() == 4).map(|shape| shape[1]);
    channels.find(|&channels| is_normalised(get) && Normalisation::read(get, channels).is_ok())
}

/// Every output of the model is made by something.
fn check_outputs(graph: &GraphProto) -> Result<(), CompileError> {
    if graph.output.is_empty() {
        return Err(CompileError::Malformed("the model has no outputs".to_owned()));
    }
    let made = graph.node.iter().flat_map(|node| &node.output).map(String::as_str);
    let given = graph.input.iter().map(|input| input.name());
    let known: HashSet<&str> =
        made.chain(given).chain(graph.initializer.iter().map(|tensor| tensor.name())).collect();
    match graph.output.iter().find(|output| !known.contains(output.name())) {
        Some(output) => {
            let name = output.name();
            Err(CompileError::Malformed(format!("nothing gives the output \"{name}\"")))
        }
        None => Ok(()),
    }
}

/// What each name of the file stands for, while ops are read in file order.
struct Reader {
    graph: Graph,
    facts: Facts,
    names: HashMap<String, Arg>,
}

impl Reader {
    fn read_graph(
        &mut self,
        proto: &GraphProto,
        inputs: &[ValueInfoProto],
    ) -> Result<(), CompileError> {
        for tensor in &proto.initializer {
            let constant = self.graph.add_const(with_raw_data(tensor)?);
            self.define(tensor.name(), Arg::Const(constant))?;
        }
        for input in inputs {
            let spec = self.spec(input.name(), "Input")?;
            let tensor = self.graph.add_input(spec);
            self.define(input.name(), Arg::Tensor(tensor))?;
        }
        for node in &proto.node {
            self.read_node(node)?;
        }
        for output in &proto.output {
            let tensor = self.output(output.name())?;
            self.graph.outputs.push((output.name().to_owned(), tensor));
        }
        Ok(())
    }

    fn define(&mut self, name: &str, arg: Arg) -> Result<(), CompileError> {
        match self.names.insert(name.to_owned(), arg) {
            None => Ok(()),
            Some(_) => Err(CompileError::Malformed(format!("tensor \"{name}\" is made twice"))),
        }
    }

    fn spec(&self, name: &str, op: &str) -> Result<TensorSpec, CompileError> {
        let fact = self.facts.get(name).ok_or_else(|| CompileError::NoShape {
            tensor: name.to_owned(),
            op: op.to_owned(),
            op_type: op.to_owned(),
        })?;
        Ok(TensorSpec { name: name.to_owned(), shape: fact.shape.clone(), elem: fact.elem })
    }

    fn read_node(&mut self, node: &NodeProto) -> Result<(), CompileError> {
        let inputs = node.input.iter().map(|name| self.argument(name, node));
        let inputs = inputs.collect::<Result<Vec<Arg>, CompileError>>()?;
        let Some(first) = node.output.iter().find(|name| !name.is_empty()) else {
            return Ok(());
        };
        if node.op_type() == "Constant" {
            let value = TensorProto { name: Some(first.clone()), ..constant_value(node)? };
            let constant = self.graph.add_const(value);
            return self.define(first, Arg::Const(constant));
        }
        let known = self
            .facts
            .get(first)
            .and_then(|fact| fact.value.clone().or_else(|| fold(node, &inputs, &self.graph, fact)));
        if let Some(value) = known {
            let value = TensorProto { name: Some(first.clone()), ..value };
            let constant = self.graph.add_const(value);
            return self.define(first, Arg::Const(constant));
        }
        if does_nothing(node)
            && let Some(&input) = inputs.first()
        {
            // A Dropout's mask is no use at inference; whoever names it gets an error.
            return self.define(first, input);
        }
        let mut proto = node.clone();
        proto.input.clear();
        proto.output.clear();
        let used = node.output.iter().rposition(|name| self.facts.contains_key(name));
        let outputs = node.output[..used.map_or(1, |last| last + 1)].iter();
        let specs = outputs
            .map(|name| match name.is_empty() {
                true => {
                    Ok(TensorSpec { name: "unused".to_owned(), shape: vec![], elem: UNDEFINED })
                }
                false => self.spec(name, node.op_type()),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let op = Op { proto: Some(proto), inputs, outputs: vec![], group: None, exchange: None };
        let id = self.graph.add(op, specs);
        for (index, name) in node.output.iter().enumerate() {
            if let Some(&tensor) = self.graph.op(id).outputs.get(index)
                && !name.is_empty()
            {
                self.define(name, Arg::Tensor(tensor))?;
            }
        }
        Ok(())
    }

    fn argument(&self, name: &str, node: &NodeProto) -> Result<Arg, CompileError> {
        if name.is_empty() {
            return Ok(Arg::Absent);
        }
        self.names.get(name).copied().ok_or_else(|| {
            let op = node_name(node);
            CompileError::Malformed(format!("op \"{op}\" takes \"{name}\" before it is made"))
        })
    }

    fn output(&self, name: &str) -> Result<TensorId, CompileError> {
        match self.names.get(name) {
            Some(Arg::Tensor(tensor)) => Ok(*tensor),
            Some(_) => Err(CompileError::Malformed(format!(
                "output \"{name}\" does not depend on the input"
            ))),
            None => Err(CompileError::Malformed(format!("nothing gives the output \"{name}\""))),
        }
    }
}

/// Ops that pass their first input on unchanged at inference.
fn does_nothing(node: &NodeProto) -> bool {
    let trains = node.op_type() == "Dropout" && node.int("is_test") == Some(0);
    matches!(node.op_type(), "Identity" | "Dropout") && !trains
}

/// The tensor a Constant op stands for, in any of the forms the standard allows.
fn constant_value(node: &NodeProto) -> Result<TensorProto, CompileError> {
    let Some(attribute) = node.attribute.first() else {
        return Err(CompileError::Malformed(format!("Constant \"{}\" is empty", node_name(node))));
    };
    match attribute.name() {
        "value" if attribute.t.is_some() => {
            with_raw_data(attribute.t.as_ref().unwrap_or(&TensorProto::default()))
        }
        "value_float" => Ok(TensorProto::f32("", &[], &[attribute.f()])),
        "value_floats" => {
            Ok(TensorProto::f32("", &[attribute.floats.len() as i64], &attribute.floats))
        }
        "value_int" => Ok(TensorProto::i64("", &[], &[attribute.i()])),
        "value_ints" => Ok(TensorProto::i64("", &[attribute.ints.len() as i64], &attribute.ints)),
        other => Err(CompileError::Malformed(format!(
            "Constant \"{}\" has a {other}, expected a tensor or numbers",
            node_name(node)
        ))),
    }
}

/// The same tensor with its data in `raw_data`, checked against its shape.
fn with_raw_data(tensor: &TensorProto) -> Result<TensorProto, CompileError> {
    let mut tensor = tensor.clone();
    let elem = tensor.data_type();
    if tensor.raw_data.as_ref().is_none_or(|raw| raw.is_empty()) {
        match elem {
            1 => tensor = TensorProto::f32(tensor.name(), &tensor.dims, &tensor.to_f32()?),
            7 => tensor = TensorProto::i64(tensor.name(), &tensor.dims, &tensor.to_i64()?),
            // Other types stay as they are: they are settings, and nothing slices them.
            _ => return Ok(tensor),
        }
    }
    let elements = tensor
        .dims
        .iter()
        .try_fold(1usize, |n, &dim| usize::try_from(dim).ok().and_then(|dim| n.checked_mul(dim)));
    let bytes = elements.and_then(|n| n.checked_mul(elem_size(elem)));
    let found = tensor.raw_data.as_ref().map_or(0, |raw| raw.len());
    if elem_size(elem) > 0 && bytes != Some(found) {
        let (name, dims) = (tensor.name(), &tensor.dims);
        return Err(CompileError::Malformed(format!(
            "tensor \"{name}\" has {found} bytes, which its shape {dims:?} does not explain"
        )));
    }
    Ok(tensor)
}
