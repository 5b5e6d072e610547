//! Kernels and engines, timed on one thread: `cargo bench -p snn-runtime`.
//!
//! `kernel/SET/*` are the convolutions of the networks that the project is about, in floating-point operations
//! per second, on each instruction set that the machine has: once with an input that is padded first, once with
//! one stored with the zeros that pad it. `kernel/SET/peak` is what the core can do at most with that set.
//! `engine/*` runs whole files, as many as the variable `SNN_BENCH_MODELS` names (separated by `:`), with this
//! crate's convolutions and with stock tract.

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use snn_runtime::engine::{Engine, Executor};
use snn_runtime::kernels::{Activation, Aligned, Alone, Conv, ConvSpec, Halo, Isa, fma_loop};
use snn_runtime::shard::Step;
use snn_runtime::{Shard, TractEngine};

/// Channels taken and given, groups, kernel, stride, height and width.
const SHAPES: [[usize; 6]; 18] = [
    [16, 16, 1, 3, 1, 32],
    [64, 16, 1, 1, 1, 32],
    [16, 64, 1, 1, 1, 32],
    [32, 32, 1, 3, 1, 16],
    [128, 32, 1, 1, 1, 16],
    [64, 64, 1, 3, 1, 8],
    [256, 64, 1, 1, 1, 8],
    [32, 32, 1, 3, 2, 32],
    [64, 64, 16, 3, 1, 32],
    [64, 64, 16, 3, 2, 32],
    [128, 128, 16, 3, 1, 16],
    [64, 64, 64, 3, 1, 32],
    [64, 64, 64, 3, 2, 32],
    [64, 64, 64, 5, 1, 16],
    [3, 16, 1, 3, 1, 32],
    [128, 128, 1, 3, 1, 28],
    [256, 256, 1, 3, 1, 14],
    [512, 512, 1, 3, 1, 14],
];

fn kernels(c: &mut Criterion) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        kernels_of(isa, c);
    }
}

fn kernels_of(isa: Isa, c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("kernel/{isa:?}"));
    group.throughput(Throughput::Elements(fma_loop(isa, 10_000).0));
    group.bench_function("peak", |b| b.iter(|| fma_loop(isa, black_box(10_000))));
    let cases = SHAPES.into_iter().flat_map(|shape| [(shape, false), (shape, true)]);
    for ([input, output, groups, kernel, stride, size], has_margin) in cases {
        let pad = kernel / 2;
        if has_margin && pad == 0 {
            continue;
        }
        let pads = Halo { top: pad, left: pad, bottom: pad, right: pad };
        let spec = ConvSpec {
            batch: 1,
            input,
            output,
            groups,
            image: [size, size],
            margin: if has_margin { pads } else { Halo::default() },
            kernel: [kernel, kernel],
            stride: [stride, stride],
            pads,
            halo: Halo::default(),
            planar: input < 4,
            activation: Activation::Clamp { low: 0.0, high: f32::INFINITY },
        };
        let weights = vec![0.01; output * input / groups * kernel * kernel];
        let conv = Conv::new(spec, isa, &weights, &vec![0.0; output]);
        let conv = conv.expect("a convolution that the kernels cover");
        let x = Aligned::zeros(conv.input_len());
        let mut y = Aligned::zeros(conv.output_len());
        group.throughput(Throughput::Elements(2 * conv.multiplications() as u64));
        let margin = if has_margin { " margin" } else { "" };
        let name = format!("{kernel}x{kernel}/{stride} {input}-{output} g{groups} @{size}{margin}");
        group.bench_function(name, |b| {
            b.iter(|| conv.run(x.as_slice(), &[], y.as_mut_slice(), &Alone))
        });
    }
    group.finish();
}

fn infer(executor: &mut dyn Executor, shard: &Shard, image: &[u8]) -> BytesMut {
    let program = shard.program();
    let job = executor.begin();
    let mut answer = BytesMut::new();
    for &slot in &program.inputs {
        executor.write(job, slot, image).expect("an image of the model's size");
    }
    for step in &program.steps {
        if let Step::Compute(segment) = step {
            executor.compute(job, *segment).expect("a segment that computes");
        }
    }
    for &slot in &program.outputs {
        executor.read(job, slot, &mut answer).expect("an output");
    }
    executor.end(job);
    answer
}

fn engines(c: &mut Criterion) {
    let models = std::env::var("SNN_BENCH_MODELS").unwrap_or_default();
    for path in models.split(':').filter(|path| !path.is_empty()) {
        let bytes = std::fs::read(path).expect("a file that SNN_BENCH_MODELS names");
        let shard = Shard::from_bytes(bytes.into()).expect("an ONNX model");
        let slot = shard.program().inputs[0];
        let shape = shard.program().slot(slot).shape.as_ref().expect("a fixed input shape");
        let image = vec![0u8; 4 * shape.iter().product::<usize>()];
        let mut group = c.benchmark_group(format!("engine/{path}"));
        for (name, mut engine) in [("ours", TractEngine::new(1)), ("tract", TractEngine::stock(1))]
        {
            let mut executor = engine.load(shard.program()).expect("a model that loads");
            group.bench_function(name, |b| b.iter(|| infer(&mut *executor, &shard, &image)));
        }
        group.finish();
    }
}

criterion_group!(benches, kernels, engines);
criterion_main!(benches);
