//! The default engine: tract, a plan a segment, with convolutions of this crate.
//!
//! Takes segments as ONNX models; gives plans that tract has optimised for their fixed shapes, after
//! [`crate::fuse`] has put the crate's convolutions in. [`TractEngine::stock`] leaves tract its own. A
//! tensor that stays on the node is passed from plan to plan without a copy, blocked if that is how
//! it is computed with, until its last reader has had it; what is read and written is planar. Memory goes
//! from request to request.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use bytes::BytesMut;
use prost::Message as _;
use rayon::ThreadPool;
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use snn_schemas::{Codec, Dtype};
use tract_linalg::multithread::Executor as Threads;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::TractErrorContext as _;
use tract_onnx::tract_core::plan::SimpleState;
use tract_onnx::tract_core::runtime::RunOptions;

use super::{Engine, EngineError, Executor, Job, Outgoing};
use crate::fuse::{self, Around, Edges, Fusion, Memory, Results, elements};
use crate::kernels::{Alone, Isa, Workers};
use crate::shard::{Program, Segment, Slot, SlotInfo, Step};

type State = SimpleState<TypedFact, Box<dyn TypedOp>>;

/// Computes with tract, on a number of threads.
#[derive(Clone)]
pub struct TractEngine {
    options: RunOptions,
    fusion: Option<Fusion>,
}

impl fmt::Debug for TractEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let isa = self.fusion.as_ref().map(|fusion| fusion.isa);
        f.debug_struct("TractEngine").field("isa", &isa).finish_non_exhaustive()
    }
}

impl TractEngine {
    /// An engine of `threads` threads; one computes on the caller's own.
    pub fn new(threads: usize) -> TractEngine {
        TractEngine::with_isa(threads, Isa::best())
    }

    /// An engine of `threads` threads whose convolutions use `isa`. Where the machine lacks it, loading
    /// a convolution is an error.
    pub fn with_isa(threads: usize, isa: Isa) -> TractEngine {
        let stock = TractEngine::stock(threads);
        let workers: Arc<dyn Workers + Send> = match &stock.options.executor {
            Some(Threads::MultiThread(pool)) => Arc::new(Pool(Arc::clone(pool))),
            _ => Arc::new(Alone),
        };
        let fusion = Some(Fusion { isa, workers, memory: Memory::default() });
        TractEngine { fusion, ..stock }
    }

    /// An engine of `threads` threads that leaves every op to tract.
    pub fn stock(threads: usize) -> TractEngine {
        let executor = match threads {
            0 | 1 => Threads::SingleThread,
            more => Threads::multithread_with_name(more, "snn-compute"),
        };
        let options = RunOptions { executor: Some(executor), ..RunOptions::default() };
        TractEngine { options, fusion: None }
    }

    /// The same with memory of its own: what it loads may then run on a thread of its own.
    fn with_own_memory(&self) -> TractEngine {
        let fusion = self.fusion.clone();
        let fusion = fusion.map(|fusion| Fusion { memory: Memory::default(), ..fusion });
        TractEngine { options: self.options.clone(), fusion }
    }

    /// A segment's plan, and which of its outputs are blocked.
    fn plan(&self, segment: &Segment, around: &Around<'_>) -> TractResult<(State, Edges)> {
        let bytes = segment.model.encode_to_vec();
        let framework =
            tract_onnx::onnx().with_ignore_output_types(true).with_ignore_output_shapes(true);
        let mut model = framework.model_for_read(&mut bytes.as_slice())?.into_typed()?;
        let mut outputs = vec![None; segment.outputs.len()];
        if let Some(fusion) = &self.fusion {
            fuse::hold(&mut model)?;
            model.declutter()?;
            (model, outputs) = fuse::fuse(&model, fusion, around)?;
        }
        let plan = model.into_optimized()?.into_runnable_with_options(&self.options)?;
        Ok((SimpleState::new(&plan)?, outputs))
    }
}

/// The threads of a pool.
struct Pool(Arc<ThreadPool>);

impl Workers for Pool {
    fn count(&self) -> usize {
        self.0.current_num_threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.0.install(|| (0..tasks).into_par_iter().for_each(task));
    }

    fn within(&self, whole: &mut (dyn FnMut() + Send)) {
        self.0.install(whole);
    }
}

/// Slots that only segments write and read: they may hold blocked tensors.
fn private(program: &Program) -> BTreeSet<Slot> {
    let mut made: BTreeSet<Slot> =
        program.segments.iter().flat_map(|segment| segment.outputs.iter().copied()).collect();
    for step in &program.steps {
        if let Step::Send(crossing) | Step::Receive(crossing) = step {
            made.remove(&crossing.slot);
        }
    }
    for slot in program.inputs.iter().chain(&program.outputs) {
        made.remove(slot);
    }
    made
}

impl Engine for TractEngine {
    fn load(&mut self, program: &Program) -> Result<Box<dyn Executor>, EngineError> {
        let mut segments = Vec::with_capacity(program.segments.len());
        let (engine, private) = (self.with_own_memory(), private(program));
        let ends = Ends::of(program);
        let mut blocked: BTreeMap<Slot, usize> = BTreeMap::new();
        for (index, segment) in program.segments.iter().enumerate() {
            // tract may panic on a model that makes no sense; that is one more unusable model.
            let edges: Edges =
                segment.inputs.iter().map(|slot| blocked.get(slot).copied()).collect();
            let free: Vec<bool> =
                segment.outputs.iter().map(|slot| private.contains(slot)).collect();
            let last = |slot: &Slot| ends.segments[index].contains(slot);
            let ending: Vec<bool> = segment.inputs.iter().map(last).collect();
            let around = Around { blocked: &edges, ending: &ending, free: &free };
            let guarded = std::panic::AssertUnwindSafe(|| engine.plan(segment, &around));
            let (state, edges) = std::panic::catch_unwind(guarded)
                .unwrap_or_else(|_| Err(TractError::msg("the model makes no sense")))
                .map_err(|error| EngineError::Load { segment: index, reason: one_line(&error) })?;
            for (&slot, channels) in segment.outputs.iter().zip(edges) {
                blocked.extend(channels.map(|channels| (slot, channels)));
            }
            let (inputs, outputs) = (segment.inputs.clone(), segment.outputs.clone());
            segments.push(Plan { state, inputs, outputs });
        }
        check_edges(program, &segments)?;
        let program = program.clone();
        let memory = engine.fusion.map(|fusion| fusion.memory).unwrap_or_default();
        let arriving = program.slots.iter().map(|info| arriving(info, &memory)).collect();
        let (jobs, free) = (vec![], vec![]);
        Ok(Box::new(TractExecutor { segments, program, ends, arriving, jobs, free }))
    }
}

/// Where memory for a slot's tensor comes from, if its type and shape are known.
fn arriving(info: &SlotInfo, memory: &Memory) -> Option<Results> {
    let datum = match info.dtype? {
        Dtype::F16 => f16::datum_type(),
        _ => f32::datum_type(),
    };
    Some(memory.results(datum, info.shape.as_ref()?))
}

/// After what a slot's tensor is of no use any more. The model's inputs and outputs are until the
/// request ends.
struct Ends {
    /// For each segment: what it is the last to read.
    segments: Vec<Vec<Slot>>,
    /// What is sent once, and then read by nobody.
    sends: BTreeSet<Slot>,
}

impl Ends {
    fn of(program: &Program) -> Ends {
        let edges = program.inputs.iter().chain(&program.outputs);
        let mut later: BTreeSet<Slot> = edges.copied().collect();
        let mut ends =
            Ends { segments: vec![vec![]; program.segments.len()], sends: BTreeSet::new() };
        for step in program.steps.iter().rev() {
            match step {
                Step::Compute(segment) => {
                    let inputs = program.segments[*segment].inputs.iter().copied();
                    ends.segments[*segment].extend(inputs.filter(|&slot| later.insert(slot)));
                }
                Step::Send(crossing) if later.insert(crossing.slot) => {
                    ends.sends.insert(crossing.slot);
                }
                // Sent more than once: it stays until the request ends.
                Step::Send(crossing) => {
                    ends.sends.remove(&crossing.slot);
                }
                Step::Receive(_) => {}
            }
        }
        ends
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
    ends: Ends,
    /// Memory for what is written to each slot.
    arriving: Vec<Option<Results>>,
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
        let dtype = self.program.slot(slot).dtype.unwrap_or_default();
        self.receive(job, slot, Codec::plain(dtype), elements)
    }

    fn receive(
        &mut self,
        job: Job,
        slot: Slot,
        codec: Codec,
        payload: &[u8],
    ) -> Result<(), EngineError> {
        let (Some(shape), Some(memory)) = (&self.program.slot(slot).shape, &self.arriving[slot.0])
        else {
            return Err(self.wrong(slot, "has no fixed shape"));
        };
        let failed = |error: TractError| self.wrong(slot, one_line(&error));
        let mut tensor = memory.take().map_err(failed)?;
        let filled = Arc::get_mut(&mut tensor).context("memory is held elsewhere");
        decode(codec, payload, shape, filled.map_err(failed)?)
            .map_err(|reason| self.wrong(slot, reason))?;
        let value = memory.give(tensor);
        self.jobs[job.0][slot.0] = Some(value);
        Ok(())
    }

    fn compute(&mut self, job: Job, segment: usize) -> Result<(), EngineError> {
        let plan = &self.segments[segment];
        let inputs = plan.inputs.iter().map(|&slot| self.value(job, slot).cloned());
        let inputs = inputs.collect::<Result<TVec<TValue>, EngineError>>()?;
        let failed = |error: TractError| EngineError::Compute { segment, reason: one_line(&error) };
        for slot in &self.ends.segments[segment] {
            self.jobs[job.0][slot.0] = None;
        }
        let plan = &mut self.segments[segment];
        let outputs = plan.state.run(inputs).map_err(failed)?;
        for (&slot, value) in plan.outputs.iter().zip(outputs) {
            self.jobs[job.0][slot.0] = Some(value);
        }
        Ok(())
    }

    fn read(&mut self, job: Job, slot: Slot, into: &mut BytesMut) -> Result<(), EngineError> {
        into.extend_from_slice(self.value(job, slot)?.as_bytes());
        Ok(())
    }

    fn send(&mut self, job: Job, slot: Slot) -> Result<Arc<dyn Outgoing>, EngineError> {
        let value = self.value(job, slot)?.clone();
        if self.ends.sends.contains(&slot) {
            self.jobs[job.0][slot.0] = None;
        }
        Ok(value.into_arc_tensor())
    }

    fn shape(&self, job: Job, slot: Slot) -> Result<Vec<usize>, EngineError> {
        Ok(self.value(job, slot)?.shape().to_vec())
    }
}

impl Outgoing for Tensor {
    fn put(&self, codec: Codec, into: &mut BytesMut) -> Result<(), String> {
        match codec.largest() {
            None => codec.put_elements(self.as_bytes(), into),
            Some(_) => codec.put_numbers(self.numbers()?, Codec::run(self.shape()), into),
        }
        Ok(())
    }

    fn numbers(&self) -> Result<&[f32], String> {
        elements(self).map_err(|error| one_line(&error))
    }
}

/// Reads a payload into the tensor it is of.
fn decode(
    codec: Codec,
    payload: &[u8],
    shape: &[usize],
    tensor: &mut Tensor,
) -> Result<(), String> {
    let done = match codec.largest() {
        None => codec.read_elements(payload, tensor.as_bytes_mut()),
        Some(_) => {
            let mut plain = tensor.try_as_plain_ram_mut().map_err(|error| one_line(&error))?;
            let numbers = plain.as_slice_mut::<f32>().map_err(|error| one_line(&error))?;
            codec.read_numbers(payload, Codec::run(shape), numbers)
        }
    };
    done.map_err(|error| error.to_string())
}

/// tract's error and its causes on one line.
fn one_line(error: &TractError) -> String {
    let causes =
        error.chain().map(|cause| cause.to_string().lines().next().unwrap_or("").to_owned());
    causes.collect::<Vec<_>>().join(": ")
}
