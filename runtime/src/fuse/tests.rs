//! A fused segment against stock tract: residual blocks, exchanges, and what is left to tract.

#![allow(clippy::unwrap_used, reason = "a test may end in a panic")]

use bytes::{Bytes, BytesMut};
use snn_schemas::metadata::{RECV_OP, SEND_OP, SNN_DOMAIN};
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, attr_float, attr_int,
    attr_ints, attr_string, encode,
};

use std::sync::Arc;

use tract_onnx::prelude::*;

use super::*;
use crate::TractEngine;
use crate::engine::{Engine as _, Executor};
use crate::shard::{Shard, Step};

#[path = "../../tests/fixtures/mod.rs"]
mod fixtures;

fn numbers(seed: usize, count: usize) -> Vec<f32> {
    let number = |at: usize| {
        let mut z = ((seed * 7919 + at + 1) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(number).collect()
}

/// A model, op by op.
#[derive(Default)]
struct Net {
    graph: GraphProto,
}

impl Net {
    fn input(mut self, name: &str, shape: &[i64]) -> Net {
        self.graph.input.push(ValueInfoProto::tensor(name, DataType::Float, shape));
        self
    }

    /// States a tensor's type, as shards do for those that outlive a segment.
    fn typed(mut self, name: &str, datum: DataType, shape: &[i64]) -> Net {
        self.graph.value_info.push(ValueInfoProto::tensor(name, datum, shape));
        self
    }

    fn constant(&mut self, name: &str, shape: &[i64], spread: f32) {
        let count = shape.iter().product::<i64>() as usize;
        let seed = self.graph.initializer.len();
        let data: Vec<f32> = numbers(seed, count).into_iter().map(|x| x * spread).collect();
        self.graph.initializer.push(TensorProto::f32(name, shape, &data));
    }

    fn op(
        mut self,
        kind: &str,
        inputs: &[&str],
        output: &str,
        attributes: &[AttributeProto],
    ) -> Net {
        let mut node = NodeProto::new(kind, output, inputs, &[output]);
        node.attribute = attributes.to_vec();
        if matches!(kind, SEND_OP | RECV_OP) {
            node.domain = Some(SNN_DOMAIN.to_owned());
        }
        self.graph.node.push(node);
        self
    }

    /// Channels taken and given, groups; size and stride of the kernel.
    fn conv(mut self, x: &str, y: &str, [i, o, g]: [i64; 3], [k, s]: [i64; 2]) -> Net {
        let (w, b) = (format!("{y}.w"), format!("{y}.b"));
        self.constant(&w, &[o, i / g, k, k], (3.0 / (i / g * k * k) as f32).sqrt());
        self.constant(&b, &[o], 0.1);
        let pad = k / 2;
        let attributes = [
            attr_ints("kernel_shape", &[k, k]),
            attr_ints("strides", &[s, s]),
            attr_ints("pads", &[pad; 4]),
            attr_int("group", g),
        ];
        self.op("Conv", &[x, &w, &b], y, &attributes)
    }

    fn norm(mut self, x: &str, y: &str, channels: i64) -> Net {
        let names = ["scale", "shift", "mean"].map(|what| format!("{y}.{what}"));
        for name in &names {
            self.constant(name, &[channels], 1.0);
        }
        let var = format!("{y}.var");
        let vars = vec![0.5; channels as usize];
        self.graph.initializer.push(TensorProto::f32(&var, &[channels], &vars));
        let [scale, shift, mean] = &names;
        self.op("BatchNormalization", &[x, scale, shift, mean, &var], y, &[])
    }

    fn indices(mut self, name: &str, data: &[i64]) -> Net {
        let shape = [data.len() as i64];
        self.graph.initializer.push(TensorProto::i64(name, &shape, data));
        self
    }

    fn shard(mut self, outputs: &[&str]) -> Shard {
        for name in outputs {
            let output = ValueInfoProto { name: Some((*name).to_owned()), ..Default::default() };
            self.graph.output.push(output);
        }
        Shard::from_bytes(fixtures::shard(self.graph).into()).unwrap()
    }
}

fn transfer(id: i64, shape: &[i64]) -> [AttributeProto; 4] {
    [
        attr_int("transfer", id),
        attr_int("peer", 1),
        attr_string("dtype", "f16"),
        attr_ints("shape", shape),
    ]
}

/// What leaves a shard, its sends and then its outputs, for each of the inputs that `seeds` name, which are
/// computed together, step by step.
fn run(executor: &mut dyn Executor, shard: &Shard, seeds: &[usize]) -> Vec<Vec<(bool, Bytes)>> {
    let program = shard.program();
    let jobs: Vec<_> = seeds.iter().map(|_| executor.begin()).collect();
    let mut left = vec![vec![]; jobs.len()];
    let read = |executor: &mut dyn Executor, job, slot, is_half| {
        let mut bytes = BytesMut::new();
        executor.read(job, slot, &mut bytes).unwrap();
        (is_half, bytes.freeze())
    };
    for (&job, seed) in jobs.iter().zip(seeds) {
        for &slot in &program.inputs {
            let count = program.slot(slot).shape.as_ref().unwrap().iter().product();
            let bytes: Vec<u8> =
                numbers(*seed, count).iter().flat_map(|x| x.to_le_bytes()).collect();
            executor.write(job, slot, &bytes).unwrap();
        }
    }
    for step in &program.steps {
        for (&job, left) in jobs.iter().zip(&mut left) {
            match step {
                Step::Compute(segment) => executor.compute(job, *segment).unwrap(),
                Step::Send(crossing) => left.push(read(executor, job, crossing.slot, true)),
                Step::Receive(crossing) => {
                    let halves = numbers(7, crossing.bytes / 2);
                    let halves = halves.into_iter().map(f16::from_f32);
                    let bytes: Vec<u8> = halves.flat_map(f16::to_le_bytes).collect();
                    executor.write(job, crossing.slot, &bytes).unwrap();
                }
            }
        }
    }
    for (&job, left) in jobs.iter().zip(&mut left) {
        for &slot in &program.outputs {
            left.push(read(executor, job, slot, false));
        }
        executor.end(job);
    }
    left
}

fn widened((is_half, bytes): &(bool, Bytes)) -> Vec<f32> {
    let half = |x: &[u8]| f16::from_le_bytes([x[0], x[1]]).to_f32();
    let full = |x: &[u8]| f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
    match is_half {
        true => bytes.chunks_exact(2).map(half).collect(),
        false => bytes.chunks_exact(4).map(full).collect(),
    }
}

/// Every instruction set and number of threads gives what stock tract does.
fn equals_stock(shard: &Shard) {
    let run_one = |mut engine: TractEngine| {
        run(&mut *engine.load(shard.program()).unwrap(), shard, &[99]).remove(0)
    };
    let stock = run_one(TractEngine::stock(1));
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for threads in [1, 2] {
            let ours = run_one(TractEngine::with_isa(threads, isa));
            assert_eq!(ours.len(), stock.len());
            for (ours, stock) in ours.iter().zip(&stock) {
                // One unit in the last place of a half, where sums fall on either side of a tie.
                let unit = if stock.0 { 1e-3 } else { 0.0 };
                let (ours, stock) = (widened(ours), widened(stock));
                assert_eq!(ours.len(), stock.len());
                for (ours, stock) in ours.iter().zip(&stock) {
                    let most = (1e-4 + unit) * stock.abs().max(1.0);
                    assert!((ours - stock).abs() <= most, "{isa:?}: {ours}, stock {stock}");
                }
            }
        }
    }
}

fn fusion() -> Fusion {
    let workers = Arc::new(crate::kernels::Alone);
    Fusion { isa: Isa::Plain, workers, memory: Memory::default() }
}

fn decluttered(segment: &crate::shard::Segment) -> TypedModel {
    let bytes = encode(&segment.model);
    let mut model = tract_onnx::onnx().model_for_read(&mut &*bytes).unwrap().into_typed().unwrap();
    hold(&mut model).unwrap();
    model.declutter().unwrap();
    model
}

/// Ops of the plans that `shard` becomes, by name.
fn ops(shard: &Shard) -> Vec<String> {
    shard.program().segments.iter().flat_map(ops_of).collect()
}

fn ops_of(segment: &crate::shard::Segment) -> Vec<String> {
    let (model, _) = fuse(&decluttered(segment), &fusion(), &Around::default()).unwrap();
    let mut names = Vec::new();
    for node in model.eval_order().unwrap().into_iter().map(|id| model.node(id)) {
        match node.op_as::<run::Run>() {
            Some(run) => names.extend(run.names().map(str::to_owned)),
            None => names.push(node.op.name().into_owned()),
        }
    }
    names
}

#[test]
fn a_residual_block_is_convolutions_only() {
    let shard = Net::default()
        .input("x", &[1, 3, 10, 10])
        .conv("x", "stem", [3, 24, 1], [3, 1])
        .op("Relu", &["stem"], "a", &[])
        .conv("a", "c1", [24, 8, 1], [1, 1])
        .norm("c1", "n1", 8)
        .op("Relu", &["n1"], "r1", &[])
        .conv("r1", "c2", [8, 8, 4], [3, 2])
        .op("LeakyRelu", &["c2"], "r2", &[attr_float("alpha", 0.1)])
        .conv("r2", "c3", [8, 24, 1], [1, 1])
        .norm("c3", "n3", 24)
        .conv("a", "short", [24, 24, 1], [1, 2])
        .op("Add", &["n3", "short"], "sum", &[])
        .op("Relu", &["sum"], "y", &[])
        .shard(&["y"]);
    equals_stock(&shard);
    let count = |name: &str| ops(&shard).iter().filter(|op| *op == name).count();
    assert_eq!(count("BlockedConv"), 5);
    assert_eq!(count("ToPlanes"), 1);
    assert_eq!(ops(&shard).len(), 1 + 5 + 1, "{:?}", ops(&shard));
}

/// Sends channels 0 … 13 of 24 in f16, adds 20 received ones, and goes on.
fn exchanging() -> Shard {
    Net::default()
        .input("x", &[1, 3, 9, 7])
        .typed("a", DataType::Float, &[1, 24, 9, 7])
        .typed("sum", DataType::Float, &[1, 24, 9, 7])
        .typed("got", DataType::Float16, &[1, 20, 9, 7])
        .indices("zero", &[0])
        .indices("keep", &[13])
        .indices("one", &[1])
        .indices("pads", &[0, 0, 0, 0, 0, 4, 0, 0])
        .conv("x", "stem", [3, 24, 1], [3, 1])
        .op("Relu", &["stem"], "a", &[])
        .op("Slice", &["a", "zero", "keep", "one"], "kept", &[])
        .op("Cast", &["kept"], "half", &[attr_int("to", 10)])
        .op(SEND_OP, &["half"], "sent", &transfer(0, &[1, 13, 9, 7]))
        .conv("a", "c0", [24, 12, 3], [3, 1])
        .conv("c0", "c1", [12, 24, 3], [1, 1])
        .op("Add", &["c1", "a"], "sum", &[])
        .op(RECV_OP, &[], "got", &transfer(1, &[1, 20, 9, 7]))
        .op("Cast", &["got"], "full", &[attr_int("to", 1)])
        .op("Pad", &["full", "pads"], "padded", &[attr_string("mode", "constant")])
        .op("Add", &["sum", "padded"], "total", &[])
        .op("Relu", &["total"], "b", &[])
        .conv("b", "c2", [24, 24, 24], [5, 1])
        .op("Sigmoid", &["c2"], "c", &[])
        .op("GlobalAveragePool", &["c"], "y", &[])
        .shard(&["y", "sent"])
}

#[test]
fn exchanges_keep_their_meaning() {
    let shard = exchanging();
    assert!(shard.program().segments.len() > 1);
    equals_stock(&shard);
}

#[test]
fn what_is_received_is_rounded_once_and_exactly() {
    // Halves are widened, padded and added without another rounding: a sum with nothing else.
    let shard = Net::default()
        .input("x", &[1, 1, 2, 2])
        .typed("c", DataType::Float, &[1, 20, 2, 2])
        .typed("got", DataType::Float16, &[1, 20, 2, 2])
        .conv("x", "c", [1, 20, 1], [1, 1])
        .op(RECV_OP, &[], "got", &transfer(0, &[1, 20, 2, 2]))
        .op("Cast", &["got"], "full", &[attr_int("to", 1)])
        .op("Sub", &["c", "c"], "nothing", &[])
        .op("Add", &["nothing", "full"], "y", &[])
        .shard(&["y"]);
    let left = run(&mut *TractEngine::new(1).load(shard.program()).unwrap(), &shard, &[99]);
    let expected: Vec<f32> =
        numbers(7, 80).into_iter().map(|x| f16::from_f32(x).to_f32()).collect();
    assert_eq!(widened(&left[0][0]), expected);
}

#[test]
fn what_kernels_do_not_cover_is_left_to_tract() {
    let dilated = [attr_ints("kernel_shape", &[3, 3]), attr_ints("dilations", &[2, 2])];
    let mut net = Net::default().input("x", &[1, 8, 12, 12]);
    net.constant("w", &[8, 8, 3, 3], 0.2);
    let shard = net
        .op("Conv", &["x", "w"], "d", &dilated)
        .conv("d", "c", [8, 16, 1], [3, 1])
        .op("MaxPool", &["c"], "m", &[attr_ints("kernel_shape", &[2, 2])])
        .op("HardSwish", &["m"], "h", &[])
        .op("Concat", &["h", "m", "h"], "j", &[attr_int("axis", 1)])
        .conv("j", "e", [48, 5, 1], [1, 1])
        .op("Clip", &["e"], "y", &[])
        .shard(&["y"]);
    equals_stock(&shard);
}

/// A squeeze and excitation with the hard swish that exporters write out.
#[test]
fn a_mobile_block_is_blocked_throughout() {
    let number = |name: &str, x: f32| TensorProto::f32(name, &[], &[x]);
    let mut net = Net::default().input("x", &[1, 24, 6, 10]);
    for (name, x) in [("zero", 0.0), ("three", 3.0), ("six", 6.0)] {
        net.graph.initializer.push(number(name, x));
    }
    let shard = net
        .conv("x", "c", [24, 40, 1], [1, 1])
        .op("Add", &["c", "three"], "up", &[])
        .op("Clip", &["up", "zero", "six"], "clipped", &[])
        .op("Mul", &["c", "clipped"], "product", &[])
        .op("Div", &["product", "six"], "h", &[])
        .op("GlobalAveragePool", &["h"], "mean", &[])
        .conv("mean", "s1", [40, 8, 1], [1, 1])
        .op("Relu", &["s1"], "r", &[])
        .conv("r", "s2", [8, 40, 1], [1, 1])
        .op("HardSigmoid", &["s2"], "gate", &[])
        .op("Mul", &["h", "gate"], "gated", &[])
        .conv("gated", "y", [40, 24, 1], [1, 1])
        .shard(&["y"]);
    equals_stock(&shard);
    let ops = ops(&shard);
    let count = |name: &str| ops.iter().filter(|op| *op == name).count();
    assert_eq!([count("BlockedConv"), count("ToBlocks"), count("ToPlanes")], [4, 1, 1], "{ops:?}");
}

#[test]
fn nothing_is_kept_from_one_request_to_the_next() {
    let shard = exchanging();
    let alone = |seed| {
        let mut executor = TractEngine::new(1).load(shard.program()).unwrap();
        run(&mut *executor, &shard, &[seed]).remove(0)
    };
    let mut executor = TractEngine::new(1).load(shard.program()).unwrap();
    for seeds in [vec![1], vec![2, 3, 4], vec![5], vec![3, 1]] {
        let expected: Vec<_> = seeds.iter().map(|&seed| alone(seed)).collect();
        assert_eq!(run(&mut *executor, &shard, &seeds), expected, "{seeds:?}");
    }
}

#[test]
fn channels_that_leave_are_not_computed_twice() {
    // Whole for the node itself, and thirteen channels in f16: one convolution and its activation.
    let ops = ops_of(&exchanging().program().segments[0]);
    assert_eq!(ops, ["Source", "BlockedConv", "ToPlanes", "ToPlanes"]);
}

/// The trunk of a network stays in one memory from block to block.
#[test]
fn a_result_takes_the_memory_of_an_input_that_nobody_reads_any_more() {
    let shard = exchanging();
    let fusion = fusion();
    let claims = |blocked: &[Option<usize>], ending: &[bool]| {
        let around = Around { blocked, ending, free: &[true] };
        let model = decluttered(&shard.program().segments[1]);
        let (model, _) = fuse(&model, &fusion, &around).unwrap();
        let runs = model.nodes.iter().filter_map(|node| node.op_as::<run::Run>());
        runs.map(run::Run::claims).sum::<usize>()
    };
    assert_eq!(claims(&[Some(24)], &[true]), 1);
    assert_eq!(claims(&[Some(24)], &[false]), 0, "somebody reads it later");
    assert_eq!(claims(&[None], &[true]), 0, "it is planar");
}
