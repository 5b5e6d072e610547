//! Four nodes on fixed ports of this machine, each a process that can be killed and started again.
//!
//! Takes a model; gives processes, where they answer, and what they use. Dropping them kills them.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use snn_compiler::{Nodes, Options, PolicySource, Source, compile};
use snn_runtime::key::ClusterKey;

use crate::http::{Connection, Request};

/// Metadata key of the model's name, by which it is asked for.
const NAME: &str = "snn.name";
/// How long nodes may take to start and find each other, on a machine that has more to do.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long a key is good: longer than any run.
const KEY_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);

/// A split model in a folder of its own, and inputs for it.
pub(crate) struct Model {
    folder: tempfile::TempDir,
    pub(crate) nodes: usize,
    name: String,
    input: String,
    shape: Vec<usize>,
    /// The file of the nodes' key, if they have one.
    key: Option<PathBuf>,
}

impl Model {
    /// Splits a model by its policy; with a key beside the shards where `has_key`.
    pub(crate) fn split(model: &Path, policy: &Path, has_key: bool) -> Result<Model> {
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let source = Source::from_bytes(read(model)?.into())?;
        let policy = PolicySource::from_bytes(&read(policy)?)?;
        let options = Options { nodes: Nodes::PerGroup, ..Options::default() };
        let split = compile(&source, Some(&policy), &options)?;
        let folder = tempfile::tempdir()?;
        snn::compile::write(&split, folder.path())?;
        let port = split.manifest.inputs.first().context("the model has no input")?;
        let (input, shape) = (port.name.clone(), port.shape.clone());
        let named = split.manifest.metadata.iter().find(|(key, _)| key == NAME);
        let name = named.map_or("model", |(_, name)| name).to_owned();
        let key = has_key.then(|| write_key(folder.path())).transpose()?;
        Ok(Model { folder, nodes: split.manifest.nodes.len(), name, input, shape, key })
    }

    /// A request of the Open Inference Protocol, different for each seed.
    pub(crate) fn request(&self, seed: usize) -> Request {
        let elements: usize = self.shape.iter().product();
        let number = |at: usize| ((at * 7919 + seed * 104_729) % 257) as f64 / 128.0 - 1.0;
        let data: Vec<f64> = (0..elements).map(number).collect();
        let body = serde_json::json!({ "inputs": [{
            "name": self.input, "shape": self.shape, "datatype": "FP32", "data": data,
        }] });
        let line = format!("POST /v2/models/{}/infer", self.name);
        Request { line, body: body.to_string() }
    }
}

/// The command lines of all nodes, and where they serve.
pub(crate) struct Lines {
    pub(crate) lines: Vec<Vec<String>>,
    pub(crate) http: Vec<SocketAddr>,
}

impl Lines {
    /// A node for each shard, told of all others, with these arguments besides.
    pub(crate) fn new(model: &Model, arguments: &[&str]) -> Result<Lines> {
        let ports = free_ports(2 * model.nodes)?;
        let (listen, http) = ports.split_at(model.nodes);
        let line = |rank: usize| {
            let shard = model.folder.path().join(format!("shard_{rank}.onnx"));
            let mut line = vec![shard.display().to_string()];
            line.extend(["--listen".into(), listen[rank].to_string()]);
            line.extend(["--http".into(), http[rank].to_string()]);
            let others = listen.iter().enumerate().filter(|(other, _)| *other != rank);
            line.extend(others.flat_map(|(_, peer)| ["--peer".to_owned(), peer.to_string()]));
            let key = model.key.iter();
            line.extend(key.flat_map(|key| ["--key".to_owned(), key.display().to_string()]));
            line.extend(arguments.iter().map(|&argument| argument.to_owned()));
            line
        };
        Ok(Lines { lines: (0..model.nodes).map(line).collect(), http: http.to_vec() })
    }
}

/// Writes a new key into a folder, for its owner alone, and gives its file.
fn write_key(folder: &Path) -> Result<PathBuf> {
    let file = folder.join("cluster.key");
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&file)?.write_all(ClusterKey::new(KEY_LIFETIME)?.to_pem().as_bytes())?;
    Ok(file)
}

/// Waits until a node knows of no missing rank.
pub(crate) fn wait_ready(http: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    while Instant::now() < deadline {
        let answer = Connection::open(http).and_then(|mut c| c.get("/v2/health/ready"));
        if answer.is_ok_and(|answer| answer.status == 200) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("the node at {http} is not ready within {} s", READY_WITHIN.as_secs())
}

/// The processes.
pub(crate) struct Devices {
    lines: Vec<Vec<String>>,
    processes: Vec<Child>,
    pub(crate) http: Vec<SocketAddr>,
}

impl Devices {
    /// Starts a node for each shard, with these arguments besides; all are ready then.
    pub(crate) fn start(model: &Model, arguments: &[&str]) -> Result<Devices> {
        let Lines { lines, http } = Lines::new(model, arguments)?;
        let processes = lines.iter().map(|line| spawn(line)).collect::<Result<_>>()?;
        let devices = Devices { lines, processes, http };
        devices.http.iter().try_for_each(|&http| wait_ready(http))?;
        Ok(devices)
    }

    pub(crate) fn kill(&mut self, rank: usize) -> Result<()> {
        self.processes[rank].kill()?;
        self.processes[rank].wait()?;
        Ok(())
    }

    /// Starts a node again, and does not wait for it.
    pub(crate) fn start_again(&mut self, rank: usize) -> Result<()> {
        self.processes[rank] = spawn(&self.lines[rank])?;
        Ok(())
    }

    pub(crate) fn restart(&mut self, rank: usize) -> Result<()> {
        self.start_again(rank)?;
        wait_ready(self.http[rank])
    }

    /// What each process uses now.
    pub(crate) fn usage(&self) -> Result<Vec<Usage>> {
        self.processes.iter().map(|process| Usage::of(process.id())).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // It may have ended already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn spawn(line: &[String]) -> Result<Child> {
    let program = std::env::current_exe()?;
    Ok(Command::new(program).args(line).env(crate::NODE, "1").stderr(Stdio::null()).spawn()?)
}

fn free_ports(count: usize) -> Result<Vec<SocketAddr>> {
    // All are held until the last is found, so that none is found twice.
    let listeners: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    Ok(listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?)
}

/// What a process uses, by the kernel's count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Memory that is resident, in KiB.
    pub(crate) resident: u64,
    pub(crate) descriptors: usize,
    pub(crate) threads: u64,
}

impl Usage {
    fn of(process: u32) -> Result<Usage> {
        let folder = Path::new("/proc").join(process.to_string());
        let status = fs::read_to_string(folder.join("status"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number =
                line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
            Ok(number.with_context(|| format!("{name} of process {process}"))?.parse()?)
        };
        Ok(Usage {
            resident: field("VmRSS")?,
            descriptors: fs::read_dir(folder.join("fd"))?.count(),
            threads: field("Threads")?,
        })
    }
}

/// Processor time that the threads of a process have had, by the scheduler's count in nanoseconds.
pub(crate) fn processor_time(process: u32) -> Result<Duration> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end between the list and the look.
        let Ok(counts) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        sum += counts.split_whitespace().next().context("schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}
