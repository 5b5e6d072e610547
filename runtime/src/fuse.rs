//! tract's convolutions, replaced by the kernels of this crate.
//!
//! [`hold`] goes through a typed model before tract declutters it and keeps tract from rewriting
//! convolutions into products. [`fuse`] takes the decluttered model and gives the same computation in
//! which a convolution, its bias and scale, up to two tensors added to it and its activation are one
//! op on blocked tensors (see [`crate::kernels`]), and in which tensors are turned from planar to
//! blocked and back only where an op without a blocked form needs it. What the kernels don't cover is
//! given back to tract.
//!
//! A blocked tensor is an f32 one of shape `[batch, blocks, height, width, lanes]`. Results differ from
//! tract's by the order of additions only; casts to f16 round to nearest even, as tract's do.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, PoisonError};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::array::{Pad, PadMode, Slice, TypedConcat};
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cast::Cast;
use tract_onnx::tract_core::ops::cnn::{Conv as TractConv, KernelFormat};
use tract_onnx::tract_core::ops::element_wise::ElementWiseOp;
use tract_onnx::tract_core::ops::math::{Add, Div, Max, Min, Mul, Sub};
use tract_onnx::tract_core::ops::nn::{DataFormat, HardSwish, LeakyRelu, Reduce, Reducer};

use crate::kernels::{Activation, Conv, ConvSpec, Halo, Isa, Planar, Workers, block, unblock};

/// Channels up to which a planar input is convolved as it is: an image's colours.
const FEW_CHANNELS: usize = 4;

/// How a model is fused.
#[derive(Clone)]
pub(crate) struct Fusion {
    /// Which kernels.
    pub isa: Isa,
    /// Who runs them.
    pub workers: Arc<dyn Workers + Send>,
    /// Where results are kept.
    pub memory: Memory,
}

/// Which tensors at a model's edge are blocked: their channels, or `None`.
pub(crate) type Edges = Vec<Option<usize>>;

/// Tensors of finished computations, for the next ones: nothing is allocated once every shape has
/// been met as often as it is needed at once.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    shelves: Arc<Mutex<Shelves>>,
}

/// A shelf for each type and shape.
type Shelves = HashMap<(DatumType, TVec<usize>), Shelf>;

/// Tensors of one type and shape. Those that nobody else holds are free.
type Shelf = Arc<Mutex<Vec<Arc<Tensor>>>>;

impl Memory {
    fn shelf(&self, datum: DatumType, shape: &[usize]) -> Shelf {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shelves.entry((datum, shape.into())).or_default())
    }
}

/// Results of one op: their type, their shape, and where free ones stand.
#[derive(Clone)]
struct Results {
    datum: DatumType,
    shape: TVec<usize>,
    shelf: Shelf,
}

impl Results {
    fn new(memory: &Memory, datum: DatumType, shape: &[usize]) -> Results {
        Results { datum, shape: shape.into(), shelf: memory.shelf(datum, shape) }
    }

    fn fact(&self) -> TypedFact {
        self.datum.fact(&*self.shape)
    }

    /// A tensor that `fill` has filled. What it held before is of no meaning.
    fn filled(&self, fill: impl FnOnce(&mut Tensor) -> TractResult<()>) -> TractResult<TValue> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let free = shelf.iter_mut().position(|tensor| Arc::get_mut(tensor).is_some());
        let at = match free {
            Some(at) => at,
            None => {
                shelf.push(Arc::new(Tensor::zero_dt(self.datum, &self.shape)?));
                shelf.len() - 1
            }
        };
        let tensor = Arc::get_mut(&mut shelf[at]).context("a free tensor is held elsewhere")?;
        fill(tensor)?;
        Ok(TValue::from_const(Arc::clone(&shelf[at])))
    }
}

fn elements<T: Datum>(tensor: &Tensor) -> TractResult<&[T]> {
    tensor.try_as_plain_ram()?.as_slice::<T>()
}

/// A convolution that tract leaves alone until [`fuse`] has seen it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held(TractConv);

impl Op for Held {
    fn name(&self) -> StaticName {
        "HeldConv".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        self.0.info()
    }

    op_as_typed_op!();
}

impl EvalOp for Held {
    op_out_of_plan!();

    fn eval(&self, ctx: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.0.eval(ctx, inputs)
    }
}

impl TypedOp for Held {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        self.0.output_facts(inputs)
    }

    as_op!();
}

/// Keeps tract from rewriting the convolutions that the kernels may cover.
pub(crate) fn hold(model: &mut TypedModel) {
    for node in &mut model.nodes {
        let Some(conv) = node.op_as::<TractConv>() else { continue };
        let pools = &conv.pool_spec;
        let covered = conv.q_params.is_none()
            && pools.rank() == 2
            && pools.data_format == DataFormat::NCHW
            && conv.kernel_fmt == KernelFormat::OIHW
            && pools.dilations().iter().all(|&dilation| dilation == 1)
            && node.outputs.iter().all(|output| {
                output.fact.datum_type == f32::datum_type()
                    && output.fact.shape.as_concrete().is_some()
            });
        if covered {
            node.op = Box::new(Held(conv.clone()));
        }
    }
}

/// Bias, sums and activation around a blocked convolution.
#[derive(Clone)]
struct Fused {
    conv: Arc<Conv>,
    workers: Arc<dyn Workers + Send>,
    results: Results,
}

impl Debug for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.conv.spec())
    }
}

impl PartialEq for Fused {
    fn eq(&self, other: &Fused) -> bool {
        Arc::ptr_eq(&self.conv, &other.conv)
    }
}

impl Eq for Fused {}

impl Op for Fused {
    fn name(&self) -> StaticName {
        "BlockedConv".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{self:?}")])
    }

    fn validation(&self) -> Validation {
        Validation::Rounding
    }

    op_as_typed_op!();
}

impl EvalOp for Fused {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let [input, addends @ ..] = &*inputs else { bail!("a convolution without an input") };
        let input = elements::<f32>(input)?;
        let addends = addends.iter().map(|addend| elements::<f32>(addend));
        let addends = addends.collect::<TractResult<TVec<&[f32]>>>()?;
        let output = self.results.filled(|output| {
            let mut output = output.try_as_plain_ram_mut()?;
            let output = output.as_slice_mut::<f32>()?;
            self.conv.run(input, &addends, output, &*self.workers)?;
            Ok(())
        })?;
        Ok(tvec!(output))
    }
}

impl TypedOp for Fused {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

/// Planar to blocked, from f32 or f16.
#[derive(Clone)]
struct ToBlocks {
    channels: usize,
    results: Results,
}

/// Blocked to planar, to f32 or f16: `channels` of them from `first` on.
#[derive(Clone)]
struct ToPlanes {
    first: usize,
    channels: usize,
    lanes: usize,
    results: Results,
}

impl Debug for ToBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} channels", self.channels)
    }
}

impl PartialEq for ToBlocks {
    fn eq(&self, other: &ToBlocks) -> bool {
        self.channels == other.channels && self.results.shape == other.results.shape
    }
}

impl Eq for ToBlocks {}

impl Debug for ToPlanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "channels {}+{} as {:?}", self.first, self.channels, self.results.datum)
    }
}

impl PartialEq for ToPlanes {
    fn eq(&self, other: &ToPlanes) -> bool {
        let key = |op: &ToPlanes| (op.first, op.lanes, op.results.datum, op.results.shape.clone());
        key(self) == key(other)
    }
}

impl Eq for ToPlanes {}

impl Op for ToBlocks {
    fn name(&self) -> StaticName {
        "ToBlocks".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ToBlocks {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let shape = &self.results.shape;
        let from = match input.datum_type() == f16::datum_type() {
            true => Planar::F16(elements::<f16>(&input)?),
            false => Planar::F32(elements::<f32>(&input)?),
        };
        let output = self.results.filled(|output| {
            let mut output = output.try_as_plain_ram_mut()?;
            let sizes = [shape[0], self.channels, shape[2] * shape[3]];
            block(from, sizes, output.as_slice_mut::<f32>()?, shape[4])?;
            Ok(())
        })?;
        Ok(tvec!(output))
    }
}

impl TypedOp for ToBlocks {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

impl Op for ToPlanes {
    fn name(&self) -> StaticName {
        "ToPlanes".into()
    }

    op_as_typed_op!();
}

impl EvalOp for ToPlanes {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let from = elements::<f32>(&input)?;
        let sizes = [input.shape()[0], self.channels, input.shape()[2..4].iter().product()];
        let (first, lanes) = (self.first, self.lanes);
        let output = self.results.filled(|output| {
            let datum = output.datum_type();
            let mut output = output.try_as_plain_ram_mut()?;
            match datum == f16::datum_type() {
                true => unblock(from, first, sizes, output.as_slice_mut::<f16>()?, lanes)?,
                false => unblock(from, first, sizes, output.as_slice_mut::<f32>()?, lanes)?,
            }
            Ok(())
        })?;
        Ok(tvec!(output))
    }
}

impl TypedOp for ToPlanes {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

/// A blocked tensor times a number for each channel, itself blocked.
#[derive(Clone)]
struct Scale {
    results: Results,
}

/// Sums over all pixels of each channel of a blocked tensor.
#[derive(Clone)]
struct Sums {
    results: Results,
}

impl Debug for Scale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.results.shape)
    }
}

impl PartialEq for Scale {
    fn eq(&self, other: &Scale) -> bool {
        self.results.shape == other.results.shape
    }
}

impl Eq for Scale {}

impl Debug for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.results.shape)
    }
}

impl PartialEq for Sums {
    fn eq(&self, other: &Sums) -> bool {
        self.results.shape == other.results.shape
    }
}

impl Eq for Sums {}

impl Op for Scale {
    fn name(&self) -> StaticName {
        "BlockedScale".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Scale {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (input, factors) = args_2!(inputs);
        let shape = &self.results.shape;
        let (pixels, lanes) = (shape[2] * shape[3], shape[4]);
        let (from, factors) = (elements::<f32>(&input)?, elements::<f32>(&factors)?);
        let output = self.results.filled(|output| {
            let mut output = output.try_as_plain_ram_mut()?;
            let to = output.as_slice_mut::<f32>()?.chunks_exact_mut(pixels * lanes);
            let blocks = from.chunks_exact(pixels * lanes).zip(factors.chunks_exact(lanes));
            for (to, (from, factors)) in to.zip(blocks) {
                for (to, from) in to.chunks_exact_mut(lanes).zip(from.chunks_exact(lanes)) {
                    for ((to, from), factor) in to.iter_mut().zip(from).zip(factors) {
                        *to = from * factor;
                    }
                }
            }
            Ok(())
        })?;
        Ok(tvec!(output))
    }
}

impl TypedOp for Scale {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

impl Op for Sums {
    fn name(&self) -> StaticName {
        "BlockedSums".into()
    }

    op_as_typed_op!();
}

impl EvalOp for Sums {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let input = args_1!(inputs);
        let lanes = self.results.shape[4];
        let pixels: usize = input.shape()[2..4].iter().product();
        let from = elements::<f32>(&input)?;
        let output = self.results.filled(|output| {
            let mut output = output.try_as_plain_ram_mut()?;
            let to = output.as_slice_mut::<f32>()?.chunks_exact_mut(lanes);
            for (to, from) in to.zip(from.chunks_exact(pixels * lanes)) {
                to.fill(0.0);
                for from in from.chunks_exact(lanes) {
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
            Ok(())
        })?;
        Ok(tvec!(output))
    }
}

impl TypedOp for Sums {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(tvec!(self.results.fact()))
    }

    as_op!();
}

/// A convolution and what follows it, as found in a model.
#[derive(Clone, Debug)]
struct Chain {
    conv: usize,
    /// Ops it swallows, itself included.
    nodes: Vec<usize>,
    /// `[output, input / groups, height, width]`.
    weights: Vec<f32>,
    bias: Vec<f32>,
    addends: Vec<OutletId>,
    activation: Activation,
    /// Planar shape of its output.
    shape: TVec<usize>,
    image: [usize; 2],
    pads: Halo,
}

/// The numbers of a constant, if it is one of `n` f32 along the channel axis, or of one.
fn constant(fact: &TypedFact, channels: usize) -> Option<Vec<f32>> {
    let konst = fact.konst.as_ref().filter(|konst| konst.datum_type() == f32::datum_type())?;
    let numbers = elements::<f32>(konst).ok()?;
    let shape = konst.shape();
    match numbers.len() {
        1 => Some(vec![numbers[0]; channels]),
        n if n == channels && shape.len() == 4 && shape[1] == n => Some(numbers.to_vec()),
        _ => None,
    }
}

/// Its one number, where it has no other.
fn scalar(fact: &TypedFact) -> Option<f32> {
    constant(fact, 1).map(|numbers| numbers[0])
}

fn concrete(fact: &TypedFact) -> Option<TVec<usize>> {
    fact.shape.as_concrete().map(Into::into)
}

impl Chain {
    /// A held convolution whose weights are known.
    fn at(model: &TypedModel, node: &TypedNode) -> Option<Chain> {
        let held = node.op_as::<Held>()?;
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

    fn last(&self) -> usize {
        self.nodes[self.nodes.len() - 1]
    }

    /// Swallows the ops that follow, as long as they fit and nobody else has.
    fn extend(&mut self, model: &TypedModel, taken: &HashSet<usize>) {
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
        let is_linear = self.activation == Activation::None;
        if let Some(op) = next.op_as::<ElementWiseOp>().filter(|_| is_linear) {
            self.activation = match op.0.downcast_ref::<LeakyRelu>() {
                Some(leaky) => Activation::Leaky { slope: leaky.alpha },
                None if op.0.is::<HardSwish>() => Activation::HardSwish,
                None => return None,
            };
            return Some(());
        }
        let op = &next.op_as::<TypedBinOp>()?.0;
        let slot = next.inputs.iter().position(|input| input.node != self.last())?;
        let other = next.inputs[slot];
        let fact = model.outlet_fact(other).ok()?;
        let bound = scalar(fact);
        if let (Some(low), true, true) = (bound, op.is::<Max>(), is_linear) {
            self.activation = Activation::Clamp { low, high: f32::INFINITY };
            return Some(());
        }
        if let (Some(bound), true) = (bound, op.is::<Min>()) {
            self.activation = match self.activation {
                Activation::None => Activation::Clamp { low: f32::NEG_INFINITY, high: bound },
                Activation::Clamp { low, high: f32::INFINITY } if low <= bound => {
                    Activation::Clamp { low, high: bound }
                }
                _ => return None,
            };
            return Some(());
        }
        if !is_linear {
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

/// Where a tensor of the old model is in the new one: planar, blocked or both.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    planar: Option<OutletId>,
    blocked: Option<Blocked>,
}

/// Channels of a blocked tensor.
#[derive(Clone, Copy, Debug)]
struct Blocked {
    outlet: OutletId,
    first: usize,
    channels: usize,
}

/// A model under translation.
struct Builder<'a> {
    old: &'a TypedModel,
    new: TypedModel,
    fusion: &'a Fusion,
    places: HashMap<OutletId, Place>,
    /// Chains by their last op.
    chains: HashMap<usize, Chain>,
    /// Ops that a chain swallows.
    taken: HashSet<usize>,
}

/// Fuses `model`, whose inputs `inputs` are blocked; gives the new model and which of its outputs are
/// blocked, among those for which `free` says that they may be.
///
/// # Errors
/// What tract says of the new model.
pub(crate) fn fuse(
    model: &TypedModel,
    fusion: &Fusion,
    inputs: &Edges,
    free: &[bool],
) -> TractResult<(TypedModel, Edges)> {
    let order = model.eval_order()?;
    let mut builder = Builder {
        old: model,
        new: TypedModel { symbols: model.symbols.clone(), ..TypedModel::default() },
        fusion,
        places: HashMap::new(),
        chains: HashMap::new(),
        taken: HashSet::new(),
    };
    builder.find_chains(&order);
    builder.sources(inputs)?;
    for &id in &order {
        builder.translate(id).with_context(|| format!("fusing {}", model.node(id)))?;
    }
    builder.finish(free)
}

impl Builder<'_> {
    fn find_chains(&mut self, order: &[usize]) {
        for &id in order {
            let Some(mut chain) = Chain::at(self.old, self.old.node(id)) else { continue };
            chain.extend(self.old, &self.taken);
            self.taken.extend(&chain.nodes);
            self.chains.insert(chain.last(), chain);
        }
    }

    fn lanes(&self) -> usize {
        self.fusion.isa.lanes()
    }

    fn blocked_shape(&self, planar: &[usize]) -> TVec<usize> {
        let lanes = self.lanes();
        tvec![planar[0], planar[1].div_ceil(lanes), planar[2], planar[3], lanes]
    }

    fn wire(
        &mut self,
        name: &str,
        op: impl Into<Box<dyn TypedOp>>,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        let name = self.new.unique_name(name);
        self.new.wire_node(name, op, inputs)
    }

    fn sources(&mut self, inputs: &Edges) -> TractResult<()> {
        for (at, &outlet) in self.old.inputs.iter().enumerate() {
            let fact = self.old.outlet_fact(outlet)?;
            let name = self.old.node(outlet.node).name.clone();
            let channels = inputs.get(at).copied().flatten();
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

    fn place(&self, old: OutletId) -> Place {
        self.places.get(&old).copied().unwrap_or_default()
    }

    fn shape(&self, old: OutletId) -> TractResult<TVec<usize>> {
        concrete(self.old.outlet_fact(old)?).context("a shape is not fixed")
    }

    /// The tensor as tract knows it.
    fn planar(&mut self, old: OutletId) -> TractResult<OutletId> {
        let place = self.place(old);
        if let Some(planar) = place.planar {
            return Ok(planar);
        }
        let blocked = place.blocked.context("a tensor is used before it is made")?;
        let outlet = self.add_planes(old, blocked, f32::datum_type())?;
        self.places.entry(old).or_default().planar = Some(outlet);
        Ok(outlet)
    }

    fn add_planes(
        &mut self,
        old: OutletId,
        Blocked { outlet, first, channels }: Blocked,
        datum: DatumType,
    ) -> TractResult<OutletId> {
        let mut shape = self.shape(old)?;
        shape[1] = channels;
        let results = Results::new(&self.fusion.memory, datum, &shape);
        let op = ToPlanes { first, channels, lanes: self.lanes(), results };
        let name = format!("{}.planes", self.old.node(old.node).name);
        Ok(self.wire(&name, op, &[outlet])?[0])
    }

    /// The tensor in blocks, from channel 0 on.
    fn blocked(&mut self, old: OutletId) -> TractResult<OutletId> {
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
        let results =
            Results::new(&self.fusion.memory, f32::datum_type(), &self.blocked_shape(&shape));
        let outlet = self.wire(&name, ToBlocks { channels, results }, &[from])?[0];
        self.blocked_at(old, outlet, shape[1]);
        Ok(outlet)
    }

    fn blocked_at(&mut self, old: OutletId, outlet: OutletId, channels: usize) {
        let blocked = Some(Blocked { outlet, first: 0, channels });
        self.places.entry(old).or_default().blocked = blocked;
    }

    /// What turns into the same blocked tensor with less work: a tensor before its channels were
    /// padded with zeros, before it was cast from f16.
    fn unpadded(&self, old: OutletId) -> TractResult<(OutletId, usize)> {
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

    fn translate(&mut self, id: usize) -> TractResult<()> {
        let node = self.old.node(id);
        if self.old.inputs.iter().any(|input| input.node == id) {
            return Ok(());
        }
        if let Some(chain) = self.chains.remove(&id) {
            return self.convolution(&chain);
        }
        if self.taken.contains(&id) || self.slice(node)? || self.cast(node)? || self.concat(node)? {
            return Ok(());
        }
        if self.element_wise(node)? || self.scale(node)? || self.sums(node)? {
            return Ok(());
        }
        let inputs = node.inputs.iter().map(|&input| self.planar(input));
        let inputs = inputs.collect::<TractResult<TVec<OutletId>>>()?;
        let op = match node.op_as::<Held>() {
            Some(held) => Box::new(held.0.clone()),
            None => node.op.clone(),
        };
        let outlets = self.wire(&node.name, op, &inputs)?;
        for (slot, outlet) in outlets.into_iter().enumerate() {
            let place = Place { planar: Some(outlet), blocked: None };
            self.places.insert(OutletId::new(id, slot), place);
        }
        Ok(())
    }

    fn convolution(&mut self, chain: &Chain) -> TractResult<()> {
        let node = self.old.node(chain.conv);
        let held = node.op_as::<Held>().context("a chain without a convolution")?;
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
        let spec = ConvSpec {
            batch: chain.shape[0],
            input: pools.input_channels,
            output: pools.output_channels,
            groups: held.0.group,
            image: chain.image,
            kernel: [pools.kernel_shape[0], pools.kernel_shape[1]],
            stride: [pools.stride(0), pools.stride(1)],
            pads: chain.pads,
            halo: Halo::default(),
            planar,
            activation: chain.activation,
        };
        let conv = Conv::new(spec, self.fusion.isa, &chain.weights, &chain.bias)?;
        let shape = self.blocked_shape(&chain.shape);
        let op = Fused {
            conv: Arc::new(conv),
            workers: Arc::clone(&self.fusion.workers),
            results: Results::new(&self.fusion.memory, f32::datum_type(), &shape),
        };
        let last = OutletId::new(chain.last(), 0);
        let outlet = self.wire(&self.old.node(last.node).name, op, &inputs)?[0];
        self.blocked_at(last, outlet, pools.output_channels);
        Ok(())
    }

    /// The only input's blocked form, where it has no planar one.
    fn only_blocked(&self, node: &TypedNode) -> Option<Blocked> {
        let place = self.place(*node.inputs.first()?);
        place.blocked.filter(|_| place.planar.is_none())
    }

    /// Channels taken out of a blocked tensor are there already.
    fn slice(&mut self, node: &TypedNode) -> TractResult<bool> {
        let Some((slice, blocked)) = node.op_as::<Slice>().zip(self.only_blocked(node)) else {
            return Ok(false);
        };
        let (Ok(start), Ok(end), 1) = (slice.start.to_usize(), slice.end.to_usize(), slice.axis)
        else {
            return Ok(false);
        };
        let (first, channels) = (blocked.first + start, end - start);
        let blocked = Some(Blocked { first, channels, ..blocked });
        self.places.insert(node.id.into(), Place { planar: None, blocked });
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
        self.places.insert(node.id.into(), Place { planar, blocked: None });
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
                    let name = self.new.unique_name(name);
                    self.new.add_const(name, konst)?
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
        let shape = self.blocked_shape(&shape);
        let results = Results::new(&self.fusion.memory, f32::datum_type(), &shape);
        let inputs = [self.blocked(full)?, self.blocked(factors)?];
        let outlet = self.wire(&node.name, Scale { results }, &inputs)?[0];
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
        let &[batch, channels, _, _] = &*shape else { return Ok(false) };
        let shape = self.blocked_shape(&[batch, channels, 1, 1]);
        let results = Results::new(&self.fusion.memory, f32::datum_type(), &shape);
        let from = self.blocked(input)?;
        let outlet = self.wire(&node.name, Sums { results }, &[from])?[0];
        self.blocked_at(node.id.into(), outlet, channels);
        Ok(true)
    }

    fn is_only_blocked(&self, old: OutletId) -> bool {
        let place = self.place(old);
        place.blocked.is_some() && place.planar.is_none()
    }

    fn finish(mut self, free: &[bool]) -> TractResult<(TypedModel, Edges)> {
        let mut outputs = Vec::new();
        let mut edges = Vec::new();
        for (at, &outlet) in self.old.outputs.iter().enumerate() {
            let channels = self.place(outlet).blocked.map(|blocked| blocked.channels);
            let stays = free.get(at).is_some_and(|&free| free) && self.is_only_blocked(outlet);
            edges.push(channels.filter(|_| stays));
            outputs.push(match stays {
                true => self.blocked(outlet)?,
                false => self.planar(outlet)?,
            });
        }
        self.new.select_output_outlets(&outputs)?;
        self.new.declutter()?;
        Ok((self.new, edges))
    }
}

/// Whether zeros are put behind the channels, and nowhere else.
fn pads_channels_behind(pad: &Pad) -> bool {
    let PadMode::Constant(value) = &pad.mode else { return false };
    let elsewhere = pad.pads.iter().enumerate().filter(|(axis, _)| *axis != 1);
    value.is_zero().unwrap_or(false)
        && pad.pads.get(1).is_some_and(|(before, _)| *before == 0)
        && elsewhere.map(|(_, pads)| pads).all(|pads| *pads == (0, 0))
}

#[cfg(test)]
mod tests;
