//! Where tensors from peers wait for the step that adds them: the rendezvous of a node.
//!
//! The contract:
//!
//! - **Who puts.** The transport's threads [`post`](Mailbox::post) tensor frames, those who ask
//!   [`open`](Mailbox::open) requests, anybody may [`cancel`](Mailbox::cancel) one. None of these waits.
//!   A frame is taken only if this node's shard receives its transfer, from that rank and with that
//!   size; the first frame of a request opens it, with the deadline the frame carries, except on the
//!   node where requests begin.
//! - **Who takes.** The node's compute thread alone, by [`next`](Mailbox::next): it tells what each
//!   request it works on wants next, and gets the oldest request that can go on.
//! - **Until when.** `next` waits until there is something to do: a tensor that is wanted, a new
//!   request, the end of one (cancelled, or past its deadline), or the mailbox's own end.
//! - **What is gone without.** A tensor is waited for until the time its taker gives, if it gives one;
//!   the request counts as degraded from then on, as it does once a frame says so.
//! - **What is bounded.** At most [`MAX_REQUESTS`] requests are open; of each, every transfer is
//!   kept once. So memory is bounded by the shard's own receives, whatever peers send.
//! - **Who gives way.** Where a frame would open one more, the oldest request of which least has come
//!   gives way to it: requests that a peer has made up never keep out those that are real.
//! - **What is forgotten.** A request that has ended stays ended: late frames of the last
//!   [`REMEMBERED`] requests open nothing.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_schemas::Codec;
use snn_schemas::codec::CodecError;
use snn_schemas::wire::{Tensor, TensorFrame};

use crate::shard::Program;

/// Requests open at once: bounds what peers can make a node remember.
pub const MAX_REQUESTS: usize = 64;
/// Ended requests remembered, so that their late frames do not open them again: more than can be
/// open anywhere at once.
const REMEMBERED: usize = 16 * MAX_REQUESTS;
/// Longest deadline a frame may carry: memory is not held for ever.
pub const MAX_WITHIN: Duration = Duration::from_secs(600);

/// What one request wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The request.
    pub request: u64,
    /// The transfer it waits for; none if it can be computed right away.
    pub wants: Option<u32>,
    /// Until when it waits for that; until the request's end where there is none.
    pub until: Option<Instant>,
}

/// What the compute thread does next.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Goes on with the request at this place of its list, which waits for nothing.
    Run(usize),
    /// Takes the tensor that the request at this place has waited for.
    Arrived(usize, Bytes),
    /// Goes on without the tensor that the request at this place has waited for long enough.
    Missed(usize),
    /// Begins a request; on the entry node with its inputs.
    Begin(Begin),
    /// Gives up the request at this place.
    Over(usize, End),
    /// Ends.
    Closed,
}

/// A request to begin.
#[derive(Debug, PartialEq)]
pub struct Begin {
    /// Its number.
    pub request: u64,
    /// When it ends.
    pub deadline: Instant,
    /// The model's inputs, on the entry node.
    pub inputs: Vec<Tensor>,
}

/// Why a request ended before its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Somebody cancelled it, with a reason.
    Cancelled(String),
    /// Its deadline passed.
    Late,
}

/// The rendezvous of one node.
#[derive(Debug)]
pub struct Mailbox {
    expected: HashMap<u32, Expected>,
    /// Whether requests begin here, and no frame opens one.
    is_entry: bool,
    state: Mutex<State>,
    changed: Condvar,
}

/// What a transfer must look like.
#[derive(Debug)]
struct Expected {
    from: usize,
    codec: Codec,
    shape: Vec<usize>,
    bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<u64, Open>,
    /// Requests the compute thread has not begun, oldest first.
    fresh: BTreeMap<u64, u64>,
    opened: u64,
    ended: VecDeque<u64>,
    closed: bool,
}

#[derive(Debug)]
struct Open {
    /// How many were opened before.
    age: u64,
    deadline: Instant,
    inputs: Vec<Tensor>,
    arrived: HashMap<u32, Bytes>,
    /// Frames that have come of it.
    frames: usize,
    degraded: bool,
    end: Option<String>,
}

impl Mailbox {
    /// An empty mailbox for the receives of `program`.
    pub fn new(program: &Program) -> Mailbox {
        let expected = program.receives().map(|crossing| {
            let crate::shard::Crossing { transfer, peer, codec, shape, bytes, .. } = crossing;
            let (from, codec, shape, bytes) = (*peer, *codec, shape.clone(), *bytes);
            (*transfer, Expected { from, codec, shape, bytes })
        });
        Mailbox {
            expected: expected.collect(),
            is_entry: !program.inputs.is_empty(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done where a thread could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a request with the model's inputs, on the entry node.
    ///
    /// # Errors
    /// [`Refused::Full`] when [`MAX_REQUESTS`] are open, [`Refused::Closed`] at the end.
    pub fn open(
        &self,
        request: u64,
        deadline: Instant,
        inputs: Vec<Tensor>,
    ) -> Result<(), Refused> {
        self.state().open(request, deadline, inputs)?;
        self.changed.notify_one();
        Ok(())
    }

    /// Takes a tensor from a peer.
    ///
    /// # Errors
    /// Why the frame was dropped; the request it names is unharmed.
    pub fn post(&self, frame: TensorFrame) -> Result<(), Refused> {
        let TensorFrame { dtype, from, request, transfer, within, degraded, payload } = frame;
        let expected = self.expected.get(&transfer).ok_or(Refused::UnknownTransfer { transfer })?;
        if usize::from(from) != expected.from {
            return Err(Refused::Sender { transfer, from, expected: expected.from });
        }
        let (codec, found) = (expected.codec, payload.len());
        let fits = found == expected.bytes || !codec.is_exact() && found < expected.bytes;
        if !fits || dtype != codec.dtype {
            return Err(Refused::Size { transfer, found, expected: expected.bytes });
        }
        let wrong = |reason| Refused::Payload { transfer, reason };
        codec.check(&payload, &expected.shape).map_err(wrong)?;
        let mut state = self.state();
        if state.ended.contains(&request) {
            return Ok(());
        }
        if !state.open.contains_key(&request) {
            if self.is_entry {
                return Err(Refused::UnknownRequest);
            }
            let deadline = Instant::now() + within.min(MAX_WITHIN);
            state.make_way();
            state.open(request, deadline, vec![])?;
        }
        if let Some(open) = state.open.get_mut(&request) {
            // A second copy of a tensor is the same tensor.
            if let Entry::Vacant(place) = open.arrived.entry(transfer) {
                place.insert(payload);
                open.frames += 1;
            }
            open.degraded |= degraded;
        }
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Ends a request before its answer; an unknown one stays unknown.
    pub fn cancel(&self, request: u64, reason: &str) {
        let mut state = self.state();
        if state.fresh_of(request) {
            state.forget(request);
        } else if let Some(open) = state.open.get_mut(&request) {
            open.end.get_or_insert_with(|| reason.to_owned());
        } else {
            state.remember(request);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Ends every request, and gives their numbers.
    pub fn cancel_all(&self, reason: &str) -> Vec<u64> {
        let requests: Vec<u64> = self.state().open.keys().copied().collect();
        requests.iter().for_each(|&request| self.cancel(request, reason));
        requests
    }

    /// Forgets a request that the compute thread is done with.
    pub fn done(&self, request: u64) {
        self.state().forget(request);
    }

    /// Ends the mailbox: nothing is taken any more, and `next` gives [`Next::Closed`].
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Whether a request has gone on without a tensor, here or before what has arrived.
    pub fn is_degraded(&self, request: u64) -> bool {
        self.state().open.get(&request).is_some_and(|open| open.degraded)
    }

    /// Requests that are open.
    pub fn open_requests(&self) -> usize {
        self.state().open.len()
    }

    /// What to do next. `jobs` are the requests the compute thread works on, oldest first, at most
    /// `room` of them. The second value is how long there was nothing to do.
    pub fn next(&self, jobs: &[Pending], room: usize) -> (Next, Duration) {
        let mut state = self.state();
        let mut idle_since = None;
        loop {
            let now = Instant::now();
            if let Some(next) = state.look(jobs, room, now) {
                let waited = idle_since.map_or(Duration::ZERO, |since| now - since);
                return (next, waited);
            }
            idle_since.get_or_insert(now);
            let deadlines = state.open.values().map(|open| open.deadline);
            let deadlines = deadlines.chain(jobs.iter().filter_map(|job| job.until));
            state = match deadlines.min() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl State {
    fn open(
        &mut self,
        request: u64,
        deadline: Instant,
        inputs: Vec<Tensor>,
    ) -> Result<(), Refused> {
        if self.closed {
            return Err(Refused::Closed);
        }
        if self.open.len() >= MAX_REQUESTS {
            return Err(Refused::Full);
        }
        let age = self.opened;
        self.opened += 1;
        let (arrived, frames, degraded, end) = (HashMap::new(), 0, false, None);
        self.open.insert(request, Open { age, deadline, inputs, arrived, frames, degraded, end });
        self.fresh.insert(age, request);
        Ok(())
    }

    /// Ends the oldest request of which least has come, where there is no room for another. The compute
    /// thread finds it unknown.
    fn make_way(&mut self) {
        if self.open.len() < MAX_REQUESTS {
            return;
        }
        let least = self.open.iter().min_by_key(|(_, open)| (open.frames, open.age));
        if let Some((&request, _)) = least {
            self.forget(request);
        }
    }

    fn fresh_of(&self, request: u64) -> bool {
        self.open.get(&request).is_some_and(|open| self.fresh.contains_key(&open.age))
    }

    fn forget(&mut self, request: u64) {
        if let Some(open) = self.open.remove(&request) {
            self.fresh.remove(&open.age);
        }
        self.remember(request);
    }

    fn remember(&mut self, request: u64) {
        if self.ended.len() >= REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(request);
    }

    /// What can be done now.
    fn look(&mut self, jobs: &[Pending], room: usize, now: Instant) -> Option<Next> {
        if self.closed {
            return Some(Next::Closed);
        }
        for (place, job) in jobs.iter().enumerate() {
            let Some(open) = self.open.get_mut(&job.request) else {
                return Some(Next::Over(place, End::Cancelled("the request is unknown".into())));
            };
            if let Some(reason) = open.end.take() {
                return Some(Next::Over(place, End::Cancelled(reason)));
            }
            if now >= open.deadline {
                return Some(Next::Over(place, End::Late));
            }
            match job.wants {
                None => return Some(Next::Run(place)),
                Some(transfer) => {
                    if let Some(bytes) = open.arrived.remove(&transfer) {
                        return Some(Next::Arrived(place, bytes));
                    }
                    if job.until.is_some_and(|until| now >= until) {
                        open.degraded = true;
                        return Some(Next::Missed(place));
                    }
                }
            }
        }
        self.begin(room.saturating_sub(jobs.len()), now)
    }

    fn begin(&mut self, room: usize, now: Instant) -> Option<Next> {
        if room == 0 {
            return None;
        }
        // Requests that ended before they began need nobody's attention.
        loop {
            let (_, request) = self.fresh.pop_first()?;
            match self.open.get_mut(&request) {
                Some(open) if now < open.deadline => {
                    let (deadline, inputs) = (open.deadline, std::mem::take(&mut open.inputs));
                    return Some(Next::Begin(Begin { request, deadline, inputs }));
                }
                _ => self.forget(request),
            }
        }
    }
}

/// Why a mailbox does not take something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// This node receives no such transfer.
    #[error("unknown transfer t{transfer}")]
    UnknownTransfer {
        /// The transfer.
        transfer: u32,
    },
    /// Another rank sends this transfer.
    #[error("transfer t{transfer} comes from rank {from}, expected rank {expected}")]
    Sender {
        /// The transfer.
        transfer: u32,
        /// Rank in the frame.
        from: u16,
        /// Rank in the shard.
        expected: usize,
    },
    /// The transfer has another size or element type.
    #[error("transfer t{transfer} has {found} bytes, expected {expected}")]
    Size {
        /// The transfer.
        transfer: u32,
        /// Bytes in the frame.
        found: usize,
        /// Bytes in the shard.
        expected: usize,
    },
    /// A request that begins at this node, but has not.
    #[error("unknown request")]
    UnknownRequest,
    /// The transfer's payload is not what its codec writes.
    #[error("transfer t{transfer}: {reason}")]
    Payload {
        /// The transfer.
        transfer: u32,
        /// What is wrong with it.
        reason: CodecError,
    },
    /// Too many requests at once.
    #[error("{MAX_REQUESTS} requests are open already")]
    Full,
    /// The node is ending.
    #[error("the node is stopping")]
    Closed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use snn_schemas::{Dtype, Packing};

    use crate::shard::{Crossing, Slot, Step};

    fn mailbox() -> Mailbox {
        Mailbox::new(&program())
    }

    fn program() -> Program {
        let receive = |transfer| {
            let (codec, shape, slot) = (Codec::plain(Dtype::F32), vec![1], Slot(0));
            Step::Receive(Crossing { transfer, peer: 1, step: None, codec, shape, bytes: 4, slot })
        };
        let steps = vec![receive(3), receive(5)];
        Program { steps, ..Program::default() }
    }

    #[test]
    fn a_packed_frame_may_be_shorter_but_must_make_sense() {
        let codec = Codec { dtype: Dtype::I8, signed: false, packing: Packing::Zeros };
        let (shape, bytes, slot) = (vec![1, 16], codec.bytes(&[1, 16]).unwrap(), Slot(0));
        let receive = Crossing { transfer: 3, peer: 1, step: None, codec, shape, bytes, slot };
        let steps = vec![Step::Receive(receive)];
        let mailbox = Mailbox::new(&Program { steps, ..Program::default() });
        let post = |payload: &'static [u8]| {
            let payload = Bytes::from_static(payload);
            mailbox.post(TensorFrame { dtype: Dtype::I8, payload, ..frame(1, 3) })
        };
        let wrong = post(&[0, 0, 128, 63, 1, 3, 0, 7]).unwrap_err();
        assert_eq!(wrong.to_string(), "transfer t3: 1 bytes are not 2 elements");
        assert!(post(&[0; 30]).unwrap_err().to_string().ends_with("30 bytes, expected 21"));
        assert_eq!(mailbox.open_requests(), 0);
        post(&[0, 0, 128, 63, 1, 3, 0, 7, 9]).unwrap();
        assert_eq!(mailbox.open_requests(), 1);
    }

    fn frame(request: u64, transfer: u32) -> TensorFrame {
        let payload = Bytes::from_static(&[1, 2, 3, 4]);
        let within = Duration::from_secs(60);
        TensorFrame {
            dtype: Dtype::F32,
            from: 1,
            request,
            transfer,
            within,
            degraded: false,
            payload,
        }
    }

    fn next(mailbox: &Mailbox, jobs: &[(u64, Option<u32>)]) -> Next {
        let jobs: Vec<Pending> =
            jobs.iter().map(|&(request, wants)| Pending { request, wants, until: None }).collect();
        mailbox.next(&jobs, MAX_REQUESTS).0
    }

    #[test]
    fn a_frame_opens_its_request_and_waits_to_be_wanted() {
        let mailbox = mailbox();
        mailbox.post(frame(9, 5)).unwrap();
        assert!(matches!(next(&mailbox, &[]), Next::Begin(begin) if begin.request == 9));
        assert_eq!(next(&mailbox, &[(9, None)]), Next::Run(0));
        mailbox.post(frame(9, 3)).unwrap();
        let Next::Arrived(0, bytes) = next(&mailbox, &[(9, Some(5))]) else { panic!("not there") };
        assert_eq!(bytes[..], [1, 2, 3, 4]);
    }

    #[test]
    fn the_oldest_that_can_go_on_comes_first() {
        let mailbox = mailbox();
        for request in [30, 10, 20] {
            mailbox.post(frame(request, 5)).unwrap();
        }
        for expected in [30, 10, 20] {
            assert!(matches!(next(&mailbox, &[]), Next::Begin(b) if b.request == expected));
        }
        mailbox.post(frame(20, 3)).unwrap();
        let jobs = [(30, Some(3)), (10, Some(3)), (20, Some(3))];
        assert!(matches!(next(&mailbox, &jobs), Next::Arrived(2, _)));
        mailbox.post(frame(10, 3)).unwrap();
        assert!(matches!(
            next(&mailbox, &[(30, Some(3)), (10, Some(3)), (20, None)]),
            Next::Arrived(1, _)
        ));
    }

    #[test]
    fn frames_nobody_expects_are_refused_with_a_reason() {
        let mailbox = mailbox();
        let refused = |frame| mailbox.post(frame).unwrap_err().to_string();
        assert_eq!(refused(frame(1, 4)), "unknown transfer t4");
        let other = TensorFrame { from: 2, ..frame(1, 3) };
        assert_eq!(refused(other), "transfer t3 comes from rank 2, expected rank 1");
        let short = TensorFrame { payload: Bytes::new(), ..frame(1, 3) };
        assert_eq!(refused(short), "transfer t3 has 0 bytes, expected 4");
        assert_eq!(mailbox.open_requests(), 0);
    }

    #[test]
    fn requests_are_bounded_and_what_is_made_up_gives_way() {
        let mailbox = mailbox();
        for request in 0..MAX_REQUESTS as u64 {
            mailbox.post(frame(request, 3)).unwrap();
        }
        // Of request 0 more has come than of the others; a second copy is nothing more.
        mailbox.post(frame(0, 5)).unwrap();
        mailbox.post(frame(1, 3)).unwrap();
        mailbox.post(frame(1000, 3)).unwrap();
        assert_eq!(mailbox.open_requests(), MAX_REQUESTS);
        assert!(matches!(next(&mailbox, &[]), Next::Begin(begin) if begin.request == 0));
        assert!(matches!(next(&mailbox, &[(1, Some(5))]), Next::Over(0, End::Cancelled(_))));
        // It stays ended, and the new one is there.
        mailbox.post(frame(1, 5)).unwrap();
        mailbox.post(frame(1000, 5)).unwrap();
        assert_eq!(mailbox.open_requests(), MAX_REQUESTS);
        // Where requests begin nothing gives way: whoever asks is told.
        let entry = Mailbox::new(&Program { inputs: vec![Slot(0)], ..program() });
        let open = |request| entry.open(request, Instant::now() + MAX_WITHIN, vec![]);
        (0..MAX_REQUESTS as u64).for_each(|request| open(request).unwrap());
        assert_eq!(open(1000), Err(Refused::Full));
    }

    #[test]
    fn no_frame_opens_a_request_where_requests_begin() {
        let entry = Program { inputs: vec![Slot(0)], ..program() };
        let mailbox = Mailbox::new(&entry);
        assert_eq!(mailbox.post(frame(1, 3)), Err(Refused::UnknownRequest));
        mailbox.open(1, Instant::now() + Duration::from_secs(60), vec![]).unwrap();
        mailbox.post(frame(1, 3)).unwrap();
    }

    #[test]
    fn what_has_ended_stays_ended() {
        let mailbox = mailbox();
        mailbox.post(frame(1, 3)).unwrap();
        mailbox.done(1);
        mailbox.cancel(2, "no");
        for request in [1, 2] {
            mailbox.post(frame(request, 5)).unwrap();
        }
        assert_eq!(mailbox.open_requests(), 0);
    }

    #[test]
    fn what_is_waited_for_long_enough_is_gone_without() {
        let mailbox = mailbox();
        mailbox.post(frame(1, 3)).unwrap();
        assert!(matches!(next(&mailbox, &[]), Next::Begin(_)));
        let until = Some(Instant::now() + Duration::from_millis(20));
        let job = |wants| [Pending { request: 1, wants: Some(wants), until }];
        // What is there is taken, however late.
        assert!(matches!(mailbox.next(&job(3), MAX_REQUESTS).0, Next::Arrived(0, _)));
        assert!(!mailbox.is_degraded(1));
        assert_eq!(mailbox.next(&job(5), MAX_REQUESTS).0, Next::Missed(0));
        assert!(Some(Instant::now()) >= until && mailbox.is_degraded(1));
        // Others hear of it by what is sent to them.
        mailbox.post(TensorFrame { degraded: true, ..frame(2, 3) }).unwrap();
        assert!(mailbox.is_degraded(2));
    }

    #[test]
    fn the_end_of_a_request_wakes_whoever_waits_for_it() {
        let mailbox = mailbox();
        mailbox.post(frame(1, 3)).unwrap();
        assert!(matches!(next(&mailbox, &[]), Next::Begin(_)));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| next(&mailbox, &[(1, Some(5))]));
            mailbox.cancel(1, "rank 2 is gone");
            let expected = Next::Over(0, End::Cancelled("rank 2 is gone".to_owned()));
            assert_eq!(waiting.join().unwrap(), expected);
        });
        mailbox.done(1);
        let soon = TensorFrame { within: Duration::from_millis(5), ..frame(2, 3) };
        mailbox.post(soon).unwrap();
        assert!(matches!(next(&mailbox, &[]), Next::Begin(_)));
        assert_eq!(next(&mailbox, &[(2, Some(5))]), Next::Over(0, End::Late));
        mailbox.close();
        assert_eq!(next(&mailbox, &[]), Next::Closed);
    }
}
