//! `snnc deploy --status` and `--stop`: what the agents run, and the end of it.
//!
//! Takes the agents; prints a table or JSON. Stopping ends the nodes and leaves agents and files.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use comfy_table::Table;
use serde_json::{Value, json};
use snn_runtime::agent::wire::Request;
use snn_runtime::agent::{NodeState, Remote, Settings, VersionState};

use super::super::print;
use super::plan::{Place, describe};

/// How long an agent may take to stop a node.
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Shows what runs.
pub(super) async fn status(agents: &[Arc<Remote>], as_json: bool) -> Result<ExitCode> {
    let places = describe(agents).await?;
    match as_json {
        true => {
            let agents: Vec<Value> = places.iter().map(in_json).collect();
            print(format_args!("{}\n", json!({ "agents": agents })))?;
        }
        false => print(format_args!("{}\n", table(&places)))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Stops what runs.
pub(super) async fn stop(agents: &[Arc<Remote>], as_json: bool) -> Result<ExitCode> {
    let mut stopped = Vec::new();
    for place in describe(agents).await? {
        let runs = place.before.versions.iter();
        for state in runs.filter(|state| state.state != NodeState::Stopped) {
            let request = Request::Stop { version: state.version.clone() };
            place.remote.order(&request, STOP_WITHIN).await?;
            stopped.push((place.before.name.clone(), state.version.clone(), state.rank));
        }
    }
    if as_json {
        let of = stopped.iter().map(|(device, version, rank)| {
            json!({ "device": device, "version": version.as_str(), "rank": rank })
        });
        print(format_args!("{}\n", json!({ "stopped": of.collect::<Vec<Value>>() })))?;
        return Ok(ExitCode::SUCCESS);
    }
    for (device, version, rank) in &stopped {
        let rank = rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
        print(format_args!("{device}: version {version} rank {rank} stopped\n"))?;
    }
    if stopped.is_empty() {
        print("nothing runs\n")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The versions an agent runs, and the current one in any case.
fn shown(place: &Place) -> impl Iterator<Item = &VersionState> {
    let current = place.before.current.as_ref();
    let versions = place.before.versions.iter();
    versions
        .filter(move |state| state.state != NodeState::Stopped || Some(&state.version) == current)
}

/// An address of an agent's own as others reach it, behind its scheme, where it has one.
fn reachable(place: &Place, own: Option<&str>) -> String {
    let Some((before, port)) = own.and_then(|own| own.rsplit_once(':')) else {
        return "-".to_owned();
    };
    let scheme =
        before.split_once("://").map_or(String::new(), |(scheme, _)| format!("{scheme}://"));
    format!("{scheme}{}:{port}", place.remote.host())
}

fn table(places: &[Place]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["device", "agent", "version", "rank", "node", "ask at", "http"]);
    for place in places {
        let front = reachable(place, place.before.front.as_deref());
        let http = match &place.before.http {
            Some(http) if http.contains("://127.") || http.contains("://[::1]") => {
                format!("{http} (there only)")
            }
            http => reachable(place, http.as_deref()),
        };
        let mut rows: Vec<[String; 3]> = shown(place)
            .map(|state| {
                let serves = Some(&state.version) == place.before.current.as_ref();
                let trial = if serves { "" } else { " (not serving)" };
                let rank = state.rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
                let how = match state.settings == Settings::default() {
                    true => String::new(),
                    false => format!(" ({})", state.settings),
                };
                [format!("{}{trial}", state.version), rank, format!("{}{how}", state.state)]
            })
            .collect();
        if rows.is_empty() {
            rows.push(["-".into(), "-".into(), "waits for work".into()]);
        }
        for [version, rank, state] in rows {
            let (name, address) = (place.before.name.clone(), place.remote.address().to_owned());
            table.add_row([name, address, version, rank, state, front.clone(), http.clone()]);
        }
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

fn in_json(place: &Place) -> Value {
    let version = |state: &VersionState| {
        json!({
            "version": state.version.as_str(),
            "rank": state.rank,
            "node": state.state,
            "settings": state.settings,
            "serves": Some(&state.version) == place.before.current.as_ref(),
        })
    };
    json!({
        "device": place.before.name,
        "agent": place.remote.address(),
        "software": place.before.software,
        "ask_at": place.before.front,
        "http": place.before.http,
        "versions": shown(place).map(version).collect::<Vec<Value>>(),
    })
}
