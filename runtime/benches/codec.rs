//! How fast features become payloads and back: `cargo bench -p snn-runtime --bench codec`.
//!
//! Each case is a group's features of the first stage of Sep-ResNeXt-56 4×16d, `[1, 56, 32, 32]` as Table 6's policy
//! cuts them, after a ReLU: half of them zero, in no order. Throughput is that of the tensor in f32.

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use snn_schemas::codec::Pixels;
use snn_schemas::metadata::Normalisation;
use snn_schemas::{Codec, Dtype, Packing};

const SHAPE: [usize; 4] = [1, 56, 32, 32];
const ELEMENTS: usize = 56 * 32 * 32;

/// What a ReLU gives of numbers around zero.
fn features() -> Vec<f32> {
    let mut state = 1u64;
    let mut number = || {
        // The upper bits of a linear congruential generator: no pattern that a branch could learn.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..ELEMENTS).map(|_| number().max(0.0)).collect()
}

/// The features as elements that travel as they are.
fn elements(dtype: Dtype) -> Vec<u8> {
    let bytes = |number: f32| match dtype {
        Dtype::F16 => half::f16::from_f32(number).to_le_bytes().to_vec(),
        _ => number.to_le_bytes().to_vec(),
    };
    features().into_iter().flat_map(bytes).collect()
}

fn codecs(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(4 * ELEMENTS as u64));
    let (numbers, run) = (features(), Codec::run(&SHAPE));
    for dtype in [Dtype::F16, Dtype::I8, Dtype::I4] {
        for packing in [Packing::None, Packing::Zeros] {
            let codec = Codec { dtype, signed: false, packing };
            let name = |what: &str| format!("{dtype}-{packing}/{what}");
            let mut payload = BytesMut::new();
            if codec.largest().is_some() {
                group.bench_function(name("encode"), |b| {
                    b.iter(|| {
                        payload.clear();
                        codec.put_numbers(black_box(&numbers), run, &mut payload);
                    });
                });
                let mut arrived = vec![0.0; ELEMENTS];
                group.bench_function(name("decode"), |b| {
                    b.iter(|| codec.read_numbers(black_box(&payload), run, &mut arrived));
                });
            } else {
                let elements = elements(dtype);
                group.bench_function(name("encode"), |b| {
                    b.iter(|| {
                        payload.clear();
                        codec.put_elements(black_box(&elements), &mut payload);
                    });
                });
                let mut arrived = elements.clone();
                group.bench_function(name("decode"), |b| {
                    b.iter(|| codec.read_elements(black_box(&payload), &mut arrived));
                });
            }
        }
    }
    group.finish();
}

/// A picture of 32×32 in three channels.
fn pictures(c: &mut Criterion) {
    let normalisation = Normalisation { mean: vec![0.49; 3], std: vec![0.25; 3] };
    let shape = [1, 3, 32, 32];
    let value = |at: usize| normalisation.value(at / 1024, (at * 7919 % 256) as u8);
    let picture: Vec<f32> = (0..3072).map(value).collect();
    let pixels = Pixels::new(normalisation);
    let mut group = c.benchmark_group("pixels");
    group.throughput(Throughput::Bytes(4 * 3072));
    let mut payload = BytesMut::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            payload.clear();
            pixels.put(black_box(&picture), &shape, &mut payload);
        });
    });
    let mut arrived = picture.clone();
    group.bench_function("decode", |b| {
        b.iter(|| pixels.read(black_box(&payload), &shape, &mut arrived));
    });
    group.finish();
}

criterion_group!(benches, codecs, pictures);
criterion_main!(benches);
