//! `--trace`: what nodes have recorded, written as a file that Perfetto and Chrome open.
//!
//! Takes lanes on one time axis; writes them, and says which share of the transfers' time was hidden
//! behind computing. [`record`] has a running cluster record them while something is done.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use snn_runtime::client::Client;
use snn_runtime::watch::Lane;
use snn_runtime::watch::trace::{Aligned, document, hidden};

/// Has the nodes of a cluster record while `work` is done; gives what it gives, and their lanes, and says
/// on standard error whose are left out.
pub(super) async fn record<T>(
    client: &Client,
    work: impl Future<Output = Result<T>>,
) -> Result<(T, Vec<Aligned>)> {
    let recording = client.record().await.context("trace")?;
    let done = recording.during(work).await;
    let done = match done {
        Ok(done) => done,
        Err(error) => {
            recording.give_up().await;
            return Err(error);
        }
    };
    let lanes = recording.collect().await.context("trace")?;
    for rank in left_out(&lanes, client.info().nodes) {
        let why = "it was not there from the first request to the last";
        super::progress(format_args!("node {rank} is left out of the trace: {why}"));
    }
    Ok((done, lanes))
}

/// The ranks of a cluster that have no lane.
fn left_out(lanes: &[Aligned], nodes: usize) -> impl Iterator<Item = usize> {
    (0..nodes).filter(move |&rank| lanes.iter().all(|aligned| aligned.lane.rank != rank))
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_without_a_lane_are_left_out() {
        let lane = |rank| Lane { rank, ..Lane::default() };
        let lanes = by_wall_clock(vec![lane(0), lane(2)]);
        assert_eq!(left_out(&lanes, 4).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(left_out(&lanes[..0], 1).collect::<Vec<_>>(), [0]);
    }
}
