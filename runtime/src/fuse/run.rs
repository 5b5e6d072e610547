//! Computations one after the other, as one op of tract's.
//!
//! [`Run::one`] makes an op of a computation; [`join`] takes a model and makes one op of all neighbours
//! that can be, so that tract's costs a step are paid once for a whole segment. What only the run itself
//! reads lies in plain memory that all runs share, so that it stays in the nearest cache; where the
//! last reader of such memory may overwrite it, it does. What others read is a tensor of its own.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::source::TypedSource;

use super::Fusion;
use super::facts::elements;
use super::memory::{Bench, Kind, Results, lock};
use super::ops::{Compute, Operand};
use crate::kernels::{Aligned, Planar, PlanarMut, Workers};

/// Where a step finds or leaves a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cell {
    /// An input of the run.
    Input(usize),
    /// Plain memory: its place on the bench.
    Bench(usize),
    /// A result of the run.
    Result(usize),
    /// For an input of a step: the memory of its own result.
    Own,
}

/// One computation of a run.
#[derive(Clone, Debug)]
struct Step {
    compute: Arc<dyn Compute>,
    inputs: TVec<Cell>,
    to: Cell,
}

/// Computations, in order.
#[derive(Clone)]
pub(super) struct Run {
    steps: Vec<Step>,
    results: Vec<Results>,
    bench: Arc<Mutex<Bench>>,
    workers: Arc<dyn Workers + Send>,
}

impl Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.steps).finish()
    }
}

impl PartialEq for Run {
    fn eq(&self, other: &Run) -> bool {
        let alike = |(a, b): (&Step, &Step)| {
            Arc::ptr_eq(&a.compute, &b.compute) && a.inputs == b.inputs && a.to == b.to
        };
        self.steps.len() == other.steps.len() && self.steps.iter().zip(&other.steps).all(alike)
    }
}

impl Eq for Run {}

impl Op for Run {
    fn name(&self) -> StaticName {
        match &*self.steps {
            [step] => step.compute.name().into(),
            _ => "BlockedRun".into(),
        }
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(self.steps.iter().map(|step| format!("{:?}", step.compute)).collect())
    }

    fn validation(&self) -> Validation {
        Validation::Rounding
    }

    op_as_typed_op!();
}

impl EvalOp for Run {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let inputs = inputs.iter().map(|input| planar(input)).collect::<TractResult<_>>()?;
        let results = self.results.iter().map(|results| Ok(Some(results.take()?)));
        let mut results = results.collect::<TractResult<TVec<Option<Arc<Tensor>>>>>()?;
        let mut bench = lock(&self.bench);
        let (bench, mut done) = (&mut *bench.memory, Ok(()));
        self.workers.within(&mut || done = self.compute(&inputs, &mut results, bench));
        done?;
        let results = results.into_iter().flatten().zip(&self.results);
        Ok(results.map(|(tensor, results)| results.give(tensor)).collect())
    }
}

impl TypedOp for Run {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(self.results.iter().map(Results::fact).collect())
    }

    as_op!();
}

impl Run {
    /// One computation that fills a result.
    pub(super) fn one(
        fusion: &Fusion,
        compute: impl Compute + 'static,
        results: Results,
        inputs: usize,
    ) -> Run {
        let inputs = (0..inputs).map(Cell::Input).collect();
        let step = Step { compute: Arc::new(compute), inputs, to: Cell::Result(0) };
        Run {
            steps: vec![step],
            results: vec![results],
            bench: fusion.memory.bench(),
            workers: Arc::clone(&fusion.workers),
        }
    }

    /// Names of its computations.
    #[cfg(test)]
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.steps.iter().map(|step| step.compute.name())
    }

    fn compute(
        &self,
        inputs: &TVec<Planar<'_>>,
        results: &mut TVec<Option<Arc<Tensor>>>,
        bench: &mut [Aligned],
    ) -> TractResult<()> {
        for step in &self.steps {
            // What is written is taken out of its place, so that the others can be read meanwhile.
            let (mut memory, mut tensor) = (Aligned::default(), None);
            match step.to {
                Cell::Bench(at) => memory = std::mem::take(&mut bench[at]),
                Cell::Result(at) => tensor = results[at].take(),
                Cell::Input(_) | Cell::Own => bail!("a step that writes nowhere"),
            }
            let operand = |cell: &Cell| {
                Ok(Operand::Elements(match *cell {
                    Cell::Own => return Ok(Operand::Result),
                    Cell::Input(at) => inputs[at],
                    Cell::Bench(at) => Planar::F32(bench[at].as_slice()),
                    Cell::Result(at) => planar(results[at].as_ref().context("not yet there")?)?,
                }))
            };
            let operands = step.inputs.iter().map(operand);
            let operands = operands.collect::<TractResult<TVec<Operand<'_>>>>()?;
            match (&mut tensor, step.to) {
                (Some(tensor), Cell::Result(at)) => {
                    let tensor = Arc::get_mut(tensor).context("a result is held elsewhere")?;
                    let mut plain = tensor.try_as_plain_ram_mut()?;
                    let to = match self.results[at].datum == f16::datum_type() {
                        true => PlanarMut::F16(plain.as_slice_mut::<f16>()?),
                        false => PlanarMut::F32(plain.as_slice_mut::<f32>()?),
                    };
                    step.compute.fill(&operands, to)?;
                }
                _ => {
                    step.compute.fill(&operands, PlanarMut::F32(memory.as_mut_slice()))?;
                }
            }
            drop(operands);
            match step.to {
                Cell::Bench(at) => bench[at] = memory,
                Cell::Result(at) => results[at] = tensor,
                Cell::Input(_) | Cell::Own => {}
            }
        }
        Ok(())
    }
}

fn planar(tensor: &Tensor) -> TractResult<Planar<'_>> {
    Ok(match tensor.datum_type() == f16::datum_type() {
        true => Planar::F16(elements::<f16>(tensor)?),
        false => Planar::F32(elements::<f32>(tensor)?),
    })
}

/// One op for all neighbouring runs of `model`.
///
/// # Errors
/// What tract says of the new model.
pub(super) fn join(model: &TypedModel, fusion: &Fusion) -> TractResult<TypedModel> {
    let order = model.eval_order()?;
    let mut joiner = Joiner {
        old: model,
        fusion,
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
        let mut planner = Planner::new(self.old, &pending, &bench);
        for (at, &id) in pending.iter().enumerate() {
            planner.add(at, id)?;
        }
        let Planner { steps, results, inputs, seen, .. } = planner;
        let workers = Arc::clone(&self.fusion.workers);
        let run = Run { steps, results, bench, workers };
        let inputs = inputs.iter().map(|input| self.place(*input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let places = self.new.wire_node(&self.old.node(last).name, run, &inputs)?;
        self.places.extend(seen.into_iter().zip(places));
        Ok(())
    }
}

/// Decides where each tensor of a run lies.
struct Planner<'a> {
    old: &'a TypedModel,
    members: HashSet<usize>,
    /// The last member that reads a tensor, by its place among them.
    last: HashMap<OutletId, usize>,
    cells: HashMap<OutletId, Cell>,
    steps: Vec<Step>,
    results: Vec<Results>,
    inputs: Vec<OutletId>,
    /// The old tensors that are results.
    seen: Vec<OutletId>,
    bench: Arc<Mutex<Bench>>,
    /// Places on the bench that hold nothing any more; the last has been read last.
    free: Vec<usize>,
}

impl<'a> Planner<'a> {
    fn new(old: &'a TypedModel, pending: &[usize], bench: &Arc<Mutex<Bench>>) -> Planner<'a> {
        let mut last = HashMap::new();
        for (at, &id) in pending.iter().enumerate() {
            last.extend(old.node(id).inputs.iter().map(|input| (*input, at)));
        }
        Planner {
            old,
            members: pending.iter().copied().collect(),
            last,
            cells: HashMap::new(),
            steps: vec![],
            results: vec![],
            inputs: vec![],
            seen: vec![],
            bench: Arc::clone(bench),
            free: (0..lock(bench).kinds.len()).collect(),
        }
    }

    fn add(&mut self, at: usize, id: usize) -> TractResult<()> {
        let node = self.old.node(id);
        let run = node.op_as::<Run>().context("other than a run")?;
        let ([step], [results]) = (&*run.steps, &*run.results) else { bail!("is joined already") };
        let mut inputs: TVec<Cell> = node.inputs.iter().map(|input| self.cell(*input)).collect();
        let outlet = OutletId::from(id);
        let is_seen = self.old.outputs.contains(&outlet)
            || node.outputs[0].successors.iter().any(|next| !self.members.contains(&next.node))
            || results.datum != f32::datum_type();
        // Read here for the last time.
        let mut ending: Vec<(OutletId, usize)> = Vec::new();
        for &input in &node.inputs {
            if let (Cell::Bench(place), Some(&last)) = (self.cell(input), self.last.get(&input))
                && last == at
                && !ending.contains(&(input, place))
            {
                ending.push((input, place));
            }
        }
        let to = if is_seen {
            self.results.push(results.clone());
            self.seen.push(outlet);
            Cell::Result(self.results.len() - 1)
        } else {
            let kind = results.kind();
            let over = (0..inputs.len()).find(|&slot| {
                let Cell::Bench(place) = inputs[slot] else { return false };
                let once = inputs.iter().filter(|cell| **cell == inputs[slot]).count() == 1;
                step.compute.may_overwrite(slot)
                    && once
                    && ending.iter().any(|(_, ending)| *ending == place)
                    && lock(&self.bench).kinds[place] == kind
            });
            match over {
                Some(slot) => {
                    let cell = std::mem::replace(&mut inputs[slot], Cell::Own);
                    ending.retain(|(_, place)| Cell::Bench(*place) != cell);
                    cell
                }
                None => Cell::Bench(self.room(kind)),
            }
        };
        self.free.extend(ending.into_iter().map(|(_, place)| place));
        self.cells.insert(outlet, to);
        self.steps.push(Step { compute: Arc::clone(&step.compute), inputs, to });
        Ok(())
    }

    /// Where a tensor lies; a run's input where no member makes it.
    fn cell(&mut self, outlet: OutletId) -> Cell {
        if let Some(cell) = self.cells.get(&outlet) {
            return *cell;
        }
        self.inputs.push(outlet);
        let cell = Cell::Input(self.inputs.len() - 1);
        self.cells.insert(outlet, cell);
        cell
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
