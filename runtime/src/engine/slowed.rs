//! An engine made slower: a small device, emulated on a large one.
//!
//! Takes any engine and a factor; gives an engine that sleeps in proportion to what each segment really
//! takes, so that four slow nodes fit on two fast cores and their ratio to the link is that of the
//! devices meant. What a segment really takes is the least time it has taken so far: the device meant
//! has its core to itself, and a disturbance here, which proportion would make a disturbance many times
//! as long, is absorbed by the sleep. So the first requests, with cold caches, are slower than the rest.

use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::{Engine, EngineError, Executor, Job};
use crate::pause;
use crate::shard::{Program, Slot};

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
        let inner = self.engine.load(program)?;
        let least = vec![Duration::MAX; program.segments.len()];
        Ok(Box::new(SlowedExecutor { inner, pace: self.pace, least }))
    }
}

struct SlowedExecutor {
    inner: Box<dyn Executor>,
    pace: Pace,
    /// The least time each segment has taken.
    least: Vec<Duration>,
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

    fn compute(&mut self, job: Job, segment: usize) -> Result<(), EngineError> {
        let start = Instant::now();
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
        pause::until(start + whole);
        Ok(())
    }

    fn read(&mut self, job: Job, slot: Slot, into: &mut BytesMut) -> Result<(), EngineError> {
        self.inner.read(job, slot, into)
    }

    fn shape(&self, job: Job, slot: Slot) -> Result<Vec<usize>, EngineError> {
        self.inner.shape(job, slot)
    }
}
