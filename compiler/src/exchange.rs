//! Stage 3: write the policy into the graph with ordinary ops.
//!
//! Takes a [`Grouped`] graph and a policy; gives the same graph in which, at each step, a group's
//! features are sliced, cast and added to another group's sum (equations 2 and 3 of the paper, made
//! exact in the project's semantics). The result is still one valid graph: evaluated whole, it *is*
//! the reference result.

use std::collections::BTreeMap;

use snn_schemas::{Dtype, Policy};

use crate::error::CompileError;
use crate::graph::{Coded, Exchange, FLOAT, FLOAT16, Graph, GroupId, OpId, TensorId};
use crate::groups::{GroupBlock, Grouped, Stream};
use crate::rewrite;

/// Writes `policy` into `grouped`.
///
/// # Errors
/// The policy is for another number of groups or blocks, or a step would cross a stride.
pub fn exchange(mut grouped: Grouped, policy: &Policy) -> Result<Grouped, CompileError> {
    check(&grouped, policy)?;
    for step in 0..policy.steps.len() {
        let sends = sends(&grouped.blocks, policy, step);
        let graph = &mut grouped.graph;
        // Who adds is noted before anything is: a block may send and receive in the same step.
        let users: Vec<Vec<OpId>> =
            sends.iter().map(|send| graph.consumers(send.receiver.sum)).collect();
        let arrived: Vec<TensorId> = sends.iter().map(|send| send.write(graph)).collect();
        for ((send, users), arrived) in sends.iter().zip(users).zip(arrived) {
            let sum = send.receiver.sum;
            let name = format!("{}+{}", graph.tensor(sum).name, send.label());
            let total = rewrite::sum(graph, sum, arrived, name, Some(send.to));
            graph.mark(total, send.exchange);
            graph.replace(sum, total, &users);
        }
    }
    Ok(grouped)
}

fn check(grouped: &Grouped, policy: &Policy) -> Result<(), CompileError> {
    let blocks = &grouped.blocks;
    if policy.groups != grouped.groups {
        return Err(CompileError::PolicyGroups { policy: policy.groups, model: grouped.groups });
    }
    let expected = Policy::steps_for(blocks.len(), policy.staleness);
    if policy.steps.len() != expected {
        return Err(CompileError::PolicySteps {
            found: policy.steps.len(),
            expected,
            blocks: blocks.len(),
            staleness: policy.staleness,
        });
    }
    for (step, choice) in policy.steps.iter().enumerate() {
        let (sent, added) = (policy.sent_after(step), policy.added_in(step));
        let exchanges = choice.decision.sends().next().is_some();
        if exchanges && blocks[sent].shape != blocks[added].shape {
            return Err(CompileError::CrossesStride {
                step,
                sent: block_name(blocks, sent),
                sent_shape: blocks[sent].shape.clone(),
                added: block_name(blocks, added),
                added_shape: blocks[added].shape.clone(),
            });
        }
    }
    Ok(())
}

/// `b3 (stage1.2/out)`: blocks are counted from 1, as in the paper.
fn block_name(blocks: &[GroupBlock], index: usize) -> String {
    format!("b{} ({})", index + 1, blocks[index].name)
}

/// One group's tensor on its way to another.
struct Send<'a> {
    exchange: Exchange,
    from: GroupId,
    to: GroupId,
    keep: usize,
    dtype: Dtype,
    sender: &'a Stream,
    receiver: Stream,
    /// Sent and added in one block (α = 1): what is sent must not contain what is added.
    same_block: bool,
}

fn sends<'a>(blocks: &'a [GroupBlock], policy: &Policy, step: usize) -> Vec<Send<'a>> {
    let choice = &policy.steps[step];
    let (sent, added) = (policy.sent_after(step), policy.added_in(step));
    let channels = blocks[sent].shape.get(1).copied().unwrap_or(1);
    let keep = policy.levels.keep(choice.level, channels);
    let send = |(from, to): (usize, usize)| Send {
        exchange: Exchange { step, channels, packing: policy.packing_of(step) },
        from: GroupId(from),
        to: GroupId(to),
        keep,
        dtype: policy.dtype_of(step),
        sender: &blocks[sent].streams[from],
        receiver: blocks[added].streams[to].clone(),
        same_block: sent == added,
    };
    // A level that rounds down to no channel at all sends nothing.
    choice.decision.sends().map(send).filter(|send| send.keep > 0).collect()
}

impl Send<'_> {
    /// `s3.g0`: step and sender.
    fn label(&self) -> String {
        format!("s{}.{}", self.exchange.step, self.from)
    }

    /// Adds the ops between the sender's output and the receiver's sum; gives what arrives.
    fn write(&self, graph: &mut Graph) -> TensorId {
        let (from, to) = (Some(self.from), Some(self.to));
        let output = self.output(graph);
        let mut tensor = rewrite::select(graph, output, 0, self.keep, from);
        let mut added = vec![tensor];
        let label = self.label();
        match self.dtype {
            Dtype::F32 => {}
            Dtype::F16 => {
                tensor = rewrite::cast(graph, tensor, FLOAT16, format!("{label}/f16"), from);
                added.push(tensor);
                tensor = rewrite::cast(graph, tensor, FLOAT, format!("{label}/f32"), to);
                added.push(tensor);
            }
            Dtype::I8 | Dtype::I4 => {
                let signed = !rewrite::is_positive(graph, tensor);
                let steps = rewrite::quantise(graph, tensor, (self.dtype, signed), &label, from);
                let ops = steps.iter().map(|&tensor| graph.tensor(tensor).producer).collect();
                let coded = Coded { source: tensor, ops, dtype: self.dtype, signed };
                tensor = steps.last().copied().unwrap_or(tensor);
                graph.coded.insert(tensor, coded);
                added.extend(steps);
            }
        }
        let channels = self.exchange.channels;
        tensor = rewrite::pad_channels(graph, tensor, channels, format!("{label}/padded"), to);
        added.push(tensor);
        for tensor in added.into_iter().filter(|&tensor| tensor != output) {
            graph.mark(tensor, self.exchange);
        }
        tensor
    }

    /// What is sent: the block's output, without anything received in this block.
    fn output(&self, graph: &mut Graph) -> TensorId {
        if !self.same_block {
            return self.sender.out;
        }
        let mut replaced: BTreeMap<TensorId, TensorId> = BTreeMap::new();
        for &op in &self.sender.closing {
            let original = graph.op(op).outputs[0];
            let copy = rewrite::copy_with(graph, op, &replaced, "/alone");
            replaced.insert(original, copy);
        }
        *replaced.get(&self.sender.out).unwrap_or(&self.sender.out)
    }
}
