//! Nodes on a network of their own: each in a namespace, all on one segment.
//!
//! A [`Segment`] is a bridge in a namespace of its own, and a namespace a device, as a switch with
//! small computers around it; this process has a cable to it too. It takes root and `ip`: where
//! they are missing each test says so on standard error, and passes. Everything goes with the
//! namespaces when a segment is dropped.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use snn_compiler::Nodes;
use snn_runtime::client::Client;
use snn_runtime::key::ClusterKey;
use snn_schemas::Dtype;
use snn_schemas::manifest::Manifest;

use crate::cluster::PATIENCE;
use crate::devices::{self, Devices, Place, WITHIN, ask_through, die_and_return, net, policy_of};
use crate::fixtures::{Net, residual};
use crate::processes::{NodeProcess, SNN_RUN};
use crate::trust::write_key;
use crate::{assert_close, folder, image, not_tested, reference, ring};

/// Segments made by this process.
static MADE: AtomicU32 = AtomicU32::new(0);
/// How long nodes are watched that must not find each other; those that may need a tenth of it.
const LONG_ENOUGH: Duration = Duration::from_secs(3);

/// Runs a command of `ip` or its like.
fn configure(line: &str) -> Result<(), String> {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).output();
    let done = done.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("{line}: {}", said.trim())) }
}

/// Devices around a switch.
pub(crate) struct Segment {
    switch: String,
    devices: Vec<String>,
    /// First three numbers of all addresses.
    net: String,
}

impl Segment {
    /// A segment of `count` devices; where none can be made, says why.
    pub(crate) fn new(count: usize) -> Option<Segment> {
        let (process, number) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let name = format!("snn{:x}-{number}", process & 0xf_ffff);
        // The addresses for measuring networks, which nobody has.
        let net = format!("198.18.{}", (process * 16 + number) % 256);
        let devices = (0..count).map(|device| format!("{name}d{device}")).collect();
        let segment = Segment { switch: name, devices, net };
        match segment.make() {
            Ok(()) => Some(segment),
            Err(reason) => {
                not_tested("nodes on a network segment", reason);
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let Segment { switch, net, devices } = self;
        configure(&format!("ip netns add {switch}"))?;
        configure(&format!("ip -n {switch} link add bridge type bridge"))?;
        configure(&format!("ip -n {switch} link set bridge up"))?;
        for (number, device) in devices.iter().enumerate() {
            configure(&format!("ip netns add {device}"))?;
            configure(&format!(
                "ip -n {device} link add eth0 type veth peer name d{number} netns {switch}"
            ))?;
            configure(&format!("ip -n {switch} link set d{number} master bridge up"))?;
            configure(&format!("ip -n {device} addr add {net}.{}/24 dev eth0", number + 1))?;
            configure(&format!("ip -n {device} link set eth0 up"))?;
            configure(&format!("ip -n {device} link set lo up"))?;
        }
        // Names of interfaces have at most fifteen letters.
        configure(&format!("ip link add {switch} type veth peer name here netns {switch}"))?;
        configure(&format!("ip -n {switch} link set here master bridge up"))?;
        configure(&format!("ip addr add {net}.254/24 dev {switch}"))?;
        configure(&format!("ip link set {switch} up"))
    }

    /// Lets the switch drop what goes to all.
    pub(crate) fn block_multicast(&self) {
        for number in 0..self.devices.len() {
            let line = format!("bridge -n {} link set dev d{number} mcast_flood off", self.switch);
            configure(&line).unwrap();
        }
    }

    /// Pulls a device's cable out of the switch, or puts it back.
    pub(crate) fn plug(&self, device: usize, is_in: bool) {
        let state = if is_in { "up" } else { "down" };
        configure(&format!("ip -n {} link set d{device} {state}", self.switch)).unwrap();
    }

    /// Lets no device reach another: only this process, at [`Segment::here`].
    pub(crate) fn isolate(&self) {
        for number in 0..self.devices.len() {
            let line = format!("bridge -n {} link set dev d{number} isolated on", self.switch);
            configure(&line).unwrap();
        }
    }

    /// Gives each device a second address, and lets devices reach each other there alone: whoever is
    /// asked from [`Segment::here`] has another name for each than they have for each other.
    pub(crate) fn separate_addresses(&self) {
        let second = self.net.replace("198.18.", "198.19.");
        let devices = || self.devices.iter().enumerate();
        for (number, device) in devices() {
            let address = format!("{second}.{}/24", number + 1);
            configure(&format!("ip -n {device} addr add {address} dev eth0")).unwrap();
            for (other, _) in devices().filter(|(other, _)| *other != number) {
                let line = format!("ip -n {device} route add unreachable {}", self.ip(other));
                configure(&line).unwrap();
            }
        }
    }

    /// This process's own address.
    pub(crate) fn here(&self) -> String {
        format!("{}.254", self.net)
    }

    /// A command that runs on a device.
    pub(crate) fn prefix(&self, device: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.devices[device]].map(str::to_owned).into()
    }

    pub(crate) fn ip(&self, device: usize) -> String {
        format!("{}.{}", self.net, device + 1)
    }

    /// Starts a node on a device.
    pub(crate) fn node(&self, device: usize, arguments: &[&str]) -> Node {
        let prefix = self.prefix(device);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(SNN_RUN).args(arguments);
        // Rather an end with a reason than a test that waits for ever.
        command.args(["--timeout", "60"]);
        let mut process = NodeProcess::spawn(command);
        let line = process.line();
        let port = line.rsplit(':').next().unwrap().to_owned();
        assert!(line.starts_with("listening on "), "{line}\n{}", process.rest());
        Node { process, address: format!("{}:{port}", self.ip(device)) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        for name in self.devices.iter().chain([&self.switch]) {
            // One that was never made need not be taken down.
            let _ = configure(&format!("ip netns del {name}"));
        }
    }
}

/// A node on a device.
pub(crate) struct Node {
    process: NodeProcess,
    address: String,
}

impl Node {
    /// Reads what the node says until it is ready.
    #[track_caller]
    pub(crate) fn said_until_ready(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let line = self.process.line();
            assert!(!line.is_empty(), "{said:?}");
            if line == "ready" {
                return said;
            }
            said.push(line);
        }
    }
}

/// Copies each shard of a split to a folder of its own, as devices have them.
struct Copies(tempfile::TempDir);

impl Copies {
    fn of(split: &tempfile::TempDir, nodes: usize) -> Copies {
        let copies = Copies(tempfile::tempdir().unwrap());
        for rank in 0..nodes {
            let shard = copies.shard(rank);
            std::fs::create_dir(shard.parent().unwrap()).unwrap();
            std::fs::copy(split.path().join(format!("shard_{rank}.onnx")), shard).unwrap();
        }
        copies
    }

    fn shard(&self, rank: usize) -> PathBuf {
        self.0.path().join(rank.to_string()).join(format!("shard_{rank}.onnx"))
    }
}

pub(crate) async fn assert_answers(
    address: &str,
    key: Option<&ClusterKey>,
    net: &Net,
    expected: &[f32],
) {
    let client = Client::connect(&[address.to_owned()], key, PATIENCE).await.unwrap();
    let answer = client.infer(vec![image(net, 1)], PATIENCE).await.unwrap();
    assert_close(answer.outputs[0].data(), expected, address);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_of_two_clusters_on_one_segment_find_their_own() {
    let Some(segment) = Segment::new(4) else { return };
    let key = ClusterKey::new(Duration::from_secs(3600)).unwrap();
    let (large, small) = (net(), residual(2, &[2], 8));
    let policies = [policy_of(&large), ring(&small, 1, Dtype::F32)];
    let splits = [
        folder(&large, Some(&policies[0]), Nodes::PerGroup),
        folder(&small, Some(&policies[1]), Nodes::PerGroup),
    ];
    let copies = [Copies::of(&splits[0], 4), Copies::of(&splits[1], 2)];
    let file = copies[0].0.path().join("cluster.key");
    write_key(&file, &key);
    // The same key for both: it is the split that tells them apart.
    let start = |cluster: usize, rank: usize| {
        let shard = copies[cluster].shard(rank);
        segment.node(rank, &[shard.to_str().unwrap(), "--key", file.to_str().unwrap()])
    };
    let mut first = start(0, 0);
    assert_eq!(first.process.line(), "waiting for ranks 1, 2, 3");
    let mut others = [start(1, 0), start(0, 1), start(1, 1), start(0, 2)];
    // Ranks disappear from the list as they are found; without the last nobody is ready.
    assert!(first.process.line().starts_with("waiting for rank"));
    let mut last = start(0, 3);
    for node in [&mut first, &mut last].into_iter().chain(&mut others) {
        let said = node.said_until_ready();
        assert!(said.iter().all(|line| line.starts_with("waiting for rank")), "{said:?}");
    }
    let expected = |cluster: usize, net: &Net| {
        reference::logits(net, Some(&policies[cluster]), image(net, 1).data())
    };
    assert_answers(&others[3].address, Some(&key), &large, &expected(0, &large)).await;
    assert_answers(&others[2].address, Some(&key), &small, &expected(1, &small)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_multicast_is_blocked_addresses_help() {
    let Some(segment) = Segment::new(2) else { return };
    segment.block_multicast();
    let net = residual(2, &[2], 8);
    let policy = ring(&net, 1, Dtype::F32);
    let split = folder(&net, Some(&policy), Nodes::PerGroup);
    let expected = reference::logits(&net, Some(&policy), image(&net, 1).data());
    let copies = Copies::of(&split, 2);
    let shards = [copies.shard(0), copies.shard(1)];
    let [one, two] = shards.each_ref().map(|shard| shard.to_str().unwrap());
    let mut first = segment.node(0, &[one, "--insecure"]);
    assert_eq!(first.process.line(), "waiting for rank 1");
    {
        let mut lost = segment.node(1, &[two, "--insecure"]);
        assert_eq!(lost.process.line(), "waiting for rank 0");
        tokio::time::sleep(LONG_ENOUGH).await;
        let refused = Client::connect(&[first.address.clone()], None, LONG_ENOUGH).await;
        let client = refused.unwrap();
        let answer = client.infer(vec![image(&net, 1)], Duration::from_millis(200)).await;
        assert!(answer.unwrap_err().to_string().starts_with("rank 1 missing"));
    }
    let mut second = segment.node(1, &[two, "--insecure", "--peer", &first.address]);
    second.said_until_ready();
    first.said_until_ready();
    assert_answers(&second.address, None, &net, &expected).await;
    drop((first, second));

    // The same by the addresses of the manifest.
    let text = std::fs::read(split.path().join("cluster.json")).unwrap();
    let mut manifest = Manifest::from_json(&text).unwrap();
    for (device, node) in manifest.nodes.iter_mut().enumerate() {
        node.address = Some(format!("{}:7447", segment.ip(device)));
    }
    for shard in &shards {
        std::fs::write(shard.with_file_name("cluster.json"), manifest.to_json()).unwrap();
    }
    let mut first = segment.node(0, &[one, "--insecure"]);
    let mut second = segment.node(1, &[two, "--insecure"]);
    first.said_until_ready();
    second.said_until_ready();
    assert_answers(&format!("{}:7447", segment.ip(0)), None, &net, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_deaths_beside_a_link_of_one_megabit() {
    let Some(segment) = Segment::new(4) else { return };
    let (device, switch) = (&segment.devices[2], &segment.switch);
    for (namespace, interface) in [(device, "eth0"), (switch, "d2")] {
        let line = format!(
            "tc -n {namespace} qdisc add dev {interface} root tbf rate 1mbit burst 8kb latency 400ms"
        );
        if let Err(reason) = configure(&line) {
            not_tested("a shaped link", reason);
            return;
        }
    }
    let net = net();
    let places = (0..4).map(|device| {
        let address = format!("{}:7447", segment.ip(device));
        Place { prefix: segment.prefix(device), address, http: None }
    });
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let mut devices = Devices::start_at(split, places.collect(), &["--insecure"]);
    let start = Instant::now();
    ask_through(&net, &mut devices, 200, die_and_return).await;
    assert!(start.elapsed() < 4 * PATIENCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_survive_cables_that_are_pulled_and_put_back() {
    let Some(segment) = Segment::new(4) else { return };
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    // They find each other, and again, by multicast alone.
    let nodes: Vec<Node> = (0..4)
        .map(|rank| {
            let shard = split.path().join(format!("shard_{rank}.onnx"));
            segment.node(rank, &[shard.to_str().unwrap(), "--insecure"])
        })
        .collect();
    let policy = policy_of(&net);
    let ask = async |client: &Client, number: usize| {
        let input = image(&net, number);
        let expected = reference::logits(&net, Some(&policy), input.data());
        devices::ask(client, input, &expected, &format!("request {number}")).await;
    };
    let connected = async |node: &Node| {
        let addresses = [node.address.clone()];
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&addresses, None, WITHIN).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    };
    let client = connected(&nodes[1]).await;
    // The first answer shows that the cluster has been complete.
    client.infer(vec![image(&net, 0)], PATIENCE).await.unwrap();
    // Rank 0 has the head.
    for (round, pulled) in [2, 0].into_iter().enumerate() {
        segment.plug(pulled, false);
        for number in 0..40 {
            ask(&client, 100 * round + number).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        segment.plug(pulled, true);
        for number in 40..60 {
            ask(&client, 100 * round + number).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Whoever asks the one that was away is answered, too; and it has its rank again.
        let returned = connected(&nodes[pulled]).await;
        ask(&returned, round).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reports = returned.reports(WITHIN).await.unwrap_or_default();
            let own = reports.len() == 4 && reports.iter().all(|report| report.guest_of.is_none());
            if own {
                break;
            }
            assert!(Instant::now() < deadline, "{reports:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
