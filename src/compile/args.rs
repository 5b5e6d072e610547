//! The command line of `snnc`: what may be typed, and the help that explains it.
//!
//! Takes `argv`; gives [`Args`], or clap's own answer for `--help`, `--version` and mistakes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use snn_compiler::{Nodes, Options, Target};
use snn_runtime::agent::wire::MAX_SETTING_MS;
use snn_schemas::codec::LIKELY_ZEROS;
use snn_schemas::cost::{Device, Link};

use crate::run::emulation;

const HELP: &str = "\
Example:
  snnc inspect model.onnx
  snnc split model.onnx --policy best.json
  snnc show model.shards --format svg -o partition.svg
  snnc cost model.onnx --policy best.json --device 5gflops --link 300mbit,0.3ms

Exit codes: 0 done, 2 error.";

const SPLIT_HELP: &str = "\
Examples:
  A node for each group, in model.shards/:
      snnc split model.onnx --policy best.json
  Four groups on two devices:
      snnc split model.onnx --policy best.json --place 0,0,1,1 -o two
  One plain ONNX file that computes the same, to compare with:
      snnc split model.onnx --policy best.json --nodes 1 -o fused
  The stem copied or sent, whichever is faster on these devices and links:
      snnc split model.onnx --policy best.json --device 5gflops --link 300mbit,0.3ms";

const INSPECT_HELP: &str = "\
Example:
  snnc inspect model.onnx";

const SHOW_HELP: &str = "\
Examples:
  snnc show model.shards
  snnc show model.shards -o partition.svg
  snnc show model.onnx --policy best.json --nodes 2";

const COST_HELP: &str = "\
Examples:
  What four devices of 5 GFLOP/s make of it, on links of 300 Mbit/s and 0.3 ms there and back:
      snnc cost model.onnx --policy best.json --device 5gflops --link 300mbit,0.3ms
  The same for a device that snn-run --profile --json has measured:
      snnc cost model.onnx --policy best.json --device device.json --link 1gbit,0.2ms
  The same where a quarter of the packed features is zero, and not half of them:
      snnc cost model.onnx --policy i8.json --zeros 0.25
  How fast devices may be for their links, for each staleness:
      snnc cost model.onnx --policy best.json --sweep -o sweep.svg";

const KEY_HELP: &str = "\
Example:
  snnc key new cluster.key";

const AUTHORITY_HELP: &str = "\
Example:
  snnc key authority cluster.key > cluster.pem
  curl --cacert cluster.pem --data-binary @cat.png https://192.168.1.11:8000/classify";

const DEPLOY_HELP: &str = "\
Examples:
  To the agents on the local network (snn-run --agent --key cluster.key on each device):
      snnc deploy net.shards --key cluster.key
  To the agents at these addresses, rank 0 first, checked with an answer of your own:
      snnc deploy net.shards --key cluster.key --to 192.168.1.11 --to 192.168.1.12 \\
          --input cat.npy --expect logits.npy
  What runs where, and the end of it:
      snnc deploy --status --key cluster.key
      snnc deploy --stop --key cluster.key
  Files for systemd, Docker Compose or Kubernetes instead:
      snnc deploy net.shards --render systemd -o units

Exit codes: 0 done, 1 the cluster answered wrongly and was rolled back, 2 error.";

/// Split one neural network over several devices.
#[derive(Debug, Parser)]
#[command(name = "snnc", version, after_help = HELP)]
pub struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write one ONNX shard a node, and cluster.json
    #[command(after_help = SPLIT_HELP)]
    Split(Split),
    /// Say which groups and blocks a model has, or which op mixes its groups
    #[command(after_help = INSPECT_HELP)]
    Inspect(Inspect),
    /// Predict latency and speed-up for a device and a link, before there are any
    #[command(after_help = COST_HELP)]
    Cost(Cost),
    /// Draw a partition: who computes what, and what crosses between nodes
    #[command(after_help = SHOW_HELP)]
    Show(Show),
    /// Send shards to the agents on the devices, start them, check their answers
    #[command(after_help = DEPLOY_HELP)]
    Deploy(Deploy),
    /// Make the key that lets devices into a cluster, and nobody else; show what of it is public
    #[command(subcommand)]
    Key(Key),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Write a new key file, to be copied to every device
    #[command(after_help = KEY_HELP)]
    New(NewKey),
    /// Print the certificate by which clients know the cluster's HTTPS (snn-run --https): PEM, no secret
    #[command(after_help = AUTHORITY_HELP)]
    Authority(Authority),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Authority {
    /// The cluster's key
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(crate) struct NewKey {
    /// File to write
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,

    /// How long the key is good for, in days
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) days: u32,
}

/// What decides how a model is compiled.
#[derive(Debug, clap::Args)]
pub(crate) struct Compile {
    /// Who sends to whom, and when; without it nothing is exchanged
    #[arg(long, value_name = "FILE.json")]
    pub(crate) policy: Option<PathBuf>,

    /// Spread the groups evenly over N nodes [default: a node for each group]
    #[arg(long, value_name = "N", conflicts_with = "place")]
    nodes: Option<usize>,

    /// Node of each group, as in 0,0,1,1
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    place: Option<Vec<usize>>,

    /// Shape of the input where the model leaves it open, as in 1,3,32,32
    #[arg(long, value_name = "SHAPE", value_delimiter = ',')]
    input_shape: Option<Vec<usize>>,
}

impl Compile {
    /// The compiler's own options.
    pub(crate) fn options(&self) -> Options {
        let nodes = match (self.nodes, &self.place) {
            (Some(nodes), _) => Nodes::Even(nodes),
            (None, Some(ranks)) => Nodes::Explicit(ranks.clone()),
            (None, None) => Nodes::PerGroup,
        };
        Options { nodes, input_shape: self.input_shape.clone(), target: None }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Split {
    /// Model to split
    #[arg(value_name = "MODEL.onnx")]
    pub(crate) model: PathBuf,

    #[command(flatten)]
    pub(crate) compile: Compile,

    /// Speed of each device, as in 5gflops, or a file of snn-run --profile --json: with --link the
    /// stem is copied or sent, whichever is predicted to be faster
    #[arg(long, value_name = "DEVICE", value_parser = emulation::known, requires = "link")]
    device: Option<Device>,

    /// Rate of each device's link in each direction, and its round trip, as in 300mbit,0.3ms
    #[arg(long, value_name = "LINK", value_parser = emulation::link, requires = "device")]
    link: Option<Link>,

    /// Folder to write [default: MODEL.shards]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,

    /// Print the table and the costs as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Split {
    /// The compiler's own options.
    pub(crate) fn options(&self) -> Options {
        let target = self.device.clone().zip(self.link);
        let target = target.map(|(device, link)| Target { device, link });
        Options { target, ..self.compile.options() }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Inspect {
    /// Model to look at
    #[arg(value_name = "MODEL.onnx")]
    pub(crate) model: PathBuf,

    /// Number of groups to look for, 2 to 8 [default: as many as there are]
    #[arg(long, value_name = "G")]
    pub(crate) groups: Option<usize>,

    /// Shape of the input where the model leaves it open, as in 1,3,32,32
    #[arg(long, value_name = "SHAPE", value_delimiter = ',')]
    pub(crate) input_shape: Option<Vec<usize>>,

    /// Print what was found as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// Folder of a split, or a model that is then compiled in memory
    #[arg(value_name = "DIR|MODEL.onnx")]
    pub(crate) source: PathBuf,

    /// How to draw [default: what FILE's extension says, else text]
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,

    /// File to write, in place of standard output
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    #[command(flatten, next_help_heading = "Where a model is given")]
    pub(crate) compile: Compile,
}

#[derive(Debug, clap::Args)]
#[command(group(ArgGroup::new("what").required(true).args(["dir", "status", "stop"])))]
pub(crate) struct Deploy {
    /// Folder of a split
    #[arg(value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// The cluster's key: agents that have another, or none, are not spoken to
    #[arg(long, value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,

    /// Address of an agent, HOST or HOST:PORT; the first runs rank 0 [default: look for them on the
    /// local network]
    #[arg(long, value_name = "ADDR")]
    pub(crate) to: Vec<String>,

    /// Input the cluster must answer rightly: .npy (f32, batch first) or PNG or JPEG [default: noise]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["status", "stop", "render"])]
    pub(crate) input: Option<PathBuf>,

    /// The right answer to --input, .npy [default: what the shards answer here]
    #[arg(long, value_name = "FILE", requires = "input")]
    pub(crate) expect: Option<PathBuf>,

    /// How long the nodes may take to start and to answer
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(crate) within: u64,

    /// Let nodes wait no longer than this for a tensor: they go on without it (it counts as zero), and the
    /// answer is marked as degraded
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=MAX_SETTING_MS), conflicts_with_all = ["status", "stop"])]
    pub(crate) degrade: Option<u64>,

    /// How long a request over HTTP may take where it does not say itself [default: what the agent was
    /// started with, 2]
    #[arg(long, value_name = "SECONDS", value_parser = crate::run::args::deadline, conflicts_with_all = ["status", "stop"])]
    pub(crate) deadline: Option<Duration>,

    /// Show what would go where, and do nothing
    #[arg(long, conflicts_with_all = ["status", "stop", "render"])]
    pub(crate) dry_run: bool,

    /// Show what the agents run
    #[arg(long, conflicts_with = "stop")]
    pub(crate) status: bool,

    /// Stop what the agents run; they stay and wait for work
    #[arg(long)]
    pub(crate) stop: bool,

    /// Write files for other tools instead
    #[arg(long, value_name = "KIND", requires = "output", conflicts_with_all = ["status", "stop", "to"])]
    pub(crate) render: Option<Render>,

    /// Folder to write them to
    #[arg(short, long, value_name = "OUT", requires = "render")]
    pub(crate) output: Option<PathBuf>,

    /// Container image that has snn-run, for compose and k8s
    #[arg(long, value_name = "IMAGE", default_value = "snn:latest", requires = "render")]
    pub(crate) image: String,

    /// Print what was done as JSON
    #[arg(long, conflicts_with = "render")]
    pub(crate) json: bool,
}

/// For whom files are rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Render {
    /// A unit a node.
    Systemd,
    /// A compose file.
    Compose,
    /// Manifests for kubectl apply.
    K8s,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cost {
    /// Model to split
    #[arg(value_name = "MODEL.onnx")]
    pub(crate) model: PathBuf,

    #[command(flatten)]
    pub(crate) compile: Compile,

    /// Speed of each device, as in 5gflops, or a file of snn-run --profile --json
    #[arg(long, value_name = "DEVICE", default_value = "5gflops", value_parser = emulation::known)]
    pub(crate) device: Device,

    /// Rate of each device's link in each direction, and its round trip
    #[arg(long, value_name = "LINK", default_value = "300mbit,0.3ms", value_parser = emulation::link)]
    pub(crate) link: Link,

    /// Share of the features that are zero, 0 to 1, for those that a policy packs
    #[arg(long, value_name = "SHARE", default_value_t = LIKELY_ZEROS, value_parser = share)]
    pub(crate) zeros: f64,

    /// Draw which devices suit which links for each staleness, as SVG
    #[arg(long, requires_all = ["policy", "output"], conflicts_with = "json")]
    pub(crate) sweep: bool,

    /// File that --sweep draws to
    #[arg(short, long, value_name = "FILE.svg", requires = "sweep")]
    pub(crate) output: Option<PathBuf>,

    /// Print the prediction as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads a share.
fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "expected a share, 0 to 1".to_owned())
}

/// A kind of picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For a terminal.
    Text,
    /// For Graphviz.
    Dot,
    /// For a browser.
    Svg,
}
