//! Records when a node computed, sent and waited: the spans of a trace.
//!
//! Takes spans from the threads of a node; gives them as a [`Lane`]. Off until [`Recorder::start`], and
//! from [`Recorder::stop`] on: then every call is one load of a flag. On, the last [`MAX_SPANS`] are kept, in memory that is
//! taken as it is needed, and older ones counted as dropped. Times are nanoseconds since the
//! recorder was made, by the node's monotonic clock.
//!
//! Somebody on the network may have it record as well: one asker at a time, none while it records for
//! the process itself, and only until a time that he must put off again and again. What was recorded
//! for him then goes, and its memory with it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
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
    asker: Option<Asker>,
}

impl Kept {
    fn is_of(&self, id: Option<u64>) -> bool {
        self.asker.map(|asker| asker.id) == id
    }
}

/// Somebody on the network for whom is recorded.
#[derive(Clone, Copy, Debug)]
struct Asker {
    id: u64,
    ends: Instant,
}

/// Why nothing is recorded for an asker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Busy {
    #[error("another trace is being recorded")]
    Asker,
    #[error("it records its own trace")]
    Own,
}

/// Some of what was recorded, as it travels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Piece {
    /// Spans that follow each other.
    pub(crate) spans: Vec<Span>,
    /// The number of the first of them, counted from the first that was recorded.
    pub(crate) from: u64,
    /// The number of the next span to be recorded.
    pub(crate) end: u64,
    /// As a [`Lane`] has it; it tells recorders apart, too.
    pub(crate) unix_ns: u64,
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
    /// Records from now on; what was recorded for somebody on the network is forgotten.
    pub fn start(&self) {
        let mut kept = self.kept();
        if kept.asker.is_some() {
            *kept = Kept::default();
        }
        self.on.store(true, Ordering::Relaxed);
    }

    /// Records no more; what was recorded is kept.
    pub fn stop(&self) {
        let _kept = self.kept();
        self.on.store(false, Ordering::Relaxed);
    }

    /// Records from now on for an asker, until `ends`; what was recorded before is forgotten. It goes on
    /// where it records for him already.
    pub(crate) fn begin(&self, id: u64, now: Instant, ends: Instant) -> Result<(), Busy> {
        self.expire(now);
        if self.renew(id, ends) {
            return Ok(());
        }
        let mut kept = self.kept();
        if kept.asker.is_some() {
            return Err(Busy::Asker);
        }
        if self.is_on() {
            return Err(Busy::Own);
        }
        *kept = Kept { asker: Some(Asker { id, ends }), ..Kept::default() };
        self.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Puts off the end of an asker's recording; false where there is none of his.
    pub(crate) fn renew(&self, id: u64, ends: Instant) -> bool {
        let mut kept = self.kept();
        let asker = kept.asker.as_mut().filter(|asker| asker.id == id);
        asker.map(|asker| asker.ends = ends).is_some()
    }

    /// Records no more for an asker; what was recorded is kept for him until the end. False where there
    /// is none of his.
    pub(crate) fn halt(&self, id: u64) -> bool {
        let kept = self.kept();
        let is_his = kept.is_of(Some(id));
        if is_his {
            self.on.store(false, Ordering::Relaxed);
        }
        is_his
    }

    /// Records no more for an asker, and forgets what was recorded; false where there is none of his.
    pub(crate) fn forget(&self, id: u64) -> bool {
        self.clear(|asker| asker.id == id)
    }

    /// When the recording for an asker ends by itself, where there is one.
    pub(crate) fn ends_at(&self) -> Option<Instant> {
        self.kept().asker.map(|asker| asker.ends)
    }

    /// Ends the recording for an asker whose time is up, and forgets what was recorded.
    pub(crate) fn expire(&self, now: Instant) {
        self.clear(|asker| asker.ends <= now);
    }

    /// At most `most` spans from the one numbered `from` on, of what was recorded for an asker, or for the
    /// process itself; `None` where it was recorded for another.
    pub(crate) fn piece(&self, id: Option<u64>, from: u64, most: usize) -> Option<Piece> {
        let kept = self.kept();
        if !kept.is_of(id) {
            return None;
        }
        let end = kept.dropped + kept.spans.len() as u64;
        let from = from.clamp(kept.dropped, end);
        // At most as many as are kept.
        let skipped = (from - kept.dropped) as usize;
        let spans = kept.spans.range(skipped..).take(most).copied().collect();
        Some(Piece { spans, from, end, unix_ns: self.unix_ns })
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
        let kept = self.kept();
        let (spans, dropped) = (kept.spans.iter().copied().collect(), kept.dropped);
        Lane { rank, spans, dropped, unix_ns: self.unix_ns }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a recording for such an asker, and says whether there was one.
    fn clear(&self, which: impl FnOnce(&Asker) -> bool) -> bool {
        let mut kept = self.kept();
        let ends = kept.asker.as_ref().is_some_and(which);
        if ends {
            self.on.store(false, Ordering::Relaxed);
            *kept = Kept::default();
        }
        ends
    }

    fn keep(&self, span: Span) {
        let mut kept = self.kept();
        // It may have ended while this waited: what was forgotten stays so.
        if !self.is_on() {
            return;
        }
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

    /// Times in a recorder's life, in seconds.
    fn at(recorder: &Recorder, seconds: u64) -> Instant {
        recorder.epoch + Duration::from_secs(seconds)
    }

    #[test]
    fn one_asker_records_at_a_time_and_none_beside_the_process_itself() {
        let recorder = Recorder::default();
        let (now, ends) = (at(&recorder, 0), at(&recorder, 10));
        recorder.begin(1, now, ends).unwrap();
        recorder.instant(Kind::Arrived, 5, 0);
        assert_eq!(recorder.begin(2, now, ends), Err(Busy::Asker));
        assert!(!recorder.halt(2) && !recorder.forget(2) && recorder.is_on());
        // Who asks twice goes on.
        assert_eq!(recorder.begin(1, now, ends), Ok(()));
        assert!(recorder.halt(1) && !recorder.is_on());
        recorder.instant(Kind::Arrived, 6, 0);
        // What is kept for him is his until he has it.
        assert_eq!(recorder.begin(2, now, ends), Err(Busy::Asker));
        assert_eq!(recorder.piece(Some(2), 0, 9), None);
        assert_eq!(recorder.piece(None, 0, 9), None);
        let piece = recorder.piece(Some(1), 0, 9).unwrap();
        assert_eq!(piece.spans.iter().map(|span| span.id).collect::<Vec<_>>(), [5]);
        assert!(recorder.forget(1));
        assert_eq!(recorder.begin(2, now, ends), Ok(()));
        assert_eq!(recorder.piece(Some(2), 0, 9).unwrap().spans, []);
        // The process itself comes first.
        recorder.start();
        assert_eq!((recorder.begin(3, now, ends), recorder.ends_at()), (Err(Busy::Own), None));
        assert!(!recorder.halt(2) && recorder.is_on());
    }

    #[test]
    fn a_recording_ends_by_itself_unless_its_asker_is_heard_of() {
        let recorder = Recorder::default();
        recorder.begin(1, at(&recorder, 0), at(&recorder, 10)).unwrap();
        recorder.instant(Kind::Arrived, 5, 0);
        recorder.expire(at(&recorder, 9));
        assert!(recorder.renew(1, at(&recorder, 19)) && !recorder.renew(2, at(&recorder, 99)));
        recorder.expire(at(&recorder, 18));
        assert!(recorder.is_on());
        assert_eq!(recorder.ends_at(), Some(at(&recorder, 19)));
        recorder.expire(at(&recorder, 19));
        assert!(!recorder.is_on() && recorder.piece(Some(1), 0, 9).is_none());
        assert_eq!((recorder.lane(0).spans, recorder.ends_at()), (vec![], None));
        // Nor does one whose time is up keep another out before anybody has noticed.
        recorder.begin(1, at(&recorder, 20), at(&recorder, 30)).unwrap();
        assert_eq!(recorder.begin(2, at(&recorder, 30), at(&recorder, 40)), Ok(()));
    }

    #[test]
    fn pieces_make_up_what_was_recorded() {
        let recorder = Recorder::default();
        recorder.start();
        (0..MAX_SPANS as u32 + 2).for_each(|id| recorder.instant(Kind::Arrived, id, 7));
        let piece = recorder.piece(None, 0, 3).unwrap();
        let ids = |piece: &Piece| piece.spans.iter().map(|span| span.id).collect::<Vec<_>>();
        let end = MAX_SPANS as u64 + 2;
        assert_eq!((ids(&piece), piece.from, piece.end), (vec![2, 3, 4], 2, end));
        let next = recorder.piece(None, 5, 2).unwrap();
        assert_eq!((ids(&next), next.from, next.unix_ns), (vec![5, 6], 5, piece.unix_ns));
        let beyond = recorder.piece(None, u64::MAX, 2).unwrap();
        assert_eq!((beyond.spans.len(), beyond.from), (0, end));
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
