//! The compute thread of a node: it goes through the shard's program, a request at a time.
//!
//! Takes requests and tensors from the mailbox; gives tensors to the outbox and answers to those who
//! asked. While a request waits for a tensor others are computed, oldest first, a segment each turn. A
//! request that fails, is cancelled or is past its deadline gives its memory back.

use std::cell::RefCell;
use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use snn_schemas::Packing;
use snn_schemas::codec::Pixels;
use snn_schemas::wire::{Answer, Tensor, WireError};
use tokio::sync::oneshot;

use super::core::{Core, lock};
use super::error::InferError;
use super::outbox::{Departure, Features};
use super::report::milliseconds;
use crate::engine::{Engine, EngineError, Executor, Job};
use crate::mailbox::{Begin, End, MAX_REQUESTS, Next, Pending};
use crate::shard::{Crossing, Program, Slot, Step};
use crate::watch::Kind;

/// A request the compute thread works on.
struct Working {
    request: u64,
    deadline: Instant,
    job: Job,
    /// The step it is at.
    at: usize,
    /// When it came to the receive it is at.
    blocked: Instant,
}

/// The compute thread.
pub(super) struct Worker {
    core: Arc<Core>,
    program: Program,
    /// For each step that receives: its place among the report's receives.
    places: Vec<usize>,
    /// For each step that sends: what it asks for.
    departures: Vec<Option<Arc<Departure>>>,
    /// The numbers of a picture that arrives, from request to request in the same memory.
    picture: RefCell<Vec<f32>>,
}

impl Worker {
    pub(super) fn new(core: Arc<Core>, program: Program) -> Worker {
        let (mut places, mut departures) = (Vec::new(), Vec::new());
        let (mut receives, mut sends) = (0, 0);
        for step in &program.steps {
            places.push(receives);
            let departure = match step {
                Step::Send(crossing) => {
                    let is_picture = crossing.codec.packing == Packing::Pixels;
                    let pixels = program.pixels.clone().filter(|_| is_picture);
                    sends += 1;
                    Some(Departure { crossing: crossing.clone(), pixels, place: sends - 1 })
                }
                Step::Receive(_) | Step::Compute(_) => None,
            };
            receives += usize::from(matches!(step, Step::Receive(_)));
            departures.push(departure.map(Arc::new));
        }
        Worker { core, program, places, departures, picture: RefCell::default() }
    }

    pub(super) fn run<E: Engine>(
        self,
        engine: impl FnOnce() -> E,
        loaded: oneshot::Sender<Result<(), EngineError>>,
    ) {
        let mut executor = match engine().load(&self.program) {
            Ok(executor) => executor,
            Err(error) => {
                // The starter may have given up; then nobody needs to know.
                let _ = loaded.send(Err(error));
                return;
            }
        };
        let _ = loaded.send(Ok(()));
        let mut working: Vec<Working> = Vec::new();
        let mut pending: Vec<Pending> = Vec::new();
        loop {
            pending.clear();
            pending.extend(working.iter().map(|work| self.pending(work)));
            let (next, idle) = self.core.mailbox.next(&pending, MAX_REQUESTS);
            if !working.is_empty() {
                lock(&self.core.report).waiting_ms += milliseconds(idle);
                self.record_wait(&pending, idle);
            }
            match next {
                Next::Closed => return,
                Next::Begin(begin) => self.begin(executor.as_mut(), begin, &mut working),
                Next::Arrived(place, bytes) => {
                    let done = self.receive(executor.as_mut(), &mut working[place], &bytes);
                    self.settle(executor.as_mut(), &mut working, place, done);
                }
                Next::Missed(place) => {
                    let done = self.miss(executor.as_mut(), &mut working[place]);
                    self.settle(executor.as_mut(), &mut working, place, done);
                }
                Next::Run(place) => {
                    let done = self.advance(executor.as_mut(), &mut working[place]);
                    self.settle(executor.as_mut(), &mut working, place, done);
                }
                Next::Over(place, end) => {
                    let work = working.remove(place);
                    self.over(executor.as_mut(), work, end);
                }
            }
        }
    }

    fn pending(&self, work: &Working) -> Pending {
        match self.program.steps.get(work.at) {
            Some(Step::Receive(crossing)) => Pending {
                request: work.request,
                wants: Some(crossing.transfer),
                until: self.patience(crossing).map(|patience| work.blocked + patience),
            },
            _ => Pending { request: work.request, wants: None, until: None },
        }
    }

    /// How long a tensor is waited for before the request goes on without it; as long as the request
    /// may take where there is no such time. Nothing can be computed without the model's input, which
    /// is what travels beside the exchanges, except to the node with the head.
    fn patience(&self, crossing: &Crossing) -> Option<Duration> {
        let degrade = self.core.degrade.get()?;
        let is_input = crossing.step.is_none() && crossing.peer == self.core.identity.entry;
        let is_missing = || self.core.missing.borrow().contains(&crossing.peer);
        match () {
            () if is_input => None,
            () if is_missing() => Some(Duration::ZERO),
            () => Some(*degrade),
        }
    }

    /// Records that every request at hand waited, under what the oldest of them waited for.
    fn record_wait(&self, pending: &[Pending], idle: Duration) {
        if let Some(&Pending { request, wants: Some(transfer), .. }) = pending.first()
            && idle > Duration::ZERO
        {
            self.core.recorder.ended_span(Kind::Wait, transfer, request, idle);
        }
    }

    fn begin(&self, executor: &mut dyn Executor, begin: Begin, working: &mut Vec<Working>) {
        let Begin { request, deadline, inputs } = begin;
        let job = executor.begin();
        let work = Working { request, deadline, job, at: 0, blocked: Instant::now() };
        let filled = self.program.inputs.iter().zip(&inputs).try_for_each(|(&slot, input)| {
            executor.write(job, slot, bytemuck::cast_slice(input.data()))
        });
        working.push(work);
        let place = working.len() - 1;
        self.settle(executor, working, place, filled);
    }

    /// Takes the tensor that the step at hand receives.
    fn receive(
        &self,
        executor: &mut dyn Executor,
        work: &mut Working,
        elements: &[u8],
    ) -> Result<(), EngineError> {
        let Some(Step::Receive(crossing)) = self.program.steps.get(work.at) else { return Ok(()) };
        let waited = work.blocked.elapsed();
        let start = Instant::now();
        match self.pixels(crossing) {
            None => executor.receive(work.job, crossing.slot, crossing.codec, elements)?,
            Some(pixels) => {
                let mut numbers = self.picture.borrow_mut();
                numbers.resize(crossing.shape.iter().product(), 0.0);
                let read = pixels.read(elements, &crossing.shape, numbers.as_mut_slice());
                read.map_err(|error| self.wrong(crossing, &error))?;
                let numbers = bytemuck::cast_slice(numbers.as_slice());
                executor.write(work.job, crossing.slot, numbers)?;
            }
        }
        self.core.recorder.span(Kind::Decode, crossing.transfer, work.request, start);
        let mut report = lock(&self.core.report);
        report.codec_ms += milliseconds(start.elapsed());
        if let Some(receive) = report.receives.get_mut(self.places[work.at]) {
            receive.waited_ms += milliseconds(waited);
        }
        work.at += 1;
        Ok(())
    }

    /// Goes on without the tensor that the step at hand receives: it counts as zero.
    fn miss(&self, executor: &mut dyn Executor, work: &mut Working) -> Result<(), EngineError> {
        let Some(Step::Receive(crossing)) = self.program.steps.get(work.at) else { return Ok(()) };
        lock(&self.core.report).missed += 1;
        // Codes, scales and the form of an unpacked payload are all zero.
        let zeros = vec![0; crossing.bytes];
        self.receive(executor, work, &zeros)
    }

    /// One segment, and the sends around it: older requests get their turn in between.
    fn advance(&self, executor: &mut dyn Executor, work: &mut Working) -> Result<(), EngineError> {
        let mut computed = false;
        while let Some(step) = self.program.steps.get(work.at) {
            match step {
                Step::Receive(_) => break,
                Step::Compute(_) if computed => break,
                Step::Compute(segment) => {
                    let start = Instant::now();
                    executor.compute(work.job, *segment)?;
                    self.core.recorder.span(Kind::Compute, *segment as u32, work.request, start);
                    lock(&self.core.report).compute_ms += milliseconds(start.elapsed());
                    computed = true;
                }
                Step::Send(_) => {
                    if let Some(departure) = &self.departures[work.at] {
                        self.send(executor, work, departure)?;
                    }
                }
            }
            work.at += 1;
        }
        work.blocked = Instant::now();
        Ok(())
    }

    /// What pixels are worth, where a crossing is that of a picture.
    fn pixels(&self, crossing: &Crossing) -> Option<&Pixels> {
        let pixels = self.program.pixels.as_deref();
        pixels.filter(|_| crossing.codec.packing == Packing::Pixels)
    }

    fn wrong(&self, crossing: &Crossing, reason: &dyn Display) -> EngineError {
        let name = self.program.slot(crossing.slot).name.clone();
        EngineError::Tensor { name, reason: reason.to_string() }
    }

    fn send(
        &self,
        executor: &mut dyn Executor,
        work: &Working,
        departure: &Arc<Departure>,
    ) -> Result<(), EngineError> {
        self.core.outbox.send_features(Features {
            tensor: executor.send(work.job, departure.crossing.slot)?,
            departure: Arc::clone(departure),
            request: work.request,
            deadline: work.deadline,
            degraded: self.core.mailbox.is_degraded(work.request),
        });
        Ok(())
    }

    /// Ends a request that has failed or come to its end.
    fn settle(
        &self,
        executor: &mut dyn Executor,
        working: &mut Vec<Working>,
        place: usize,
        done: Result<(), EngineError>,
    ) {
        let at_end = working[place].at == self.program.steps.len();
        if done.is_ok() && !at_end {
            return;
        }
        let work = working.remove(place);
        let is_entry = self.core.identity.rank == self.core.identity.entry;
        let answer = done.and_then(|()| match is_entry {
            true => self.outputs(executor, work.job).map(Some),
            false => Ok(None),
        });
        executor.end(work.job);
        let degraded = self.core.mailbox.is_degraded(work.request);
        self.core.mailbox.done(work.request);
        match answer {
            Ok(answer) => {
                let mut report = lock(&self.core.report);
                report.requests += 1;
                report.degraded += u64::from(degraded && is_entry);
                drop(report);
                if let Some(outputs) = answer {
                    self.core.answer(work.request, Ok(Answer { outputs, degraded }));
                }
            }
            Err(error) => {
                lock(&self.core.report).failures += 1;
                self.core.fail(work.request, error.to_string());
            }
        }
    }

    fn outputs(&self, executor: &mut dyn Executor, job: Job) -> Result<Vec<Tensor>, EngineError> {
        let mut outputs = Vec::with_capacity(self.program.outputs.len());
        for &slot in &self.program.outputs {
            let data = numbers(executor, job, slot)?;
            let wrong = |error: WireError| EngineError::Tensor {
                name: self.program.slot(slot).name.clone(),
                reason: error.to_string(),
            };
            outputs.push(Tensor::new(executor.shape(job, slot)?, data).map_err(wrong)?);
        }
        Ok(outputs)
    }

    /// Gives up a request that others ended, or that is past its deadline.
    fn over(&self, executor: &mut dyn Executor, work: Working, end: End) {
        executor.end(work.job);
        self.core.mailbox.done(work.request);
        lock(&self.core.report).failures += 1;
        if end == End::Late {
            let waiting = match self.program.steps.get(work.at) {
                Some(Step::Receive(Crossing { transfer, peer, .. })) => {
                    format!(
                        "rank {} waited for t{transfer} of rank {peer}",
                        self.core.identity.rank
                    )
                }
                _ => String::new(),
            };
            self.core.answer(work.request, Err(InferError::Late { waiting }));
        }
    }
}

/// The numbers of a slot.
fn numbers(executor: &mut dyn Executor, job: Job, slot: Slot) -> Result<Vec<f32>, EngineError> {
    let mut bytes = BytesMut::new();
    executor.read(job, slot, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect())
}
