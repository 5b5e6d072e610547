//! How fast this device computes: residual blocks of the networks meant, run by the real engine.
//!
//! Takes an [`Engine`]; gives a [`Profile`]: the GFLOP/s that a whole network's blocks reach, activations
//! and residual sums included, and those of each stage; and the GB/s at which the engine takes features out of
//! a trunk to send them and adds those received, from the same blocks with an exchange after each. Each stage is
//! run until its least time has not changed for a while: what is wanted is the device undisturbed. About a
//! second on a fast machine.

use std::time::{Duration, Instant};

use prost::Message as _;
use serde::Serialize;
use snn_schemas::metadata::{RECV_OP, SEND_OP, SNN_DOMAIN, ShardInfo};
use snn_schemas::onnx::tensor_proto::DataType;
use snn_schemas::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    ValueInfoProto, attr_int, attr_ints, attr_string,
};

use crate::engine::{Engine, EngineError};
use crate::shard::{Shard, ShardError, Step};

/// The stages: channels of the trunk, channels within a block, height and width. One group's share of
/// a Sep-ResNeXt 4×16d.
const STAGES: [[usize; 3]; 3] = [[64, 16, 32], [128, 32, 16], [256, 64, 8]];
/// Blocks of a stage, as the networks meant have them: enough that the model's edges do not matter.
const BLOCKS: usize = 6;
/// Runs after which the least time counts, if the last half of them has not lowered it by more than
/// [`SETTLED`].
const MIN_RUNS: usize = 40;
/// Share by which the least time may still fall.
const SETTLED: f64 = 0.01;
/// Longest measurement of a stage: a device of 0.1 GFLOP/s still gets a few runs.
const STAGE_WITHIN: Duration = Duration::from_secs(5);

/// How fast a device computes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profile {
    /// Floating-point operations of convolutions a second, in 10⁹, a multiply-add as two: as many as their
    /// definition has, however they are computed.
    pub gflops: f64,
    /// Bytes of f32 features a second, in 10⁹, taken out to be sent or added once received; the codec's
    /// work is not in it. None where exchanges took no time that could be measured.
    pub gbytes: Option<f64>,
    /// Each stage by itself.
    pub stages: Vec<StageProfile>,
}

/// One stage of the blocks measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageProfile {
    /// Its blocks in words.
    pub shape: String,
    /// Operations of one run.
    pub flops: u64,
    /// The least time of one run, in ms.
    pub ms: f64,
    /// Its GFLOP/s.
    pub gflops: f64,
    /// Bytes that an exchange after each block moves, as f32.
    pub exchanged: u64,
    /// The least time of one run with these exchanges, in ms.
    pub exchanging_ms: f64,
}

/// Measures what `engine` reaches.
///
/// # Errors
/// What the engine cannot compute.
pub fn measure(engine: &mut dyn Engine) -> Result<Profile, ProfileError> {
    let stages: Vec<StageProfile> =
        STAGES.iter().map(|&stage| measure_stage(engine, stage)).collect::<Result<_, _>>()?;
    let flops: u64 = stages.iter().map(|stage| stage.flops).sum();
    let ms: f64 = stages.iter().map(|stage| stage.ms).sum();
    let bytes: u64 = stages.iter().map(|stage| stage.exchanged).sum();
    let moving: f64 = stages.iter().map(|stage| stage.exchanging_ms - stage.ms).sum();
    let gbytes = (moving > 0.0).then(|| bytes as f64 / 1e6 / moving);
    Ok(Profile { gflops: gflops(flops, ms), gbytes, stages })
}

fn gflops(flops: u64, ms: f64) -> f64 {
    flops as f64 / 1e6 / ms
}

fn measure_stage(engine: &mut dyn Engine, stage: [usize; 3]) -> Result<StageProfile, ProfileError> {
    let [wide, narrow, size] = stage;
    let ms = run_blocks(engine, stage, false)?;
    let exchanging_ms = run_blocks(engine, stage, true)?;
    let products = size * size * (2 * wide * narrow + 9 * narrow * narrow);
    let flops = (2 * BLOCKS * products) as u64;
    let shape = format!("1x1 {wide}-{narrow}, 3x3 {narrow}-{narrow}, 1x1 {narrow}-{wide} @{size}");
    let exchanged = (2 * BLOCKS * wide * size * size * size_of::<f32>()) as u64;
    let gflops = gflops(flops, ms);
    Ok(StageProfile { shape, flops, ms, gflops, exchanged, exchanging_ms })
}

/// The least time of a stage's segments, in ms. What peers would send are zeros.
fn run_blocks(
    engine: &mut dyn Engine,
    stage: [usize; 3],
    exchanging: bool,
) -> Result<f64, ProfileError> {
    let [wide, _, size] = stage;
    let shard = Shard::from_bytes(model(stage, exchanging).encode_to_vec().into())?;
    let program = shard.program();
    let mut executor = engine.load(program)?;
    let image: Vec<u8> = (0..wide * size * size)
        .flat_map(|at| ((at * 7919 % 257) as f32 / 257.0).to_le_bytes())
        .collect();
    let zeros = vec![0; program.receives().map(|crossing| crossing.bytes).max().unwrap_or(0)];
    let job = executor.begin();
    for &slot in &program.inputs {
        executor.write(job, slot, &image)?;
    }
    let mut run = || -> Result<f64, EngineError> {
        let mut took = Duration::ZERO;
        for step in &program.steps {
            match step {
                Step::Compute(segment) => {
                    let start = Instant::now();
                    executor.compute(job, *segment)?;
                    took += start.elapsed();
                }
                Step::Receive(crossing) => {
                    let payload = &zeros[..crossing.bytes];
                    executor.receive(job, crossing.slot, crossing.codec, payload)?;
                }
                Step::Send(_) => {}
            }
        }
        Ok(1e3 * took.as_secs_f64())
    };
    Ok(least(&mut run)?)
}

/// The least time of as many runs as it takes to find it.
fn least(run: &mut dyn FnMut() -> Result<f64, EngineError>) -> Result<f64, EngineError> {
    let start = Instant::now();
    let mut times = Vec::with_capacity(MIN_RUNS);
    loop {
        for _ in 0..MIN_RUNS {
            times.push(run()?);
            if start.elapsed() > STAGE_WITHIN {
                break;
            }
        }
        let least = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
        let all = least(&times);
        let settled = least(&times[..times.len() / 2]) <= all * (1.0 + SETTLED);
        if settled && times.len() > MIN_RUNS || start.elapsed() > STAGE_WITHIN {
            return Ok(all);
        }
    }
}

/// Residual blocks one after another, with small weights that let nothing grow: a model, or the shard of
/// a node that sends each block's outcome and adds what it receives to the next block's, all in f16.
fn model([wide, narrow, size]: [usize; 3], exchanging: bool) -> ModelProto {
    let shape = [1, wide, size, size].map(|extent| extent as i64);
    let (mut nodes, mut weights, mut types) = (Vec::new(), Vec::new(), Vec::new());
    let mut conv = |name: &str, input: &str, [from, to, kernel]: [usize; 3]| {
        let (weight, bias) = (format!("{name}.w"), format!("{name}.b"));
        let count = to * from * kernel * kernel;
        let value = |at: usize| (at * 31 % 17) as f32 / 17.0 / (from * kernel * kernel) as f32;
        let data: Vec<f32> = (0..count).map(value).collect();
        let shape = [to, from, kernel, kernel].map(|extent| extent as i64);
        weights.push(TensorProto::f32(&weight, &shape, &data));
        weights.push(TensorProto::f32(&bias, &[to as i64], &vec![0.01; to]));
        let mut node = NodeProto::new("Conv", name, &[input, &weight, &bias], &[name]);
        node.attribute.push(attr_ints("kernel_shape", &[kernel as i64; 2]));
        node.attribute.push(attr_ints("pads", &[(kernel / 2) as i64; 4]));
        node
    };
    let mut before = "x".to_owned();
    for block in 0..BLOCKS {
        let name = |part: &str| format!("b{block}.{part}");
        let relu = |input: &str, output: &str, nodes: &mut Vec<NodeProto>| {
            nodes.push(NodeProto::new("Relu", output, &[input], &[output]));
        };
        nodes.push(conv(&name("c1"), &before, [wide, narrow, 1]));
        relu(&name("c1"), &name("r1"), &mut nodes);
        nodes.push(conv(&name("c2"), &name("r1"), [narrow, narrow, 3]));
        relu(&name("c2"), &name("r2"), &mut nodes);
        nodes.push(conv(&name("c3"), &name("r2"), [narrow, wide, 1]));
        let (sum, parts) = (name("sum"), [name("c3"), before]);
        nodes.push(NodeProto::new("Add", &sum, &[&parts[0], &parts[1]], &[&sum]));
        let transfer = |number: usize| 2 * block as i64 + number as i64;
        let total = match exchanging {
            true => {
                let (half, full, total) = (name("got"), name("got32"), name("total"));
                nodes.push(crossing(RECV_OP, &[], &half, transfer(0), &shape));
                nodes.push(op(
                    "Cast",
                    &[&half],
                    &full,
                    vec![attr_int("to", DataType::Float as i64)],
                ));
                nodes.push(NodeProto::new("Add", &total, &[&sum, &full], &[&total]));
                types.push(ValueInfoProto::tensor(&half, DataType::Float16, &shape));
                types.push(ValueInfoProto::tensor(&sum, DataType::Float, &shape));
                total
            }
            false => sum,
        };
        before = name("out");
        relu(&total, &before, &mut nodes);
        if exchanging {
            let half = name("half");
            types.push(ValueInfoProto::tensor(&before, DataType::Float, &shape));
            types.push(ValueInfoProto::tensor(&half, DataType::Float16, &shape));
            nodes.push(op(
                "Cast",
                &[&before],
                &half,
                vec![attr_int("to", DataType::Float16 as i64)],
            ));
            nodes.push(crossing(SEND_OP, &[&half], &name("sent"), transfer(1), &shape));
        }
    }
    let graph = GraphProto {
        name: Some("profile".to_owned()),
        node: nodes,
        initializer: weights,
        value_info: types,
        input: vec![ValueInfoProto::tensor("x", DataType::Float, &shape)],
        output: vec![ValueInfoProto::tensor(&before, DataType::Float, &shape)],
        ..GraphProto::default()
    };
    let opset = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(version),
    };
    let mut model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17), opset(SNN_DOMAIN, 1)],
        graph: Some(graph),
        ..ModelProto::default()
    };
    if exchanging {
        let identity = "0".repeat(64);
        let info = ShardInfo {
            rank: 0,
            nodes: 2,
            entry: 0,
            groups: 2,
            split: identity.clone(),
            source_sha256: identity,
            policy_sha256: None,
            tool: "profile".to_owned(),
        };
        info.entries().iter().for_each(|(key, value)| model.set_metadata(key, value));
    }
    model
}

fn op(kind: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto { attribute: attributes, ..NodeProto::new(kind, output, inputs, &[output]) }
}

/// A tensor that comes from the other node, or goes there.
fn crossing(kind: &str, inputs: &[&str], output: &str, id: i64, shape: &[i64]) -> NodeProto {
    let attributes = vec![
        attr_int("transfer", id),
        attr_int("peer", 1),
        attr_string("dtype", "f16"),
        attr_ints("shape", shape),
    ];
    let domain = Some(SNN_DOMAIN.to_owned());
    NodeProto { domain, ..op(kind, inputs, output, attributes) }
}

/// Why a device cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The blocks are not taken for a model.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The engine cannot compute them.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TractEngine;
    use crate::engine::slowed::{Pace, Slowed};

    #[test]
    fn a_slower_engine_has_a_lower_profile() {
        let fast = measure(&mut TractEngine::new(1)).unwrap();
        assert_eq!(fast.stages.len(), 3);
        assert!(fast.stages.iter().all(|stage| stage.gflops.is_finite() && stage.gflops > 0.01));
        // Six blocks of the first stage send and receive 64 × 32 × 32 features of four bytes.
        assert_eq!(fast.stages[0].exchanged, 2 * 6 * 64 * 32 * 32 * 4);
        assert!(fast.gbytes.is_none_or(|gbytes| gbytes > 0.1), "{:?}", fast.gbytes);
        let mut slow = Slowed { engine: TractEngine::new(1), pace: Pace::Times(20.0) };
        let slow = measure(&mut slow).unwrap();
        // Both by their least times, which a busy machine cannot lower.
        let factor = fast.gflops / slow.gflops;
        assert!(factor > 2.0 && factor < 200.0, "{factor}");
    }
}
