//! Where the channels of each tensor belong: the result of finding groups, as data.
//!
//! A [`Layout`] says for one tensor whether it belongs to no group (stem and head), or into which
//! parts its channel axis falls, each of one group. Lowering reads layouts; it does not care how
//! they were found.

use std::fmt;

use crate::graph::GroupId;

/// A run of channels that belongs to one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Number of channels.
    pub channels: usize,
    /// Whose they are.
    pub group: GroupId,
}

/// How a tensor's channels fall into groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One piece of no group: the model's input, the stem, the head.
    Whole,
    /// Parts along the channel axis, in order.
    Parts(Vec<Part>),
}

impl Layout {
    /// `channels` cut evenly among `groups`, one part a group.
    pub(crate) fn even(channels: usize, groups: usize) -> Layout {
        let part = |group| Part { channels: channels / groups, group: GroupId(group) };
        Layout::Parts((0..groups).map(part).collect())
    }

    /// A single part: everything of one group.
    pub(crate) fn single(channels: usize, group: GroupId) -> Layout {
        Layout::Parts(vec![Part { channels, group }])
    }

    /// The parts; empty for a whole tensor.
    pub fn parts(&self) -> &[Part] {
        match self {
            Layout::Whole => &[],
            Layout::Parts(parts) => parts,
        }
    }

    /// Whether several groups share the tensor.
    pub(crate) fn is_shared(&self) -> bool {
        self.parts().len() > 1
    }

    /// The group, where it is only one.
    pub(crate) fn only_group(&self) -> Option<GroupId> {
        match self.parts() {
            [first, rest @ ..] if rest.iter().all(|part| part.group == first.group) => {
                Some(first.group)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            [] => f.write_str("whole"),
            parts => {
                let texts: Vec<String> =
                    parts.iter().map(|part| format!("{}:{}", part.group, part.channels)).collect();
                f.write_str(&texts.join(" "))
            }
        }
    }
}
