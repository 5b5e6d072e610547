//! Shapes, element types and known values of a model's tensors, by tract's inference.
//!
//! Takes an ONNX model and the shape its first input shall have; gives a [`Fact`] a tensor name.
//! Weights do not enter the inference: large initializers are shown to tract as inputs of their
//! shape, so that a model of any size is inferred in milliseconds and without copying it.

use std::collections::{HashMap, HashSet};

use prost::Message;
use snn_schemas::onnx::{
    GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, tensor_proto::DataType,
    tensor_shape_proto::dimension::Value, type_proto,
};
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::{Factoid, InferenceFact};
use tract_onnx::tract_hir::internal::DimLike;

use crate::error::CompileError;
use crate::graph::const_elements;
use crate::read::node_name;

/// Constants of at most this many elements take part in the inference: shapes, axes, pads, scales.
const SMALL: usize = 64;

/// What is known of a tensor.
#[derive(Clone, Debug)]
pub(crate) struct Fact {
    /// Static shape.
    pub(crate) shape: Vec<usize>,
    /// ONNX element type.
    pub(crate) elem: i32,
    /// Its value, where it follows from shapes alone (integers only).
    pub(crate) value: Option<TensorProto>,
}

/// Facts by tensor name.
pub(crate) type Facts = HashMap<String, Fact>;

/// Fixes the shapes of the model's true inputs (those that are no initializers).
///
/// `given` replaces the first input's shape where that is dynamic, and must equal it elsewhere.
pub(crate) fn fix_inputs(
    graph: &GraphProto,
    given: Option<&[usize]>,
) -> Result<Vec<ValueInfoProto>, CompileError> {
    let constants: HashSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
    let inputs = graph.input.iter().filter(|input| !constants.contains(input.name()));
    inputs
        .enumerate()
        .map(|(index, input)| fix_input(input, given.filter(|_| index == 0)))
        .collect()
}

fn fix_input(
    input: &ValueInfoProto,
    given: Option<&[usize]>,
) -> Result<ValueInfoProto, CompileError> {
    let name = input.name().to_owned();
    let Some(type_proto::Value::TensorType(tensor)) =
        input.r#type.as_ref().and_then(|t| t.value.as_ref())
    else {
        return Err(CompileError::Malformed(format!("input \"{name}\" is no tensor")));
    };
    let dims = tensor.shape.as_ref().map(|shape| shape.dim.as_slice()).unwrap_or_default();
    let known: Vec<Option<usize>> = dims
        .iter()
        .map(|dim| match &dim.value {
            Some(Value::DimValue(n)) if *n > 0 => usize::try_from(*n).ok(),
            _ => None,
        })
        .collect();
    let text = || {
        let names = dims.iter().map(|dim| match &dim.value {
            Some(Value::DimValue(n)) => n.to_string(),
            Some(Value::DimParam(name)) if !name.is_empty() => name.clone(),
            _ => "?".to_owned(),
        });
        names.collect::<Vec<_>>().join(",")
    };
    let shape: Vec<usize> = match given {
        Some(given) => {
            let fits = tensor.shape.is_none()
                || known.len() == given.len()
                    && known.iter().zip(given).all(|(dim, want)| dim.is_none_or(|d| d == *want));
            if !fits || given.contains(&0) {
                let given = given.to_vec();
                return Err(CompileError::InputShape { input: name, expected: text(), given });
            }
            given.to_vec()
        }
        None if tensor.shape.is_none() => {
            return Err(CompileError::DynamicShape { input: name, shape: "?".to_owned() });
        }
        None => known
            .into_iter()
            .collect::<Option<_>>()
            .ok_or_else(|| CompileError::DynamicShape { input: name.clone(), shape: text() })?,
    };
    let shape: Vec<i64> = shape.into_iter().map(|dim| dim as i64).collect();
    value_info(&name, tensor.elem_type(), &shape)
}

/// The description of a tensor of ONNX element type `elem`.
pub(crate) fn value_info(
    name: &str,
    elem: i32,
    shape: &[i64],
) -> Result<ValueInfoProto, CompileError> {
    let known = DataType::try_from(elem).map_err(|_| {
        CompileError::Malformed(format!("tensor \"{name}\" is of the unknown type {elem}"))
    })?;
    Ok(ValueInfoProto::tensor(name, known, shape))
}

/// Infers shape and type of every tensor of `model`, whose inputs are `inputs`.
pub(crate) fn infer(model: &ModelProto, inputs: &[ValueInfoProto]) -> Result<Facts, CompileError> {
    let graph = model.graph.as_ref();
    let nodes = graph.map(|graph| graph.node.as_slice()).unwrap_or_default();
    let framework = tract_onnx::onnx().with_ignore_value_info(true).with_ignore_output_types(true);
    for node in nodes {
        if !framework.op_register.0.contains_key(node.op_type()) {
            let domain = if node.domain().is_empty() { "" } else { "." };
            return Err(CompileError::UnknownOp {
                op: node_name(node).to_owned(),
                op_type: format!("{}{domain}{}", node.domain(), node.op_type()),
            });
        }
    }
    let light = infer_with(&framework, &skeleton(model, inputs, SMALL));
    // An op may want the value of a constant that was left out: rare, then everything is shown.
    let facts = match light {
        Ok(facts) if missing(nodes, &facts).is_none() => facts,
        _ => infer_with(&framework, &skeleton(model, inputs, usize::MAX))?,
    };
    match missing(nodes, &facts) {
        None => Ok(facts),
        Some((node, tensor)) => Err(CompileError::NoShape {
            tensor: tensor.to_owned(),
            op: node_name(node).to_owned(),
            op_type: node.op_type().to_owned(),
        }),
    }
}

fn missing<'a>(nodes: &'a [NodeProto], facts: &Facts) -> Option<(&'a NodeProto, &'a str)> {
    nodes.iter().find_map(|node| {
        let mut outputs = node.output.iter().filter(|name| !name.is_empty());
        // Further outputs (a Dropout's mask, a BatchNormalization's statistics) may stay unknown:
        // the reader complains where one of them is used.
        let first = outputs.next()?;
        (!facts.contains_key(first)).then_some((node, first.as_str()))
    })
}

/// The model with constants of more than `largest` elements turned into inputs.
fn skeleton(model: &ModelProto, inputs: &[ValueInfoProto], largest: usize) -> ModelProto {
    let Some(graph) = model.graph.as_ref() else { return ModelProto::default() };
    let (small, large): (Vec<_>, Vec<_>) =
        graph.initializer.iter().partition(|t| const_elements(t) <= largest);
    let mut inputs = inputs.to_vec();
    inputs.extend(large.iter().filter_map(|t| value_info(t.name(), t.data_type(), &t.dims).ok()));
    let graph = GraphProto {
        name: graph.name.clone(),
        node: graph.node.clone(),
        input: inputs,
        output: graph.output.clone(),
        initializer: small.into_iter().cloned().collect(),
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: model.ir_version,
        opset_import: model.opset_import.clone(),
        graph: Some(graph),
        ..ModelProto::default()
    }
}

fn infer_with(framework: &tract_onnx::Onnx, model: &ModelProto) -> Result<Facts, CompileError> {
    // tract parses files of strangers here; what it panics about is one more unusable model.
    let guarded = std::panic::AssertUnwindSafe(|| infer_unguarded(framework, model));
    std::panic::catch_unwind(guarded)
        .unwrap_or_else(|_| Err(CompileError::Inference("the model makes no sense".to_owned())))
}

fn infer_unguarded(
    framework: &tract_onnx::Onnx,
    model: &ModelProto,
) -> Result<Facts, CompileError> {
    let failed = |error: TractError| CompileError::Inference(one_line(&error));
    let bytes = model.encode_to_vec();
    let proto = framework.proto_model_for_read(&mut bytes.as_slice()).map_err(failed)?;
    let parsed = framework.parse(&proto, None).map_err(failed)?;
    if let Some(name) = parsed.unresolved_inputs.first() {
        return Err(CompileError::Malformed(format!("nothing gives the tensor \"{name}\"")));
    }
    let mut inference = parsed.model;
    inference.analyse(false).map_err(failed)?;
    let known = parsed.outlets_by_name.into_iter().filter_map(|(name, outlet)| {
        let fact = inference.outlet_fact(outlet).ok()?;
        Some((name, read_fact(fact)?))
    });
    Ok(known.collect())
}

fn read_fact(fact: &InferenceFact) -> Option<Fact> {
    let shape = fact.shape.concretize()?;
    let shape = shape.iter().map(|dim| dim.to_usize().ok()).collect::<Option<Vec<_>>>()?;
    let datum = fact.datum_type.concretize()?;
    let value = fact.value.concretize().filter(|t| t.len() <= SMALL).and_then(|tensor| {
        let dims: Vec<i64> = tensor.shape().iter().map(|&dim| dim as i64).collect();
        let tensor = tensor.cast_to::<i64>().ok()?;
        let integers = tensor.to_plain_array_view::<i64>().ok()?;
        let data: Vec<i64> = integers.iter().copied().collect();
        Some(TensorProto::i64("", &dims, &data))
    });
    // A dimension computed by the model is tract's TDim; ONNX calls the same tensor INT64.
    let elem = if datum == TDim::datum_type() { 7 } else { onnx_elem(datum)? };
    Some(Fact { shape, elem, value: value.filter(|_| elem == 7) })
}

fn onnx_elem(datum: DatumType) -> Option<i32> {
    Some(match datum {
        DatumType::F32 => 1,
        DatumType::U8 => 2,
        DatumType::I8 => 3,
        DatumType::U16 => 4,
        DatumType::I16 => 5,
        DatumType::I32 => 6,
        DatumType::I64 => 7,
        DatumType::String => 8,
        DatumType::Bool => 9,
        DatumType::F16 => 10,
        DatumType::F64 => 11,
        DatumType::U32 => 12,
        DatumType::U64 => 13,
        _ => return None,
    })
}

/// What the inference says, on one line: the op it names, and the innermost reason.
fn one_line(error: &TractError) -> String {
    let chain: Vec<String> =
        error.chain().map(|cause| cause.to_string().lines().next().unwrap_or("").into()).collect();
    let op = chain.iter().find_map(|text| text.split_once("node #")?.1.split('"').nth(1));
    match (op, chain.last()) {
        (Some(op), Some(reason)) if chain.len() > 1 => {
            let reason = reason.trim_end_matches('.');
            format!("op \"{op}\" does not fit its arguments: {reason}")
        }
        _ => chain.join(": "),
    }
}
