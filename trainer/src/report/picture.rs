//! A policy as a picture: groups as lanes, steps as columns, an arrow where a group sends to another.
//!
//! Takes a policy and gives an `<svg>` whose colours the page's style sheet sets (`lane`, `send`).

use std::fmt::Write as _;

use snn_schemas::Policy;

/// Draws `policy`.
pub(super) fn picture(policy: &Policy) -> String {
    let (lane, column, left) = (36, 96, 40);
    let width = left + column * policy.steps.len() + 10;
    let height = lane * policy.groups + 26;
    let y = |group: usize| 20 + lane * group + lane / 2;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"system-ui,sans-serif\" font-size=\"13\">\
<defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" markerUnits=\"userSpaceOnUse\" orient=\"auto\"><path class=\"head\" d=\"M0 0L8 4L0 8z\"/></marker></defs>\n"
    );
    for group in 0..policy.groups {
        let at = y(group);
        let _ = writeln!(
            svg,
            "<text x=\"4\" y=\"{}\">g{group}</text><line class=\"lane\" x1=\"{left}\" x2=\"{width}\" y1=\"{at}\" y2=\"{at}\"/>",
            at + 4
        );
    }
    for (index, step) in policy.steps.iter().enumerate() {
        let from = left + column * index + 14;
        let to = from + column - 28;
        let percent = policy.levels.percent(step.level);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"14\" text-anchor=\"middle\">t{index} · {percent}%</text>",
            (from + to) / 2
        );
        for (source, destination) in step.decision.sends() {
            let _ = writeln!(
                svg,
                "<line class=\"send\" x1=\"{from}\" y1=\"{}\" x2=\"{to}\" y2=\"{}\" stroke-width=\"{:.1}\" marker-end=\"url(#head)\"/>",
                y(source),
                y(destination),
                0.8 + percent / 80.0
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_drawn_with_an_arrow_a_send() {
        let policy = Policy::from_json(
            br#"{"version":1,"groups":4,"staleness":2,"decisions":[[7,4],0,12]}"#,
        )
        .unwrap();
        let svg = picture(&policy);
        assert_eq!(svg.matches("marker-end").count(), 4 + 3);
        assert!(svg.contains("t0 · 75%") && svg.contains(">g3</text>"));
    }
}
