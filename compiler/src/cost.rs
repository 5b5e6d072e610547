//! What a split costs: both measures of communication, and the work of each shard.
//!
//! Takes a policy and a [`Placed`] graph with its cuts; gives the figures of the manifest. The
//! paper's measure counts sends; wire bytes are real. They are kept side by side and never mixed.

use snn_schemas::cost::Piece;
use snn_schemas::manifest::{Cost, PaperCost, WireCost};
use snn_schemas::{Dtype, Policy};

use crate::graph::{Arg, Graph, Op, OpId, const_elements, elem_size};
use crate::groups::{GroupBlock, Meaning, meaning_of};
use crate::placement::Placed;
use crate::schedule::{Action, Cut};

/// Both costs of a split.
pub(crate) fn cost(placed: &Placed, cuts: &[Cut], policy: Option<&Policy>) -> Cost {
    let bytes = |exchanged: bool| -> u64 {
        let chosen = cuts.iter().filter(|cut| cut.taker.exchange.is_some() == exchanged);
        chosen.map(|cut| cut.bytes(&placed.graph)).sum()
    };
    let blocks = &placed.blocks;
    let ring_bytes = ring_bytes(blocks, placed.groups);
    let exchange_bytes = bytes(true);
    let fraction = match ring_bytes {
        0 => 0.0,
        ring => exchange_bytes as f64 / ring as f64,
    };
    Cost {
        paper: PaperCost {
            blocks: blocks.len(),
            fraction: policy.map_or(0.0, |policy| policy.paper_cost(blocks.len())),
        },
        wire: WireCost {
            exchange_bytes,
            other_bytes: bytes(false),
            planned_bytes: policy.map_or(0, |policy| planned_bytes(blocks, policy)),
            ring_bytes,
            fraction,
        },
    }
}

fn elements(shape: &[usize]) -> u64 {
    shape.iter().map(|&dim| dim as u64).product()
}

/// A ring all-reduce in f32 after every block: 2(G − 1) times one group's tensor.
fn ring_bytes(blocks: &[GroupBlock], groups: usize) -> u64 {
    let once = 2 * (groups as u64).saturating_sub(1) * (Dtype::F32.bits() / 8) as u64;
    blocks.iter().map(|block| once * elements(&block.shape)).sum()
}

/// What the policy would send between G nodes if every send were needed.
fn planned_bytes(blocks: &[GroupBlock], policy: &Policy) -> u64 {
    let step_bytes = |(index, step): (usize, &snn_schemas::Step)| {
        let once = policy.send_bytes(index, &blocks[policy.sent_after(index)].shape);
        step.decision.sends().count() as u64 * once
    };
    policy.steps.iter().enumerate().map(step_bytes).sum()
}

/// The work of one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Ops it computes.
    pub ops: usize,
    /// Floating-point parameters it holds.
    pub parameters: u64,
    /// Floating-point operations of its convolutions and matrix products, a multiply-add as two.
    pub flops: u64,
}

/// The work of a node that does `actions`.
pub(crate) fn work(graph: &Graph, actions: &[Action]) -> Work {
    let computed = actions.iter().filter_map(|action| match action {
        Action::Compute(id) if graph.op(*id).proto.is_some() => Some(*id),
        _ => None,
    });
    computed.fold(Work::default(), |work, id| Work {
        ops: work.ops + 1,
        parameters: work.parameters + parameters(graph, graph.op(id)),
        flops: work.flops + flops(graph, id),
    })
}

/// Floating-point operations of a graph's convolutions and matrix products.
pub(crate) fn total(graph: &Graph) -> u64 {
    graph.ops().filter(|&op| graph.op(op).proto.is_some()).map(|op| flops(graph, op)).sum()
}

/// What a node that does `actions` computes, sends and receives, in order: ops between two transfers
/// as one piece.
pub(crate) fn schedule(graph: &Graph, actions: &[Action]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for action in actions {
        let piece = match *action {
            Action::Compute(op) => Piece::Compute(flops(graph, op)),
            Action::Send(cut) => Piece::Send(cut as u32),
            Action::Receive(cut) => Piece::Receive(cut as u32),
        };
        match (pieces.last_mut(), piece) {
            (Some(Piece::Compute(sum)), Piece::Compute(flops)) => *sum += flops,
            (_, Piece::Compute(0)) => {}
            _ => pieces.push(piece),
        }
    }
    pieces
}

fn constants<'a>(graph: &'a Graph, op: &'a Op) -> impl Iterator<Item = u64> + 'a {
    op.inputs.iter().filter_map(|arg| match arg {
        Arg::Const(id) => {
            let constant = graph.constant(*id);
            let is_float = matches!(constant.data_type(), 1 | 10 | 11 | 16);
            (is_float && elem_size(constant.data_type()) > 0)
                .then(|| const_elements(constant) as u64)
        }
        _ => None,
    })
}

/// Learnable numbers: a batch norm's mean and variance, its last two constants, are measured.
fn parameters(graph: &Graph, op: &Op) -> u64 {
    match op.op_type() {
        "BatchNormalization" => constants(graph, op).take(2).sum(),
        _ => constants(graph, op).sum(),
    }
}

fn flops(graph: &Graph, id: OpId) -> u64 {
    let op = graph.op(id);
    let Some(&output) = op.outputs.first() else { return 0 };
    let output = graph.tensor(output);
    let weights = constants(graph, op).next().unwrap_or(0);
    match (op.op_type(), meaning_of(graph, id)) {
        // Each weight meets every position of one output channel.
        ("Conv", Meaning::Conv { .. }) => {
            2 * weights * elements(&output.shape) / (output.channels() as u64).max(1)
        }
        ("Gemm" | "MatMul", _) => {
            2 * weights * elements(&output.shape)
                / output.shape.last().map_or(1, |&n| n as u64).max(1)
        }
        _ => 0,
    }
}
