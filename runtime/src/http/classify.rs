//! Pictures: from a body to the most likely classes.
//!
//! Takes what decodes pictures (a [`Picture`], which the libraries here do not know how to do) and an
//! answer; gives the largest values of the first output with their classes, where the model names as
//! many classes as the output has values.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};
use snn_schemas::metadata::CLASSES;

use crate::client::ClusterInfo;
use crate::{Answer, Tensor};

/// How many classes an answer names.
const TOP: usize = 5;

/// Turns a PNG or JPEG into the model's inputs, or says in one sentence why it cannot.
pub type Picture = Arc<dyn Fn(&Bytes, &ClusterInfo) -> Result<Vec<Tensor>, String> + Send + Sync>;

/// The most likely classes of an answer.
pub(super) fn top(answer: &Answer, info: &ClusterInfo) -> Value {
    let values = answer.outputs.first().map_or(&[][..], Tensor::data);
    let names = info.metadata.iter().find(|(key, _)| key == CLASSES).map(|(_, names)| names);
    let names: Vec<&str> =
        names.map(|names| names.split(',').map(str::trim).collect()).unwrap_or_default();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let entry = |&index: &usize| match names.get(index).filter(|_| names.len() == values.len()) {
        Some(class) => json!({ "index": index, "class": class, "value": values[index] }),
        None => json!({ "index": index, "value": values[index] }),
    };
    json!({
        "top": order.iter().take(TOP).map(entry).collect::<Vec<_>>(),
        "degraded": answer.degraded,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_with_their_names() {
        let outputs = vec![Tensor::new(vec![1, 3], vec![0.5, 2.0, -1.0]).unwrap()];
        let answer = Answer { outputs, degraded: false };
        let info = |classes: &str| ClusterInfo {
            split: String::new(),
            nodes: 1,
            inputs: vec![],
            outputs: vec![],
            metadata: vec![(CLASSES.into(), classes.into())],
        };
        let expected = r#"{"top":[{"index":1,"class":"dog","value":2.0},{"index":0,"class":"cat","value":0.5},{"index":2,"class":"ship","value":-1.0}],"degraded":false}"#;
        assert_eq!(top(&answer, &info("cat, dog,ship")).to_string(), expected);
        assert_eq!(top(&answer, &info("cat"))["top"][0], json!({ "index": 1, "value": 2.0 }));
    }
}
