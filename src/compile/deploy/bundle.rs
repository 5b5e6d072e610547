//! What is deployed: the folder of a split, checked before anybody hears of it.
//!
//! Takes the folder; gives its manifest, the version it is, and its shards, whose hashes are those the
//! manifest lists.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use snn_compiler::sha256;
use snn_runtime::agent::Version;
use snn_schemas::Manifest;
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES};

use super::super::{MAX_MODEL_BYTES, read_file};

/// A split as it is deployed.
pub(super) struct Bundle {
    /// The folder.
    pub(super) dir: PathBuf,
    /// The manifest.
    pub(super) manifest: Manifest,
    /// The bytes it was read from.
    pub(super) manifest_bytes: Bytes,
    /// Their hash.
    pub(super) version: Version,
    /// Shards by rank.
    pub(super) shards: Vec<ShardFile>,
}

/// A shard's file.
pub(super) struct ShardFile {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

impl Bundle {
    /// Reads a folder and checks that it is whole.
    pub(super) fn read(dir: &Path) -> Result<Bundle> {
        let path = dir.join(MANIFEST_FILE);
        let manifest_bytes = Bytes::from(read_file(&path, MAX_MANIFEST_BYTES as u64)?);
        let manifest = Manifest::from_json(&manifest_bytes);
        let manifest = manifest.with_context(|| format!("{}: manifest", path.display()))?;
        let mut shards = Vec::with_capacity(manifest.nodes.len());
        for node in &manifest.nodes {
            let path = dir.join(&node.shard);
            let name = path.display().to_string();
            let bytes = read_file(&path, MAX_MODEL_BYTES)?;
            let found = sha256(&bytes);
            ensure!(
                found == node.sha256,
                "{name}: sha256 {}…, {MANIFEST_FILE} says {}…; split the model again",
                short(&found),
                short(&node.sha256)
            );
            shards.push(ShardFile { path, bytes: bytes.len() as u64 });
        }
        let version = Version::of(&manifest_bytes);
        Ok(Bundle { dir: dir.to_owned(), manifest, manifest_bytes, version, shards })
    }

    /// The bytes of a shard.
    pub(super) fn shard(&self, rank: usize) -> Result<Bytes> {
        let path = &self.shards[rank].path;
        let read = || -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::open(path)?.take(MAX_MODEL_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        Ok(read().with_context(|| format!("{}: read", path.display()))?.into())
    }

    /// Where it lies, as others know it.
    pub(super) fn absolute(&self) -> Result<PathBuf> {
        fs::canonicalize(&self.dir).with_context(|| self.dir.display().to_string())
    }
}

fn short(hash: &str) -> &str {
    hash.get(..8).unwrap_or(hash)
}
