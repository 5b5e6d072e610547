//! Trains separable networks, searches what their groups should tell one another, exports ONNX.
//!
//! Takes a [`Config`] and images, and leaves in a run folder a plain separable network
//! (`model.onnx`, which knows nothing of any exchange), the best policy found (`best.json`), and
//! the record of how they came about. [`run`] does it all; [`train`], [`search`], [`finetune`] and
//! [`export`] do one stage each, [`evaluate`] judges a finished run, [`compare`] sets samplers side by side. Everything but the time it
//! takes depends on the settings and the seed alone, also when a run is stopped and resumed.
//! The library prints nothing: it reports to a [`Progress`].

mod candidate;
mod checkpoint;
mod compare;
mod config;
mod controller;
mod data;
mod device;
mod engine;
mod error;
mod exchange;
mod export;
mod fit;
mod jsonl;
mod judge;
mod kernels;
mod latency;
mod metrics;
mod net;
mod progress;
mod report;
mod run;
mod scores;
mod search;
mod seed;
mod sinkhorn;
mod state;
mod wire;

pub use candidate::{Candidate, Source};
pub use compare::{Lesson, Sampler, SamplerName, SamplerRng, Trial};
pub use config::{
    Augmentation, Classifier, Config, ConfigError, DataConfig, DatasetName, Decay, ExchangeConfig,
    ExportConfig, Family, FinetuneConfig, FitConfig, NetConfig, SearchConfig, Weights,
};
pub use controller::{Controller, Reinforce, Rollout};
pub use data::{Data, Dataset};
pub use device::DeviceName;
pub use engine::judge_onnx;
pub use error::TrainError;
pub use export::{read_network, write_exchanging, write_onnx};
pub use judge::{Score, classify};
pub use latency::latency;
pub use net::{Network, Stats};
pub use progress::{Progress, Report, Stage};
pub use run::{Judged, Outcome, compare, evaluate, export, finetune, run, search, train};
pub use wire::Wire;
