//! Latency of one ONNX file: `cargo bench -p snn-runtime --bench latency -- FILE [RUNS [THREADS]]`.
//!
//! Prints the median and the smallest time of a run in ms, to be set beside another runtime's in the
//! same minute: BENCH.md has the script that does.

use std::time::Instant;

use bytes::BytesMut;
use snn_runtime::engine::{Engine, Executor};
use snn_runtime::shard::Step;
use snn_runtime::{Shard, TractEngine};

fn infer(executor: &mut dyn Executor, shard: &Shard, image: &[u8]) {
    let program = shard.program();
    let job = executor.begin();
    for &slot in &program.inputs {
        executor.write(job, slot, image).expect("an image of the model's size");
    }
    for step in &program.steps {
        if let Step::Compute(segment) = step {
            executor.compute(job, *segment).expect("a segment that computes");
        }
    }
    for &slot in &program.outputs {
        executor.read(job, slot, &mut BytesMut::new()).expect("an output");
    }
    executor.end(job);
}

#[allow(clippy::print_stdout, reason = "what it is for")]
fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let Some(path) = arguments.next() else {
        return println!("no model named");
    };
    let runs = arguments.next().and_then(|runs| runs.parse().ok()).unwrap_or(100usize).max(1);
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(1);
    let bytes = std::fs::read(path).expect("a file");
    let shard = Shard::from_bytes(bytes.into()).expect("an ONNX model");
    let slot = shard.program().inputs[0];
    let shape = shard.program().slot(slot).shape.as_ref().expect("a fixed input shape");
    let image: Vec<u8> = (0..shape.iter().product::<usize>())
        .flat_map(|at| ((at * 7919 % 257) as f32 / 128.0 - 1.0).to_le_bytes())
        .collect();
    let mut executor = TractEngine::new(threads).load(shard.program()).expect("a model that loads");
    let mut times: Vec<f64> = (0..runs + 10)
        .map(|_| {
            let start = Instant::now();
            infer(&mut *executor, &shard, &image);
            start.elapsed().as_secs_f64() * 1e3
        })
        .skip(10)
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{:.4} {:.4}", times[runs / 2], times[0]);
}
