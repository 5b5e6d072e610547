//! What each op becomes: a blocked one where there is one, and otherwise itself.
//!
//! Rules are tried in turn; the first that fits wires the op's new form and says where its output is.

use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::array::{Slice, TypedConcat};
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::Conv as TractConv;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::math::Mul;
use tract_onnx::tract_core::ops::nn::{Reduce, Reducer};

use super::builder::{Blocked, Builder, Place};
use super::chain::Chain;
use super::facts::{concrete, constant, scalar};
use super::held::Held;
use super::ops::{Added, Fused, Scale, Sums};
use super::sum::Addition;
use crate::kernels::{Conv, ConvSpec, Sum, SumSpec};

/// Channels up to which a planar input is convolved as it is: an image's colours.
const FEW_CHANNELS: usize = 4;

impl Builder<'_> {
    /// Translates an op, whose inputs have been.
    pub(super) fn translate(&mut self, id: usize) -> TractResult<()> {
        if self.old.inputs.iter().any(|input| input.node == id) {
            return Ok(());
        }
        if let Some(chain) = self.chains.remove(&id) {
            return self.convolution(&chain);
        }
        if let Some(addition) = self.additions.remove(&id) {
            return self.addition(&addition);
        }
        if self.taken.contains(&id) {
            return Ok(());
        }
        self.alone(id)
    }

    /// Translates an op that nothing has swallowed.
    fn alone(&mut self, id: usize) -> TractResult<()> {
        let node = self.old.node(id);
        if self.slice(node)? || self.cast(node)? || self.concat(node)? {
            return Ok(());
        }
        if self.element_wise(node)? || self.scale(node)? || self.sums(node)? {
            return Ok(());
        }
        let inputs = node.inputs.iter().map(|&input| self.planar(input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let op: Box<dyn TypedOp> = match (node.op_as::<Held<TractConv>>(), held_slice(node)) {
            (Some(held), _) => Box::new(held.0.clone()),
            (None, Some(held)) => Box::new(held.clone()),
            (None, None) => node.op.clone(),
        };
        let outlets = self.wire(&node.name, op, &inputs)?;
        for (slot, outlet) in outlets.into_iter().enumerate() {
            let place = Place { planar: Some(outlet), blocked: None };
            self.put(OutletId::new(id, slot), place);
        }
        Ok(())
    }

    fn convolution(&mut self, chain: &Chain) -> TractResult<()> {
        let node = self.old.node(chain.conv);
        let held = node.op_as::<Held<TractConv>>().context("a chain without a convolution")?;
        let pools = &held.0.pool_spec;
        let input = node.inputs[0];
        let few = pools.input_channels <= FEW_CHANNELS && held.0.group == 1;
        let planar = few && self.place(input).blocked.is_none();
        let mut inputs: TVec<OutletId> = tvec![match planar {
            true => self.planar(input)?,
            false => self.blocked(input)?,
        }];
        for &addend in &chain.addends {
            inputs.push(self.blocked(addend)?);
        }
        let last = OutletId::new(chain.last(), 0);
        let halo = self.halo(last);
        let spec = ConvSpec {
            batch: chain.shape[0],
            input: pools.input_channels,
            output: pools.output_channels,
            groups: held.0.group,
            image: chain.image,
            margin: self.halo(input),
            kernel: [pools.kernel_shape[0], pools.kernel_shape[1]],
            stride: [pools.stride(0), pools.stride(1)],
            pads: chain.pads,
            halo,
            planar,
            activation: chain.activation,
        };
        let conv = Conv::new(spec, self.fusion.isa, &chain.weights, &chain.bias)?;
        let op = Fused { conv, workers: Arc::clone(&self.fusion.workers) };
        let mut shape = chain.shape.clone();
        let stored = halo.around([shape[2], shape[3]]);
        shape[2..].copy_from_slice(&stored);
        let shape = self.blocked_shape(&shape);
        let results = self.fusion.memory.results_within(f32::datum_type(), halo, &shape);
        let name = &self.old.node(last.node).name;
        let outlet = self.fill(name, op, results, &inputs)?;
        self.blocked_at(last, outlet, pools.output_channels);
        Ok(())
    }

    /// Tensors that are added in one pass, whether they are blocked or planar; where all of them are
    /// planar, tract adds them.
    fn addition(&mut self, addition: &Addition) -> TractResult<()> {
        let last = OutletId::new(addition.last(), 0);
        if !addition.terms.iter().any(|&term| self.is_only_blocked(term)) {
            self.halos.remove(&last);
            return addition.nodes.iter().try_for_each(|&id| self.alone(id));
        }
        let (mut inputs, mut planar): (TVec<OutletId>, _) = (tvec![], vec![]);
        for &term in &addition.terms {
            if self.place(term).blocked.is_some() {
                inputs.push(self.blocked(term)?);
                planar.push(None);
            } else {
                let (from, channels) = self.unpadded(term)?;
                inputs.push(self.planar(from)?);
                planar.push(Some(channels));
            }
        }
        let (mut shape, halo) = (addition.shape.clone(), self.halo(last));
        let spec = SumSpec {
            batch: shape[0],
            channels: shape[1],
            image: [shape[2], shape[3]],
            halo,
            activation: addition.activation,
        };
        let sum = Sum::new(spec, self.fusion.isa)?;
        let workers = Arc::clone(&self.fusion.workers);
        shape[2..].copy_from_slice(&halo.around(spec.image));
        let shape = self.blocked_shape(&shape);
        let results = self.fusion.memory.results_within(f32::datum_type(), halo, &shape);
        let name = &self.old.node(last.node).name;
        let outlet = self.fill(name, Added { sum, planar, workers }, results, &inputs)?;
        self.blocked_at(last, outlet, spec.channels);
        Ok(())
    }

    /// Channels taken out of a blocked tensor are there already.
    fn slice(&mut self, node: &TypedNode) -> TractResult<bool> {
        let slice = node.op_as::<Slice>().or_else(|| held_slice(node));
        let Some((slice, blocked)) = slice.zip(self.only_blocked(node)) else {
            return Ok(false);
        };
        let (Ok(start), Ok(end), 1) = (slice.start.to_usize(), slice.end.to_usize(), slice.axis)
        else {
            return Ok(false);
        };
        let (first, channels) = (blocked.first + start, end - start);
        let blocked = Some(Blocked { first, channels, ..blocked });
        self.put(node.id.into(), Place { planar: None, blocked });
        Ok(true)
    }

    /// A blocked tensor is rounded to f16 on its way to planes.
    fn cast(&mut self, node: &TypedNode) -> TractResult<bool> {
        let Some((cast, blocked)) = node.op_as::<Cast>().zip(self.only_blocked(node)) else {
            return Ok(false);
        };
        if cast.to != f16::datum_type() {
            return Ok(false);
        }
        let planar = Some(self.add_planes(node.id.into(), blocked, cast.to)?);
        self.put(node.id.into(), Place { planar, blocked: None });
        Ok(true)
    }

    /// Blocked tensors one behind the other, where each but the last ends with a block.
    fn concat(&mut self, node: &TypedNode) -> TractResult<bool> {
        if node.op_as::<TypedConcat>().is_none_or(|concat| concat.axis != 1) {
            return Ok(false);
        }
        let all_blocked = node.inputs.iter().all(|&input| self.place(input).blocked.is_some());
        let shape = self.shape(node.id.into());
        let (Ok(shape), true) = (shape, all_blocked) else { return Ok(false) };
        let (lanes, mut end) = (self.lanes(), 0);
        for &input in &node.inputs {
            if !usize::is_multiple_of(end, lanes) {
                return Ok(false);
            }
            end += self.shape(input)?[1];
        }
        let inputs = node.inputs.iter().map(|&input| self.blocked(input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let outlet = self.wire(&node.name, TypedConcat { axis: 1 }, &inputs)?[0];
        self.blocked_at(node.id.into(), outlet, shape[1]);
        Ok(true)
    }

    /// Ops that do the same to every element, wherever it stands.
    fn element_wise(&mut self, node: &TypedNode) -> TractResult<bool> {
        let [output] = &*node.outputs else { return Ok(false) };
        let Some(shape) = concrete(&output.fact).filter(|shape| shape.len() == 4) else {
            return Ok(false);
        };
        let is_float = output.fact.datum_type == f32::datum_type();
        let unary = node.op_is::<ElementWiseOp>();
        if !is_float || !unary && !node.op_is::<TypedBinOp>() {
            return Ok(false);
        }
        if !node.inputs.iter().any(|&input| self.is_only_blocked(input)) {
            return Ok(false);
        }
        let mut inputs: TVec<OutletId> = tvec![];
        for &input in &node.inputs {
            let fact = self.old.outlet_fact(input)?;
            let full = concrete(fact).is_some_and(|found| found == shape);
            if full && fact.datum_type == f32::datum_type() && fact.konst.is_none() {
                continue;
            }
            if constant(fact, shape[1]).is_none() {
                return Ok(false);
            }
        }
        for &input in &node.inputs {
            let fact = self.old.outlet_fact(input)?;
            let name = format!("{}.blocks", self.old.node(input.node).name);
            inputs.push(match constant(fact, shape[1]) {
                Some(numbers) => {
                    let mut numbers = numbers;
                    let blocks = shape[1].div_ceil(self.lanes());
                    numbers.resize(blocks * self.lanes(), numbers[0]);
                    let konst = Tensor::from_shape(&[1, blocks, 1, 1, self.lanes()], &numbers)?;
                    let konst = match scalar(fact) {
                        Some(number) => Tensor::from_shape(&[1; 5], &[number])?,
                        None => konst,
                    };
                    self.konst(&name, konst)?
                }
                None => self.blocked(input)?,
            });
        }
        let outlet = self.wire(&node.name, node.op.clone(), &inputs)?[0];
        self.blocked_at(node.id.into(), outlet, shape[1]);
        Ok(true)
    }

    /// A blocked tensor times one number for each of its channels, computed elsewhere.
    fn scale(&mut self, node: &TypedNode) -> TractResult<bool> {
        if !node.op_as::<TypedBinOp>().is_some_and(|op| op.0.is::<Mul>() && op.1.is_none()) {
            return Ok(false);
        }
        let &[one, other] = &*node.inputs else { return Ok(false) };
        let (full, factors) = if self.is_only_blocked(one) { (one, other) } else { (other, one) };
        let facts = (self.old.outlet_fact(full)?, self.old.outlet_fact(factors)?);
        let floats = [facts.0, facts.1].iter().all(|fact| fact.datum_type == f32::datum_type());
        let (Some(shape), Some(small)) = (concrete(facts.0), concrete(facts.1)) else {
            return Ok(false);
        };
        let expected: TVec<usize> = match &*shape {
            &[batch, channels, _, _] => tvec![batch, channels, 1, 1],
            _ => return Ok(false),
        };
        if !floats || !self.is_only_blocked(full) || small != expected || small == shape {
            return Ok(false);
        }
        let inputs = [self.blocked(full)?, self.blocked(factors)?];
        let op = Scale { pixels: shape[2] * shape[3], lanes: self.lanes() };
        let outlet = self.fill(&node.name, op, self.results(&shape), &inputs)?;
        self.blocked_at(node.id.into(), outlet, expected[1]);
        Ok(true)
    }

    /// Sums of a blocked tensor over its pixels: what a global average pool begins with.
    fn sums(&mut self, node: &TypedNode) -> TractResult<bool> {
        let is_sum = node
            .op_as::<Reduce>()
            .is_some_and(|reduce| reduce.reducer == Reducer::Sum && *reduce.axes == [2, 3]);
        if !is_sum || self.only_blocked(node).is_none() {
            return Ok(false);
        }
        let input = node.inputs[0];
        let shape = self.shape(input)?;
        let &[batch, channels, height, width] = &*shape else { return Ok(false) };
        let results = self.results(&[batch, channels, 1, 1]);
        let from = self.blocked(input)?;
        let op = Sums { pixels: height * width, lanes: self.lanes() };
        let outlet = self.fill(&node.name, op, results, &[from])?;
        self.blocked_at(node.id.into(), outlet, channels);
        Ok(true)
    }
}

fn held_slice(node: &TypedNode) -> Option<&Slice> {
    node.op_as::<Held<Slice>>().map(|held| &held.0)
}
