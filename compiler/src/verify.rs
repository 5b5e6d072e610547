//! The rules that hold between the stages, each checked here and nowhere else.
//!
//! A graph:
//! 1. Edges and arguments agree: an op has one edge for each tensor it takes.
//! 2. There is an order: no op depends on itself.
//! 3. Names of tensors are unique.
//! 4. An op of one group takes another group's tensor only in an exchange or to join channels, so
//!    features never leak between groups by mistake.
//!
//! A cluster:
//! 5. Every op is computed on each of its nodes exactly once, after its arguments.
//! 6. Every cut is sent by one node after it was made, and received by another.
//! 7. Run side by side, the nodes come to an end: nobody waits in a circle.
//! 8. Only f32 and f16 travel.
//!
//! Faults are collected, all of them; the first is the one to show. They are faults of the compiler,
//! but for rule 8, which a model can break.

use std::collections::BTreeSet;

use crate::Split;
use crate::error::CompileError;
use crate::graph::{Arg, FLOAT, FLOAT16, Graph, Op, OpId, TensorId};
use crate::placement::Placed;
use crate::schedule::{Action, Cut};

/// Ends a stage whose result has faults.
pub fn check(faults: Vec<String>) -> Result<(), CompileError> {
    faults.into_iter().next().map_or(Ok(()), |fault| Err(CompileError::Verify(fault)))
}

/// Faults of a graph.
pub fn graph(graph: &Graph) -> Vec<String> {
    let mut faults = Vec::new();
    for id in graph.ops() {
        edges(graph, id, &mut faults);
        groups(graph, id, &mut faults);
    }
    let ordered = graph.order().len();
    let all = graph.ops().count();
    if ordered < all {
        faults.push(format!("{} ops depend on themselves", all - ordered));
    }
    let mut names = BTreeSet::new();
    for &tensor in graph.ops().flat_map(|id| &graph.op(id).outputs) {
        let name = &graph.tensor(tensor).name;
        if !names.insert(name) {
            faults.push(format!("two tensors are called \"{name}\""));
        }
    }
    faults
}

fn edges(graph: &Graph, id: OpId, faults: &mut Vec<String>) {
    let op = graph.op(id);
    let mut taken: Vec<TensorId> =
        op.inputs.iter().filter_map(|arg: &Arg| arg.tensor()).collect();
    let mut edges: Vec<TensorId> =
        graph.edges().filter(|edge| edge.1 == id).map(|edge| edge.2).collect();
    taken.sort();
    edges.sort();
    if taken != edges {
        let name = graph.op_name(id);
        faults.push(format!("op \"{name}\" takes {} tensors by {} edges", taken.len(), edges.len()));
    }
}

fn groups(graph: &Graph, id: OpId, faults: &mut Vec<String>) {
    let op: &Op = graph.op(id);
    let Some(group) = op.group else { return };
    if op.exchange.is_some() || op.op_type() == "Concat" {
        return;
    }
    for tensor in op.tensors() {
        let producer = graph.op(graph.tensor(tensor).producer);
        // Received features may arrive just as they were sent, with no op of their own in between.
        let foreign = producer.group.filter(|&other| other != group && producer.exchange.is_none());
        if let Some(other) = foreign
            && op.op_type() != "Add"
        {
            let name = graph.op_name(id);
            faults.push(format!("op \"{name}\" of {group} takes a tensor of {other}"));
        }
    }
}

/// Faults of a split.
pub fn cluster(split: &Split) -> Vec<String> {
    let Split { placed, cuts, shards, .. } = split;
    let schedules: Vec<&[Action]> = shards.iter().map(|shard| shard.actions.as_slice()).collect();
    let mut faults = Vec::new();
    for (number, cut) in cuts.iter().enumerate() {
        let tensor = placed.graph.tensor(cut.tensor);
        if !matches!(tensor.elem, FLOAT | FLOAT16) {
            let name = &tensor.name;
            faults.push(format!(
                "t{number} (\"{name}\") is of ONNX type {}; only f32 and f16 travel",
                tensor.elem
            ));
        }
    }
    faults.extend(run(placed, cuts, &schedules));
    faults
}

/// Plays all schedules side by side, each as far as it comes, until nobody moves.
pub fn run(placed: &Placed, cuts: &[Cut], schedules: &[&[Action]]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut at = vec![0; schedules.len()];
    let mut made: Vec<BTreeSet<TensorId>> = vec![BTreeSet::new(); schedules.len()];
    let mut sent: BTreeSet<usize> = BTreeSet::new();
    let mut moved = true;
    while std::mem::take(&mut moved) {
        for (rank, schedule) in schedules.iter().enumerate() {
            while let Some(&action) = schedule.get(at[rank]) {
                if let Action::Receive(number) = action
                    && !sent.contains(&number)
                {
                    break;
                }
                act(placed, cuts, rank, action, &mut made[rank], &mut sent, &mut faults);
                at[rank] += 1;
                moved = true;
            }
        }
    }
    for (rank, schedule) in schedules.iter().enumerate() {
        if let Some(Action::Receive(number)) = schedule.get(at[rank]) {
            faults.push(format!("node {rank} waits for t{number} for ever"));
        }
        for op in placed.graph.ops().filter(|op| placed.homes[op].contains(&rank)) {
            let missing = placed.graph.op(op).outputs.iter().any(|t| !made[rank].contains(t));
            if missing && at[rank] == schedule.len() {
                let name = placed.graph.op_name(op);
                faults.push(format!("node {rank} does not compute \"{name}\""));
            }
        }
    }
    let unsent = (0..cuts.len()).filter(|number| !sent.contains(number));
    faults.extend(unsent.map(|number| format!("nobody sends t{number}")));
    faults
}

fn act(
    placed: &Placed,
    cuts: &[Cut],
    rank: usize,
    action: Action,
    made: &mut BTreeSet<TensorId>,
    sent: &mut BTreeSet<usize>,
    faults: &mut Vec<String>,
) {
    match action {
        Action::Compute(id) => {
            let name = placed.graph.op_name(id);
            for tensor in placed.graph.op(id).tensors().filter(|tensor| !made.contains(tensor)) {
                let missing = &placed.graph.tensor(tensor).name;
                faults.push(format!("node {rank} computes \"{name}\" before it has \"{missing}\""));
            }
            for &tensor in &placed.graph.op(id).outputs {
                if !made.insert(tensor) {
                    faults.push(format!("node {rank} computes \"{name}\" twice"));
                }
            }
        }
        Action::Send(number) => {
            if !made.contains(&cuts[number].tensor) {
                faults.push(format!("node {rank} sends t{number} before it has it"));
            }
            sent.insert(number);
        }
        Action::Receive(number) => {
            made.insert(cuts[number].tensor);
        }
    }
}
