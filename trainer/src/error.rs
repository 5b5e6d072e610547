//! Everything that can go wrong in training, as one sentence each.
//!
//! Every fallible function of the library gives a [`TrainError`]. A message names the file or the
//! stage where there is one, then the reason; the cause is kept as `source`.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::device::DeviceName;
use crate::progress::Stage;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The configuration is not TOML, has an unknown key, or a value of the wrong type.
    #[error("config: {}", one_line(&source.to_string()))]
    Toml {
        /// Where, and what was expected.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The settings contradict each other.
    #[error("config: {0}")]
    Config(#[from] ConfigError),
    /// A policy's latency could not be predicted.
    #[error("search: {0}")]
    Cost(#[from] snn_schemas::cost::CostError),
    /// A device that is not there.
    #[error("device: {name}: {reason}")]
    Device {
        /// Which one.
        name: DeviceName,
        /// Why not.
        reason: String,
    },
    /// The images are not what the settings say.
    #[error("data: {0}")]
    Data(String),
    /// A checkpoint is unreadable, or of another network.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The folder of a new run already holds one.
    #[error("{}: holds a run already; --resume goes on with it", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A run was begun with other settings.
    #[error("{}: was begun with another [{section}]", path.display())]
    Other {
        /// The run folder.
        path: PathBuf,
        /// The settings that differ.
        section: &'static str,
    },
    /// An ONNX file is not the network that the settings describe.
    #[error("model: {0}")]
    Model(String),
    /// A stage needs what an earlier stage leaves behind.
    #[error("{stage}: {} has no {missing}; run \"{before}\" first", path.display())]
    Order {
        /// The stage asked for.
        stage: Stage,
        /// The run folder.
        path: PathBuf,
        /// What it lacks.
        missing: &'static str,
        /// The stage that makes it.
        before: Stage,
    },
    /// The loss left the numbers: the learning rate is too high for this network.
    #[error("{stage}: epoch {epoch}: the loss is {loss}; a smaller lr may help")]
    Diverged {
        /// In which stage.
        stage: Stage,
        /// Epoch, counted from 1.
        epoch: usize,
        /// The loss.
        loss: f64,
    },
    /// A tensor could not be read back from the device.
    #[error("tensor: {0}")]
    Tensor(String),
    /// The network could not be written as ONNX.
    #[error("export: {0}")]
    Export(#[from] burn_onnx::export::ExportError),
    /// The exported bytes could not be read back to add the metadata.
    #[error("export: {0}")]
    Onnx(#[from] snn_schemas::onnx::OnnxError),
    /// The report could not be drawn.
    #[error("report: {0}")]
    Report(String),
    /// A result could not be written as JSON.
    #[error("json: {0}")]
    Json(#[from] serde_json::Error),
}

impl TrainError {
    /// Ties an I/O error to its file.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError + '_ {
        move |source| TrainError::Io { path: path.to_owned(), source }
    }
}

/// TOML errors draw a picture over several lines; the last line says what is wrong.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match (lines.first(), lines.last()) {
        (Some(first), Some(last)) if lines.len() > 1 => {
            format!("{}: {last}", first.trim_start_matches("TOML parse error "))
        }
        (Some(first), _) => (*first).to_owned(),
        _ => String::new(),
    }
}
