//! What the engine allocates from request to request: nothing of its own.
//!
//! A counting allocator watches a shard that sends, receives and computes, step by step, once every
//! memory has been met. What tract allocates for ops that stay its own is counted against a bound.

#![allow(clippy::unwrap_used, reason = "a test may end in a panic")]

mod fixtures;

use std::alloc::System;
use std::time::Duration;

use bytes::BytesMut;
use snn_runtime::engine::{Engine as _, Executor};
use snn_runtime::shard::Step;
use snn_runtime::{Shard, TractEngine};
use snn_schemas::metadata::{RECV_OP, SEND_OP, SNN_DOMAIN};
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{
    AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, attr_int, attr_ints,
    attr_string,
};
use snn_schemas::wire::TensorFrame;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Allocations of tract in the one segment with ops that the kernels do not cover: the classifier, a
/// reshape and a product.
const MOST_OF_TRACT: usize = 24;

/// Height and width of every feature map.
const SIZE: i64 = 16;

#[derive(Default)]
struct Net(GraphProto);

impl Net {
    fn op(&mut self, kind: &str, inputs: &[&str], output: &str, attributes: &[AttributeProto]) {
        let mut node = NodeProto::new(kind, output, inputs, &[output]);
        node.attribute = attributes.to_vec();
        if matches!(kind, SEND_OP | RECV_OP) {
            node.domain = Some(SNN_DOMAIN.to_owned());
        }
        self.0.node.push(node);
    }

    fn conv(&mut self, x: &str, y: &str, [from, to, kernel]: [i64; 3]) {
        let (w, b) = (format!("{y}.w"), format!("{y}.b"));
        let shape = [to, from, kernel, kernel];
        let count = shape.iter().product::<i64>() as usize;
        let weights: Vec<f32> = (0..count).map(|at| (at * 31 % 17) as f32 / 170.0).collect();
        self.0.initializer.push(TensorProto::f32(&w, &shape, &weights));
        self.0.initializer.push(TensorProto::f32(&b, &[to], &vec![0.1; to as usize]));
        let attributes =
            [attr_ints("kernel_shape", &[kernel; 2]), attr_ints("pads", &[kernel / 2; 4])];
        self.op("Conv", &[x, &w, &b], y, &attributes);
    }

    /// A residual block of `x`, before its last activation.
    fn block(&mut self, x: &str, y: &str) {
        let name = |part: &str| format!("{y}.{part}");
        self.conv(x, &name("c1"), [32, 16, 1]);
        self.op("Relu", &[&name("c1")], &name("r1"), &[]);
        self.conv(&name("r1"), &name("c2"), [16, 16, 3]);
        self.op("Relu", &[&name("c2")], &name("r2"), &[]);
        self.conv(&name("r2"), &name("c3"), [16, 32, 1]);
        self.op("Add", &[&name("c3"), x], y, &[]);
        self.typed(y, DataType::Float, 32);
    }

    fn typed(&mut self, name: &str, datum: DataType, channels: i64) {
        let shape = [1, channels, SIZE, SIZE];
        self.0.value_info.push(ValueInfoProto::tensor(name, datum, &shape));
    }

    fn transfer(&mut self, kind: &str, id: i64, tensor: &str, dtype: &str, channels: i64) {
        let attributes = [
            attr_int("transfer", id),
            attr_int("peer", 1),
            attr_string("dtype", dtype),
            attr_ints("shape", &[1, channels, SIZE, SIZE]),
        ];
        match kind {
            SEND_OP => self.op(kind, &[tensor], &format!("{tensor}.sent"), &attributes),
            _ => self.op(kind, &[], tensor, &attributes),
        }
    }

    fn indices(&mut self, name: &str, data: &[i64]) {
        self.0.initializer.push(TensorProto::i64(name, &[data.len() as i64], data));
    }
}

/// Two exchanges, the first in f16 and of some channels, the second in i8 and of all, and a head.
fn shard() -> Shard {
    let mut net = Net::default();
    net.0.input.push(ValueInfoProto::tensor("x", DataType::Float, &[1, 3, SIZE, SIZE]));
    for (name, data) in
        [("zero", &[0][..]), ("keep", &[24]), ("one", &[1]), ("pads", &[0, 0, 0, 0, 0, 8, 0, 0])]
    {
        net.indices(name, data);
    }
    net.conv("x", "stem", [3, 32, 3]);
    net.op("Relu", &["stem"], "a", &[]);
    net.typed("a", DataType::Float, 32);
    net.typed("got", DataType::Float16, 24);
    net.typed("more", DataType::Float, 32);
    net.op("Slice", &["a", "zero", "keep", "one"], "kept", &[]);
    net.op("Cast", &["kept"], "half", &[attr_int("to", 10)]);
    net.transfer(SEND_OP, 0, "half", "f16", 24);
    net.block("a", "b");
    net.transfer(RECV_OP, 1, "got", "f16", 24);
    net.op("Cast", &["got"], "full", &[attr_int("to", 1)]);
    net.op("Pad", &["full", "pads"], "padded", &[attr_string("mode", "constant")]);
    net.op("Add", &["b", "padded"], "total", &[]);
    net.op("Relu", &["total"], "c", &[]);
    net.typed("c", DataType::Float, 32);
    net.transfer(SEND_OP, 2, "c", "i8", 32);
    net.block("c", "d");
    net.transfer(RECV_OP, 3, "more", "i8", 32);
    net.op("Add", &["d", "more"], "whole", &[]);
    net.op("Relu", &["whole"], "e", &[]);
    net.typed("e", DataType::Float, 32);
    net.transfer(SEND_OP, 4, "e", "f32", 32);
    net.op("GlobalAveragePool", &["e"], "mean", &[]);
    net.op("Flatten", &["mean"], "flat", &[]);
    net.0.initializer.push(TensorProto::f32("fc", &[32, 10], &[0.1; 320]));
    net.op("MatMul", &["flat", "fc"], "y", &[]);
    net.0.output.push(ValueInfoProto::tensor("y", DataType::Float, &[1, 10]));
    Shard::from_bytes(fixtures::shard(net.0).into()).unwrap()
}

/// Goes through a shard once; gives what each step allocates. `sent` has room for what leaves.
fn run(
    executor: &mut dyn Executor,
    shard: &Shard,
    payloads: &[Vec<u8>],
    sent: &mut BytesMut,
    allocations: &mut [usize],
) {
    let program = shard.program();
    let (last, steps) = allocations.split_last_mut().unwrap();
    let whole = Region::new(ALLOCATOR);
    let job = executor.begin();
    for &slot in &program.inputs {
        executor.write(job, slot, &[1; 4 * 3 * (SIZE * SIZE) as usize]).unwrap();
    }
    *last = whole.change().allocations;
    let mut payloads = payloads.iter();
    for (step, allocations) in program.steps.iter().zip(steps) {
        sent.clear();
        let region = Region::new(ALLOCATOR);
        match step {
            Step::Compute(segment) => executor.compute(job, *segment).unwrap(),
            Step::Receive(crossing) => {
                let payload = payloads.next().unwrap();
                executor.receive(job, crossing.slot, crossing.codec, payload).unwrap();
            }
            Step::Send(crossing) => {
                let about = (crossing.transfer, Duration::from_secs(1));
                TensorFrame::begin(sent, crossing.codec.dtype, 0, 1, about, crossing.bytes);
                executor.send(job, crossing.slot).unwrap().put(crossing.codec, sent).unwrap();
                // As it leaves, and has left before the next one does.
                drop(sent.split().freeze());
            }
        }
        *allocations = region.change().allocations + region.change().reallocations;
    }
    sent.clear();
    let region = Region::new(ALLOCATOR);
    for &slot in &program.outputs {
        executor.read(job, slot, sent).unwrap();
    }
    executor.end(job);
    *last += region.change().allocations;
}

#[test]
fn the_engine_allocates_nothing_once_it_has_run() {
    let shard = shard();
    let program = shard.program();
    let mut executor = TractEngine::new(1).load(program).unwrap();
    let payloads: Vec<Vec<u8>> =
        program.receives().map(|crossing| vec![0; crossing.bytes]).collect();
    let mut sent = BytesMut::new();
    let mut allocations = vec![0; program.steps.len() + 1];
    for _ in 0..3 {
        run(&mut *executor, &shard, &payloads, &mut sent, &mut allocations);
    }
    let segments = program.segments.len();
    assert!(segments >= 4, "{segments}");
    for _ in 0..5 {
        run(&mut *executor, &shard, &payloads, &mut sent, &mut allocations);
        for (step, &found) in program.steps.iter().zip(&allocations) {
            let most = match step {
                Step::Compute(segment) if segment + 1 == segments => MOST_OF_TRACT,
                _ => 0,
            };
            assert!(found <= most, "{step:?} allocates {found} times: {allocations:?}");
        }
        assert_eq!(allocations.last(), Some(&0), "input, output and memory of the request");
    }
}
