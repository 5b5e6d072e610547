//! What clients over HTTP can cost a node: memory, places for requests, connections. None of it for long.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snn_compiler::Nodes;
use snn_runtime::client::ClusterInfo;
use snn_runtime::http::{Asker, Limits, Own, Unanswered};
use snn_runtime::transport::BoxFuture;
use snn_runtime::{Answer, NodeReport, Tensor};
use snn_schemas::Dtype;

use crate::cluster::PATIENCE;
use crate::fixtures::residual;
use crate::http::{
    Answered, Doubler, MALFORMED, blocking, get, good, infer, request, send_malformed, serve,
};
use crate::https::question;
use crate::processes::NodeProcess;
use crate::site;
use crate::{assert_close, folder, image, not_tested, reference, ring};

/// Malformed requests before a node's memory is measured: it has its buffers and threads by then.
const BEFORE: usize = 400;
/// What a node's memory may grow by after that, in KiB: less than the buffers of as many connections need.
const MAX_GROWTH: u64 = 32 << 10;
/// Requests that a client sends and whose answers it does not read: some fifty MiB of them, more than the
/// system takes on the way.
const UNREAD: usize = 4_000;

/// A process's resident memory, in KiB; `None` where the system does not tell it so.
fn memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[test]
fn malformed_requests_cost_a_node_no_memory() {
    let net = residual(2, &[2], 8);
    let policy = ring(&net, 1, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::Even(1));
    // Tests share the machine: what is slow there is not lost.
    let within = PATIENCE.as_secs().to_string();
    let arguments = ["--http", "0", "--http-within", within.as_str()];
    let mut node = NodeProcess::start(&folder.path().join("shard_0.onnx"), &arguments);
    let address: SocketAddr = node.line().strip_prefix("http://").unwrap().parse().unwrap();
    while node.line() != "ready" {}
    let body = question(&net, 0);
    let mut statuses = send_malformed(address, &body, 0..BEFORE);
    let Some(before) = memory(node.id()) else {
        not_tested("memory of a node", "no /proc/PID/status");
        return;
    };
    statuses.extend(send_malformed(address, &body, BEFORE..BEFORE + MALFORMED));
    let after = memory(node.id()).expect("the node still runs");
    assert!(after < before + MAX_GROWTH, "{before} to {after} KiB");
    assert!(statuses.contains(&400), "{statuses:?}");
    let fault = |status: &u16| *status == 200 || (400..500).contains(status);
    assert!(statuses.iter().all(fault), "{statuses:?}");

    let input = image(&net, 1);
    let (status, answer) = site::infer(&mut site::connect(address), input.data(), &net);
    assert_eq!(status, 200, "{answer}");
    let expected = reference::logits(&net, Some(&policy), input.data());
    assert_close(&site::logits(&answer), &expected, "after malformed requests");
}

fn doubler() -> Doubler {
    Doubler { takes: Duration::ZERO, missing: [].into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_loses_its_connection() {
    let limits = Limits {
        connections: 1,
        write_within: Duration::from_millis(300),
        // What ends it is not that.
        head_within: Duration::from_secs(3600),
        ..Limits::default()
    };
    let address = serve(doubler(), limits).await;
    blocking(move || {
        let mut greedy = TcpStream::connect(address).unwrap();
        greedy.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let requests = "GET / HTTP/1.1\r\nhost: test\r\n\r\n".repeat(UNREAD);
        // Once nobody reads its requests either they do not all leave.
        let _ = greedy.write_all(requests.as_bytes());
        // There is one connection: this one gets it once that of the other has ended.
        assert_eq!(get(address, "/v2/health/live").status, 200);
        drop(greedy);
    })
    .await;
}

/// A picture of so many bytes, which is none.
fn classify(address: SocketAddr, bytes: usize) -> Answered {
    request(address, "POST /classify", "", &vec![0; bytes])
}

/// Asks until the status is as expected.
#[track_caller]
fn ask_until(status: u16, ask: impl Fn() -> Answered) -> Answered {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask();
        if answer.status == status {
            return answer;
        }
        assert!(Instant::now() < deadline, "{}: {}", answer.status, answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_waits_for_memory_and_small_ones_do_not() {
    let mib = 1 << 20;
    let limits = Limits {
        bodies: mib,
        picture: mib,
        within: Duration::from_millis(300),
        body_within: Duration::from_secs(3600),
        ..Limits::default()
    };
    let address = serve(doubler(), limits).await;
    blocking(move || {
        ask_until(400, || classify(address, mib / 2));
        // One that says how much will come, and one that does not.
        for length in [format!("content-length: {mib}"), "transfer-encoding: chunked".into()] {
            let mut slow = TcpStream::connect(address).unwrap();
            let head = format!("POST /classify HTTP/1.1\r\nhost: test\r\n{length}\r\n\r\n");
            slow.write_all(head.as_bytes()).unwrap();
            let refused = ask_until(429, || classify(address, mib / 2));
            refused.assert_error(429, "there was no memory for the body within 0.3 s");
            ask_until(400, || classify(address, 1 << 10));
            drop(slow);
            ask_until(400, || classify(address, mib / 2));
        }
    })
    .await;
}

/// A cluster that is never heard of again once it is asked.
struct Silent(Doubler);

impl Asker for Silent {
    fn model(&self, within: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
        self.0.model(within)
    }

    fn infer(&self, _: Vec<Tensor>, _: Duration) -> BoxFuture<'_, Result<Answer, Unanswered>> {
        Box::pin(std::future::pending::<Result<Answer, Unanswered>>())
    }

    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
        Box::pin(std::future::pending::<Vec<NodeReport>>())
    }

    fn own(&self) -> Own {
        self.0.own()
    }

    fn nodes(&self) -> usize {
        self.0.nodes()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_ends_in_time_whatever_the_cluster_does() {
    let limits = Limits { running: 1, within: Duration::from_millis(300), ..Limits::default() };
    let address = serve(Silent(doubler()), limits).await;
    blocking(move || {
        // The second finds the only place free again.
        for _ in 0..2 {
            infer(address, &good()).assert_error(504, "no answer in time (within 0.3 s)");
        }
        let status = get(address, "/status");
        assert_eq!(status.status, 200, "{}", status.text());
    })
    .await;
}
