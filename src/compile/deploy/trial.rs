//! What a new cluster is asked before it is trusted, and what it must answer.
//!
//! Takes a bundle, and an input with its answer where the user has them; otherwise the inputs are noise,
//! and the answers those of the same shards run here, in one process, without a network. Answers are
//! compared with [`TOLERANCE`]: devices of another kind add in another order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use snn_runtime::transport::memory::Network;
use snn_runtime::{Node, Shard, Tensor, TractEngine};
use snn_schemas::manifest::Port;

use super::bundle::Bundle;
use crate::run::input::{self, Array, InputSpec};

/// Largest difference of two answers, as a share of the largest number of the answer (or of 1, where
/// that is less). A sum in another order may round a feature the other way on its way through f16, by
/// one part in 2,048; a wrong shard is off by the whole.
pub(super) const TOLERANCE: f32 = 5e-3;
/// Inputs of noise: one may hit a blind spot.
const TRIALS: u64 = 3;
/// Requests of one file that are asked: enough to tell right from wrong.
const MAX_TRIALS: usize = 16;

/// One question, and its right answer.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    pub(super) inputs: Vec<Tensor>,
    pub(super) outputs: Vec<Tensor>,
}

impl Trial {
    /// How far an answer is from the right one, as a share of its largest number; infinitely where it
    /// is of another shape or no number.
    pub(super) fn difference(&self, answer: &[Tensor]) -> f32 {
        if answer.len() != self.outputs.len() {
            return f32::INFINITY;
        }
        let pairs = self.outputs.iter().zip(answer);
        pairs.map(|(right, found)| difference(right, found)).fold(0.0, f32::max)
    }
}

fn difference(right: &Tensor, found: &Tensor) -> f32 {
    if right.shape() != found.shape() {
        return f32::INFINITY;
    }
    let scale = right.data().iter().fold(1.0, |largest: f32, value| largest.max(value.abs()));
    let pairs = right.data().iter().zip(found.data());
    let off = pairs.map(|(right, found)| match (right - found).abs() / scale {
        off if off.is_nan() => f32::INFINITY,
        off => off,
    });
    off.fold(0.0, f32::max)
}

/// The questions a new cluster must answer.
pub(super) async fn trials(
    bundle: &Bundle,
    input: Option<&Path>,
    expect: Option<&Path>,
    within: Duration,
) -> Result<Vec<Trial>> {
    let questions = match input {
        Some(path) => from_file(path, &bundle.manifest.inputs, &bundle.manifest.metadata)?,
        None => {
            (0..TRIALS).map(|seed| noise(&bundle.manifest.inputs, seed)).collect::<Result<_>>()?
        }
    };
    let answers = match expect {
        Some(path) => {
            let read = expected(path, &bundle.manifest.outputs, questions.len());
            read.context("expect").with_context(|| path.display().to_string())?
        }
        None => {
            let reference = reference(bundle, &questions, within);
            reference
                .await
                .context("reference")
                .with_context(|| bundle.dir.display().to_string())?
        }
    };
    let pairs = questions.into_iter().zip(answers).take(MAX_TRIALS);
    Ok(pairs.map(|(inputs, outputs)| Trial { inputs, outputs }).collect())
}

fn noise(ports: &[Port], seed: u64) -> Result<Vec<Tensor>> {
    ports.iter().map(|port| tensor(input::noise(&port.shape, seed))).collect()
}

fn tensor(array: Array) -> Result<Tensor> {
    Ok(Tensor::new(array.shape, array.data)?)
}

fn from_file(
    path: &Path,
    ports: &[Port],
    metadata: &[(String, String)],
) -> Result<Vec<Vec<Tensor>>> {
    let read = || -> Result<Vec<Vec<Tensor>>> {
        let spec: InputSpec = crate::run::input_spec(ports, metadata)?;
        let requests = input::read(path, &spec)?;
        requests.into_iter().map(|array| Ok(vec![tensor(array)?])).collect()
    };
    read().context("input").with_context(|| path.display().to_string())
}

/// The answers of a file, one a request.
fn expected(path: &Path, ports: &[Port], count: usize) -> Result<Vec<Vec<Tensor>>> {
    let [port] = ports else {
        bail!("the model has {} outputs, expected 1", ports.len());
    };
    let array = input::read_npy(path)?;
    let size: usize = port.shape.iter().product();
    ensure!(
        size > 0 && array.data.len() == size * count,
        "{} numbers, expected {count} answers of shape {:?}",
        array.data.len(),
        port.shape
    );
    let answers = array.data.chunks(size);
    answers.map(|data| Ok(vec![Tensor::new(port.shape.clone(), data.to_vec())?])).collect()
}

/// What the shards answer here, in one process.
async fn reference(
    bundle: &Bundle,
    questions: &[Vec<Tensor>],
    within: Duration,
) -> Result<Vec<Vec<Tensor>>> {
    let network = Network::new();
    let mut nodes = Vec::new();
    for (rank, file) in bundle.shards.iter().enumerate() {
        let load = async {
            let shard = Shard::from_bytes(bundle.shard(rank)?)?;
            let info = shard.identity();
            ensure!(
                (info.split.as_str(), info.rank) == (bundle.manifest.split.as_str(), rank),
                "shard of another split or rank than cluster.json says"
            );
            let mut node = Node::load(&shard, || TractEngine::new(1)).await?;
            let member = network.join(rank, &info.split, node.sink());
            node.connect(Arc::new(member));
            Ok(node)
        };
        nodes.push(load.await.with_context(|| file.path.display().to_string())?);
    }
    let entry = nodes.iter().find(|node| node.is_entry()).context("no shard takes the input")?;
    let mut answers = Vec::with_capacity(questions.len());
    for question in questions {
        answers.push(entry.infer(question.clone(), within).await?.outputs);
    }
    for node in nodes {
        node.shutdown().await;
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_shares_of_the_largest_number() {
        let tensor = |data: &[f32]| Tensor::new(vec![1, data.len()], data.to_vec()).unwrap();
        let trial = Trial { inputs: Vec::new(), outputs: vec![tensor(&[10.0, -20.0])] };
        assert_eq!(trial.difference(&[tensor(&[10.0, -20.0])]), 0.0);
        assert_eq!(trial.difference(&[tensor(&[11.0, -20.0])]), 0.05);
        for wrong in [vec![], vec![tensor(&[10.0])], vec![tensor(&[f32::NAN, -20.0])]] {
            assert_eq!(trial.difference(&wrong), f32::INFINITY);
        }
    }
}
