//! The cost model against times worked out by hand.

use super::*;
use crate::policy::{Decision, Dtype, Levels, Step};

/// 1 GFLOP/s: a nanosecond an operation.
fn device() -> Device {
    Device::new(1.0).unwrap()
}

/// A link that takes a microsecond a byte, headers included, and 2 ms there and back.
fn link() -> Link {
    let bits_per_second = 8e6 * (1.0 + PACKET_OVERHEAD);
    Link { bits_per_second, round_trip: Duration::from_millis(2) }
}

fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
}

fn carried(from: usize, to: usize, bytes: u64) -> Carried {
    Carried { from, to, bytes, elements: bytes, exchange: true }
}

const MS: u64 = 1_000_000;

#[test]
fn a_receive_waits_for_what_is_on_its_way() {
    use Piece::{Compute, Receive, Send};
    // 1 sends 3 ms of bytes at 2 ms; they are there at 2 + 3 + 1; 0 needs them at 4.
    let nodes = vec![
        vec![Compute(4 * MS), Receive(0), Compute(MS)],
        vec![Compute(2 * MS), Send(0), Compute(9 * MS)],
    ];
    let plan = Plan { entry: 0, nodes, transfers: vec![carried(1, 0, 3000)] };
    let found = plan.predict(&[device()], &link()).unwrap();
    near(found.latency, 0.007);
    near(found.nodes[0].waiting, 0.002);
    near(found.nodes[0].compute, 0.005);
    near(found.nodes[1].finished, 0.011);
    // Of 4 ms of travel 2 are hidden.
    near(found.hidden().unwrap(), 0.5);
    assert_eq!((plan.flops(0), found.nodes[1].bytes_sent), (5 * MS, 3000));
}

#[test]
fn what_crosses_is_moved_within_both_devices_too() {
    use Piece::{Compute, Receive, Send};
    let input = Carried { exchange: false, ..carried(0, 1, 0) };
    let nodes = vec![
        vec![Send(1), Compute(4 * MS), Receive(0)],
        vec![Receive(1), Compute(2 * MS), Send(0)],
    ];
    // Half a gigabyte a second: 3000 elements of four bytes take 24 µs.
    let device = Device { gbytes: Some(0.5), ..device() };
    let plan = Plan { entry: 0, nodes, transfers: vec![carried(1, 0, 3000), input] };
    let found = plan.predict(&[device], &link()).unwrap();
    // The input is there at 1 ms, computed upon until 3; 3 ms of bytes and 1 of travel.
    near(found.transfers[0].arrived, 0.007_024);
    near(found.latency, 0.007_048);
    near(found.nodes[1].compute, 0.002_024);
}

#[test]
fn what_a_late_sender_costs_is_not_travel() {
    use Piece::{Compute, Receive, Send};
    let nodes = vec![vec![Receive(0)], vec![Compute(20 * MS), Send(0)]];
    let plan = Plan { entry: 0, nodes, transfers: vec![carried(1, 0, 3000)] };
    let found = plan.predict(&[device()], &link()).unwrap();
    near(found.nodes[0].waiting, 0.024);
    near(found.transfers[0].visible(), 0.004);
    near(found.hidden().unwrap(), 0.0);
}

#[test]
fn a_link_carries_one_tensor_after_another_in_each_direction() {
    use Piece::{Receive, Send};
    let nodes = vec![
        vec![Send(0), Send(1), Receive(2), Receive(3)],
        vec![Send(2), Receive(0)],
        vec![Send(3), Receive(1)],
    ];
    let transfers =
        vec![carried(0, 1, 1000), carried(0, 2, 1000), carried(1, 0, 1000), carried(2, 0, 1000)];
    let found = Plan { entry: 0, nodes, transfers }.predict(&[device()], &link()).unwrap();
    let arrived: Vec<f64> = found.transfers.iter().map(|t| t.arrived).collect();
    for (found, expected) in arrived.iter().zip([0.002, 0.003, 0.002, 0.003]) {
        near(*found, expected);
    }
}

#[test]
fn each_node_may_be_another_device() {
    let nodes = vec![vec![Piece::Compute(MS)], vec![Piece::Compute(MS)]];
    let plan = Plan { entry: 1, nodes, transfers: vec![] };
    let devices = [device(), Device::new(0.5).unwrap()];
    near(plan.predict(&devices, &link()).unwrap().latency, 0.002);
    let three = [device(), device(), device()];
    let error = plan.predict(&three, &link()).unwrap_err().to_string();
    assert_eq!(error, "3 devices for 2 nodes, expected one, or one a node");
}

#[test]
fn plans_that_make_no_sense_are_refused() {
    use Piece::{Receive, Send};
    let predict = |nodes: Vec<Vec<Piece>>, transfers: Vec<Carried>| {
        let plan = Plan { entry: 0, nodes, transfers };
        plan.predict(&[device()], &link()).unwrap_err().to_string()
    };
    let circle = vec![vec![Receive(1), Send(0)], vec![Receive(0), Send(1)]];
    let transfers = vec![carried(0, 1, 1), carried(1, 0, 1)];
    assert_eq!(predict(circle, transfers), "rank 0 waits for ever");
    assert_eq!(
        predict(vec![vec![Send(7)]], vec![]),
        "rank 0 has no transfer t7 to send or receive"
    );
    let other = vec![vec![Send(0)], vec![]];
    let expected = "rank 0 has no transfer t0 to send or receive";
    assert_eq!(predict(other, vec![carried(1, 0, 1)]), expected);
    let twice = vec![vec![Send(0), Send(0)], vec![]];
    assert_eq!(predict(twice, vec![carried(0, 1, 1)]), expected);
    let beyond = vec![vec![Send(0)]];
    assert_eq!(predict(beyond, vec![carried(0, 1, 1)]), expected);
    assert_eq!(predict(vec![vec![Receive(3)]], vec![]), expected.replace("t0", "t3"));
}

#[test]
fn devices_and_links_are_read_as_people_write_them() {
    assert_eq!("5gflops".parse::<Device>().unwrap().gflops, 5.0);
    near("800 MFLOPS".parse::<Device>().unwrap().gflops, 0.8);
    let link: Link = "300mbit,0.3ms".parse().unwrap();
    assert_eq!((link.bits_per_second, link.round_trip), (300e6, Duration::from_micros(300)));
    assert_eq!("1gbit".parse::<Link>().unwrap().round_trip, Duration::ZERO);
    let unlimited: Link = "unlimited,2ms".parse().unwrap();
    assert!(unlimited.occupied(1 << 30) < Duration::from_micros(1));
    for wrong in ["", "5", "gflops", "-5gflops", "0gflops", "nangflops", "infgflops"] {
        assert!(wrong.parse::<Device>().is_err(), "{wrong}");
    }
    for wrong in ["", "300", "0mbit", "300mbit,", "300mbit,3", "300mbit,-1ms", "1gbit,2h"] {
        assert!(wrong.parse::<Link>().is_err(), "{wrong}");
    }
    assert_eq!(Device::from_json(br#"{"gflops": 4.5, "cpu": "x"}"#).unwrap().gflops, 4.5);
    assert!(Device::from_json(br#"{"gflops": 0}"#).is_err());
    assert!(Device::from_json(b"5gflops").is_err());
}

#[test]
fn a_link_carries_its_rate_less_headers() {
    let link: Link = "300mbit".parse().unwrap();
    let second = link.occupied(35_865_000).as_secs_f64();
    assert!((second - 1.0).abs() < 0.001, "{second}");
}

fn policy(staleness: usize, decisions: &[[usize; 2]]) -> Policy {
    let step = |send_to: &[usize; 2]| {
        Step::new(Decision::new(send_to.to_vec()).unwrap(), Levels::default().full())
    };
    let steps = decisions.iter().map(step).collect();
    Policy { dtype: Dtype::F16, steps, ..Policy::silent(2, staleness, 0) }
}

fn trunk(blocks: usize) -> Trunk {
    let block = TrunkBlock { flops: 10 * MS, channels: 10, elements: 250 };
    let blocks = vec![block; blocks];
    Trunk { input_bytes: 1000, stem_flops: MS, blocks, classified: 1, head_flops: MS }
}

#[test]
fn a_trunk_drops_what_no_output_needs() {
    use Piece::{Compute, Receive, Send};
    let plan = trunk(4).plan(&policy(2, &[[1, 0], [0, 1]])).unwrap();
    // Group 1 reaches group 0 after its first block, and never again.
    assert_eq!(plan.nodes[1], [Receive(0), Compute(MS), Compute(10 * MS), Send(1)]);
    let block = Compute(10 * MS);
    let entry = [Send(0), Compute(MS), block, block, Receive(1), block, block, Compute(MS)];
    assert_eq!(plan.nodes[0], entry);
    assert_eq!(plan.transfers[1], Carried { elements: 2500, ..carried(1, 0, 5000) });
    let silent = trunk(4).plan(&policy(2, &[[0, 1], [0, 1]])).unwrap();
    assert_eq!((silent.nodes[1].len(), silent.transfers.len()), (0, 0));
}

#[test]
fn pooled_features_are_gathered_for_a_classifier_that_reads_all() {
    use Piece::{Compute, Receive, Send};
    let all = Trunk { classified: 2, ..trunk(2) };
    let plan = all.plan(&policy(2, &[[0, 1]])).unwrap();
    let block = Compute(10 * MS);
    assert_eq!(plan.nodes[1], [Receive(0), Compute(MS), block, block, Send(1)]);
    assert_eq!(plan.nodes[0], [Send(0), Compute(MS), block, block, Receive(1), Compute(MS)]);
    assert_eq!(plan.transfers[1], Carried { elements: 10, exchange: false, ..carried(1, 0, 40) });
}

#[test]
fn staleness_hides_travel_behind_a_block() {
    // 5 ms of bytes and 1 ms of travel, against 10 ms a block.
    let latency = |policy: Policy| {
        let plan = trunk(4).plan(&policy).unwrap();
        let found = plan.predict(&[device()], &link()).unwrap();
        (found.latency, found.hidden().unwrap())
    };
    // What is hidden at α = 1 is the time by which one node is behind the other.
    let (fresh, hidden) = latency(policy(1, &[[1, 0]; 4]));
    assert!(hidden < 0.4, "{hidden}");
    let (stale, hidden) = latency(policy(2, &[[1, 0]; 2]));
    near(hidden, 1.0);
    // Node 1 begins 2 ms late: nothing of it is seen by node 0 at α = 2.
    near(stale, 0.042);
    assert!(fresh > stale + 0.020, "{fresh} {stale}");
}

#[test]
fn steps_beyond_the_blocks_are_refused() {
    let error = trunk(3).plan(&policy(2, &[[1, 0]; 2])).unwrap_err().to_string();
    assert_eq!(error, "2 steps of 2 blocks each do not fit 3 blocks");
}
