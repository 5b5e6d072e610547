//! Every setting of a run, with its default and the reason for it.
//!
//! Takes a TOML text and gives a [`Config`] whose rules have been checked ([`Config::check`]): an
//! unknown key is an error, and so is a network that cannot be built or a staleness whose step would
//! cross a stride. The defaults are the paper's where it gives them; [`Config::digits`] is the
//! small preset of the quickstart. Writing a configuration and reading it back gives the same one.

use std::fmt;

use serde::{Deserialize, Serialize};
use snn_schemas::{Dtype, Levels, Policy};

use crate::candidate::{self, Candidate, Source};
use crate::device::DeviceName;
use crate::error::TrainError;

mod error;
mod export;
mod net;
mod stages;

pub use error::ConfigError;
pub use export::{ExportConfig, Weights};
pub(crate) use net::STAGES;
pub use net::{Classifier, Family, NetConfig};
pub use stages::{Augmentation, Decay, FinetuneConfig, FitConfig, SearchConfig};

/// All settings of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Start of every random number: weights, batches, shifts, policies, the validation split.
    pub seed: u64,
    /// Where the network is trained. It may be another one when a run is gone on with.
    pub device: DeviceName,
    /// Images to train on.
    pub data: DataConfig,
    /// The network.
    pub net: NetConfig,
    /// What groups exchange, and when.
    pub exchange: ExchangeConfig,
    /// Stage 1: the network's weights.
    pub train: FitConfig,
    /// Stages 2 and 3: the controller, and the choice of a policy.
    pub search: SearchConfig,
    /// The last stage: each candidate's weights under its policy.
    pub finetune: FinetuneConfig,
    /// How the model is written.
    pub export: ExportConfig,
    /// Policies carried to the end, a row of the result each; the first is exported. Without any:
    /// searched, random and silent. Read through [`Config::candidates`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            seed: 1,                  // any will do; written into best.json
            device: DeviceName::Flex, // every build has it
            data: DataConfig::default(),
            net: NetConfig::default(),
            exchange: ExchangeConfig::default(),
            train: FitConfig::default(),
            search: SearchConfig::default(),
            finetune: FinetuneConfig::default(),
            export: ExportConfig::default(), // as they were trained
            candidates: Vec::new(),          // what the paper compares: searched, random, silent
        }
    }
}

/// A data set this crate can load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatasetName {
    /// The 1,797 handwritten digits of 8×8 pixels that come with the crate.
    #[default]
    Digits,
    /// CIFAR-10, as binary files or Python pickles.
    Cifar10,
    /// CIFAR-100, the same.
    Cifar100,
    /// Folders of images: `train/CLASS/*.png|jpg` and `test/CLASS/*.png|jpg`.
    Folder,
}

impl fmt::Display for DatasetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DatasetName::Digits => "digits",
            DatasetName::Cifar10 => "cifar10",
            DatasetName::Cifar100 => "cifar100",
            DatasetName::Folder => "folder",
        })
    }
}

/// Images to train on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Which data set.
    pub name: DatasetName,
    /// Part of the training images set aside for validation, between 0 and 1.
    pub validation: f64,
}

impl Default for DataConfig {
    fn default() -> DataConfig {
        DataConfig {
            name: DatasetName::Digits, // the only one that comes with the crate
            validation: 0.1,           // section 4.1
        }
    }
}

/// What groups exchange, and when (section 3.3).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExchangeConfig {
    /// α, the blocks computed per exchange.
    pub staleness: usize,
    /// Element type on the wire.
    pub dtype: Dtype,
    /// Whether the controller chooses a sparsity level a step; everything is sent otherwise.
    pub search_levels: bool,
    /// The sparsity levels.
    pub levels: Levels,
}

impl Default for ExchangeConfig {
    fn default() -> ExchangeConfig {
        ExchangeConfig {
            staleness: 2,              // all of the paper's tables
            dtype: Dtype::F32,         // Table 2; Table 5 adds f16
            search_levels: false,      // Table 2; Table 5 adds sparsity
            levels: Levels::default(), // Table 4: 9 levels from 50 %
        }
    }
}

impl Config {
    /// The quickstart: Sep-ResNeXt-20 (4×4d, four groups) on the embedded digits.
    ///
    /// Small enough for about a minute on two shared cores; `examples/digits.toml` is the same as a file.
    pub fn digits() -> Config {
        Config {
            seed: 1,
            device: DeviceName::Flex,
            data: DataConfig::default(),
            net: NetConfig {
                depth: 20,        // two blocks a stage: the fewest that let α = 2 stay within one
                cardinality: 4,   // one path a group
                path_width: 4,    // 64 pixels and ten classes need no more
                trunk_width: 16,  // 8×8 pixels hold a sixteenth of what 32×32 do
                input: [1, 8, 8], // the digits
                classes: 10,      // the digits
                ..NetConfig::default()
            },
            exchange: ExchangeConfig {
                dtype: Dtype::F16,   // the quickstart shows all of section 3.3
                search_levels: true, // the quickstart shows all of section 3.3
                ..ExchangeConfig::default()
            },
            train: FitConfig {
                epochs: 32,           // accuracy no longer grows much after
                batch: 64,            // 16 steps an epoch
                decay: Decay::Cosine, // ends low within few epochs
                augment: Augmentation {
                    shift: 1,     // an eighth of the image, as 4 of 32 pixels
                    rotate: 15.0, // writers slant differently, and the test set's are others
                    zoom: 0.15,   // and write larger or smaller
                    ..Augmentation::default()
                },
                weight_decay: 8e-3, // a thousand images: the more accurate the more it holds back
                calibration: 512,   // half of the training images
                ..FitConfig::default()
            },
            search: SearchConfig {
                rounds: 2,            // enough to see the rounds
                steps: 80,            // enough for three decisions
                policies_per_step: 2, // halves the noise of a reward
                lr: 5e-3,             // few steps, so larger ones
                entropy: 0.01,        // or it would settle within thirty steps
                baseline_decay: 0.9,  // follows within ten steps of sixty
                samples: 20,          // enough for three decisions
                ..SearchConfig::default()
            },
            finetune: FinetuneConfig { epochs: 8, lr: 0.02, decay: Decay::Cosine },
            export: ExportConfig::default(),
            candidates: Vec::new(),
        }
    }

    /// Reads a configuration; what it leaves out has its default.
    ///
    /// # Errors
    /// Not TOML, an unknown key, or settings that [`Config::check`] refuses.
    pub fn from_toml(text: &str) -> Result<Config, TrainError> {
        let config: Config =
            toml::from_str(text).map_err(|source| TrainError::Toml { source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Writes every setting, so that a later version with other defaults reads the same ones.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// T, the steps of a policy: `⌊B / α⌋`.
    pub fn steps(&self) -> usize {
        Policy::steps_for(self.net.blocks(), self.exchange.staleness)
    }

    /// The policy that exchanges nothing.
    pub fn silent(&self) -> Policy {
        let ExchangeConfig { staleness, dtype, levels, .. } = self.exchange;
        let silent = Policy::silent(self.net.groups, staleness, self.steps());
        let decision = snn_schemas::Decision::silent(self.net.groups);
        let full = snn_schemas::Step::new(decision, levels.full());
        Policy { dtype, levels, steps: vec![full; self.steps()], ..silent }
    }

    /// The policies that are carried to the end, every limit filled in; the first is exported.
    pub fn candidates(&self) -> Vec<Candidate> {
        let default = || match self.net.groups {
            1 => vec![Candidate::new(Source::Silent)],
            _ => [Source::Searched, Source::Random, Source::Silent].map(Candidate::new).to_vec(),
        };
        let listed = match self.candidates.is_empty() {
            true => default(),
            false => self.candidates.clone(),
        };
        listed.iter().map(|candidate| candidate.resolved(self)).collect()
    }

    /// The same settings with or without the search for sparsity levels.
    pub(crate) fn with_levels(&self, search_levels: bool) -> Config {
        let exchange = ExchangeConfig { search_levels, ..self.exchange.clone() };
        Config { exchange, ..self.clone() }
    }

    /// Validation images, of `images`, that a policy of stage 3 is judged on.
    pub(crate) fn judged_images(&self, images: usize) -> usize {
        match self.search.judged_images {
            0 => images,
            some => some.min(images),
        }
    }

    /// Epochs of stage 1 that round `round` trains, counted from 0 over the whole run.
    pub fn epochs_of(&self, round: usize) -> std::ops::Range<usize> {
        let rounds = self.search.rounds.max(1);
        round * self.train.epochs / rounds..(round + 1) * self.train.epochs / rounds
    }

    /// Checks every rule of the settings.
    ///
    /// # Errors
    /// The first setting that is out of range, or two that contradict each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.net.check()?;
        self.check_exchange()?;
        candidate::check(self)?;
        within("data.validation", self.data.validation, 0.001, 0.9, "0.001 to 0.9")?;
        self.train.check(self.net.input)?;
        self.search.check()?;
        within("finetune.lr", self.finetune.lr, f64::MIN_POSITIVE, 100.0, "above 0")
    }

    /// Both ends of a step must have one shape.
    fn check_exchange(&self) -> Result<(), ConfigError> {
        let ExchangeConfig { staleness, levels, .. } = self.exchange;
        let blocks = self.net.blocks();
        within(
            "exchange.staleness",
            staleness as f64,
            1.0,
            blocks as f64,
            "1 to the number of blocks",
        )?;
        within("exchange.levels.count", levels.count as f64, 1.0, 4096.0, "1 to 4096")?;
        within("exchange.levels.min_percent", levels.min_percent, 0.0, 100.0, "0 to 100")?;
        let silent = Policy::silent(self.net.groups, staleness, self.steps());
        for step in 0..self.steps() {
            let [from, to] = [silent.sent_after(step), silent.added_in(step)];
            let [sent, sum] = [self.net.block_shape(from), self.net.block_shape(to)];
            if sent != sum {
                let [from, to] = [from + 1, to + 1];
                return Err(ConfigError::Staleness { staleness, step, from, to, sent, sum });
            }
        }
        Ok(())
    }
}

/// NaN lies within nothing.
pub(crate) fn within(
    key: &'static str,
    found: f64,
    low: f64,
    high: f64,
    expected: &'static str,
) -> Result<(), ConfigError> {
    match (low..=high).contains(&found) {
        true => Ok(()),
        false => Err(ConfigError::Range { key, found, expected }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_file_is_the_preset() {
        let text = include_str!("../../examples/digits.toml");
        assert_eq!(Config::from_toml(text).unwrap(), Config::digits());
    }

    #[test]
    fn every_example_is_a_configuration() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<_> =
            files.filter(|path| path.extension().is_some_and(|found| found == "toml")).collect();
        assert!(files.len() >= 7, "{files:?}");
        for path in files {
            let config = Config::from_toml(&std::fs::read_to_string(&path).unwrap());
            assert!(config.is_ok(), "{}: {}", path.display(), config.unwrap_err());
        }
    }

    #[test]
    fn presets_pass_their_own_checks_and_survive_toml() {
        for config in [Config::default(), Config::digits()] {
            assert_eq!(Config::from_toml(&config.to_toml()).unwrap(), config);
        }
    }

    #[test]
    fn a_preset_stands_under_the_other_keys() {
        let read = |net: &str| Config::from_toml(&format!("[net]\n{net}"));
        let alone = read("preset = \"sep-resnext-56-4x16d\"\n").unwrap();
        assert_eq!(alone.net, NetConfig::preset("sep-resnext-56-4x16d", 100).unwrap());
        // An order of keys means nothing.
        let changed =
            read("classes = 10\npreset = \"sep-resnet-110\"\ntrunk_width = 32\n").unwrap();
        let preset = NetConfig::preset("sep-resnet-110", 10).unwrap();
        assert_eq!(changed.net, NetConfig { trunk_width: 32, ..preset });
        // A run's own file has every setting, whatever a later version's preset is.
        let written = changed.to_toml();
        assert!(!written.contains("preset") && written.contains("depth = 110"), "{written}");
        assert_eq!(Config::from_toml(&written).unwrap(), changed);
    }

    #[test]
    fn a_preset_that_is_not_there_is_an_error_that_lists_those_that_are() {
        let error = Config::from_toml("[net]\npreset = \"resnext-57\"\n").unwrap_err().to_string();
        assert!(
            error.contains("net.preset: \"resnext-57\", expected one of resnext-56"),
            "{error}"
        );
        assert!(error.contains("sep-resnet-164") && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn an_unknown_key_is_an_error_of_one_line() {
        let error = Config::from_toml("[net]\ndepht = 20\n").unwrap_err().to_string();
        assert!(error.contains("depht") && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn a_step_across_a_stride_names_blocks_and_shapes() {
        let mut config = Config::digits();
        config.exchange.staleness = 4;
        let expected = "exchange.staleness: 4 makes step 0 cross a stride: sent after block 1 as [16, 8, 8], \
            added in block 4 to [32, 4, 4]; a staleness that divides the blocks of a stage never does";
        assert_eq!(config.check().unwrap_err().to_string(), expected);
        config.exchange.staleness = 3;
        assert!(config.check().unwrap_err().to_string().contains("added in block 3 to [32, 4, 4]"));
        config.net.depth = 29;
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn contradictions_are_named() {
        let mut config = Config::digits();
        config.net.depth = 21;
        assert_eq!(config.check(), Err(ConfigError::Depth { found: 21 }));
        config = Config::digits();
        config.net.cardinality = 6;
        assert_eq!(config.check(), Err(ConfigError::Cardinality { cardinality: 6, groups: 4 }));
        config = Config::digits();
        config.net.family = Family::ResNet;
        let resnet = config.check().unwrap_err().to_string();
        assert!(resnet.contains("cardinality 1, found 4"), "{resnet}");
        (config.net.cardinality, config.net.path_width) = (1, 16);
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.net.title(), "Sep-ResNet-20");
        config = Config::digits();
        config.train.augment.autoaugment = true;
        assert_eq!(config.check(), Err(ConfigError::Colours { channels: 1 }));
        config = Config::digits();
        config.train.lr = f64::NAN;
        assert!(config.check().unwrap_err().to_string().starts_with("train.lr: NaN"));
    }

    #[test]
    fn a_cluster_that_cannot_be_predicted_is_named() {
        let refused = |text: &str| Config::from_toml(text).unwrap_err().to_string();
        let link = refused("[search]\nlink = \"fast\"\n");
        let expected = "config: search.link: link \"fast\", expected a rate and a round trip such as 300mbit,0.3ms";
        assert_eq!(link, expected);
        let device = refused("[search]\ndevice = \"5\"\n");
        let expected = "config: search.device: device \"5\", expected a speed such as 5gflops";
        assert_eq!(device, expected);
        let lambda = refused("[search]\nlambda_latency = -1.0\n");
        assert!(lambda.starts_with("config: search.lambda_latency: -1, expected"), "{lambda}");
    }

    #[test]
    fn epochs_are_spread_over_the_rounds() {
        let config = Config::default();
        let spread: usize = (0..60).map(|round| config.epochs_of(round).len()).sum();
        assert_eq!(spread, 200);
        assert_eq!(config.epochs_of(0), 0..3);
        assert_eq!(config.epochs_of(59), 196..200);
    }

    #[test]
    fn the_rate_follows_its_schedule() {
        let step = Decay::Step { every: 50, factor: 0.1 };
        assert_eq!(step.rate(0.1, 49, 200), 0.1);
        assert!((step.rate(0.1, 150, 200) - 1e-4).abs() < 1e-12);
        assert_eq!(Decay::Cosine.rate(0.1, 0, 10), 0.1);
        assert!((Decay::Cosine.rate(0.1, 5, 10) - 0.05).abs() < 1e-12);
    }
}
