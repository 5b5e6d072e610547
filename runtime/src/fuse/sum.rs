//! Additions and the activation behind them that become one.
//!
//! [`Addition::at`] starts with an addition of two whole tensors, or with the activation of one;
//! [`Addition::extend`] swallows what follows as long as nobody else sees what lies between. Tensors are added in
//! the model's order.

use std::collections::HashSet;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::math::Add;

use super::chain::activated;
use super::facts::concrete;
use crate::kernels::{Activation, MOST_TERMS};

/// Tensors of one shape that are added, as found in a model.
#[derive(Clone, Debug)]
pub(super) struct Addition {
    /// Ops it swallows, in order.
    pub nodes: Vec<usize>,
    pub terms: Vec<OutletId>,
    pub activation: Activation,
    /// Planar shape.
    pub shape: TVec<usize>,
}

impl Addition {
    /// An addition, or an activation.
    pub(super) fn at(model: &TypedModel, node: &TypedNode) -> Option<Addition> {
        let shape = concrete(&node.outputs.first()?.fact).filter(|shape| shape.len() == 4)?;
        let mut addition = Addition {
            nodes: vec![node.id],
            terms: node.inputs.to_vec(),
            activation: Activation::None,
            shape,
        };
        let is_f32 = node.outputs[0].fact.datum_type == f32::datum_type();
        if !is_f32 || node.outputs.len() != 1 {
            return None;
        }
        if !is_addition(node) {
            let whole = node.inputs.iter().find(|input| addition.is_whole(model, **input))?;
            addition.activation = activated(model, node, whole.node, Activation::None)?;
            addition.terms = vec![*whole];
        }
        let whole = |term: &OutletId| addition.is_whole(model, *term);
        addition.terms.iter().all(whole).then_some(addition)
    }

    /// The op whose output is the sum.
    pub(super) fn last(&self) -> usize {
        self.nodes[self.nodes.len() - 1]
    }

    /// Swallows the ops that follow, as long as they fit and nobody else has.
    pub(super) fn extend(&mut self, model: &TypedModel, taken: &HashSet<usize>) {
        loop {
            let last = self.last();
            let is_output = model.outputs.iter().any(|outlet| outlet.node == last);
            let next = model.single_succ(last).ok().flatten().filter(|_| !is_output);
            let Some(next) = next.filter(|next| !taken.contains(&next.id)) else { return };
            if self.swallow(model, next).is_none() {
                return;
            }
            self.nodes.push(next.id);
        }
    }

    fn swallow(&mut self, model: &TypedModel, next: &TypedNode) -> Option<()> {
        let output = &next.outputs.first()?.fact;
        if concrete(output)? != self.shape || output.datum_type != f32::datum_type() {
            return None;
        }
        if let Some(activation) = activated(model, next, self.last(), self.activation) {
            self.activation = activation;
            return Some(());
        }
        let other = next.inputs.iter().find(|input| input.node != self.last())?;
        let fits = is_addition(next)
            && self.activation == Activation::None
            && self.terms.len() < MOST_TERMS
            && self.is_whole(model, *other);
        fits.then(|| self.terms.push(*other))
    }

    /// Whether a tensor is one of f32 of the sum's shape, not known beforehand.
    fn is_whole(&self, model: &TypedModel, tensor: OutletId) -> bool {
        model.outlet_fact(tensor).is_ok_and(|fact| {
            concrete(fact).is_some_and(|shape| shape == self.shape)
                && fact.datum_type == f32::datum_type()
                && fact.konst.is_none()
        })
    }
}

fn is_addition(node: &TypedNode) -> bool {
    node.op_as::<TypedBinOp>().is_some_and(|op| op.0.is::<Add>() && op.1.is_none())
}
