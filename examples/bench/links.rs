//! One link: one device, four in their namespaces, and four emulated, asked in turn.
//!
//! Takes its orders as JSON, inside the first namespace; prints what it has measured as JSON. The three
//! clusters stand side by side and are asked one after another, so that whatever else the machine does
//! meets all of them alike.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use snn::run::emulation::Emulation;
use snn::run::input::Array;
use snn::run::local::{Host, LocalCluster, LocalOptions};
use snn_runtime::NodeReport;
use snn_runtime::client::ClusterInfo;
use snn_runtime::node::SendReport;
use snn_runtime::watch::trace::{Aligned, document};
use snn_runtime::watch::{Kind, Span};
use snn_schemas::cost::Link;
use snn_schemas::metadata::Normalisation;

use crate::machine::{Awake, Classes, favour};
use crate::wire;

/// Requests that are not counted: until every segment's least time is known.
const WARM_UP: usize = 12;

/// What is to be measured.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) split: PathBuf,
    /// The transfers that the policy asks for.
    pub(crate) exchanges: BTreeSet<u32>,
    pub(crate) whole: PathBuf,
    pub(crate) link: Link,
    /// How often slower a device is than this machine.
    pub(crate) times: f64,
    pub(crate) requests: usize,
    pub(crate) hosts: Vec<Place>,
    /// Where the trace of the four goes.
    pub(crate) trace: Option<PathBuf>,
}

/// A namespace.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    pub(crate) namespace: String,
    pub(crate) address: String,
}

/// What was measured on one link.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) one: Cluster,
    pub(crate) four: Cluster,
    pub(crate) emulated: Cluster,
    /// Share of the exchanges' travel during which their receivers had something else to do.
    pub(crate) hidden: Option<f64>,
    /// What a tensor and a byte back take between two namespaces beside the link's time for it, without
    /// any delay added, in ms.
    pub(crate) beside_ms: f64,
    pub(crate) classes: Classes,
}

/// What a cluster took, a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cluster {
    /// Of each request, in ms.
    pub(crate) latencies: Vec<f64>,
    /// Means of each node, in ms.
    pub(crate) nodes: Vec<NodeMeans>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeMeans {
    pub(crate) compute: f64,
    pub(crate) waiting: f64,
    pub(crate) codec: f64,
    pub(crate) bytes_sent: f64,
    /// Bytes of each of its transfers, by number, frames' headers included.
    pub(crate) sends: Vec<(u32, f64)>,
}

pub(crate) fn measure_here(orders: &str) -> Result<()> {
    let orders: Orders = serde_json::from_str(orders).context("orders")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let measured = runtime?.block_on(measure(&orders))?;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

async fn measure(orders: &Orders) -> Result<Measured> {
    let times = Some(orders.times);
    favour([std::process::id()]);
    let _awake = Awake::start();
    let second = orders.hosts.get(1).context("one namespace is no network")?;
    let beside = wire::beside(second, &orders.link)?;
    // The namespaces have the rate; what they lack of the round trip is added in user space.
    let lacking = (orders.link.round_trip.as_secs_f64() - beside).max(0.0);
    let round_trip = Duration::from_secs_f64(lacking);
    let delay = Link { bits_per_second: 1e18, round_trip };
    let host = |place: &Place| Host {
        launcher: ["ip", "netns", "exec", &place.namespace].map(Into::into).to_vec(),
        listen: format!("{}:0", place.address),
    };
    let alone = LocalOptions {
        emulation: Emulation { times, link: None },
        trace: true,
        ..LocalOptions::default()
    };
    let apart = LocalOptions {
        emulation: Emulation { times, link: Some(delay) },
        hosts: orders.hosts.iter().map(host).collect(),
        ..alone.clone()
    };
    let emulated =
        LocalOptions { emulation: Emulation { times, link: Some(orders.link) }, ..alone.clone() };
    let one = LocalCluster::start(&orders.whole, alone).await.context("one device")?;
    let four = LocalCluster::start(&orders.split, apart).await.context("four devices")?;
    let emulated = LocalCluster::start(&orders.split, emulated).await.context("emulated")?;
    let clusters = [one, four, emulated];
    let classes = favour(clusters.iter().flat_map(LocalCluster::process_ids));
    let input = picture(clusters[0].info())?;
    for cluster in &clusters {
        for _ in 0..WARM_UP {
            cluster.infer(std::slice::from_ref(&input)).await?;
        }
    }
    let mut before = Vec::new();
    for cluster in &clusters {
        before.push(cluster.reports().await?);
    }
    let mut latencies = [const { Vec::new() }; 3];
    for _ in 0..orders.requests {
        for (cluster, latencies) in clusters.iter().zip(&mut latencies) {
            let start = Instant::now();
            cluster.infer(std::slice::from_ref(&input)).await?;
            latencies.push(1e3 * start.elapsed().as_secs_f64());
        }
    }
    let mut measured = Vec::new();
    for ((cluster, before), latencies) in clusters.iter().zip(&before).zip(latencies) {
        measured.push(means(before, &cluster.reports().await?, latencies));
    }
    let lanes = clusters[1].trace().await?;
    if let Some(path) = &orders.trace {
        fs::write(path, document(&lanes).to_string())
            .with_context(|| path.display().to_string())?;
    }
    let hidden = hidden(&lanes, &orders.exchanges);
    for cluster in clusters {
        cluster.stop().await?;
    }
    let beside_ms = 1e3 * beside;
    let [one, four, emulated] =
        <[Cluster; 3]>::try_from(measured).ok().context("three clusters")?;
    Ok(Measured { one, four, emulated, hidden, beside_ms, classes })
}

/// Share of the exchanges' travel for which nobody waited, as the cost model has it: what a receiver waited
/// for an exchange is visible, at most for as long as that travelled.
fn hidden(lanes: &[Aligned], exchanges: &BTreeSet<u32>) -> Option<f64> {
    // By request and transfer: when it left, and how long it was waited for, in ns.
    let (mut left, mut waited) = (HashMap::new(), HashMap::new());
    for Aligned { lane, offset, .. } in lanes {
        for span in &lane.spans {
            let key = (span.request, span.id);
            match span.kind {
                Kind::Encode => _ = left.insert(key, span.end as i64 + offset),
                Kind::Wait => *waited.entry(key).or_insert(0) += (span.end - span.start) as i64,
                _ => {}
            }
        }
    }
    let (mut travel, mut visible) = (0, 0);
    for Aligned { lane, offset, .. } in lanes {
        let arrived = |span: &&Span| span.kind == Kind::Arrived && exchanges.contains(&span.id);
        for span in lane.spans.iter().filter(arrived) {
            let key = (span.request, span.id);
            let Some(left) = left.get(&key) else { continue };
            let took = (span.start as i64 + offset - left).max(0);
            travel += took;
            visible += waited.get(&key).copied().unwrap_or(0).min(took);
        }
    }
    (travel > 0).then(|| 1.0 - visible as f64 / travel as f64)
}

fn means(before: &[NodeReport], after: &[NodeReport], latencies: Vec<f64>) -> Cluster {
    let count = latencies.len() as f64;
    let send = |(before, after): (&SendReport, &SendReport)| {
        (after.transfer, (after.bytes - before.bytes) as f64 / count)
    };
    let node = |(before, after): (&NodeReport, &NodeReport)| NodeMeans {
        compute: (after.compute_ms - before.compute_ms) / count,
        waiting: (after.waiting_ms - before.waiting_ms) / count,
        codec: (after.codec_ms - before.codec_ms) / count,
        bytes_sent: (after.bytes_sent - before.bytes_sent) as f64 / count,
        sends: before.sends.iter().zip(&after.sends).map(send).collect(),
    };
    Cluster { nodes: before.iter().zip(after).map(node).collect(), latencies }
}

/// A picture as the model takes it.
fn picture(info: &ClusterInfo) -> Result<Array> {
    let shape = info.inputs.first().context("the model has no input")?.shape.clone();
    let channels = shape.get(1).copied().unwrap_or(1);
    let plane = shape.iter().skip(2).product::<usize>().max(1);
    let entries = &info.metadata;
    let get = |key: &str| entries.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str());
    let normalisation = Normalisation::read(get, channels)?;
    let value = |at: usize| normalisation.value(at / plane % channels, (at * 7919 % 256) as u8);
    Ok(Array { data: (0..shape.iter().product()).map(value).collect(), shape })
}
