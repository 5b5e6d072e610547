//! A model under translation: where each tensor of the old one is in the new one.
//!
//! A tensor is planar, blocked or both. [`Builder::planar`] and [`Builder::blocked`] give it in the
//! form asked for and convert it, once, where it exists only in the other.

use std::collections::{HashMap, HashSet};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::array::{Pad, PadMode, Slice};
use tract_onnx::tract_core::ops::cast::Cast;

use super::chain::Chain;
use super::facts::concrete;
use super::join::join;
use super::memory::Results;
use super::ops::{Compute, ToBlocks, ToPlanes};
use super::run::Run;
use super::sum::Addition;
use super::{Around, Edges, Fusion};
use crate::kernels::Halo;

/// Where a tensor of the old model is in the new one: planar, blocked or both.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    pub planar: Option<OutletId>,
    pub blocked: Option<Blocked>,
}

/// Channels of a blocked tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocked {
    pub outlet: OutletId,
    /// Where they begin.
    pub first: usize,
    pub channels: usize,
}

/// A model under translation.
pub(super) struct Builder<'a> {
    pub old: &'a TypedModel,
    pub fusion: &'a Fusion,
    /// Chains by their last op.
    pub chains: HashMap<usize, Chain>,
    /// Sums by their last op.
    pub additions: HashMap<usize, Addition>,
    /// Ops that a chain or a sum swallows.
    pub taken: HashSet<usize>,
    /// Zeros around the outputs of chains and sums.
    pub halos: HashMap<OutletId, Halo>,
    new: TypedModel,
    places: HashMap<OutletId, Place>,
}

impl<'a> Builder<'a> {
    /// A builder that has found the chains of `model`, whose ops run in `order`.
    pub(super) fn new(model: &'a TypedModel, fusion: &'a Fusion, order: &[usize]) -> Builder<'a> {
        let mut builder = Builder {
            old: model,
            fusion,
            chains: HashMap::new(),
            additions: HashMap::new(),
            taken: HashSet::new(),
            halos: HashMap::new(),
            new: TypedModel { symbols: model.symbols.clone(), ..TypedModel::default() },
            places: HashMap::new(),
        };
        builder.find_chains(order);
        builder.find_halos();
        builder
    }

    fn find_chains(&mut self, order: &[usize]) {
        for &id in order {
            let Some(mut chain) = Chain::at(self.old, self.old.node(id)) else { continue };
            chain.extend(self.old, &self.taken);
            self.taken.extend(&chain.nodes);
            self.chains.insert(chain.last(), chain);
        }
        for &id in order {
            if self.taken.contains(&id) {
                continue;
            }
            let Some(mut addition) = Addition::at(self.old, self.old.node(id)) else { continue };
            addition.extend(self.old, &self.taken);
            self.taken.extend(&addition.nodes);
            self.additions.insert(addition.last(), addition);
        }
    }

    pub(super) fn lanes(&self) -> usize {
        self.fusion.isa.lanes()
    }

    pub(super) fn blocked_shape(&self, planar: &[usize]) -> TVec<usize> {
        let lanes = self.lanes();
        tvec![planar[0], planar[1].div_ceil(lanes), planar[2], planar[3], lanes]
    }

    pub(super) fn wire(
        &mut self,
        name: &str,
        op: impl Into<Box<dyn TypedOp>>,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        let name = self.new.unique_name(name);
        self.new.wire_node(name, op, inputs)
    }

    /// Wires an op of this crate.
    pub(super) fn fill(
        &mut self,
        name: &str,
        compute: impl Compute + 'static,
        results: Results,
        inputs: &[OutletId],
    ) -> TractResult<OutletId> {
        let run = Run::one(self.fusion, compute, results, inputs.len());
        Ok(self.wire(name, run, inputs)?[0])
    }

    /// An output that only convolutions read is stored with the zeros that they pad it with.
    fn find_halos(&mut self) {
        let pads: HashMap<usize, Halo> =
            self.chains.values().map(|chain| (chain.conv, chain.pads)).collect();
        for &last in self.chains.keys().chain(self.additions.keys()) {
            let outlet = OutletId::new(last, 0);
            let readers = self.old.node(last).outputs[0].successors.iter();
            let pads = readers.map(|reader| pads.get(&reader.node).filter(|_| reader.slot == 0));
            let Some(pads) = pads.collect::<Option<Vec<&Halo>>>() else { continue };
            if !self.old.outputs.contains(&outlet) {
                let halo = pads.into_iter().fold(Halo::default(), |halo, pads| halo.max(*pads));
                self.halos.insert(outlet, halo);
            }
        }
    }

    /// Zeros that a blocked tensor is stored with.
    pub(super) fn halo(&self, old: OutletId) -> Halo {
        self.halos.get(&old).copied().unwrap_or_default()
    }

    /// Blocked results for a tensor of the planar shape given.
    pub(super) fn results(&self, planar: &[usize]) -> Results {
        self.fusion.memory.results(f32::datum_type(), &self.blocked_shape(planar))
    }

    /// Adds the model's inputs.
    ///
    /// # Errors
    /// What tract says of them.
    pub(super) fn sources(&mut self, blocked: &[Option<usize>]) -> TractResult<()> {
        for (at, &outlet) in self.old.inputs.iter().enumerate() {
            let fact = self.old.outlet_fact(outlet)?;
            let name = self.old.node(outlet.node).name.clone();
            let channels = blocked.get(at).copied().flatten();
            let place = match (channels, concrete(fact)) {
                (Some(channels), Some(shape)) => {
                    let fact = f32::fact(&*self.blocked_shape(&shape));
                    let outlet = self.new.add_source(name, fact)?;
                    let blocked = Some(Blocked { outlet, first: 0, channels });
                    Place { planar: None, blocked }
                }
                _ => {
                    Place { planar: Some(self.new.add_source(name, fact.clone())?), blocked: None }
                }
            };
            self.places.insert(outlet, place);
        }
        Ok(())
    }

    /// A constant of the new model.
    pub(super) fn konst(&mut self, name: &str, konst: Tensor) -> TractResult<OutletId> {
        let name = self.new.unique_name(name);
        self.new.add_const(name, konst)
    }

    /// Says where a tensor of the old model is.
    pub(super) fn put(&mut self, old: OutletId, place: Place) {
        self.places.insert(old, place);
    }

    pub(super) fn place(&self, old: OutletId) -> Place {
        self.places.get(&old).copied().unwrap_or_default()
    }

    pub(super) fn shape(&self, old: OutletId) -> TractResult<TVec<usize>> {
        concrete(self.old.outlet_fact(old)?).context("a shape is not fixed")
    }

    /// The tensor as tract knows it.
    pub(super) fn planar(&mut self, old: OutletId) -> TractResult<OutletId> {
        let place = self.place(old);
        if let Some(planar) = place.planar {
            return Ok(planar);
        }
        let blocked = place.blocked.context("a tensor is used before it is made")?;
        let outlet = self.add_planes(old, blocked, f32::datum_type())?;
        self.places.entry(old).or_default().planar = Some(outlet);
        Ok(outlet)
    }

    pub(super) fn add_planes(
        &mut self,
        old: OutletId,
        Blocked { outlet, first, channels }: Blocked,
        datum: DatumType,
    ) -> TractResult<OutletId> {
        let mut shape = self.shape(old)?;
        shape[1] = channels;
        let results = self.fusion.memory.results(datum, &shape);
        let name = format!("{}.planes", self.old.node(old.node).name);
        let op = ToPlanes { first, sizes: sizes(&shape), isa: self.fusion.isa };
        self.fill(&name, op, results, &[outlet])
    }

    /// The tensor in blocks, from channel 0 on.
    pub(super) fn blocked(&mut self, old: OutletId) -> TractResult<OutletId> {
        let lanes = self.lanes();
        let name = format!("{}.blocks", self.old.node(old.node).name);
        if let Some(blocked) = self.place(old).blocked {
            let blocks = blocked.channels.div_ceil(lanes);
            if blocked.first == 0
                && self.new.outlet_fact(blocked.outlet)?.shape[1] == blocks.to_dim()
            {
                return Ok(blocked.outlet);
            }
            if blocked.first.is_multiple_of(lanes) {
                let first = blocked.first / lanes;
                let op = Slice::new(1, first, first + blocks);
                let outlet = self.wire(&name, op, &[blocked.outlet])?[0];
                self.blocked_at(old, outlet, blocked.channels);
                return Ok(outlet);
            }
        }
        let shape = self.shape(old)?;
        let (from, channels) = self.unpadded(old)?;
        let from = self.planar(from)?;
        let results = self.results(&shape);
        let sizes = [shape[0], channels, shape[2] * shape[3]];
        let op = ToBlocks { sizes, isa: self.fusion.isa };
        let outlet = self.fill(&name, op, results, &[from])?;
        self.blocked_at(old, outlet, shape[1]);
        Ok(outlet)
    }

    pub(super) fn blocked_at(&mut self, old: OutletId, outlet: OutletId, channels: usize) {
        let blocked = Some(Blocked { outlet, first: 0, channels });
        self.places.entry(old).or_default().blocked = blocked;
    }

    /// What turns into the same blocked tensor with less work: a tensor before its channels were
    /// padded with zeros, before it was cast from f16.
    pub(super) fn unpadded(&self, old: OutletId) -> TractResult<(OutletId, usize)> {
        let mut at = old;
        let mut node = self.old.node(at.node);
        if node.op_as::<Pad>().is_some_and(pads_channels_behind) {
            at = node.inputs[0];
            node = self.old.node(at.node);
        }
        if let Some(cast) = node.op_as::<Cast>() {
            let from = self.old.outlet_fact(node.inputs[0])?;
            if cast.to == f32::datum_type() && from.datum_type == f16::datum_type() {
                at = node.inputs[0];
            }
        }
        Ok((at, self.shape(at)?[1]))
    }

    /// The only input's blocked form, where it has no planar one.
    pub(super) fn only_blocked(&self, node: &TypedNode) -> Option<Blocked> {
        let place = self.place(*node.inputs.first()?);
        place.blocked.filter(|_| place.planar.is_none())
    }

    pub(super) fn is_only_blocked(&self, old: OutletId) -> bool {
        let place = self.place(old);
        place.blocked.is_some() && place.planar.is_none()
    }

    pub(super) fn finish(mut self, around: &Around<'_>) -> TractResult<(TypedModel, Edges)> {
        let mut outputs = Vec::new();
        let mut blocked = Vec::new();
        for (at, &outlet) in self.old.outputs.iter().enumerate() {
            let channels = self.place(outlet).blocked.map(|blocked| blocked.channels);
            let stays =
                around.free.get(at).is_some_and(|&free| free) && self.is_only_blocked(outlet);
            blocked.push(channels.filter(|_| stays));
            outputs.push(match stays {
                true => self.blocked(outlet)?,
                false => self.planar(outlet)?,
            });
        }
        self.new.select_output_outlets(&outputs)?;
        self.new.declutter()?;
        Ok((join(&self.new, self.fusion, around.ending)?, blocked))
    }
}

/// Images, channels and pixels of a planar shape.
fn sizes(planar: &[usize]) -> [usize; 3] {
    [planar[0], planar[1], planar[2] * planar[3]]
}

/// Whether zeros are put behind the channels, and nowhere else.
fn pads_channels_behind(pad: &Pad) -> bool {
    let PadMode::Constant(value) = &pad.mode else { return false };
    let elsewhere = pad.pads.iter().enumerate().filter(|(axis, _)| *axis != 1);
    value.is_zero().unwrap_or(false)
        && pad.pads.get(1).is_some_and(|(before, _)| *before == 0)
        && elsewhere.map(|(_, pads)| pads).all(|pads| *pads == (0, 0))
}
