//! Who has the key takes part; who has not gets nothing.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use snn_compiler::Nodes;
use snn_runtime::client::{AskError, Client};
use snn_runtime::key::ClusterKey;
use snn_schemas::Dtype;

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::NodeProcess;
use crate::traces::wait_for_lanes;
use crate::{assert_close, folder, image, reference, ring};

const SOON: Duration = Duration::from_millis(1500);

fn net() -> Net {
    residual(2, &[2], 8)
}

pub(crate) fn write_key(path: &Path, key: &ClusterKey) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, key.to_pem()).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn key() -> ClusterKey {
    ClusterKey::new(Duration::from_secs(3600)).unwrap()
}

/// Three keys of one cluster: two that are good, and one whose certificate has expired, by nothing else refused.
pub(crate) fn good_and_expired() -> [ClusterKey; 3] {
    let lifetimes = [3600, 3600, 0].map(Duration::from_secs);
    let keys = ClusterKey::of_one_cluster(lifetimes).unwrap();
    // Certificates count whole seconds, of which the last one is still good.
    std::thread::sleep(Duration::from_millis(1_100));
    let now = SystemTime::now();
    assert_eq!(keys.each_ref().map(|key| key.untimely(now).is_none()), [true, true, false]);
    assert!(keys.iter().all(|key| key.fingerprint() == keys[0].fingerprint()));
    keys
}

/// Two nodes with a key, and the address of each.
fn cluster(folder: &Path, key: &ClusterKey) -> ([NodeProcess; 2], Vec<String>) {
    let file = folder.join("cluster.key");
    write_key(&file, key);
    let arguments = ["--key", file.to_str().unwrap(), "--listen", "127.0.0.1:0"];
    let mut first = NodeProcess::start(&folder.join("shard_0.onnx"), &arguments);
    let address = first.line().strip_prefix("listening on tls/").unwrap().to_owned();
    let arguments = [&arguments[..], &["--peer", &address]].concat();
    let mut second = NodeProcess::start(&folder.join("shard_1.onnx"), &arguments);
    let other = second.line().strip_prefix("listening on tls/").unwrap().to_owned();
    while second.line() != "ready" {}
    ([first, second], vec![address, other])
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_answered_and_nobody_else() {
    let net = net();
    let policy = ring(&net, 1, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::PerGroup);
    let [own, other, expired] = good_and_expired();
    let (_nodes, addresses) = cluster(folder.path(), &own);
    let input = image(&net, 0);
    let expected = reference::logits(&net, Some(&policy), input.data());
    let client = Client::connect(&addresses, Some(&own), PATIENCE).await.unwrap();
    // Another certificate of the cluster's does as well, while it is good.
    let member = Client::connect(&addresses, Some(&other), PATIENCE).await.unwrap();
    for (client, key) in [(&client, "with the key"), (&member, "with another of the cluster")] {
        let answer = client.infer(vec![input.clone()], PATIENCE).await.unwrap();
        assert_close(answer.outputs[0].data(), &expected, key);
    }

    for stranger in [None, Some(&key()), Some(&expired)] {
        let refused = Client::connect(&addresses, stranger, SOON).await.unwrap_err();
        let refused_whole =
            matches!(refused, AskError::NoEntry | AskError::NoAnswer { .. } | AskError::Strange);
        assert!(refused_whole, "{refused:?}");
    }
    // The strangers harmed nobody.
    client.infer(vec![image(&net, 1)], PATIENCE).await.unwrap();
}

/// Two megabytes, more than the queue of any link takes, at the address of a node that only passes them on.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_input_reaches_the_cluster_through_any_node() {
    let net = Net { image: [3, 400, 400], ..net() };
    let policy = ring(&net, 1, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::PerGroup);
    let own = key();
    let (_nodes, addresses) = cluster(folder.path(), &own);
    let client = Client::connect(&addresses[1..], Some(&own), PATIENCE).await.unwrap();
    for seed in 0..3 {
        let input = image(&net, seed);
        let expected = reference::logits(&net, Some(&policy), input.data());
        let answer = client.infer(vec![input], PATIENCE).await.unwrap();
        assert_close(answer.outputs[0].data(), &expected, "a large input");
    }
    let reports = client.reports(PATIENCE).await.unwrap();
    assert_eq!(reports.iter().map(|report| report.failures).collect::<Vec<_>>(), [0, 0]);
}

/// Links that are written and read at the same time by every process on the way, this one among them, lose nothing.
#[tokio::test(flavor = "multi_thread")]
async fn links_with_a_key_are_written_and_read_at_once() {
    let net = net();
    let policy = ring(&net, 1, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::PerGroup);
    let own = key();
    let (_nodes, addresses) = cluster(folder.path(), &own);
    let client = Arc::new(Client::connect(&addresses[1..], Some(&own), PATIENCE).await.unwrap());
    let mut askers = tokio::task::JoinSet::new();
    for seed in 0..8 {
        let (client, input) = (Arc::clone(&client), image(&net, seed));
        let expected = reference::logits(&net, Some(&policy), input.data());
        askers.spawn(async move {
            for number in 0..1000 {
                let answer = client.infer(vec![input.clone()], PATIENCE).await.unwrap();
                assert_close(answer.outputs[0].data(), &expected, &format!("{seed}: {number}"));
            }
        });
    }
    while let Some(done) = askers.join_next().await {
        done.unwrap();
    }
    let reports = client.reports(PATIENCE).await.unwrap();
    assert_eq!(reports.iter().map(|report| report.failures).collect::<Vec<_>>(), [0, 0]);
}

/// Of the node that only passes it on, and with more spans than the queue of any link takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_trace_comes_through_any_node() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 1, Dtype::F16)), Nodes::PerGroup);
    let own = key();
    let (_nodes, addresses) = cluster(folder.path(), &own);
    let client = Client::connect(&addresses[1..], Some(&own), PATIENCE).await.unwrap();
    wait_for_lanes(&client, 2).await;
    let recording = client.record().await.unwrap();
    let requests = async {
        for _ in 0..1000 {
            client.infer(vec![image(&net, 0)], PATIENCE).await.unwrap();
        }
    };
    recording.during(requests).await;
    let lanes = recording.collect().await.unwrap();
    assert_eq!(lanes.iter().map(|aligned| aligned.lane.rank).collect::<Vec<_>>(), [0, 1]);
    let passed_on = serde_json::to_vec(&lanes[0].lane).unwrap().len();
    assert!(passed_on > 256 << 10, "{passed_on} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_certificate_has_expired_is_believed_by_nobody() {
    let net = net();
    let folder = folder(&net, None, Nodes::Even(1));
    let [own, other, expired] = good_and_expired();
    let node = |key: &ClusterKey| {
        let file = folder.path().join("cluster.key");
        write_key(&file, key);
        let arguments = ["--key", file.to_str().unwrap(), "--listen", "127.0.0.1:0"];
        let mut node = NodeProcess::start(&folder.path().join("shard_0.onnx"), &arguments);
        let address = loop {
            // What is wrong with a key is said before.
            if let Some(address) = node.line().strip_prefix("listening on tls/") {
                break address.to_owned();
            }
        };
        while node.line() != "ready" {}
        (node, [address])
    };
    let (good, address) = node(&other);
    Client::connect(&address, Some(&own), PATIENCE).await.unwrap();
    drop(good);
    let (_node, address) = node(&expired);
    let refused = Client::connect(&address, Some(&own), SOON).await.unwrap_err();
    assert!(matches!(refused, AskError::NoAnswer { .. } | AskError::Strange), "{refused:?}");
}

#[test]
fn a_node_without_the_key_stays_outside() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 1, Dtype::F16)), Nodes::PerGroup);
    let [own, member, expired] = good_and_expired();
    let [own, member, expired, other] =
        [("own", own), ("member", member), ("expired", expired), ("other", key())].map(
            |(name, key)| {
                let file = folder.path().join(name);
                write_key(&file, &key);
                file.to_str().unwrap().to_owned()
            },
        );
    let arguments = ["--key", &own, "--listen", "127.0.0.1:0"];
    let mut first = NodeProcess::start(&folder.path().join("shard_0.onnx"), &arguments);
    let address = first.line().strip_prefix("listening on tls/").unwrap().to_owned();
    assert_eq!(first.line(), "waiting for rank 1");
    let shard = folder.path().join("shard_1.onnx");
    let line = ["--peer", &address, "--listen", "127.0.0.1:0"];
    for stranger in [&[][..], &["--key", &other], &["--key", &expired]] {
        let line = [&line[..], &["--timeout", "1.5"], stranger].concat();
        let mut node = NodeProcess::start(&shard, &line);
        let said = node.rest();
        assert!(said.ends_with("peers: rank 0 missing after 1.5 s\n"), "{said}");
        assert_eq!(node.code(), Some(2));
    }
    // Nor did the first hear of a second, until one comes that has another good key of the cluster.
    let mut node = NodeProcess::start(&shard, &[&line[..], &["--key", &member]].concat());
    while node.line() != "ready" {}
    assert_eq!(first.line(), "ready");
}

fn infer(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(crate::processes::SNN_RUN)
        .arg(folder.join("shard_0.onnx"))
        .args(["--timeout", "0.2"])
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn keys_are_private_and_exposure_is_deliberate() {
    use std::os::unix::fs::PermissionsExt as _;
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 1, Dtype::F16)), Nodes::PerGroup);
    let file = folder.path().join("cluster.key");
    let name = file.to_str().unwrap();
    let made =
        Command::new(env!("CARGO_BIN_EXE_snnc")).args(["key", "new", name]).output().unwrap();
    assert!(made.status.success());
    let said = String::from_utf8(made.stdout).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let fingerprint = ClusterKey::from_pem(&text).unwrap().fingerprint();
    assert!(
        said.starts_with(&format!("wrote {name} (key {fingerprint}, good for 3650 days)")),
        "{said}"
    );
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    // A key is never written over.
    let again =
        Command::new(env!("CARGO_BIN_EXE_snnc")).args(["key", "new", name]).output().unwrap();
    assert_eq!(again.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let refused = infer(folder.path(), &["--key", name]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.ends_with(&format!("key: others can read it (mode 644); chmod 600 {name}\n")),
        "{said}"
    );
    let refused = infer(folder.path(), &["--listen", "0.0.0.0:0"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    let expected = "listen on 0.0.0.0:0: without a key only this machine may connect; \
        give --key FILE, or --insecure\n";
    assert!(said.ends_with(expected), "{said}");
    assert_eq!(refused.status.code(), Some(2));
}

/// Passes bytes on both ways between whoever connects and `to`, and keeps all of them.
pub(crate) fn eavesdrop(to: &str) -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (to, kept) = (to.to_owned(), Arc::clone(&heard));
    std::thread::spawn(move || {
        for inner in listener.incoming().map_while(Result::ok) {
            let Ok(outer) = TcpStream::connect(&to) else { return };
            for (mut from, mut to) in
                [(inner.try_clone().unwrap(), outer.try_clone().unwrap()), (outer, inner)]
            {
                let kept = Arc::clone(&kept);
                std::thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        kept.lock().unwrap().extend_from_slice(&bytes[..count]);
                        if to.write_all(&bytes[..count]).is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    (address, heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_listens_on_the_wire_learns_nothing_of_the_input() {
    let net = net();
    let folder = folder(&net, None, Nodes::Even(1));
    let input = image(&net, 3);
    let secret: Vec<u8> = input.data()[10..14].iter().flat_map(|x| x.to_le_bytes()).collect();
    let contains = |heard: &[u8]| heard.windows(secret.len()).any(|window| window == secret);
    let shard = folder.path().join("shard_0.onnx");

    // Without a key the input is there to be seen: else the test would prove nothing.
    let mut open = NodeProcess::start(&shard, &[]);
    let (address, heard) = eavesdrop(&open.address());
    let client = Client::connect(&[address], None, PATIENCE).await.unwrap();
    client.infer(vec![input.clone()], PATIENCE).await.unwrap();
    assert!(contains(&heard.lock().unwrap()));

    let own = key();
    let file = folder.path().join("cluster.key");
    write_key(&file, &own);
    let mut closed =
        NodeProcess::start(&shard, &["--key", file.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    let address = closed.line().strip_prefix("listening on tls/").unwrap().to_owned();
    let (address, heard) = eavesdrop(&address);
    let client = Client::connect(&[address], Some(&own), PATIENCE).await.unwrap();
    client.infer(vec![input], PATIENCE).await.unwrap();
    let heard = heard.lock().unwrap();
    assert!(heard.len() > secret.len() && !contains(&heard));
}
