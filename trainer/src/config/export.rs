//! The settings of what a run leaves behind.

use serde::{Deserialize, Serialize};

/// Precision of a model's large weights: those of convolutions and of the classifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// As they were trained.
    #[default]
    F32,
    /// Half of that, rounded to nearest even: before the network is judged, and for half of the file.
    F16,
}

/// How the model is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportConfig {
    /// Precision of its large weights.
    pub weights: Weights,
}
