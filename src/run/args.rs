//! The command line of `snn-run`: what may be typed, and the help that explains it.
//!
//! Takes `argv`; gives [`Args`], or clap's own answer for `--help`, `--version` and mistakes.
//! [`Args::mode`] says which of the commands was meant.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, Subcommand};

use snn_runtime::agent::wire::MAX_SETTING_MS;
use snn_schemas::cost::Link;

use super::emulation;
use super::http::{Encryption, Settings};

/// Longest `--timeout`, in seconds: a week; beyond it is a mistake.
const MAX_TIMEOUT: f64 = 7.0 * 24.0 * 3600.0;
/// Most `--threads`: more than any device at hand has cores.
const MAX_THREADS: i64 = 256;
/// Most `--repeat`: a million requests fill a day.
const MAX_REPEAT: i64 = 1_000_000;

const NODE_HELP: &str = "\
Examples:
  A node on each device; they find each other on the local network:
      snn-run net.shards/shard_1.onnx --key cluster.key
  The same where multicast is blocked (addresses may also stand in cluster.json):
      snn-run net.shards/shard_1.onnx --key cluster.key --listen 0.0.0.0:7447 --peer 192.168.1.11:7447
  The whole cluster on this machine, timed:
      snn-run --local net.shards --repeat 100
  One answer, checked against a reference:
      snn-run --local net.shards --input x.npy --output y.npy --check reference.npy
  The whole cluster on this machine, over HTTP: rank r at port 8000 + r, to be watched in a browser:
      snn-run --local net.shards --http 8000
  A node that serves HTTPS to the network; clients know it by what snnc key authority prints:
      snn-run net.shards/shard_1.onnx --key cluster.key --https 0.0.0.0:8000
  A node that answers after a power cut even if others never return:
      snn-run net.shards/shard_1.onnx --key cluster.key --keep /var/lib/snn/kept
  Wait on a device for what \"snnc deploy\" sends:
      snn-run --agent --key cluster.key --dir /var/lib/snn
  The same as four devices of 5 GFLOP/s would, on links of 300 Mbit/s:
      snn-run --local net.shards --repeat 100 --device 5gflops --link 300mbit,0.3ms
  How fast this device is, for that and for snnc cost:
      snn-run --profile --json > device.json
  Ask a running cluster, at any of its nodes:
      snn-run infer --node 192.168.1.11:7447 cat.png

Exit codes: 0 done, 1 --check found a difference, 2 error.

SNN_LOG=snn=debug,snn_runtime=debug in the environment says more on standard error.";

const INFER_HELP: &str = "\
Example:
  snn-run infer --node 192.168.1.11:7447 cat.png
  snn-run infer --node 192.168.1.12:7447 x.npy --output y.npy
  What every node does when, over a hundred requests:
  snn-run infer --node 192.168.1.12:7447 x.npy --repeat 100 --trace trace.json";

/// Run the shards of a split network: one node, or a whole cluster on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "snn-run",
    version,
    after_help = NODE_HELP,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    group(ArgGroup::new("what").required(true).args(["shard", "local", "agent", "profile"])),
    group(ArgGroup::new("serving").args(["http", "https"])),
    group(ArgGroup::new("keeping").args(["keep", "agent"]).multiple(true)),
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    /// Shard to run as a node, until Ctrl-C or SIGTERM
    #[arg(value_name = "SHARD.onnx")]
    shard: Option<PathBuf>,

    /// Run every shard of this folder, one process each, over loopback
    #[arg(long, value_name = "DIR")]
    local: Option<PathBuf>,

    /// Wait for work from snnc deploy, and go on with it after a restart
    #[arg(long)]
    agent: bool,

    /// Compute threads of a node
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_THREADS))]
    threads: u16,

    /// Measure how fast this device computes
    #[arg(long, conflicts_with_all = ["device", "link"])]
    profile: bool,

    /// Compute as slowly as this device: its speed (5gflops), a file of --profile --json, or how often slower
    /// than this one (20x)
    #[arg(long, value_name = "DEVICE", value_parser = emulation::device, conflicts_with = "agent", help_heading = "Emulating a small device")]
    device: Option<emulation::Slower>,

    /// Send and receive as slowly as on this link: its rate in each direction and its round trip
    #[arg(long, value_name = "LINK", value_parser = emulation::link, conflicts_with = "agent", help_heading = "Emulating a small device")]
    link: Option<Link>,

    /// Address to listen on [default: the node's in cluster.json, else 127.0.0.1 and a free port; an
    /// agent's is port 7448]
    #[arg(long, value_name = "ADDR", conflicts_with = "local", help_heading = "One node")]
    listen: Option<String>,

    /// Address of another node, in addition to those in cluster.json; may be repeated. An agent's nodes
    /// connect there, in addition to each other
    #[arg(long, value_name = "ADDR", conflicts_with = "local", help_heading = "One node")]
    peer: Vec<String>,

    /// The cluster's key (see snnc key): without it nobody is let in, and nothing leaves unencrypted
    #[arg(long, value_name = "FILE", conflicts_with = "local", help_heading = "One node")]
    key: Option<PathBuf>,

    /// Let anybody on the network take part where there is no key, and ask over HTTP; otherwise only
    /// this machine may
    #[arg(long, help_heading = "Watching and serving")]
    insecure: bool,

    /// Do not stand in for nodes that are gone: requests then end with an error
    #[arg(long, conflicts_with_all = ["local", "agent"], help_heading = "One node")]
    no_takeover: bool,

    /// Wait no longer than this for a tensor: go on without it (it counts as zero), and mark the answer
    /// as degraded; to be given to every node
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=MAX_SETTING_MS), conflicts_with_all = ["local", "agent"], help_heading = "One node")]
    degrade: Option<u64>,

    /// Keep in this folder what other nodes hand over, for a restart of all: shards, and that the cluster has
    /// been complete. Whoever does not come back is then stood in for. Agents do so in --dir
    #[arg(long, value_name = "DIR", conflicts_with_all = ["local", "agent", "no_takeover"], help_heading = "One node")]
    keep: Option<PathBuf>,

    /// How long nodes may stay away after a restart of all, before others stand in for them
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, requires = "keeping", help_heading = "One node")]
    grace: Duration,

    /// Give up when peers are still missing after this long [default: keep trying]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, conflicts_with_all = ["local", "agent"], help_heading = "One node")]
    timeout: Option<Duration>,

    /// Serve HTTP at PORT of this machine, or at HOST:PORT; with --local rank r at PORT + r, until
    /// Ctrl-C or SIGTERM
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["input", "output", "check", "json", "repeat"], help_heading = "Watching and serving")]
    http: Option<String>,

    /// Serve HTTPS at PORT of this machine, or at HOST:PORT, to whoever reaches it; clients know it by the
    /// certificate that snnc key authority prints
    #[arg(
        long,
        value_name = "ADDR",
        conflicts_with = "local",
        help_heading = "Watching and serving"
    )]
    https: Option<String>,

    /// Certificate for --https, PEM, followed by those of authorities in between [default: made with
    /// --key, for any name and address]
    #[arg(long, value_name = "FILE", requires_all = ["https", "https_key"], help_heading = "Watching and serving")]
    https_cert: Option<PathBuf>,

    /// Private key of --https-cert, PEM
    #[arg(
        long,
        value_name = "FILE",
        requires = "https_cert",
        help_heading = "Watching and serving"
    )]
    https_key: Option<PathBuf>,

    /// How long a request over HTTP may take
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds, requires = "serving", help_heading = "Watching and serving")]
    http_within: Duration,

    /// Write what happened when, for Perfetto or chrome://tracing; a node writes its own part at its end (of
    /// a running cluster: snn-run infer --trace)
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "agent",
        help_heading = "Watching and serving"
    )]
    trace: Option<PathBuf>,

    /// Folder for shards and state [default: $STATE_DIRECTORY as systemd sets it, else snn-agent]
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["shard", "local"],
        help_heading = "Waiting for work (--agent)"
    )]
    dir: Option<PathBuf>,

    /// Address where snn-run infer is answered by whatever is deployed [default: port 7447]
    #[arg(
        long,
        value_name = "ADDR",
        conflicts_with_all = ["shard", "local"],
        help_heading = "Waiting for work (--agent)"
    )]
    serve: Option<String>,

    /// Name that snnc deploy shows [default: the machine's]
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["shard", "local"],
        help_heading = "Waiting for work (--agent)"
    )]
    name: Option<String>,

    /// Inputs: .npy (f32, batch first) or PNG or JPEG [default: one input of seeded noise]
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["shard", "agent"], help_heading = "Whole cluster (--local)")]
    input: Vec<PathBuf>,

    /// Write the model's output, .npy; several inputs stacked on axis 0
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["shard", "agent"],
        help_heading = "Whole cluster (--local)"
    )]
    output: Option<PathBuf>,

    /// Run the inputs this often, after one run that is not timed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_REPEAT), conflicts_with_all = ["shard", "agent"], help_heading = "Whole cluster (--local)")]
    repeat: u32,

    /// Compare the output with this .npy; exit code 1 where they differ by more than 1e-4
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["shard", "agent"],
        help_heading = "Whole cluster (--local)"
    )]
    check: Option<PathBuf>,

    /// Print the measurements as JSON
    #[arg(long, conflicts_with_all = ["shard", "agent"], help_heading = "Whole cluster (--local)")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask a running cluster
    Infer(Infer),
}

/// Ask a running cluster, at the address of any of its nodes.
#[derive(Debug, Parser)]
#[command(after_help = INFER_HELP)]
pub struct Infer {
    /// Input: .npy (f32, batch first) or PNG or JPEG
    #[arg(value_name = "FILE")]
    pub input: PathBuf,

    /// Address of any node of the cluster; several may be given, should one be gone
    #[arg(long, value_name = "ADDR", required = true)]
    pub node: Vec<String>,

    /// The cluster's key
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,

    /// Write the model's output, .npy
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Ask this often; what is printed is the last answer to each input
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_REPEAT))]
    pub repeat: u32,

    /// Have all nodes record meanwhile, and write what happened when, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Time for an answer; five seconds more where a node dies meanwhile
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub timeout: Duration,

    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// Run one shard as a node.
#[derive(Clone, Debug)]
pub struct Node {
    /// The shard.
    pub shard: PathBuf,
    /// Address to listen on, where one was given.
    pub listen: Option<String>,
    /// Addresses of other nodes, beside those of the manifest.
    pub peers: Vec<String>,
    /// How long missing peers are waited for; for ever where none was given.
    pub timeout: Option<Duration>,
    /// Compute threads.
    pub threads: usize,
    /// The cluster's key file.
    pub key: Option<PathBuf>,
    /// Whether to listen beyond this machine without a key.
    pub insecure: bool,
    /// Whether to stand in for nodes that are gone.
    pub takeover: bool,
    /// Where to keep what a restart of all nodes needs, and how long absent ones are waited for then.
    pub keep: Option<(PathBuf, Duration)>,
    /// How long a tensor is waited for, where not as long as the request may take.
    pub degrade: Option<Duration>,
    /// Where to serve HTTP.
    pub http: Option<Settings>,
    /// Where to write what happened when.
    pub trace: Option<PathBuf>,
    /// The device to be as slow as.
    pub device: Option<emulation::Slower>,
    /// The link to be as slow as.
    pub link: Option<Link>,
}

/// Wait for work.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Address to listen on, where one was given.
    pub listen: Option<String>,
    /// Where `snn-run infer` is answered, where an address was given.
    pub serve: Option<String>,
    /// Addresses that its nodes connect to, in addition to each other's.
    pub peers: Vec<String>,
    /// The cluster's key file.
    pub key: Option<PathBuf>,
    /// Whether to listen beyond this machine without a key.
    pub insecure: bool,
    /// Folder for shards and state.
    pub dir: PathBuf,
    /// Name of the device; the machine's own where none was given.
    pub name: Option<String>,
    /// Compute threads of its nodes.
    pub threads: usize,
    /// How long its nodes wait for absent ones after a restart of all.
    pub grace: Duration,
    /// Where to serve HTTP.
    pub http: Option<Settings>,
}

/// Run every shard of a folder.
#[derive(Clone, Debug)]
pub struct Local {
    /// The folder, with its manifest.
    pub folder: PathBuf,
    /// Inputs; seeded noise where there are none.
    pub inputs: Vec<PathBuf>,
    /// Where the output goes.
    pub output: Option<PathBuf>,
    /// How often the inputs are run.
    pub repeat: usize,
    /// What the output must be.
    pub check: Option<PathBuf>,
    /// Compute threads a node.
    pub threads: usize,
    /// Whether to print JSON.
    pub json: bool,
    /// Where to serve HTTP, instead of running inputs.
    pub http: Option<Settings>,
    /// Whether others than this machine may ask over HTTP.
    pub insecure: bool,
    /// Where to write what happened when.
    pub trace: Option<PathBuf>,
    /// The device to be as slow as.
    pub device: Option<emulation::Slower>,
    /// The link to be as slow as.
    pub link: Option<Link>,
}

/// Measure this device.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Compute threads.
    pub threads: usize,
    /// Whether to print JSON.
    pub json: bool,
}

/// What was asked for.
#[derive(Debug)]
pub enum Mode {
    /// `snn-run --profile`
    Profile(Profile),
    /// `snn-run SHARD.onnx`
    Node(Node),
    /// `snn-run --local DIR`
    Local(Local),
    /// `snn-run --agent`
    Agent(Agent),
    /// `snn-run infer`
    Infer(Infer),
}

impl Args {
    /// Which command it is, with its own arguments only.
    pub fn mode(self) -> Mode {
        let threads = usize::from(self.threads);
        let within = self.http_within;
        let encryption = match self.https_cert.zip(self.https_key) {
            Some((certificate, private_key)) => Encryption::Own { certificate, private_key },
            None if self.https.is_some() => Encryption::Cluster,
            None => Encryption::None,
        };
        let http = self.http.or(self.https);
        let http = http.map(|address| Settings { address, within, encryption });
        if self.profile {
            return Mode::Profile(Profile { threads, json: self.json });
        }
        match (self.command, self.local) {
            (Some(Command::Infer(infer)), _) => Mode::Infer(infer),
            (None, Some(folder)) => Mode::Local(Local {
                folder,
                inputs: self.input,
                output: self.output,
                repeat: self.repeat as usize,
                check: self.check,
                threads,
                json: self.json,
                http,
                insecure: self.insecure,
                trace: self.trace,
                device: self.device,
                link: self.link,
            }),
            (None, None) if self.agent => Mode::Agent(Agent {
                listen: self.listen,
                serve: self.serve,
                peers: self.peer,
                key: self.key,
                insecure: self.insecure,
                dir: self.dir.unwrap_or_else(state_dir),
                name: self.name,
                threads,
                grace: self.grace,
                http,
            }),
            (None, None) => Mode::Node(Node {
                // The group "what" makes clap refuse a command line with none of them.
                shard: self.shard.unwrap_or_default(),
                listen: self.listen,
                peers: self.peer,
                timeout: self.timeout,
                threads,
                key: self.key,
                insecure: self.insecure,
                takeover: !self.no_takeover,
                keep: self.keep.map(|dir| (dir, self.grace)),
                degrade: self.degrade.map(Duration::from_millis),
                http,
                trace: self.trace,
                device: self.device,
                link: self.link,
            }),
        }
    }
}

/// Where an agent keeps its state when nobody says otherwise.
fn state_dir() -> PathBuf {
    let systemd = std::env::var_os("STATE_DIRECTORY").filter(|dir| !dir.is_empty());
    systemd.map_or_else(|| PathBuf::from("snn-agent"), PathBuf::from)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let range = format!("expected seconds, more than 0 and at most {MAX_TIMEOUT}");
    let number: f64 = text.parse().map_err(|_| range.clone())?;
    match number > 0.0 && number <= MAX_TIMEOUT {
        true => Ok(Duration::from_secs_f64(number)),
        false => Err(range),
    }
}

/// Seconds of a deadline over HTTP, which are at most a minute, and at least a millisecond.
pub(crate) fn deadline(text: &str) -> Result<Duration, String> {
    let longest = snn_runtime::http::MAX_WITHIN;
    let fits = |time: &Duration| (Duration::from_millis(1)..=longest).contains(time);
    let range = format!("expected seconds, at least 0.001 and at most {}", longest.as_secs());
    seconds(text).ok().filter(fits).ok_or(range)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    fn mode(line: &str) -> Mode {
        Args::try_parse_from(line.split(' ')).unwrap().mode()
    }

    #[test]
    fn each_command_is_recognised() {
        assert!(
            matches!(mode("snn-run d/shard_1.onnx --peer a:1 --peer b:2"), Mode::Node(n) if n.peers.len() == 2)
        );
        assert!(
            matches!(mode("snn-run --local d --input a.npy b.npy --json"), Mode::Local(l) if l.inputs.len() == 2 && l.json)
        );
        assert!(matches!(mode("snn-run --agent --key k --dir s"), Mode::Agent(a) if a.dir == *"s"));
        assert!(
            matches!(mode("snn-run infer --node a:1 x.npy"), Mode::Infer(i) if i.node == ["a:1"])
        );
        let line = "snn-run infer --node a:1 x.npy --repeat 9 --trace t.json";
        assert!(matches!(mode(line), Mode::Infer(i) if i.repeat == 9 && i.trace.is_some()));
        assert!(matches!(mode("snn-run --profile --json"), Mode::Profile(p) if p.json));
        let line = "snn-run --agent --https 8000 --https-cert c --https-key k --http-within 3";
        let own = |http: &Settings| matches!(http.encryption, Encryption::Own { .. });
        assert!(matches!(mode(line), Mode::Agent(a) if a.http.as_ref().is_some_and(own)));
        let line = "snn-run d/shard_1.onnx --keep k --grace 5";
        let five = Some((PathBuf::from("k"), Duration::from_secs(5)));
        assert!(matches!(mode(line), Mode::Node(n) if n.keep == five));
        let five = Duration::from_secs(5);
        assert!(matches!(mode("snn-run --agent --grace 5"), Mode::Agent(a) if a.grace == five));
        let line = "snn-run --local d --device 20x --link 300mbit,0.3ms";
        assert!(matches!(mode(line), Mode::Local(l) if l.device.is_some() && l.link.is_some()));
    }

    #[test]
    fn mixtures_are_refused() {
        for line in [
            "snn-run",
            "snn-run d/shard_1.onnx --local d",
            "snn-run d/shard_1.onnx --json",
            "snn-run --local d --peer a:1",
            "snn-run d/shard_1.onnx --timeout 0",
            "snn-run d/shard_1.onnx --timeout NaN",
            "snn-run --local d --repeat 0",
            "snn-run infer --node a:1 x.npy --repeat 0",
            "snn-run --local d --device 0.5x",
            "snn-run --local d --device 5mhz",
            "snn-run --local d --link 300",
            "snn-run --profile --local d",
            "snn-run --profile --device 5gflops",
            "snn-run --local d --http 8000 --repeat 2",
            "snn-run --local d --http 8000 --input a.npy",
            "snn-run d/shard_1.onnx --http-within 3",
            "snn-run d/shard_1.onnx --http 8000 --https 8001",
            "snn-run d/shard_1.onnx --https 8000 --https-cert c.pem",
            "snn-run d/shard_1.onnx --https-cert c.pem --https-key k.pem",
            "snn-run --local d --https 8000",
            "snn-run d/shard_1.onnx --dir state",
            "snn-run d/shard_1.onnx --keep k --no-takeover",
            "snn-run d/shard_1.onnx --grace 5",
            "snn-run --local d --keep k",
            "snn-run --agent --keep k",
            "snn-run d/shard_1.onnx --agent",
            "snn-run --agent --json",
            "snn-run --agent --local d",
        ] {
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
