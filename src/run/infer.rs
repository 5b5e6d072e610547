//! `snn-run infer`: asks a running cluster, at the address of any of its nodes.
//!
//! Takes [`args::Infer`]; reads the input as the cluster's model wants it, asks for every batch in it,
//! once or as often as is wanted, and prints the most likely classes, or the largest values where the model
//! names no classes. With `--trace` all nodes record meanwhile.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use snn_runtime::client::{Client, ClusterInfo};
use snn_runtime::{Answer, Tensor};
use snn_schemas::manifest::Port;
use snn_schemas::metadata::{CLASSES, Normalisation};

use super::input::{self, Array, InputSpec};
use super::{args, report, trace};

/// How many classes are printed of each answer.
const TOP: usize = 5;
/// How many answers are printed one by one; beyond, `--output` or `--json` serve better.
const PRINTED_ANSWERS: usize = 20;

/// Runs `snn-run infer`.
pub(super) async fn infer(infer: args::Infer) -> Result<ExitCode> {
    tokio::select! {
        done = run(&infer) => done,
        stopped = super::interrupted() => {
            stopped?;
            bail!("{}: interrupted", infer.node.join(", "))
        }
    }
}

async fn run(infer: &args::Infer) -> Result<ExitCode> {
    let node = || infer.node.join(", ");
    let deadline = Instant::now() + infer.timeout;
    let key = infer.key.as_deref().map(crate::key::read).transpose()?;
    // What can be seen to be wrong is said before anybody is asked.
    let found = std::fs::metadata(&infer.input);
    found.context("input").with_context(|| infer.input.display().to_string())?;
    for (path, what) in [(&infer.output, "output"), (&infer.trace, "trace")] {
        path.as_deref().map(super::check_place).transpose().context(what)?;
    }
    let connected = Client::connect(&infer.node, key.as_ref(), left(deadline)).await;
    let client = connected.context("connect").with_context(node)?;
    let info = client.info();
    let spec = input_spec(&info.inputs, &info.metadata).context("model").with_context(node)?;
    let requests = input::read(&infer.input, &spec)
        .context("input")
        .with_context(|| infer.input.display().to_string())?;
    let repeat = infer.repeat as usize;
    let asking = answers(&client, &requests, repeat, deadline);
    let (outputs, degraded) = match &infer.trace {
        Some(path) => {
            let (answers, lanes) = trace::record(&client, asking).await.with_context(node)?;
            trace::write(&lanes, path)?;
            answers
        }
        None => asking.await.with_context(node)?,
    };
    let output = report::stack(outputs).context("output")?;
    if let Some(path) = &infer.output {
        let written = input::write_npy(path, &output);
        written.context("output").with_context(|| path.display().to_string())?;
    }
    let classes = class_names(client.info());
    client.close().await;
    if degraded > 0 {
        let all = requests.len() * repeat;
        let what = "some tensors were not waited for";
        super::progress(format_args!("{degraded} of {all} answers are degraded: {what}"));
    }
    match infer.json {
        true => super::print(answer_json(&output, &classes, degraded))?,
        false => super::print(answer_text(&output, &classes))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Asks a cluster for every request, `repeat` times over; gives the outputs of the last time, and how many
/// of all answers are degraded.
async fn answers(
    client: &Client,
    requests: &[Array],
    repeat: usize,
    deadline: Instant,
) -> Result<(Vec<Array>, usize)> {
    let mut outputs = Vec::with_capacity(requests.len());
    let mut degraded = 0;
    for _ in 0..repeat {
        outputs.clear();
        for request in requests {
            let answer = ask(client, std::slice::from_ref(request), left(deadline)).await;
            let answer = answer.context("infer")?;
            degraded += usize::from(answer.degraded);
            outputs.push(single(arrays(answer))?);
        }
    }
    Ok((outputs, degraded))
}

/// Asks a cluster once.
pub(super) async fn ask(client: &Client, inputs: &[Array], within: Duration) -> Result<Answer> {
    let inputs = inputs
        .iter()
        .map(|array| Tensor::new(array.shape.clone(), array.data.clone()).context("input"))
        .collect::<Result<Vec<Tensor>>>()?;
    Ok(client.infer(inputs, within).await?)
}

/// The outputs of an answer, in the model's order.
pub(super) fn arrays(answer: Answer) -> Vec<Array> {
    let array = |tensor: Tensor| {
        let (shape, data) = tensor.into_parts();
        Array { shape, data }
    };
    answer.outputs.into_iter().map(array).collect()
}

/// The only output of an answer.
pub(super) fn single(mut outputs: Vec<Array>) -> Result<Array> {
    let count = outputs.len();
    ensure!(count == 1, "the model has {count} outputs, expected 1");
    Ok(outputs.remove(0))
}

/// What a model of these inputs and this metadata takes.
///
/// # Errors
/// The model has several inputs, or its normalisation is none.
pub fn input_spec(inputs: &[Port], metadata: &[(String, String)]) -> Result<InputSpec> {
    let [input] = inputs else {
        bail!("the model has {} inputs, expected 1", inputs.len());
    };
    let channels = input.shape.get(1).copied().unwrap_or(1);
    let normalisation = Normalisation::read(|key| entry(metadata, key), channels)?;
    Ok(InputSpec { shape: input.shape.clone(), normalisation })
}

fn entry<'a>(metadata: &'a [(String, String)], key: &str) -> Option<&'a str> {
    metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

/// Names of the classes, in output order; none where the metadata has none.
pub fn class_names(info: &ClusterInfo) -> Vec<String> {
    let names = entry(&info.metadata, CLASSES).unwrap_or_default();
    names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The indices of the largest numbers, largest first.
fn largest(row: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order.truncate(TOP);
    order
}

fn rows(output: &Array) -> impl Iterator<Item = &[f32]> {
    let count = output.shape.first().copied().unwrap_or(1).max(1);
    output.data.chunks((output.data.len() / count).max(1))
}

/// Names only where there is one for every number of the row.
fn name(classes: &[String], row: &[f32], index: usize) -> Option<String> {
    classes.get(index).filter(|_| classes.len() == row.len()).cloned()
}

fn answer_text(output: &Array, classes: &[String]) -> String {
    let mut lines = Vec::new();
    let count = rows(output).count();
    for (number, row) in rows(output).enumerate().take(PRINTED_ANSWERS) {
        if count > 1 {
            lines.push(format!("input {number}:"));
        }
        for index in largest(row) {
            let label = name(classes, row, index).unwrap_or(format!("[{index}]"));
            lines.push(format!("{:>10.4}  {label}", row[index]));
        }
    }
    if count > PRINTED_ANSWERS {
        lines.push(format!("and {} more", count - PRINTED_ANSWERS));
    }
    lines.join("\n")
}

fn answer_json(output: &Array, classes: &[String], degraded: usize) -> Value {
    let answer = |row: &[f32]| -> Value {
        let entry = |index: usize| match name(classes, row, index) {
            Some(class) => json!({ "index": index, "class": class, "value": row[index] }),
            None => json!({ "index": index, "value": row[index] }),
        };
        largest(row).into_iter().map(entry).collect()
    };
    let top: Vec<Value> = rows(output).map(answer).collect();
    json!({ "shape": output.shape, "top": top, "degraded": degraded })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_name_classes_only_where_there_is_one_for_each_number() {
        let output = Array { shape: vec![1, 3], data: vec![0.5, 2.0, -1.0] };
        let classes = ["cat", "dog", "ship"].map(str::to_owned);
        assert_eq!(
            answer_text(&output, &classes),
            "    2.0000  dog\n    0.5000  cat\n   -1.0000  ship"
        );
        assert_eq!(answer_text(&output, &classes[..2]).lines().next(), Some("    2.0000  [1]"));
        let expected = r#"{"shape":[1,3],"top":[[{"index":1,"class":"dog","value":2.0},{"index":0,"class":"cat","value":0.5},{"index":2,"class":"ship","value":-1.0}]],"degraded":0}"#;
        assert_eq!(answer_json(&output, &classes, 0).to_string(), expected);
    }
}
