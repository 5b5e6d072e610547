//! No damaged file makes the compiler panic: it gives a split or an error of one line.

use proptest::prelude::*;
use proptest::sample::Index;
use snn_compiler::{Nodes, Options, PolicySource, Source, compile};
use snn_schemas::Dtype;

use crate::fixtures::{Net, chain, residual, style};
use crate::policy;

/// Mutants in an ordinary run.
const CASES: u32 = 2_000;
/// Mutants in the run by hand.
const MANY_CASES: u32 = 100_000;

/// Small models that together have every kind of field: most bytes are structure, not weights.
fn models() -> Vec<(Net, Vec<u8>)> {
    let net = residual(2, &[1, 1], 4);
    let chain = chain(2, 2);
    let styles =
        ["burn", "old", "constants", "dynamo"].map(|name| (net.clone(), net.onnx(style(name))));
    styles.into_iter().chain([(chain.clone(), chain.onnx(style("latest")))]).collect()
}

/// Replaces bytes, then perhaps cuts the end off, or repeats a piece somewhere else.
fn damage(
    mut bytes: Vec<u8>,
    changes: &[(Index, u8)],
    moved: Option<(Index, Index, u8)>,
    end: Option<Index>,
) -> Vec<u8> {
    for (place, value) in changes {
        let place = place.index(bytes.len());
        bytes[place] = *value;
    }
    if let Some((from, to, length)) = moved {
        let from = from.index(bytes.len());
        let piece = bytes[from..(from + usize::from(length)).min(bytes.len())].to_vec();
        let to = to.index(bytes.len());
        bytes.splice(to..(to + piece.len()).min(bytes.len()), piece);
    }
    bytes.truncate(end.map_or(bytes.len(), |end| end.index(bytes.len())));
    bytes
}

fn changes() -> impl Strategy<Value = Vec<(Index, u8)>> {
    // Small numbers are what tags, lengths, axes and types look like.
    let value = prop_oneof![any::<u8>(), 0..32_u8];
    prop::collection::vec((any::<Index>(), value), 0..6)
}

fn moved() -> impl Strategy<Value = Option<(Index, Index, u8)>> {
    prop::option::weighted(0.2, (any::<Index>(), any::<Index>(), any::<u8>()))
}

fn end() -> impl Strategy<Value = Option<Index>> {
    prop::option::weighted(0.1, any::<Index>())
}

/// Compiles a model on several nodes and on one; errors are one line.
fn exercise(model: Vec<u8>, policy: &PolicySource) {
    let one_line = |error: &dyn std::error::Error| {
        let text = error.to_string();
        assert!(!text.contains('\n'), "{text}");
    };
    let source = match Source::from_bytes(model.into()) {
        Ok(source) => source,
        Err(error) => return one_line(&error),
    };
    for (policy, nodes) in [(Some(policy), Nodes::PerGroup), (None, Nodes::Even(1))] {
        let options = Options { nodes, ..Options::default() };
        match compile(&source, policy, &options) {
            Ok(split) => {
                for shard in &split.shards {
                    assert!(!shard.to_bytes().is_empty());
                }
            }
            Err(error) => one_line(&error),
        }
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn check_models(cases: u32) {
    let models = models();
    let policies: Vec<PolicySource> = models
        .iter()
        .map(|(net, _)| crate::policy_source(&policy(net, 1, Dtype::F16, 1)))
        .collect();
    let strategy = (0..models.len(), changes(), moved(), end());
    let mut runner = proptest::test_runner::TestRunner::new(config(cases));
    let result = runner.run(&strategy, |(which, changes, moved, end)| {
        let bytes = damage(models[which].1.clone(), &changes, moved, end);
        exercise(bytes, &policies[which]);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn damaged_models_give_errors() {
    check_models(CASES);
}

#[test]
#[ignore = "a longer run, by hand"]
fn many_damaged_models_give_errors() {
    check_models(MANY_CASES);
}

#[test]
fn damaged_policies_give_errors() {
    let net = residual(2, &[1, 1], 4);
    let source = Source::from_bytes(net.onnx(style("burn")).into()).expect("a model");
    let json = policy(&net, 1, Dtype::F16, 1).to_json().into_bytes();
    let mut runner = proptest::test_runner::TestRunner::new(config(CASES));
    let strategy = (changes(), moved(), end());
    let result = runner.run(&strategy, |(changes, moved, end)| {
        // Digits and brackets, so that some mutants stay JSON.
        let changes: Vec<_> = changes
            .iter()
            .map(|&(at, value)| (at, b"0123456789[]{},\"-e."[usize::from(value) % 19]))
            .collect();
        let bytes = damage(json.clone(), &changes[..changes.len().min(2)], moved, end);
        match PolicySource::from_bytes(&bytes) {
            Ok(policy) => {
                let options = Options::default();
                if let Err(error) = compile(&source, Some(&policy), &options) {
                    assert!(!error.to_string().contains('\n'), "{error}");
                }
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}
