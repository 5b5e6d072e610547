//! Tensors of finished computations, kept for the next ones.
//!
//! [`Memory`] has a shelf for each type, shape and halo. [`Results`] is one op's way to it: it takes a tensor
//! that nobody holds, or a new one where there is none, lets the op fill it, and gives it out. A tensor
//! is free again when its last holder drops it.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, PoisonError};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;

use crate::kernels::Halo;

/// Tensors of finished computations, for the next ones: nothing is allocated once every shape has
/// been met as often as it is needed at once.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    shelves: Arc<Mutex<Shelves>>,
}

/// A shelf for each type, shape and part of it that is always zero.
type Shelves = HashMap<(DatumType, TVec<usize>, Halo), Shelf>;

/// Tensors of one type and shape. Those that nobody else holds are free.
type Shelf = Arc<Mutex<Vec<Arc<Tensor>>>>;

impl Memory {
    fn shelf(&self, datum: DatumType, shape: &[usize], halo: Halo) -> Shelf {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shelves.entry((datum, shape.into(), halo)).or_default())
    }
}

/// Results of one op: their type, their shape, and where free ones stand.
#[derive(Clone)]
pub(super) struct Results {
    datum: DatumType,
    shape: TVec<usize>,
    shelf: Shelf,
}

impl Results {
    pub(super) fn new(memory: &Memory, datum: DatumType, shape: &[usize]) -> Results {
        let shelf = memory.shelf(datum, shape, Halo::default());
        Results { datum, shape: shape.into(), shelf }
    }

    /// Blocked tensors of a shape that includes `halo`: zeros that nobody overwrites.
    pub(super) fn within(memory: &Memory, halo: Halo, shape: &[usize]) -> Results {
        let datum = f32::datum_type();
        Results { datum, shape: shape.into(), shelf: memory.shelf(datum, shape, halo) }
    }

    pub(super) fn fact(&self) -> TypedFact {
        self.datum.fact(&*self.shape)
    }

    /// A tensor that `fill` has filled. It begins as zeros; later it holds what it held before.
    pub(super) fn filled(
        &self,
        fill: impl FnOnce(&mut Tensor) -> TractResult<()>,
    ) -> TractResult<TValue> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let free = shelf.iter_mut().position(|tensor| Arc::get_mut(tensor).is_some());
        let at = match free {
            Some(at) => at,
            None => {
                shelf.push(Arc::new(Tensor::zero_dt(self.datum, &self.shape)?));
                shelf.len() - 1
            }
        };
        let tensor = Arc::get_mut(&mut shelf[at]).context("a free tensor is held elsewhere")?;
        fill(tensor)?;
        Ok(TValue::from_const(Arc::clone(&shelf[at])))
    }
}

impl Debug for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.shape, self.datum)
    }
}

impl PartialEq for Results {
    fn eq(&self, other: &Results) -> bool {
        self.datum == other.datum && self.shape == other.shape
    }
}
