//! Memory for bodies: those that are read or held fit a budget, and whoever comes later waits.
//!
//! [`Budget::take`] gives [`Room`] for a body before any of it is read, first come first served, until
//! a deadline. So bodies that would not fit together are read one after another, and none of them waits
//! half read for the others to end. Room is given back by dropping it.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bodies of at most so many bytes take nothing of the budget, and wait for nobody: every place for
/// requests may have one, which is some MiB in all.
const SMALL: usize = 64 << 10;

/// Memory that bodies share.
#[derive(Debug)]
pub(super) struct Budget {
    free: Arc<Semaphore>,
    whole: u32,
}

impl Budget {
    /// A budget of so many bytes.
    pub(super) fn new(bytes: usize) -> Budget {
        let whole = kib(bytes);
        Budget { free: Arc::new(Semaphore::new(whole as usize)), whole }
    }

    /// Room for a body of at most so many bytes; `None` when the deadline comes first. One that is larger
    /// than the budget takes all of it.
    pub(super) async fn take(&self, bytes: usize, deadline: Instant) -> Option<Room> {
        if bytes <= SMALL {
            return Some(Room(None));
        }
        let wanted = kib(bytes).min(self.whole);
        let taken = Arc::clone(&self.free).acquire_many_owned(wanted);
        let taken = tokio::time::timeout_at(deadline.into(), taken).await.ok()?.ok()?;
        Some(Room(Some(taken)))
    }
}

/// Memory that is one request's.
#[derive(Debug)]
pub(super) struct Room(Option<OwnedSemaphorePermit>);

impl Room {
    /// Gives back what is more than so many bytes.
    pub(super) fn keep(&mut self, bytes: usize) {
        if let Some(taken) = &mut self.0 {
            let more = taken.num_permits().saturating_sub(kib(bytes) as usize);
            drop(taken.split(more));
        }
    }
}

/// What the budget is counted in: bytes would be more than a semaphore takes at once.
fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 10)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_does_not_fit_waits_until_others_give_back() {
        let budget = Budget::new(1 << 20);
        let soon = || Instant::now() + Duration::from_millis(20);
        let late = Instant::now() + Duration::from_secs(60);
        let mut first = budget.take(900 << 10, late).await.unwrap();
        assert!(budget.take(200 << 10, soon()).await.is_none());
        // What is small fits always.
        assert!(budget.take(SMALL, soon()).await.is_some());
        first.keep(800 << 10);
        let second = budget.take(200 << 10, late).await.unwrap();
        assert!(budget.take(100 << 10, soon()).await.is_none());
        drop((first, second));
        // More than there is takes all of it.
        let whole = budget.take(8 << 20, late).await.unwrap();
        assert!(budget.take(SMALL + 1, soon()).await.is_none());
        drop(whole);
        assert!(budget.take(SMALL + 1, late).await.is_some());
    }
}
