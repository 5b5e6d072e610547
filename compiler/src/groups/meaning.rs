//! What an op does to the channel axis, whatever the opset and exporter that wrote it.
//!
//! Takes an op of a graph in normal form; gives its [`Meaning`]. Finding the groups and lowering
//! the graph both decide by it alone, so that they cannot disagree. An op this file does not know
//! is [`Meaning::Opaque`]: right for one group by itself, wrong across groups.

use crate::graph::{Arg, ConstId, Graph, Op, OpId};

/// An op's effect on axis 1, the channels of `[batch, channels, …]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Channel i of the result depends on channel i of every argument, which broadcast.
    Elementwise {
        /// Whether it is an activation function: no weights, not linear.
        activation: bool,
    },
    /// As above, with parameters a channel in all arguments but the first (BatchNormalization).
    PerChannel,
    /// Works on each channel alone (pooling, padding, resizing, means over space).
    Spatial,
    /// Convolution in this many groups; its weights are constants.
    Conv {
        /// ONNX's `group` attribute.
        groups: usize,
    },
    /// Joins arguments along the channels.
    Concat,
    /// Repeats the channels of its first argument this many times.
    Repeat {
        /// How often.
        times: usize,
    },
    /// Takes these channels of the first argument, one range a result.
    Select {
        /// Start and length of each.
        ranges: Vec<(usize, usize)>,
    },
    /// Merges the channels with the axes behind them; a channel stays in one piece.
    Flatten,
    /// Anything else.
    Opaque,
}

/// The meaning of `op`.
pub(crate) fn meaning(graph: &Graph, op: &Op) -> Meaning {
    let reader = Reader { graph, op };
    if op.proto.as_ref().is_some_and(|proto| !matches!(proto.domain(), "" | "ai.onnx")) {
        return Meaning::Opaque;
    }
    match op.op_type() {
        "Relu" | "LeakyRelu" | "Clip" | "Sigmoid" | "HardSwish" | "HardSigmoid" | "Tanh"
        | "Elu" | "Selu" | "Celu" | "Gelu" | "Softplus" | "Softsign" | "Mish" | "PRelu"
        | "ThresholdedRelu" | "Swish" => Meaning::Elementwise { activation: true },
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" | "Sum" | "Mean" | "Neg" | "Abs"
        | "Exp" | "Log" | "Sqrt" | "Erf" | "Reciprocal" | "Floor" | "Ceil" | "Round" | "Sign"
        | "Cast" | "Identity" | "Dropout" => Meaning::Elementwise { activation: false },
        "BatchNormalization" | "InstanceNormalization" => reader.per_channel(),
        "MaxPool" | "AveragePool" | "LpPool" | "GlobalAveragePool" | "GlobalMaxPool"
        | "GlobalLpPool" => Meaning::Spatial,
        "Pad" => reader.pad(),
        "Resize" | "Upsample" => reader.resize(),
        "Conv" => reader.conv(),
        "Concat" if reader.axis("axis", None) == Some(1) => Meaning::Concat,
        "Tile" | "Expand" => reader.repeat(),
        "Slice" => reader.slice(),
        "Split" => reader.split(),
        "Flatten" | "Reshape" | "Squeeze" | "Unsqueeze" => reader.reshape(),
        "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceSum" | "ReduceL2" => reader.reduce(),
        _ => Meaning::Opaque,
    }
}

/// Convenience: the meaning of the op behind an id.
pub(crate) fn meaning_of(graph: &Graph, id: OpId) -> Meaning {
    meaning(graph, graph.op(id))
}

struct Reader<'a> {
    graph: &'a Graph,
    op: &'a Op,
}

impl Reader<'_> {
    fn shape(&self, input: usize) -> Option<&[usize]> {
        let tensor = self.op.inputs.get(input)?.tensor()?;
        Some(&self.graph.tensor(tensor).shape)
    }

    fn output_shape(&self) -> Option<&[usize]> {
        Some(&self.graph.tensor(*self.op.outputs.first()?).shape)
    }

    /// Integers given as a constant argument, or in older op sets as an attribute.
    fn integers(&self, input: usize, attribute: &str) -> Option<Vec<i64>> {
        match self.op.inputs.get(input) {
            Some(Arg::Const(id)) => self.graph.constant(*id).to_i64().ok(),
            Some(Arg::Tensor(_)) => None,
            Some(Arg::Absent) | None => self.op.ints(attribute).map(<[i64]>::to_vec),
        }
    }

    /// An axis attribute, counted from the front.
    fn axis(&self, name: &str, default: Option<i64>) -> Option<usize> {
        let rank = self.shape(0).or_else(|| self.output_shape())?.len();
        normal(self.op.int(name).or(default)?, rank)
    }

    fn all_constant(&self, inputs: impl IntoIterator<Item = usize>) -> bool {
        inputs.into_iter().all(|index| !matches!(self.op.inputs.get(index), Some(Arg::Tensor(_))))
    }

    fn per_channel(&self) -> Meaning {
        match self.all_constant(1..self.op.inputs.len()) {
            true => Meaning::PerChannel,
            false => Meaning::Opaque,
        }
    }

    fn conv(&self) -> Meaning {
        let groups = self.op.int("group").unwrap_or(1);
        match usize::try_from(groups) {
            Ok(groups) if groups > 0 && self.all_constant([1, 2]) => Meaning::Conv { groups },
            _ => Meaning::Opaque,
        }
    }

    fn pad(&self) -> Meaning {
        // Pads of axis k stand at k and rank + k. An `axes` argument names spatial ones or gives up.
        let Some(pads) = self.integers(1, "pads") else { return Meaning::Opaque };
        let rank = pads.len() / 2;
        let axes = self.integers(3, "axes").unwrap_or_else(|| (0..rank as i64).collect());
        let total = self.shape(0).map_or(0, <[usize]>::len);
        let touches_channels = axes.iter().enumerate().any(|(position, axis)| {
            let padded = [position, rank + position].iter().any(|&k| pads.get(k) != Some(&0));
            padded && normal(*axis, total).is_none_or(|axis| axis < 2)
        });
        if touches_channels { Meaning::Opaque } else { Meaning::Spatial }
    }

    fn resize(&self) -> Meaning {
        let keeps =
            |index: usize| Some(self.shape(0)?.get(index)? == self.output_shape()?.get(index)?);
        match (keeps(0), keeps(1), self.all_constant(1..self.op.inputs.len())) {
            (Some(true), Some(true), true) => Meaning::Spatial,
            _ => Meaning::Opaque,
        }
    }

    fn repeat(&self) -> Meaning {
        let (Some(from), Some(to)) = (self.shape(0), self.output_shape()) else {
            return Meaning::Opaque;
        };
        // An Expand repeats a channel axis of 1 only; a Tile any.
        let same = |axis: usize| from.get(axis) == to.get(axis);
        let others_stay =
            from.len() == to.len() && (0..to.len()).all(|axis| axis == 1 || same(axis));
        match (from.get(1), to.get(1)) {
            (Some(&from), Some(&to)) if others_stay && from > 0 => {
                Meaning::Repeat { times: to / from }
            }
            _ => Meaning::Opaque,
        }
    }

    fn slice(&self) -> Meaning {
        let (Some(shape), Some(output)) = (self.shape(0), self.output_shape()) else {
            return Meaning::Opaque;
        };
        let Some(starts) = self.integers(1, "starts") else { return Meaning::Opaque };
        let axes = match self.op.inputs.get(3) {
            Some(Arg::Tensor(_)) => return Meaning::Opaque,
            _ => self.integers(3, "axes").unwrap_or_else(|| (0..starts.len() as i64).collect()),
        };
        let steps = self.integers(4, "steps").unwrap_or_else(|| vec![1; starts.len()]);
        // Exporters list axes that are taken whole, too: what counts is what is cut.
        let cut = |axis: usize| shape.get(axis) != output.get(axis);
        let straight = steps.iter().all(|&step| step == 1);
        if shape.len() != output.len() || (cut(0) && shape.len() > 1) || !straight {
            return Meaning::Opaque;
        }
        let channel = axes.iter().position(|&axis| normal(axis, shape.len()) == Some(1));
        let (Some(at), true) = (channel, cut(1)) else { return Meaning::Spatial };
        let Some(&start) = starts.get(at).filter(|_| !(2..shape.len()).any(cut)) else {
            return Meaning::Opaque;
        };
        let channels = shape[1] as i64;
        let start = if start < 0 { start + channels } else { start }.clamp(0, channels);
        Meaning::Select { ranges: vec![(start as usize, output[1])] }
    }

    fn split(&self) -> Meaning {
        match self.axis("axis", Some(0)) {
            Some(0) | None => Meaning::Opaque,
            Some(1) => {
                let sizes = self.op.outputs.iter().map(|t| self.graph.tensor(*t).channels());
                let ranges = sizes.scan(0, |start, length| {
                    *start += length;
                    Some((*start - length, length))
                });
                Meaning::Select { ranges: ranges.collect() }
            }
            Some(_) => Meaning::Spatial,
        }
    }

    fn reshape(&self) -> Meaning {
        let (Some(from), Some(to)) = (self.shape(0), self.output_shape()) else {
            return Meaning::Opaque;
        };
        if from.len() < 2 || to.len() < 2 || from[0] != to[0] || !self.all_constant([1]) {
            return Meaning::Opaque;
        }
        let behind: usize = from[2..].iter().product();
        if from[1] == to[1] {
            Meaning::Spatial
        } else if to.len() == 2 && to[1] == from[1] * behind {
            Meaning::Flatten
        } else {
            Meaning::Opaque
        }
    }

    fn reduce(&self) -> Meaning {
        let Some(shape) = self.shape(0) else { return Meaning::Opaque };
        let axes = self.integers(1, "axes");
        let spatial = axes.is_some_and(|axes| {
            axes.iter().all(|&axis| normal(axis, shape.len()).is_some_and(|axis| axis >= 2))
        });
        if spatial { Meaning::Spatial } else { Meaning::Opaque }
    }
}

/// An axis counted from the front, if it is one.
fn normal(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < rank)
}

/// How an argument of an elementwise op lines up with the channels of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alignment {
    /// One value for all channels.
    Broadcast,
    /// A value a channel, on this axis of the argument.
    Channels {
        /// The axis.
        axis: usize,
    },
}

/// Lines up an argument of shape `shape` with a result of rank `rank` by ONNX's broadcasting.
pub(crate) fn align(shape: &[usize], rank: usize) -> Alignment {
    // Axes are matched from the back: the result's axis 1 is the argument's 1 − (rank − its rank).
    match (shape.len() + 1).checked_sub(rank) {
        Some(axis) if shape.get(axis).is_some_and(|&dim| dim != 1) => Alignment::Channels { axis },
        _ => Alignment::Broadcast,
    }
}

/// The shape of a constant.
pub(crate) fn const_shape(graph: &Graph, id: ConstId) -> Vec<usize> {
    graph.constant(id).dims.iter().map(|&dim| usize::try_from(dim).unwrap_or(0)).collect()
}
