//! `snnc show`: a partition as a picture.
//!
//! Takes the command's arguments; prints or writes text, dot or SVG of a folder's manifest, or of a
//! model that is compiled in memory for it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use snn_compiler::picture;
use snn_schemas::Manifest;
use snn_schemas::manifest::{MANIFEST_FILE, MAX_MANIFEST_BYTES};

use super::args::{Format, Show};
use super::{compile, print, read_file};

pub(super) fn show(args: &Show) -> Result<()> {
    let manifest = manifest(args)?;
    let format = args.format.or_else(|| args.output.as_deref().and_then(by_extension));
    let picture = match format.unwrap_or(Format::Text) {
        Format::Text => picture::page(&manifest),
        Format::Dot => picture::dot(&manifest),
        Format::Svg => picture::svg(&manifest),
    };
    match &args.output {
        None => print(picture),
        Some(path) => {
            fs::write(path, picture).with_context(|| format!("{}: write", path.display()))
        }
    }
}

fn by_extension(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "svg" => Some(Format::Svg),
        "dot" | "gv" => Some(Format::Dot),
        _ => None,
    }
}

fn manifest(args: &Show) -> Result<Manifest> {
    let source = &args.source;
    if source.is_dir() {
        return read_manifest(&source.join(MANIFEST_FILE));
    }
    match source.extension() {
        Some(extension) if extension == "json" => read_manifest(source),
        _ => Ok(compile(source, &args.compile)?.manifest),
    }
}

/// Reads and checks a manifest.
pub(super) fn read_manifest(path: &Path) -> Result<Manifest> {
    let bytes = read_file(path, MAX_MANIFEST_BYTES as u64)?;
    Manifest::from_json(&bytes).with_context(|| format!("{}: manifest", path.display()))
}
