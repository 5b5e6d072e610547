//! Why a configuration is refused: the setting, what was found, and what was expected.

/// Why a configuration is refused.
#[derive(Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A setting is out of range.
    #[error("{key}: {found}, expected {expected}")]
    Range {
        /// Which setting.
        key: &'static str,
        /// Its value.
        found: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// No network has this name.
    #[error("net.preset: {name:?}, expected one of {known}")]
    Preset {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// No number of blocks a stage gives this depth.
    #[error("net.depth: {found}, expected 9n + 2 with n at least 1, such as 20, 29, 56 or 110")]
    Depth {
        /// The depth asked for.
        found: usize,
    },
    /// The paths of a block cannot be dealt out evenly.
    #[error("net.cardinality: {cardinality} paths do not divide into {groups} groups")]
    Cardinality {
        /// C.
        cardinality: usize,
        /// G.
        groups: usize,
    },
    /// A ResNet's bottleneck cannot be dealt out evenly.
    #[error(
        "net.family: a resnet has cardinality 1, found {cardinality}, and a path_width that divides into {groups} groups, found {path_width}"
    )]
    ResNet {
        /// C.
        cardinality: usize,
        /// d.
        path_width: usize,
        /// G.
        groups: usize,
    },
    /// A candidate cannot be had, or told from another.
    #[error("candidates: \"{name}\" {reason}")]
    Candidate {
        /// Which one.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// AutoAugment's operations mix red, green and blue.
    #[error("train.augment.autoaugment: needs images of 3 channels, net.input has {channels}")]
    Colours {
        /// Channels of the images.
        channels: usize,
    },
    /// A device or a link that latencies cannot be predicted for.
    #[error("{key}: {reason}")]
    Cluster {
        /// Which setting.
        key: &'static str,
        /// What was found, and what was expected.
        reason: String,
    },
    /// A step would be sent in one shape and added in another.
    #[error(
        "exchange.staleness: {staleness} makes step {step} cross a stride: sent after block {from} as {sent:?}, added in block {to} to {sum:?}; a staleness that divides the blocks of a stage never does"
    )]
    Staleness {
        /// α.
        staleness: usize,
        /// The step, from 0.
        step: usize,
        /// The block whose output is sent, from 1.
        from: usize,
        /// The block to whose sum it is added, from 1.
        to: usize,
        /// Channels, height, width of what one group sends.
        sent: [usize; 3],
        /// Channels, height, width of the sum.
        sum: [usize; 3],
    },
}
