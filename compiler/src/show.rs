//! The one text form of groups, transfers and shards.
//!
//! Takes what the stages give; writes lines in stable order. Snapshots, `snnc inspect`, `snnc show`
//! and messages all use it, so a transfer looks the same wherever it is met:
//! `t7  stage2.3/out  [1,128,16,16]×0.875 f16  g0 → g2  57344 B`.

use std::fmt::{self, Write as _};

use snn_schemas::manifest::Transfer;
use snn_schemas::{Manifest, Packing};

use crate::Split;
use crate::graph::{Arg, Graph, OpId};
use crate::groups::Groups;
use crate::read::Model;
use crate::schedule::Action;

/// `[1,64,32,32]`.
pub fn shape(shape: &[usize]) -> String {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// A transfer on one line: what is sent, its whole shape times the fraction that crosses.
pub fn transfer(manifest: &Manifest, transfer: &Transfer) -> String {
    let from = end(transfer.from, transfer.from_group);
    let to = end(transfer.to, transfer.to_group);
    let mut whole = transfer.shape.clone();
    let keep = match transfer.channels {
        channels if channels == transfer.keep || channels == 0 => String::new(),
        channels => {
            whole.iter_mut().skip(1).take(1).for_each(|dim| *dim = channels);
            format!("×{}", transfer.keep as f64 / channels as f64)
        }
    };
    let Transfer { id, dtype, packing, bytes, .. } = transfer;
    let name = source(manifest, transfer);
    let (packed, most) = match packing {
        Packing::None => ("", ""),
        Packing::Zeros => (" zeros packed", "≤ "),
        Packing::Pixels => (" as pixels", ""),
    };
    let whole = shape(&whole);
    format!("t{id}  {name}  {whole}{keep} {dtype}{packed}  {from} → {to}  {most}{bytes} B")
}

/// The block whose output is sent; the tensor's own name where no step asks for it.
fn source<'a>(manifest: &'a Manifest, transfer: &'a Transfer) -> &'a str {
    let block = transfer.step.zip(manifest.staleness).map(|(step, staleness)| step * staleness);
    let block = block.and_then(|block| manifest.blocks.get(block));
    block.map_or(&transfer.tensor, |block| &block.name)
}

/// All transfers of a split, a line each, in the order in which they are sent.
pub fn transfers(manifest: &Manifest) -> String {
    manifest.transfers.iter().map(|entry| transfer(manifest, entry) + "\n").collect()
}

/// An end of a transfer: the group where there is one, else the node.
fn end(rank: usize, group: Option<usize>) -> String {
    group.map_or_else(|| format!("n{rank}"), |group| format!("g{group}"))
}

/// Both costs, a line each.
pub fn costs(manifest: &Manifest) -> String {
    let (paper, wire) = (&manifest.cost.paper, &manifest.cost.wire);
    if manifest.blocks.is_empty() {
        return "not taken apart: the whole model on one node, nothing to exchange\n".to_owned();
    }
    let mut text = String::new();
    // Writing to a String cannot end in an error.
    let _ = writeln!(
        text,
        "paper cost  {:.2} % of a ring all-reduce after each of {} blocks (sends counted)",
        paper.fraction * 100.0,
        paper.blocks
    );
    let _ = writeln!(
        text,
        "wire bytes  {:.2} %: {} B exchanged of {} B in the ring, {} B besides (input, head)",
        wire.fraction * 100.0,
        wire.exchange_bytes,
        wire.ring_bytes,
        wire.other_bytes
    );
    text
}

/// A line on the groups whose work reaches no output at all; empty where every group counts.
pub fn idle(manifest: &Manifest) -> String {
    let works = |group: &usize| manifest.blocks.iter().any(|block| block.groups.contains(group));
    let idle: Vec<String> = (0..manifest.groups)
        .filter(|group| !manifest.blocks.is_empty() && !works(group))
        .map(|group| format!("g{group}"))
        .collect();
    let cause = match manifest.policy_sha256 {
        None => "without a policy nothing is exchanged",
        Some(_) => "the policy brings nothing of theirs to an output",
    };
    match idle.is_empty() {
        true => String::new(),
        false => format!("dropped     {}: {cause}\n", idle.join(" ")),
    }
}

/// The groups a node computes.
pub fn groups_of(manifest: &Manifest, rank: usize) -> Vec<usize> {
    (0..manifest.placement.len()).filter(|&group| manifest.placement[group] == rank).collect()
}

/// The groups a model falls into, its blocks, and where it could exchange.
pub fn groups(model: &Model, groups: &Groups) -> String {
    let mut text = String::new();
    let _ = write_groups(&mut text, &model.graph, groups);
    text
}

fn write_groups(text: &mut String, graph: &Graph, groups: &Groups) -> fmt::Result {
    let blocks = &groups.blocks;
    writeln!(text, "{} groups, {} blocks", groups.count, blocks.len())?;
    let names: Vec<&str> = blocks.iter().map(|b| graph.tensor(b.out).name.as_str()).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let shapes = block_shapes(graph, groups);
    for (index, (name, dims)) in names.iter().zip(&shapes).enumerate() {
        let block = format!("b{}", index + 1);
        let count = groups.count;
        writeln!(text, "{block:<4} {name:<width$}  {}×{count}", shape(dims))?;
    }
    writeln!(text, "exchange points")?;
    for Exchanges { staleness, steps, crossing } in exchanges(&shapes) {
        let crossing: Vec<String> = crossing
            .iter()
            .map(|step| format!("{step} (b{} → b{})", step * staleness + 1, (step + 1) * staleness))
            .collect();
        let plural = if steps == 1 { "step" } else { "steps" };
        write!(text, "α = {staleness}: {steps} {plural}")?;
        match crossing.is_empty() {
            true => writeln!(text)?,
            false => {
                let crossing = crossing.join(", ");
                writeln!(text, ", silent where a stride is crossed: {crossing}")?;
            }
        }
    }
    Ok(())
}

/// What a staleness makes possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchanges {
    /// α, blocks a step.
    pub staleness: usize,
    /// Steps a policy has.
    pub steps: usize,
    /// Steps whose two ends differ in shape: nothing can be exchanged there.
    pub crossing: Vec<usize>,
}

/// Largest staleness that is listed: beyond it a tensor is older than any search has found useful.
const MAX_STALENESS: usize = 4;

/// The exchanges that blocks of these shapes allow, by staleness.
pub fn exchanges(shapes: &[Vec<usize>]) -> Vec<Exchanges> {
    let exchanges = |staleness| {
        let steps = shapes.len() / staleness;
        let crosses = |step: &usize| shapes[step * staleness] != shapes[(step + 1) * staleness - 1];
        Exchanges { staleness, steps, crossing: (0..steps).filter(crosses).collect() }
    };
    (1..=MAX_STALENESS.min(shapes.len())).map(exchanges).collect()
}

/// The shape of one group's output, for each block.
pub fn block_shapes(graph: &Graph, groups: &Groups) -> Vec<Vec<usize>> {
    let shape = |block: &crate::groups::Block| {
        let mut shape = graph.tensor(block.out).shape.clone();
        if let (Some(channels), Some(part)) =
            (shape.get_mut(1), groups.layout(block.out).parts().first())
        {
            *channels = part.channels;
        }
        shape
    };
    groups.blocks.iter().map(shape).collect()
}

/// What one node does, an action a line.
pub fn shard(split: &Split, rank: usize) -> String {
    let mut text = String::new();
    let _ = write_shard(&mut text, split, rank);
    text
}

fn write_shard(text: &mut String, split: &Split, rank: usize) -> fmt::Result {
    let graph = &split.placed.graph;
    let groups: Vec<String> =
        groups_of(&split.manifest, rank).iter().map(|group| format!("g{group}")).collect();
    let entry = if rank == split.placed.entry { ", entry" } else { "" };
    writeln!(text, "node {rank}: {}{entry}", groups.join(" "))?;
    for action in &split.shards[rank].actions {
        match *action {
            Action::Compute(op) => writeln!(text, "    {}", op_line(graph, op))?,
            Action::Send(number) => {
                let cut = split.cuts[number];
                writeln!(text, "t{number} → n{}  {}", cut.to, graph.tensor(cut.sent).name)?;
            }
            Action::Receive(number) => {
                let cut = split.cuts[number];
                writeln!(text, "t{number} ← n{}  {}", cut.from, graph.tensor(cut.tensor).name)?;
            }
        }
    }
    for (name, _) in graph.outputs.iter().filter(|_| rank == split.placed.entry) {
        writeln!(text, "output {name}")?;
    }
    Ok(())
}

/// `x/g1 [1,4,8,8] = Conv(input, weight[4,4,3,3])`.
fn op_line(graph: &Graph, id: OpId) -> String {
    let op = graph.op(id);
    let outputs: Vec<String> = op
        .outputs
        .iter()
        .map(|&tensor| graph.tensor(tensor))
        .map(|tensor| format!("{} {}", tensor.name, shape(&tensor.shape)))
        .collect();
    let inputs: Vec<String> = op
        .inputs
        .iter()
        .map(|arg| match arg {
            Arg::Tensor(tensor) => graph.tensor(*tensor).name.clone(),
            Arg::Const(id) => {
                let constant = graph.constant(*id);
                let dims: Vec<String> = constant.dims.iter().map(i64::to_string).collect();
                format!("{}[{}]", constant.name(), dims.join(","))
            }
            Arg::Absent => String::new(),
        })
        .collect();
    match op.proto {
        None => format!("{} = input", outputs.join(", ")),
        Some(_) => format!("{} = {}({})", outputs.join(", "), op.op_type(), inputs.join(", ")),
    }
}
