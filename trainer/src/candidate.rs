//! The policies a run carries to the end, one row of its result each.
//!
//! A [`Candidate`] says where a policy comes from and within which limits it is looked for. All
//! candidates start from the same shared weights and, where none has a budget of its own, are
//! fine-tuned alike, so that rows differ in their policy alone.
//! [`Config::candidates`](crate::Config::candidates) gives those of a configuration, each limit filled in.

use std::fmt;

use serde::{Deserialize, Serialize};
use snn_schemas::{Decision, Dtype, Policy, Step};

use crate::config::{Config, ConfigError, Decay, FinetuneConfig, within};

/// Longest name of a candidate: it heads a row of a table.
const MAX_NAME: usize = 40;

/// Where a candidate's policy comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The best the controller sampled.
    Searched,
    /// The best of as many as what one round judges allows, drawn with equal probability.
    Random,
    /// Everybody sends everything, round and round.
    Full,
    /// No exchange at all.
    Silent,
}

impl Source {
    /// Whether it is chosen among many policies.
    pub(crate) fn is_chosen(self) -> bool {
        matches!(self, Source::Searched | Source::Random)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Searched => "searched",
            Source::Random => "random",
            Source::Full => "full",
            Source::Silent => "silent",
        })
    }
}

/// A policy that is carried to the end, as `[[candidates]]` describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// What its row is called: lower-case letters, digits and `-`.
    pub name: String,
    /// Where its policy comes from.
    pub source: Source,
    /// Whether a sparsity level is chosen a step, or everything sent; `exchange.search_levels`
    /// where it is left out. Candidates with the same source and the same answer share one policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search_levels: Option<bool>,
    /// Element type on the wire while its weights are fine-tuned and judged; `exchange.dtype` where
    /// it is left out. Policies are looked for under `exchange.dtype`, whatever stands here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Passes over the training images in its fine-tuning; `finetune.epochs` where it is left out. To a run
    /// that is done, a candidate may so be added that is fine-tuned for longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
    /// Learning rate at the start of its fine-tuning; `finetune.lr` where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// How that falls; `finetune.decay` where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<Decay>,
}

impl Candidate {
    /// The one named after its source, without limits of its own.
    pub fn new(source: Source) -> Candidate {
        Candidate {
            name: source.to_string(),
            source,
            search_levels: None,
            dtype: None,
            epochs: None,
            lr: None,
            decay: None,
        }
    }

    /// The same with every limit and its budget written out.
    pub(crate) fn resolved(&self, config: &Config) -> Candidate {
        let levels = self.search_levels.unwrap_or(config.exchange.search_levels);
        let FinetuneConfig { epochs, lr, decay } = self.tuning(config);
        Candidate {
            search_levels: self.source.is_chosen().then_some(levels),
            dtype: Some(self.dtype.unwrap_or(config.exchange.dtype)),
            epochs: Some(epochs),
            lr: Some(lr),
            decay: Some(decay),
            ..self.clone()
        }
    }

    /// How it is fine-tuned.
    pub(crate) fn tuning(&self, config: &Config) -> FinetuneConfig {
        FinetuneConfig {
            epochs: self.epochs.unwrap_or(config.finetune.epochs),
            lr: self.lr.unwrap_or(config.finetune.lr),
            decay: self.decay.unwrap_or(config.finetune.decay),
        }
    }

    /// Whether its policy is chosen among those with levels.
    pub(crate) fn with_levels(&self) -> bool {
        self.search_levels.unwrap_or(false)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |reason| ConfigError::Candidate { name: self.name.clone(), reason };
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=MAX_NAME).contains(&self.name.len()) || !self.name.bytes().all(allowed) {
            return Err(wrong("expected up to 40 lower-case letters, digits and \"-\""));
        }
        if self.search_levels.is_some() && !self.source.is_chosen() {
            return Err(wrong("search_levels is for searched and random policies"));
        }
        match self.lr {
            Some(lr) => within("candidates.lr", lr, f64::MIN_POSITIVE, 100.0, "above 0"),
            None => Ok(()),
        }
    }
}

/// Checks each candidate, and that no two have one name.
pub(crate) fn check(config: &Config) -> Result<(), ConfigError> {
    for (index, candidate) in config.candidates.iter().enumerate() {
        candidate.check()?;
        let name = candidate.name.clone();
        if config.candidates[..index].iter().any(|other| other.name == name) {
            return Err(ConfigError::Candidate { name, reason: "is there twice" });
        }
        if config.net.groups == 1 && candidate.source != Source::Silent {
            let reason = "a network of one group has nobody to send to; only silent is left";
            return Err(ConfigError::Candidate { name, reason });
        }
    }
    Ok(())
}

/// The policy in which each group sends everything to the next, and the distance grows with every step.
pub(crate) fn full(config: &Config) -> Policy {
    let groups = config.net.groups;
    let silent = config.silent();
    let step = |index: usize| {
        let away = 1 + index % (groups - 1).max(1);
        let send_to = (0..groups).map(|group| (group + away) % groups).collect();
        let decision = Decision::new(send_to).unwrap_or_else(|_| Decision::silent(groups));
        Step::new(decision, config.exchange.levels.full())
    };
    Policy { steps: (0..config.steps()).map(step).collect(), ..silent }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(candidates: &str) -> Result<Config, String> {
        Config::from_toml(candidates).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_left_out_is_taken_from_the_exchange() {
        let text = "[exchange]\nsearch_levels = true\n\
            [[candidates]]\nname = \"dense\"\nsource = \"searched\"\nsearch_levels = false\n\
            [[candidates]]\nname = \"sparse-f16\"\nsource = \"searched\"\ndtype = \"f16\"\n\
            [[candidates]]\nname = \"full\"\nsource = \"full\"\n";
        let config = config(text).unwrap();
        let limits: Vec<_> = config
            .candidates()
            .into_iter()
            .map(|candidate| (candidate.name, candidate.search_levels, candidate.dtype))
            .collect();
        let expected = [
            ("dense", Some(false), Dtype::F32),
            ("sparse-f16", Some(true), Dtype::F16),
            ("full", None, Dtype::F32),
        ];
        assert_eq!(limits, expected.map(|(name, levels, d)| (name.to_owned(), levels, Some(d))));
        assert_eq!(Config::from_toml(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn a_candidate_may_have_a_budget_of_its_own() {
        let text = "[finetune]\nepochs = 1\nlr = 0.01\ndecay = \"cosine\"\n\
            [[candidates]]\nname = \"full\"\nsource = \"full\"\n\
            [[candidates]]\nname = \"longer\"\nsource = \"full\"\nepochs = 8\n\
            [[candidates]]\nname = \"stepwise\"\nsource = \"full\"\nlr = 0.5\n\
            decay = { step = { every = 2, factor = 0.1 } }\n";
        let config = config(text).unwrap();
        let tuning: Vec<_> =
            config.candidates().iter().map(|candidate| candidate.tuning(&config)).collect();
        let alike = config.finetune;
        let decay = Decay::Step { every: 2, factor: 0.1 };
        let expected = [
            alike,
            FinetuneConfig { epochs: 8, ..alike },
            FinetuneConfig { lr: 0.5, decay, ..alike },
        ];
        assert_eq!(tuning, expected);
        assert_eq!(Config::from_toml(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn without_a_list_there_are_three_and_for_one_group_one() {
        let mut config = Config::digits();
        let names = |config: &Config| {
            config.candidates().into_iter().map(|candidate| candidate.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&config), ["searched", "random", "silent"]);
        config.net.groups = 1;
        assert_eq!(names(&config), ["silent"]);
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn a_candidate_that_makes_no_sense_is_named() {
        let row = |name: &str, rest: &str| format!("[[candidates]]\nname = \"{name}\"\n{rest}\n");
        let twice = row("a", "source = \"full\"").repeat(2);
        assert!(config(&twice).unwrap_err().contains("candidates: \"a\" is there twice"));
        let upper = config(&row("A b", "source = \"full\"")).unwrap_err();
        assert!(upper.contains("candidates: \"A b\" expected up to 40 lower-case"), "{upper}");
        let rate = config(&row("a", "source = \"full\"\nlr = 0.0")).unwrap_err();
        assert!(rate.contains("candidates.lr: 0, expected above 0"), "{rate}");
        let levels = config(&row("a", "source = \"silent\"\nsearch_levels = true")).unwrap_err();
        assert!(levels.contains("search_levels is for searched and random"), "{levels}");
        let alone = config(&(row("a", "source = \"full\"") + "[net]\ngroups = 1\n")).unwrap_err();
        assert!(alone.contains("only silent is left"), "{alone}");
        assert!(config(&row("a", "source = \"best\"")).is_err());
    }

    #[test]
    fn full_sends_everything_everywhere() {
        let config = Config::digits();
        let policy = full(&config);
        assert!(policy.steps.iter().all(|step| step.decision.is_intensive() && step.level == 8));
        assert_eq!(policy.steps[0].decision.send_to(), [1, 2, 3, 0]);
        assert_eq!(policy.steps[1].decision.send_to(), [2, 3, 0, 1]);
    }
}
