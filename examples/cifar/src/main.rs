//! Four processes that classify photographs together, without building the trainer.
//!
//! Takes PNG or JPEG files and folders of them on the command line, and the network in
//! `examples/models/` that was trained on CIFAR-10; splits it under its policy into four shards, starts a
//! process for each, and asks them. Prints the class of every image, and where images lie in folders
//! named after classes how many were right. The whole network, in a fifth process, is asked the same: answers
//! must be the same within rounding, but for the few in which a number between two codes of four bits went
//! the other way. Without an image it asks about noise. Exit code 1 where more answers differ.
//!
//!     cargo run --release -p cifar -- photo.jpg
//!     cargo run --release -p cifar -- DATA/test        # <class>/*.jpg

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it talks to whoever runs it")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use snn::run::input::{self, Array, InputSpec};
use snn::run::local::{LocalCluster, LocalOptions, serve_if_child};
use snn::run::{class_names, input_spec, per_request};
use snn_compiler::{Nodes, Options, PolicySource, Source, compile, picture};

const MODEL: &[u8] = include_bytes!("../../models/cifar10.onnx");
const POLICY: &[u8] = include_bytes!("../../models/cifar10.json");

/// Largest difference between the cluster's numbers and the whole network's, relative to the
/// largest of them: sums are taken in another order.
const TOLERANCE: f32 = 1e-3;
/// One image in so many may differ by more: where features travel in codes of a few bits, a number that lies between
/// two codes goes to one of them in one order of sums and to the other in another.
const BETWEEN_CODES: usize = 200;
/// Images printed one by one; beyond, the count of right ones says more.
const PRINTED: usize = 20;
/// Requests of noise, where there are no images.
const NOISE: u64 = 50;

fn main() -> ExitCode {
    // The nodes are this very program, started again.
    if let Some(code) = serve_if_child() {
        return code;
    }
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let runtime = tokio::runtime::Runtime::new();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(&paths))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("cifar: the four nodes and the whole network disagree");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("cifar: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether the four nodes and the whole network agree.
async fn run(paths: &[PathBuf]) -> Result<bool> {
    let images = paths.iter().try_fold(Vec::new(), |mut images, path| {
        list(path, &mut images)?;
        anyhow::Ok(images)
    })?;
    ensure!(paths.is_empty() || !images.is_empty(), "no PNG or JPEG image there");

    let folder = tempfile::tempdir()?;
    let [four, whole] = [Nodes::PerGroup, Nodes::Even(1)];
    let four = start(&folder.path().join("four"), four, true).await?;
    let whole = start(&folder.path().join("whole"), whole, false).await?;
    let info = four.info();
    let spec = input_spec(&info.inputs, &info.metadata)?;
    let mut tally = Tally::new(class_names(info));

    if images.is_empty() {
        println!("no image given: the nodes are asked about noise");
        for seed in 0..NOISE {
            tally.ask(&four, &whole, None, &input::noise(&spec.shape, seed)).await?;
        }
    }
    for path in &images {
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let label = path.parent().and_then(name);
        let image = match read(path, &spec) {
            Ok(image) => image,
            Err(error) => {
                eprintln!("{}: {error:#}", path.display());
                continue;
            }
        };
        let class = tally.ask(&four, &whole, label.as_deref(), &image).await?;
        match tally.asked {
            ..=PRINTED => println!("{:<24} {class}", name(path).unwrap_or_default()),
            more if more == images.len() => println!("… and {} more", more - PRINTED),
            _ => {}
        }
    }
    ensure!(tally.asked > 0, "none of the images can be read");
    tally.print();
    println!("\n{}", per_request(&four.reports().await?, tally.asked));
    four.stop().await?;
    whole.stop().await?;
    Ok(tally.differing * BETWEEN_CODES <= tally.asked)
}

/// Splits the network, and starts a process for each shard.
async fn start(folder: &Path, nodes: Nodes, shown: bool) -> Result<LocalCluster> {
    let model = Source::from_bytes(MODEL.to_vec().into())?;
    let policy = PolicySource::from_bytes(POLICY)?;
    let split = compile(&model, Some(&policy), &Options { nodes, ..Options::default() })?;
    if shown {
        println!("Who computes what (■), and sends and adds what (→, ←), block by block:\n");
        println!("{}", picture::text(&split.manifest));
    }
    snn::compile::write(&split, folder)?;
    LocalCluster::start(folder, LocalOptions::default()).await
}

/// Adds the image at `path`, or all those below it, in the order of their names.
fn list(path: &Path, images: &mut Vec<PathBuf>) -> Result<()> {
    let context = || path.display().to_string();
    if !fs::metadata(path).with_context(context)?.is_dir() {
        images.push(path.to_owned());
        return Ok(());
    }
    let entries = fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut entries: Vec<PathBuf> =
        entries.with_context(context)?.into_iter().map(|entry| entry.path()).collect();
    entries.sort();
    for entry in entries {
        let extension = entry.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
        if entry.is_dir() || matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg")) {
            list(&entry, images)?;
        }
    }
    Ok(())
}

fn read(path: &Path, spec: &InputSpec) -> Result<Array> {
    input::read(path, spec)?.into_iter().next().context("no image in it")
}

/// The name of the class with the largest logit.
fn class<'a>(classes: &'a [String], logits: &[f32]) -> &'a str {
    let best = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.and_then(|(index, _)| classes.get(index)).map_or("?", String::as_str)
}

/// What the answers come to.
struct Tally {
    classes: Vec<String>,
    asked: usize,
    /// Images whose folder is named after a class.
    labelled: usize,
    right: usize,
    /// Those whose numbers differ from the whole network's.
    differing: usize,
    /// And even the class.
    classed_otherwise: usize,
}

impl Tally {
    fn new(classes: Vec<String>) -> Tally {
        Tally { classes, asked: 0, labelled: 0, right: 0, differing: 0, classed_otherwise: 0 }
    }

    /// Asks both about one image, and gives its class; it lies in `folder`.
    async fn ask(
        &mut self,
        four: &LocalCluster,
        whole: &LocalCluster,
        folder: Option<&str>,
        image: &Array,
    ) -> Result<String> {
        let image = std::slice::from_ref(image);
        let (given, wanted) = tokio::try_join!(four.infer(image), whole.infer(image))?;
        let (given, wanted) = (&given[0].data, &wanted[0].data);
        let size = wanted.iter().fold(1.0f32, |size, x| size.max(x.abs()));
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * size;
        self.differing += usize::from(!given.iter().zip(wanted).all(close));

        let [class, by_whole] = [given, wanted].map(|logits| class(&self.classes, logits));
        self.classed_otherwise += usize::from(class != by_whole);
        let label = folder.filter(|&folder| self.classes.iter().any(|class| class == folder));
        self.labelled += usize::from(label.is_some());
        self.right += usize::from(label == Some(class));
        self.asked += 1;
        Ok(class.to_owned())
    }

    fn print(&self) {
        println!("{} of {} as the whole network says", self.asked - self.differing, self.asked);
        if self.differing > 0 {
            println!(
                "in {} a number between two codes went the other way; {} of them are of another class",
                self.differing, self.classed_otherwise
            );
        }
        if self.labelled > 0 {
            let percent = 100.0 * self.right as f64 / self.labelled as f64;
            println!("{} of {} right: {percent:.2} %", self.right, self.labelled);
        }
    }
}
