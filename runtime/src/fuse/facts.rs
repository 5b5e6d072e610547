//! What is known of a tensor before the model runs: its shape, and its elements if it is constant.

use tract_onnx::prelude::*;

/// A tensor's elements.
///
/// # Errors
/// It is of another type.
pub(crate) fn elements<T: Datum>(tensor: &Tensor) -> TractResult<&[T]> {
    tensor.try_as_plain_ram()?.as_slice::<T>()
}

/// The numbers of a constant, if it is one of `n` f32 along the channel axis, or of one.
pub(super) fn constant(fact: &TypedFact, channels: usize) -> Option<Vec<f32>> {
    let konst = fact.konst.as_ref().filter(|konst| konst.datum_type() == f32::datum_type())?;
    let numbers = elements::<f32>(konst).ok()?;
    let shape = konst.shape();
    match numbers.len() {
        1 => Some(vec![numbers[0]; channels]),
        n if n == channels && shape.len() == 4 && shape[1] == n => Some(numbers.to_vec()),
        _ => None,
    }
}

/// Its one number, where it has no other.
pub(super) fn scalar(fact: &TypedFact) -> Option<f32> {
    constant(fact, 1).map(|numbers| numbers[0])
}

/// Its shape, where no size is open.
pub(super) fn concrete(fact: &TypedFact) -> Option<TVec<usize>> {
    fact.shape.as_concrete().map(Into::into)
}
