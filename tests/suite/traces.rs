//! Traces of running clusters, whose nodes were started one by one or by agents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use snn_compiler::Nodes;
use snn_runtime::Tensor;
use snn_runtime::client::{AskError, Client};
use snn_runtime::watch::trace::{Aligned, hidden};

use crate::cluster::PATIENCE;
use crate::devices::{Devices, net, policy_of};
use crate::fixtures::residual;
use crate::processes::{NodeProcess, SNN_RUN};
use crate::site::{Site, second, text, written};
use crate::{array, folder, image};

/// Requests of a trace.
const REPEAT: usize = 5;

/// `snn-run infer --trace` with more arguments; gives where the trace is to be, too.
fn traced(folder: &Path, input: &Tensor, arguments: &[&str]) -> (Output, PathBuf) {
    let (x, trace) = (folder.join("x.npy"), folder.join("trace.json"));
    snn::run::input::write_npy(&x, &array(input)).unwrap();
    let output = Command::new(SNN_RUN)
        .args(["infer", "--repeat", &REPEAT.to_string(), "--trace"])
        .args([&trace, &x])
        .args(arguments)
        .output();
    (output.unwrap(), trace)
}

/// The trace has a lane a node, transfers with both ends, every request, and the share that is said.
#[track_caller]
fn assert_traced(output: &Output, trace: &Path, nodes: usize) {
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let names: BTreeSet<&str> = events
        .iter()
        .filter(|event| event["name"] == "thread_name")
        .map(|event| event["args"]["name"].as_str().unwrap())
        .collect();
    let computing: BTreeSet<u64> = events
        .iter()
        .filter(|event| event["cat"] == "compute")
        .map(|event| event["tid"].as_u64().unwrap())
        .collect();
    for rank in 0..nodes {
        assert!(names.contains(format!("node {rank}").as_str()), "{names:?}");
    }
    assert_eq!(computing, (0..nodes as u64).collect::<BTreeSet<_>>());
    let count = |phase: &str| events.iter().filter(|event| event["ph"] == phase).count();
    let transfers = trace["otherData"]["transfers"].as_u64().unwrap() as usize;
    assert!(transfers >= REPEAT && transfers.is_multiple_of(REPEAT), "{transfers}");
    assert_eq!((count("s"), count("f")), (transfers, transfers));
    assert_eq!(count("b"), REPEAT);
    let share = trace["otherData"]["hidden_share"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&share), "{share}");
    assert!(trace["otherData"]["clocks_within_us"].as_f64().unwrap() > 0.0);
    let number = format!(": {:.1} % of ", share * 100.0);
    let rest = format!(" ms in {transfers} transfers was hidden behind computing");
    assert!(said.contains(&number) && said.contains(&rest), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// Waits until every rank answers whoever asks what it records: a moment after the cluster is complete.
pub(crate) async fn wait_for_lanes(client: &Client, nodes: usize) {
    let deadline = Instant::now() + PATIENCE;
    while client.trace(PATIENCE).await.unwrap().len() < nodes {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_started_one_by_one_are_traced_through_any_of_them() {
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::PerGroup);
    let files = tempfile::tempdir().unwrap();
    let mut devices = Devices::start(split);
    let client = devices.client().await;
    let input = image(&net, 0);
    client.infer(vec![input.clone()], PATIENCE).await.unwrap();
    wait_for_lanes(&client, 4).await;
    let addresses = devices.addresses.clone();
    for node in [&addresses[0], &addresses[3]] {
        let (output, trace) = traced(files.path(), &input, &["--node", node]);
        assert_traced(&output, &trace, 4);
        std::fs::remove_file(&trace).unwrap();
    }

    // One at a time; who comes second is told, and harms nothing.
    let recording = client.record().await.unwrap();
    let (at, dir, x) = (addresses[1].clone(), files.path().to_owned(), input.clone());
    let second = tokio::task::spawn_blocking(move || traced(&dir, &x, &["--node", &at]));
    let (output, trace) = recording.during(second).await.unwrap();
    let said = text(&output.stderr);
    let expected = "trace: node 0: another trace is being recorded";
    assert_eq!(said, format!("snn-run: {}: {expected}\n", addresses[1]));
    assert_eq!((output.status.code(), trace.exists()), (Some(2), false));
    let refused = client.record().await.unwrap_err();
    assert!(matches!(refused, AskError::Refused { .. }), "{refused}");

    // Who dies meanwhile is left out, and whoever stands in for him has recorded nothing as him.
    let ask = async || client.infer(vec![input.clone()], PATIENCE).await.unwrap();
    recording.during(ask()).await;
    devices.kill(3);
    recording.during(ask()).await;
    let lanes = recording.collect().await.unwrap();
    let ranks = |aligned: &Aligned| aligned.lane.rank;
    assert_eq!(lanes.iter().map(ranks).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(hidden(&lanes).transfers > 0);
    // In the next he has a part.
    wait_for_lanes(&client, 4).await;
    let recording = client.record().await.unwrap();
    recording.during(ask()).await;
    let lanes = recording.collect().await.unwrap();
    assert_eq!(lanes.iter().map(ranks).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn nodes_of_agents_are_traced_through_an_agent() {
    let net = crate::site::net();
    let site = Site::new(4);
    // In the first version nothing that rank 1 computes reaches the output.
    let split = written(&net, &second(&net));
    site.deploy(split.path(), &[]);
    let key = site.key.as_ref().unwrap().to_str().unwrap();
    let front = &site.devices[2].front;
    let arguments = ["--node", front.as_str(), "--key", key];
    let (output, trace) = traced(site.folder.path(), &image(&net, 0), &arguments);
    assert_traced(&output, &trace, 4);
}

#[test]
fn a_node_that_records_its_own_trace_is_left_to_it() {
    let net = residual(2, &[2], 8);
    let split = folder(&net, None, Nodes::Even(1));
    let own = split.path().join("own.json");
    let shard = split.path().join("shard_0.onnx");
    let arguments = ["--trace", own.to_str().unwrap()];
    let mut node = NodeProcess::start(&shard, &arguments);
    let address = node.address();
    let (output, _) = traced(split.path(), &image(&net, 0), &["--node", &address]);
    let expected = "trace: node 0: it records its own trace";
    assert_eq!(text(&output.stderr), format!("snn-run: {address}: {expected}\n"));
    assert_eq!(output.status.code(), Some(2));
}
