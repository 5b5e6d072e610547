//! All nodes lose their power, and not all return: who does stands in for who does not, from what it kept. With a
//! shard that has changed on disk meanwhile none starts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use snn_compiler::Nodes;
use snn_runtime::client::Client;
use snn_runtime::digest::Digest;
use snn_runtime::{NodeReport, Shard, Tensor};
use snn_schemas::Dtype;

use crate::agents::{files, get};
use crate::cluster::PATIENCE;
use crate::devices::{Devices, net, policy_of};
use crate::fixtures::residual;
use crate::processes::{NodeProcess, kill};
use crate::site::{self, Site, versions, written};
use crate::{folder, image, ring};

const COMPLETE: &str = "complete.json";

/// Waits until this is so.
#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until each of `nodes` has kept the shards of all others, and the note.
#[track_caller]
fn wait_until_kept(folder: &Path, nodes: usize) {
    wait_until("all is kept", || {
        let files = if folder.is_dir() { files(folder) } else { Vec::new() };
        let whole = |file: &PathBuf| file.extension().is_some_and(|extension| extension != "part");
        files.iter().filter(|file| whole(file)).count() == nodes * nodes
    });
}

/// The bits of an answer: no rounding hides a difference.
async fn bits(client: &Client, input: &Tensor) -> Vec<u32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match client.infer(vec![input.clone()], PATIENCE).await {
            Ok(answer) => {
                assert!(!answer.degraded);
                return answer.outputs[0].data().iter().map(|value| value.to_bits()).collect();
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

/// Waits until the process of rank `host` computes `rank`.
async fn wait_for_host(client: &Client, rank: usize, host: usize) {
    let deadline = Instant::now() + PATIENCE;
    let is_so =
        |report: &NodeReport| report.rank == rank && report.guest_of.unwrap_or(report.rank) == host;
    loop {
        let reports = client.reports(Duration::from_secs(1)).await.unwrap_or_default();
        // While it is handed over both compute it.
        if reports.iter().filter(|report| report.rank == rank).all(is_so)
            && reports.iter().any(is_so)
        {
            return;
        }
        assert!(Instant::now() < deadline, "rank {rank} at {host}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn three_of_four_answer_without(absent: usize) {
    let net = net();
    let kept = tempfile::tempdir().unwrap();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let mut devices = Devices::start_keeping(split, kept.path());
    let input = image(&net, 3);
    let client = devices.client().await;
    let expected = bits(&client, &input).await;
    client.close().await;
    wait_until_kept(kept.path(), 4);
    (0..4).for_each(|rank| devices.kill(rank));
    for rank in (0..4).filter(|&rank| rank != absent) {
        devices.restart(rank);
    }
    let client = devices.client().await;
    assert_eq!(bits(&client, &input).await, expected);
    let lowest = usize::from(absent == 0);
    wait_for_host(&client, absent, lowest).await;
    devices.restart(absent);
    wait_for_host(&client, absent, absent).await;
    assert_eq!(bits(&client, &input).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_of_four_answer_after_a_power_cut() {
    three_of_four_answer_without(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_of_four_answer_after_a_power_cut_without_the_one_with_the_head() {
    three_of_four_answer_without(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_answer_after_a_power_cut_that_one_does_not_return_from() {
    let (net, mut site) = (site::net(), Site::with(4, &["--grace", "1"]));
    let policy = site::first(&net);
    site.deploy(written(&net, &policy).path(), &[]);
    let key = site.key();
    let input = image(&net, 5);
    let ask = async |front: &str| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&[front.to_owned()], key.as_ref(), PATIENCE).await {
                Ok(client) => return bits(&client, &input).await,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    };
    let expected = ask(&site.devices[0].front).await;
    for device in &site.devices {
        let version = versions(&device.dir).remove(0);
        wait_until("all is kept", || {
            let kept = version.join("kept");
            kept.is_dir()
                && files(&kept)
                    .iter()
                    .filter(|f| f.extension().is_some_and(|of| of != "part"))
                    .count()
                    == 4
        });
    }
    site.devices.iter_mut().for_each(site::Device::pull_the_plug);
    site.devices[..3].iter_mut().for_each(site::Device::plug_in);
    for device in &site.devices[..3] {
        assert_eq!(ask(&device.front).await, expected);
    }
    let guests = |http| {
        get(http, "/status").matches("\"guest_of\":").count()
            - get(http, "/status").matches("\"guest_of\":null").count()
    };
    let http = site.devices[0].http;
    wait_until("one is stood in for", || guests(http) == 1);
    site.devices[3].plug_in();
    wait_until("nobody is stood in for", || guests(http) == 0);
    assert_eq!(ask(&site.devices[3].front).await, expected);
}

/// Reads what a node says, up to a line that begins so.
#[track_caller]
fn until(node: &mut NodeProcess, start: &str) -> Vec<String> {
    let mut said = Vec::new();
    loop {
        let line = node.line();
        assert!(!line.is_empty(), "it has ended: {said:?}");
        let found = line.starts_with(start);
        said.push(line);
        if found {
            return said;
        }
    }
}

fn warnings(said: &[String], about: &str) -> usize {
    said.iter().filter(|line| line.contains(" WARN ") && line.contains(about)).count()
}

/// Two nodes, each with its own shard alone.
struct Two {
    folder: tempfile::TempDir,
    kept: PathBuf,
}

impl Two {
    fn new() -> Two {
        let net = residual(2, &[2, 2], 8);
        let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
        std::fs::remove_file(folder.path().join("cluster.json")).unwrap();
        let kept = folder.path().join("kept");
        Two { folder, kept }
    }

    fn start(&self, rank: usize, peer: Option<&str>) -> NodeProcess {
        let shard = self.folder.path().join(format!("shard_{rank}.onnx"));
        let mut arguments = vec!["--keep", self.kept.to_str().unwrap(), "--grace", "0.5"];
        arguments.extend(peer.iter().flat_map(|&peer| ["--peer", peer]));
        NodeProcess::start(&shard, &arguments)
    }

    /// Starts both, until they are ready.
    fn start_both(&self) -> [NodeProcess; 2] {
        let mut first = self.start(0, None);
        let address = first.address();
        let mut second = self.start(1, Some(&address));
        until(&mut first, "ready");
        until(&mut second, "ready");
        [first, second]
    }

    /// The file that rank 0 has kept that ends so.
    fn file(&self, end: &str) -> PathBuf {
        let of = |file: &PathBuf| {
            let folder = file.parent().unwrap().display().to_string();
            folder.ends_with(".0") && file.display().to_string().ends_with(end)
        };
        files(&self.kept).into_iter().find(of).unwrap()
    }
}

#[test]
fn who_has_no_note_or_no_shard_waits_and_says_for_whom() {
    let two = Two::new();
    let both = two.start_both();
    wait_until_kept(&two.kept, 2);
    drop(both);
    let (note, shard) = (two.file(COMPLETE), two.file(".onnx"));

    // Of another cluster, of a newer build, no JSON: as if there were none.
    let text = std::fs::read_to_string(&note).unwrap();
    for other in [text.replace(": 2", ": 3"), text.replace(": 1", ": 9"), "{".into()] {
        std::fs::write(&note, &other).unwrap();
        let mut alone = two.start(0, None);
        let said = until(&mut alone, "nobody");
        let expected = "nobody stands in for rank 1: this cluster has not been complete before";
        assert_eq!(said.last().unwrap(), expected);
        assert_eq!((warnings(&said, COMPLETE), warnings(&said, "")), (1, 1), "{said:?}");
        assert_eq!(std::fs::read_to_string(&note).unwrap(), other);
    }
    std::fs::write(&note, &text).unwrap();

    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let mut alone = two.start(0, None);
    let address = until(&mut alone, "listening on tcp/").pop().unwrap();
    let said = until(&mut alone, "nobody");
    assert_eq!(said.last().unwrap(), "nobody stands in for rank 1: no node has the shard");
    // It has lost nothing: the other returns, and hands its shard over once more.
    let mut second = two.start(1, address.strip_prefix("listening on tcp/"));
    until(&mut second, "ready");
    until(&mut alone, "ready");
    wait_until("it is kept again", || std::fs::read(&shard).unwrap() == bytes);
    drop((alone, second));

    let mut alone = two.start(0, None);
    let said = until(&mut alone, "ready");
    assert!(said.contains(&"standing in for rank 1".to_owned()), "{said:?}");
    assert_eq!(warnings(&said, ""), 0, "{said:?}");
}

#[test]
fn a_disk_that_takes_nothing_costs_a_line() {
    let two = Two::new();
    // No folder can be made here, whoever tries.
    std::fs::write(&two.kept, b"").unwrap();
    let mut first = two.start(0, None);
    let mut said = vec![first.line()];
    let mut second = two.start(1, said[0].strip_prefix("listening on tcp/"));
    until(&mut second, "ready");
    said.extend(until(&mut first, "ready"));
    // A shard and the note come one after the other; of the second nothing is said.
    std::thread::sleep(Duration::from_secs(1));
    for node in [first.id(), second.id()] {
        kill(node, "-TERM");
    }
    said.extend(first.rest().lines().map(str::to_owned));
    assert_eq!((warnings(&said, "not kept"), warnings(&said, "")), (1, 1), "{said:?}");
    assert_eq!(first.code(), Some(0));
}

/// Flips a bit of a shard's file, one that leaves it a shard of its split: nothing but its digest tells.
fn flip_a_bit(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let info = |bytes: &[u8]| {
        let shard = Shard::from_bytes(bytes.to_vec().into()).ok()?;
        shard.info().map(|info| (info.split.clone(), info.rank))
    };
    let before = info(&bytes);
    assert!(before.is_some());
    for place in bytes.len() / 2..bytes.len() {
        bytes[place] ^= 1;
        if info(&bytes) == before {
            return std::fs::write(file, bytes).unwrap();
        }
        bytes[place] ^= 1;
    }
    panic!("every bit matters");
}

#[test]
fn a_shard_with_a_flipped_bit_does_not_start_beside_its_manifest() {
    let net = residual(2, &[2, 2], 8);
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let shard = folder.path().join("shard_0.onnx");
    let digest = || Digest::of(&std::fs::read(&shard).unwrap()).short();
    let expected = digest();
    flip_a_bit(&shard);
    let mut refused = NodeProcess::start(&shard, &[]);
    let said = refused.rest();
    assert_eq!((refused.code(), said.lines().count()), (Some(2), 1), "{said}");
    let why = format!("sha256 {}…, expected {expected}…", digest());
    let named = "not the shard that cluster.json beside it names";
    assert_eq!(said, format!("snn-run: {}: {named}: {why}\n", shard.display()));
    // Nor is it used by the node beside it, which waits for its own.
    let mut beside = NodeProcess::start(&folder.path().join("shard_1.onnx"), &[]);
    let said = until(&mut beside, "waiting for rank 0");
    assert_eq!(warnings(&said, "the shard beside the node's own is not used"), 1, "{said:?}");
    drop(beside);
    // Without a manifest nobody knows better.
    std::fs::remove_file(folder.path().join("cluster.json")).unwrap();
    let mut alone = NodeProcess::start(&shard, &[]);
    assert!(alone.line().starts_with("listening on "));
}
