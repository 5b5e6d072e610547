//! From images to four processes that answer together, in about two minutes.
//!
//! Trains a small separable network on the handwritten digits that come with the project, searches
//! which group should tell which what, exports it, splits it into four shards, and starts a process
//! for each. These classify the third of the digits nobody has trained on; the same network, whole,
//! must give the same class for every one. What `snn-train`, `snnc` and `snn-run` do for a network of
//! your own is here in one place. Everything is left in a folder (default `target/quickstart`).

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it talks to whoever runs it")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use snn::run::input::Array;
use snn::run::local::{LocalCluster, LocalOptions, serve_if_child};
use snn::run::per_request;
use snn_compiler::{Nodes, Options, PolicySource, Source, Split, compile, picture, show};
use snn_runtime::transport::memory::Network;
use snn_runtime::{Node, NodeReport, Shard, Tensor, TractEngine};
use snn_trainer::{Config, Data, Dataset, Outcome, Report};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Longest wait for one answer: a thousand times what it takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    // The four nodes are this very program, started again.
    if let Some(code) = serve_if_child() {
        return code;
    }
    let folder =
        std::env::args_os().nth(1).map_or_else(|| "target/quickstart".into(), PathBuf::from);
    let runtime = tokio::runtime::Runtime::new();
    let done = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&folder)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(folder: &Path) -> Result<()> {
    let start = Instant::now();
    let config = Config::digits();
    let data = Data::load(&config, None)?;
    println!(
        "{} digits to train on, {} held out",
        data.train.len() + data.validation.len(),
        data.test.len()
    );

    let outcome = train(&config, folder)?;
    println!("\nTrained and searched in {:.0} s.\n", start.elapsed().as_secs_f64());
    print_candidates(&outcome);

    let model = Source::from_bytes(fs::read(&outcome.model)?.into())?;
    let policy = outcome.policy.as_ref().ok_or("the network has no groups")?;
    let policy = PolicySource::from_bytes(&fs::read(policy)?)?;
    let shards = split(&model, &policy, Nodes::PerGroup)?;
    let whole = split(&model, &policy, Nodes::Even(1))?;
    println!("\nWho computes what (■), and sends and adds what (→, ←), block by block:\n");
    println!("{}", picture::text(&shards.manifest));
    print!("{}", show::costs(&shards.manifest));

    let place = folder.join("shards");
    snn::compile::write(&shards, &place)?;
    let whole = classify_whole(&whole, &data.test).await?;
    let (cluster, reports) = classify_on_four(&place, &data.test).await?;
    print_answers(&data.test, &whole, &cluster)?;
    println!("\n{}", per_request(&reports, data.test.len()));
    println!("\nAll of it is in {}; ask the cluster yourself:", folder.display());
    println!("    snn-run --local {} --repeat 100", place.display());
    Ok(())
}

fn train(config: &Config, folder: &Path) -> Result<Outcome> {
    let run = folder.join("run");
    if run.exists() {
        fs::remove_dir_all(&run)?;
    }
    let style =
        ProgressStyle::with_template("{prefix:>9} {bar:30} {pos:>3}/{len:<3} {msg} [{elapsed}]")?;
    let bar = ProgressBar::new(0).with_style(style);
    let mut progress = |report: &Report| {
        bar.set_prefix(report.stage.to_string());
        bar.set_length(report.total as u64);
        bar.set_position(report.done as u64);
        let loss = report.loss.map(|loss| format!("loss {loss:.3} "));
        let accuracy = report.accuracy.map(|a| format!("accuracy {:.1} %", 100.0 * a));
        bar.set_message(loss.unwrap_or_default() + &accuracy.unwrap_or_default());
        if bar.is_hidden() && report.done == report.total {
            println!("{:>9}, round {}: {}", report.stage, report.round, bar.message());
        }
    };
    let outcome = snn_trainer::run(config, None, &run, false, &mut progress)?;
    bar.finish_and_clear();
    Ok(outcome)
}

fn print_candidates(outcome: &Outcome) {
    println!("{:<10} {:>10} {:>10}   policy", "", "validation", "held out");
    for judged in &outcome.candidates {
        let step = |step: &snn_schemas::Step| format!("{}@{}", step.decision.id(), step.level);
        let steps: Vec<String> = judged.policy.steps.iter().map(step).collect();
        println!(
            "{:<10} {:>8.1} % {:>8.1} %   {}",
            judged.candidate.name,
            100.0 * judged.validation.accuracy(),
            100.0 * judged.test.accuracy(),
            steps.join(" ")
        );
    }
    println!("(decision@level a step, numbered as in the paper's Tables 3 and 4)");
}

fn split(model: &Source, policy: &PolicySource, nodes: Nodes) -> Result<Split> {
    Ok(compile(model, Some(policy), &Options { nodes, ..Options::default() })?)
}

/// The class of each image, by the whole network in this process.
async fn classify_whole(split: &Split, images: &Dataset) -> Result<Vec<usize>> {
    let shard = Shard::from_bytes(split.shards[0].to_bytes().into())?;
    let mut node = Node::load(&shard, || TractEngine::new(1)).await?;
    let transport = Network::new().join(0, &split.manifest.split, node.sink());
    node.connect(Arc::new(transport));
    let mut classes = Vec::with_capacity(images.len());
    for index in 0..images.len() {
        let Array { shape, data } = image(images, index);
        let answer = node.infer(vec![Tensor::new(shape, data)?], PATIENCE).await?;
        classes.push(largest(answer.outputs[0].data()));
    }
    Ok(classes)
}

/// The class of each image, by four processes; and what these have counted.
async fn classify_on_four(
    folder: &Path,
    images: &Dataset,
) -> Result<(Vec<usize>, Vec<NodeReport>)> {
    let cluster = LocalCluster::start(folder, LocalOptions::default()).await?;
    println!("\nFour processes are running: {:?}", cluster.process_ids());
    let mut classes = Vec::with_capacity(images.len());
    for index in 0..images.len() {
        let outputs = cluster.infer(&[image(images, index)]).await?;
        classes.push(largest(&outputs[0].data));
    }
    let reports = cluster.reports().await?;
    cluster.stop().await?;
    Ok((classes, reports))
}

fn image(images: &Dataset, index: usize) -> Array {
    let [channels, height, width] = images.shape();
    Array { shape: vec![1, channels, height, width], data: images.image(index).to_vec() }
}

fn largest(logits: &[f32]) -> usize {
    let best = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(class, _)| class)
}

fn print_answers(images: &Dataset, whole: &[usize], cluster: &[usize]) -> Result<()> {
    let right =
        |classes: &[usize]| classes.iter().zip(images.labels()).filter(|(a, b)| a == b).count();
    let equal = whole.iter().zip(cluster).filter(|(a, b)| a == b).count();
    let (count, percent) = (images.len(), 100.0 / images.len() as f64);
    println!("held-out digits told right");
    println!(
        "  whole network    {:>4} of {count}  {:.2} %",
        right(whole),
        right(whole) as f64 * percent
    );
    println!(
        "  four processes   {:>4} of {count}  {:.2} %",
        right(cluster),
        right(cluster) as f64 * percent
    );
    println!("  same prediction  {equal:>4} of {count}");
    match equal == count {
        true => Ok(()),
        false => Err("the cluster and the whole network disagree".into()),
    }
}
