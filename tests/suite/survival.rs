//! Nodes die, freeze and return while requests are made: every one is answered, and rightly.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use snn_compiler::Nodes;
use snn_runtime::client::Client;
use snn_schemas::Dtype;

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{SNN_RUN, kill};
use crate::{assert_close, folder, image, policy, reference};

/// Deadline of a request.
const WITHIN: Duration = Duration::from_secs(2);
/// What one takeover may add: noticing, loading, running again. Generous: tests share the machine.
const TAKEOVER: Duration = Duration::from_secs(8);

fn net() -> Net {
    residual(4, &[4, 4], 8)
}

/// Four nodes on fixed ports of this machine, each of which may be killed and started again.
struct Devices {
    _folder: tempfile::TempDir,
    arguments: Vec<Vec<String>>,
    processes: Vec<Child>,
    addresses: Vec<String>,
}

impl Devices {
    fn start(folder: tempfile::TempDir, key: Option<PathBuf>) -> Devices {
        let addresses: Vec<String> =
            free_ports().iter().map(|p| format!("127.0.0.1:{p}")).collect();
        let arguments = (0..4).map(|rank: usize| {
            let shard = folder.path().join(format!("shard_{rank}.onnx"));
            let mut line =
                vec![shard.display().to_string(), "--listen".into(), addresses[rank].clone()];
            let others = addresses.iter().enumerate().filter(|(other, _)| *other != rank);
            line.extend(others.flat_map(|(_, peer)| ["--peer".to_owned(), peer.clone()]));
            line.extend(key.iter().flat_map(|key| ["--key".to_owned(), key.display().to_string()]));
            line
        });
        let arguments: Vec<Vec<String>> = arguments.collect();
        let processes = arguments.iter().map(|line| spawn(line)).collect();
        Devices { _folder: folder, arguments, processes, addresses }
    }

    async fn client(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.addresses, None, WITHIN).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn kill(&mut self, rank: usize) {
        self.processes[rank].kill().unwrap();
        self.processes[rank].wait().unwrap();
    }

    fn restart(&mut self, rank: usize) {
        self.processes[rank] = spawn(&self.arguments[rank]);
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

fn spawn(arguments: &[String]) -> Child {
    Command::new(SNN_RUN).args(arguments).stderr(Stdio::null()).spawn().unwrap()
}

/// Four ports nobody listens on.
fn free_ports() -> Vec<u16> {
    let listeners: Vec<_> =
        (0..4).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// Asks `count` times, doing `harm` before each; every answer must be right and in time.
async fn ask_through(
    net: &Net,
    devices: &mut Devices,
    count: usize,
    mut harm: impl FnMut(&mut Devices, usize),
) {
    let policy = policy(net, 2, Dtype::F16, 5);
    let client = devices.client().await;
    // The first answer shows that the cluster has been complete.
    client.infer(vec![image(net, 0)], PATIENCE).await.unwrap();
    for number in 0..count {
        harm(devices, number);
        let input = image(net, number);
        let expected = reference::logits(net, Some(&policy), input.data());
        let start = Instant::now();
        let answer = client.infer(vec![input], WITHIN).await;
        let answer = answer.unwrap_or_else(|error| panic!("request {number}: {error}"));
        assert_close(answer.outputs[0].data(), &expected, &format!("request {number}"));
        let took = start.elapsed();
        assert!(took < WITHIN + TAKEOVER, "request {number} took {took:?}");
        // Some time passes, or all would be answered between two deaths.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_nodes_that_die_and_return() {
    let net = net();
    let split = folder(&net, Some(&policy(&net, 2, Dtype::F16, 5)), Nodes::PerGroup);
    let mut devices = Devices::start(split, None);
    ask_through(&net, &mut devices, 200, |devices, number| {
        // Every rank in turn, the entry node among them; each is away for a while.
        let rank = number / 25 % 4;
        match number % 25 {
            5 => devices.kill(rank),
            17 => devices.restart(rank),
            _ => {}
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_survive_a_node_that_freezes_and_thaws() {
    let net = net();
    let split = folder(&net, Some(&policy(&net, 2, Dtype::F16, 5)), Nodes::PerGroup);
    let mut devices = Devices::start(split, None);
    ask_through(&net, &mut devices, 60, |devices, number| {
        let rank = 1 + number / 30;
        match number % 30 {
            5 => kill(devices.processes[rank].id(), "-STOP"),
            20 => kill(devices.processes[rank].id(), "-CONT"),
            _ => {}
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_four_still_answers() {
    let net = net();
    let split = folder(&net, Some(&policy(&net, 2, Dtype::F16, 5)), Nodes::PerGroup);
    let mut devices = Devices::start(split, None);
    ask_through(&net, &mut devices, 30, |devices, number| match number {
        5 => devices.kill(0),
        12 => devices.kill(3),
        20 => devices.kill(1),
        _ => {}
    })
    .await;
}
