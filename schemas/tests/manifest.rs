//! Manifests: what is refused, and round trips.

use proptest::prelude::*;
use serde_json::Map;
use snn_schemas::cost::Piece;
use snn_schemas::manifest::{
    BlockEntry, Cost, MANIFEST_VERSION, MAX_MANIFEST_BYTES, NodeEntry, PaperCost, Port, Transfer,
    WireCost,
};
use snn_schemas::{Dtype, Manifest, Packing};

fn transfer(id: u32, from: usize, to: usize, shape: [usize; 4], half: bool) -> Transfer {
    let dtype = if half { Dtype::F16 } else { Dtype::F32 };
    Transfer {
        id,
        from,
        to,
        from_group: id.is_multiple_of(2).then_some(from),
        to_group: id.is_multiple_of(3).then_some(to),
        step: id.is_multiple_of(2).then_some(id as usize % 3),
        tensor: format!("stage{id}/\"out\""),
        shape: shape.to_vec(),
        keep: shape[1],
        channels: 2 * shape[1],
        dtype,
        packing: Packing::None,
        bytes: (shape.iter().product::<usize>() * dtype.bits() / 8) as u64,
    }
}

/// What a node sends, something computed, what it receives; of transfers whose numbers are their places.
fn schedule(rank: usize, transfers: &[Transfer]) -> Vec<Piece> {
    let numbered = || (0..).zip(transfers).filter(|(place, t)| t.id == *place).map(|(_, t)| t);
    let sends = numbered().filter(|t| t.from == rank).map(|t| Piece::Send(t.id));
    let receives = numbered().filter(|t| t.to == rank).map(|t| Piece::Receive(t.id));
    sends.chain([Piece::Compute(1 << 40)]).chain(receives).collect()
}

/// A manifest of `nodes` nodes with transfers around.
fn manifest(nodes: usize, transfers: Vec<Transfer>) -> Manifest {
    let port = |name: &str| Port { name: name.to_owned(), shape: vec![1, 3, 8, 8] };
    let node = |rank| NodeEntry {
        rank,
        shard: format!("shard_{rank}.onnx"),
        sha256: "0".repeat(64),
        address: (rank % 2 == 1).then(|| format!("tcp/192.168.1.{rank}:7447")),
        schedule: schedule(rank, &transfers),
    };
    let block = |index: usize| BlockEntry {
        name: format!("stage1.{index}/out"),
        shape: vec![1, 8, 8, 8],
        groups: vec![index % nodes],
    };
    let provenance = Map::from_iter([("seed".to_owned(), 7.into())]);
    Manifest {
        version: MANIFEST_VERSION,
        tool: "snnc 0.1.0".to_owned(),
        split: "a".repeat(64),
        source_sha256: "b".repeat(64),
        policy_sha256: (nodes > 1).then(|| "c".repeat(64)),
        groups: nodes,
        staleness: Some(2),
        placement: (0..nodes).collect(),
        entry: nodes - 1,
        inputs: vec![port("image")],
        outputs: vec![port("logits")],
        nodes: (0..nodes).map(node).collect(),
        blocks: (0..6).map(block).collect(),
        cost: Cost {
            paper: PaperCost { blocks: 18, fraction: 0.3148 },
            wire: WireCost {
                exchange_bytes: transfers.iter().map(|transfer| transfer.bytes).sum(),
                other_bytes: 0,
                planned_bytes: 1 << 40,
                ring_bytes: 3,
                fraction: 1.0 / 3.0,
            },
        },
        transfers,
        metadata: vec![("snn.mean".to_owned(), "0.5".to_owned())],
        provenance: (nodes > 2).then_some(provenance),
    }
}

/// Something done to a valid manifest.
type Change<'a> = &'a dyn Fn(&mut Manifest);

fn refused(change: impl Fn(&mut Manifest)) -> String {
    let mut manifest = manifest(2, vec![transfer(0, 0, 1, [1, 4, 2, 2], true)]);
    change(&mut manifest);
    Manifest::from_json(manifest.to_json().as_bytes()).expect_err("it is refused").to_string()
}

#[test]
fn faults_are_named() {
    let cases: [(Change, &str); 15] = [
        (&|m| m.version = 2, "version 2, expected 1"),
        (&|m| m.nodes.clear(), "0 nodes, expected 1 to 8"),
        (&|m| m.nodes.swap(0, 1), "node 0 has rank 1, expected 0"),
        (&|m| m.entry = 2, "entry names rank 2, but there are 2 nodes"),
        (&|m| m.placement[1] = 5, "placement names rank 5, but there are 2 nodes"),
        (&|m| m.transfers[0].to = 3, "transfer names rank 3, but there are 2 nodes"),
        (&|m| m.groups = 3, "placement has 2 entries, expected 3, one a group"),
        (&|m| m.blocks[0].groups[0] = 2, "block names group 2, but there are 2 groups"),
        (&|m| m.transfers[0].to_group = Some(2), "transfer names group 2, but there are 2 groups"),
        (&|m| m.transfers[0].step = Some(3), "transfer t0: step 3 lies beyond the 6 blocks"),
        (&|m| m.staleness = None, "transfer t0: step 0 lies beyond the 6 blocks"),
        (
            &|m| m.transfers[0].bytes += 1,
            "transfer t0: 33 bytes do not follow from its shape and dtype",
        ),
        (
            &|m| m.nodes[1].shard = "../shard_1.onnx".to_owned(),
            "shard of rank 1 is \"../shard_1.onnx\", expected a file name",
        ),
        (
            &|m| m.nodes[0].schedule.push(Piece::Receive(0)),
            "schedule of rank 0: transfer t0 is not its own",
        ),
        (
            &|m| m.nodes[1].schedule.push(Piece::Send(9)),
            "schedule of rank 1: transfer t9 is not its own",
        ),
    ];
    for (change, expected) in cases {
        assert_eq!(refused(change), expected);
    }
}

#[test]
fn shards_lie_beside_their_manifest() {
    for path in ["", "/etc/passwd", "a/b.onnx", "..", ".", "shard_0.onnx/"] {
        let message = refused(|manifest| manifest.nodes[0].shard = path.to_owned());
        assert_eq!(message, format!("shard of rank 0 is {path:?}, expected a file name"));
    }
}

#[test]
fn sizes_that_overflow_are_refused() {
    let message = refused(|manifest| {
        manifest.transfers[0].shape = vec![usize::MAX, 8];
        manifest.transfers[0].bytes = 0;
    });
    assert_eq!(message, "transfer t0: 0 bytes do not follow from its shape and dtype");
}

#[test]
fn a_file_that_is_far_too_large_is_not_parsed() {
    let bytes = vec![b' '; MAX_MANIFEST_BYTES + 1];
    let message = Manifest::from_json(&bytes).expect_err("too large").to_string();
    assert_eq!(message, "67108865 bytes are more than the 67108864 a manifest may have");
}

#[test]
fn traffic_is_counted_at_both_ends() {
    let transfers =
        vec![transfer(0, 0, 1, [1, 4, 2, 2], true), transfer(1, 2, 1, [1, 4, 2, 2], false)];
    let manifest = manifest(3, transfers);
    assert_eq!([0, 1, 2].map(|rank| manifest.traffic(rank)), [(32, 0), (0, 96), (64, 0)]);
}

fn manifests() -> impl Strategy<Value = Manifest> {
    (1..=8_usize).prop_flat_map(|nodes| {
        let extent = 0..70_usize;
        let shape = [extent.clone(), extent.clone(), extent.clone(), extent];
        let transfer = (any::<u16>(), 0..nodes, 0..nodes, shape, any::<bool>())
            .prop_map(|(id, from, to, shape, half)| transfer(id.into(), from, to, shape, half));
        prop::collection::vec(transfer, 0..12).prop_map(move |transfers| manifest(nodes, transfers))
    })
}

proptest! {
    #[test]
    fn a_manifest_is_read_as_it_was_written(manifest in manifests()) {
        let json = manifest.to_json();
        prop_assert!(json.ends_with('\n'));
        prop_assert_eq!(&Manifest::from_json(json.as_bytes()).expect("its own output"), &manifest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_manifests_never_panic(
        manifest in manifests(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 0..4),
        end in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut json = manifest.to_json().into_bytes();
        for (place, value, any_byte) in changes {
            let place = place.index(json.len());
            let digit = b"0123456789[]{},\"-e."[usize::from(value) % 19];
            json[place] = if any_byte { value } else { digit };
        }
        json.truncate(end.map_or(json.len(), |end| end.index(json.len())));
        if let Ok(manifest) = Manifest::from_json(&json) {
            for rank in 0..manifest.nodes.len() {
                let _ = manifest.traffic(rank);
            }
        }
    }
}
