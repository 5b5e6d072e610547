//! A node: one shard, computed for one request after another while tensors travel.
//!
//! [`Node::load`] takes a shard and an engine; a transport is then joined with the node's
//! [`Node::sink`] and given to [`Node::connect`], so that peers hear of a node only when it can
//! compute. The node goes through its program on a thread of its own; sends leave through one thread a
//! peer, so that computing never waits for the network, nor one peer for another. While a request
//! waits for a tensor, others are computed, oldest first.
//!
//! Every request ends, with an answer or an error: at its deadline at the latest, at once when a peer
//! dies or a node cannot compute its part. Its memory is then given back on every node.
//!
//! A panic while computing ends the node's thread and nothing else: [`Node::crash`] tells of it, and whoever
//! has the node must end it, so that peers hear that it is gone.

mod core;
mod error;
mod outbox;
mod report;
mod worker;

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use snn_schemas::manifest::Port;
use snn_schemas::wire::{Answer, Tensor};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use self::error::in_words;
pub use self::error::{InferError, StartError};
pub use self::report::{NodeReport, ReceiveReport, SendReport};

use self::core::{Core, lock};
use self::outbox::{Leaving, Outbox};
use self::worker::Worker;
use crate::engine::Engine;
use crate::shard::{Program, Shard, Slot};
use crate::transport::{Sink, Transport};
use crate::watch::{Kind, Log, Recorder};

/// How long past its deadline a request's error may take to come from the compute thread, which
/// knows what was missing: one segment of a large network on a small device.
const EXPLAIN_WITHIN: Duration = Duration::from_millis(500);

/// A running node. Dropping it ends its thread and its tasks.
pub struct Node {
    core: Arc<Core>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Frames on their way to a transport, a queue a peer, until one is connected.
    leaving: Vec<mpsc::UnboundedReceiver<Leaving>>,
    senders: JoinSet<Option<()>>,
    /// Ends the senders with the node.
    sending: DropGuard,
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
        let worker = Worker::new(Arc::clone(&core), program);
        let watched = Arc::clone(&core);
        let compute = thread::Builder::new()
            .name(format!("snn-compute-{}", core.identity.rank))
            .spawn(move || {
                let run = AssertUnwindSafe(move || worker.run(engine, loaded));
                if let Err(payload) = panic::catch_unwind(run) {
                    let (rank, words) = (watched.identity.rank, words(payload.as_ref()));
                    watched.crash.get_or_init(|| format!("rank {rank} panicked: {words}"));
                }
            })
            .map_err(StartError::Thread)?;
        let (senders, compute) = (JoinSet::new(), Some(compute));
        let sending = CancellationToken::new().drop_guard();
        let node = Node { core, inputs, outputs, leaving, senders, sending, compute };
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

    /// Sends frames with `transport` from now on, a thread a peer: what has been computed is encoded and
    /// leaves without waiting for a worker of the runtime, while the next segment is computed. Must be called within a tokio runtime.
    pub fn connect(&mut self, transport: Arc<dyn Transport>) {
        for (peer, frames) in self.leaving.drain(..).enumerate() {
            let (runtime, end) = (Handle::current(), self.sending.token().clone());
            let core = Arc::clone(&self.core);
            let sending = outbox::send_all(core, peer, frames, Arc::clone(&transport));
            self.senders.spawn_blocking(move || runtime.block_on(end.run_until_cancelled(sending)));
        }
    }

    /// From now on goes on without a tensor that is not there after `wait`: it counts as zero, and
    /// the answer is marked as degraded. Only the model's input is always waited for. The first call
    /// counts.
    pub fn degrade_after(&self, wait: Duration) {
        self.core.degrade.get_or_init(|| wait);
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

    /// What the compute thread said when it panicked, if it did: no request is computed any more.
    pub fn crash(&self) -> Option<String> {
        self.core.crash.get().cloned()
    }

    /// What the node has counted.
    pub fn report(&self) -> NodeReport {
        lock(&self.core.report).clone()
    }

    /// Says in the report that the node's process was started for the rank `home`, and stands in for
    /// another.
    pub fn note_guest_of(&self, home: usize) {
        lock(&self.core.report).guest_of = Some(home);
    }

    /// Counts that this node's process has taken over a rank.
    pub fn note_takeover(&self) {
        lock(&self.core.report).takeovers += 1;
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
        let degrade = self.core.degrade.get();
        let patience = degrade.map_or(within, |degrade| within.min(*degrade));
        let is_complete = tokio::time::timeout(patience, complete).await.is_ok();
        if !is_complete && degrade.is_none() {
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
        self.sending.token().cancel();
        self.senders.shutdown().await;
        if let Some(compute) = self.compute.take() {
            // A panic of the thread has been noted; there is nothing left to end.
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

/// What a panic says.
fn words(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no reason given")
}

fn ports(program: &Program, slots: &[Slot]) -> Vec<Port> {
    let port = |slot: &Slot| {
        let info = program.slot(*slot);
        Port { name: info.name.clone(), shape: info.shape.clone().unwrap_or_default() }
    };
    slots.iter().map(port).collect()
}
