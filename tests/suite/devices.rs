//! Four nodes as processes, each of which may be killed, frozen and started again.
//!
//! Takes a split's folder and a place a node: on this machine's loopback, or in a namespace of its
//! own. Gives the addresses to ask, and [`ask_through`], which asks while harm is done: every answer
//! must be right, and there within its deadline and one takeover.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use snn_runtime::Tensor;
use snn_runtime::client::Client;
use snn_runtime::key::ClusterKey;
use snn_schemas::{Dtype, Policy};

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{SNN_RUN, kill};
use crate::trust::write_key;
use crate::{assert_close, image, policy, reference};

/// Deadline of a request. More than the usual 2 s: tests share the machine, and with 2 s a request of one
/// run in some forty had no answer in time, beside a benchmark.
pub(crate) const WITHIN: Duration = Duration::from_secs(5);
/// What one takeover may add: noticing, loading, running again. Generous: tests share the machine.
const TAKEOVER: Duration = Duration::from_secs(8);

pub(crate) fn net() -> Net {
    residual(4, &[4, 4], 8)
}

pub(crate) fn policy_of(net: &Net) -> Policy {
    policy(net, 2, Dtype::F16, 5)
}

/// Where a node runs.
pub(crate) struct Place {
    /// What is run before the node's own command line, to get there.
    pub(crate) prefix: Vec<String>,
    /// Where it listens.
    pub(crate) address: String,
    /// Where it serves HTTP, if it does.
    pub(crate) http: Option<SocketAddr>,
}

impl Place {
    fn here(address: SocketAddr) -> Place {
        Place { prefix: vec![], address: address.to_string(), http: None }
    }
}

pub(crate) struct Devices {
    folder: tempfile::TempDir,
    lines: Vec<Vec<String>>,
    processes: Vec<Child>,
    pub(crate) addresses: Vec<String>,
}

impl Devices {
    /// Four nodes on this machine.
    pub(crate) fn start(folder: tempfile::TempDir) -> Devices {
        Devices::start_at(folder, free_places(4).into_iter().map(Place::here).collect(), &[])
    }

    /// Four nodes on this machine, each with its own shard alone, that keep in `kept` what they are handed.
    pub(crate) fn start_keeping(folder: tempfile::TempDir, kept: &Path) -> Devices {
        // Without it nobody looks for the shards of others beside its own.
        std::fs::remove_file(folder.path().join("cluster.json")).unwrap();
        let places = free_places(4).into_iter().map(Place::here).collect();
        Devices::start_at(folder, places, &["--keep", kept.to_str().unwrap(), "--grace", "1"])
    }

    /// Four nodes on this machine that let no other process take part, and where they serve HTTP.
    pub(crate) fn start_with_key(folder: tempfile::TempDir) -> (Devices, Vec<SocketAddr>) {
        let file = folder.path().join("cluster.key");
        write_key(&file, &ClusterKey::new(Duration::from_secs(3600)).unwrap());
        Devices::start_serving(folder, &["--key", file.to_str().unwrap()])
    }

    /// Four nodes on this machine that serve HTTP, and where.
    pub(crate) fn start_with_http(folder: tempfile::TempDir) -> (Devices, Vec<SocketAddr>) {
        Devices::start_serving(folder, &[])
    }

    fn start_serving(folder: tempfile::TempDir, more: &[&str]) -> (Devices, Vec<SocketAddr>) {
        let free = free_places(8);
        let (listen, http) = free.split_at(4);
        let place = |(&address, &http)| Place { http: Some(http), ..Place::here(address) };
        let places = listen.iter().zip(http).map(place).collect();
        // Tests share the machine: what is slow there is not lost.
        let patience = PATIENCE.as_secs().to_string();
        let arguments = [&["--http-within", patience.as_str()], more].concat();
        (Devices::start_at(folder, places, &arguments), http.to_vec())
    }

    /// A node at each place, all of them told of all others.
    pub(crate) fn start_at(
        folder: tempfile::TempDir,
        places: Vec<Place>,
        arguments: &[&str],
    ) -> Devices {
        let addresses: Vec<String> = places.iter().map(|place| place.address.clone()).collect();
        let line = |(rank, place): (usize, Place)| {
            let shard = folder.path().join(format!("shard_{rank}.onnx"));
            let mut line = place.prefix;
            line.extend([SNN_RUN.to_owned(), shard.display().to_string()]);
            line.extend(["--listen".to_owned(), place.address]);
            line.extend(place.http.iter().flat_map(|http| ["--http".to_owned(), http.to_string()]));
            let others = addresses.iter().enumerate().filter(|(other, _)| *other != rank);
            line.extend(others.flat_map(|(_, peer)| ["--peer".to_owned(), peer.clone()]));
            line.extend(arguments.iter().map(|&argument| argument.to_owned()));
            line
        };
        let lines: Vec<Vec<String>> = places.into_iter().enumerate().map(line).collect();
        Devices::run(folder, lines, addresses)
    }

    /// Four nodes that know nobody but a router each, in turn, and are asked at these.
    pub(crate) fn start_behind(folder: tempfile::TempDir, routers: Vec<String>) -> Devices {
        let line = |rank: usize| {
            let shard = folder.path().join(format!("shard_{rank}.onnx")).display().to_string();
            let router = routers[rank % routers.len()].clone();
            [SNN_RUN.to_owned(), shard, "--peer".to_owned(), router].into()
        };
        let lines = (0..4).map(line).collect();
        Devices::run(folder, lines, routers)
    }

    fn run(folder: tempfile::TempDir, lines: Vec<Vec<String>>, addresses: Vec<String>) -> Devices {
        let processes = lines.iter().map(|line| spawn(line)).collect();
        Devices { folder, lines, processes, addresses }
    }

    pub(crate) async fn client(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.addresses, None, WITHIN).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) fn kill(&mut self, rank: usize) {
        self.processes[rank].kill().unwrap();
        self.processes[rank].wait().unwrap();
    }

    pub(crate) fn restart(&mut self, rank: usize) {
        self.processes[rank] = spawn(&self.lines[rank]);
    }

    /// Takes a shard's file away from all nodes; what they have read of it they keep.
    pub(crate) fn lose_shard(&self, rank: usize) {
        std::fs::remove_file(self.folder.path().join(format!("shard_{rank}.onnx"))).unwrap();
    }

    pub(crate) fn signal(&self, rank: usize, signal: &str) {
        kill(self.processes[rank].id(), signal);
    }

    /// Whether every process still runs.
    pub(crate) fn all_run(&mut self) -> bool {
        self.processes.iter_mut().all(|process| process.try_wait().unwrap().is_none())
    }

    /// A number that the kernel keeps of each process, as /proc/PID/status names it.
    pub(crate) fn status(&self, field: &str) -> Vec<u64> {
        let number = |process: &Child| -> u64 {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
        };
        self.processes.iter().map(number).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have been killed already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn spawn(line: &[String]) -> Child {
    Command::new(&line[0]).args(&line[1..]).stderr(Stdio::null()).spawn().unwrap()
}

/// Addresses of this machine where nobody listens.
fn free_places(count: usize) -> Vec<SocketAddr> {
    // All are held until the last is found, so that none is found twice.
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap()).collect()
}

/// A rank that looks random, and is the same in every run.
pub(crate) fn any_rank(seed: usize) -> usize {
    ((seed * 2_654_435_761) >> 9) % 4
}

/// Kills a rank at random and starts it again a while later, as `number` goes on.
pub(crate) fn die_and_return(devices: &mut Devices, number: usize) {
    let rank = any_rank(number / 25);
    match number % 25 {
        5 => devices.kill(rank),
        17 => devices.restart(rank),
        _ => {}
    }
}

/// Asks once; the answer must be right and in time.
pub(crate) async fn ask(client: &Client, input: Tensor, expected: &[f32], what: &str) {
    let start = Instant::now();
    let answer = client.infer(vec![input], WITHIN).await;
    let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_close(answer.outputs[0].data(), expected, what);
    assert!(!answer.degraded, "{what}");
    let took = start.elapsed();
    assert!(took < WITHIN + TAKEOVER, "{what} took {took:?}");
}

/// Asks `count` times, doing `harm` before each; every answer must be right and in time.
pub(crate) async fn ask_through(
    net: &Net,
    devices: &mut Devices,
    count: usize,
    mut harm: impl FnMut(&mut Devices, usize),
) {
    let policy = policy_of(net);
    let client = devices.client().await;
    // The first answer shows that the cluster has been complete.
    client.infer(vec![image(net, 0)], PATIENCE).await.unwrap();
    for number in 0..count {
        harm(devices, number);
        let input = image(net, number);
        let expected = reference::logits(net, Some(&policy), input.data());
        ask(&client, input, &expected, &format!("request {number}")).await;
        // Some time passes, or all would be answered between two deaths.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn every_rank_has_its_turn() {
    let ranks: std::collections::BTreeSet<usize> = (0..8).map(any_rank).collect();
    assert_eq!(ranks, [0, 1, 2, 3].into());
}
