//! The default engine: tract, a plan a segment.
//!
//! Takes segments as ONNX models; gives plans that tract has optimised for their fixed shapes. A
//! tensor that stays on the node is passed from plan to plan without a copy.

use bytes::BytesMut;
use prost::Message as _;
use snn_schemas::Dtype;
use tract_linalg::multithread::Executor as Threads;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::plan::SimpleState;
use tract_onnx::tract_core::runtime::RunOptions;

use super::{Engine, EngineError, Executor, Job};
use crate::shard::{Program, Segment, Slot};

type State = SimpleState<TypedFact, Box<dyn TypedOp>>;

/// Computes with tract, on a number of threads.
#[derive(Clone, Debug)]
pub struct TractEngine {
    options: RunOptions,
}

impl TractEngine {
    /// An engine of `threads` threads; one computes on the caller's own.
    pub fn new(threads: usize) -> TractEngine {
        let executor = match threads {
            0 | 1 => Threads::SingleThread,
            more => Threads::multithread_with_name(more, "snn-compute"),
        };
        TractEngine { options: RunOptions { executor: Some(executor), ..RunOptions::default() } }
    }

    fn plan(&self, segment: &Segment) -> TractResult<State> {
        let bytes = segment.model.encode_to_vec();
        let framework =
            tract_onnx::onnx().with_ignore_output_types(true).with_ignore_output_shapes(true);
        let model = framework.model_for_read(&mut bytes.as_slice())?.into_optimized()?;
        let plan = model.into_runnable_with_options(&self.options)?;
        SimpleState::new(&plan)
    }
}

impl Engine for TractEngine {
    fn load(&mut self, program: &Program) -> Result<Box<dyn Executor>, EngineError> {
        let mut segments = Vec::with_capacity(program.segments.len());
        for (index, segment) in program.segments.iter().enumerate() {
            // tract may panic on a model that makes no sense; that is one more unusable model.
            let guarded = std::panic::AssertUnwindSafe(|| self.plan(segment));
            let state = std::panic::catch_unwind(guarded)
                .unwrap_or_else(|_| Err(TractError::msg("the model makes no sense")))
                .map_err(|error| EngineError::Load { segment: index, reason: one_line(&error) })?;
            let (inputs, outputs) = (segment.inputs.clone(), segment.outputs.clone());
            segments.push(Plan { state, inputs, outputs });
        }
        check_edges(program, &segments)?;
        Ok(Box::new(TractExecutor { segments, program: program.clone(), jobs: vec![], free: vec![] }))
    }
}

/// A loaded segment.
struct Plan {
    state: State,
    inputs: Vec<Slot>,
    outputs: Vec<Slot>,
}

impl Plan {
    fn fact_of(&self, slot: Slot) -> Option<TypedFact> {
        let model = self.state.model();
        let input = self.inputs.iter().position(|&input| input == slot);
        let output = self.outputs.iter().position(|&output| output == slot);
        match (input, output) {
            (Some(at), _) => model.input_fact(at).ok().cloned(),
            (None, Some(at)) => model.output_fact(at).ok().cloned(),
            (None, None) => None,
        }
    }
}

/// The model's inputs and outputs must be f32: they enter and leave as such.
fn check_edges(program: &Program, segments: &[Plan]) -> Result<(), EngineError> {
    let edges = program.inputs.iter().map(|slot| ("input", *slot));
    for (what, slot) in edges.chain(program.outputs.iter().map(|slot| ("output", *slot))) {
        let Some(fact) = segments.iter().find_map(|plan| plan.fact_of(slot)) else { continue };
        if fact.datum_type != f32::datum_type() || fact.shape.as_concrete().is_none() {
            let name = program.slot(slot).name.clone();
            return Err(EngineError::Edge { what, name, found: format!("{fact:?}") });
        }
    }
    Ok(())
}

struct TractExecutor {
    segments: Vec<Plan>,
    program: Program,
    jobs: Vec<Vec<Option<TValue>>>,
    free: Vec<usize>,
}

impl TractExecutor {
    fn wrong(&self, slot: Slot, reason: impl ToString) -> EngineError {
        let name = self.program.slot(slot).name.clone();
        EngineError::Tensor { name, reason: reason.to_string() }
    }

    fn value(&self, job: Job, slot: Slot) -> Result<&TValue, EngineError> {
        self.jobs[job.0][slot.0].as_ref().ok_or_else(|| self.wrong(slot, "is not there yet"))
    }
}

impl Executor for TractExecutor {
    fn begin(&mut self) -> Job {
        let job = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(vec![None; self.program.slots.len()]);
            self.jobs.len() - 1
        });
        Job(job)
    }

    fn end(&mut self, job: Job) {
        self.jobs[job.0].fill(None);
        self.free.push(job.0);
    }

    fn write(&mut self, job: Job, slot: Slot, elements: &[u8]) -> Result<(), EngineError> {
        let info = self.program.slot(slot);
        let (Some(shape), Some(dtype)) = (&info.shape, info.dtype) else {
            return Err(self.wrong(slot, "has no fixed shape"));
        };
        let datum = match dtype {
            Dtype::F32 => f32::datum_type(),
            Dtype::F16 => f16::datum_type(),
        };
        let mut tensor = Tensor::zero_dt(datum, shape).map_err(|error| self.wrong(slot, error))?;
        let bytes = tensor.as_bytes_mut();
        if bytes.len() != elements.len() {
            let reason = format!("{} bytes, expected {}", elements.len(), bytes.len());
            return Err(self.wrong(slot, reason));
        }
        bytes.copy_from_slice(elements);
        self.jobs[job.0][slot.0] = Some(tensor.into_tvalue());
        Ok(())
    }

    fn compute(&mut self, job: Job, segment: usize) -> Result<(), EngineError> {
        let plan = &self.segments[segment];
        let inputs = plan.inputs.iter().map(|&slot| self.value(job, slot).cloned());
        let inputs = inputs.collect::<Result<TVec<TValue>, EngineError>>()?;
        let failed = |error: TractError| EngineError::Compute { segment, reason: one_line(&error) };
        let plan = &mut self.segments[segment];
        let outputs = plan.state.run(inputs).map_err(failed)?;
        for (&slot, value) in plan.outputs.iter().zip(outputs) {
            self.jobs[job.0][slot.0] = Some(value);
        }
        Ok(())
    }

    fn read(&mut self, job: Job, slot: Slot, into: &mut BytesMut) -> Result<(), EngineError> {
        let value = self.value(job, slot)?;
        into.extend_from_slice(value.as_bytes());
        Ok(())
    }

    fn shape(&self, job: Job, slot: Slot) -> Result<Vec<usize>, EngineError> {
        Ok(self.value(job, slot)?.shape().to_vec())
    }
}

/// tract's error and its causes on one line.
fn one_line(error: &TractError) -> String {
    let causes = error.chain().map(|cause| cause.to_string().lines().next().unwrap_or("").to_owned());
    causes.collect::<Vec<_>>().join(": ")
}
