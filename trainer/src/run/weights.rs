//! The stages of a run that change the network's weights: stage 1, and fine-tuning.
//!
//! After each epoch the validation images are judged, with each batch's own statistics: in stage 1
//! under the policy that the exported candidate has by then (silent while none is chosen), in
//! fine-tuning under the candidate's own. Of the epochs of stage 1 and of the exported candidate the
//! most accurate is kept as `best.ckpt`.

use std::time::Instant;

use burn::module::Module;
use snn_schemas::Policy;

use super::Run;
use super::folder::{BEST, LAST};
use crate::candidate::{self, Candidate, Source};
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
    /// Under which the validation images are judged after it.
    judged: &'a Policy,
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
            let exported = self.candidates.first().map(|first| self.policy(first));
            let pass = Pass {
                stage: Stage::Train,
                round,
                number,
                candidate: None,
                lr: train.decay.rate(train.lr, number, train.epochs),
                policies: &self.sampled(number)?,
                judged: &exported.unwrap_or_else(|| self.config.silent()),
                progress: (number - epochs.start, epochs.len()),
            };
            let (network, score) = self.epoch(self.state.network.clone(), pass)?;
            self.state.network = network;
            self.state.ledger.epochs += 1;
            self.save_epoch(score)?;
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
        let settings = candidate.tuning(self.config);
        let epochs = |some: &[Candidate]| -> usize {
            some.iter().map(|candidate| candidate.tuning(self.config).epochs).sum()
        };
        let (before, total) = (epochs(&self.candidates[..place]), epochs(&self.candidates));
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
                judged: &policy,
                progress: (before + done, total),
            };
            let (tuned, score) = self.epoch(network, pass)?;
            network = tuned;
            done += 1;
            self.state.tuned.insert(name.clone(), network.clone());
            self.state.ledger.tuned.insert(name.clone(), done);
            match place {
                0 => self.save_epoch(score)?,
                _ => self.save()?,
            }
        }
        self.judge_tuned(candidate, &policy, &network)
    }

    /// Saves where the run stands after an epoch, and also as the best if none before has a better
    /// `score`.
    fn save_epoch(&mut self, score: Score) -> Result<(), TrainError> {
        let worth = |score: Score| (score.accuracy(), -score.loss); // of equal ones the smaller loss
        match self.state.ledger.best.is_none_or(|best| worth(score) > worth(best)) {
            true => {
                self.state.ledger.best = Some(score);
                // The last one last: a kill in between costs an epoch, and leaves the best to be found again.
                self.save_as(&[BEST, LAST])
            }
            false => self.save(),
        }
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
        let (name, done) = (candidate.name.clone(), candidate.tuning(self.config).epochs);
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

    /// Makes one pass over the training images, judges what came of it, and tells of both.
    fn epoch(&mut self, network: Network, pass: Pass) -> Result<(Network, Score), TrainError> {
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
        let took = started.elapsed();
        let images = &self.data.validation;
        let score = judge_all(&network.inference(), pass.judged, images, Stats::Batch)?;
        let work = self.epoch_work(pass.policies.first().map_or(1, Vec::len));
        self.pace.fitted(work.fitted, took);
        self.pace.judged(work.judged, started.elapsed() - took);
        let line = Line {
            candidate: pass.candidate.map(|candidate| candidate.name.clone()),
            lr: Some(pass.lr),
            loss: Some(loss),
            train_accuracy: Some(accuracy),
            validation_accuracy: Some(score.accuracy()),
            seconds: took.as_secs_f64(),
            ..Line::new(pass.stage, pass.round + 1, pass.number + 1)
        };
        let (before, total) = pass.progress;
        self.note(&line, (before + 1, total), work)?;
        let epoch = pass.number + 1;
        match loss.is_finite() {
            true => Ok((network, score.finite(pass.stage, epoch)?)),
            false => Err(TrainError::Diverged { stage: pass.stage, epoch, loss }),
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
    use std::path::Path;

    use burn::module::{ModuleMapper, Param};
    use burn::tensor::Tensor;

    use super::super::folder::{CHECKPOINTS, METRICS};
    use super::super::{Task, WHOLE};
    use super::*;
    use crate::config::Config;
    use crate::progress::Report;
    use crate::state::Ledger;
    use crate::{checkpoint, metrics};

    fn tiny() -> Config {
        let mut config = Config::digits();
        (config.net.trunk_width, config.net.path_width, config.net.stem_channels) = (4, 2, 4);
        (config.train.calibration, config.search.steps, config.search.samples) = (64, 1, 2);
        config
    }

    fn task<'a>(config: &'a Config, out: &'a Path) -> Task<'a> {
        Task { stages: WHOLE, config, data: None, out, resume: false }
    }

    /// What a checkpoint says has been done.
    fn ledger(out: &Path, name: &str) -> Ledger {
        let sections = checkpoint::load(&out.join(CHECKPOINTS).join(name)).unwrap().unwrap();
        serde_json::from_slice(&sections["ledger"]).unwrap()
    }

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
        let config = tiny();
        let mut nobody = |_: &Report| {};
        let mut run = Run::open(task(&config, folder.path()), &mut nobody).unwrap();
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

    #[test]
    fn the_best_checkpoint_is_of_the_most_accurate_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = tiny();
        (config.train.epochs, config.search.rounds, config.finetune.epochs) = (6, 1, 3);
        let mut nobody = ();
        let mut run = Run::open(task(&config, folder.path()), &mut nobody).unwrap();
        let images = run.data.validation.len();
        // Images told right after each epoch.
        let right = |stage: Stage, candidate: Option<&str>| -> Vec<usize> {
            let lines = metrics::read(&folder.path().join(METRICS)).unwrap();
            let of = |line: &&Line| line.stage == stage && line.candidate.as_deref() == candidate;
            let accuracies = lines.iter().filter(of).map(|line| line.validation_accuracy.unwrap());
            accuracies.map(|accuracy| (accuracy * images as f64).round() as usize).collect()
        };
        run.train(0).unwrap();
        let trained = right(Stage::Train, None);
        assert_eq!((trained.len(), ledger(folder.path(), LAST).epochs), (6, 6));
        let best = ledger(folder.path(), BEST);
        let score = best.best.unwrap();
        assert_eq!((Some(&score.correct), score.images), (trained.iter().max(), images));
        assert_eq!(trained[best.epochs - 1], score.correct);
        assert_eq!(ledger(folder.path(), LAST).best, best.best);

        run.search(0).unwrap();
        run.baseline().unwrap();
        run.finetune().unwrap();
        let tuned = right(Stage::Finetune, Some("searched"));
        assert_eq!(tuned.len(), 3);
        let best = ledger(folder.path(), BEST);
        let score = best.best.unwrap();
        assert_eq!(Some(&score.correct), trained.iter().chain(&tuned).max());
        let of_best = match best.tuned.get("searched") {
            Some(epochs) => tuned[epochs - 1],
            None => trained[best.epochs - 1],
        };
        assert_eq!(of_best, score.correct);
        // What is not exported does not count.
        assert!(!best.tuned.contains_key("silent"), "{:?}", best.tuned);
    }

    #[test]
    fn an_epoch_that_is_no_better_leaves_the_best_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let config = tiny();
        let mut nobody = ();
        let mut run = Run::open(task(&config, folder.path()), &mut nobody).unwrap();
        let mut kept = Vec::new();
        for (correct, loss) in [(4, 1.0), (3, 0.1), (4, 1.5), (4, 0.5), (5, 9.0)] {
            run.state.ledger.epochs += 1;
            run.save_epoch(Score { correct, images: 10, loss }).unwrap();
            kept.push(ledger(folder.path(), BEST).epochs);
        }
        assert_eq!(kept, [1, 1, 1, 4, 5]);
        assert_eq!(ledger(folder.path(), LAST).epochs, 5);
    }
}
