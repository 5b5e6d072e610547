//! An engine made slower: a small device, emulated on a large one.
//!
//! Takes any engine and a factor; gives an engine that sleeps in proportion to what each segment really
//! takes, so that four slow nodes fit on two fast cores and their ratio to the link is that of the
//! devices meant. What a segment really takes is its least time when the program runs again and again,
//! measured when it is loaded. The device meant has a core and its caches to itself; here nodes share
//! them, and a segment after a sleep finds its weights gone. In proportion, each such disturbance would
//! become one many times as long; against the least time, the sleep absorbs it. A sleep from which the thread
//! is woken late, because others had the cores, shortens the next one: a device's own core would have gone on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use snn_schemas::Codec;

use super::{Engine, EngineError, Executor, Job, Outgoing};
use crate::pause;
use crate::shard::{Program, Slot, Step};

/// Runs by which a segment's least time is found: at least, at most, and for how long otherwise.
const MIN_RUNS: usize = 5;
const MAX_RUNS: usize = 2000;
const MEASURE_FOR: Duration = Duration::from_millis(400);

/// How a slowed engine spends its time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Every segment takes this many times as long as it does here undisturbed, at least 1.
    Times(f64),
    /// Every segment takes at least this long.
    AtLeast(Duration),
}

/// An engine that takes longer.
#[derive(Debug)]
pub struct Slowed<E> {
    /// The engine that computes.
    pub engine: E,
    /// How long a segment takes.
    pub pace: Pace,
}

impl<E: Engine> Engine for Slowed<E> {
    fn load(&mut self, program: &Program) -> Result<Box<dyn Executor>, EngineError> {
        let mut inner = self.engine.load(program)?;
        let least = match self.pace {
            Pace::Times(_) => least_times(inner.as_mut(), program)?,
            Pace::AtLeast(_) => Vec::new(),
        };
        Ok(Box::new(SlowedExecutor { inner, pace: self.pace, least, late: Late::default() }))
    }
}

/// The least time of each segment, the program being run again and again with tensors of zeros.
fn least_times(
    executor: &mut dyn Executor,
    program: &Program,
) -> Result<Vec<Duration>, EngineError> {
    let mut least = vec![Duration::MAX; program.segments.len()];
    let zeros = |slot: &Slot| {
        let shape = program.slot(*slot).shape.iter().flatten();
        vec![0; shape.product::<usize>() * size_of::<f32>()]
    };
    let inputs: Vec<Vec<u8>> = program.inputs.iter().map(zeros).collect();
    let payloads: Vec<BytesMut> =
        program.receives().map(|crossing| silence(crossing.codec, &crossing.shape)).collect();
    let begun = Instant::now();
    let mut runs = 0;
    while runs < MAX_RUNS && (runs < MIN_RUNS || begun.elapsed() < MEASURE_FOR) {
        let job = executor.begin();
        let mut payloads = payloads.iter();
        for (&slot, input) in program.inputs.iter().zip(&inputs) {
            executor.write(job, slot, input)?;
        }
        for step in &program.steps {
            match step {
                Step::Compute(segment) => {
                    let start = Instant::now();
                    executor.compute(job, *segment)?;
                    least[*segment] = least[*segment].min(start.elapsed());
                }
                Step::Receive(crossing) => {
                    let payload = payloads.next().map_or(&[][..], |payload| payload);
                    executor.receive(job, crossing.slot, crossing.codec, payload)?;
                }
                Step::Send(_) => {}
            }
        }
        executor.end(job);
        runs += 1;
    }
    Ok(least)
}

/// What a tensor of zeros is on the wire.
fn silence(codec: Codec, shape: &[usize]) -> BytesMut {
    let elements: usize = shape.iter().product();
    let mut payload = BytesMut::new();
    match codec.largest() {
        Some(_) => codec.put_numbers(&vec![0.0; elements], Codec::run(shape), &mut payload),
        None => codec.put_elements(&vec![0; elements * codec.dtype.bits() / 8], &mut payload),
    }
    payload
}

struct SlowedExecutor {
    inner: Box<dyn Executor>,
    pace: Pace,
    /// The least time each segment has taken.
    least: Vec<Duration>,
    late: Late,
}

/// By how much the emulation is behind the device it emulates.
#[derive(Default)]
struct Late {
    /// How late the last segment ended, and when.
    ended: Option<(Duration, Instant)>,
    /// Time in the codec since then, which the device would have spent too.
    codec: Duration,
}

impl Late {
    /// What a segment that starts now is behind: nothing of it is left where the device has waited since.
    fn behind(&mut self, start: Instant) -> Duration {
        let Some((late, ended)) = self.ended.take() else { return Duration::ZERO };
        let idle = (start - ended).saturating_sub(std::mem::take(&mut self.codec));
        late.saturating_sub(idle)
    }
}

impl Executor for SlowedExecutor {
    fn begin(&mut self) -> Job {
        self.inner.begin()
    }

    fn end(&mut self, job: Job) {
        self.inner.end(job);
    }

    fn write(&mut self, job: Job, slot: Slot, elements: &[u8]) -> Result<(), EngineError> {
        self.inner.write(job, slot, elements)
    }

    fn receive(
        &mut self,
        job: Job,
        slot: Slot,
        codec: Codec,
        payload: &[u8],
    ) -> Result<(), EngineError> {
        let start = Instant::now();
        let done = self.inner.receive(job, slot, codec, payload);
        self.late.codec += start.elapsed();
        done
    }

    fn send(&mut self, job: Job, slot: Slot) -> Result<Arc<dyn Outgoing>, EngineError> {
        self.inner.send(job, slot)
    }

    fn compute(&mut self, job: Job, segment: usize) -> Result<(), EngineError> {
        let start = Instant::now();
        let behind = self.late.behind(start);
        self.inner.compute(job, segment)?;
        let took = start.elapsed();
        let whole = match self.pace {
            Pace::Times(factor) => {
                let least = &mut self.least[segment];
                *least = took.min(*least);
                least.mul_f64(factor.max(1.0))
            }
            Pace::AtLeast(least) => least,
        };
        let late = pause::until(start + whole.saturating_sub(behind));
        self.late.ended = Some((late, Instant::now()));
        Ok(())
    }

    fn read(&mut self, job: Job, slot: Slot, into: &mut BytesMut) -> Result<(), EngineError> {
        self.inner.read(job, slot, into)
    }

    fn shape(&self, job: Job, slot: Slot) -> Result<Vec<usize>, EngineError> {
        self.inner.shape(job, slot)
    }
}
