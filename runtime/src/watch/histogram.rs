//! A histogram of latencies with fixed bounds.
//!
//! Takes durations, gives counts that any number of histograms can be added up by: the bounds are
//! the same everywhere and for ever, so that a monitor may compare nodes and days.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Upper bounds of the buckets, in ms: about three a factor of two where answers of small networks
/// lie, and up to the longest deadlines. A last bucket takes everything above.
pub const BOUNDS_MS: [f64; 20] = [
    0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 100.0, 200.0,
    500.0, 1_000.0, 2_000.0, 5_000.0,
];

/// How many durations fell into each bucket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Durations a bucket, as [`BOUNDS_MS`] bounds them and one more above; empty before the first.
    pub counts: Vec<u64>,
    /// Sum of the durations, in ms.
    pub sum_ms: f64,
}

impl Histogram {
    /// Counts a duration.
    pub fn add(&mut self, duration: Duration) {
        let ms = duration.as_secs_f64() * 1e3;
        self.counts.resize(BOUNDS_MS.len() + 1, 0);
        let bucket = BOUNDS_MS.partition_point(|&bound| bound < ms);
        self.counts[bucket] += 1;
        self.sum_ms += ms;
    }

    /// Counts what another histogram has counted.
    pub fn merge(&mut self, other: &Histogram) {
        self.counts.resize(self.counts.len().max(other.counts.len()), 0);
        for (own, others) in self.counts.iter_mut().zip(&other.counts) {
            *own += others;
        }
        self.sum_ms += other.sum_ms;
    }

    /// Durations counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_falls_into_the_first_bucket_that_holds_it() {
        let mut histogram = Histogram::default();
        for us in [0, 500, 501, 6_000_000] {
            histogram.add(Duration::from_micros(us));
        }
        assert_eq!(histogram.counts[0], 2);
        assert_eq!(histogram.counts[1], 1);
        assert_eq!(histogram.counts[BOUNDS_MS.len()], 1);
        assert_eq!(histogram.count(), 4);
        assert!((histogram.sum_ms - 6001.001).abs() < 1e-9);
    }
}
