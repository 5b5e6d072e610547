//! Stage 4: give every op the nodes that compute it, and drop what no output needs.
//!
//! Takes a [`Grouped`] graph and a rank for each group; gives [`Placed`]. Ops of a group go to the
//! group's node; the head to the node of the group that feeds it, which is also where the model's
//! input arrives and its output leaves (the *entry*). Who computes the stem is [`Stem`]'s.

use std::collections::{BTreeMap, BTreeSet};

use snn_schemas::codec::Pixels;

use crate::error::CompileError;
use crate::graph::{Graph, OpId, TensorId};
use crate::groups::{GroupBlock, Grouped};

/// Rank of each group's node: `ranks[g]` computes group g.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    ranks: Vec<usize>,
    nodes: usize,
}

impl Placement {
    /// Spreads `groups` groups evenly over `nodes` nodes, neighbours together.
    pub fn even(groups: usize, nodes: usize) -> Result<Placement, CompileError> {
        if nodes == 0 || nodes > groups {
            return Err(CompileError::Nodes { nodes, groups });
        }
        Ok(Placement { ranks: (0..groups).map(|group| group * nodes / groups).collect(), nodes })
    }

    /// Takes a rank a group; ranks must run from 0 without gaps.
    pub fn explicit(ranks: Vec<usize>, groups: usize) -> Result<Placement, CompileError> {
        if ranks.len() != groups {
            return Err(CompileError::PlacementLength { found: ranks.len(), groups });
        }
        let last = ranks.iter().copied().max().unwrap_or(0);
        match (0..=last.min(groups)).find(|rank| !ranks.contains(rank)) {
            Some(missing) => Err(CompileError::PlacementGap { missing, last }),
            None => Ok(Placement { ranks, nodes: last + 1 }),
        }
    }

    /// Rank of each group's node.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }
}

/// Who computes the stem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stem {
    /// Every node that needs it, unless sending its result takes fewer bytes than sending its input:
    /// computed at the same time everywhere, a copy costs no latency, so bytes alone decide.
    #[default]
    FewestBytes,
    /// Every node that needs it.
    Copied,
    /// The entry node, which sends its result to the others.
    Sent,
}

/// A graph whose every op has its nodes.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The graph, without ops that no output needs.
    pub graph: Graph,
    /// G; 1 for a model that was not taken apart.
    pub groups: usize,
    /// Blocks of the trunk.
    pub blocks: Vec<GroupBlock>,
    /// Rank of each group's node.
    pub placement: Placement,
    /// Rank that takes the input and gives the output.
    pub entry: usize,
    /// Who was to compute the stem.
    pub stem: Stem,
    /// The nodes that compute each op; several for copies of the stem, none where a codec does it.
    pub homes: BTreeMap<OpId, BTreeSet<usize>>,
}

impl Placed {
    /// Whether `rank` has the tensor without receiving it.
    pub fn has(&self, rank: usize, tensor: TensorId) -> bool {
        self.homes[&self.graph.tensor(tensor).producer].contains(&rank)
    }

    /// The tensor that is sent where `tensor` is to arrive: itself, or what a codec makes it of.
    pub fn sent(&self, tensor: TensorId) -> TensorId {
        self.graph.coded.get(&tensor).map_or(tensor, |coded| coded.source)
    }

    /// The node that sends a tensor to those who lack it.
    pub fn sender(&self, tensor: TensorId) -> usize {
        let homes = &self.homes[&self.graph.tensor(self.sent(tensor)).producer];
        match homes.contains(&self.entry) {
            true => self.entry,
            false => homes.first().copied().unwrap_or(self.entry),
        }
    }
}

/// Places every op.
pub fn place(grouped: Grouped, placement: Placement, stem: Stem) -> Placed {
    let Grouped { mut graph, groups, blocks } = grouped;
    graph.remove_dead();
    let entry = entry(&graph, &placement);
    let mut homes = homes(&graph, &placement, (entry, stem));
    leave_to_codecs(&graph, &mut homes);
    Placed { graph, groups, blocks, placement, entry, stem, homes }
}

/// Takes away the ops of a quantisation whose result is only taken on other nodes: the codec computes it.
fn leave_to_codecs(graph: &Graph, homes: &mut BTreeMap<OpId, BTreeSet<usize>>) {
    for (&tensor, coded) in &graph.coded {
        let Some(own) = homes.get(&graph.tensor(tensor).producer).cloned() else { continue };
        let is_output = graph.outputs.iter().any(|(_, output)| *output == tensor);
        let taken = graph.consumers(tensor).iter().any(|user| !homes[user].is_disjoint(&own));
        if !taken && !is_output {
            for op in &coded.ops {
                homes.insert(*op, BTreeSet::new());
            }
        }
    }
}

/// The node of the group that feeds the first output; of the lowest one where several do.
fn entry(graph: &Graph, placement: &Placement) -> usize {
    let mut queue: BTreeSet<OpId> =
        graph.outputs.iter().take(1).map(|(_, tensor)| graph.tensor(*tensor).producer).collect();
    let mut seen = BTreeSet::new();
    let mut feeding = BTreeSet::new();
    while let Some(op) = queue.pop_first() {
        match graph.op(op).group {
            Some(group) => {
                feeding.insert(group);
            }
            None if seen.insert(op) => queue.extend(graph.producers(op)),
            None => {}
        }
    }
    feeding.first().map_or(0, |group| placement.ranks[group.0])
}

fn homes(
    graph: &Graph,
    placement: &Placement,
    (entry, who): (usize, Stem),
) -> BTreeMap<OpId, BTreeSet<usize>> {
    let order = graph.order();
    let mut homes: BTreeMap<OpId, BTreeSet<usize>> = BTreeMap::new();
    let mut stem: BTreeSet<OpId> = BTreeSet::new();
    for &id in &order {
        let home = match graph.op(id).group {
            Some(group) => placement.ranks[group.0],
            // The input, the stem at least here, the head only here.
            None => entry,
        };
        homes.insert(id, BTreeSet::from([home]));
        if graph.op(id).group.is_none() && graph.producers(id).iter().all(|op| stem.contains(op)) {
            stem.insert(id);
        }
    }
    for rank in (0..placement.nodes).filter(|&rank| rank != entry) {
        let needs = needs(graph, &stem, |op| homes[&op].contains(&rank));
        let is_copied = match who {
            Stem::FewestBytes => is_shorter(graph, &stem, &needs),
            Stem::Copied => true,
            Stem::Sent => false,
        };
        if is_copied {
            for op in needs.ops.into_iter().filter(|&op| graph.op(op).proto.is_some()) {
                homes.entry(op).or_default().insert(rank);
            }
        }
    }
    homes
}

/// What a node needs of the stem.
struct Needs {
    /// Ops of the stem on the way to it, the inputs among them.
    ops: BTreeSet<OpId>,
    /// The stem's tensors that the node's own ops take.
    results: BTreeSet<TensorId>,
}

fn needs(graph: &Graph, stem: &BTreeSet<OpId>, mine: impl Fn(OpId) -> bool) -> Needs {
    let from_stem = |tensor: &TensorId| stem.contains(&graph.tensor(*tensor).producer);
    let own = graph.ops().filter(|op| !stem.contains(op) && mine(*op));
    let results: BTreeSet<TensorId> =
        own.flat_map(|op| graph.op(op).tensors().filter(from_stem).collect::<Vec<_>>()).collect();
    let mut queue: Vec<OpId> = results.iter().map(|&t| graph.tensor(t).producer).collect();
    let mut ops = BTreeSet::new();
    while let Some(op) = queue.pop() {
        if ops.insert(op) {
            queue.extend(graph.producers(op));
        }
    }
    Needs { ops, results }
}

/// Whether sending the inputs takes no more bytes than sending the stem's results.
fn is_shorter(graph: &Graph, stem: &BTreeSet<OpId>, needs: &Needs) -> bool {
    let bytes_of = |tensor: TensorId| match graph.is_picture(tensor) {
        true => Pixels::CODEC.likely_bytes(&graph.tensor(tensor).shape).unwrap_or(0) as u64,
        false => graph.tensor(tensor).bytes(),
    };
    let bytes =
        |tensors: &mut dyn Iterator<Item = TensorId>| -> u64 { tensors.map(bytes_of).sum() };
    let is_input = |op: &&OpId| stem.contains(op) && graph.op(**op).proto.is_none();
    let mut inputs = needs.ops.iter().filter(is_input).flat_map(|&op| graph.op(op).outputs.clone());
    bytes(&mut inputs) <= bytes(&mut needs.results.iter().copied())
}
