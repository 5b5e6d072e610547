//! A training step on a CPU: burn's layers against this crate's kernels, pair by pair.
//!
//! Each measurement makes a step of both formulations in turn and counts the time of one, so that a
//! busy machine slows both alike. `cargo bench -p snn-trainer`; images a second are what criterion
//! calls throughput. After each network the pairs are summed up once more: the median of their ratios,
//! and the smallest time of one against the smallest of the other, which a busy machine disturbs least.

#![allow(clippy::print_stdout, reason = "a benchmark tells what it found")]

use std::cell::RefCell;
use std::time::{Duration, Instant};

use burn::nn::loss::CrossEntropyLoss;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use snn_schemas::Policy;
use snn_trainer::{NetConfig, Network, Stats};

/// Statistics of the batch through burn's own layers: a step of size 0 towards them.
const PLAIN: Stats = Stats::Update(0.0);
/// The same through the kernels.
const KERNELS: Stats = Stats::Batch;

struct Trainee {
    network: Option<Network>,
    sgd: ModuleOptimizer,
    images: Tensor<4>,
    labels: Tensor<1, Int>,
    policy: Policy,
    stats: Stats,
}

impl Trainee {
    fn new(settings: &NetConfig, batch: usize, stats: Stats) -> Trainee {
        let device = Device::flex().autodiff();
        let [channels, height, width] = settings.input;
        let count = batch * channels * height * width;
        let pixels: Vec<f32> = (0..count).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let labels: Vec<i64> = (0..batch).map(|at| (at % settings.classes) as i64).collect();
        let momentum = MomentumConfig::new().with_dampening(0.0);
        Trainee {
            network: Some(Network::new(settings, 1, &device)),
            sgd: SgdConfig::new().with_momentum(Some(momentum)).init(),
            images: Tensor::from_data(
                TensorData::new(pixels, [batch, channels, height, width]),
                &device,
            ),
            labels: Tensor::from_data(TensorData::new(labels, [batch]), &device),
            policy: Policy::silent(settings.groups, 2, settings.blocks() / 2),
            stats,
        }
    }

    fn step(&mut self) -> Duration {
        let started = Instant::now();
        if let Some(network) = self.network.take() {
            let logits = network.forward_with(self.images.clone(), &self.policy, self.stats);
            let loss =
                CrossEntropyLoss::new(None, &logits.device()).forward(logits, self.labels.clone());
            let grads = GradientsParams::from_grads(loss.backward(), &network);
            self.network = Some(self.sgd.step(0.01, network, grads));
        }
        started.elapsed()
    }
}

fn pair(criterion: &mut Criterion, name: &str, settings: &NetConfig, batch: usize) {
    let mut plain = Trainee::new(settings, batch, PLAIN);
    let mut kernels = Trainee::new(settings, batch, KERNELS);
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(batch as u64)).sample_size(10);
    let pairs = RefCell::new(Vec::new());
    let mut both = || {
        let pair = (plain.step(), kernels.step());
        pairs.borrow_mut().push(pair);
        pair
    };
    group.bench_function("burn's layers", |bencher| {
        bencher.iter_custom(|steps| (0..steps).map(|_| both().0).sum());
    });
    group.bench_function("kernels", |bencher| {
        bencher.iter_custom(|steps| (0..steps).map(|_| both().1).sum());
    });
    group.finish();
    tell(name, &pairs.into_inner());
}

/// Sums up the pairs; nothing where the benchmark was filtered out.
fn tell(name: &str, pairs: &[(Duration, Duration)]) {
    let ratio = |pair: &(Duration, Duration)| pair.0.as_secs_f64() / pair.1.as_secs_f64();
    let mut ratios: Vec<f64> = pairs.iter().map(ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let smallest = |of: fn(&(Duration, Duration)) -> Duration| pairs.iter().map(of).min();
    let both = (smallest(|pair| pair.0), smallest(|pair| pair.1));
    if let (Some(median), (Some(plain), Some(kernels))) = (ratios.get(ratios.len() / 2), both) {
        println!(
            "{name}: {} pairs, median ratio {median:.2}; smallest times {plain:.1?} and {kernels:.1?}, ratio {:.2}",
            pairs.len(),
            ratio(&(plain, kernels))
        );
    }
}

fn steps(criterion: &mut Criterion) {
    let small = NetConfig {
        depth: 20,
        cardinality: 4,
        path_width: 4,
        trunk_width: 16,
        classes: 10,
        ..NetConfig::default()
    };
    pair(criterion, "Sep-ResNeXt-20 4x4d width 16, batch 64", &small, 64);
    let paper = NetConfig {
        depth: 56,
        cardinality: 4,
        path_width: 16,
        classes: 10,
        ..NetConfig::default()
    };
    pair(criterion, "Sep-ResNeXt-56 4x16d, batch 32", &paper, 32);
}

criterion_group!(benches, steps);
criterion_main!(benches);
