//! `--trace`: what nodes have recorded, written as a file that Perfetto and Chrome open.
//!
//! Takes lanes on one time axis; writes them, and says which share of the transfers' time was hidden
//! behind computing.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use snn_runtime::watch::Lane;
use snn_runtime::watch::trace::{Aligned, document, hidden};

/// Writes lanes, and says on standard error what they show.
pub(super) fn write(lanes: &[Aligned], path: &Path) -> Result<()> {
    let write = || -> Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut file, &document(lanes))?;
        Ok(file.flush()?)
    };
    write().context("trace").with_context(|| path.display().to_string())?;
    let hidden = hidden(lanes);
    let uncertainty = lanes.iter().map(|lane| lane.uncertainty).max().unwrap_or(0) as f64 / 1e6;
    let what = match hidden.share() {
        Some(share) => format!(
            "{:.1} % of {:.3} ms in {} transfers was hidden behind computing (clocks within {uncertainty:.3} ms)",
            share * 100.0,
            hidden.total_ms,
            hidden.transfers
        ),
        None => "both ends of no transfer were recorded".to_owned(),
    };
    super::progress(format_args!("{}: {what}", path.display()));
    let dropped: u64 = lanes.iter().map(|lane| lane.lane.dropped).sum();
    if dropped > 0 {
        super::progress(format_args!("{}: {dropped} older spans were dropped", path.display()));
    }
    Ok(())
}

/// Lanes of one device, on the time axis of its own wall clock.
pub(super) fn by_wall_clock(lanes: Vec<Lane>) -> Vec<Aligned> {
    let aligned = |lane: Lane| {
        let offset = i64::try_from(lane.unix_ns).unwrap_or(0);
        Aligned { lane, offset, uncertainty: 0 }
    };
    lanes.into_iter().map(aligned).collect()
}
