//! What is measured: a separable network, split and unsplit, and the ordinary one it is compared with.
//!
//! Takes files, or makes untrained networks of the paper's shapes; gives folders that a cluster starts
//! from. The weights do not matter to time. Folders go with the value.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use prost::Message as _;
use snn_compiler::{Nodes, Options, PolicySource, Source, Split, compile, flops};
use snn_schemas::manifest::MANIFEST_FILE;
use snn_schemas::metadata::Normalisation;

use crate::fixtures::{sep_resnext, style};

/// Table 6's decisions with sparsification.
const TABLE_6: &str = "[[9,4], [22,6], [18,6], [3,6], [16,7], [23,8], [9,8], [13,8], [20,7]]";
/// How its exchanges travel: as the paper's do, and in codes of 8 and of 4 bits.
const CODECS: [(&str, &str); 3] = [
    ("f16", r#""dtype": "f16""#),
    ("i8, zeros packed", r#""dtype": "i8", "packing": "zeros""#),
    ("i4, zeros packed", r#""dtype": "i4", "packing": "zeros""#),
];

/// The paper's networks by the names that BENCH.md's commands use: depth, cardinality and path width, groups.
const PAPERS: [(&str, usize, [usize; 2], usize); 4] = [
    ("sep56", 56, [4, 16], 4),
    ("resnext56", 56, [4, 16], 1),
    ("sep110-8x16d", 110, [8, 16], 4),
    ("sep56-64x4d", 56, [64, 4], 4),
];

/// Writes the paper's networks, untrained, and Table 6's policy in each codec to a folder.
pub(crate) fn write(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let write = |name: String, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| path.display().to_string())
    };
    for (name, depth, paths, groups) in PAPERS {
        let model = sep_resnext(depth, paths, 64, groups, 100).onnx(style("burn"));
        write(format!("{name}.onnx"), &normalised(model)?)?;
    }
    for (name, codec) in CODECS {
        let dtype = name.split(',').next().unwrap_or(name);
        write(format!("table6-{dtype}.json"), table_6(codec).as_bytes())?;
    }
    Ok(())
}

/// Table 6's policy, whose exchanges travel so.
fn table_6(codec: &str) -> String {
    format!(r#"{{"version": 1, "groups": 4, "staleness": 2, {codec}, "decisions": {TABLE_6}}}"#)
}

/// The networks, in a folder of their own.
pub(crate) struct Models {
    folder: tempfile::TempDir,
    /// The separable network, split under each policy, by the policy's name.
    pub(crate) splits: Vec<(String, Split)>,
    /// Operations of the unsplit network.
    pub(crate) flops: u64,
    /// Whether there is an ordinary network to compare with.
    pub(crate) has_ordinary: bool,
}

impl Models {
    pub(crate) fn prepare(model: Option<&Path>, policies: &[PathBuf]) -> Result<Models> {
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let folder = tempfile::tempdir()?;
        let paper = |groups| sep_resnext(56, [4, 16], 64, groups, 100).onnx(style("burn"));
        let bytes = model.map_or_else(|| normalised(paper(4)), read)?;
        let source = Source::from_bytes(bytes.clone().into())?;
        let mut models = Models {
            flops: flops(&source, None)?,
            has_ordinary: model.is_none(),
            folder,
            splits: vec![],
        };
        for path in policies {
            let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
            models.split(&source, &name, &read(path)?)?;
        }
        for (name, codec) in CODECS.iter().filter(|_| policies.is_empty()) {
            models.split(&source, name, table_6(codec).as_bytes())?;
        }
        models.write_whole(&source, &bytes)?;
        if models.has_ordinary {
            fs::write(models.ordinary(), paper(1))?;
        }
        Ok(models)
    }

    /// Splits the network under one more policy.
    fn split(&mut self, source: &Source, name: &str, policy: &[u8]) -> Result<()> {
        let policy = PolicySource::from_bytes(policy).with_context(|| name.to_owned())?;
        let split = compile(source, Some(&policy), &Options::default())?;
        snn::compile::write(&split, &self.split_folder(self.splits.len()))?;
        self.splits.push((name.to_owned(), split));
        Ok(())
    }

    /// The unsplit network as a cluster of one: any model is one.
    fn write_whole(&self, source: &Source, bytes: &[u8]) -> Result<()> {
        let options = Options { nodes: Nodes::Even(1), ..Options::default() };
        let mut manifest = compile(source, None, &options)?.manifest;
        for node in &mut manifest.nodes {
            node.shard = "whole.onnx".to_owned();
            node.schedule.clear();
        }
        fs::create_dir(self.whole_folder())?;
        fs::write(self.whole(), bytes)?;
        fs::write(self.whole_folder().join(MANIFEST_FILE), manifest.to_json())?;
        Ok(())
    }

    /// Nodes of the largest split.
    pub(crate) fn nodes(&self) -> usize {
        self.splits.iter().map(|(_, split)| split.manifest.nodes.len()).max().unwrap_or(0)
    }

    /// The network split under the policy of this number.
    pub(crate) fn split_folder(&self, policy: usize) -> PathBuf {
        self.folder.path().join(format!("split{policy}"))
    }

    pub(crate) fn whole_folder(&self) -> PathBuf {
        self.folder.path().join("whole")
    }

    /// The unsplit network.
    pub(crate) fn whole(&self) -> PathBuf {
        self.whole_folder().join("whole.onnx")
    }

    /// The ordinary network of the same shape, ResNeXt-56 4×16d.
    pub(crate) fn ordinary(&self) -> PathBuf {
        self.folder.path().join("ordinary.onnx")
    }
}

/// The model with CIFAR-100's normalisation in its metadata: its input travels as pixels.
fn normalised(model: Vec<u8>) -> Result<Vec<u8>> {
    let mut model = Source::from_bytes(model.into())?.model;
    let (mean, std) = (vec![0.5071, 0.4865, 0.4409], vec![0.2673, 0.2564, 0.2762]);
    for (key, value) in (Normalisation { mean, std }).entries() {
        model.set_metadata(&key, &value);
    }
    Ok(model.encode_to_vec())
}
