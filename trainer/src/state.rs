//! Where a run stands, and how that survives a stop.
//!
//! A [`State`] holds everything later steps depend on: weights, optimisers, controller, results.
//! [`State::sections`] and [`State::restore`] turn it into a checkpoint's parts and back without
//! loss, so that a run that is resumed computes what it would have computed anyway. What a step
//! draws at random depends on the seed and on its number, both in the [`Ledger`] or the settings.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::store::ModuleRecord;
use burn::tensor::{Bytes, Device};
use serde::{Deserialize, Serialize};
use snn_schemas::Policy;

use crate::checkpoint::Sections;
use crate::config::Config;
use crate::controller::{Controller, Reinforce};
use crate::error::TrainError;
use crate::fit;
use crate::judge::Score;
use crate::net::Network;

/// A policy that is carried to the end, and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Candidate {
    /// The best the controller sampled.
    Searched,
    /// The best of as many that were drawn with equal probability.
    Random,
    /// No exchange at all.
    Silent,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Candidate::Searched => "searched",
            Candidate::Random => "random",
            Candidate::Silent => "silent",
        })
    }
}

/// A policy, and how good the shared weights were under it on the validation images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Choice {
    pub(crate) policy: Policy,
    pub(crate) validation: Score,
}

/// What has been done so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    /// Epochs of stage 1, over all rounds.
    pub(crate) epochs: usize,
    /// Steps of the controller, over all rounds.
    pub(crate) steps: usize,
    /// The best policy of each round's stage 3.
    pub(crate) selections: Vec<Choice>,
    /// The best policy of the random sampler.
    pub(crate) random: Option<Choice>,
    /// Fine-tuning epochs of each candidate.
    pub(crate) tuned: BTreeMap<Candidate, usize>,
    /// Fine-tuned candidates on the validation images.
    pub(crate) validation: BTreeMap<Candidate, Score>,
    /// Fine-tuned candidates on the test images.
    pub(crate) test: BTreeMap<Candidate, Score>,
    /// Lines of `metrics.jsonl` that belong to all this.
    pub(crate) lines: usize,
}

/// Where a run stands.
pub(crate) struct State {
    /// The weights all policies share.
    pub(crate) network: Network,
    /// Optimiser of the weights in work: the shared ones, then each candidate's.
    pub(crate) sgd: ModuleOptimizer,
    /// The controller and its optimiser.
    pub(crate) reinforce: Reinforce,
    /// Each candidate's own weights, from its first fine-tuning epoch on.
    pub(crate) tuned: BTreeMap<Candidate, Network>,
    /// What has been done.
    pub(crate) ledger: Ledger,
}

impl State {
    /// Before the first step. `device` must have autodiff.
    pub(crate) fn fresh(config: &Config, device: &Device) -> State {
        State {
            network: Network::new(&config.net, config.seed, device),
            sgd: fit::sgd(&config.train),
            reinforce: Reinforce::new(Controller::new(config, device), &config.search),
            tuned: BTreeMap::new(),
            ledger: Ledger::default(),
        }
    }

    /// Everything, as a checkpoint's parts.
    pub(crate) fn sections(&self) -> Result<Sections, TrainError> {
        let mut sections = Sections::new();
        let (baseline, adam) = self.reinforce.memory()?;
        sections.insert("ledger".to_owned(), serde_json::to_vec(&self.ledger)?);
        sections.insert("baseline".to_owned(), serde_json::to_vec(&baseline)?);
        sections.insert("adam".to_owned(), adam);
        sections.insert("controller".to_owned(), record(&self.reinforce.controller)?);
        sections.insert("network".to_owned(), record(&self.network)?);
        sections.insert("sgd".to_owned(), self.sgd.into_bytes().map_err(tensor)?.to_vec());
        for (candidate, network) in &self.tuned {
            sections.insert(candidate.to_string(), record(network)?);
        }
        Ok(sections)
    }

    /// The state that gave these parts; the reason if they are of another network.
    pub(crate) fn restore(
        config: &Config,
        device: &Device,
        mut sections: Sections,
    ) -> Result<State, String> {
        let fresh = State::fresh(config, device);
        let mut part = |name: &str| sections.remove(name).ok_or(format!("it has no {name}"));
        let ledger: Ledger = from_json(&part("ledger")?)?;
        let baseline: Option<f64> = from_json(&part("baseline")?)?;
        let controller = load(fresh.reinforce.controller, part("controller")?)?;
        let reinforce = Reinforce::new(controller, &config.search);
        let sgd = fresh.sgd.from_bytes(Bytes::from_bytes_vec(part("sgd")?));
        let mut tuned = BTreeMap::new();
        for &candidate in ledger.tuned.keys() {
            let network = load(fresh.network.copy(), part(&candidate.to_string())?)?;
            tuned.insert(candidate, network);
        }
        Ok(State {
            network: load(fresh.network, part("network")?)?,
            sgd: sgd.map_err(|error| error.to_string())?,
            reinforce: reinforce
                .remember(baseline, part("adam")?)
                .map_err(|error| error.to_string())?,
            tuned,
            ledger,
        })
    }
}

/// Weights as bytes. Statistics that wait to be merged only are so in a copy without gradients.
pub(crate) fn record<M: Module>(module: &M) -> Result<Vec<u8>, TrainError> {
    Ok(module.valid().into_record().into_bytes().map_err(tensor)?.to_vec())
}

/// A module with the weights of `bytes`.
pub(crate) fn load<M: Module>(module: M, bytes: Vec<u8>) -> Result<M, String> {
    ModuleRecord::from_bytes(Bytes::from_bytes_vec(bytes))
        .and_then(|record| module.try_load_record(record))
        .map_err(|error| error.to_string())
}

fn from_json<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

fn tensor(error: impl fmt::Display) -> TrainError {
    TrainError::Tensor(error.to_string())
}
