//! The numbers of semantics.md: parameters, levels, both costs, traffic after dead ops are gone.

use snn_compiler::{Nodes, Split};
use snn_schemas::Policy;

use crate::fixtures::{Net, sep_resnext, style};
use crate::split;

/// The decisions of the paper's Table 6, for Sep-ResNeXt-56 with α = 2 and G = 4: the shorthand, the
/// element type, and what it must cost.
const TABLE_6: [Row; 3] = [
    Row {
        decisions: "[12, 12, 7, 9, 10, 23, 9, 16, 18]",
        dtype: "f32",
        paper_percent: 31.48,
        planned_percent: 30.16,
        exchanged: 4_653_056,
    },
    Row {
        decisions: "[[0,8], [10,3], [18,7], [22,8], [16,8], [18,8], [9,7], [13,8], [22,7]]",
        dtype: "f32",
        paper_percent: 27.78,
        planned_percent: 24.40,
        exchanged: 3_653_632,
    },
    Row {
        decisions: "[[9,4], [22,6], [18,6], [3,6], [16,7], [23,8], [9,8], [13,8], [20,7]]",
        dtype: "f16",
        paper_percent: 14.44,
        planned_percent: 14.20,
        exchanged: 2_185_216,
    },
];

struct Row {
    decisions: &'static str,
    dtype: &'static str,
    paper_percent: f64,
    /// Wire bytes before ops that no output needs are dropped.
    planned_percent: f64,
    /// Bytes exchanged after they are.
    exchanged: u64,
}

impl Row {
    fn policy(&self) -> Policy {
        let Row { decisions, dtype, .. } = self;
        let json = format!(
            r#"{{"version":1,"groups":4,"staleness":2,"dtype":"{dtype}","decisions":{decisions}}}"#
        );
        Policy::from_json(json.as_bytes()).expect("Table 6 is valid")
    }
}

/// Sep-ResNeXt-56 4×16d with four groups, 100 classes.
fn paper_net() -> Net {
    sep_resnext(56, [4, 16], 64, 4, 100)
}

fn percent(fraction: f64) -> f64 {
    (fraction * 10_000.0).round() / 100.0
}

fn split_row(row: &Row, nodes: Nodes) -> Split {
    split(paper_net().onnx(style("burn")), Some(&row.policy()), nodes)
}

#[test]
fn table_6_costs_what_the_paper_says_and_what_crosses_the_wire() {
    for row in &TABLE_6 {
        let cost = split_row(row, Nodes::PerGroup).manifest.cost;
        assert_eq!(cost.paper.blocks, 18);
        assert_eq!(percent(cost.paper.fraction), row.paper_percent);
        let planned = cost.wire.planned_bytes as f64 / cost.wire.ring_bytes as f64;
        assert_eq!(percent(planned), row.planned_percent);
        assert_eq!(cost.wire.exchange_bytes, row.exchanged);
        let fraction = row.exchanged as f64 / cost.wire.ring_bytes as f64;
        assert!((cost.wire.fraction - fraction).abs() < 1e-12);
    }
}

#[test]
fn transfers_add_up_to_the_cost() {
    let Split { manifest, .. } = split_row(&TABLE_6[2], Nodes::PerGroup);
    let sum = |exchanged: bool| -> u64 {
        let chosen = manifest.transfers.iter().filter(|t| t.step.is_some() == exchanged);
        chosen.map(|transfer| transfer.bytes).sum()
    };
    assert_eq!(sum(true), manifest.cost.wire.exchange_bytes);
    assert_eq!(sum(false), manifest.cost.wire.other_bytes);
    let sent: u64 = (0..4).map(|rank| manifest.traffic(rank).0).sum();
    let received: u64 = (0..4).map(|rank| manifest.traffic(rank).1).sum();
    assert_eq!((sent, received), (sum(true) + sum(false), sum(true) + sum(false)));
    // The input goes to the three nodes that are not the entry.
    assert_eq!(sum(false), 3 * 3 * 32 * 32 * 4);
}

#[test]
fn the_ring_is_of_the_real_tensors() {
    // 2(G − 1) times f32, 6 blocks of each of three shapes.
    let shapes: u64 = [64 * 32 * 32, 128 * 16 * 16, 256 * 8 * 8].into_iter().sum();
    let Split { manifest, .. } = split_row(&TABLE_6[0], Nodes::PerGroup);
    assert_eq!(manifest.cost.wire.ring_bytes, 6 * 4 * 6 * shapes);
}

#[test]
fn nets_have_the_papers_parameters() {
    let cases = [
        (56, [8, 16], 1, 4_394_676),
        (56, [8, 16], 4, 4_539_444),
        (56, [4, 16], 1, 2_234_548),
        (56, [4, 16], 4, 2_379_316),
        (110, [8, 16], 1, 8_808_372),
        (110, [8, 16], 4, 8_969_268),
        (56, [64, 4], 1, 5_231_284),
        (56, [64, 4], 4, 5_376_052),
    ];
    for (depth, width, groups, parameters) in cases {
        let net = sep_resnext(depth, width, 64, groups, 100);
        assert_eq!(net.parameters(), parameters, "-{depth} {width:?}, G = {groups}");
    }
}

#[test]
fn a_split_counts_the_parameters_of_its_source() {
    // An ordinary network has no groups to drop: the table counts what Table 1 counts.
    let net = sep_resnext(56, [4, 16], 64, 1, 100);
    let split = split(net.onnx(style("burn")), None, Nodes::Even(1));
    assert_eq!(split.work[0].parameters, 2_234_548);
}

#[test]
fn a_split_counts_multiplications() {
    // By hand, for the only group left without a policy: convolutions and the classifier.
    let net = sep_resnext(11, [4, 4], 8, 2, 10);
    let split = split(net.onnx(style("burn")), None, Nodes::PerGroup);
    let area = [32 * 32, 16 * 16, 8 * 8];
    let mut products = 3 * 16 * 9 * area[0];
    let mut channels = 16;
    for (stage, area_out) in area.into_iter().enumerate() {
        let (inner, out) = ((16 << stage) / 2, 8 << stage);
        let area_in = area[stage.saturating_sub(1)];
        products += channels * inner * area_in + inner * inner / 2 * 9 * area_out;
        products += (inner + channels) * out * area_out;
        channels = out;
    }
    products += channels * 10;
    assert_eq!(split.work[0].flops, 2 * products as u64);
    assert_eq!(split.work[1].flops, 0);
}

#[test]
fn both_sizes_have_the_papers_steps() {
    for (depth, blocks, steps) in [(56, 18, 9), (110, 36, 18)] {
        assert_eq!(sep_resnext(depth, [4, 16], 64, 4, 100).blocks.len(), blocks);
        assert_eq!(Policy::steps_for(blocks, 2), steps);
    }
}
