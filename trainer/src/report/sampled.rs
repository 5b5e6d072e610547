//! What the controller sampled while it learned: for each step of a policy, how often each decision.
//!
//! Takes the lines of stage 2 and gives heat-maps: time from left to right, a row a decision (or a
//! level), the stronger the more often. A controller that settles shows as one strong row.

use snn_schemas::Decision;

use super::charts::Heat;
use crate::config::Config;
use crate::error::TrainError;
use crate::metrics::Line;
use crate::progress::Stage;

/// Bins of time: more would be narrower than the eye needs.
const BINS: usize = 30;
/// Rows of a heat-map; where there are more decisions, the rarest share one.
const ROWS: usize = 24;

/// The heat-maps of every search of a run.
pub(super) fn distributions(config: &Config, lines: &[Line]) -> Result<String, TrainError> {
    let main = config.exchange.search_levels;
    let mut html = String::new();
    for levels in [main, !main] {
        let of_search = |line: &&Line| {
            line.stage == Stage::Search && line.search_levels.unwrap_or(main) == levels
        };
        let found = lines.iter().filter(of_search).filter_map(|line| line.sampled.as_deref());
        let sampled: Vec<&[Vec<[usize; 2]>]> = found.collect();
        if sampled.len() > 1 {
            let title = if levels { "with sparsity levels" } else { "without sparsity levels" };
            html += &format!("<h3>Policies {title}</h3>\n<div class=\"curves\">\n");
            html += &heats(config, &sampled, levels)?;
            html.push_str("</div>\n");
        }
    }
    if html.is_empty() {
        return Ok(html);
    }
    let note = "<p class=\"note\">For each step of a policy, t0 first: which decisions (numbered as in the paper's Table 3; • every group sends) \
and which shares of the feature maps the controller sampled in stage 2, from its first step to its last. The stronger the colour the more often.</p>\n";
    Ok(format!("<h2>Sampled decisions</h2>\n{note}{html}"))
}

fn heats(
    config: &Config,
    sampled: &[&[Vec<[usize; 2]>]],
    levels: bool,
) -> Result<String, TrainError> {
    let names: Vec<String> = (0..config.exchange.levels.count)
        .map(|level| format!("{:.0} %", config.exchange.levels.percent(level)))
        .collect();
    let mut html = String::new();
    for step in 0..config.steps() {
        let (rows, row_of) = decision_rows(config.net.groups, sampled, step);
        let bins = shares(sampled, rows.len(), |policy| row_of(policy.get(step)?[0]));
        let title = format!("t{step}: decision");
        let steps = sampled.len();
        html.push_str("<div class=\"stack\">\n");
        html += &Heat { title: &title, rows: &rows, bins: &bins, steps }.draw()?;
        if levels {
            let bins = shares(sampled, names.len(), |policy| Some(policy.get(step)?[1]));
            let title = format!("t{step}: sent");
            html += &Heat { title: &title, rows: &names, bins: &bins, steps }.draw()?;
        }
        html.push_str("</div>\n");
    }
    Ok(html)
}

/// The rows of a step's decisions, and in which of them an id is counted.
fn decision_rows(
    groups: usize,
    sampled: &[&[Vec<[usize; 2]>]],
    step: usize,
) -> (Vec<String>, impl Fn(usize) -> Option<usize>) {
    let all = Decision::count(groups);
    let mut ids: Vec<usize> = (0..all).collect();
    if all > ROWS {
        let mut counts = vec![0_usize; all];
        let policies = sampled.iter().copied().flatten();
        let taken = policies.filter_map(|policy| Some(policy.get(step)?[0]));
        taken.filter(|&id| id < all).for_each(|id| counts[id] += 1);
        ids.sort_by_key(|&id| std::cmp::Reverse(counts[id]));
        ids.truncate(ROWS - 1);
        ids.sort_unstable();
    }
    let intensive =
        |id| Decision::from_id(id, groups).is_some_and(|decision| decision.is_intensive());
    let name = |&id: &usize| if intensive(id) { format!("• {id}") } else { id.to_string() };
    let mut rows: Vec<String> = ids.iter().map(name).collect();
    rows.extend((all > ROWS).then(|| "others".to_owned()));
    let others = rows.len() - 1;
    let row_of = move |id: usize| match ids.binary_search(&id) {
        Ok(row) => Some(row),
        Err(_) => (ids.len() == others && id < all).then_some(others),
    };
    (rows, row_of)
}

/// For each bin of time the share of the policies that fall into each row.
fn shares(
    sampled: &[&[Vec<[usize; 2]>]],
    rows: usize,
    row_of: impl Fn(&Vec<[usize; 2]>) -> Option<usize>,
) -> Vec<Vec<f64>> {
    let bins = BINS.min(sampled.len()).max(1);
    let share = |bin: usize| {
        let steps = bin * sampled.len() / bins..(bin + 1) * sampled.len() / bins;
        let mut counts = vec![0.0; rows];
        let mut all = 0.0_f64;
        for row in sampled[steps].iter().copied().flatten().filter_map(&row_of) {
            if let Some(count) = counts.get_mut(row) {
                *count += 1.0;
                all += 1.0;
            }
        }
        counts.iter_mut().for_each(|count| *count /= all.max(1.0));
        counts
    };
    (0..bins).map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: usize, sampled: Vec<Vec<[usize; 2]>>) -> Line {
        let search_levels = Some(true);
        Line { search_levels, sampled: Some(sampled), ..Line::new(Stage::Search, 1, number) }
    }

    #[test]
    fn shares_of_a_bin_add_up() {
        let early = vec![vec![[0, 8]], vec![[1, 8]]];
        let late = vec![vec![[2, 8]], vec![[2, 8]]];
        let sampled: Vec<&[Vec<[usize; 2]>]> = vec![&early, &late];
        let bins = shares(&sampled, 3, |policy| Some(policy[0][0]));
        assert_eq!(bins, [vec![0.5, 0.5, 0.0], vec![0.0, 0.0, 1.0]]);
    }

    #[test]
    fn of_many_decisions_the_rarest_share_a_row() {
        let policies: Vec<Vec<[usize; 2]>> = vec![vec![[5000, 0]], vec![[5000, 0]], vec![[7, 0]]];
        let sampled: Vec<&[Vec<[usize; 2]>]> = vec![&policies];
        let (rows, row_of) = decision_rows(8, &sampled, 0);
        assert_eq!((rows.len(), rows[23].as_str()), (24, "others"));
        let row = row_of(5000).unwrap();
        assert!(rows[row].ends_with("5000") && row < 23);
        assert_eq!((row_of(40_000), row_of(40_320)), (Some(23), None));
        let (rows, row_of) = decision_rows(4, &sampled, 0);
        assert_eq!((rows.len(), row_of(23), row_of(24)), (24, Some(23), None));
        assert_eq!((rows[7].as_str(), rows[12].as_str()), ("• 7", "12"));
    }

    #[test]
    fn searches_are_drawn_apart_and_runs_without_samples_not_at_all() {
        let config = Config::digits();
        let policy = || vec![[7, 4], [0, 8], [23, 0]];
        let mut lines: Vec<Line> = (1..=4).map(|number| line(number, vec![policy()])).collect();
        let html = distributions(&config, &lines).unwrap();
        assert_eq!(html.matches("<svg").count(), 6, "three steps, decisions and levels");
        assert_eq!(html.matches("<h3>").count(), 1);
        lines.iter_mut().for_each(|line| line.sampled = None);
        assert_eq!(distributions(&config, &lines).unwrap(), "");
    }
}
