//! `snn-run --agent`: waits on a device for what `snnc deploy` sends, and runs it.
//!
//! Takes [`args::Agent`]; binds its addresses (for those who deploy, for `snn-run infer`, and for HTTP),
//! says where they are, and serves until stopped. Its nodes are processes of their own ([`super::keep`]):
//! one that dies is started again and takes nothing else with it, and all end with the agent. After a
//! restart it goes on with the version that was current.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use snn_runtime::agent::front::{self, Front};
use snn_runtime::agent::{AGENT_PORT, Agent, AgentOptions, FRONT_PORT};
use snn_runtime::transport::zenoh::{Link, Options};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::keep::Keeper;
use super::{args, http};

/// Runs `snn-run --agent`.
pub(super) async fn agent(agent: args::Agent) -> Result<ExitCode> {
    let key = agent.key.as_deref().map(crate::key::read).transpose()?;
    let has_key = key.is_some();
    let open = has_key || agent.insecure;
    let host = if open { "0.0.0.0" } else { "127.0.0.1" };
    let address = |given: &Option<String>, port: u16| {
        given.clone().unwrap_or_else(|| format!("{host}:{port}"))
    };
    let claimed = match &agent.http {
        Some(settings) => Some(http::claim(settings, key.as_ref(), agent.insecure, true).await?),
        None => None,
    };
    let serve = Options {
        listen: address(&agent.serve, FRONT_PORT),
        key: key.clone(),
        insecure: agent.insecure,
        ..Options::default()
    };
    let link = Link::open_apart(&serve).await.context("serve")?;
    let front = Arc::new(Front::default());
    let options = AgentOptions {
        name: agent.name.clone().or_else(super::host_name).unwrap_or_else(|| "unnamed".to_owned()),
        software: env!("CARGO_PKG_VERSION").to_owned(),
        listen: address(&agent.listen, AGENT_PORT),
        key,
        insecure: agent.insecure,
        dir: agent.dir.clone(),
        peers: agent.peers.clone(),
        http: claimed.as_ref().map(|http| http.url().to_string()),
        front: Some(place(link.address())),
    };
    let name = options.name.clone();
    let waiting = Agent::open(options, Box::new(keeper(&agent)?), Arc::clone(&front));
    let waiting = waiting.await.context("agent")?;
    super::progress(format_args!("listening on {}", waiting.address()));
    super::progress(format_args!("answering on {}", link.address()));
    super::warn_without_key(has_key, agent.insecure);
    let mut serving = JoinSet::new();
    let http = claimed.map(|http| {
        super::progress(http.url());
        if let Some(warning) = http.url().warning() {
            super::progress(warning);
        }
        http.serve(Arc::clone(&front) as Arc<_>)
    });
    serving.spawn(front::answer(link.clone(), Arc::clone(&front)));
    super::progress(format_args!("agent {name} waits for work in {}", agent.dir.display()));

    let stop = CancellationToken::new();
    let mut working = JoinSet::new();
    working.spawn(waiting.run(stop.clone()));
    super::interrupted().await?;
    if let Some(http) = http {
        http.stop().await;
    }
    stop.cancel();
    while working.join_next().await.is_some() {}
    serving.shutdown().await;
    if let Err(error) = link.close().await {
        tracing::debug!(%error, "session did not close cleanly");
    }
    Ok(ExitCode::SUCCESS)
}

fn keeper(agent: &args::Agent) -> Result<Keeper> {
    // Its children may be started when the working directory is another.
    let absolute = |path: &Path| std::path::absolute(path).context("key");
    Ok(Keeper {
        executable: std::env::current_exe().context("own executable")?,
        key: agent.key.as_deref().map(absolute).transpose()?,
        insecure: agent.insecure,
        threads: agent.threads,
        grace: agent.grace,
    })
}

/// An address without its scheme.
fn place(address: &str) -> String {
    address.split_once('/').map_or(address, |(_, place)| place).to_owned()
}
