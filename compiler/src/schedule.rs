//! Stage 5a: cut the edges between nodes and put each node's work in order.
//!
//! Takes a [`Placed`] graph; gives the [`Cut`]s, numbered in the order in which they are sent, and
//! for each node its ops, sends and receives in execution order. A node computes whatever it can
//! before it waits, and among that first what the earliest send needs; a send leaves at once, a
//! receive waits last. Receives are taken in the order of their numbers, so no cycle of waiting can
//! arise: whoever holds the lowest number still unsent waits only for lower ones.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use snn_schemas::codec::Pixels;
use snn_schemas::{Codec, Dtype, Packing};

use crate::graph::{Exchange, FLOAT16, Graph, GroupId, OpId, TensorId};
use crate::placement::Placed;

/// A tensor that crosses from one node to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// What arrives.
    pub tensor: TensorId,
    /// What is sent: the same, or what the codec makes it of.
    pub sent: TensorId,
    /// How it travels.
    pub codec: Codec,
    /// Sending rank.
    pub from: usize,
    /// Receiving rank.
    pub to: usize,
    /// Who asks for it.
    pub taker: Taker,
}

impl Cut {
    /// Bytes of its payload: at most where zeros are packed, a picture's where pixels are.
    pub fn bytes(&self, graph: &Graph) -> u64 {
        let tensor = graph.tensor(self.tensor);
        self.codec.stated_bytes(&tensor.shape).map_or(tensor.bytes(), |bytes| bytes as u64)
    }
}

/// What a tensor is taken for on another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taker {
    /// The exchange that asks for it, if one does.
    pub exchange: Option<Exchange>,
    /// The group that takes it; none for stem and head.
    pub group: Option<GroupId>,
}

/// One thing a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Computes an op.
    Compute(OpId),
    /// Sends the cut of this number.
    Send(usize),
    /// Waits for the cut of this number.
    Receive(usize),
}

/// Finds all cuts, in the order in which their tensors are made.
pub fn cuts(placed: &Placed) -> Vec<Cut> {
    let graph = &placed.graph;
    let mut cuts = Vec::new();
    for op in graph.order() {
        for &tensor in &graph.op(op).outputs {
            for (to, taker) in takers(placed, tensor) {
                let (from, sent) = (placed.sender(tensor), placed.sent(tensor));
                let codec = codec(placed, tensor, &taker);
                cuts.push(Cut { tensor, sent, codec, from, to, taker });
            }
        }
    }
    cuts
}

/// How a tensor travels to `taker`.
fn codec(placed: &Placed, tensor: TensorId, taker: &Taker) -> Codec {
    if placed.graph.is_picture(tensor) {
        return Pixels::CODEC;
    }
    let packing = taker.exchange.map_or(Packing::None, |exchange| exchange.packing);
    match placed.graph.coded.get(&tensor) {
        Some(coded) => Codec { dtype: coded.dtype, signed: coded.signed, packing },
        None if placed.graph.tensor(tensor).elem == FLOAT16 => {
            Codec { packing, ..Codec::plain(Dtype::F16) }
        }
        None => Codec { packing, ..Codec::plain(Dtype::F32) },
    }
}

/// The ranks that take a tensor without having it, and what for.
fn takers(placed: &Placed, tensor: TensorId) -> BTreeMap<usize, Taker> {
    let graph = &placed.graph;
    let mut takers: BTreeMap<usize, Taker> = BTreeMap::new();
    for user in graph.consumers(tensor) {
        for &rank in placed.homes[&user].iter().filter(|&&rank| !placed.has(rank, tensor)) {
            let op = graph.op(user);
            let taker = takers.entry(rank).or_default();
            taker.exchange = taker.exchange.or(op.exchange);
            taker.group = taker.group.or(op.group);
        }
    }
    let is_output = graph.outputs.iter().any(|(_, output)| *output == tensor);
    if is_output && !placed.has(placed.entry, tensor) {
        takers.entry(placed.entry).or_default();
    }
    takers
}

/// Puts the work of `rank` in order.
pub fn schedule(placed: &Placed, cuts: &[Cut], rank: usize) -> Vec<Action> {
    let mut scheduler = Scheduler::new(placed, cuts, rank);
    let mut actions = Vec::new();
    while let Some(action) = scheduler.next() {
        actions.push(action);
        match action {
            Action::Compute(op) => {
                for &tensor in &placed.graph.op(op).outputs {
                    actions.extend(scheduler.sends.get(&tensor).into_iter().flatten().copied());
                    scheduler.made(tensor);
                }
            }
            Action::Receive(cut) => scheduler.made(cuts[cut].tensor),
            Action::Send(_) => {}
        }
    }
    actions
}

/// List scheduling of one node's ops.
struct Scheduler<'a> {
    placed: &'a Placed,
    /// Ops of this node that still miss tensors, and how many.
    waiting: BTreeMap<OpId, usize>,
    /// Ops that can be computed, most urgent first: (first send that needs it, id).
    ready: BinaryHeap<Reverse<(usize, OpId)>>,
    /// Cuts to receive, lowest number first.
    receives: BTreeMap<usize, TensorId>,
    sends: BTreeMap<TensorId, Vec<Action>>,
    urgency: BTreeMap<OpId, usize>,
}

impl<'a> Scheduler<'a> {
    fn new(placed: &'a Placed, cuts: &[Cut], rank: usize) -> Scheduler<'a> {
        let graph = &placed.graph;
        let mine: BTreeSet<OpId> =
            graph.ops().filter(|op| placed.homes[op].contains(&rank)).collect();
        let numbered = || cuts.iter().enumerate();
        let mut sends: BTreeMap<TensorId, Vec<Action>> = BTreeMap::new();
        for (number, cut) in numbered().filter(|(_, cut)| cut.from == rank) {
            sends.entry(cut.sent).or_default().push(Action::Send(number));
        }
        let receives = numbered().filter(|(_, cut)| cut.to == rank);
        let mut scheduler = Scheduler {
            placed,
            waiting: BTreeMap::new(),
            ready: BinaryHeap::new(),
            receives: receives.map(|(number, cut)| (number, cut.tensor)).collect(),
            urgency: urgency(placed, &mine, &sends),
            sends,
        };
        for &op in &mine {
            let missing = graph.op(op).tensors().collect::<BTreeSet<_>>().len();
            scheduler.waiting.insert(op, missing);
            if missing == 0 {
                scheduler.enqueue(op);
            }
        }
        scheduler
    }

    fn enqueue(&mut self, op: OpId) {
        let urgency = self.urgency.get(&op).copied().unwrap_or(usize::MAX);
        self.ready.push(Reverse((urgency, op)));
    }

    fn next(&mut self) -> Option<Action> {
        if let Some(Reverse((_, op))) = self.ready.pop() {
            return Some(Action::Compute(op));
        }
        self.receives.pop_first().map(|(number, _)| Action::Receive(number))
    }

    fn made(&mut self, tensor: TensorId) {
        for user in self.placed.graph.consumers(tensor) {
            if let Some(missing) = self.waiting.get_mut(&user) {
                *missing -= 1;
                if *missing == 0 {
                    self.enqueue(user);
                }
            }
        }
    }
}

/// For each op of a node the number of the first send that depends on it.
fn urgency(
    placed: &Placed,
    mine: &BTreeSet<OpId>,
    sends: &BTreeMap<TensorId, Vec<Action>>,
) -> BTreeMap<OpId, usize> {
    let graph = &placed.graph;
    let mut urgency: BTreeMap<OpId, usize> = BTreeMap::new();
    for op in graph.order().into_iter().rev().filter(|op| mine.contains(op)) {
        let sent = graph.op(op).outputs.iter().filter_map(|tensor| sends.get(tensor)).flatten();
        let own = sent.filter_map(|action| match action {
            Action::Send(number) => Some(*number),
            _ => None,
        });
        let later = graph.successors(op).into_iter().filter_map(|next| urgency.get(&next).copied());
        if let Some(first) = own.chain(later).min() {
            urgency.insert(op, first);
        }
    }
    urgency
}
