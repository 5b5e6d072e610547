//! A node: one shard, computed for one request after another while tensors travel.
//!
//! [`Node::load`] takes a shard and an engine; a transport is then joined with the node's
//! [`Node::sink`] and given to [`Node::connect`], so that peers hear of a node only when it can
//! compute. The node goes through its program on a thread of its own; sends leave through one task a
//! peer, so that computing never waits for the network, nor one peer for another. While a request
//! waits for a tensor, others are computed, oldest first.
//!
//! Every request ends, with an answer or an error: at its deadline at the latest, at once when a peer
//! dies or a node cannot compute its part. Its memory is then given back on every node.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use snn_schemas::manifest::Port;
use snn_schemas::metadata::ShardInfo;
use snn_schemas::wire::{Answer, Cancel, Frame, Tensor, TensorFrame, WireError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::engine::{Engine, EngineError, Executor, Job};
use crate::mailbox::{Begin, End, MAX_REQUESTS, Mailbox, Next, Pending, Refused};
use crate::shard::{Crossing, Program, Shard, Slot, Step};
use crate::transport::{Event, Sink, Transport};
use crate::watch::{Histogram, Kind, Log, Recorder};

/// How long a frame for a peer that is gone is kept, should another stand in for it.
const WAIT_FOR_PEER: Duration = Duration::from_secs(2);
/// How long past its deadline a request's error may take to come from the compute thread, which
/// knows what was missing: one segment of a large network on a small device.
const EXPLAIN_WITHIN: Duration = Duration::from_millis(500);

/// What a node has counted since it started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The node's rank.
    pub rank: usize,
    /// Requests it has done its part of.
    pub requests: u64,
    /// Requests that ended before it was done.
    pub failures: u64,
    /// Time in the engine, in ms.
    pub compute_ms: f64,
    /// Time in which every request at hand waited for a tensor, in ms.
    pub waiting_ms: f64,
    /// Time in turning tensors into frames and back, in ms.
    pub codec_ms: f64,
    /// Bytes of the frames sent, their headers included.
    pub bytes_sent: u64,
    /// Frames sent.
    pub frames_sent: u64,
    /// What each receive was waited for, in the order of the shard.
    pub receives: Vec<ReceiveReport>,
    /// What has been sent by each send, in the order of the shard.
    #[serde(default)]
    pub sends: Vec<SendReport>,
    /// How long answered requests took, on the node that takes them.
    #[serde(default)]
    pub latency: Histogram,
}

/// How long a node has waited for one transfer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// The transfer.
    pub transfer: u32,
    /// The policy's step, where one asks for it.
    pub step: Option<usize>,
    /// Time between the request coming to the receive and the tensor being there, in ms.
    pub waited_ms: f64,
    /// Rank of the sender.
    #[serde(default)]
    pub from: usize,
}

/// What a node has sent by one transfer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SendReport {
    /// The transfer.
    pub transfer: u32,
    /// The policy's step, where one asks for it.
    pub step: Option<usize>,
    /// Rank of the receiver.
    pub to: usize,
    /// Bytes of its frames, their headers included.
    pub bytes: u64,
    /// Its frames.
    pub frames: u64,
}

/// Everything of a node that other threads touch.
struct Core {
    identity: ShardInfo,
    mailbox: Mailbox,
    outbox: Outbox,
    /// Ranks that are not there.
    missing: watch::Sender<BTreeSet<usize>>,
    fault: Mutex<Option<String>>,
    asked: Mutex<HashMap<u64, oneshot::Sender<Result<Answer, InferError>>>>,
    report: Mutex<NodeReport>,
    next_request: AtomicU64,
    recorder: Recorder,
    log: Log,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done where a thread could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    fn new(shard: &Shard, outbox: Outbox) -> Core {
        let identity = shard.identity().clone();
        let others = (0..identity.nodes).filter(|&rank| rank != identity.rank);
        let (missing, _) = watch::channel(others.collect());
        let receive = |crossing: &Crossing| ReceiveReport {
            transfer: crossing.transfer,
            step: crossing.step,
            waited_ms: 0.0,
            from: crossing.peer,
        };
        let send = |crossing: &Crossing| SendReport {
            transfer: crossing.transfer,
            step: crossing.step,
            to: crossing.peer,
            ..SendReport::default()
        };
        let report = NodeReport {
            rank: identity.rank,
            receives: shard.program().receives().map(receive).collect(),
            sends: shard.program().sends().map(send).collect(),
            ..NodeReport::default()
        };
        // Numbers begin anywhere, so that those of a restarted node are new to its peers.
        let start = RandomState::new().hash_one(identity.rank) >> 1;
        Core {
            mailbox: Mailbox::new(shard.program()),
            outbox,
            identity,
            missing,
            fault: Mutex::new(None),
            asked: Mutex::new(HashMap::new()),
            report: Mutex::new(report),
            next_request: AtomicU64::new(start),
            recorder: Recorder::default(),
            log: Log::default(),
        }
    }

    fn take(&self, event: Event) {
        match event {
            Event::Frame { bytes } => {
                if let Err(reason) = self.take_frame(bytes) {
                    tracing::warn!(%reason, "frame dropped");
                }
            }
            Event::PeerUp { rank, split } if split != self.identity.split => {
                let fault = format!(
                    "rank {rank} is of split {}, this node of {}",
                    short(&split),
                    short(&self.identity.split)
                );
                tracing::warn!(%fault, "foreign node refused");
                self.log.note(format!("refused: {fault}"));
                lock(&self.fault).get_or_insert(fault);
            }
            Event::PeerUp { rank, .. } => {
                tracing::debug!(rank, "peer is there");
                if self.missing.send_if_modified(|missing| missing.remove(&rank)) {
                    self.log.note(format!("rank {rank} is there"));
                }
            }
            Event::PeerDown { rank } => self.lose(rank),
        }
    }

    fn take_frame(&self, bytes: Bytes) -> Result<(), FrameError> {
        match Frame::decode(bytes)? {
            Frame::Tensor(frame) => {
                let (request, transfer) = (frame.request, frame.transfer);
                self.mailbox.post(frame)?;
                self.recorder.instant(Kind::Arrived, transfer, request);
            }
            Frame::Cancel(Cancel { from, request, again, reason }) => {
                self.mailbox.cancel(request, &reason);
                // The entry node tells others; where it is told, the asker must hear of it.
                let rank = from.into();
                self.answer(
                    request,
                    Err(match again {
                        true => InferError::PeerLost { reason },
                        false => InferError::Peer { rank, reason },
                    }),
                );
            }
        }
        Ok(())
    }

    fn lose(&self, rank: usize) {
        let known = rank < self.identity.nodes && rank != self.identity.rank;
        if known && self.missing.send_if_modified(|missing| missing.insert(rank)) {
            tracing::debug!(rank, "peer is gone");
            self.log.note(format!("rank {rank} is gone"));
            let reason = format!("rank {rank} is gone");
            let from = self.identity.rank as u16;
            for request in self.mailbox.cancel_all(&reason) {
                // The entry node may have noticed earlier, and begun this one since.
                let frame = Cancel { from, request, again: true, reason: reason.clone() };
                self.outbox.send(self.identity.entry, frame.encode());
            }
            let asked: Vec<u64> = lock(&self.asked).keys().copied().collect();
            for request in asked {
                self.answer(request, Err(InferError::PeerLost { reason: reason.clone() }));
            }
        }
    }

    fn answer(&self, request: u64, answer: Result<Answer, InferError>) {
        if let Some(asker) = lock(&self.asked).remove(&request) {
            // Whoever asked may have left; then nobody needs the answer.
            let _ = asker.send(answer);
        }
    }
}

/// The beginning of a split's identity, enough to tell two apart.
fn short(split: &str) -> &str {
    split.get(..8).unwrap_or(split)
}

/// A running node. Dropping it ends its thread and its tasks.
pub struct Node {
    core: Arc<Core>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Frames on their way to a transport, a queue a peer, until one is connected.
    leaving: Vec<mpsc::UnboundedReceiver<Bytes>>,
    senders: JoinSet<()>,
    compute: Option<thread::JoinHandle<()>>,
}

impl Node {
    /// Loads the shard with the engine that `engine` makes on the compute thread.
    ///
    /// # Errors
    /// What the engine cannot load.
    pub async fn load<E: Engine>(
        shard: &Shard,
        engine: impl FnOnce() -> E + Send + 'static,
    ) -> Result<Node, StartError> {
        let (outbox, leaving) = Outbox::new(shard.identity());
        let core = Arc::new(Core::new(shard, outbox));
        let program = shard.program().clone();
        let (inputs, outputs) =
            (ports(&program, &program.inputs), ports(&program, &program.outputs));
        let (loaded, loading) = oneshot::channel();
        let worker = Worker { core: Arc::clone(&core), program };
        let compute = thread::Builder::new()
            .name(format!("snn-compute-{}", core.identity.rank))
            .spawn(move || worker.run(engine, loaded))
            .map_err(StartError::Thread)?;
        let (senders, compute) = (JoinSet::new(), Some(compute));
        let node = Node { core, inputs, outputs, leaving, senders, compute };
        match loading.await {
            Ok(Ok(())) => Ok(node),
            Ok(Err(error)) => Err(StartError::Engine(error)),
            Err(_) => Err(StartError::Ended),
        }
    }

    /// What a transport gives the node's frames and news to.
    pub fn sink(&self) -> Sink {
        let core = Arc::clone(&self.core);
        Arc::new(move |event| core.take(event))
    }

    /// Sends frames with `transport` from now on, a task a peer.
    pub fn connect(&mut self, transport: Arc<dyn Transport>) {
        for (peer, mut frames) in self.leaving.drain(..).enumerate() {
            let transport = Arc::clone(&transport);
            let mut missing = self.core.missing.subscribe();
            self.senders.spawn(async move {
                while let Some(frame) = frames.recv().await {
                    // Others may have heard earlier than we that somebody stands in for the peer.
                    let there = missing.wait_for(|missing| !missing.contains(&peer));
                    if tokio::time::timeout(WAIT_FOR_PEER, there).await.is_err() {
                        tracing::debug!(peer, "frame dropped: nobody is there");
                        continue;
                    }
                    // Who waits for it hears of a lost peer, or at its deadline.
                    if let Err(error) = transport.send(peer, frame).await {
                        tracing::warn!(%error, "frame not sent");
                    }
                }
            });
        }
    }

    /// The model's inputs, on the entry node; elsewhere none.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// The model's outputs, on the entry node; elsewhere none.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The node's rank.
    pub fn rank(&self) -> usize {
        self.core.identity.rank
    }

    /// Whether this node takes requests and gives answers.
    pub fn is_entry(&self) -> bool {
        self.core.identity.rank == self.core.identity.entry
    }

    /// Ranks that are not there.
    pub fn missing(&self) -> BTreeSet<usize> {
        self.core.missing.borrow().clone()
    }

    /// What makes this node unable to take part, if anything does.
    pub fn fault(&self) -> Option<String> {
        lock(&self.core.fault).clone()
    }

    /// What the node has counted.
    pub fn report(&self) -> NodeReport {
        lock(&self.core.report).clone()
    }

    /// What records when the node computed, sent and waited.
    pub fn recorder(&self) -> &Recorder {
        &self.core.recorder
    }

    /// What has happened to the node lately.
    pub fn log(&self) -> &Log {
        &self.core.log
    }

    /// Runs one request through the cluster; on the entry node only.
    ///
    /// # Errors
    /// Inputs that do not fit the model, peers that are missing for `within` or die, a node that
    /// cannot compute, or no answer within `within` of the cluster being complete.
    pub async fn infer(&self, inputs: Vec<Tensor>, within: Duration) -> Result<Answer, InferError> {
        self.check(&inputs)?;
        let start = Instant::now();
        let mut missing = self.core.missing.subscribe();
        let complete = missing.wait_for(BTreeSet::is_empty);
        if tokio::time::timeout(within, complete).await.is_err() {
            let ranks = self.missing().into_iter().collect();
            return Err(InferError::Missing { ranks, within });
        }
        let deadline = Instant::now() + within;
        let request = self.core.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        lock(&self.core.asked).insert(request, sender);
        if let Err(refused) = self.core.mailbox.open(request, deadline, inputs) {
            lock(&self.core.asked).remove(&request);
            return Err(refused.into());
        }
        let mut cleanup = Cleanup { node: self, request, ended: false };
        let answer = tokio::time::timeout_at((deadline + EXPLAIN_WITHIN).into(), answer).await;
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(InferError::Stopped),
            Err(_) => Err(InferError::Late { waiting: String::new() }),
        };
        cleanup.ended = answer.is_ok();
        if answer.is_ok() {
            lock(&self.core.report).latency.add(start.elapsed());
            self.core.recorder.span(Kind::Request, 0, request, start);
        }
        answer
    }

    fn check(&self, inputs: &[Tensor]) -> Result<(), InferError> {
        let Some(entry) = (!self.is_entry()).then_some(self.core.identity.entry) else {
            let (found, expected) = (inputs.len(), self.inputs.len());
            if found != expected {
                return Err(InferError::InputCount { found, expected });
            }
            for (input, port) in inputs.iter().zip(&self.inputs) {
                if input.shape() != port.shape {
                    return Err(InferError::InputShape {
                        name: port.name.clone(),
                        found: input.shape().to_vec(),
                        expected: port.shape.clone(),
                    });
                }
            }
            return Ok(());
        };
        Err(InferError::NotEntry { entry })
    }

    /// Ends the node: requests at hand end with an error, the compute thread with its segment, and
    /// the transport is let go.
    pub async fn shutdown(mut self) {
        self.core.mailbox.close();
        lock(&self.core.asked).clear();
        self.senders.shutdown().await;
        if let Some(compute) = self.compute.take() {
            // A panic of the thread has been reported by its hook; there is nothing left to end.
            let _ = tokio::task::spawn_blocking(move || compute.join()).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.core.mailbox.close();
    }
}

/// Tells everybody when a request ends without an answer, also when its asker just leaves.
struct Cleanup<'a> {
    node: &'a Node,
    request: u64,
    ended: bool,
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        if !self.ended {
            lock(&self.node.core.asked).remove(&self.request);
            let reason = "the request has ended";
            self.node.core.mailbox.cancel(self.request, reason);
            self.node.core.outbox.cancel(self.request, reason);
        }
    }
}

fn ports(program: &Program, slots: &[Slot]) -> Vec<Port> {
    let port = |slot: &Slot| {
        let info = program.slot(*slot);
        Port { name: info.name.clone(), shape: info.shape.clone().unwrap_or_default() }
    };
    slots.iter().map(port).collect()
}

/// Where frames leave: a queue for each peer.
///
/// The queues have no limit of their own: what is in them was computed for one of at most
/// [`MAX_REQUESTS`] open requests.
#[derive(Clone)]
struct Outbox {
    rank: usize,
    queues: Vec<mpsc::UnboundedSender<Bytes>>,
}

impl Outbox {
    fn new(identity: &ShardInfo) -> (Outbox, Vec<mpsc::UnboundedReceiver<Bytes>>) {
        let (queues, leaving) = (0..identity.nodes).map(|_| mpsc::unbounded_channel()).unzip();
        (Outbox { rank: identity.rank, queues }, leaving)
    }

    fn send(&self, peer: usize, frame: Bytes) {
        if let Some(queue) = self.queues.get(peer) {
            // A queue without a task is one of a node that is ending.
            let _ = queue.send(frame);
        }
    }

    /// Tells every peer that a request has ended.
    fn cancel(&self, request: u64, reason: &str) {
        let (from, reason) = (self.rank as u16, reason.to_owned());
        let frame = Cancel { from, request, again: false, reason }.encode();
        for peer in (0..self.queues.len()).filter(|&peer| peer != self.rank) {
            self.send(peer, frame.clone());
        }
    }
}

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
struct Worker {
    core: Arc<Core>,
    program: Program,
}

impl Worker {
    fn run<E: Engine>(
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
        let wants = match self.program.steps.get(work.at) {
            Some(Step::Receive(crossing)) => Some(crossing.transfer),
            _ => None,
        };
        Pending { request: work.request, wants }
    }

    /// Records that every request at hand waited, under what the oldest of them waited for.
    fn record_wait(&self, pending: &[Pending], idle: Duration) {
        if let Some(&Pending { request, wants: Some(transfer) }) = pending.first()
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
        executor.write(work.job, crossing.slot, elements)?;
        self.core.recorder.span(Kind::Decode, crossing.transfer, work.request, start);
        let mut report = lock(&self.core.report);
        report.codec_ms += milliseconds(start.elapsed());
        let mut receives = report.receives.iter_mut();
        if let Some(receive) = receives.find(|receive| receive.transfer == crossing.transfer) {
            receive.waited_ms += milliseconds(waited);
        }
        work.at += 1;
        Ok(())
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
                Step::Send(crossing) => self.send(executor, work, crossing)?,
            }
            work.at += 1;
        }
        work.blocked = Instant::now();
        Ok(())
    }

    fn send(
        &self,
        executor: &mut dyn Executor,
        work: &Working,
        crossing: &Crossing,
    ) -> Result<(), EngineError> {
        let start = Instant::now();
        let within = work.deadline.saturating_duration_since(start);
        let about = (crossing.transfer, within);
        let rank = self.core.identity.rank as u16;
        let mut frame =
            TensorFrame::begin(crossing.dtype, rank, work.request, about, crossing.bytes);
        executor.read(work.job, crossing.slot, &mut frame)?;
        // Before the frame leaves, so that its arrival is always later.
        self.core.recorder.span(Kind::Encode, crossing.transfer, work.request, start);
        let bytes = frame.len() as u64;
        self.core.outbox.send(crossing.peer, frame.freeze());
        let mut report = lock(&self.core.report);
        report.codec_ms += milliseconds(start.elapsed());
        report.bytes_sent += bytes;
        report.frames_sent += 1;
        let mut sends = report.sends.iter_mut();
        if let Some(send) = sends.find(|send| send.transfer == crossing.transfer) {
            send.bytes += bytes;
            send.frames += 1;
        }
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
        self.core.mailbox.done(work.request);
        match answer {
            Ok(answer) => {
                lock(&self.core.report).requests += 1;
                if let Some(outputs) = answer {
                    self.core.answer(work.request, Ok(Answer { outputs, degraded: false }));
                }
            }
            Err(error) => {
                tracing::warn!(%error, request = work.request, "cannot compute");
                self.fail(work.request, error.to_string());
            }
        }
    }

    fn outputs(&self, executor: &mut dyn Executor, job: Job) -> Result<Vec<Tensor>, EngineError> {
        let mut outputs = Vec::with_capacity(self.program.outputs.len());
        for &slot in &self.program.outputs {
            let mut bytes = BytesMut::new();
            executor.read(job, slot, &mut bytes)?;
            let data = bytes.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect();
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

    /// Tells everybody that this node cannot do its part.
    fn fail(&self, request: u64, reason: String) {
        lock(&self.core.report).failures += 1;
        self.core.outbox.cancel(request, &reason);
        let rank = self.core.identity.rank;
        self.core.answer(request, Err(InferError::Peer { rank, reason }));
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Why a frame from a peer is dropped.
#[derive(Debug, thiserror::Error)]
enum FrameError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The engine cannot load the shard.
    #[error(transparent)]
    Engine(EngineError),
    /// The system gives no thread.
    #[error("no thread to compute on: {0}")]
    Thread(#[source] std::io::Error),
    /// The compute thread ended while loading.
    #[error("the engine ended while loading")]
    Ended,
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// Another node takes requests.
    #[error("rank {entry} answers requests, this node does not")]
    NotEntry {
        /// The rank that does.
        entry: usize,
    },
    /// Too few or too many inputs.
    #[error("{found} inputs, expected {expected}")]
    InputCount {
        /// Inputs given.
        found: usize,
        /// Inputs of the model.
        expected: usize,
    },
    /// An input of another shape.
    #[error("input \"{name}\" has shape {found:?}, expected {expected:?}")]
    InputShape {
        /// The input.
        name: String,
        /// Shape given.
        found: Vec<usize>,
        /// Shape of the model's.
        expected: Vec<usize>,
    },
    /// Nodes that were not there in time.
    #[error("{} missing for {} s", in_words(ranks), within.as_secs_f64())]
    Missing {
        /// Their ranks.
        ranks: Vec<usize>,
        /// How long they were waited for.
        within: Duration,
    },
    /// A node died meanwhile; the request may be run again.
    #[error("{reason}")]
    PeerLost {
        /// Which one, in the words of whoever noticed.
        reason: String,
    },
    /// A node could not do its part.
    #[error("rank {rank}: {reason}")]
    Peer {
        /// Its rank.
        rank: usize,
        /// In its own words.
        reason: String,
    },
    /// No answer by the deadline.
    #[error("no answer in time{}{waiting}", if waiting.is_empty() { "" } else { ": " })]
    Late {
        /// What was waited for, where that is known.
        waiting: String,
    },
    /// Too many requests at once, or the node is ending.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The node is ending.
    #[error("the node is stopping")]
    Stopped,
}

fn in_words(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}", list.join(", "))
}
