//! Stages 2 and 3 of a run, and the random sampler's choice, among the policies candidates ask for.
//!
//! Policies with levels and policies without are looked for apart, each by a controller of its own
//! with the same budget, and only where a candidate wants them. Every policy that is judged is written
//! down at once: a run that is stopped while it chooses goes on with the next one.

use std::time::Instant;

use snn_schemas::Policy;

use super::folder::{CHECKPOINTS, SCORES};
use super::left::Work;
use super::{Run, SAVE_EVERY};
use crate::candidate::{self, Candidate, Source};
use crate::config::Config;
use crate::controller::Reinforce;
use crate::error::TrainError;
use crate::metrics::Line;
use crate::progress::{Report, Stage};
use crate::scores::{Scores, shorthand};
use crate::search::{self, Best};
use crate::state::{Choice, Found, Ledger};

/// Whether every candidate has its policy.
pub(super) fn has_chosen(config: &Config, ledger: &Ledger) -> bool {
    let chosen = |candidate: &Candidate| {
        let found = ledger.found(config, candidate.with_levels());
        match candidate.source {
            Source::Searched => found.selections.len() >= config.search.rounds,
            Source::Random => found.random.is_some(),
            Source::Full | Source::Silent => true,
        }
    };
    config.candidates().iter().all(chosen)
}

impl Run<'_> {
    /// Stages 2 and 3 of a round.
    pub(super) fn search(&mut self, round: usize) -> Result<(), TrainError> {
        for levels in self.spaces(Source::Searched) {
            self.teach(round, levels)?;
            self.select(round, levels)?;
        }
        Ok(())
    }

    /// The random sampler's choices.
    pub(super) fn baseline(&mut self) -> Result<(), TrainError> {
        for levels in self.spaces(Source::Random) {
            if self.found(levels).random.is_none() {
                let config = self.config.with_levels(levels);
                let candidates = search::random(&config, &self.data.validation);
                let round = self.config.search.rounds - 1;
                let choice = self.choose(Stage::Baseline, (round, levels), &candidates)?;
                self.found_mut(levels).random = choice;
                self.save()?;
            }
        }
        Ok(())
    }

    /// The policy of a candidate: the silent one while nothing has been chosen.
    pub(super) fn policy(&self, candidate: &Candidate) -> Policy {
        let found = self.found(candidate.with_levels());
        let choice = match candidate.source {
            Source::Searched => found.selections.last(),
            Source::Random => found.random.as_ref(),
            Source::Full | Source::Silent => None,
        };
        let policy = match (choice, candidate.source) {
            (Some(choice), _) => choice.policy.clone(),
            (None, Source::Full) => candidate::full(self.config),
            (None, _) => self.config.silent(),
        };
        Policy { dtype: candidate.dtype.unwrap_or(policy.dtype), ..policy }
    }

    /// The kinds of policies, with levels or without, that candidates of `source` want.
    pub(super) fn spaces(&self, source: Source) -> Vec<bool> {
        let main = self.config.exchange.search_levels;
        let wanted = |levels: &bool| {
            let mut of_source = self.candidates.iter().filter(|other| other.source == source);
            of_source.any(|candidate| candidate.with_levels() == *levels)
        };
        [main, !main].into_iter().filter(wanted).collect()
    }

    /// Whether policies with levels, or without, are those that `exchange` describes.
    fn is_main(&self, levels: bool) -> bool {
        levels == self.config.exchange.search_levels
    }

    pub(super) fn found(&self, levels: bool) -> &Found {
        self.state.ledger.found(self.config, levels)
    }

    fn found_mut(&mut self, levels: bool) -> &mut Found {
        let is_main = self.is_main(levels);
        let ledger = &mut self.state.ledger;
        if is_main { &mut ledger.main } else { &mut ledger.other }
    }

    fn reinforce(&self, levels: bool) -> &Reinforce {
        if self.is_main(levels) { &self.state.main } else { &self.state.other }
    }

    /// Stage 2 of a round.
    fn teach(&mut self, round: usize, levels: bool) -> Result<(), TrainError> {
        let config = self.config.with_levels(levels);
        let steps = config.search.steps;
        let network = self.state.network.inference();
        while self.found(levels).steps < (round + 1) * steps {
            let started = Instant::now();
            let number = self.found(levels).steps;
            let judged = search::judged_in_step(&config, self.data.validation.len());
            let reinforce = self.reinforce(levels).clone();
            let images = &self.data.validation;
            let (learned, step) = search::step(reinforce, &network, images, (&config, number))?;
            match self.is_main(levels) {
                true => self.state.main = learned,
                false => self.state.other = learned,
            }
            self.found_mut(levels).steps += 1;
            self.pace.judged(judged, started.elapsed());
            let line = Line {
                search_levels: Some(levels),
                validation_accuracy: Some(step.accuracy),
                reward: Some(step.reward),
                entropy: Some(step.entropy),
                sampled: Some(step.policies.iter().map(shorthand).collect()),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Search, round + 1, number + 1)
            };
            self.note(&line, (number + 1 - round * steps, steps), Work::default())?;
            if self.saved.elapsed() > SAVE_EVERY || number + 1 == (round + 1) * steps {
                self.save()?;
            }
        }
        Ok(())
    }

    /// Stage 3 of a round. What an earlier round chose competes on the weights of now.
    fn select(&mut self, round: usize, levels: bool) -> Result<(), TrainError> {
        if self.found(levels).selections.len() > round {
            return Ok(());
        }
        let config = self.config.with_levels(levels);
        let mut candidates = search::sample(self.reinforce(levels), &config, round)?;
        let before = self.found(levels).selections.last();
        candidates.extend(before.map(|choice| choice.policy.clone()));
        let choice = self.choose(Stage::Select, (round, levels), &candidates)?;
        self.found_mut(levels).selections.extend(choice);
        self.save()
    }

    /// The best of `candidates` on the shared weights.
    fn choose(
        &mut self,
        stage: Stage,
        (round, levels): (usize, bool),
        candidates: &[Policy],
    ) -> Result<Option<Choice>, TrainError> {
        let started = Instant::now();
        let network = self.state.network.inference();
        let (epochs, total) = (self.state.ledger.epochs, candidates.len());
        let images = self.config.judged_images(self.data.validation.len());
        let path = self.folder.join(CHECKPOINTS).join(SCORES);
        let mut scores = Scores::open(&path, epochs, images)?;
        let mut best = Best::new(self.config);
        let mut most = 0.0_f64;
        for (policy, done) in candidates.iter().zip(1..) {
            let score = scores.of(policy, || {
                let judging = Instant::now();
                let (config, validation) = (self.config, &self.data.validation);
                let score = search::judge_sample(config, &network, policy, validation)?;
                self.pace.judged(images, judging.elapsed());
                Ok(score)
            })?;
            best.offer(policy, score)?;
            most = most.max(score.accuracy());
            let left = self.time_left(Work { fitted: 0, judged: done * images });
            let (round, loss, accuracy) = (round + 1, None, Some(most));
            self.tell(Report { stage, round, done, total, loss, accuracy, left })?;
        }
        let choice = best.choice();
        let score = choice.as_ref().map(|choice| choice.validation);
        let score = score.map(|score| score.finite(stage, epochs)).transpose()?;
        let line = Line {
            search_levels: Some(levels),
            loss: score.map(|score| score.loss),
            validation_accuracy: score.map(|score| score.accuracy()),
            seconds: started.elapsed().as_secs_f64(),
            ..Line::new(stage, round + 1, total)
        };
        self.metrics.write(&line)?;
        Ok(choice)
    }
}
