//! Memory of finished computations, kept for the next ones.
//!
//! [`Memory`] has a shelf of tensors for each type, shape and halo, and one of plain memory for what no
//! tensor of tract's is needed for. [`Results`] is one computation's way to it: it takes a tensor that
//! nobody holds, or a new one where there is none, and puts it back once it has been filled. A
//! tensor is free again when its last holder drops it.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::{TractErrorContext as _, ensure};

use crate::kernels::{Aligned, Halo};

/// Memory of finished computations, for the next ones: nothing is allocated once every shape has
/// been met as often as it is needed at once.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    shelves: Arc<Mutex<Shelves>>,
    bench: Arc<Mutex<Bench>>,
}

/// A shelf for each type, shape and part of it that is always zero.
type Shelves = HashMap<(DatumType, TVec<usize>, Halo), Shelf>;

/// Tensors of one type and shape. Those that nobody else holds are free.
type Shelf = Arc<Mutex<Vec<Arc<Tensor>>>>;

/// What computations write that only computations of the same run read: places, each for one kind of
/// tensor.
#[derive(Default)]
pub(super) struct Bench {
    pub(super) kinds: Vec<Kind>,
    pub(super) memory: Vec<Aligned>,
}

/// Tensors of f32 that may take each other's place: of one shape and halo, which is written only once.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kind {
    /// With the halo.
    shape: TVec<usize>,
    halo: Halo,
}

impl Bench {
    /// A new place, all zeros.
    pub(super) fn add(&mut self, kind: Kind) -> usize {
        self.memory.push(Aligned::zeros(kind.shape.iter().product()));
        self.kinds.push(kind);
        self.kinds.len() - 1
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done where a thread could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    fn shelf(&self, datum: DatumType, shape: &[usize], halo: Halo) -> Shelf {
        let mut shelves = lock(&self.shelves);
        Arc::clone(shelves.entry((datum, shape.into(), halo)).or_default())
    }

    /// Plain memory, shared by all runs: where each finds its own is decided when it is made.
    pub(super) fn bench(&self) -> Arc<Mutex<Bench>> {
        Arc::clone(&self.bench)
    }

    /// Tensors of a type and shape.
    pub(crate) fn results(&self, datum: DatumType, shape: &[usize]) -> Results {
        self.results_within(datum, Halo::default(), shape)
    }

    /// Tensors of a shape that includes `halo`: zeros that nobody overwrites.
    pub(super) fn results_within(&self, datum: DatumType, halo: Halo, shape: &[usize]) -> Results {
        let shelf = self.shelf(datum, shape, halo);
        Results { datum, shape: shape.into(), halo, shelf }
    }
}

/// Results of one computation: their type, their shape, and where free ones stand.
#[derive(Clone)]
pub(crate) struct Results {
    pub(super) datum: DatumType,
    /// With the halo.
    shape: TVec<usize>,
    halo: Halo,
    shelf: Shelf,
}

impl Results {
    pub(super) fn kind(&self) -> Kind {
        Kind { shape: self.shape.clone(), halo: self.halo }
    }

    pub(super) fn fact(&self) -> TypedFact {
        self.datum.fact(&*self.shape)
    }

    /// A tensor that nobody else holds. It begins as zeros; later it holds what it held before.
    ///
    /// # Errors
    /// What tract says of a new one.
    pub(crate) fn take(&self) -> TractResult<Arc<Tensor>> {
        let mut shelf = lock(&self.shelf);
        match shelf.iter_mut().position(|tensor| Arc::get_mut(tensor).is_some()) {
            Some(at) => Ok(shelf.swap_remove(at)),
            None => Ok(Arc::new(Tensor::zero_dt(self.datum, &self.shape)?)),
        }
    }

    /// The tensor that a value is, for its only holder to write to; a copy where others hold it, too.
    ///
    /// # Errors
    /// It is of another type or size, or what tract says of a new one.
    pub(super) fn claim(&self, value: TValue) -> TractResult<Arc<Tensor>> {
        let mut tensor = value.into_arc_tensor();
        let mut shelf = lock(&self.shelf);
        if let Some(at) = shelf.iter().position(|kept| Arc::ptr_eq(kept, &tensor)) {
            let kept = shelf.swap_remove(at);
            drop(kept);
            if Arc::get_mut(&mut tensor).is_some() {
                return Ok(tensor);
            }
            shelf.push(Arc::clone(&tensor));
        }
        drop(shelf);
        let mut copy = self.take()?;
        let to = Arc::get_mut(&mut copy).context("memory is held elsewhere")?.as_bytes_mut();
        ensure!(to.len() == tensor.as_bytes().len(), "a tensor is not as it was said to be");
        to.copy_from_slice(tensor.as_bytes());
        Ok(copy)
    }

    /// Whether tensors of the other kind may lie in this one's memory.
    pub(super) fn alike(&self, other: &Results) -> bool {
        self.datum == other.datum && self.kind() == other.kind()
    }

    /// Gives a filled tensor out; it can be taken again once nobody holds it.
    pub(crate) fn give(&self, tensor: Arc<Tensor>) -> TValue {
        lock(&self.shelf).push(Arc::clone(&tensor));
        TValue::from_const(tensor)
    }
}

impl Debug for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.shape, self.datum)
    }
}
