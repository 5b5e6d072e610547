//! The network's settings, and the networks that have a name.
//!
//! Takes depth, groups and widths, or the name of a preset and what differs from it; gives a
//! [`NetConfig`], the shapes of its blocks, and what contradicts in it. Defaults and presets are the
//! paper's (Table 1, section 4.3); ResNets are those of He et al.

use std::fmt;

use serde::{Deserialize, Serialize};
use snn_schemas::MAX_GROUPS;

use super::{ConfigError, within};

/// Stages of the trunk, each but the first halving height and width (Table 1).
pub(crate) const STAGES: usize = 3;

/// How the 3×3 convolution of a block is divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Into C paths.
    #[default]
    ResNeXt,
    /// Into the G groups and no further: the bottleneck ResNet.
    ResNet,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::ResNeXt => "ResNeXt",
            Family::ResNet => "ResNet",
        })
    }
}

/// Which groups' features the classifier reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Classifier {
    /// Those of the first alone, so that nothing is gathered in the end (section 3.1).
    #[default]
    First,
    /// Those of all groups, each pooled where it was computed: one number a channel is gathered.
    All,
}

/// The network of section 3.1: a separable ResNeXt, or a separable ResNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct NetConfig {
    /// How a block's 3×3 convolution is divided.
    pub family: Family,
    /// Number of layers, 9n + 2 for n blocks a stage: 20, 29, 38, … 56, … 110.
    pub depth: usize,
    /// G, the independent groups. With 1 it is the ordinary ResNeXt, and nothing is exchanged.
    pub groups: usize,
    /// C, the paths of a block, over all groups. G divides it. A ResNet has one.
    pub cardinality: usize,
    /// d, the channels of a path in the first stage; doubled with every stage. G divides a ResNet's.
    pub path_width: usize,
    /// Channels of one group's block output in the first stage; doubled with every stage.
    pub trunk_width: usize,
    /// Channels of `conv0`.
    pub stem_channels: usize,
    /// Channels, height and width of an image.
    pub input: [usize; 3],
    /// Classes to tell apart.
    pub classes: usize,
    /// Which groups' features the classifier reads.
    pub classifier: Classifier,
    /// Whether pooled features are normalised over each batch while weights are fitted. The classifier takes
    /// the statistics up in the end, so that the exported network is the same kind either way.
    pub pooled_norm: bool,
}

impl Default for NetConfig {
    fn default() -> NetConfig {
        NetConfig {
            family: Family::ResNeXt,
            depth: 56,                     // Table 1
            groups: 4,                     // four devices, as in all of section 4
            cardinality: 8,                // Table 1: 8×16d
            path_width: 16,                // Table 1: 8×16d
            trunk_width: 64,               // Table 1
            stem_channels: 16,             // Table 1
            input: [3, 32, 32],            // CIFAR
            classes: 100,                  // CIFAR-100, as in Table 1
            classifier: Classifier::First, // section 3.1
            pooled_norm: true,             // unstated; without it Table 1's networks do not learn
        }
    }
}

/// The settings as they may be written: beside them the name of a preset, which the others override.
#[derive(Deserialize)]
#[serde(rename = "NetConfig", deny_unknown_fields)]
struct Written {
    preset: Option<String>,
    family: Option<Family>,
    depth: Option<usize>,
    groups: Option<usize>,
    cardinality: Option<usize>,
    path_width: Option<usize>,
    trunk_width: Option<usize>,
    stem_channels: Option<usize>,
    input: Option<[usize; 3]>,
    classes: Option<usize>,
    classifier: Option<Classifier>,
    pooled_norm: Option<bool>,
}

impl TryFrom<Written> for NetConfig {
    type Error = ConfigError;

    fn try_from(written: Written) -> Result<NetConfig, ConfigError> {
        let default = NetConfig::default();
        let classes = written.classes.unwrap_or(default.classes);
        let base = match written.preset {
            None => default,
            Some(name) => NetConfig::preset(&name, classes).ok_or_else(|| {
                let known = NetConfig::presets().collect::<Vec<_>>().join(", ");
                ConfigError::Preset { name, known }
            })?,
        };
        Ok(NetConfig {
            family: written.family.unwrap_or(base.family),
            depth: written.depth.unwrap_or(base.depth),
            groups: written.groups.unwrap_or(base.groups),
            cardinality: written.cardinality.unwrap_or(base.cardinality),
            path_width: written.path_width.unwrap_or(base.path_width),
            trunk_width: written.trunk_width.unwrap_or(base.trunk_width),
            stem_channels: written.stem_channels.unwrap_or(base.stem_channels),
            input: written.input.unwrap_or(base.input),
            classes,
            classifier: written.classifier.unwrap_or(base.classifier),
            pooled_norm: written.pooled_norm.unwrap_or(base.pooled_norm),
        })
    }
}

/// ResNeXts with a name: depth, cardinality, path width (Table 1, and section 4.3).
const RESNEXTS: [(&str, usize, usize, usize); 4] = [
    ("resnext-56-4x16d", 56, 4, 16),
    ("resnext-56-8x16d", 56, 8, 16),
    ("resnext-56-64x4d", 56, 64, 4),
    ("resnext-110-8x16d", 110, 8, 16),
];
/// ResNets with a name, and their depth: bottlenecks of 16, 32 and 64 channels, as He et al. have
/// them on CIFAR ("Identity mappings in deep residual networks", 2016: -110 and -164).
const RESNETS: [(&str, usize); 3] = [("resnet-56", 56), ("resnet-110", 110), ("resnet-164", 164)];
/// Width of their bottleneck in the first stage.
const RESNET_WIDTH: usize = 16;

impl NetConfig {
    /// The network of this name, for `classes` classes; `sep-` in front makes four groups of it.
    /// In a configuration it is `preset` of `[net]`, under the other keys.
    pub fn preset(name: &str, classes: usize) -> Option<NetConfig> {
        let (groups, plain) = match name.strip_prefix("sep-") {
            Some(plain) => (4, plain),
            None => (1, name),
        };
        let net = NetConfig { groups, classes, ..NetConfig::default() };
        if let Some(&(_, depth)) = RESNETS.iter().find(|preset| preset.0 == plain) {
            let (family, cardinality, path_width) = (Family::ResNet, 1, RESNET_WIDTH);
            return Some(NetConfig { family, depth, cardinality, path_width, ..net });
        }
        let &(_, depth, cardinality, path_width) =
            RESNEXTS.iter().find(|preset| preset.0 == plain)?;
        Some(NetConfig { depth, cardinality, path_width, ..net })
    }

    /// Names that [`NetConfig::preset`] knows.
    pub fn presets() -> impl Iterator<Item = String> {
        let plain = || RESNEXTS.iter().map(|preset| preset.0).chain(RESNETS.map(|preset| preset.0));
        ["", "sep-"]
            .into_iter()
            .flat_map(move |prefix| plain().map(move |name| format!("{prefix}{name}")))
    }

    /// What it is called: `Sep-ResNeXt-20`.
    pub fn title(&self) -> String {
        let separable = if self.groups > 1 { "Sep-" } else { "" };
        format!("{separable}{}-{}", self.family, self.depth)
    }

    /// Groups of a block's 3×3 convolution.
    pub fn paths(&self) -> usize {
        match self.family {
            Family::ResNeXt => self.cardinality,
            Family::ResNet => self.groups,
        }
    }

    /// How many groups' features the classifier reads.
    pub fn classified(&self) -> usize {
        match self.classifier {
            Classifier::First => 1,
            Classifier::All => self.groups,
        }
    }

    /// n, the blocks of a stage.
    pub fn blocks_per_stage(&self) -> usize {
        self.depth.saturating_sub(2) / 9
    }

    /// B, the blocks of the trunk.
    pub fn blocks(&self) -> usize {
        STAGES * self.blocks_per_stage()
    }

    /// Channels, height and width of one group's output of block `block`, counted from 0.
    pub fn block_shape(&self, block: usize) -> [usize; 3] {
        let stage = block / self.blocks_per_stage().max(1);
        let halve = |size: usize| (0..stage).fold(size, |size, _| size.div_ceil(2));
        [self.trunk_width << stage, halve(self.input[1]), halve(self.input[2])]
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let at_least_one = [
            ("net.cardinality", self.cardinality),
            ("net.path_width", self.path_width),
            ("net.trunk_width", self.trunk_width),
            ("net.stem_channels", self.stem_channels),
            ("net.input", self.input.into_iter().min().unwrap_or(0)),
            ("net.classes", self.classes),
        ];
        for (key, value) in at_least_one {
            within(key, value as f64, 1.0, f64::from(u16::MAX), "1 to 65535")?;
        }
        if self.depth < 11 || !(self.depth - 2).is_multiple_of(9) {
            return Err(ConfigError::Depth { found: self.depth });
        }
        within("net.groups", self.groups as f64, 1.0, MAX_GROUPS as f64, "1 to 8")?;
        let NetConfig { cardinality, path_width, groups, .. } = *self;
        match self.family {
            Family::ResNet if cardinality != 1 || !path_width.is_multiple_of(groups) => {
                Err(ConfigError::ResNet { cardinality, path_width, groups })
            }
            Family::ResNeXt if !cardinality.is_multiple_of(groups) => {
                Err(ConfigError::Cardinality { cardinality, groups })
            }
            _ => Ok(()),
        }
    }
}
