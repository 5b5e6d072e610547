//! What pairs of runs say: their mean, and an interval in which it would be again.

use std::fmt;

use crate::quantile;

/// Samples drawn anew from the pairs.
const RESAMPLES: usize = 10_000;

/// The mean of some numbers, in percent, with its interval of 95 %.
#[derive(Clone, Copy, Debug)]
pub(super) struct Estimate {
    mean: f64,
    median: f64,
    from: f64,
    to: f64,
}

impl Estimate {
    /// Whether the whole interval is below a limit.
    pub(super) fn is_below(&self, limit: f64) -> bool {
        self.to < limit
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Estimate { mean, median, from, to } = self;
        write!(
            f,
            "median {median:+.2} %, mean {mean:+.2} %, 95 % interval {from:+.2} to {to:+.2} %"
        )
    }
}

/// The mean of a tenth less at either end, where a disturbed run would outweigh all others.
fn trimmed_mean(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let cut = numbers.len() / 10;
    let kept = &numbers[cut..numbers.len() - cut];
    kept.iter().sum::<f64>() / kept.len().max(1) as f64
}

/// Draws from the numbers again and again, and says between which means 95 of 100 lie.
pub(super) fn bootstrap(numbers: &[f64]) -> Estimate {
    // A linear congruential generator (Knuth's MMIX): the same interval for the same numbers.
    let mut state = 1_u64;
    let mut draw = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        numbers[((state >> 33) as usize) % numbers.len()]
    };
    let means: Vec<f64> = (0..RESAMPLES)
        .map(|_| trimmed_mean(&mut (0..numbers.len()).map(|_| draw()).collect::<Vec<_>>()))
        .collect();
    Estimate {
        mean: trimmed_mean(&mut numbers.to_vec()),
        median: median(numbers),
        from: quantile(&means, 0.025),
        to: quantile(&means, 0.975),
    }
}

pub(super) fn median(numbers: &[f64]) -> f64 {
    quantile(numbers, 0.5)
}
