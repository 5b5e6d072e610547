//! Constants that exporters compute in place of writing them down.
//!
//! Takes an op whose first argument is a constant, and the shape and type of its result; gives the
//! result where the op only reshapes, repeats or keeps it, or widens halves. The PyTorch exporter writes the
//! bias a convolution does not have in this way, and a file of half the size has its weights so.
//! Arithmetic is left to whoever runs the model.

use snn_schemas::onnx::{NodeProto, TensorProto};

use crate::graph::{Arg, FLOAT, FLOAT16, Graph, const_elements, elem_size};
use crate::shapes::Fact;

/// Most elements that are written down for a single number: more than any bias has, far less than
/// a shape in a damaged file may ask for.
const LARGEST: usize = 1 << 20;

/// The result of `node`, if it is a constant that can be had without arithmetic.
pub(crate) fn fold(
    node: &NodeProto,
    inputs: &[Arg],
    graph: &Graph,
    result: &Fact,
) -> Option<TensorProto> {
    let Some(Arg::Const(id)) = inputs.first() else { return None };
    let source = graph.constant(*id);
    if node.op_type() == "Cast" && (source.data_type(), result.elem) == (FLOAT16, FLOAT) {
        // Every half has an exact f32.
        return source.to_f32().ok().map(|values| TensorProto::f32("", &source.dims, &values));
    }
    let raw = source.raw_data.clone()?;
    let width = elem_size(result.elem);
    let elements = result.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
    if source.data_type() != result.elem || width == 0 {
        return None;
    }
    let data = match node.op_type() {
        "Cast" | "CastLike" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => {
            (raw.len() == elements.checked_mul(width)?).then_some(raw)?
        }
        "Expand" if const_elements(source) == 1 && elements <= LARGEST => {
            raw.repeat(elements).into()
        }
        _ => return None,
    };
    Some(TensorProto {
        dims: result.shape.iter().map(|&dim| dim as i64).collect(),
        data_type: Some(result.elem),
        raw_data: Some(data),
        ..TensorProto::default()
    })
}
