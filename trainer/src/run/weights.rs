//! The stages of a run that change the network's weights: stage 1, and fine-tuning.

use std::time::Instant;

use burn::module::Module;
use snn_schemas::Policy;

use super::Run;
use super::folder::{BEST, CHECKPOINTS};
use crate::candidate::{self, Candidate, Source};
use crate::checkpoint;
use crate::config::Weights;
use crate::controller::{policies, random_policies};
use crate::error::TrainError;
use crate::export::halved;
use crate::fit::{self, Epoch};
use crate::judge::{Score, calibrate, judge_all};
use crate::metrics::Line;
use crate::net::{Network, Stats};
use crate::progress::Stage;
use crate::seed::rng;

/// One epoch of a stage.
struct Pass<'a> {
    stage: Stage,
    round: usize,
    /// Number of the epoch, from 0: of the whole stage 1, or of a candidate's fine-tuning.
    number: usize,
    candidate: Option<&'a Candidate>,
    lr: f64,
    /// `policies[batch]` are the batch's M.
    policies: &'a [Vec<Policy>],
    /// Epochs done before it and epochs to do, as progress counts them.
    progress: (usize, usize),
}

impl Run<'_> {
    /// Stage 1 of a round.
    pub(super) fn train(&mut self, round: usize) -> Result<(), TrainError> {
        let train = &self.config.train;
        let epochs = self.config.epochs_of(round);
        while self.state.ledger.epochs < epochs.end {
            let number = self.state.ledger.epochs;
            if number == epochs.start {
                self.state.sgd = fit::sgd(train);
            }
            let pass = Pass {
                stage: Stage::Train,
                round,
                number,
                candidate: None,
                lr: train.decay.rate(train.lr, number, train.epochs),
                policies: &self.sampled(number)?,
                progress: (number - epochs.start, epochs.len()),
            };
            self.state.network = self.epoch(self.state.network.clone(), pass)?;
            self.state.ledger.epochs += 1;
            self.save()?;
        }
        Ok(())
    }

    /// The policies of an epoch, M a batch, sampled by the controller as it is.
    fn sampled(&self, epoch: usize) -> Result<Vec<Vec<Policy>>, TrainError> {
        let batches = fit::batches(&self.data.train, &self.config.train);
        let each = self.config.train.policies_per_batch;
        if self.config.net.groups == 1 {
            return Ok(vec![vec![self.config.silent()]; batches]);
        }
        let mut rng = rng(self.config.seed, "policies", epoch);
        let random = |rng| random_policies(self.config, batches * each, rng);
        let all = match (self.config.train.under, self.state.ledger.main.steps) {
            (Source::Full, _) => vec![candidate::full(self.config); batches * each],
            (Source::Silent, _) => vec![self.config.silent(); batches * each],
            // A controller that has learned nothing is the random sampler, only slower.
            (Source::Random, _) | (Source::Searched, 0) => random(&mut rng),
            (Source::Searched, _) => {
                let controller = self.state.main.controller.valid();
                policies(self.config, controller.sample(batches * each, &mut rng)?.steps)
            }
        };
        Ok(all.chunks(each).map(<[Policy]>::to_vec).collect())
    }

    /// The last stage, for each candidate from the same weights.
    pub(super) fn finetune(&mut self) -> Result<(), TrainError> {
        for (place, candidate) in self.candidates.clone().iter().enumerate() {
            if !self.is_tuned(candidate) {
                self.finetune_candidate(place, candidate)?;
            }
        }
        Ok(())
    }

    /// Whether a candidate's fine-tuning is done and judged.
    pub(super) fn is_tuned(&self, candidate: &Candidate) -> bool {
        self.state.ledger.validation.contains_key(&candidate.name)
    }

    fn finetune_candidate(
        &mut self,
        place: usize,
        candidate: &Candidate,
    ) -> Result<(), TrainError> {
        let name = &candidate.name;
        let policy = self.policy(candidate);
        let settings = &self.config.finetune;
        let batches = fit::batches(&self.data.train, &self.config.train);
        let under = vec![vec![policy.clone()]; batches];
        let mut network = match self.state.tuned.remove(name) {
            Some(network) => network,
            None => self.state.network.copy(),
        };
        let mut done = self.state.ledger.tuned.get(name).copied().unwrap_or(0);
        while done < settings.epochs {
            if done == 0 {
                self.state.sgd = fit::sgd(&self.config.train);
            }
            let pass = Pass {
                stage: Stage::Finetune,
                round: self.config.search.rounds - 1,
                number: done,
                candidate: Some(candidate),
                lr: settings.decay.rate(settings.lr, done, settings.epochs),
                policies: &under,
                progress: (place * settings.epochs + done, settings.epochs * self.candidates.len()),
            };
            network = self.epoch(network, pass)?;
            done += 1;
            self.state.tuned.insert(name.clone(), network.clone());
            self.state.ledger.tuned.insert(name.clone(), done);
            self.save()?;
        }
        self.judge_tuned(candidate, &policy, &network)?;
        if place == 0 {
            let sections = self.state.sections()?;
            checkpoint::save(&self.folder.join(CHECKPOINTS).join(BEST), &sections)?;
        }
        Ok(())
    }

    /// Statistics of its own for a candidate's weights, and the validation images under them.
    ///
    /// Weights are fitted to images as training changes them. What the statistics of unchanged images do
    /// to a network differs: moved photographs have black borders, and a network trained on them lost
    /// five points under statistics without; turned and scaled digits are blurred, and one trained on
    /// them gained two. The validation images decide.
    fn judge_tuned(
        &mut self,
        candidate: &Candidate,
        policy: &Policy,
        network: &Network,
    ) -> Result<(), TrainError> {
        let estimate = |change| -> Result<(Network, Score), TrainError> {
            let judged = network.inference();
            calibrate(&judged, policy, &self.data.train, &self.config.train, change);
            // Rounded before it is judged: what is exported then answers as what was judged.
            let judged = match self.config.export.weights {
                Weights::F32 => judged.folded(),
                Weights::F16 => halved(judged.folded()),
            };
            let score = judge_all(&judged, policy, &self.data.validation, Stats::Stored)?;
            Ok((judged, score))
        };
        let unchanged = estimate(None)?;
        let changed = estimate(Some(rng(self.config.seed, "calibration", 0)))?;
        let better = changed.1.loss < unchanged.1.loss || unchanged.1.loss.is_nan();
        let (judged, score) = if better { changed } else { unchanged };
        let (name, done) = (candidate.name.clone(), self.config.finetune.epochs);
        let score = score.finite(Stage::Finetune, done)?;
        self.state.tuned.insert(name.clone(), judged.copy());
        self.state.ledger.tuned.insert(name.clone(), done);
        self.state.ledger.validation.insert(name.clone(), score);
        let line = Line {
            candidate: Some(name),
            loss: Some(score.loss),
            validation_accuracy: Some(score.accuracy()),
            ..Line::new(Stage::Select, self.config.search.rounds, done)
        };
        self.metrics.write(&line)?;
        self.save()
    }

    /// Makes one pass over the training images and tells of it.
    fn epoch(&mut self, network: Network, pass: Pass) -> Result<Network, TrainError> {
        let started = Instant::now();
        let epoch = Epoch {
            images: &self.data.train,
            settings: &self.config.train,
            lr: pass.lr,
            policies: pass.policies,
            // All candidates see the same images in the same order.
            rng: rng(self.config.seed, pass.purpose(), pass.number),
        };
        let (network, loss, accuracy) = fit::epoch(network, &mut self.state.sgd, epoch)?;
        let line = Line {
            candidate: pass.candidate.map(|candidate| candidate.name.clone()),
            lr: Some(pass.lr),
            loss: Some(loss),
            train_accuracy: Some(accuracy),
            seconds: started.elapsed().as_secs_f64(),
            ..Line::new(pass.stage, pass.round + 1, pass.number + 1)
        };
        let (before, total) = pass.progress;
        self.note(&line, before + 1, total)?;
        match loss.is_finite() {
            true => Ok(network),
            false => Err(TrainError::Diverged { stage: pass.stage, epoch: pass.number + 1, loss }),
        }
    }
}

impl Pass<'_> {
    /// What its random numbers are for.
    fn purpose(&self) -> &'static str {
        match self.candidate {
            None => "epoch",
            Some(_) => "finetune",
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::module::{ModuleMapper, Param};
    use burn::tensor::Tensor;

    use super::super::folder::LAST;
    use super::super::{Task, WHOLE};
    use super::*;
    use crate::config::Config;
    use crate::progress::Report;

    /// Makes every weight no number.
    struct Spoil;

    impl ModuleMapper for Spoil {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|weights| weights * f32::NAN)
        }
    }

    #[test]
    fn a_score_that_is_no_number_ends_the_run_before_it_is_saved() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::digits();
        (config.net.trunk_width, config.net.path_width, config.net.stem_channels) = (4, 2, 4);
        (config.train.calibration, config.search.steps, config.search.samples) = (64, 1, 2);
        let mut nobody = |_: &Report| {};
        let task =
            Task { stages: WHOLE, config: &config, data: None, out: folder.path(), resume: false };
        let mut run = Run::open(task, &mut nobody).unwrap();
        let spoiled = run.state.network.inference().map(&mut Spoil);
        run.state.network = spoiled.copy();
        for candidate in run.candidates.clone() {
            run.state.tuned.insert(candidate.name.clone(), spoiled.copy());
            run.state.ledger.tuned.insert(candidate.name, config.finetune.epochs);
        }
        let stages = [run.baseline(), run.finetune()].map(|ended| match ended {
            Err(TrainError::Diverged { stage, loss, .. }) if loss.is_nan() => Some(stage),
            _ => None,
        });
        assert_eq!(stages, [Some(Stage::Baseline), Some(Stage::Finetune)]);
        // Judging takes the weights in hand.
        run.state.tuned.insert("searched".to_owned(), spoiled);
        let ended = run.test();
        assert!(matches!(ended, Err(TrainError::Diverged { stage: Stage::Test, .. })), "{ended:?}");
        let ledger = &run.state.ledger;
        assert!(ledger.main.random.is_none() && ledger.validation.is_empty());
        assert!(ledger.test.is_empty() && !folder.path().join(CHECKPOINTS).join(LAST).exists());
    }
}
