//! What of a policy's exchanges the classifier can feel: it reads the last blocks of the first groups,
//! mostly of group 0 alone.
//!
//! Takes a policy, the number of blocks of the trunk and that of groups read; gives [`Reach`], found by going
//! back from their last blocks. The compiler finds the same by dropping ops of the graph itself, whatever the
//! network; this is for those who know a separable network by its shapes only.

use crate::policy::Policy;

/// The sends that matter, and how far each group is computed for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Source and destination of each send whose features can still reach the classifier, by step.
    pub sends: Vec<Vec<(usize, usize)>>,
    /// For each group, how many blocks of the trunk it computes.
    pub blocks: Vec<usize>,
}

impl Reach {
    /// The reach of `policy` in a trunk of `blocks` blocks, of which the classifier reads the first
    /// `classified` groups, where `carries` says of a step whether its sends have any bytes.
    pub fn of(
        policy: &Policy,
        blocks: usize,
        classified: usize,
        carries: impl Fn(usize) -> bool,
    ) -> Reach {
        // Blocks whose output is needed with what is added to it, and blocks computed at all: with α = 1
        // a block's own features are sent before anything is added to them.
        let mut summed: Vec<usize> =
            (0..policy.groups).map(|group| if group < classified { blocks } else { 0 }).collect();
        let mut computed = summed.clone();
        let mut sends = vec![Vec::new(); policy.steps.len()];
        for step in (0..policy.steps.len()).rev().filter(|&step| carries(step)) {
            let (sent, added) = (policy.sent_after(step), policy.added_in(step));
            let all = policy.steps[step].decision.sends();
            sends[step] = all.filter(|&(_, to)| summed[to] > added).collect();
            for &(from, _) in &sends[step] {
                let needed = if sent == added { sent } else { sent + 1 };
                summed[from] = summed[from].max(needed);
                computed[from] = computed[from].max(sent + 1);
            }
        }
        Reach { sends, blocks: computed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Decision, Step};

    fn ring(staleness: usize, steps: usize) -> Policy {
        let step = Step::new(Decision::new(vec![1, 2, 3, 0]).unwrap(), 8);
        Policy { steps: vec![step; steps], ..Policy::silent(4, staleness, 0) }
    }

    /// The figures that the compiler's tests have for the same ring, on the graph itself.
    #[test]
    fn a_ring_reaches_group_0_from_ever_farther() {
        let reach = Reach::of(&ring(1, 5), 5, 1, |_| true);
        let sent: Vec<usize> = reach.sends.iter().map(Vec::len).collect();
        assert_eq!((sent, reach.blocks), (vec![4, 4, 3, 2, 1], vec![5, 3, 4, 5]));
    }

    #[test]
    fn a_block_is_computed_while_features_travel() {
        let reach = Reach::of(&ring(2, 2), 4, 1, |_| true);
        assert_eq!(reach.sends, [vec![(2, 3), (3, 0)], vec![(3, 0)]]);
        assert_eq!(reach.blocks, [4, 0, 1, 3]);
    }

    #[test]
    fn nothing_is_left_out_where_every_group_is_read() {
        let reach = Reach::of(&ring(2, 2), 4, 4, |_| true);
        let all: Vec<_> = ring(2, 2).steps[0].decision.sends().collect();
        assert_eq!(reach.sends, vec![all; 2]);
        assert_eq!(reach.blocks, [4; 4]);
    }

    #[test]
    fn steps_without_bytes_reach_nobody() {
        let reach = Reach::of(&ring(2, 2), 4, 1, |step| step == 0);
        assert_eq!(reach.sends, [vec![(3, 0)], vec![]]);
        assert_eq!(reach.blocks, [4, 0, 0, 1]);
    }
}
