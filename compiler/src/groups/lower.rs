//! Stage 2c: rewrite every op that works on parts into one op a part, with its slice of the weights.
//!
//! Takes a graph and its layouts; gives a graph in which every tensor belongs to one group or to
//! none, and where each part of each old tensor went. A grouped convolution becomes several smaller
//! ones that share the memory of its weights; joining and selecting channels along the borders of
//! parts costs no op at all. The new graph computes the same function.

use std::collections::HashMap;

use snn_schemas::onnx::{AttributeProto, TensorProto, attr_int};

use crate::graph::{
    Arg, ConstId, Graph, GroupId, Op, OpId, Tensor, TensorId, TensorSpec, const_elements,
    slice_const,
};
use crate::groups::layout::{Layout, Part};
use crate::groups::meaning::{Alignment, Meaning, align, const_shape, meaning};
use crate::rewrite;

/// Where the parts of a tensor went: one new tensor a part, a single one for a whole tensor.
pub(crate) type Pieces = HashMap<TensorId, Vec<TensorId>>;

/// Lowers `graph`.
pub(crate) fn lower(graph: &Graph, layouts: &[Layout]) -> (Graph, Pieces) {
    let mut lowerer =
        Lowerer { old: graph, layouts, new: Graph::new(graph.opset), pieces: HashMap::new() };
    lowerer.new.normalised = graph.normalised;
    for &input in &graph.inputs {
        let piece = lowerer.new.add_input(spec(graph.tensor(input)));
        lowerer.pieces.insert(input, vec![piece]);
    }
    for id in graph.order() {
        if graph.op(id).proto.is_some() {
            lowerer.lower_op(id);
        }
    }
    for (name, tensor) in &graph.outputs {
        let piece = lowerer.whole(*tensor);
        lowerer.new.outputs.push((name.clone(), piece));
    }
    (lowerer.new, lowerer.pieces)
}

fn spec(tensor: &Tensor) -> TensorSpec {
    TensorSpec { name: tensor.name.clone(), shape: tensor.shape.clone(), elem: tensor.elem }
}

/// What one new op of a lowered old op is about.
#[derive(Clone, Copy)]
struct Place {
    /// Which part of the result.
    index: usize,
    /// First channel of the part within the result.
    start: usize,
    part: Part,
    /// Parts of the result.
    of: usize,
}

impl Place {
    /// A name for the part's share of something: `conv1/g2`; the plain name where it has no siblings.
    fn name(&self, name: &str) -> String {
        match self.of {
            1 => name.to_owned(),
            _ => format!("{name}/{}", self.part.group),
        }
    }
}

struct Lowerer<'a> {
    old: &'a Graph,
    layouts: &'a [Layout],
    new: Graph,
    pieces: Pieces,
}

impl Lowerer<'_> {
    fn layout(&self, tensor: TensorId) -> &Layout {
        &self.layouts[tensor.0]
    }

    fn places(&self, tensor: TensorId) -> Vec<Place> {
        let parts = self.layout(tensor).parts();
        let mut end = 0;
        let place = |(index, part): (usize, &Part)| {
            end += part.channels;
            Place { index, start: end - part.channels, part: *part, of: parts.len() }
        };
        parts.iter().enumerate().map(place).collect()
    }

    fn lower_op(&mut self, id: OpId) {
        let op = self.old.op(id);
        let Some(&first) = op.outputs.first() else { return };
        match meaning(self.old, op) {
            _ if self.layout(first).parts().is_empty() => self.copy(op, None),
            Meaning::Concat => self.concat(op),
            Meaning::Repeat { times } if self.layout(first).is_shared() => self.repeat(op, times),
            Meaning::Select { ranges } if self.selects_parts(op) => self.select(op, &ranges),
            _ if !self.layout(first).is_shared() => self.copy(op, self.layout(first).only_group()),
            Meaning::Conv { groups } => self.conv(op, groups),
            meaning => self.per_part(op, &meaning),
        }
    }

    fn selects_parts(&self, op: &Op) -> bool {
        op.tensors().next().is_some_and(|tensor| !self.layout(tensor).parts().is_empty())
    }

    /// The op as it is, all of it in one group or in none.
    fn copy(&mut self, op: &Op, group: Option<GroupId>) {
        let inputs: Vec<Arg> = op
            .inputs
            .iter()
            .map(|arg| match arg {
                Arg::Tensor(tensor) => Arg::Tensor(self.whole(*tensor)),
                Arg::Const(id) => Arg::Const(self.share(*id)),
                Arg::Absent => Arg::Absent,
            })
            .collect();
        let outputs = op.outputs.iter().map(|&tensor| spec(self.old.tensor(tensor))).collect();
        let copy = Op { inputs, outputs: vec![], group, ..op.clone() };
        let id = self.new.add(copy, outputs);
        for (&old, &new) in op.outputs.iter().zip(&self.new.op(id).outputs.clone()) {
            self.pieces.insert(old, vec![new]);
        }
    }

    /// A constant of the old graph, in the new one.
    fn share(&mut self, id: ConstId) -> ConstId {
        self.new.add_const(self.old.constant(id).clone())
    }

    /// All channels of an old tensor in one new tensor, joined if need be.
    fn whole(&mut self, tensor: TensorId) -> TensorId {
        let pieces = self.pieces[&tensor].clone();
        match pieces[..] {
            [piece] => piece,
            _ => {
                let wanted = spec(self.old.tensor(tensor));
                rewrite::concat(&mut self.new, &pieces, wanted, None)
            }
        }
    }

    /// The channels `start .. start + length` of an old tensor as one new tensor, for `group`.
    fn channels(
        &mut self,
        tensor: TensorId,
        start: usize,
        length: usize,
        group: GroupId,
    ) -> TensorId {
        let pieces = self.pieces[&tensor].clone();
        let mut offset = 0;
        let mut found = Vec::new();
        for piece in pieces {
            let channels = self.new.tensor(piece).channels();
            let from = start.max(offset);
            let to = (start + length).min(offset + channels);
            if from < to {
                // A cut piece stays with the group that has it: only what is needed may travel.
                let owner = self.new.op(self.new.tensor(piece).producer).group.or(Some(group));
                found.push(rewrite::select(&mut self.new, piece, from - offset, to - from, owner));
            }
            offset += channels;
        }
        match found[..] {
            [only] => only,
            _ => {
                let name = format!("{}/{group}", self.old.tensor(tensor).name);
                let mut shape = self.old.tensor(tensor).shape.clone();
                shape[1] = length;
                let elem = self.old.tensor(tensor).elem;
                rewrite::concat(
                    &mut self.new,
                    &found,
                    TensorSpec { name, shape, elem },
                    Some(group),
                )
            }
        }
    }

    fn part_spec(&self, tensor: TensorId, place: Place) -> TensorSpec {
        let old = self.old.tensor(tensor);
        let mut shape = old.shape.clone();
        if let Some(channels) = shape.get_mut(1) {
            *channels = place.part.channels;
        }
        TensorSpec { name: place.name(&old.name), shape, elem: old.elem }
    }

    /// Adds the share of `op` that computes `place` of each result.
    fn add_share(
        &mut self,
        op: &Op,
        place: Place,
        inputs: Vec<Arg>,
        attributes: &[AttributeProto],
    ) {
        let mut proto = op.proto.clone().unwrap_or_default();
        proto.name = Some(place.name(op.name(self.old)));
        for attribute in attributes {
            match proto.attribute.iter_mut().find(|a| a.name == attribute.name) {
                Some(slot) => *slot = attribute.clone(),
                None => proto.attribute.push(attribute.clone()),
            }
        }
        let specs = op.outputs.iter().map(|&tensor| self.part_spec(tensor, place)).collect();
        let group = Some(place.part.group);
        let share = Op { proto: Some(proto), inputs, outputs: vec![], group, exchange: None };
        let id = self.new.add(share, specs);
        for (&old, &new) in op.outputs.iter().zip(&self.new.op(id).outputs.clone()) {
            self.pieces.entry(old).or_default().push(new);
        }
    }

    fn conv(&mut self, op: &Op, conv_groups: usize) {
        let (Some(&output), Some(input)) = (op.outputs.first(), op.tensors().next()) else {
            return;
        };
        let width = self.old.tensor(input).channels() / conv_groups;
        let out_width = self.old.tensor(output).channels() / conv_groups;
        for place in self.places(output) {
            let groups = place.part.channels / out_width;
            let first = place.start / out_width;
            let data = self.channels(input, first * width, groups * width, place.part.group);
            let mut inputs = vec![Arg::Tensor(data)];
            for arg in &op.inputs[1..] {
                inputs.push(self.const_share(*arg, 0, place));
            }
            let attribute = attr_int("group", groups as i64);
            self.add_share(op, place, inputs, &[attribute]);
        }
    }

    /// The part of a constant that belongs to `place`, along `axis`.
    fn const_share(&mut self, arg: Arg, axis: usize, place: Place) -> Arg {
        let Arg::Const(id) = arg else { return arg };
        let proto = self.old.constant(id);
        let name = place.name(proto.name());
        let slice = slice_const(proto, axis, place.start, place.part.channels, name);
        Arg::Const(self.new.add_const(slice))
    }

    /// An op that works on every part alone.
    fn per_part(&mut self, op: &Op, meaning: &Meaning) {
        let Some(&output) = op.outputs.first() else { return };
        for place in self.places(output) {
            let inputs = (0..op.inputs.len())
                .map(|slot| self.part_argument(op, slot, meaning, place))
                .collect();
            self.add_share(op, place, inputs, &[]);
        }
    }

    fn part_argument(&mut self, op: &Op, slot: usize, meaning: &Meaning, place: Place) -> Arg {
        let rank = op.outputs.first().map_or(0, |&t| self.old.tensor(t).shape.len());
        match op.inputs[slot] {
            Arg::Absent => Arg::Absent,
            Arg::Tensor(tensor) => {
                let shape = self.old.tensor(tensor).shape.clone();
                let aligned = align(&shape, rank);
                let elementwise = matches!(meaning, Meaning::Elementwise { .. });
                Arg::Tensor(match self.pieces[&tensor][..] {
                    // Ops that keep channels apart have the same parts in argument and result.
                    ref pieces if pieces.len() == place.of => pieces[place.index],
                    _ if elementwise && aligned == Alignment::Broadcast => self.whole(tensor),
                    _ => self.channels(tensor, place.start, place.part.channels, place.part.group),
                })
            }
            Arg::Const(id) => match meaning {
                Meaning::PerChannel => self.const_share(Arg::Const(id), 0, place),
                Meaning::Elementwise { .. } => match align(&const_shape(self.old, id), rank) {
                    Alignment::Channels { axis } => self.const_share(Arg::Const(id), axis, place),
                    Alignment::Broadcast => Arg::Const(self.share(id)),
                },
                // A reshape's target names the channels; a padding or a scale does not.
                _ if op.op_type() == "Reshape" && slot == 1 => {
                    let spec = op.outputs.first().map(|&tensor| self.part_spec(tensor, place));
                    let shape: Vec<i64> =
                        spec.map_or(vec![], |s| s.shape.iter().map(|&dim| dim as i64).collect());
                    let name = place.name(self.old.constant(id).name());
                    let target = TensorProto::i64(&name, &[shape.len() as i64], &shape);
                    Arg::Const(self.new.add_const(target))
                }
                _ => Arg::Const(self.share(id)),
            },
        }
    }

    /// Joins channels: where the pieces fall on the borders of parts nothing is computed.
    fn concat(&mut self, op: &Op) {
        let Some(&output) = op.outputs.first() else { return };
        let pieces: Vec<TensorId> = op
            .inputs
            .iter()
            .flat_map(|arg| match arg {
                Arg::Tensor(tensor) => self.pieces[tensor].clone(),
                Arg::Const(id) => vec![self.constant_piece(*id)],
                Arg::Absent => vec![],
            })
            .collect();
        let mut pieces = pieces.into_iter();
        for place in self.places(output) {
            let mut inside = Vec::new();
            let mut channels = 0;
            while channels < place.part.channels {
                let Some(piece) = pieces.next() else { break };
                channels += self.new.tensor(piece).channels();
                inside.push(piece);
            }
            let piece = match inside[..] {
                [only] => only,
                _ => {
                    let spec = self.part_spec(output, place);
                    rewrite::concat(&mut self.new, &inside, spec, Some(place.part.group))
                }
            };
            self.pieces.entry(output).or_default().push(piece);
        }
    }

    /// A constant among joined channels, as a tensor.
    fn constant_piece(&mut self, id: ConstId) -> TensorId {
        let proto = self.old.constant(id).clone();
        debug_assert!(const_elements(&proto) > 0, "an empty constant joins nothing");
        let spec = TensorSpec {
            name: format!("{}/value", proto.name()),
            shape: const_shape(self.old, id),
            elem: proto.data_type(),
        };
        let proto = Some(rewrite::constant(&spec.name, proto));
        let op = Op { proto, inputs: vec![], outputs: vec![], group: None, exchange: None };
        self.new.add_one(op, spec)
    }

    /// Repeats channels: every part is a copy that nothing needs to compute.
    fn repeat(&mut self, op: &Op, times: usize) {
        let (Some(&output), Some(input)) = (op.outputs.first(), op.tensors().next()) else {
            return;
        };
        let piece = self.whole(input);
        let places = self.places(output);
        let copies = times / places.len().max(1);
        for place in places {
            let piece = match copies {
                1 => piece,
                _ => {
                    let spec = self.part_spec(output, place);
                    let pieces = vec![piece; copies];
                    rewrite::concat(&mut self.new, &pieces, spec, Some(place.part.group))
                }
            };
            self.pieces.entry(output).or_default().push(piece);
        }
    }

    fn select(&mut self, op: &Op, ranges: &[(usize, usize)]) {
        let Some(input) = op.tensors().next() else { return };
        for (&output, &(start, _)) in op.outputs.iter().zip(ranges) {
            for place in self.places(output) {
                let from = start + place.start;
                let piece = self.channels(input, from, place.part.channels, place.part.group);
                self.pieces.entry(output).or_default().push(piece);
            }
        }
    }
}
