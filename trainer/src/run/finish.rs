//! The end of a run: the test images, the exported model and policy, the report. And the report before
//! the end, so that a run can be watched.

use std::time::{Duration, Instant};

use serde_json::json;
use snn_schemas::Policy;

use super::folder::{METRICS, MODEL, POLICY, REPORT, TOOL};
use super::left::Work;
use super::{Judged, Outcome, Run};
use crate::checkpoint::write_whole;
use crate::error::TrainError;
use crate::export::write_onnx;
use crate::judge::judge_all;
use crate::metrics::{self, Line};
use crate::net::Stats;
use crate::progress::{Report, Stage};
use crate::report;
use crate::wire::Wire;

/// How long the report stands, at the least, until it is drawn anew: who watches needs it no sooner.
const DRAW_EVERY: Duration = Duration::from_secs(10);
/// And at the least so many times as long as drawing it took, which grows with the run: a fiftieth of
/// a run's time is enough.
const DRAW_SHARE: u32 = 50;

/// The report while a run goes on.
#[derive(Default)]
pub(super) struct Drawing {
    /// When it was drawn last, and how long that took.
    last: Option<(Instant, Duration)>,
    /// How far the run is, where that is not in it.
    news: Option<Report>,
}

impl Run<'_> {
    /// Tells whoever listens, and draws the report anew where it is time.
    pub(super) fn tell(&mut self, told: Report) -> Result<(), TrainError> {
        self.progress.report(&told);
        self.drawing.news = Some(told);
        let due =
            |(at, took): (Instant, Duration)| at.elapsed() >= DRAW_EVERY.max(took * DRAW_SHARE);
        match self.drawing.last.is_none_or(due) {
            true => self.draw(),
            false => Ok(()),
        }
    }

    /// Draws the report of the run as it stands, if there is news.
    pub(super) fn draw(&mut self) -> Result<(), TrainError> {
        let Some(told) = self.drawing.news.take() else { return Ok(()) };
        let started = Instant::now();
        let lines = metrics::read(&self.folder.join(METRICS))?;
        let page = report::running(self.config, &self.data, &told, &lines)?;
        write_whole(&self.folder.join(REPORT), page.as_bytes())?;
        self.drawing.last = Some((Instant::now(), started.elapsed()));
        Ok(())
    }

    /// The test images, once a candidate.
    pub(super) fn test(&mut self) -> Result<(), TrainError> {
        let candidates = self.candidates.clone();
        for (index, candidate) in candidates.iter().enumerate() {
            let name = &candidate.name;
            if self.state.ledger.test.contains_key(name) {
                continue;
            }
            let started = Instant::now();
            let Some(network) = self.state.tuned.get(name) else { continue };
            let policy = self.policy(candidate);
            let score = judge_all(&network.inference(), &policy, &self.data.test, Stats::Stored)?;
            let score = score.finite(Stage::Test, candidate.tuning(self.config).epochs)?;
            self.state.ledger.test.insert(name.clone(), score);
            self.pace.judged(score.images, started.elapsed());
            let line = Line {
                candidate: Some(name.clone()),
                loss: Some(score.loss),
                test_accuracy: Some(score.accuracy()),
                seconds: started.elapsed().as_secs_f64(),
                ..Line::new(Stage::Test, self.config.search.rounds, index + 1)
            };
            self.note(&line, (index + 1, candidates.len()), Work::default())?;
            self.save()?;
        }
        Ok(())
    }

    /// Model, policy and report.
    pub(super) fn export(&mut self) -> Result<(), TrainError> {
        let Some(first) = self.candidates.first() else { return Ok(()) };
        let Some(network) = self.state.tuned.get(&first.name) else { return Ok(()) };
        let model = write_onnx(network, &self.data, self.config.export.weights)?;
        write_whole(&self.folder.join(MODEL), &model)?;
        let judged = self.judged();
        if self.config.net.groups > 1 {
            let provenance = Some(self.provenance(&judged));
            let policy = Policy { provenance, ..self.policy(first) };
            write_whole(&self.folder.join(POLICY), policy.to_json().as_bytes())?;
        }
        let lines = metrics::read(&self.folder.join(METRICS))?;
        let page = report::page(self.config, &self.data, &judged, &lines)?;
        write_whole(&self.folder.join(REPORT), page.as_bytes())?;
        let (stage, round, left) =
            (Stage::Export, self.config.search.rounds, self.time_left(Work::default()));
        let told = Report { stage, round, done: 1, total: 1, loss: None, accuracy: None, left };
        self.progress.report(&told);
        Ok(())
    }

    /// Where the policy came from, for `best.json`.
    fn provenance(&self, judged: &[Judged]) -> serde_json::Map<String, serde_json::Value> {
        let mut accuracy = serde_json::Map::new();
        for judged in judged {
            accuracy.insert(
                judged.candidate.name.clone(),
                json!({
                    "validation": judged.validation.accuracy(),
                    "test": judged.test.accuracy(),
                    "paper_cost": judged.policy.paper_cost(self.config.net.blocks()),
                    "wire_bytes": judged.wire.bytes,
                    "planned_wire_bytes": judged.wire.planned_bytes,
                }),
            );
        }
        let epochs = self.candidates.first().map(|first| first.tuning(self.config).epochs);
        let entries = [
            ("tool", json!(TOOL)),
            ("dataset", json!(self.data.name)),
            ("dataset_sha256", json!(self.data.sha256)),
            ("seed", json!(self.config.seed)),
            ("net", json!(self.config.net)),
            ("search", json!(self.config.search)),
            ("epochs", json!(self.config.train.epochs)),
            ("finetune_epochs", json!(epochs)),
            ("candidate", json!(self.candidates.first())),
            ("accuracy", serde_json::Value::Object(accuracy)),
        ];
        entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn judged(&self) -> Vec<Judged> {
        let ledger = &self.state.ledger;
        let judge = |candidate: &crate::candidate::Candidate| {
            let validation = *ledger.validation.get(&candidate.name)?;
            let test = *ledger.test.get(&candidate.name)?;
            let policy = self.policy(candidate);
            let wire = Wire::of(&self.config.net, &policy);
            Some(Judged { candidate: candidate.clone(), policy, validation, test, wire })
        };
        self.candidates.iter().filter_map(judge).collect()
    }

    pub(super) fn outcome(mut self) -> Outcome {
        let candidates = self.judged();
        let first = self.candidates.first().map(|candidate| candidate.name.as_str());
        let network = match first.and_then(|first| self.state.tuned.remove(first)) {
            Some(network) => network.inference(),
            None => self.state.network.inference(),
        };
        Outcome {
            candidates,
            network,
            model: self.folder.join(MODEL),
            policy: (self.config.net.groups > 1).then(|| self.folder.join(POLICY)),
            report: self.folder.join(REPORT),
            folder: self.folder,
        }
    }
}
