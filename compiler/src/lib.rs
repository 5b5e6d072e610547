//! Splits a separable ONNX network into one shard a device.
//!
//! Takes the bytes of a model and a communication policy; gives [`Split`]: an ONNX model a node and
//! the manifest that describes them. Five stages, each a function over data with a type of its own:
//! [`read()`], [`groups`], [`exchange()`], [`placement`], [`shards`]. The same input gives the same
//! bytes. Nothing is read or written but what is passed.

pub mod error;
pub mod exchange;
pub mod graph;
pub mod groups;
pub mod picture;
pub mod placement;
pub mod read;
pub mod schedule;
pub mod shards;
pub mod show;
pub mod verify;

mod cost;
mod fold;
mod rewrite;
mod shapes;

use sha2::{Digest, Sha256};
use snn_schemas::Policy;
use snn_schemas::cost::{Device, Link, Piece, Plan};
use snn_schemas::manifest::{BlockEntry, MANIFEST_VERSION, Manifest, NodeEntry, Port, Transfer};
use snn_schemas::metadata::ShardInfo;

pub use cost::Work;
pub use error::CompileError;
pub use exchange::exchange;
pub use placement::{Placement, Stem, place};
pub use read::{Source, read};
pub use shards::Shard;

use graph::{Graph, TensorId};
use groups::Grouped;
use placement::Placed;
use read::Model;
use schedule::Cut;

/// Name and version of this tool, as shards and manifests state it.
pub const TOOL: &str = concat!("snnc ", env!("CARGO_PKG_VERSION"));

/// A policy and the hash of the file it came from.
#[derive(Clone, Debug)]
pub struct PolicySource {
    /// The policy.
    pub policy: Policy,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

impl PolicySource {
    /// Reads a policy file.
    pub fn from_bytes(bytes: &[u8]) -> Result<PolicySource, snn_schemas::policy::PolicyError> {
        let policy = Policy::from_json(bytes)?;
        Ok(PolicySource { policy, sha256: sha256(bytes) })
    }
}

/// SHA-256 of a file's bytes as manifests and shards state it: in hexadecimal, lower case.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where the groups go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nodes {
    /// A node for each group.
    #[default]
    PerGroup,
    /// Groups spread evenly over this many nodes.
    Even(usize),
    /// A rank for each group.
    Explicit(Vec<usize>),
}

/// How to split.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the groups go.
    pub nodes: Nodes,
    /// Shape of the model's first input where the model leaves it open.
    pub input_shape: Option<Vec<usize>>,
    /// What the nodes are and what connects them. Where it is known, the stem is copied or sent, whichever
    /// the cost model predicts to be faster; otherwise bytes decide.
    pub target: Option<Target>,
}

/// Devices and their links, all alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// A node's device.
    pub device: Device,
    /// Its link to the others.
    pub link: Link,
}

/// A split network.
#[derive(Clone, Debug)]
pub struct Split {
    /// One shard a node, by rank.
    pub shards: Vec<Shard>,
    /// Work of each shard, by rank.
    pub work: Vec<Work>,
    /// Describes the shards; the hashes of their files are still to be filled in.
    pub manifest: Manifest,
    /// The graph behind the shards.
    pub placed: Placed,
    /// What crosses between nodes.
    pub cuts: Vec<Cut>,
}

/// Compiles a model: the whole pipeline.
///
/// # Errors
/// The first rule of [`CompileError`] that the model, the policy or the placement breaks.
pub fn compile(
    source: &Source,
    policy: Option<&PolicySource>,
    options: &Options,
) -> Result<Split, CompileError> {
    let model = read(source, options.input_shape.as_deref())?;
    let grouped = group(&model, policy, options)?;
    let grouped = match policy {
        Some(policy) => exchange(grouped, &policy.policy)?,
        None => grouped,
    };
    verify::check(verify::graph(&grouped.graph))?;
    let placement = place_groups(&grouped, &options.nodes)?;
    let split = match &options.target {
        None => split(source, &model, place(grouped, placement, Stem::default()), policy),
        Some(target) => {
            let place = |stem| place(grouped.clone(), placement.clone(), stem);
            let split = |stem| split(source, &model, place(stem), policy);
            fastest(split(Stem::default()), [Stem::Copied, Stem::Sent].map(split), target)
        }
    };
    verify::check(verify::cluster(&split))?;
    Ok(split)
}

/// The split that is predicted to be fastest on `target`; the first of those that are alike.
fn fastest(first: Split, others: impl IntoIterator<Item = Split>, target: &Target) -> Split {
    let latency = |split: &Split| {
        let plan = Plan::of_manifest(&split.manifest);
        let devices = std::slice::from_ref(&target.device);
        let predicted = plan.and_then(|plan| plan.predict(devices, &target.link).ok());
        predicted.map_or(f64::INFINITY, |predicted| predicted.latency)
    };
    let first = (latency(&first), first);
    let best = others.into_iter().fold(first, |best, split| match latency(&split) {
        faster if faster < best.0 => (faster, split),
        _ => best,
    });
    best.1
}

/// Floating-point operations of a model's convolutions and matrix products as it stands, split or
/// not: of everything in it, needed or not. A multiply-add counts as two.
///
/// # Errors
/// What the first stage finds wrong with the model.
pub fn flops(source: &Source, input_shape: Option<&[usize]>) -> Result<u64, CompileError> {
    Ok(cost::total(&read(source, input_shape)?.graph))
}

/// Stage 2, or the model undivided where a single node takes a model without groups.
fn group(
    model: &Model,
    policy: Option<&PolicySource>,
    options: &Options,
) -> Result<Grouped, CompileError> {
    let wanted = policy.map(|policy| policy.policy.groups);
    match (groups::find(model, wanted), policy) {
        (Ok(found), _) => Ok(groups::lower(model, &found)),
        (Err(error), Some(policy)) => Err(match groups::find(model, None) {
            Ok(found) => {
                CompileError::PolicyGroups { policy: policy.policy.groups, model: found.count }
            }
            Err(_) if options.nodes == Nodes::Even(1) => {
                CompileError::PolicyWithoutGroups(Box::new(error))
            }
            Err(_) => error,
        }),
        (Err(_), None) if options.nodes == Nodes::Even(1) => Ok(groups::undivided(model)),
        (Err(error), None) => Err(error),
    }
}

fn place_groups(grouped: &Grouped, nodes: &Nodes) -> Result<Placement, CompileError> {
    match nodes {
        Nodes::PerGroup => Placement::even(grouped.groups, grouped.groups),
        Nodes::Even(nodes) => Placement::even(grouped.groups, *nodes),
        Nodes::Explicit(ranks) => Placement::explicit(ranks.clone(), grouped.groups),
    }
}

/// Stage 5: shards and manifest.
fn split(source: &Source, model: &Model, placed: Placed, policy: Option<&PolicySource>) -> Split {
    let cuts = schedule::cuts(&placed);
    let metadata: Vec<(String, String)> = source
        .model
        .metadata_props
        .iter()
        .map(|entry| (entry.key().to_owned(), entry.value().to_owned()))
        .collect();
    let common = shards::Common {
        placed: &placed,
        cuts: &cuts,
        opsets: &model.opsets,
        ir_version: model.ir_version,
        metadata: &metadata,
    };
    let split_id = split_id(source, policy, &placed);
    let info = |rank| ShardInfo {
        rank,
        nodes: placed.placement.nodes(),
        entry: placed.entry,
        groups: placed.groups,
        split: split_id.clone(),
        source_sha256: source.sha256.clone(),
        policy_sha256: policy.map(|policy| policy.sha256.clone()),
        tool: TOOL.to_owned(),
    };
    let ranks = 0..placed.placement.nodes();
    let schedules = ranks.map(|rank| schedule::schedule(&placed, &cuts, rank));
    let shards: Vec<Shard> = schedules
        .enumerate()
        .map(|(rank, actions)| match model.subgraph {
            None => shards::shard(&common, &info(rank), actions),
            // Ops that hold graphs are not taken apart: the model stays as it came.
            Some(_) => shards::verbatim(source, &placed.graph, &info(rank), actions),
        })
        .collect();
    let schedules = shards.iter().map(|shard| cost::schedule(&placed.graph, &shard.actions));
    let schedules: Vec<Vec<Piece>> = schedules.collect();
    let work = shards.iter().map(|shard| cost::work(&placed.graph, &shard.actions)).collect();
    let mut manifest = manifest(&placed, &cuts, &info(0), metadata, policy);
    for (node, schedule) in manifest.nodes.iter_mut().zip(schedules) {
        node.schedule = schedule;
    }
    Split { shards, work, manifest, placed, cuts }
}

/// Identity of a split: everything that decides what its shards compute.
fn split_id(source: &Source, policy: Option<&PolicySource>, placed: &Placed) -> String {
    let graph = &placed.graph;
    let shapes: Vec<&[usize]> =
        graph.inputs.iter().map(|&tensor| graph.tensor(tensor).shape.as_slice()).collect();
    let policy = policy.map_or("none", |policy| policy.sha256.as_str());
    let ranks = placed.placement.ranks();
    let mut text = format!("{TOOL}\n{}\n{policy}\n{ranks:?}\n{shapes:?}", source.sha256);
    if placed.stem != Stem::default() {
        text += &format!("\nstem {:?}", placed.stem);
    }
    if let Some(channels) = graph.normalised {
        text += &format!("\npixels {channels}");
    }
    sha256(text.as_bytes())
}

fn manifest(
    placed: &Placed,
    cuts: &[Cut],
    info: &ShardInfo,
    metadata: Vec<(String, String)>,
    policy: Option<&PolicySource>,
) -> Manifest {
    let graph = &placed.graph;
    let port = |name: &str, tensor: TensorId| Port {
        name: name.to_owned(),
        shape: graph.tensor(tensor).shape.clone(),
    };
    let node = |rank| NodeEntry {
        rank,
        shard: format!("shard_{rank}.onnx"),
        sha256: String::new(),
        address: None,
        schedule: Vec::new(),
    };
    Manifest {
        version: MANIFEST_VERSION,
        tool: info.tool.clone(),
        split: info.split.clone(),
        source_sha256: info.source_sha256.clone(),
        policy_sha256: info.policy_sha256.clone(),
        groups: placed.groups,
        staleness: policy.map(|policy| policy.policy.staleness),
        placement: placed.placement.ranks().to_vec(),
        entry: placed.entry,
        inputs: graph.inputs.iter().map(|&t| port(&graph.tensor(t).name, t)).collect(),
        outputs: graph.outputs.iter().map(|(name, t)| port(name, *t)).collect(),
        nodes: (0..info.nodes).map(node).collect(),
        blocks: block_entries(placed),
        transfers: cuts.iter().enumerate().map(|(id, cut)| transfer(graph, id, cut)).collect(),
        cost: cost::cost(placed, cuts, policy.map(|policy| &policy.policy)),
        metadata,
        provenance: policy.and_then(|policy| policy.policy.provenance.clone()),
    }
}

fn block_entries(placed: &Placed) -> Vec<BlockEntry> {
    let alive = |sum: TensorId| placed.homes.contains_key(&placed.graph.tensor(sum).producer);
    let entry = |block: &groups::GroupBlock| BlockEntry {
        name: block.name.clone(),
        shape: block.shape.clone(),
        groups: (0..block.streams.len()).filter(|&g| alive(block.streams[g].sum)).collect(),
    };
    placed.blocks.iter().map(entry).collect()
}

fn transfer(graph: &Graph, id: usize, cut: &Cut) -> Transfer {
    let tensor = graph.tensor(cut.tensor);
    Transfer {
        id: id as u32,
        from: cut.from,
        to: cut.to,
        from_group: graph.op(tensor.producer).group.map(|group| group.0),
        to_group: cut.taker.group.map(|group| group.0),
        step: cut.taker.exchange.map(|exchange| exchange.step),
        tensor: tensor.name.clone(),
        shape: tensor.shape.clone(),
        keep: tensor.channels(),
        channels: cut.taker.exchange.map_or(tensor.channels(), |exchange| exchange.channels),
        dtype: cut.codec.dtype,
        packing: cut.codec.packing,
        bytes: cut.bytes(graph),
    }
}
