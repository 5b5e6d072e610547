//! Computations one after the other, as one op of tract's.
//!
//! [`Run::one`] makes an op of a computation; [`super::join`] makes one of several. What only the run
//! itself reads lies in plain memory that all runs share, so that it stays in the nearest cache. What
//! others read is a tensor of its own, or lies in the memory of an input that nobody reads any more.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;

use super::Fusion;
use super::facts::elements;
use super::memory::{Bench, Results, lock};
use super::ops::{Compute, Operand};
use crate::kernels::{Aligned, Planar, PlanarMut, Workers};

/// Where a step finds or leaves a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cell {
    /// An input of the run.
    Input(usize),
    /// Plain memory: its place on the bench.
    Bench(usize),
    /// A tensor that the run holds: its place among them.
    Held(usize),
    /// For an input of a step: the memory of its own result.
    Own,
}

/// One computation of a run.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub compute: Arc<dyn Compute>,
    pub inputs: TVec<Cell>,
    pub to: Cell,
}

/// A tensor that a run holds while it computes.
#[derive(Clone, Debug)]
pub(super) struct Holding {
    pub results: Results,
    /// The input whose memory it is.
    pub from: Option<usize>,
    /// Whether it is a result, rather than overwritten or of no use in the end.
    pub is_result: bool,
}

/// Computations, in order.
#[derive(Clone)]
pub(super) struct Run {
    pub steps: Vec<Step>,
    /// Results among them, in this order.
    pub held: Vec<Holding>,
    pub bench: Arc<Mutex<Bench>>,
    pub workers: Arc<dyn Workers + Send>,
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
        let mut inputs: TVec<Option<TValue>> = inputs.into_iter().map(Some).collect();
        let held = self.held.iter().map(|held| match held.from {
            Some(input) => held.results.claim(inputs[input].take().context("claimed twice")?),
            None => held.results.take(),
        });
        let held = held.map(|tensor| tensor.map(Some));
        let mut held = held.collect::<TractResult<TVec<Option<Arc<Tensor>>>>>()?;
        let inputs = inputs.iter().map(|input| match input {
            Some(input) => planar(input),
            None => Ok(Planar::F32(&[])),
        });
        let inputs = inputs.collect::<TractResult<_>>()?;
        let mut bench = lock(&self.bench);
        let (bench, mut done) = (&mut *bench.memory, Ok(()));
        self.workers.within(&mut || done = self.compute(&inputs, &mut held, bench));
        done?;
        let given = held.into_iter().flatten().zip(&self.held);
        let given = given.map(|(tensor, held)| (held.results.give(tensor), held.is_result));
        Ok(given.filter(|(_, is_result)| *is_result).map(|(value, _)| value).collect())
    }
}

impl TypedOp for Run {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let results = self.held.iter().filter(|held| held.is_result);
        Ok(results.map(|held| held.results.fact()).collect())
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
        let step = Step { compute: Arc::new(compute), inputs, to: Cell::Held(0) };
        Run {
            steps: vec![step],
            held: vec![Holding { results, from: None, is_result: true }],
            bench: fusion.memory.bench(),
            workers: Arc::clone(&fusion.workers),
        }
    }

    /// Names of its computations.
    #[cfg(test)]
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.steps.iter().map(|step| step.compute.name())
    }

    /// How many inputs' memory it writes to.
    #[cfg(test)]
    pub(super) fn claims(&self) -> usize {
        self.held.iter().filter(|held| held.from.is_some()).count()
    }

    fn compute(
        &self,
        inputs: &TVec<Planar<'_>>,
        held: &mut TVec<Option<Arc<Tensor>>>,
        bench: &mut [Aligned],
    ) -> TractResult<()> {
        for step in &self.steps {
            // What is written is taken out of its place, so that the others can be read meanwhile.
            let (mut memory, mut tensor) = (Aligned::default(), None);
            match step.to {
                Cell::Bench(at) => memory = std::mem::take(&mut bench[at]),
                Cell::Held(at) => tensor = held[at].take(),
                Cell::Input(_) | Cell::Own => bail!("a step that writes nowhere"),
            }
            let operand = |cell: &Cell| {
                Ok(Operand::Elements(match *cell {
                    Cell::Own => return Ok(Operand::Result),
                    Cell::Input(at) => inputs[at],
                    Cell::Bench(at) => Planar::F32(bench[at].as_slice()),
                    Cell::Held(at) => planar(held[at].as_ref().context("not yet there")?)?,
                }))
            };
            let operands = step.inputs.iter().map(operand);
            let operands = operands.collect::<TractResult<TVec<Operand<'_>>>>()?;
            match (&mut tensor, step.to) {
                (Some(tensor), Cell::Held(at)) => {
                    let tensor = Arc::get_mut(tensor).context("a result is held elsewhere")?;
                    let mut plain = tensor.try_as_plain_ram_mut()?;
                    let to = match self.held[at].results.datum == f16::datum_type() {
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
                Cell::Held(at) => held[at] = tensor,
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
