//! How long a run will take yet.
//!
//! Work is counted in images: those that weights are fitted to, each under one policy, and those that
//! are only judged. What is left of either follows from the settings and the ledger; how long an image
//! takes is measured as the run goes, in this sitting, since the next may be on another device. The
//! controller's own steps count with the images they judge; what export takes is left out.

use std::ops::AddAssign;
use std::time::Duration;

use super::Run;
use crate::candidate::Source;
use crate::fit;
use crate::progress::Stage;
use crate::search;

/// Fitting takes so many times as long as judging, until both are measured: a pass forward, and one
/// backward of twice the products.
const FIT: f64 = 3.0;
/// Seconds of work after which the first measurements hardly count: a device's first start is slow.
const MEMORY: f64 = 60.0;

/// Images to work on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Work {
    /// Images that weights are fitted to, once a policy.
    pub(super) fitted: usize,
    /// Images that are judged.
    pub(super) judged: usize,
}

impl AddAssign for Work {
    fn add_assign(&mut self, more: Work) {
        self.fitted += more.fitted;
        self.judged += more.judged;
    }
}

/// Seconds an image takes, as far as they have been measured.
#[derive(Default)]
pub(super) struct Pace {
    fitted: Option<f64>,
    judged: Option<f64>,
}

impl Pace {
    /// Takes into account that fitting so many images took so long.
    pub(super) fn fitted(&mut self, images: usize, took: Duration) {
        follow(&mut self.fitted, images, took);
    }

    /// Takes into account that judging so many images took so long.
    pub(super) fn judged(&mut self, images: usize, took: Duration) {
        follow(&mut self.judged, images, took);
    }

    /// How long `work` will take; nothing while that cannot be told.
    fn time(&self, work: Work) -> Option<Duration> {
        if work == Work::default() {
            return Some(Duration::ZERO);
        }
        let fitted = self.fitted.or(self.judged.map(|seconds| seconds * FIT))?;
        let judged = self.judged.or(self.fitted.map(|seconds| seconds / FIT))?;
        let seconds = work.fitted as f64 * fitted + work.judged as f64 * judged;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// Moves a pace towards a measurement, the farther the longer that took.
fn follow(pace: &mut Option<f64>, images: usize, took: Duration) {
    let took = took.as_secs_f64();
    let measured = took / images.max(1) as f64;
    let before = pace.unwrap_or(measured);
    *pace = Some(before + (measured - before) * (1.0 - (-took / MEMORY).exp()));
}

impl Run<'_> {
    /// Time left of the stages asked for, when `done` of what the ledger calls undone is done.
    pub(super) fn time_left(&self, done: Work) -> Option<Duration> {
        let left = self.work_left();
        self.pace.time(Work {
            fitted: left.fitted.saturating_sub(done.fitted),
            judged: left.judged.saturating_sub(done.judged),
        })
    }

    /// An epoch under so many policies a batch: its images, and the validation images after it.
    pub(super) fn epoch_work(&self, policies: usize) -> Work {
        let train = &self.config.train;
        let fitted = policies * fit::batches(&self.data.train, train) * train.batch;
        Work { fitted, judged: self.data.validation.len() }
    }

    /// What the ledger says is undone in the stages asked for.
    fn work_left(&self) -> Work {
        let mut work = Work::default();
        for stage in self.stages {
            work += match stage {
                Stage::Train => self.training_left(),
                Stage::Search => self.searching_left(),
                Stage::Finetune => self.tuning_left(),
                Stage::Export => self.testing_left(),
                // These are part of the others.
                Stage::Select | Stage::Baseline | Stage::Test => Work::default(),
            };
        }
        work
    }

    fn training_left(&self) -> Work {
        let train = &self.config.train;
        let policies = if self.config.net.groups == 1 { 1 } else { train.policies_per_batch };
        let epochs = train.epochs.saturating_sub(self.state.ledger.epochs);
        times(epochs, self.epoch_work(policies))
    }

    fn searching_left(&self) -> Work {
        let (search, images) = (&self.config.search, self.data.validation.len());
        let (step, sample) =
            (search::judged_in_step(self.config, images), self.config.judged_images(images));
        let mut judged = 0;
        for levels in self.spaces(Source::Searched) {
            let found = self.found(levels);
            judged += step * (search.rounds * search.steps).saturating_sub(found.steps);
            let rounds = search.rounds.saturating_sub(found.selections.len());
            judged += sample * search.samples * rounds;
        }
        for levels in self.spaces(Source::Random) {
            if self.found(levels).random.is_none() {
                judged += sample * search::random_count(self.config, images);
            }
        }
        Work { fitted: 0, judged }
    }

    fn tuning_left(&self) -> Work {
        let mut work = Work::default();
        // Two ways to estimate the statistics, each judged.
        let calibration = self.config.train.calibration.min(self.data.train.len());
        let judged = 2 * (calibration + self.data.validation.len());
        for candidate in self.candidates.iter().filter(|candidate| !self.is_tuned(candidate)) {
            let done = self.state.ledger.tuned.get(&candidate.name).copied().unwrap_or(0);
            let epochs = candidate.tuning(self.config).epochs.saturating_sub(done);
            work += times(epochs, self.epoch_work(1));
            work += Work { fitted: 0, judged };
        }
        work
    }

    fn testing_left(&self) -> Work {
        let test = &self.state.ledger.test;
        let untested = self.candidates.iter().filter(|other| !test.contains_key(&other.name));
        Work { fitted: 0, judged: untested.count() * self.data.test.len() }
    }
}

fn times(count: usize, work: Work) -> Work {
    Work { fitted: count * work.fitted, judged: count * work.judged }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_measured_yet_is_told_by_what_is() {
        let second = Duration::from_secs(1);
        let (fit, judge) = (Work { fitted: 300, judged: 0 }, Work { fitted: 0, judged: 100 });
        let mut pace = Pace::default();
        assert_eq!((pace.time(Work::default()), pace.time(fit)), (Some(Duration::ZERO), None));
        pace.judged(100, second);
        assert_eq!((pace.time(judge), pace.time(fit)), (Some(second), Some(9 * second)));
        pace.fitted(300, second);
        assert_eq!((pace.time(judge), pace.time(fit)), (Some(second), Some(second)));
    }

    #[test]
    fn a_slow_start_is_forgotten() {
        let mut pace = Pace::default();
        let work = Work { fitted: 100, judged: 0 };
        pace.fitted(100, Duration::from_secs(150));
        (0..10).for_each(|_| pace.fitted(100, Duration::from_secs(30)));
        let seconds = pace.time(work).unwrap().as_secs_f64();
        assert!((30.0..31.0).contains(&seconds), "{seconds}");
        // A single short step that was held up tells little.
        pace.fitted(1, Duration::from_secs(1));
        assert!(pace.time(work).unwrap().as_secs_f64() < 33.0);
    }
}
