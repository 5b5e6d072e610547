//! What goes where: a rank an agent.
//!
//! Takes a bundle and the agents; gives them by rank. An agent that serves a rank already keeps it, the
//! others take what is left in the order in which they were given or found. Agents without a rank are
//! spare: what they still run is stopped when the new version answers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use comfy_table::Table;
use serde_json::{Value, json};
use snn_runtime::agent::{Description, NodeState, Remote, Settings, Version};

use super::all;
use super::bundle::Bundle;

/// How long an agent may take to say who it is.
const DESCRIBE_WITHIN: Duration = Duration::from_secs(20);

/// An agent, and what it was when it was asked.
pub(super) struct Place {
    pub(super) remote: Arc<Remote>,
    pub(super) before: Description,
}

impl Place {
    /// The rank an agent serves now, of whatever version.
    fn rank(&self) -> Option<usize> {
        let current = self.before.current.as_ref()?;
        self.before.versions.iter().find(|state| state.version == *current)?.rank
    }

    /// The port that a version's node has on this agent, where it was started there as `rank` before.
    pub(super) fn port(&self, version: &Version, rank: usize) -> Option<u16> {
        let known = self.before.versions.iter().find(|state| state.version == *version)?;
        known.port.filter(|_| known.rank == Some(rank))
    }
}

/// Agents by rank, and those without.
pub(super) struct Plan {
    pub(super) places: Vec<Place>,
    pub(super) spare: Vec<Place>,
    /// How the nodes are to run.
    pub(super) settings: Settings,
}

/// Gives each rank an agent.
pub(super) async fn plan(
    bundle: &Bundle,
    agents: Vec<Arc<Remote>>,
    settings: Settings,
) -> Result<Plan> {
    let mut places = describe(&agents).await?;
    for place in &places {
        let mut running = place.before.versions.iter();
        let running = running.find(|state| state.version == bundle.version);
        let running = running.filter(|state| state.state != NodeState::Stopped);
        if let Some(other) = running.map(|state| state.settings).filter(|other| *other != settings)
        {
            bail!(
                "{}: version {} runs there already with other settings ({other}; asked for: \
                 {settings}); stop it first: snnc deploy --stop",
                place.before.name,
                bundle.version
            );
        }
    }
    let nodes = bundle.manifest.nodes.len();
    if places.len() < nodes {
        let names: Vec<&str> = places.iter().map(|place| place.before.name.as_str()).collect();
        bail!(
            "{}: {nodes} nodes, but {} (snnc split --nodes {} puts several groups on a device)",
            bundle.dir.display(),
            match names.len() {
                1 => format!("only 1 agent: {}", names[0]),
                count => format!("only {count} agents: {}", names.join(", ")),
            },
            names.len()
        );
    }
    let mut by_rank: Vec<Option<Place>> = (0..nodes).map(|_| None).collect();
    let mut free = Vec::new();
    for place in places.drain(..) {
        match place.rank().and_then(|rank| by_rank.get_mut(rank)) {
            Some(seat @ None) => *seat = Some(place),
            _ => free.push(place),
        }
    }
    let mut free = free.into_iter();
    let places = by_rank.into_iter().filter_map(|seat| seat.or_else(|| free.next())).collect();
    Ok(Plan { places, spare: free.collect(), settings })
}

/// Asks every agent who it is.
pub(super) async fn describe(agents: &[Arc<Remote>]) -> Result<Vec<Place>> {
    let asking = agents.iter().cloned().map(|remote| async move {
        let before = remote.describe(DESCRIBE_WITHIN).await?;
        Ok::<_, anyhow::Error>(Place { remote, before })
    });
    all(asking).await?.into_iter().collect()
}

impl Plan {
    /// Every agent.
    pub(super) fn everybody(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().chain(&self.spare)
    }

    /// The plan for people.
    pub(super) fn table(&self, bundle: &Bundle) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(["rank", "device", "agent", "shard", "bytes", "serves now"]);
        for (rank, place) in self.places.iter().enumerate() {
            table.add_row([
                rank.to_string(),
                place.before.name.clone(),
                place.remote.address().to_owned(),
                bundle.manifest.nodes[rank].shard.clone(),
                bundle.shards[rank].bytes.to_string(),
                now(place),
            ]);
        }
        for place in &self.spare {
            let (name, address) = (place.before.name.clone(), place.remote.address().to_owned());
            table.add_row(["-".into(), name, address, "-".into(), "-".into(), now(place)]);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        format!("version {} of {}\n\n{}\n", bundle.version, bundle.dir.display(), table.trim_fmt())
    }

    /// The plan for programs.
    pub(super) fn json(&self, bundle: &Bundle) -> Value {
        let place = |(rank, place): (usize, &Place)| {
            json!({
                "rank": rank,
                "device": place.before.name,
                "agent": place.remote.address(),
                "shard": bundle.manifest.nodes[rank].shard,
                "bytes": bundle.shards[rank].bytes,
            })
        };
        self.places.iter().enumerate().map(place).collect()
    }
}

fn now(place: &Place) -> String {
    match (&place.before.current, place.rank()) {
        (Some(version), Some(rank)) => format!("{version} rank {rank}"),
        (Some(version), None) => version.to_string(),
        (None, _) => "-".to_owned(),
    }
}
