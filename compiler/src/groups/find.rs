//! Stage 2a: find on which tensors the channel axis falls into G independent parts.
//!
//! Takes a graph in normal form and G; gives a [`Layout`] a tensor, from the data flow alone. Parts
//! begin where channels are joined from G equal pieces, or where a convolution in a multiple of G
//! groups takes a whole tensor; they end where a single group is selected. An op that would need
//! several groups is an error that names it, unless it is a head that gathers pooled features.

use std::collections::BTreeSet;

use crate::error::CompileError;
use crate::graph::{Arg, Graph, GroupId, OpId, TensorId};
use crate::groups::layout::{Layout, Part};
use crate::groups::meaning::{Alignment, Meaning, align, meaning_of};

/// Finds a layout for every tensor.
///
/// # Errors
/// [`CompileError::Mixes`] names the first op that needs features of several groups.
pub(crate) fn find(graph: &Graph, groups: usize) -> Result<Vec<Layout>, CompileError> {
    let order = graph.order();
    let mut finder = Finder {
        graph,
        groups,
        wanted: wanted(graph, &order, groups),
        layouts: vec![Layout::Whole; graph.tensor_count()],
        gathered: BTreeSet::new(),
    };
    for &op in &order {
        finder.visit(op)?;
    }
    Ok(finder.layouts)
}

/// Tensors whose parts some grouped convolution will ask for, through ops that keep channels apart.
fn wanted(graph: &Graph, order: &[OpId], groups: usize) -> BTreeSet<TensorId> {
    let mut wanted = BTreeSet::new();
    for &id in order.iter().rev() {
        let op = graph.op(id);
        let passes = match meaning_of(graph, id) {
            Meaning::Conv { groups: own } => own > 1 && own % groups == 0,
            Meaning::Elementwise { .. } | Meaning::PerChannel | Meaning::Spatial => {
                op.outputs.iter().any(|tensor| wanted.contains(tensor))
            }
            _ => false,
        };
        if passes {
            wanted.extend(op.tensors());
        }
    }
    wanted
}

struct Finder<'a> {
    graph: &'a Graph,
    groups: usize,
    wanted: BTreeSet<TensorId>,
    layouts: Vec<Layout>,
    /// Whole tensors that depend on several groups, and the op that gathered them.
    gathered: BTreeSet<(TensorId, OpId)>,
}

impl Finder<'_> {
    fn visit(&mut self, id: OpId) -> Result<(), CompileError> {
        let op = self.graph.op(id);
        let layouts = self.outputs(id)?;
        let gather = self.gatherer(id, &layouts);
        if let Some(gather) = gather
            && layouts.iter().any(|layout| *layout != Layout::Whole)
        {
            return Err(self.mixes(gather));
        }
        for (&tensor, layout) in op.outputs.iter().zip(layouts) {
            self.layouts[tensor.0] = layout;
            self.gathered.extend(gather.map(|gather| (tensor, gather)));
        }
        Ok(())
    }

    /// The op that gathered groups on the way to this one, if any did.
    fn gatherer(&self, id: OpId, outputs: &[Layout]) -> Option<OpId> {
        let op = self.graph.op(id);
        let before = op.tensors().find_map(|tensor| {
            self.gathered.iter().find(|(t, _)| *t == tensor).map(|(_, gather)| *gather)
        });
        let shared = op.tensors().any(|tensor| self.layout(tensor).is_shared());
        let gathers = shared && outputs.iter().all(|layout| *layout == Layout::Whole);
        before.or(gathers.then_some(id))
    }

    fn layout(&self, tensor: TensorId) -> &Layout {
        &self.layouts[tensor.0]
    }

    /// Layouts of an op's results.
    fn outputs(&self, id: OpId) -> Result<Vec<Layout>, CompileError> {
        let op = self.graph.op(id);
        let inputs: Vec<&Layout> = op.tensors().map(|tensor| self.layout(tensor)).collect();
        let first = inputs.first().copied().unwrap_or(&Layout::Whole);
        let meaning = meaning_of(self.graph, id);
        let all_whole = inputs.iter().all(|layout| **layout == Layout::Whole);
        let layout = match meaning {
            Meaning::Concat => self.concat(id),
            Meaning::Repeat { times } => self.repeat(id, times),
            Meaning::Conv { groups } => self.conv(id, first, groups),
            Meaning::Select { ranges } if !all_whole => return self.select(id, first, &ranges),
            _ if all_whole => Some(Layout::Whole),
            Meaning::Elementwise { .. } => self.elementwise(id),
            Meaning::PerChannel | Meaning::Spatial => Some(first.clone()),
            Meaning::Flatten => Some(self.flatten(id, first)),
            Meaning::Select { .. } | Meaning::Opaque => None,
        };
        let layout = match layout {
            Some(layout) => layout,
            None => self.by_itself(id)?,
        };
        Ok(vec![layout; op.outputs.len()])
    }

    /// An op that is right only within one group, or on pooled features in the head.
    fn by_itself(&self, id: OpId) -> Result<Layout, CompileError> {
        let op = self.graph.op(id);
        let groups: BTreeSet<Option<GroupId>> = op
            .tensors()
            .filter(|&tensor| *self.layout(tensor) != Layout::Whole)
            .map(|tensor| self.layout(tensor).only_group())
            .collect();
        let channels = op.outputs.first().map_or(1, |&t| self.graph.tensor(t).channels());
        match groups.iter().collect::<Vec<_>>().as_slice() {
            [] => Ok(Layout::Whole),
            [Some(group)] => Ok(Layout::single(channels, *group)),
            // Once pooled, features are a few numbers a channel: gathering them costs next to nothing.
            _ if self.is_pooled(id) => Ok(Layout::Whole),
            _ => Err(self.mixes(id)),
        }
    }

    fn is_pooled(&self, id: OpId) -> bool {
        self.graph.op(id).tensors().all(|tensor| {
            let shape = &self.graph.tensor(tensor).shape;
            shape.iter().skip(2).all(|&dim| dim == 1)
        })
    }

    fn mixes(&self, id: OpId) -> CompileError {
        let op = self.graph.op(id);
        let detail = match meaning_of(self.graph, id) {
            Meaning::Conv { groups } => format!("Conv, group={groups}"),
            _ => op.op_type().to_owned(),
        };
        CompileError::Mixes { op: op.name(self.graph).to_owned(), groups: self.groups, detail }
    }

    fn conv(&self, id: OpId, input: &Layout, conv_groups: usize) -> Option<Layout> {
        let op = self.graph.op(id);
        let tensor = op.inputs.first()?.tensor()?;
        let width = self.graph.tensor(tensor).channels() / conv_groups.max(1);
        let channels = self.graph.tensor(*op.outputs.first()?).channels();
        match input.parts() {
            [] if conv_groups > 1 && conv_groups.is_multiple_of(self.groups) => {
                Some(Layout::even(channels, self.groups))
            }
            [] => Some(Layout::Whole),
            [part] => Some(Layout::single(channels, part.group)),
            parts => {
                // Each part must hold whole groups of the convolution.
                let fits = parts.iter().all(|part| width > 0 && part.channels % width == 0);
                let scale = |part: &Part| Part {
                    channels: part.channels / width * (channels / conv_groups),
                    group: part.group,
                };
                fits.then(|| Layout::Parts(parts.iter().map(scale).collect()))
            }
        }
    }

    fn flatten(&self, id: OpId, input: &Layout) -> Layout {
        let op = self.graph.op(id);
        let shape = op.tensors().next().map(|t| self.graph.tensor(t).shape.as_slice());
        let behind: usize = shape.unwrap_or_default().iter().skip(2).product();
        let widen = |part: &Part| Part { channels: part.channels * behind, group: part.group };
        Layout::Parts(input.parts().iter().map(widen).collect())
    }

    fn elementwise(&self, id: OpId) -> Option<Layout> {
        let op = self.graph.op(id);
        let output = self.graph.tensor(*op.outputs.first()?);
        let rank = output.shape.len();
        let spans = |&tensor: &TensorId| {
            let shape = &self.graph.tensor(tensor).shape;
            matches!(align(shape, rank), Alignment::Channels { axis: 1 }) && shape.len() == rank
        };
        let mut parted = op.tensors().filter(|&tensor| *self.layout(tensor) != Layout::Whole);
        // A part that broadcasts over the channels of others is a matter within one group.
        if !op.tensors().filter(|&t| *self.layout(t) != Layout::Whole).all(|t| spans(&t)) {
            return None;
        }
        let first = self.layout(parted.next()?).clone();
        let sizes = |layout: &Layout| layout.parts().iter().map(|p| p.channels).collect::<Vec<_>>();
        // Where the groups of two arguments differ the first decides: the other is received.
        parted.all(|tensor| sizes(self.layout(tensor)) == sizes(&first)).then_some(first)
    }

    /// The channels an op joins, in order: (channels, group).
    fn joined(&self, id: OpId) -> Vec<(usize, Option<GroupId>)> {
        let op = self.graph.op(id);
        let pieces = op.inputs.iter().flat_map(|arg| match arg {
            Arg::Tensor(tensor) => match self.layout(*tensor).parts() {
                [] => vec![(self.graph.tensor(*tensor).channels(), None)],
                parts => parts.iter().map(|part| (part.channels, Some(part.group))).collect(),
            },
            Arg::Const(id) => {
                let dims = &self.graph.constant(*id).dims;
                vec![(dims.get(1).map_or(1, |&dim| dim as usize), None)]
            }
            Arg::Absent => vec![],
        });
        pieces.collect()
    }

    fn concat(&self, id: OpId) -> Option<Layout> {
        let pieces = self.joined(id);
        let output = *self.graph.op(id).outputs.first()?;
        let total = self.graph.tensor(output).channels();
        let mut end = 0;
        let ends: BTreeSet<usize> = pieces
            .iter()
            .map(|(channels, _)| {
                end += channels;
                end
            })
            .collect();
        let groups: BTreeSet<GroupId> = pieces.iter().filter_map(|(_, group)| *group).collect();
        let even = total.is_multiple_of(self.groups)
            && (1..=self.groups).all(|group| ends.contains(&(group * (total / self.groups))));
        let starts = groups.is_empty() && self.wanted.contains(&output);
        match groups.len() {
            0 if !starts || !even => Some(Layout::Whole),
            1 => Some(Layout::single(total, *groups.first()?)),
            _ if even => Some(Layout::even(total, self.groups)),
            _ => None,
        }
    }

    fn repeat(&self, id: OpId, times: usize) -> Option<Layout> {
        let op = self.graph.op(id);
        let output = *op.outputs.first()?;
        let channels = self.graph.tensor(output).channels();
        let input = op.inputs.first()?.tensor().map(|tensor| self.layout(tensor));
        match input.map(|layout| (layout, layout.only_group())) {
            Some((_, Some(group))) => Some(Layout::single(channels, group)),
            Some((Layout::Parts(_), None)) => None,
            _ if times.is_multiple_of(self.groups) && self.wanted.contains(&output) => {
                Some(Layout::even(channels, self.groups))
            }
            _ => Some(Layout::Whole),
        }
    }

    fn select(
        &self,
        id: OpId,
        input: &Layout,
        ranges: &[(usize, usize)],
    ) -> Result<Vec<Layout>, CompileError> {
        let select = |&(start, length): &(usize, usize)| {
            let parts = cut(input.parts(), start, length);
            let single = Layout::Parts(parts.clone()).only_group();
            match single {
                Some(group) => Some(Layout::single(length, group)),
                None => (!parts.is_empty()).then_some(Layout::Parts(parts)),
            }
        };
        ranges.iter().map(|range| select(range).ok_or_else(|| self.mixes(id))).collect()
    }
}

/// The parts of the channels `start .. start + length`.
pub(crate) fn cut(parts: &[Part], start: usize, length: usize) -> Vec<Part> {
    let mut offset = 0;
    let mut cut = Vec::new();
    for part in parts {
        let from = start.max(offset);
        let to = (start + length).min(offset + part.channels);
        if from < to {
            cut.push(Part { channels: to - from, group: part.group });
        }
        offset += part.channels;
    }
    cut
}
