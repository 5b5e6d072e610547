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
use crate::judge::{Score, host};
use crate::net::Network;

/// A policy, and how good the shared weights were under it on the validation images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Choice {
    pub(crate) policy: Policy,
    pub(crate) validation: Score,
}

/// Ends the names of the parts that belong to [`State::other`].
const OTHER: &str = ".other";
/// Begins the names of candidates' weights.
const TUNED: &str = "tuned/";

/// What has been done so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    /// Epochs of stage 1, over all rounds.
    pub(crate) epochs: usize,
    /// Among the policies that `exchange` describes, from which stage 1 samples.
    #[serde(flatten)]
    pub(crate) main: Found,
    /// Among the others: with levels where `exchange.search_levels` is false, or without.
    #[serde(default)]
    pub(crate) other: Found,
    /// Fine-tuning epochs of each candidate, by name.
    pub(crate) tuned: BTreeMap<String, usize>,
    /// Fine-tuned candidates on the validation images.
    pub(crate) validation: BTreeMap<String, Score>,
    /// Fine-tuned candidates on the test images.
    pub(crate) test: BTreeMap<String, Score>,
    /// The best epoch so far, on the validation images: what `best.ckpt` is of.
    #[serde(default)]
    pub(crate) best: Option<Score>,
    /// Lines of `metrics.jsonl` that belong to all this.
    pub(crate) lines: usize,
}

impl Ledger {
    /// What there is of policies with levels, or of those without, as `levels` says.
    pub(crate) fn found(&self, config: &Config, levels: bool) -> &Found {
        if levels == config.exchange.search_levels { &self.main } else { &self.other }
    }
}

/// What has been looked for and found among policies with levels, or among those without.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// Steps of the controller, over all rounds.
    pub(crate) steps: usize,
    /// The best policy of each round's stage 3.
    pub(crate) selections: Vec<Choice>,
    /// The best policy of the random sampler.
    pub(crate) random: Option<Choice>,
}

/// Where a run stands.
pub(crate) struct State {
    /// The weights all policies share.
    pub(crate) network: Network,
    /// Optimiser of the weights in work: the shared ones, then each candidate's.
    pub(crate) sgd: ModuleOptimizer,
    /// The controller and its optimiser, for the policies that `exchange` describes.
    pub(crate) main: Reinforce,
    /// And for the others, see [`Ledger::other`].
    pub(crate) other: Reinforce,
    /// Each candidate's own weights, from its first fine-tuning epoch on.
    pub(crate) tuned: BTreeMap<String, Network>,
    /// What has been done.
    pub(crate) ledger: Ledger,
}

impl State {
    /// Before the first step. `device`, the network's, must have autodiff.
    pub(crate) fn fresh(config: &Config, device: &Device) -> State {
        let fresh = |config: &Config| {
            Reinforce::new(Controller::new(config, &host().autodiff()), &config.search)
        };
        State {
            network: Network::new(&config.net, config.seed, device),
            sgd: fit::sgd(&config.train),
            main: fresh(config),
            other: fresh(&config.with_levels(!config.exchange.search_levels)),
            tuned: BTreeMap::new(),
            ledger: Ledger::default(),
        }
    }

    /// Everything, as a checkpoint's parts.
    pub(crate) fn sections(&self) -> Result<Sections, TrainError> {
        let mut sections = Sections::new();
        sections.insert("ledger".to_owned(), serde_json::to_vec(&self.ledger)?);
        sections.insert("network".to_owned(), record(&self.network)?);
        sections.insert("sgd".to_owned(), self.sgd.into_bytes().map_err(tensor)?.to_vec());
        for (reinforce, suffix) in [(&self.main, ""), (&self.other, OTHER)] {
            let (baseline, adam) = reinforce.memory()?;
            // As its bits: a number read from JSON may be off by the last one.
            let bits = baseline.map(f64::to_bits);
            sections.insert(format!("baseline{suffix}"), serde_json::to_vec(&bits)?);
            sections.insert(format!("adam{suffix}"), adam);
            sections.insert(format!("controller{suffix}"), record(&reinforce.controller)?);
        }
        for (candidate, network) in &self.tuned {
            sections.insert(format!("{TUNED}{candidate}"), record(network)?);
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
        let main = remember(fresh.main, "", &mut part)?;
        // A run that has one controller is older than the other, which has then learned nothing.
        let other = match ledger.other.steps {
            0 => fresh.other,
            _ => remember(fresh.other, OTHER, &mut part)?,
        };
        let sgd = fresh.sgd.from_bytes(Bytes::from_bytes_vec(part("sgd")?));
        let mut tuned = BTreeMap::new();
        for name in ledger.tuned.keys() {
            let weights = part(&format!("{TUNED}{name}")).or_else(|_| part(name))?;
            tuned.insert(name.clone(), load(fresh.network.copy(), weights)?);
        }
        Ok(State {
            network: load(fresh.network, part("network")?)?,
            sgd: sgd.map_err(|error| error.to_string())?,
            main,
            other,
            tuned,
            ledger,
        })
    }
}

/// The controller that was written with `suffix` behind its parts' names.
fn remember(
    fresh: Reinforce,
    suffix: &str,
    part: &mut impl FnMut(&str) -> Result<Vec<u8>, String>,
) -> Result<Reinforce, String> {
    let baseline = part(&format!("baseline{suffix}"))?;
    // Older runs have the number itself, which is never written as a whole one.
    let baseline: Option<f64> = match from_json::<Option<u64>>(&baseline) {
        Ok(bits) => bits.map(f64::from_bits),
        Err(_) => from_json(&baseline)?,
    };
    let adam = part(&format!("adam{suffix}"))?;
    let weights = part(&format!("controller{suffix}"))?;
    fresh.remember(baseline, adam, |controller| load(controller, weights))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::rng;
    use burn::tensor::Tensor;

    /// Ledgers were written without a second search before there were candidates to choose.
    #[test]
    fn a_ledger_of_one_search_is_still_read() {
        let json = br#"{"epochs":8,"steps":3,"selections":[],"random":null,
            "tuned":{"searched":1},"validation":{},"test":{},"lines":11}"#;
        let ledger: Ledger = from_json(json).unwrap();
        assert_eq!((ledger.epochs, ledger.main.steps, ledger.lines), (8, 3, 11));
        assert_eq!((ledger.other, ledger.tuned["searched"]), (Found::default(), 1));
        assert_eq!(ledger.best, None);
    }

    #[test]
    fn the_baseline_comes_back_to_the_last_bit() {
        let config = Config::digits();
        let device = Device::flex().autodiff();
        let mut state = State::fresh(&config, &device);
        let learn = |state: &State, reward: f64| {
            let rollout = state.main.controller.sample(1, &mut rng(1, "test", 0)).unwrap();
            state.main.clone().learn(rollout, &[reward])
        };
        // Read as decimals the first three would be off by a bit.
        for reward in [1.0 / 11.0, 2.0 / 11.0, 13.0 / 11.0, 1.0] {
            state.main = learn(&State::fresh(&config, &device), reward);
            let baseline = state.main.memory().unwrap().0;
            assert!(baseline.is_some());
            let again = State::restore(&config, &device, state.sections().unwrap()).unwrap();
            assert_eq!(again.main.memory().unwrap().0, baseline);
            let mut sections = state.sections().unwrap();
            sections.insert("baseline".to_owned(), b"0.75".to_vec());
            let older = State::restore(&config, &device, sections).unwrap();
            assert_eq!(older.main.memory().unwrap().0, Some(0.75));
        }
    }

    /// Their candidates' weights stood under the bare name.
    #[test]
    fn weights_under_a_bare_name_are_still_read() {
        let config = Config::digits();
        let device = Device::flex().autodiff();
        let mut state = State::fresh(&config, &device);
        let tuned = Network::new(&config.net, config.seed + 1, &device);
        state.tuned.insert("silent".to_owned(), tuned.copy());
        state.ledger.tuned.insert("silent".to_owned(), 1);
        let mut sections = state.sections().unwrap();
        let weights = sections.remove("tuned/silent").unwrap();
        sections.insert("silent".to_owned(), weights);
        sections.retain(|name, _| !name.ends_with(OTHER));
        let again = State::restore(&config, &device, sections).unwrap();
        let logits = |network: &Network| -> Vec<f32> {
            network.forward(Tensor::ones([1, 1, 8, 8], &device)).try_into_vec_as().unwrap()
        };
        assert_eq!(logits(&again.tuned["silent"]), logits(&tuned));
        assert_ne!(logits(&again.network), logits(&tuned));
    }
}
