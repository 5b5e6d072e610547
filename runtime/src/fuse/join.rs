//! Neighbouring computations that become one op of tract's.
//!
//! [`join`] takes a model and makes one [`Run`] of all neighbours that can be, so that tract's costs a
//! step are paid once for a whole segment. It decides where each tensor of a run lies: where its last
//! reader may overwrite a tensor, it does, the run's inputs among them if nobody else reads them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::source::TypedSource;

use super::Fusion;
use super::memory::{Bench, Kind, Results, lock};
use super::ops::Compute;
use super::run::{Cell, Holding, Run, Step};

/// One op for all neighbouring runs of `model`. Of its inputs, `ending` says which nobody reads after it.
///
/// # Errors
/// What tract says of the new model.
pub(super) fn join(
    model: &TypedModel,
    fusion: &Fusion,
    ending: &[bool],
) -> TractResult<TypedModel> {
    let order = model.eval_order()?;
    let ending = model.inputs.iter().zip(ending).filter(|(_, ends)| **ends);
    let mut joiner = Joiner {
        old: model,
        fusion,
        ending: ending.map(|(input, _)| *input).collect(),
        new: TypedModel { symbols: model.symbols.clone(), ..TypedModel::default() },
        places: HashMap::new(),
        pending: vec![],
    };
    for &input in &model.inputs {
        let name = model.node(input.node).name.clone();
        let place = joiner.new.add_source(name, model.outlet_fact(input)?.clone())?;
        joiner.places.insert(input, place);
    }
    for &id in &order {
        joiner.take(id)?;
    }
    joiner.flush()?;
    let outputs = model.outputs.iter().map(|outlet| joiner.place(*outlet));
    let outputs = outputs.collect::<TractResult<Vec<OutletId>>>()?;
    joiner.new.select_output_outlets(&outputs)?;
    Ok(joiner.new)
}

/// A model whose runs are being joined.
struct Joiner<'a> {
    old: &'a TypedModel,
    fusion: &'a Fusion,
    /// Inputs that nobody reads after the model.
    ending: HashSet<OutletId>,
    new: TypedModel,
    places: HashMap<OutletId, OutletId>,
    /// Runs that the next one will be made of.
    pending: Vec<usize>,
}

impl Joiner<'_> {
    fn place(&self, old: OutletId) -> TractResult<OutletId> {
        self.places.get(&old).copied().context("a tensor is used before it is made")
    }

    /// Takes an op whose inputs have been taken.
    fn take(&mut self, id: usize) -> TractResult<()> {
        let node = self.old.node(id);
        if node.op_is::<TypedSource>() {
            return Ok(());
        }
        if node.op_is::<Run>() {
            self.pending.push(id);
            return Ok(());
        }
        if node.inputs.iter().any(|input| self.pending.contains(&input.node)) {
            self.flush()?;
        }
        if let Some(konst) = node.op_as::<Const>() {
            let place = self.new.add_const(node.name.clone(), Arc::clone(konst.val()))?;
            self.places.insert(id.into(), place);
            return Ok(());
        }
        let inputs = node.inputs.iter().map(|input| self.place(*input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let places = self.new.wire_node(&node.name, node.op.clone(), &inputs)?;
        for (slot, place) in places.into_iter().enumerate() {
            self.places.insert(OutletId::new(id, slot), place);
        }
        Ok(())
    }

    /// Makes one run of those that wait.
    fn flush(&mut self) -> TractResult<()> {
        let pending = std::mem::take(&mut self.pending);
        let Some(&last) = pending.last() else { return Ok(()) };
        let bench = self.fusion.memory.bench();
        let mut planner = Planner::new(self.old, &pending, &bench, &self.ending);
        for (at, &id) in pending.iter().enumerate() {
            planner.add(at, id)?;
        }
        let Planner { steps, held, inputs, seen, .. } = planner;
        let workers = Arc::clone(&self.fusion.workers);
        // Results are given in the order of what holds them, and may have been made in another.
        let seen: BTreeMap<usize, OutletId> =
            seen.into_iter().map(|(outlet, at)| (at, outlet)).collect();
        let run = Run { steps, held, bench, workers };
        let inputs = inputs.iter().map(|input| self.place(*input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let places = self.new.wire_node(&self.old.node(last).name, run, &inputs)?;
        self.places.extend(seen.into_values().zip(places));
        Ok(())
    }
}

/// Decides where each tensor of a run lies.
struct Planner<'a> {
    old: &'a TypedModel,
    /// The members in order, and as a set.
    pending: &'a [usize],
    members: HashSet<usize>,
    /// Inputs that nobody reads after the model.
    ending: &'a HashSet<OutletId>,
    /// The last member that reads a tensor, by its place among them.
    last: HashMap<OutletId, usize>,
    cells: HashMap<OutletId, Cell>,
    steps: Vec<Step>,
    held: Vec<Holding>,
    inputs: Vec<OutletId>,
    /// The old tensors that are results, and what holds them.
    seen: Vec<(OutletId, usize)>,
    bench: Arc<Mutex<Bench>>,
    /// Places on the bench that hold nothing any more; the last has been read last.
    free: Vec<usize>,
}

impl<'a> Planner<'a> {
    fn new(
        old: &'a TypedModel,
        pending: &'a [usize],
        bench: &Arc<Mutex<Bench>>,
        ending: &'a HashSet<OutletId>,
    ) -> Planner<'a> {
        let mut last = HashMap::new();
        for (at, &id) in pending.iter().enumerate() {
            last.extend(old.node(id).inputs.iter().map(|input| (*input, at)));
        }
        Planner {
            old,
            pending,
            members: pending.iter().copied().collect(),
            ending,
            last,
            cells: HashMap::new(),
            steps: vec![],
            held: vec![],
            inputs: vec![],
            seen: vec![],
            bench: Arc::clone(bench),
            free: (0..lock(bench).kinds.len()).collect(),
        }
    }

    fn add(&mut self, at: usize, id: usize) -> TractResult<()> {
        let node = self.old.node(id);
        let (compute, results) = self.only(id).context("other than one computation")?;
        let outlet = OutletId::from(id);
        let is_seen = self.is_seen(outlet) || results.datum != f32::datum_type();
        let mut inputs: TVec<Cell> = node.inputs.iter().map(|input| self.cell(*input)).collect();
        // Read here for the last time.
        let ends = |slot: usize| self.last.get(&node.inputs[slot]) == Some(&at);
        let over = (0..inputs.len()).find(|&slot| {
            ends(slot)
                && compute.may_overwrite(slot)
                && inputs.iter().filter(|cell| **cell == inputs[slot]).count() == 1
                && self.may_become(inputs[slot], results, is_seen)
        });
        let mut ending: Vec<usize> = Vec::new();
        for (slot, cell) in inputs.iter().enumerate() {
            if let &Cell::Bench(place) = cell
                && ends(slot)
                && over != Some(slot)
                && !ending.contains(&place)
            {
                ending.push(place);
            }
        }
        let to = match over {
            Some(slot) => std::mem::replace(&mut inputs[slot], Cell::Own),
            None if is_seen => self.hold(results, None),
            None => Cell::Bench(self.room(results.kind())),
        };
        if let (Cell::Held(place), true) = (to, is_seen) {
            self.held[place].is_result = true;
            self.seen.push((outlet, place));
        }
        self.free.extend(ending);
        self.cells.insert(outlet, to);
        self.steps.push(Step { compute: Arc::clone(compute), inputs, to });
        Ok(())
    }

    /// What a member of one computation computes, and its result.
    fn only(&self, id: usize) -> Option<(&'a Arc<dyn Compute>, &'a Results)> {
        let run = self.old.node(id).op_as::<Run>()?;
        let ([step], [held]) = (&*run.steps, &*run.held) else { return None };
        Some((&step.compute, &held.results))
    }

    /// Whether others than the run's members read a tensor.
    fn is_seen(&self, outlet: OutletId) -> bool {
        let mut readers = self.old.node(outlet.node).outputs[outlet.slot].successors.iter();
        self.old.outputs.contains(&outlet)
            || readers.any(|reader| !self.members.contains(&reader.node))
    }

    /// Whether a result may be written where a tensor lies that is read for the last time.
    fn may_become(&self, cell: Cell, results: &Results, is_seen: bool) -> bool {
        match cell {
            Cell::Bench(place) => !is_seen && lock(&self.bench).kinds[place] == results.kind(),
            Cell::Held(place) => {
                let held = &self.held[place];
                !held.is_result && held.results.alike(results)
            }
            Cell::Input(_) | Cell::Own => false,
        }
    }

    /// The kind of an input of the model that nobody reads after the run, if its last reader among the
    /// members may overwrite it.
    fn claimed(&self, outlet: OutletId) -> Option<Results> {
        if !self.ending.contains(&outlet) || self.is_seen(outlet) {
            return None;
        }
        let last = *self.pending.get(*self.last.get(&outlet)?)?;
        let (compute, results) = self.only(last)?;
        let inputs = self.old.node(last).inputs.iter().enumerate();
        let mut slots = inputs.filter(|(_, input)| **input == outlet).map(|(slot, _)| slot);
        let fact = self.old.outlet_fact(outlet).ok()?;
        let fits = slots.all(|slot| compute.may_overwrite(slot))
            && fact.datum_type == results.datum
            && fact.shape == results.fact().shape;
        fits.then(|| results.clone())
    }

    /// Where a tensor lies; a run's input where no member makes it.
    fn cell(&mut self, outlet: OutletId) -> Cell {
        if let Some(cell) = self.cells.get(&outlet) {
            return *cell;
        }
        self.inputs.push(outlet);
        let input = self.inputs.len() - 1;
        let cell = match self.claimed(outlet) {
            Some(results) => self.hold(&results, Some(input)),
            None => Cell::Input(input),
        };
        self.cells.insert(outlet, cell);
        cell
    }

    fn hold(&mut self, results: &Results, from: Option<usize>) -> Cell {
        self.held.push(Holding { results: results.clone(), from, is_result: false });
        Cell::Held(self.held.len() - 1)
    }

    /// A place on the bench for a tensor of this kind: the one that was read last, if one is free.
    fn room(&mut self, kind: Kind) -> usize {
        let mut bench = lock(&self.bench);
        match self.free.iter().rposition(|&place| bench.kinds[place] == kind) {
            Some(at) => self.free.remove(at),
            None => bench.add(kind),
        }
    }
}
