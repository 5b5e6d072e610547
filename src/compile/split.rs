//! `snnc split`: compiles a model and writes its shards.
//!
//! Takes the command's arguments; writes the folder and prints the table of shards and both costs.
//! The same input gives the same bytes in every file.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use snn_compiler::show;
use snn_schemas::manifest::Cost;

use super::args::Split;
use super::{compile_with, output, print};

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    dir: &'a Path,
    shards: Vec<Row>,
    cost: &'a Cost,
}

/// A line of the table.
#[derive(Serialize)]
struct Row {
    rank: usize,
    file: String,
    groups: Vec<usize>,
    ops: usize,
    parameters: u64,
    flops: u64,
    bytes_sent: u64,
    bytes_received: u64,
}

pub(super) fn split(args: &Split) -> Result<()> {
    let policy = args.compile.policy.as_deref();
    let split = compile_with(&args.model, policy, &args.options())?;
    let dir = args.output.clone().unwrap_or_else(|| default_dir(&args.model));
    output::write(&split, &dir)?;
    let rows = rows(&split);
    if args.json {
        let report = Report { dir: &dir, shards: rows, cost: &split.manifest.cost };
        let text = serde_json::to_string_pretty(&report).context("report")?;
        return print(format_args!("{text}\n"));
    }
    let nodes = split.shards.len();
    let shards = if nodes == 1 { "shard" } else { "shards" };
    let wrote = format!("wrote {nodes} {shards} and cluster.json to {}", dir.display());
    let costs = show::costs(&split.manifest) + &show::idle(&split.manifest);
    print(format_args!("{}\n\n{costs}\n{wrote}\n", table(&rows)))
}

/// `MODEL.shards` for `MODEL.onnx`.
fn default_dir(model: &Path) -> PathBuf {
    model.with_extension("shards")
}

fn rows(split: &snn_compiler::Split) -> Vec<Row> {
    let row = |(rank, work): (usize, &snn_compiler::Work)| {
        let (bytes_sent, bytes_received) = split.manifest.traffic(rank);
        Row {
            rank,
            file: split.manifest.nodes[rank].shard.clone(),
            groups: show::groups_of(&split.manifest, rank),
            ops: work.ops,
            parameters: work.parameters,
            flops: work.flops,
            bytes_sent,
            bytes_received,
        }
    };
    split.work.iter().enumerate().map(row).collect()
}

fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "shard",
        "groups",
        "ops",
        "parameters",
        "MFLOPs",
        "bytes sent",
        "bytes received",
    ]);
    for row in rows {
        let groups: Vec<String> = row.groups.iter().map(|group| format!("g{group}")).collect();
        table.add_row([
            row.rank.to_string(),
            groups.join(" "),
            row.ops.to_string(),
            row.parameters.to_string(),
            format!("{:.1}", row.flops as f64 / 1e6),
            row.bytes_sent.to_string(),
            row.bytes_received.to_string(),
        ]);
    }
    for column in table.column_iter_mut().filter(|column| column.index != 1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}
