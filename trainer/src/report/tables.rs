//! The results as tables in the form of the paper's Tables 2, 5 and 6.
//!
//! Takes the judged candidates and gives HTML. Costs are the paper's, and beside them, never mixed
//! with them, the bytes that really cross and the latency that the cost model predicts.

use std::fmt::Write as _;

use snn_schemas::{Dtype, Policy};

use super::{percent, sending};
use crate::candidate::{Candidate, Source};
use crate::config::{Config, Family, FinetuneConfig};
use crate::error::TrainError;
use crate::latency::latency;
use crate::run::Judged;

/// All three.
pub(super) fn tables(
    config: &Config,
    dataset: &str,
    judged: &[Judged],
) -> Result<String, TrainError> {
    let mut html = accuracies(config, dataset, judged);
    html += &transmission(config, judged)?;
    html += &decisions(judged);
    Ok(html)
}

/// What a row of the paper's tables would call a candidate.
fn method(config: &Config, candidate: &Candidate) -> String {
    let net = &config.net;
    let paths = match net.family {
        Family::ResNeXt => format!("{}×{}d", net.cardinality, net.path_width),
        Family::ResNet => format!("width {}", net.path_width),
    };
    if net.groups == 1 {
        return format!("{} ({paths})", net.title());
    }
    let (alpha, groups) = (config.exchange.staleness, net.groups);
    let mut name = format!("{} ({paths}, α = {alpha}, G = {groups})", net.title());
    name += match candidate.source {
        Source::Searched => "",
        Source::Random => ", random sampler",
        Source::Full => ", full exchange",
        Source::Silent => return name + ", no exchange",
    };
    if candidate.with_levels() {
        name += &format!(" + sparsification (K = {})", config.exchange.levels.count);
    }
    name + match candidate.dtype.unwrap_or_default() {
        Dtype::F32 => "",
        Dtype::F16 => " + Float16",
        Dtype::I8 => " + Int8",
        Dtype::I4 => " + Int4",
    }
}

/// What a candidate's fine-tuning has of its own.
fn tuning(config: &Config, candidate: &Candidate) -> String {
    match candidate.tuning(config) {
        alike if alike == config.finetune => String::new(),
        FinetuneConfig { epochs, lr, .. } => {
            format!(", epochs of fine-tuning: {epochs}, from {lr}")
        }
    }
}

/// Table 2.
fn accuracies(config: &Config, dataset: &str, judged: &[Judged]) -> String {
    let mut html = format!(
        "<h2>Accuracy</h2>\n<table><tr><th>policy</th><th class=\"left\">method</th><th>validation</th><th>test, {dataset}</th></tr>\n"
    );
    for judged in judged {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td class=\"left\">{}{}</td><td>{}</td><td>{}</td></tr>",
            judged.candidate.name,
            method(config, &judged.candidate),
            tuning(config, &judged.candidate),
            percent(judged.validation.accuracy()),
            percent(judged.test.accuracy()),
        );
    }
    html.push_str("</table>\n<p class=\"note\">As the paper's Table 2. All start from the same shared weights and are fine-tuned alike unless a row says otherwise, each under its own policy. \
Policies were chosen on validation images; the test images were judged once, at the end.</p>\n");
    html
}

/// Table 5.
fn transmission(config: &Config, judged: &[Judged]) -> Result<String, TrainError> {
    let Some(first) = judged.first().filter(|_| config.net.groups > 1) else {
        return Ok(String::new());
    };
    let ring = first.wire.ring_bytes;
    let mut html = format!(
        "<h2>Accuracy and transmission</h2>\n<table><tr><th>policy</th><th>test</th><th>paper cost</th><th>wire</th><th>bytes an image</th><th>latency</th></tr>\n\
<tr><td>ring all-reduce after every block</td><td>–</td><td>100.00 %</td><td>100.00 %</td><td>{}</td><td>–</td></tr>\n",
        grouped(ring)
    );
    for judged in judged {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.3} ms</td></tr>",
            judged.candidate.name,
            percent(judged.test.accuracy()),
            percent(judged.policy.paper_cost(config.net.blocks())),
            percent(judged.wire.fraction()),
            grouped(judged.wire.bytes),
            latency(config, &judged.policy)?,
        );
    }
    let _ = writeln!(
        html,
        "</table>\n<p class=\"note\">As the paper's Table 5. Paper cost: sends against a ring all-reduce after every block, whatever a tensor's size. \
Wire: bytes that really cross, without sends that no output needs, against the ring's in f32. Latency: predicted for nodes of {} with links of {}.</p>",
        config.search.device, config.search.link
    );
    Ok(html)
}

/// Table 6.
fn decisions(judged: &[Judged]) -> String {
    let rows: String = sending(judged)
        .map(|judged| {
            let decision = shorthand(&judged.policy);
            format!(
                "<tr><td>{}</td><td class=\"left\">{decision}</td></tr>\n",
                judged.candidate.name
            )
        })
        .collect();
    match rows.is_empty() {
        true => String::new(),
        false => format!(
            "<h2>Decisions</h2>\n<table><tr><th>policy</th><th class=\"left\">decision a step</th></tr>\n{rows}</table>\n\
<p class=\"note\">As the paper's Table 6: numbers of permutations in lexicographic order, with the sparsity level where one was chosen. \
<span class=\"intensive\">Red</span> are decisions in which every group sends.</p>\n"
        ),
    }
}

/// `[12, 12, 7]`, or `[[9, 4], [22, 6]]` where not everything is sent.
fn shorthand(policy: &Policy) -> String {
    let everything = policy.steps.iter().all(|step| step.level == policy.levels.full());
    let step = |step: &snn_schemas::Step| {
        let id = match step.decision.is_intensive() {
            true => format!("<span class=\"intensive\">{}</span>", step.decision.id()),
            false => step.decision.id().to_string(),
        };
        if everything { id } else { format!("[{id}, {}]", step.level) }
    };
    let steps: Vec<String> = policy.steps.iter().map(step).collect();
    format!("[{}]", steps.join(", "))
}

/// `4,653,056`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let separate = |(index, digit): (usize, char)| {
        let comma = index > 0 && (digits.len() - index).is_multiple_of(3);
        [comma.then_some(','), Some(digit)].into_iter().flatten()
    };
    digits.chars().enumerate().flat_map(separate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_are_written_as_table_6_writes_them() {
        let policy = |decisions: &str| {
            let json =
                format!(r#"{{"version":1,"groups":4,"staleness":2,"decisions":{decisions}}}"#);
            Policy::from_json(json.as_bytes()).unwrap()
        };
        let red = |id: usize| format!("<span class=\"intensive\">{id}</span>");
        assert_eq!(shorthand(&policy("[12,12,7]")), format!("[12, 12, {}]", red(7)));
        let sparse = shorthand(&policy("[[9,4],[22,6],[3,8]]"));
        assert_eq!(sparse, format!("[[{}, 4], [{}, 6], [3, 8]]", red(9), red(22)));
    }

    #[test]
    fn rows_are_called_as_in_the_papers_tables() {
        let config = Config::default();
        let candidate = |source| Candidate::new(source).resolved(&config);
        let searched = candidate(Source::Searched);
        assert_eq!(method(&config, &searched), "Sep-ResNeXt-56 (8×16d, α = 2, G = 4)");
        let sparse = Candidate { search_levels: Some(true), dtype: Some(Dtype::F16), ..searched };
        let expected = "Sep-ResNeXt-56 (8×16d, α = 2, G = 4) + sparsification (K = 9) + Float16";
        assert_eq!(method(&config, &sparse), expected);
        let silent = method(&config, &candidate(Source::Silent));
        assert_eq!(silent, "Sep-ResNeXt-56 (8×16d, α = 2, G = 4), no exchange");
    }

    #[test]
    fn thousands_are_told_apart() {
        assert_eq!([0, 999, 1000, 4_653_056].map(grouped), ["0", "999", "1,000", "4,653,056"]);
    }
}
