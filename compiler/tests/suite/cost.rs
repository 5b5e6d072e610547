//! Predicted times: what the cost model makes of compiled networks, and of networks not compiled yet.

use snn_compiler::{Nodes, Options, PolicySource, Source, Split, Stem, Target, compile, flops};
use snn_schemas::cost::{Device, Link, Piece, Plan, Trunk, TrunkBlock};
use snn_schemas::{Dtype, Policy};

use crate::fixtures::{Net, ring, sep_resnext, style};
use crate::split;

/// Table 6's policy with sparsification and f16, for Sep-ResNeXt-56 4×16d.
const SPARSE_F16: &str = r#"{"version": 1, "groups": 4, "staleness": 2, "dtype": "f16",
    "decisions": [[9,4], [22,6], [18,6], [3,6], [16,7], [23,8], [9,8], [13,8], [20,7]]}"#;

/// Sep-ResNeXt-56 4×16d, as the paper has it.
fn net() -> Net {
    sep_resnext(56, [4, 16], 64, 4, 100)
}

fn compiled(nodes: Nodes) -> Split {
    let policy = Policy::from_json(SPARSE_F16.as_bytes()).expect("Table 6 is valid");
    split(net().onnx(style("burn")), Some(&policy), nodes)
}

fn plan(split: &Split) -> Plan {
    Plan::of_manifest(&split.manifest).expect("it has schedules")
}

/// The same network as the trainer knows it: shapes only.
fn trunk() -> Trunk {
    let area = [32 * 32, 16 * 16, 8 * 8];
    let mut before = 16;
    let mut block = |index: usize| {
        let stage = index / 6;
        let (inner, out) = (16 << stage, 64 << stage);
        let first = index.is_multiple_of(6);
        let from = if first && stage > 0 { area[stage - 1] } else { area[stage] };
        let mut products = before * inner * from + inner * inner * 9 * area[stage];
        products += inner * out * area[stage];
        if first {
            products += before * out * area[stage];
        }
        before = out;
        TrunkBlock { flops: 2 * products as u64, channels: out, elements: area[stage] }
    };
    Trunk {
        input_bytes: 4 * 3 * 32 * 32,
        stem_flops: 2 * 3 * 16 * 9 * 32 * 32,
        blocks: (0..18).map(&mut block).collect(),
        classified: 1,
        head_flops: 2 * 256 * 100,
    }
}

#[test]
fn a_stem_placed_for_a_target_is_never_predicted_to_be_slower() {
    let policy = PolicySource::from_bytes(SPARSE_F16.as_bytes()).expect("Table 6 is valid");
    let source = Source::from_bytes(net().onnx(style("burn")).into()).expect("it reads");
    let compiled = |target: Option<Target>| {
        let options = Options { target, ..Options::default() };
        compile(&source, Some(&policy), &options).expect("it splits")
    };
    let default = compiled(None);
    for link in ["10mbit,0ms", "1gbit,0.3ms", "100mbit,20ms"] {
        let device = Device::new(5.0).expect("positive");
        let link: Link = link.parse().expect("a link");
        let split = compiled(Some(Target { device: device.clone(), link }));
        let latency = |split: &Split| {
            plan(split).predict(std::slice::from_ref(&device), &link).expect("it is sound").latency
        };
        assert!(latency(&split) <= latency(&default), "{link:?}");
        // Its input is smaller than its result, so that a copy is both shorter and faster.
        assert_eq!((split.placed.stem, &split.manifest), (Stem::FewestBytes, &default.manifest));
    }
}

#[test]
fn schedules_add_up_to_the_work() {
    let split = compiled(Nodes::PerGroup);
    let plan = plan(&split);
    for (rank, work) in split.work.iter().enumerate() {
        assert_eq!(plan.flops(rank), work.flops, "rank {rank}");
    }
    let count =
        |wanted: fn(&Piece) -> bool| plan.nodes.iter().flatten().filter(|p| wanted(p)).count();
    let transfers = split.manifest.transfers.len();
    assert_eq!(count(|piece| matches!(piece, Piece::Send(_))), transfers);
    assert_eq!(count(|piece| matches!(piece, Piece::Receive(_))), transfers);
}

#[test]
fn four_devices_are_as_fast_as_a_perfect_runtime_makes_them() {
    let device = [Device::new(5.0).expect("a speed")];
    let plan = plan(&compiled(Nodes::PerGroup));
    // One device computes the network as it was trained, also what no output needs.
    let source = Source::from_bytes(net().onnx(style("burn")).into()).expect("a model");
    let alone = Plan::alone(flops(&source, None).expect("known ops"));
    let latency = |plan: &Plan, link: &str| {
        plan.predict(&device, &link.parse::<Link>().expect("a link")).expect("a sound plan").latency
    };
    let speed_up = |link: &str| latency(&alone, link) / latency(&plan, link);
    // By a simulation written on its own.
    let expected = [("100mbit,0.3ms", 1.921), ("300mbit,0.3ms", 3.436), ("1gbit,0.3ms", 3.985)];
    for (link, expected) in expected {
        let found = speed_up(link);
        assert!((found - expected).abs() < 0.005, "{link}: {found}");
    }
}

#[test]
fn a_network_is_predicted_before_it_is_compiled() {
    let policy = Policy::from_json(SPARSE_F16.as_bytes()).expect("Table 6 is valid");
    let device = [Device::new(5.0).expect("a speed")];
    for classified in [1, 4] {
        let head_flops = classified as u64 * trunk().head_flops;
        let trunk = Trunk { classified, head_flops, ..trunk() };
        let net = Net { classified, ..net() };
        let split = split(net.onnx(style("burn")), Some(&policy), Nodes::PerGroup);
        let (before, after) = (trunk.plan(&policy).expect("it fits"), plan(&split));
        for rank in 0..4 {
            assert_eq!(before.flops(rank), after.flops(rank), "rank {rank}, {classified} read");
        }
        for link in ["30mbit,1ms", "100mbit,0.3ms", "300mbit,0.3ms", "1gbit,0.3ms"] {
            let link: Link = link.parse().expect("a link");
            let [before, after] =
                [&before, &after].map(|plan| plan.predict(&device, &link).expect("sound").latency);
            let off = (before / after - 1.0).abs();
            assert!(off < 0.002, "{link:?}, {classified} read: {before} s, compiled {after} s");
        }
    }
}

/// With α = 1 a block's features are sent before anything is added to them.
#[test]
fn a_network_that_exchanges_after_each_block_is_predicted_too() {
    let policy = ring(&net(), 1, Dtype::F32);
    let split = split(net().onnx(style("burn")), Some(&policy), Nodes::PerGroup);
    let (before, after) = (trunk().plan(&policy).expect("it fits"), plan(&split));
    let exchanged = |plan: &Plan| plan.transfers.iter().filter(|carried| carried.exchange).count();
    assert_eq!(exchanged(&before), exchanged(&after));
    for rank in 0..4 {
        assert_eq!(before.flops(rank), after.flops(rank), "rank {rank}");
    }
}
