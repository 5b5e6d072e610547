//! A convolution and the ops behind it that become one.
//!
//! [`Chain::at`] starts with a held convolution of known weights; [`Chain::extend`] swallows what
//! follows as long as nobody else sees what lies between: additions and products of a number a channel
//! go into bias and weights, up to two tensors are added, and an activation ends it.

use std::collections::HashSet;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cnn::Conv as TractConv;
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::math::{Add, Div, Max, Min, Mul, Sub};
use tract_onnx::tract_core::ops::nn::{HardSwish, LeakyRelu};

use super::facts::{concrete, constant, elements, scalar};
use super::held::Held;
use crate::kernels::{Activation, Halo};

/// A convolution and what follows it, as found in a model.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub conv: usize,
    /// Ops it swallows, itself included.
    pub nodes: Vec<usize>,
    /// `[output, input / groups, height, width]`.
    pub weights: Vec<f32>,
    pub bias: Vec<f32>,
    pub addends: Vec<OutletId>,
    pub activation: Activation,
    /// Planar shape of its output.
    pub shape: TVec<usize>,
    pub image: [usize; 2],
    pub pads: Halo,
}

impl Chain {
    /// A held convolution whose weights are known.
    pub(super) fn at(model: &TypedModel, node: &TypedNode) -> Option<Chain> {
        let held = node.op_as::<Held<TractConv>>()?;
        let facts = model.node_input_facts(node.id).ok()?;
        let weights = facts[1].konst.as_ref()?;
        let bias = facts[2].konst.as_ref()?;
        let pools = &held.0.pool_spec;
        let input = concrete(facts[0])?;
        let pads = pools.computed_padding(&input[2..]);
        let bias = elements::<f32>(bias).ok()?;
        Some(Chain {
            conv: node.id,
            nodes: vec![node.id],
            weights: elements::<f32>(weights).ok()?.to_vec(),
            bias: match bias {
                [one] => vec![*one; pools.output_channels],
                all => all.to_vec(),
            },
            addends: vec![],
            activation: Activation::None,
            shape: concrete(&node.outputs[0].fact)?,
            image: [input[2], input[3]],
            pads: Halo {
                top: pads[0].pad_before,
                left: pads[1].pad_before,
                bottom: pads[0].pad_after,
                right: pads[1].pad_after,
            },
        })
    }

    /// The op whose output is the chain's.
    pub(super) fn last(&self) -> usize {
        self.nodes[self.nodes.len() - 1]
    }

    /// Swallows the ops that follow, as long as they fit and nobody else has.
    pub(super) fn extend(&mut self, model: &TypedModel, taken: &HashSet<usize>) {
        self.extend_straight(model, taken);
        if self.activation == Activation::None && self.hard_swish(model, taken).is_some() {
            self.activation = Activation::HardSwish;
        }
    }

    /// `x · clip(x + 3, 0, 6) / 6`, as exporters write it that have no HardSwish.
    fn hard_swish(&mut self, model: &TypedModel, taken: &HashSet<usize>) -> Option<()> {
        let x = self.last();
        if model.outputs.iter().any(|outlet| outlet.node == x) {
            return None;
        }
        let &[first, second] = &*model.node(x).outputs.first()?.successors else { return None };
        // An op of the kind wanted, applied to `of` and one number.
        let with = |node: &TypedNode, of: usize| -> Option<f32> {
            let slot = node.inputs.iter().position(|input| input.node == of)?;
            scalar(model.outlet_fact(*node.inputs.get(1 - slot)?).ok()?)
        };
        let next = |node: &TypedNode| model.single_succ(node.id).ok()?.map(|next| next.id);
        let is = |node: &TypedNode, kind: fn(&TypedBinOp) -> bool| {
            node.op_as::<TypedBinOp>().is_some_and(kind)
        };
        let nodes = [model.node(first.node), model.node(second.node)];
        let shifted = nodes.into_iter().find(|node| is(node, |op| op.0.is::<Add>()))?;
        let product = nodes.into_iter().find(|node| is(node, |op| op.0.is::<Mul>()))?;
        let low = model.node(next(shifted)?);
        let high = model.node(next(low)?);
        let whole = model.node(next(product)?);
        let bounds = is(low, |op| op.0.is::<Max>()) && is(high, |op| op.0.is::<Min>());
        let sixth = match with(whole, product.id)? {
            six if is(whole, |op| op.0.is::<Div>()) && whole.inputs[0].node == product.id => {
                1.0 / six
            }
            sixth if is(whole, |op| op.0.is::<Mul>()) => sixth,
            _ => return None,
        };
        let numbers = [with(shifted, x)?, with(low, shifted.id)?, with(high, low.id)?];
        let fits = bounds
            && next(high)? == product.id
            && numbers == [3.0, 0.0, 6.0]
            && (sixth - 1.0 / 6.0).abs() < 1e-6
            && concrete(&whole.outputs[0].fact)? == self.shape;
        let swallowed = [shifted.id, low.id, high.id, product.id, whole.id];
        let inner = &swallowed[..4];
        let is_seen = model.outputs.iter().any(|outlet| inner.contains(&outlet.node));
        if !fits || is_seen || swallowed.iter().any(|id| taken.contains(id)) {
            return None;
        }
        self.nodes.extend(swallowed);
        Some(())
    }

    fn extend_straight(&mut self, model: &TypedModel, taken: &HashSet<usize>) {
        while let Some(next) = self.successor(model).filter(|next| !taken.contains(&next.id)) {
            if self.swallow(model, next).is_none() {
                break;
            }
            self.nodes.push(next.id);
        }
    }

    fn successor<'a>(&self, model: &'a TypedModel) -> Option<&'a TypedNode> {
        let last = self.last();
        let is_output = model.outputs.iter().any(|outlet| outlet.node == last);
        model.single_succ(last).ok()?.filter(|_| !is_output)
    }

    fn swallow(&mut self, model: &TypedModel, next: &TypedNode) -> Option<()> {
        let channels = self.bias.len();
        if concrete(&next.outputs[0].fact)? != self.shape {
            return None;
        }
        if next.outputs[0].fact.datum_type != f32::datum_type() {
            return None;
        }
        if let Some(activation) = activated(model, next, self.last(), self.activation) {
            self.activation = activation;
            return Some(());
        }
        let op = &next.op_as::<TypedBinOp>()?.0;
        let slot = next.inputs.iter().position(|input| input.node != self.last())?;
        let other = next.inputs[slot];
        let fact = model.outlet_fact(other).ok()?;
        if self.activation != Activation::None {
            return None;
        }
        let numbers = constant(fact, channels);
        if let (Some(numbers), true) = (&numbers, op.is::<Add>()) {
            self.bias.iter_mut().zip(numbers).for_each(|(bias, number)| *bias += number);
            return Some(());
        }
        if let (Some(numbers), true, 1) = (&numbers, op.is::<Sub>(), slot) {
            self.bias.iter_mut().zip(numbers).for_each(|(bias, number)| *bias -= number);
            return Some(());
        }
        if let (Some(numbers), true, true) = (&numbers, op.is::<Mul>(), self.addends.is_empty()) {
            let each = self.weights.len() / channels;
            for (weights, number) in self.weights.chunks_exact_mut(each).zip(numbers) {
                weights.iter_mut().for_each(|weight| *weight *= number);
            }
            self.bias.iter_mut().zip(numbers).for_each(|(bias, number)| *bias *= number);
            return Some(());
        }
        let same = concrete(fact)? == self.shape && fact.datum_type == f32::datum_type();
        if op.is::<Add>() && same && fact.konst.is_none() && self.addends.len() < 2 {
            self.addends.push(other);
            return Some(());
        }
        None
    }
}

/// What becomes of `before`, the activation of the output of op `last`, if `next` applies another to
/// it and both together are one.
pub(super) fn activated(
    model: &TypedModel,
    next: &TypedNode,
    last: usize,
    before: Activation,
) -> Option<Activation> {
    if let Some(op) = next.op_as::<ElementWiseOp>().filter(|_| before == Activation::None) {
        return match op.0.downcast_ref::<LeakyRelu>() {
            Some(leaky) => Some(Activation::Leaky { slope: leaky.alpha }),
            None => op.0.is::<HardSwish>().then_some(Activation::HardSwish),
        };
    }
    let op = &next.op_as::<TypedBinOp>()?.0;
    let other = next.inputs.iter().find(|input| input.node != last)?;
    let bound = scalar(model.outlet_fact(*other).ok()?)?;
    match before {
        Activation::None if op.is::<Max>() => {
            Some(Activation::Clamp { low: bound, high: f32::INFINITY })
        }
        Activation::None if op.is::<Min>() => {
            Some(Activation::Clamp { low: f32::NEG_INFINITY, high: bound })
        }
        Activation::Clamp { low, high: f32::INFINITY } if op.is::<Min>() && low <= bound => {
            Some(Activation::Clamp { low, high: bound })
        }
        _ => None,
    }
}
