//! Nodes that meet through zenoh routers alone: they become clients of theirs, and answer as ever.

use std::time::Duration;

use snn_compiler::Nodes;
use snn_runtime::key::ClusterKey;
use snn_runtime::transport::zenoh::{Link, Options};
use snn_schemas::Dtype;

use crate::devices::{Devices, ask_through, die_and_return, net, policy_of};
use crate::fixtures::residual;
use crate::segment::{Segment, assert_answers};
use crate::trust::write_key;
use crate::{folder, image, reference, ring};

/// A router, and `HOST:PORT` where it is.
async fn router(options: Options) -> (Link, String) {
    let link = Link::open_router(&options).await.unwrap();
    let address = link.address().split_once('/').unwrap().1.to_owned();
    (link, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_through_two_routers_survive_deaths() {
    let (_one, first) = router(Options::default()).await;
    let (_two, second) = router(Options { peers: vec![first.clone()], ..Options::default() }).await;
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let mut devices = Devices::start_behind(split, vec![first, second]);
    ask_through(&net, &mut devices, 100, die_and_return).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_cannot_reach_each_other_meet_at_a_router_that_has_their_key() {
    let Some(segment) = Segment::new(2) else { return };
    segment.isolate();
    let net = residual(2, &[2], 8);
    let policy = ring(&net, 1, Dtype::F32);
    let split = folder(&net, Some(&policy), Nodes::PerGroup);
    let key = ClusterKey::new(Duration::from_secs(3600)).unwrap();
    let file = split.path().join("cluster.key");
    write_key(&file, &key);
    let listen = format!("{}:0", segment.here());
    let (_router, address) =
        router(Options { listen, key: Some(key.clone()), ..Options::default() }).await;
    let start = |rank: usize| {
        let shard = split.path().join(format!("shard_{rank}.onnx"));
        let words = [shard.to_str().unwrap(), "--key", file.to_str().unwrap(), "--peer", &address];
        segment.node(rank, &words)
    };
    let mut nodes = [start(0), start(1)];
    let through = format!("through the router at tls/{address}");
    let said: Vec<String> = nodes.iter_mut().flat_map(|node| node.said_until_ready()).collect();
    // Of two, one may stay as it is: routers pass on what a client and a peer say.
    assert!(said.contains(&through), "{said:?}");
    let expected = reference::logits(&net, Some(&policy), image(&net, 1).data());
    assert_answers(&address, Some(&key), &net, &expected).await;
}
