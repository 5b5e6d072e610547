//! What peers could make a node say without end: said the first time, and then now and again.
//!
//! Takes the moments at which there is something to say; gives whether it is said, and how often it was not
//! since the last time. Nothing is said at the end of a flood: what was left out is told with the next.

use std::time::{Duration, Instant};

/// Least time between two lines about the same: as many as people can read along.
const EVERY: Duration = Duration::from_secs(1);

/// One thing that is said seldom, about one peer say.
#[derive(Debug, Default)]
pub(crate) struct Seldom {
    said: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    /// Whether it is said at `now`: then how often it was left out since it was said last.
    pub(crate) fn say(&mut self, now: Instant) -> Option<u64> {
        if self.said.is_some_and(|said| now.saturating_duration_since(said) < EVERY) {
            self.left_out += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_and_then_one_a_second_with_the_number_left_out() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let moments = [0, 1, 500, 999, 1_000, 1_001, 5_000, 6_000];
        let said = moments.map(|ms| seldom.say(start + Duration::from_millis(ms)));
        assert_eq!(said, [Some(0), None, None, None, Some(3), None, Some(1), Some(0)]);
    }
}
