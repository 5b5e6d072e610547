//! What has happened to a node lately: peers that came and went, and what was done about it.
//!
//! Takes one sentence an event; gives the last [`MAX_EVENTS`] with their ages. Older ones are
//! forgotten: whoever needs them keeps the process's log.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

/// Events remembered: more than a page shows, and an hour of a link that fails every minute.
const MAX_EVENTS: usize = 64;

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// Seconds since it happened.
    pub age_s: f64,
    /// What happened.
    pub text: String,
}

/// The latest events of a node.
#[derive(Debug, Default)]
pub struct Log {
    events: Mutex<VecDeque<(Instant, String)>>,
}

impl Log {
    /// Notes that something has happened, now.
    pub fn note(&self, text: String) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back((Instant::now(), text));
    }

    /// The latest events, newest first.
    pub fn latest(&self) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let event = |(when, text): &(Instant, String)| Event {
            age_s: when.elapsed().as_secs_f64(),
            text: text.clone(),
        };
        events.iter().rev().map(event).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_come_first_and_the_oldest_are_forgotten() {
        let log = Log::default();
        (0..MAX_EVENTS + 3).for_each(|number| log.note(number.to_string()));
        let events = log.latest();
        assert_eq!(events.len(), MAX_EVENTS);
        assert_eq!(events[0].text, (MAX_EVENTS + 2).to_string());
        assert_eq!(events[MAX_EVENTS - 1].text, "3");
    }
}
