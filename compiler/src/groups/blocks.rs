//! Stage 2b: cut the trunk, where all groups run side by side, into blocks.
//!
//! Takes a graph with its layouts; gives the blocks in order. A block holds at least one
//! convolution and ends at a tensor through which all data of the trunk flows (a residual sum, in
//! a plain chain every result); the activation that follows, if one does, closes it. What is sent
//! is the block's output; what is received is added to its sum, before that activation.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Arg, Graph, OpId, TensorId, const_elements};
use crate::groups::layout::Layout;
use crate::groups::meaning::{Meaning, meaning_of};

/// A block of the trunk, in tensors of the graph it was found in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// What the block computes before its closing activation; received features are added here.
    pub sum: TensorId,
    /// What the block gives; this is sent. The same as `sum` where no activation closes the block.
    pub out: TensorId,
    /// The ops from `sum` to `out`, in order.
    pub closing: Vec<OpId>,
}

/// Finds the blocks of the trunk of `groups` groups.
pub(crate) fn blocks(graph: &Graph, layouts: &[Layout], groups: usize) -> Vec<Block> {
    let in_trunk = |tensor: TensorId| layouts[tensor.0].parts().len() == groups;
    let order: Vec<OpId> = graph
        .order()
        .into_iter()
        .filter(|&op| graph.op(op).outputs.first().is_some_and(|&tensor| in_trunk(tensor)))
        .collect();
    let mut blocks = Builder { graph, blocks: vec![], weighted: false, sum: None, out: None };
    for segment in segments(graph, &order) {
        blocks.push(segment);
    }
    blocks.close(vec![]);
    blocks.blocks
}

/// The ops between two tensors that carry everything, and the second of these.
struct Segment {
    ops: Vec<OpId>,
    end: TensorId,
}

/// Cuts the trunk wherever a single tensor carries everything that comes after.
///
/// In topological order, a tensor is such a cut exactly if no other tensor is still waited for when
/// it is made: whatever passed it by would be waited for.
fn segments(graph: &Graph, order: &[OpId]) -> Vec<Segment> {
    let trunk: BTreeSet<OpId> = order.iter().copied().collect();
    let users = |tensor: TensorId| {
        graph.consumers(tensor).into_iter().filter(|op| trunk.contains(op)).count()
    };
    let mut waited: BTreeMap<TensorId, usize> = BTreeMap::new();
    // What enters the trunk from outside is waited for from the beginning.
    for &op in order {
        let entering = |tensor: &TensorId| !trunk.contains(&graph.tensor(*tensor).producer);
        for tensor in graph.op(op).tensors().filter(entering) {
            if graph.tensor(tensor).shape.len() > 2 && is_stem(graph, &trunk, tensor) {
                waited.insert(tensor, users(tensor));
            }
        }
    }
    let mut segments = Vec::new();
    let mut ops = Vec::new();
    for &op in order {
        ops.push(op);
        for tensor in graph.op(op).tensors().collect::<BTreeSet<_>>() {
            if let Some(count) = waited.get_mut(&tensor) {
                *count -= 1;
                if *count == 0 {
                    waited.remove(&tensor);
                }
            }
        }
        let passes_by = !waited.is_empty();
        let outputs: Vec<TensorId> = graph.op(op).outputs.to_vec();
        waited.extend(outputs.iter().map(|&t| (t, users(t))).filter(|(_, count)| *count > 0));
        if let [end] = outputs[..]
            && !passes_by
        {
            segments.push(Segment { ops: std::mem::take(&mut ops), end });
        }
    }
    segments
}

/// Whether a tensor from outside the trunk comes before it, not out of it (as an exchange would).
fn is_stem(graph: &Graph, trunk: &BTreeSet<OpId>, tensor: TensorId) -> bool {
    let mut queue = vec![graph.tensor(tensor).producer];
    let mut seen = BTreeSet::new();
    while let Some(op) = queue.pop() {
        if trunk.contains(&op) {
            return false;
        }
        if seen.insert(op) {
            queue.extend(graph.producers(op));
        }
    }
    true
}

/// What a segment adds to the block it stands in.
#[derive(PartialEq, Eq)]
enum Kind {
    /// Convolutions: the substance of a block.
    Weights,
    /// An activation function: closes the block.
    Activation,
    /// Multiplication by numbers: the end of an activation written as several ops, or as below.
    Scale,
    /// A batch norm or a bias: still part of the sum.
    Affine,
    /// Anything else, pooling say: begins the next block.
    Other,
}

fn kind(graph: &Graph, segment: &Segment) -> Kind {
    let meanings: Vec<Meaning> = segment.ops.iter().map(|&op| meaning_of(graph, op)).collect();
    let elementwise = |m: &Meaning| matches!(m, Meaning::Elementwise { .. });
    if meanings.iter().any(|m| matches!(m, Meaning::Conv { .. })) {
        Kind::Weights
    } else if meanings.iter().all(elementwise) {
        match meanings.contains(&Meaning::Elementwise { activation: true }) {
            true => Kind::Activation,
            false if segment.ops.iter().all(|&op| is_scale(graph, op)) => Kind::Scale,
            false => Kind::Affine,
        }
    } else if meanings.iter().all(|m| *m == Meaning::PerChannel || elementwise(m)) {
        Kind::Affine
    } else {
        Kind::Other
    }
}

/// Whether an op multiplies by one number, as the last of `x · clip(x + 3, 0, 6) / 6` does.
fn is_scale(graph: &Graph, id: OpId) -> bool {
    let op = graph.op(id);
    let number = |arg: &Arg| match arg {
        Arg::Const(id) => const_elements(graph.constant(*id)) == 1,
        _ => false,
    };
    matches!(op.op_type(), "Mul" | "Div") && op.inputs.iter().any(number)
}

/// Collects segments into blocks.
struct Builder<'a> {
    graph: &'a Graph,
    blocks: Vec<Block>,
    /// Whether the block being built has a convolution yet.
    weighted: bool,
    sum: Option<TensorId>,
    out: Option<TensorId>,
}

impl Builder<'_> {
    fn push(&mut self, segment: Segment) {
        let kind = kind(self.graph, &segment);
        if kind == Kind::Scale && self.ends_activation(&segment) {
            return self.extend(segment);
        }
        if self.weighted && matches!(kind, Kind::Weights | Kind::Other) {
            self.close(vec![]);
        }
        match kind {
            Kind::Activation if self.weighted => {
                self.out = Some(segment.end);
                self.close(segment.ops);
                return;
            }
            Kind::Weights => self.weighted = true,
            Kind::Activation | Kind::Scale | Kind::Affine | Kind::Other => {}
        }
        self.sum = Some(segment.end);
        self.out = Some(segment.end);
    }

    /// Whether a segment directly follows an activation that is itself several ops.
    fn ends_activation(&self, segment: &Segment) -> bool {
        let last = self.blocks.last().filter(|block| block.closing.len() > 1);
        let first = segment.ops.first().map(|&op| self.graph.op(op));
        last.zip(first).is_some_and(|(block, op)| op.tensors().any(|tensor| tensor == block.out))
    }

    fn extend(&mut self, segment: Segment) {
        if let Some(block) = self.blocks.last_mut() {
            block.out = segment.end;
            block.closing.extend(segment.ops);
        }
    }

    fn close(&mut self, closing: Vec<OpId>) {
        if let (true, Some(sum), Some(out)) = (self.weighted, self.sum, self.out) {
            self.blocks.push(Block { sum, out, closing });
        }
        self.weighted = false;
    }
}
