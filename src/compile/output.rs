//! Writes a split to disk: all of it, or nothing.
//!
//! Takes a split and a folder. Everything is first written to a folder beside it, which then takes
//! the place's name, or whose files take the places of an earlier split's. Files that are no part of
//! a split are never touched, and a folder that holds none is refused unless it is empty. Addresses
//! somebody wrote into an earlier `cluster.json` are kept.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use snn_compiler::{Split, sha256};
use snn_schemas::Manifest;
use snn_schemas::manifest::MANIFEST_FILE;

use super::show::read_manifest;

/// Writes the shards and the manifest of `split` to the folder `dir`.
///
/// # Errors
/// What stands in the way; nothing is written then.
pub fn write(split: &Split, dir: &Path) -> Result<()> {
    let earlier = earlier(dir)?;
    let staging = Staging::beside(dir)?;
    let mut manifest = split.manifest.clone();
    for (node, shard) in manifest.nodes.iter_mut().zip(&split.shards) {
        let bytes = shard.to_bytes();
        node.sha256 = sha256(&bytes);
        staging.write(&node.shard, &bytes)?;
    }
    if let Some(earlier) = &earlier {
        keep_addresses(&mut manifest, earlier);
    }
    staging.write(MANIFEST_FILE, manifest.to_json().as_bytes())?;
    staging.publish(dir, &manifest, earlier.as_ref())
}

/// The manifest of an earlier split in `dir`; `None` where nothing is there yet.
fn earlier(dir: &Path) -> Result<Option<Manifest>> {
    if fs::symlink_metadata(dir).is_err() {
        return Ok(None);
    }
    let mut entries = fs::read_dir(dir).with_context(|| format!("{}: write", dir.display()))?;
    let file = dir.join(MANIFEST_FILE);
    if !file.exists() {
        if entries.next().is_none() {
            return Ok(None);
        }
        let dir = dir.display();
        bail!("{dir}: write: the folder has files but no {MANIFEST_FILE}; choose another with -o");
    }
    // One that cannot be read is replaced: nothing of ours can be learnt from it.
    Ok(read_manifest(&file).ok())
}

fn keep_addresses(manifest: &mut Manifest, earlier: &Manifest) {
    if manifest.nodes.len() == earlier.nodes.len() {
        for (node, old) in manifest.nodes.iter_mut().zip(&earlier.nodes) {
            node.address.clone_from(&old.address);
        }
    }
}

/// A folder beside the final one; removed with whatever is still in it.
struct Staging {
    path: PathBuf,
}

impl Staging {
    fn beside(dir: &Path) -> Result<Staging> {
        let failed = || format!("{}: write", dir.display());
        let absolute = std::path::absolute(dir).with_context(failed)?;
        let name = absolute.file_name().map(|name| name.to_string_lossy().into_owned());
        let parent = absolute.parent().with_context(failed)?;
        fs::create_dir_all(parent).with_context(failed)?;
        let name = format!(".{}.{}", name.unwrap_or_default(), std::process::id());
        let path = parent.join(name);
        fs::create_dir(&path).with_context(failed)?;
        Ok(Staging { path })
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        fs::write(&path, bytes).with_context(|| format!("{}: write", path.display()))
    }

    /// Moves everything to its final place, the manifest last.
    fn publish(self, dir: &Path, manifest: &Manifest, earlier: Option<&Manifest>) -> Result<()> {
        let failed = || format!("{}: write", dir.display());
        if fs::symlink_metadata(dir).is_err() {
            return fs::rename(&self.path, dir).with_context(failed);
        }
        let names: Vec<&str> = manifest.nodes.iter().map(|node| node.shard.as_str()).collect();
        for name in names.iter().chain([&MANIFEST_FILE]) {
            fs::rename(self.path.join(name), dir.join(name)).with_context(failed)?;
        }
        let old = earlier.into_iter().flat_map(|earlier| &earlier.nodes).map(|node| &node.shard);
        for name in old.filter(|name| !names.contains(&name.as_str())) {
            // A shard that somebody removed already is as good as removed.
            let _ = fs::remove_file(dir.join(name));
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a rename nothing is left to remove.
        let _ = fs::remove_dir_all(&self.path);
    }
}
