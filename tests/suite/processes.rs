//! Nodes as processes: what they say, how they end, and that none is left behind.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use snn::run::local::LocalCluster;
use snn_compiler::Nodes;
use snn_schemas::Dtype;

use crate::cluster::PATIENCE;
use crate::equality::options;
use crate::fixtures::{Net, residual};
use crate::{array, folder, image, reference, ring};

pub(crate) const SNN_RUN: &str = env!("CARGO_BIN_EXE_snn-run");

fn net() -> Net {
    residual(2, &[2, 2], 8)
}

fn is_running(pid: u32) -> bool {
    // A process that nobody has waited for yet is a zombie: it has ended.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.trim().chars().next()).is_some_and(|s| s != 'Z')
}

pub(crate) fn kill(pid: u32, signal: &str) {
    let done = Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(done.success());
}

#[track_caller]
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Children of a process, from the kernel's own list.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let lists =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn no_node_outlives_a_parent_that_is_killed() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let mut parent = Command::new(SNN_RUN)
        .arg("--local")
        .arg(folder.path())
        .args(["--repeat", "1000000"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("two nodes", || children(parent.id()).len() == 2);
    let nodes = children(parent.id());
    assert!(nodes.iter().all(|&pid| is_running(pid)));
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_until("the nodes end", || !nodes.iter().any(|&pid| is_running(pid)));
}

#[test]
fn an_interrupted_cluster_ends_with_one_line_and_without_orphans() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let parent = Command::new(SNN_RUN)
        .arg("--local")
        .arg(folder.path())
        .args(["--repeat", "1000000"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("two nodes", || children(parent.id()).len() == 2);
    let nodes = children(parent.id());
    kill(parent.id(), "-TERM");
    let output = parent.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, format!("snn-run: {}: interrupted\n", folder.path().display()));
    assert_eq!(output.status.code(), Some(2));
    wait_until("the nodes end", || !nodes.iter().any(|&pid| is_running(pid)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_ends_the_request_and_nothing_else() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let cluster = LocalCluster::start(folder.path(), options()).await.unwrap();
    let input = array(&image(&net, 0));
    cluster.infer(std::slice::from_ref(&input)).await.unwrap();
    let nodes = cluster.process_ids();
    kill(nodes[1], "-KILL");
    let error = cluster.infer(&[input]).await.unwrap_err().to_string();
    assert!(error.contains("shard_1.onnx: node: rank 1 ended unexpectedly (signal: 9"), "{error}");
    drop(cluster);
    wait_until("the nodes end", || !nodes.iter().any(|&pid| is_running(pid)));
}

/// A node started by hand, and the lines it says.
pub(crate) struct NodeProcess {
    process: Child,
    lines: BufReader<std::process::ChildStderr>,
}

impl NodeProcess {
    pub(crate) fn start(shard: &Path, arguments: &[&str]) -> NodeProcess {
        let mut command = Command::new(SNN_RUN);
        command.arg(shard).args(arguments);
        NodeProcess::spawn(command)
    }

    /// The node that a command starts.
    pub(crate) fn spawn(mut command: Command) -> NodeProcess {
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap());
        NodeProcess { process, lines }
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The next line, but for what is said of having no key.
    pub(crate) fn line(&mut self) -> String {
        loop {
            let line = self.any_line();
            if !line.starts_with("no key: ") {
                return line;
            }
        }
    }

    fn any_line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn address(&mut self) -> String {
        self.line().strip_prefix("listening on tcp/").unwrap().to_owned()
    }

    /// Everything it still says until it ends.
    pub(crate) fn rest(&mut self) -> String {
        let mut said = String::new();
        self.lines.read_to_string(&mut said).unwrap();
        said
    }

    pub(crate) fn code(&mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn nodes_started_by_hand_find_each_other_answer_and_end_cleanly() {
    let net = net();
    let policy = ring(&net, 2, Dtype::F16);
    let folder = folder(&net, Some(&policy), Nodes::PerGroup);
    let mut first = NodeProcess::start(&folder.path().join("shard_0.onnx"), &[]);
    let address = first.address();
    assert_eq!(first.line(), "waiting for rank 1");
    let second = folder.path().join("shard_1.onnx");
    let mut second = NodeProcess::start(&second, &["--peer", &address]);
    let second_address = second.address();
    while second.line() != "ready" {}
    assert_eq!(first.line(), "ready");

    // Any node can be asked.
    let input = folder.path().join("x.npy");
    let output = folder.path().join("y.npy");
    let x = array(&image(&net, 0));
    snn::run::input::write_npy(&input, &x).unwrap();
    for node in [&address, &second_address] {
        let asked = Command::new(SNN_RUN)
            .args(["infer", "--node", node])
            .arg(&input)
            .arg("--output")
            .arg(&output)
            .output()
            .unwrap();
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        let y = snn::run::input::read_npy(&output).unwrap();
        crate::assert_close(&y.data, &reference::logits(&net, Some(&policy), &x.data), node);
        std::fs::remove_file(&output).unwrap();
    }

    kill(second.process.id(), "-INT");
    assert!(second.process.wait().unwrap().success());
    // Whoever is left stands in for whoever has gone.
    let mut said = Vec::new();
    while said.last().map(String::as_str) != Some("ready") {
        said.push(first.line());
    }
    assert!(said.contains(&"standing in for rank 1".to_owned()), "{said:?}");
    kill(first.process.id(), "-TERM");
    assert!(first.process.wait().unwrap().success());
    let mut rest = String::new();
    first.lines.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
}

#[test]
fn a_node_writes_its_trace_at_its_end() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let files = [0, 1].map(|rank| folder.path().join(format!("trace_{rank}.json")));
    let [one, two] = files.each_ref().map(|file| file.to_str().unwrap());
    let mut first = NodeProcess::start(&folder.path().join("shard_0.onnx"), &["--trace", one]);
    let address = first.address();
    let shard = folder.path().join("shard_1.onnx");
    let mut second =
        NodeProcess::start(&shard, &["--peer", &address, "--trace", two, "--no-takeover"]);
    while second.line() != "ready" {}
    let input = folder.path().join("x.npy");
    snn::run::input::write_npy(&input, &array(&image(&net, 0))).unwrap();
    let asked = Command::new(SNN_RUN).args(["infer", "--node", &address]).arg(&input).output();
    assert!(asked.unwrap().status.success());
    for (rank, (node, file)) in [&mut second, &mut first].into_iter().zip([two, one]).enumerate() {
        kill(node.process.id(), "-TERM");
        let said = node.rest();
        assert!(node.process.wait().unwrap().success());
        assert!(
            said.contains(&format!("{file}: both ends of no transfer were recorded")),
            "{said}"
        );
        let trace: serde_json::Value =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |category: &str| events.iter().filter(|event| event["cat"] == category).count();
        assert!(of("compute") > 0 && of("codec") > 0, "{trace}");
        // Where requests begin they are recorded as well.
        assert_eq!(of("request"), 2 * rank);
    }
}

#[test]
fn http_beyond_this_machine_takes_the_users_word() {
    let net = net();
    let folder = folder(&net, None, Nodes::Even(1));
    let shard = folder.path().join("shard_0.onnx");
    let mut refused = NodeProcess::start(&shard, &["--http", "0.0.0.0:0"]);
    let said = refused.rest();
    assert_eq!(refused.code(), Some(2));
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains(": http on 0.0.0.0:"), "{said}");
    assert!(said.ends_with("asks nobody who he is; give --https in its place, a port of this machine only, behind a proxy, or --insecure\n"), "{said}");
    let mut allowed = NodeProcess::start(&shard, &["--http", "0.0.0.0:0", "--insecure"]);
    assert!(allowed.line().starts_with("http://0.0.0.0:"));
    assert!(allowed.line().ends_with("is not encrypted, and asks nobody who he is"));
    let mut local = Command::new(SNN_RUN);
    let local = local.arg("--local").arg(folder.path()).args(["--http", "0.0.0.0:0"]);
    let refused = local.output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    // HTTPS is none of its options.
    let end =
        "asks nobody who he is; give a port of this machine only, behind a proxy, or --insecure\n";
    assert!(said.ends_with(end), "{said}");
}

#[test]
fn a_node_of_another_split_is_refused_by_name() {
    let net = net();
    let ours = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let theirs = folder(&net, Some(&ring(&net, 2, Dtype::F32)), Nodes::PerGroup);
    let mut first = NodeProcess::start(&ours.path().join("shard_0.onnx"), &[]);
    let address = first.address();
    let foreign = theirs.path().join("shard_1.onnx");
    let mut second = NodeProcess::start(&foreign, &["--peer", &address]);
    assert_eq!(second.process.wait().unwrap().code(), Some(2));
    let mut said = String::new();
    second.lines.read_to_string(&mut said).unwrap();
    let last = said.lines().last().unwrap();
    let expected = format!("snn-run: {}: peers: rank 0 is of split ", foreign.display());
    assert!(last.starts_with(&expected), "{said}");
    // The other one refuses as well, for it was told to be in a cluster with that node.
    assert_eq!(first.process.wait().unwrap().code(), Some(2));
}

#[test]
fn a_node_gives_up_on_missing_peers_at_its_timeout() {
    let net = net();
    let folder = folder(&net, Some(&ring(&net, 2, Dtype::F16)), Nodes::PerGroup);
    let shard = folder.path().join("shard_0.onnx");
    let mut node = NodeProcess::start(&shard, &["--timeout", "0.3"]);
    assert_eq!(node.process.wait().unwrap().code(), Some(2));
    let mut said = String::new();
    node.lines.read_to_string(&mut said).unwrap();
    let expected = format!("snn-run: {}: peers: rank 1 missing after 0.3 s", shard.display());
    assert_eq!(said.lines().last(), Some(expected.as_str()));
}

#[test]
fn a_node_without_a_key_says_whom_it_listens_to() {
    let split = folder(&net(), None, Nodes::PerGroup);
    let shard = split.path().join("shard_0.onnx");
    let second = |arguments: &[&str]| {
        let mut node = NodeProcess::start(&shard, arguments);
        node.address();
        node.any_line()
    };
    let closed = "no key: only this machine is listened to, and nobody is looked for (--key FILE)";
    assert_eq!(second(&[]), closed);
    let open = "no key: nothing is encrypted, and whoever reaches the address takes part";
    assert_eq!(second(&["--insecure", "--listen", "127.0.0.1:0"]), open);
}
