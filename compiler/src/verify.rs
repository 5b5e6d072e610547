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
use crate::graph::{Arg, FLOAT, FLOAT16, Graph, Op, OpId, Tensor, TensorId};
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
    let mut taken: Vec<TensorId> = op.inputs.iter().filter_map(|arg: &Arg| arg.tensor()).collect();
    let mut edges: Vec<TensorId> =
        graph.edges().filter(|edge| edge.1 == id).map(|edge| edge.2).collect();
    taken.sort();
    edges.sort();
    if taken != edges {
        let name = graph.op_name(id);
        faults.push(format!(
            "op \"{name}\" takes {} tensors by {} edges",
            taken.len(),
            edges.len()
        ));
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
    let mut faults = types(&placed.graph, cuts);
    faults.extend(run(placed, cuts, &schedules));
    faults
}

fn types(graph: &Graph, cuts: &[Cut]) -> Vec<String> {
    let fault = |(number, cut): (usize, &Cut)| {
        let Tensor { name, elem, .. } = graph.tensor(cut.tensor);
        let travels = matches!(*elem, FLOAT | FLOAT16);
        (!travels).then(|| {
            format!("t{number} (\"{name}\") is of ONNX type {elem}; only f32 and f16 travel")
        })
    };
    cuts.iter().enumerate().filter_map(fault).collect()
}

/// Plays all schedules side by side, each as far as it comes, until nobody moves.
pub fn run(placed: &Placed, cuts: &[Cut], schedules: &[&[Action]]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut at = vec![0; schedules.len()];
    let mut made: Vec<BTreeSet<TensorId>> = vec![BTreeSet::new(); schedules.len()];
    let mut sent: BTreeSet<usize> = BTreeSet::new();
    let mut received: BTreeSet<usize> = BTreeSet::new();
    let mut moved = true;
    while std::mem::take(&mut moved) {
        for (rank, schedule) in schedules.iter().enumerate() {
            while let Some(&action) = schedule.get(at[rank]) {
                if let Action::Receive(number) = action
                    && !sent.contains(&number)
                {
                    break;
                }
                if let Action::Receive(number) = action {
                    received.insert(number);
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
    let untaken = (0..cuts.len()).filter(|number| !received.contains(number));
    faults.extend(untaken.map(|number| format!("nobody receives t{number}")));
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
            if !made.contains(&cuts[number].sent) {
                faults.push(format!("node {rank} sends t{number} before it has it"));
            }
            sent.insert(number);
        }
        Action::Receive(number) => {
            made.insert(cuts[number].tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::graph::{GroupId, TensorSpec, standard};
    use crate::placement::Placement;
    use crate::schedule::{Taker, cuts};

    fn add(
        graph: &mut Graph,
        op_type: &str,
        name: &str,
        inputs: &[TensorId],
        group: usize,
    ) -> TensorId {
        let op = Op {
            proto: Some(standard(op_type, &format!("{op_type}_{name}"), vec![])),
            inputs: inputs.iter().map(|&tensor| Arg::Tensor(tensor)).collect(),
            outputs: vec![],
            group: Some(GroupId(group)),
            exchange: None,
        };
        graph.add_one(op, TensorSpec { name: name.to_owned(), shape: vec![1, 2], elem: FLOAT })
    }

    /// x → Relu a (g0) → Relu b (g0) → output.
    fn line() -> (Graph, [TensorId; 3]) {
        let mut graph = Graph::new(18);
        let spec = TensorSpec { name: "x".to_owned(), shape: vec![1, 2], elem: FLOAT };
        let x = graph.add_input(spec);
        let a = add(&mut graph, "Relu", "a", &[x], 0);
        let b = add(&mut graph, "Relu", "b", &[a], 0);
        graph.outputs.push(("y".to_owned(), b));
        (graph, [x, a, b])
    }

    /// The line with `a` on node 1, where g1 lives, and the rest on node 0; its cuts and schedules.
    fn pair() -> (Placed, Vec<Cut>, [Vec<Action>; 2]) {
        let (graph, tensors) = line();
        let placement = Placement::even(2, 2).expect("two nodes");
        let stem = crate::Stem::default();
        let ranks = [0, 1, 0];
        let home = |(tensor, rank): (&TensorId, usize)| {
            (graph.tensor(*tensor).producer, BTreeSet::from([rank]))
        };
        let homes: BTreeMap<_, _> = tensors.iter().zip(ranks).map(home).collect();
        let [x, a, b] = tensors.map(|tensor| graph.tensor(tensor).producer);
        let placed = Placed { graph, groups: 2, blocks: vec![], placement, entry: 0, stem, homes };
        let cuts = cuts(&placed);
        let first =
            vec![Action::Compute(x), Action::Send(0), Action::Receive(1), Action::Compute(b)];
        let second = vec![Action::Receive(0), Action::Compute(a), Action::Send(1)];
        (placed, cuts, [first, second])
    }

    fn faults(
        (placed, cuts, [first, second]): (Placed, Vec<Cut>, [Vec<Action>; 2]),
    ) -> Vec<String> {
        run(&placed, &cuts, &[&first, &second])
    }

    #[test]
    fn what_is_right_has_no_faults() {
        assert_eq!(graph(&line().0), Vec::<String>::new());
        assert_eq!(faults(pair()), Vec::<String>::new());
        assert!(check(vec![]).is_ok());
    }

    #[test]
    fn the_first_fault_is_shown() {
        let error = check(vec!["one".to_owned(), "two".to_owned()]).expect_err("faults");
        assert_eq!(error.to_string(), "verify: one");
    }

    #[test]
    fn rule_1_edges_and_arguments_agree() {
        let (mut line, [_, a, b]) = line();
        line.cut_edge(line.tensor(a).producer, line.tensor(b).producer);
        assert_eq!(graph(&line), ["op \"Relu_b\" takes 1 tensors by 0 edges"]);
    }

    #[test]
    fn rule_2_no_op_depends_on_itself() {
        let (mut line, [x, a, b]) = line();
        line.replace(x, b, &[line.tensor(a).producer]);
        assert_eq!(graph(&line), ["2 ops depend on themselves"]);
    }

    #[test]
    fn rule_3_names_are_unique() {
        let (mut line, [_, a, _]) = line();
        line.rename(a, "x");
        assert_eq!(graph(&line), ["two tensors are called \"x\""]);
    }

    #[test]
    fn rule_4_groups_keep_to_themselves() {
        let (mut line, [_, a, b]) = line();
        add(&mut line, "Mul", "c", &[a, b], 1);
        assert_eq!(graph(&line), ["op \"Mul_c\" of g1 takes a tensor of g0"; 2]);
        // Joining channels and adding what was received are what exchanges are made of.
        let (mut line, [_, a, b]) = self::line();
        add(&mut line, "Concat", "c", &[a, b], 1);
        add(&mut line, "Add", "d", &[a, b], 1);
        assert_eq!(graph(&line), Vec::<String>::new());
    }

    #[test]
    fn rule_5_every_op_is_computed_once_after_its_arguments() {
        let (placed, cuts, [mut first, second]) = pair();
        first.swap(2, 3);
        let early = "node 0 computes \"Relu_b\" before it has \"a\"";
        assert_eq!(faults((placed, cuts, [first, second])), [early]);

        let (placed, cuts, [mut first, second]) = pair();
        first.push(first[3]);
        assert_eq!(faults((placed, cuts, [first, second])), ["node 0 computes \"Relu_b\" twice"]);

        let (placed, cuts, [mut first, second]) = pair();
        first.pop();
        assert_eq!(faults((placed, cuts, [first, second])), ["node 0 does not compute \"Relu_b\""]);
    }

    #[test]
    fn rule_6_what_is_sent_exists_and_is_received() {
        let (placed, cuts, [first, mut second]) = pair();
        second.swap(1, 2);
        assert_eq!(faults((placed, cuts, [first, second])), ["node 1 sends t1 before it has it"]);

        let (placed, cuts, [first, mut second]) = pair();
        second.pop();
        let unsent = ["node 0 waits for t1 for ever", "nobody sends t1", "nobody receives t1"];
        assert_eq!(faults((placed, cuts, [first, second])), unsent);

        let (placed, mut cuts, [mut first, second]) = pair();
        let cut = Cut { taker: Taker::default(), ..cuts[0] };
        cuts.push(cut);
        first.push(Action::Send(2));
        assert_eq!(faults((placed, cuts, [first, second])), ["nobody receives t2"]);
    }

    #[test]
    fn rule_7_nobody_waits_in_a_circle() {
        let (placed, cuts, [mut first, second]) = pair();
        first.swap(1, 2);
        let circle = [
            "node 0 waits for t1 for ever",
            "node 1 waits for t0 for ever",
            "nobody sends t0",
            "nobody sends t1",
            "nobody receives t0",
            "nobody receives t1",
        ];
        assert_eq!(faults((placed, cuts, [first, second])), circle);
    }

    #[test]
    fn rule_8_only_floats_travel() {
        let mut graph = Graph::new(18);
        let spec = TensorSpec { name: "ids".to_owned(), shape: vec![1, 2], elem: 7 };
        let tensor = graph.add_input(spec);
        let codec = snn_schemas::Codec::plain(snn_schemas::Dtype::F32);
        let cut = Cut { tensor, sent: tensor, codec, from: 0, to: 1, taker: Taker::default() };
        let sentence = "t0 (\"ids\") is of ONNX type 7; only f32 and f16 travel";
        assert_eq!(types(&graph, &[cut]), [sentence]);
    }
}
