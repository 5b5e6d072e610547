//! Latency of one ONNX file: `cargo bench -p snn-runtime --bench latency -- FILE [RUNS [THREADS]]`.
//!
//! Prints the median and the smallest time of a run in ms, to be set beside another runtime's in the
//! same minute: BENCH.md has the script that does. Of a shard it is the time spent in segments: tensors
//! of zeros take the place of what peers send. The least time of each segment in µs follows, and
//! the sum of these in ms.

use std::time::Instant;

use bytes::BytesMut;
use snn_runtime::engine::{Engine, Executor};
use snn_runtime::shard::Step;
use snn_runtime::{Shard, TractEngine};

/// Runs a shard once, with `payloads` for what it receives; gives the time of each segment in ms.
fn infer(
    executor: &mut dyn Executor,
    shard: &Shard,
    image: &[u8],
    payloads: &[Vec<u8>],
) -> Vec<f64> {
    let program = shard.program();
    let job = executor.begin();
    for &slot in &program.inputs {
        executor.write(job, slot, image).expect("an image of the model's size");
    }
    let (mut times, mut payloads, mut sent) = (Vec::new(), payloads.iter(), BytesMut::new());
    for step in &program.steps {
        match step {
            Step::Compute(segment) => {
                let start = Instant::now();
                executor.compute(job, *segment).expect("a segment that computes");
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            Step::Receive(crossing) => {
                let payload = payloads.next().expect("a payload for each receive");
                let done = executor.receive(job, crossing.slot, crossing.codec, payload);
                done.expect("a payload of the tensor's size");
            }
            Step::Send(crossing) => {
                sent.clear();
                let tensor = executor.send(job, crossing.slot).expect("a tensor to send");
                tensor.put(crossing.codec, &mut sent).expect("what the codec takes");
            }
        }
    }
    for &slot in &program.outputs {
        executor.read(job, slot, &mut BytesMut::new()).expect("an output");
    }
    executor.end(job);
    times
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
    let program = shard.program();
    let shape = program.inputs.first().and_then(|&slot| program.slot(slot).shape.as_ref());
    let image: Vec<u8> = (0..shape.map_or(0, |shape| shape.iter().product::<usize>()))
        .flat_map(|at| ((at * 7919 % 257) as f32 / 128.0 - 1.0).to_le_bytes())
        .collect();
    let payloads: Vec<Vec<u8>> =
        program.receives().map(|crossing| vec![0; crossing.bytes]).collect();
    let mut executor = TractEngine::new(threads).load(program).expect("a model that loads");
    let mut times = Vec::new();
    let mut least = vec![f64::INFINITY; program.segments.len()];
    for run in 0..runs + 10 {
        let start = Instant::now();
        let segments = infer(&mut *executor, &shard, &image, &payloads);
        let whole = start.elapsed().as_secs_f64() * 1e3;
        if run >= 10 {
            times.push(if segments.len() > 1 { segments.iter().sum() } else { whole });
            least.iter_mut().zip(segments).for_each(|(least, time)| *least = least.min(time));
        }
    }
    times.sort_by(f64::total_cmp);
    println!("{:.4} {:.4}", times[runs / 2], times[0]);
    if least.len() > 1 {
        let micros: Vec<String> = least.iter().map(|ms| format!("{:.1}", 1e3 * ms)).collect();
        println!("{}\n{:.4}", micros.join(" "), least.iter().sum::<f64>());
    }
}
