//! Lets a known number of requests run, a known number wait, and turns the rest away.
//!
//! [`Gate::enter`] gives a place or says that there is none, at once: so whoever is turned away
//! knows it before sending more. [`Place::turn`] waits until the request may run, first come first
//! served, until a deadline. Both are given back by dropping them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use tokio::sync::{Semaphore, SemaphorePermit};

/// Who may run, and who may wait.
#[derive(Debug)]
pub struct Gate {
    running: Semaphore,
    at_once: usize,
    inside: AtomicUsize,
    places: usize,
}

impl Gate {
    /// A gate for `running` requests at once and `queued` that wait.
    pub fn new(running: usize, queued: usize) -> Gate {
        let (at_once, places) = (running, running + queued);
        Gate { running: Semaphore::new(running), at_once, inside: AtomicUsize::new(0), places }
    }

    /// A place among those that run or wait; `None` when all are taken.
    pub fn enter(&self) -> Option<Place<'_>> {
        let enter = |inside| (inside < self.places).then_some(inside + 1);
        self.inside.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).ok()?;
        Some(Place(self))
    }

    /// Requests that run now.
    pub fn running(&self) -> usize {
        self.at_once - self.running.available_permits()
    }

    /// Requests that have a place and do not run.
    pub fn queued(&self) -> usize {
        self.inside.load(Ordering::Acquire).saturating_sub(self.running())
    }

    /// Places for requests, running or waiting.
    pub fn places(&self) -> usize {
        self.places
    }
}

/// One request's place.
#[derive(Debug)]
pub struct Place<'a>(&'a Gate);

impl Place<'_> {
    /// Waits until the request may run; `None` when the deadline comes first.
    pub async fn turn(&self, deadline: Instant) -> Option<SemaphorePermit<'_>> {
        let turn = self.0.running.acquire();
        tokio::time::timeout_at(deadline.into(), turn).await.ok()?.ok()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn some_run_some_wait_and_the_rest_is_turned_away() {
        let gate = Gate::new(1, 1);
        let first = gate.enter().unwrap();
        let second = gate.enter().unwrap();
        assert!(gate.enter().is_none());
        let soon = Instant::now() + Duration::from_millis(20);
        let late = Instant::now() + Duration::from_secs(60);
        let running = first.turn(late).await.unwrap();
        assert_eq!((gate.running(), gate.queued()), (1, 1));
        assert!(second.turn(soon).await.is_none());
        drop(running);
        assert!(second.turn(late).await.is_some());
        drop(first);
        assert!(gate.enter().is_some());
    }
}
