//! A node whose recorder is switched on and off while it serves, a line on its standard input each: the
//! same process watched and not, which no two processes are.
//!
//! It answers each line with the number of spans that it has recorded so far, and ends with its input.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use snn_runtime::TractEngine;
use snn_runtime::http::{Http, Limits};
use snn_runtime::key::ClusterKey;
use snn_runtime::knowledge::Knowledge;
use snn_runtime::serve::{Server, ServerOptions};
use snn_runtime::transport::zenoh::{Link, Options};
use tokio_util::sync::CancellationToken;

/// Worker threads, as many as those of `snn-run`.
const IO_THREADS: usize = 2;

#[derive(Debug, Parser)]
struct Args {
    shard: std::path::PathBuf,
    #[arg(long)]
    listen: String,
    #[arg(long)]
    http: String,
    #[arg(long)]
    peer: Vec<String>,
    #[arg(long)]
    key: Option<std::path::PathBuf>,
}

pub(crate) fn run() -> Result<()> {
    let Args { shard, listen, http, peer, key } = Args::parse();
    let key = key.map(std::fs::read_to_string).transpose()?;
    let key = key.map(|text| ClusterKey::from_pem(&text)).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(IO_THREADS)
        .enable_all()
        .build()?;
    let _inside = runtime.enter();
    let knowledge = Arc::new(Knowledge::new(std::fs::read(shard)?.into())?);
    let nodes = knowledge.shard().identity().nodes;
    let server = runtime.block_on(async {
        let link = Link::open(&Options { listen, peers: peer, key, ..Options::default() }).await?;
        let engines = Arc::new(|| Box::new(TractEngine::new(1)) as _);
        let options = ServerOptions { takeover: true, ..ServerOptions::default() };
        Server::start(link, knowledge, engines, options).await.context("start")
    })?;
    let http = runtime.block_on(Http::bind(&http))?;
    let picture = Arc::new(|_: &_, _: &_| Err("no pictures are asked here".to_owned()));
    let serving =
        http.serve(server.asker(), picture, Limits::of_cluster(nodes), CancellationToken::new());
    runtime.spawn(serving);
    for line in std::io::stdin().lines() {
        match line?.as_str() {
            "on" => server.record(true),
            "off" => server.record(false),
            other => bail!("neither on nor off: {other}"),
        }
        let lanes = server.lanes();
        let spans: u64 = lanes.iter().map(|lane| lane.spans.len() as u64 + lane.dropped).sum();
        println!("{spans}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
