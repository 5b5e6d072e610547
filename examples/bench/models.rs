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

/// Table 6's policy with sparsification and f16.
const TABLE_6: &str = r#"{"version": 1, "groups": 4, "staleness": 2, "dtype": "f16",
    "decisions": [[9,4], [22,6], [18,6], [3,6], [16,7], [23,8], [9,8], [13,8], [20,7]]}"#;

/// The networks, in a folder of their own.
pub(crate) struct Models {
    folder: tempfile::TempDir,
    /// The separable network, split.
    pub(crate) split: Split,
    /// Operations of the unsplit network.
    pub(crate) flops: u64,
    /// Whether there is an ordinary network to compare with.
    pub(crate) has_ordinary: bool,
}

impl Models {
    pub(crate) fn prepare(model: Option<&Path>, policy: Option<&Path>) -> Result<Models> {
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        let folder = tempfile::tempdir()?;
        let paper = |groups| sep_resnext(56, [4, 16], 64, groups, 100).onnx(style("burn"));
        let bytes = model.map_or_else(|| normalised(paper(4)), read)?;
        let policy = policy.map_or_else(|| Ok(TABLE_6.as_bytes().to_vec()), read)?;
        let policy = PolicySource::from_bytes(&policy).context("policy")?;
        let source = Source::from_bytes(bytes.clone().into())?;
        let split = compile(&source, Some(&policy), &Options::default())?;
        snn::compile::write(&split, &folder.path().join("split"))?;
        let models =
            Models { flops: flops(&source, None)?, has_ordinary: model.is_none(), folder, split };
        models.write_whole(&source, &bytes)?;
        if models.has_ordinary {
            fs::write(models.ordinary(), paper(1))?;
        }
        Ok(models)
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

    pub(crate) fn nodes(&self) -> usize {
        self.split.manifest.nodes.len()
    }

    pub(crate) fn split_folder(&self) -> PathBuf {
        self.folder.path().join("split")
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
