//! Stage 2: find the groups of a model and give every op to one of them.
//!
//! Takes a [`Model`] in normal form; gives [`Grouped`]: a graph in which every tensor belongs to one
//! group or to none, and the blocks of the trunk. Finding (layouts and blocks, plain data) and
//! lowering (rewriting ops by them) are two passes: other layouts can be lowered the same way.

mod blocks;
mod find;
mod layout;
mod lower;
mod meaning;

use snn_schemas::MAX_GROUPS;

use crate::error::CompileError;
use crate::graph::{Graph, GroupId, OpId, TensorId};
use crate::read::Model;

pub use blocks::Block;
pub use layout::{Layout, Part};
pub(crate) use meaning::{Meaning, meaning_of};

/// What finding gives: where each tensor's channels belong, and the trunk's blocks.
#[derive(Clone, Debug)]
pub struct Groups {
    /// G.
    pub count: usize,
    /// A layout for each tensor of the graph, by id.
    pub layouts: Vec<Layout>,
    /// Blocks of the trunk, in order.
    pub blocks: Vec<Block>,
}

impl Groups {
    /// The layout of a tensor.
    pub fn layout(&self, tensor: TensorId) -> &Layout {
        &self.layouts[tensor.0]
    }
}

/// A block as each group computes it.
#[derive(Clone, Debug)]
pub struct GroupBlock {
    /// Name of the block's output in the source model.
    pub name: String,
    /// Shape of one group's output.
    pub shape: Vec<usize>,
    /// One entry a group.
    pub streams: Vec<Stream>,
}

/// One group's share of a block.
#[derive(Clone, Debug)]
pub struct Stream {
    /// What the block computes before its closing activation.
    pub sum: TensorId,
    /// What the block gives.
    pub out: TensorId,
    /// The ops from `sum` to `out`.
    pub closing: Vec<OpId>,
}

/// A graph whose every tensor belongs to one group or to none.
#[derive(Clone, Debug)]
pub struct Grouped {
    /// The lowered graph.
    pub graph: Graph,
    /// G; 1 for a model that was not taken apart.
    pub groups: usize,
    /// Blocks of the trunk, in order.
    pub blocks: Vec<GroupBlock>,
}

/// Finds the groups of `model`: `wanted` of them, or as many as there are.
///
/// # Errors
/// [`CompileError::Mixes`] with the op that mixes groups, [`CompileError::NoGroups`] for a model
/// without any, [`CompileError::Subgraph`] for one that holds graphs within ops.
pub fn find(model: &Model, wanted: Option<usize>) -> Result<Groups, CompileError> {
    if let Some((op, op_type)) = model.subgraph.clone() {
        return Err(CompileError::Subgraph { op, op_type });
    }
    match wanted {
        Some(groups) if !(2..=MAX_GROUPS).contains(&groups) => {
            Err(CompileError::GroupCount { found: groups })
        }
        Some(groups) => find_exactly(&model.graph, groups),
        None => find_most(&model.graph),
    }
}

fn find_exactly(graph: &Graph, count: usize) -> Result<Groups, CompileError> {
    let layouts = find::find(graph, count)?;
    let blocks = blocks::blocks(graph, &layouts, count);
    if blocks.is_empty() {
        return Err(CompileError::NoGroups { groups: Some(count) });
    }
    Ok(Groups { count, layouts, blocks })
}

/// The largest number of groups that stay apart. Where none do, the error to show is of the number
/// whose groups stay apart longest, and of the largest among equals: that is what was meant.
fn find_most(graph: &Graph) -> Result<Groups, CompileError> {
    let order = graph.order();
    let place = |name: &str| order.iter().position(|&op| graph.op_name(op) == name);
    let mut furthest: Option<(Option<usize>, CompileError)> = None;
    for count in (2..=MAX_GROUPS).rev() {
        let error = match find_exactly(graph, count) {
            Ok(groups) => return Ok(groups),
            Err(error) => error,
        };
        if let CompileError::Mixes { op, .. } = &error {
            let reached = place(op);
            if furthest.as_ref().is_none_or(|(before, _)| reached > *before) {
                furthest = Some((reached, error));
            }
        }
    }
    Err(furthest.map_or(CompileError::NoGroups { groups: None }, |(_, error)| error))
}

/// Gives every op to a group.
pub fn lower(model: &Model, groups: &Groups) -> Grouped {
    let old = &model.graph;
    let (graph, pieces) = lower::lower(old, &groups.layouts);
    let piece = |tensor: TensorId, group: usize| pieces[&tensor][group];
    let blocks = groups
        .blocks
        .iter()
        .map(|block| {
            let stream = |group: usize| Stream {
                sum: piece(block.sum, group),
                out: piece(block.out, group),
                closing: closing(&graph, block, |tensor| piece(tensor, group), old),
            };
            let streams: Vec<Stream> = (0..groups.count).map(stream).collect();
            GroupBlock {
                name: old.tensor(block.out).name.clone(),
                shape: graph.tensor(streams[0].out).shape.clone(),
                streams,
            }
        })
        .collect();
    Grouped { graph, groups: groups.count, blocks }
}

/// One group's copies of a block's closing ops.
fn closing(
    graph: &Graph,
    block: &Block,
    piece: impl Fn(TensorId) -> TensorId,
    old: &Graph,
) -> Vec<OpId> {
    let lowered = |&op: &OpId| graph.tensor(piece(old.op(op).outputs[0])).producer;
    block.closing.iter().map(lowered).collect()
}

/// A model taken as one piece: any model, on one node.
pub fn undivided(model: &Model) -> Grouped {
    Grouped { graph: model.graph.clone(), groups: 1, blocks: vec![] }
}

impl Grouped {
    /// The groups of the trunk, in order.
    pub fn group_ids(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..self.groups).map(GroupId)
    }
}
