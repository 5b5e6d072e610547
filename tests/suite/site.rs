//! Devices with agents, as processes over loopback, and whoever deploys to them.
//!
//! A [`Site`] starts the agents, with a key or without, and runs `snnc deploy` against all of them; dropping
//! it kills them, and their nodes end with them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use snn_compiler::Nodes;
use snn_runtime::client::Client;
use snn_runtime::key::ClusterKey;
use snn_schemas::{Dtype, Policy};

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{SNN_RUN, children};
use crate::{assert_close, image, reference, ring, split};

pub(crate) fn net() -> Net {
    residual(4, &[2, 2], 8)
}

pub(crate) fn first(net: &Net) -> Policy {
    ring(net, 2, Dtype::F16)
}

pub(crate) fn second(net: &Net) -> Policy {
    ring(net, 1, Dtype::F32)
}

/// A folder as snnc split writes it, hashes and all.
pub(crate) fn written(net: &Net, policy: &Policy) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    snn::compile::write(&split(net, Some(policy), Nodes::PerGroup), folder.path()).unwrap();
    folder
}

/// Folders of versions on a device.
pub(crate) fn versions(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

/// A device with an agent.
pub(crate) struct Device {
    pub(crate) process: Child,
    arguments: Vec<String>,
    pub(crate) dir: PathBuf,
    pub(crate) address: String,
    pub(crate) front: String,
    pub(crate) http: SocketAddr,
}

impl Device {
    fn start(dir: &Path, key: Option<&Path>, name: &str, more: &[&str]) -> Device {
        let mut arguments: Vec<String> =
            ["--agent", "--name", name, "--dir"].map(Into::into).into();
        arguments.push(dir.display().to_string());
        for option in ["--listen", "--serve", "--http"] {
            arguments.extend([option.to_owned(), "127.0.0.1:0".to_owned()]);
        }
        // Tests share the machine: what is slow there is not lost.
        arguments.extend(["--http-within".to_owned(), PATIENCE.as_secs().to_string()]);
        arguments.extend(key.iter().flat_map(|key| ["--key".into(), key.display().to_string()]));
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let (process, address, front, http) = spawn(&arguments);
        Device { process, arguments, dir: dir.to_owned(), address, front, http }
    }

    /// Pulls the plug, and plugs it in again.
    pub(crate) fn restart(&mut self) {
        self.pull_the_plug();
        self.plug_in();
    }

    /// The agent and its nodes end at once.
    pub(crate) fn pull_the_plug(&mut self) {
        let nodes = children(self.process.id());
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        for node in nodes {
            // It may have ended with its agent.
            let mut kill = Command::new("kill");
            let _ = kill.args(["-KILL", &node.to_string()]).stderr(Stdio::null()).status();
        }
    }

    pub(crate) fn plug_in(&mut self) {
        (self.process, self.address, self.front, self.http) = spawn(&self.arguments);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(arguments: &[String]) -> (Child, String, String, SocketAddr) {
    let mut process = Command::new(SNN_RUN).args(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut after = |start: &str| {
        let line = lines.find(|line| !line.starts_with("no key: ")).unwrap();
        let rest = line.strip_prefix(start).unwrap_or_else(|| panic!("{line}"));
        rest.trim_start_matches("tls/").trim_start_matches("tcp/").to_owned()
    };
    let (address, front) = (after("listening on "), after("answering on "));
    let http = after("http://").parse().unwrap();
    after("agent ");
    // Whatever it says later is nobody's business, but must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (process, address, front, http)
}

/// Some devices, and what is needed to deploy to them.
pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) key: Option<PathBuf>,
    pub(crate) devices: Vec<Device>,
}

impl Site {
    pub(crate) fn new(count: usize) -> Site {
        Site::with(count, &[])
    }

    /// Devices whose agents are given more arguments.
    pub(crate) fn with(count: usize, more: &[&str]) -> Site {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("cluster.key");
        let made = Command::new(env!("CARGO_BIN_EXE_snnc"))
            .args(["key", "new"])
            .arg(&key)
            .output()
            .unwrap();
        assert!(made.status.success());
        Site::start(count, folder, Some(key), more)
    }

    /// Devices that let anybody in who is on the same machine.
    pub(crate) fn without_key(count: usize) -> Site {
        Site::start(count, tempfile::tempdir().unwrap(), None, &[])
    }

    fn start(count: usize, folder: tempfile::TempDir, key: Option<PathBuf>, more: &[&str]) -> Site {
        let start = |number: usize| {
            let name = format!("pi{number}");
            Device::start(&folder.path().join(&name), key.as_deref(), &name, more)
        };
        let devices = (0..count).map(start).collect();
        Site { folder, key, devices }
    }

    pub(crate) fn key(&self) -> Option<ClusterKey> {
        let key = self.key.as_ref()?;
        Some(ClusterKey::from_pem(&std::fs::read_to_string(key).unwrap()).unwrap())
    }

    /// `snnc deploy …` to all of them.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let to = self.devices.iter().flat_map(|device| ["--to", &device.address]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_snnc"));
        command.arg("deploy").args(arguments).args(to);
        command.args(self.key.iter().flat_map(|key| [Path::new("--key"), key]));
        command
    }

    pub(crate) fn snnc(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn deploy(&self, split: &Path, more: &[&str]) -> Value {
        let arguments = [&[split.to_str().unwrap(), "--json"], more].concat();
        let output = self.snnc(&arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn status(&self) -> Value {
        let output = self.snnc(&["--status", "--json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Every device gives the right answer, over both of its ways.
    pub(crate) async fn assert_answers(&self, net: &Net, policy: &Policy) {
        let key = self.key();
        for (seed, device) in self.devices.iter().enumerate() {
            let input = image(net, seed);
            let expected = reference::logits(net, Some(policy), input.data());
            let fronts = [device.front.clone()];
            let client = Client::connect(&fronts, key.as_ref(), PATIENCE).await.unwrap();
            let answer = client.infer(vec![input.clone()], PATIENCE).await.unwrap();
            assert_close(answer.outputs[0].data(), &expected, &device.front);
            let (status, answer) = infer(&mut connect(device.http), input.data(), net);
            assert_eq!(status, 200, "{answer}");
            assert_close(&logits(&answer), &expected, "http");
        }
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub(crate) fn connect(address: SocketAddr) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

/// One request over a connection that stays open; gives status and body.
pub(crate) fn infer(
    connection: &mut BufReader<TcpStream>,
    data: &[f32],
    net: &Net,
) -> (u16, String) {
    let [channels, height, width] = net.image;
    let body = serde_json::json!({ "inputs": [{
        "name": "image", "datatype": "FP32", "shape": [1, channels, height, width], "data": data,
    }], "parameters": {} })
    .to_string();
    let head = format!(
        "POST /v2/models/model/infer HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.get_mut().write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
    let (mut status, mut length) = (0, 0);
    loop {
        let mut line = String::new();
        assert!(connection.read_line(&mut line).unwrap() > 0, "the connection was closed");
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(rest) = line.strip_prefix("http/1.1 ") {
            status = rest[..3].parse().unwrap();
        }
        if let Some(rest) = line.strip_prefix("content-length: ") {
            length = rest.parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).unwrap();
    (status, text(&body))
}

pub(crate) fn logits(answer: &str) -> Vec<f32> {
    let answer: Value = serde_json::from_str(answer).unwrap();
    let data = answer["outputs"][0]["data"].as_array().unwrap();
    data.iter().map(|number| number.as_f64().unwrap() as f32).collect()
}
