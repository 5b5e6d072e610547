//! Records when a node computed, sent and waited: the spans of a trace.
//!
//! Takes spans from the threads of a node; gives them as a [`Lane`]. Off until [`Recorder::start`], and
//! from [`Recorder::stop`] on: then every call is one load of a flag. On, the last [`MAX_SPANS`] are kept, in memory that is
//! taken as it is needed, and older ones counted as dropped. Times are nanoseconds since the
//! recorder was made, by the node's monotonic clock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Spans kept: a thousand requests through a network of sixty segments and transfers; 8 MiB of
/// memory, and as JSON well below the largest message between nodes.
pub const MAX_SPANS: usize = 1 << 18;

/// What a span tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
#[serde(into = "u8", try_from = "u8")]
pub enum Kind {
    /// A segment was computed; `id` is its number.
    Compute = 0,
    /// A tensor became a frame; `id` is its transfer. The frame leaves at the span's end.
    Encode = 1,
    /// A frame became a tensor; `id` is its transfer.
    Decode = 2,
    /// Every request at hand waited; `id` is the transfer that the oldest wanted.
    Wait = 3,
    /// A frame arrived, an instant; `id` is its transfer.
    Arrived = 4,
    /// A request was answered, on the node that takes requests.
    Request = 5,
}

impl From<Kind> for u8 {
    fn from(kind: Kind) -> u8 {
        kind as u8
    }
}

impl TryFrom<u8> for Kind {
    type Error = String;

    fn try_from(number: u8) -> Result<Kind, String> {
        Ok(match number {
            0 => Kind::Compute,
            1 => Kind::Encode,
            2 => Kind::Decode,
            3 => Kind::Wait,
            4 => Kind::Arrived,
            5 => Kind::Request,
            _ => return Err(format!("unknown kind of span {number}")),
        })
    }
}

/// One thing a node did, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Packed", try_from = "Packed")]
pub struct Span {
    /// What it did.
    pub kind: Kind,
    /// Which segment or transfer.
    pub id: u32,
    /// For which request.
    pub request: u64,
    /// When it began, in ns.
    pub start: u64,
    /// When it was over, in ns.
    pub end: u64,
}

/// A span as it travels: an array of numbers.
type Packed = (u8, u32, u64, u64, u64);

impl From<Span> for Packed {
    fn from(span: Span) -> Packed {
        (span.kind.into(), span.id, span.request, span.start, span.end)
    }
}

impl TryFrom<Packed> for Span {
    type Error = String;

    fn try_from((kind, id, request, start, end): Packed) -> Result<Span, String> {
        Ok(Span { kind: kind.try_into()?, id, request, start, end })
    }
}

/// Everything one node has recorded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    /// The node's rank.
    pub rank: usize,
    /// Its spans, in the order in which they ended.
    pub spans: Vec<Span>,
    /// Older spans that were not kept.
    pub dropped: u64,
    /// The node's time 0, in ns since 1970 by its own clock.
    pub unix_ns: u64,
}

/// Records the spans of one node.
#[derive(Debug)]
pub struct Recorder {
    on: AtomicBool,
    epoch: Instant,
    unix_ns: u64,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    spans: VecDeque<Span>,
    dropped: u64,
}

impl Default for Recorder {
    fn default() -> Recorder {
        // A clock before 1970 is one that nobody has set.
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Recorder {
            on: AtomicBool::new(false),
            epoch: Instant::now(),
            unix_ns: nanoseconds(unix),
            kept: Mutex::default(),
        }
    }
}

impl Recorder {
    /// Records from now on.
    pub fn start(&self) {
        self.on.store(true, Ordering::Relaxed);
    }

    /// Records no more; what was recorded is kept.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Relaxed);
    }

    /// Whether it records.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// The node's time now, in ns.
    pub fn now(&self) -> u64 {
        nanoseconds(self.epoch.elapsed())
    }

    /// Records something that began at `start` and is over now.
    pub fn span(&self, kind: Kind, id: u32, request: u64, start: Instant) {
        if self.is_on() {
            let start = nanoseconds(start.saturating_duration_since(self.epoch));
            self.keep(Span { kind, id, request, start, end: self.now() });
        }
    }

    /// Records something that took `lasted` and is over now.
    pub fn ended_span(&self, kind: Kind, id: u32, request: u64, lasted: Duration) {
        if self.is_on() {
            let end = self.now();
            let start = end.saturating_sub(nanoseconds(lasted));
            self.keep(Span { kind, id, request, start, end });
        }
    }

    /// Records something that takes no time.
    pub fn instant(&self, kind: Kind, id: u32, request: u64) {
        self.ended_span(kind, id, request, Duration::ZERO);
    }

    /// What was recorded, as the lane of the node `rank`.
    pub fn lane(&self, rank: usize) -> Lane {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let (spans, dropped) = (kept.spans.iter().copied().collect(), kept.dropped);
        Lane { rank, spans, dropped, unix_ns: self.unix_ns }
    }

    fn keep(&self, span: Span) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.spans.len() == MAX_SPANS {
            kept.spans.pop_front();
            kept.dropped += 1;
        }
        kept.spans.push_back(span);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_before_the_start_and_no_more_than_the_limit_after() {
        let recorder = Recorder::default();
        recorder.instant(Kind::Arrived, 0, 0);
        assert_eq!(recorder.lane(0).spans, []);
        recorder.start();
        (0..MAX_SPANS as u32 + 2).for_each(|id| recorder.instant(Kind::Arrived, id, 7));
        let lane = recorder.lane(3);
        assert_eq!((lane.rank, lane.spans.len(), lane.dropped), (3, MAX_SPANS, 2));
        assert_eq!(lane.spans[0].id, 2);
        assert!(lane.spans.windows(2).all(|pair| pair[0].end <= pair[1].end));
    }

    #[test]
    fn a_lane_travels_as_rows_of_numbers() {
        let span = Span { kind: Kind::Wait, id: 3, request: u64::MAX, start: 5, end: 9 };
        let lane = Lane { rank: 1, spans: vec![span], dropped: 0, unix_ns: 1 };
        let json = serde_json::to_string(&lane).unwrap();
        let expected =
            r#"{"rank":1,"spans":[[3,3,18446744073709551615,5,9]],"dropped":0,"unix_ns":1}"#;
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_str::<Lane>(&json).unwrap(), lane);
        assert!(serde_json::from_str::<Span>("[9,0,0,0,0]").is_err());
    }
}
