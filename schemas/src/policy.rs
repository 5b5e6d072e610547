//! The communication policy: who sends to whom, when, and how much (`best.json`).
//!
//! Takes the JSON of a policy file in either of its two forms (`steps`, or the `decisions`
//! shorthand of the paper's Table 6) and gives a [`Policy`] whose every rule has been checked:
//! each step is a permutation of the groups, each level exists, both forms agree on one meaning.
//! Decisions are numbered as in the paper's Table 3, levels as in its Table 4.
//! Writing a policy and reading it back gives the same policy.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::MAX_GROUPS;
use crate::codec::{Codec, Packing};

/// The only version of the policy file there is so far.
pub const POLICY_VERSION: u32 = 1;

/// Largest policy file accepted, in bytes: far above any real policy, small enough to parse at once.
pub const MAX_POLICY_BYTES: usize = 4 << 20;

/// Most sparsity levels a policy may define: one a channel of the widest networks in use.
const MAX_LEVELS: usize = 4096;

/// Element type of the features while they travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit IEEE 754, as computed.
    #[default]
    F32,
    /// 16-bit IEEE 754, rounded to nearest even before sending and widened on arrival.
    F16,
    /// 8-bit codes with a scale a channel: see [`crate::codec`].
    I8,
    /// 4-bit codes with a scale a channel.
    I4,
}

impl Dtype {
    /// Bits one element takes.
    pub fn bits(self) -> usize {
        match self {
            Dtype::F32 => 32,
            Dtype::F16 => 16,
            Dtype::I8 => 8,
            Dtype::I4 => 4,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::I8 => "i8",
            Dtype::I4 => "i4",
        })
    }
}

impl std::str::FromStr for Dtype {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Dtype, PolicyError> {
        match text {
            "f32" => Ok(Dtype::F32),
            "f16" => Ok(Dtype::F16),
            "i8" => Ok(Dtype::I8),
            "i4" => Ok(Dtype::I4),
            other => Err(PolicyError::Dtype { found: other.to_owned() }),
        }
    }
}

/// The sparsity levels a policy chooses from: evenly spaced from `min_percent` to 100 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Levels {
    /// Number of levels, at least 1. A single level means 100 %.
    #[schemars(range(min = 1, max = 4096))]
    pub count: usize,
    /// Percentage of the feature maps that level 0 sends, 0 to 100.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub min_percent: f64,
}

impl Default for Levels {
    /// The paper's Table 4: nine levels from 50 % to 100 %.
    fn default() -> Levels {
        Levels { count: 9, min_percent: 50.0 }
    }
}

impl Levels {
    /// The level at which everything is sent.
    pub fn full(&self) -> usize {
        self.count - 1
    }

    /// Percentage of the feature maps that `level` sends.
    ///
    /// Equation 10 with the divisor of Table 4: `p = p_min + k · (100 − p_min) / (levels − 1)`.
    pub fn percent(&self, level: usize) -> f64 {
        if level >= self.full() {
            return 100.0;
        }
        self.min_percent + level as f64 * (100.0 - self.min_percent) / self.full() as f64
    }

    /// How many of `channels` feature maps `level` sends: `⌊channels · p / 100⌋`.
    pub fn keep(&self, level: usize, channels: usize) -> usize {
        // The tolerance keeps a percentage such as 100/3 · 3 from losing a whole channel to rounding.
        let kept = (channels as f64 * self.percent(level) / 100.0 + 1e-9).floor() as usize;
        kept.min(channels)
    }
}

/// A step's permutation: group `i` sends to `send_to()[i]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision(Vec<usize>);

impl Decision {
    /// Checks that `send_to` is a permutation of `0 … len − 1`.
    pub fn new(send_to: Vec<usize>) -> Result<Decision, PolicyError> {
        let mut seen = vec![false; send_to.len()];
        for &destination in &send_to {
            match seen.get_mut(destination) {
                Some(slot) if !*slot => *slot = true,
                _ => return Err(PolicyError::NotAPermutation { found: send_to }),
            }
        }
        Ok(Decision(send_to))
    }

    /// The decision in which every group keeps its features to itself.
    pub fn silent(groups: usize) -> Decision {
        Decision((0..groups).collect())
    }

    /// How many decisions there are: `groups!`.
    pub fn count(groups: usize) -> usize {
        (1..=groups).product()
    }

    /// The decision with number `id` in lexicographic order, or `None` past the last.
    ///
    /// With four groups 7 is `[1,0,3,2]` and 23 is `[3,2,1,0]` (Table 3).
    pub fn from_id(id: usize, groups: usize) -> Option<Decision> {
        if id >= Decision::count(groups) {
            return None;
        }
        let mut free: Vec<usize> = (0..groups).collect();
        let mut rest = id;
        let send_to = (0..groups)
            .rev()
            .map(|after| {
                let stride = Decision::count(after);
                let pick = free.remove(rest / stride);
                rest %= stride;
                pick
            })
            .collect();
        Some(Decision(send_to))
    }

    /// The number of this decision in lexicographic order.
    pub fn id(&self) -> usize {
        let mut free: Vec<usize> = (0..self.0.len()).collect();
        let mut id = 0;
        for (position, destination) in self.0.iter().enumerate() {
            let rank = free.partition_point(|candidate| candidate < destination);
            free.remove(rank);
            id += rank * Decision::count(self.0.len() - 1 - position);
        }
        id
    }

    /// Destination of each group's tensor.
    pub fn send_to(&self) -> &[usize] {
        &self.0
    }

    /// The groups that really send, with their destinations, in group order.
    pub fn sends(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.0.iter().copied().enumerate().filter(|(from, to)| from != to)
    }

    /// Whether every group sends to another one (the paper's *communication-intensive*).
    pub fn is_intensive(&self) -> bool {
        self.sends().count() == self.0.len()
    }
}

/// One round of exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Who sends to whom.
    pub decision: Decision,
    /// Sparsity level, an index into the policy's [`Levels`].
    pub level: usize,
    /// How this step's features travel, where that is not the policy's default.
    pub wire: Wire,
}

/// How features travel, as far as a step says so itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wire {
    /// Element type.
    pub dtype: Option<Dtype>,
    /// What becomes of zeros.
    pub packing: Option<Packing>,
}

impl Step {
    /// A step whose features travel as the policy's default says.
    pub fn new(decision: Decision, level: usize) -> Step {
        Step { decision, level, wire: Wire::default() }
    }
}

/// A checked communication policy for one network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "PolicyFile", try_from = "PolicyFile")]
pub struct Policy {
    /// G, the number of groups.
    pub groups: usize,
    /// α, the number of blocks computed per exchange.
    pub staleness: usize,
    /// Element type on the wire, where a step names none.
    pub dtype: Dtype,
    /// What becomes of zeros on the wire, where a step does not say.
    pub packing: Packing,
    /// The sparsity levels that `steps` refer to.
    pub levels: Levels,
    /// One entry a step, first step first.
    pub steps: Vec<Step>,
    /// Where the policy came from (seed, search settings, measured accuracy); carried, never read.
    pub provenance: Option<serde_json::Map<String, serde_json::Value>>,
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// One sentence that says which step is wrong and what was expected.
    pub fn from_json(json: &[u8]) -> Result<Policy, PolicyError> {
        if json.len() > MAX_POLICY_BYTES {
            return Err(PolicyError::TooLarge { bytes: json.len() });
        }
        let file: PolicyFile = serde_json::from_slice(json).map_err(PolicyError::Json)?;
        Policy::try_from(file)
    }

    /// Writes the `steps` form, indented, with a final newline.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// A policy of `steps` silent steps: nothing is ever exchanged.
    pub fn silent(groups: usize, staleness: usize, steps: usize) -> Policy {
        let levels = Levels::default();
        let step = Step::new(Decision::silent(groups), levels.full());
        Policy {
            groups,
            staleness,
            dtype: Dtype::F32,
            packing: Packing::None,
            levels,
            steps: vec![step; steps],
            provenance: None,
        }
    }

    /// Number of steps a trunk of `blocks` blocks allows: `⌊B / α⌋`.
    pub fn steps_for(blocks: usize, staleness: usize) -> usize {
        blocks / staleness
    }

    /// The block (counted from 0) whose output step `step` sends: block `t·α + 1` of the paper.
    pub fn sent_after(&self, step: usize) -> usize {
        step * self.staleness
    }

    /// The block (counted from 0) to whose sum step `step` is added: block `t·α + α` of the paper.
    pub fn added_in(&self, step: usize) -> usize {
        (step + 1) * self.staleness - 1
    }

    /// Element type of step `step` on the wire.
    pub fn dtype_of(&self, step: usize) -> Dtype {
        self.steps[step].wire.dtype.unwrap_or(self.dtype)
    }

    /// What becomes of zeros in step `step`.
    pub fn packing_of(&self, step: usize) -> Packing {
        self.steps[step].wire.packing.unwrap_or(self.packing)
    }

    /// How step `step` travels where what closes a block is a ReLU's, so never below zero.
    pub fn codec_of(&self, step: usize) -> Codec {
        Codec { dtype: self.dtype_of(step), signed: false, packing: self.packing_of(step) }
    }

    /// Bytes of one send of step `step`, at most where zeros are packed; `shape` is that of a group's
    /// whole tensor, `[1, channels, …]`. A level that rounds down to no channel sends nothing.
    pub fn send_bytes(&self, step: usize, shape: &[usize]) -> u64 {
        self.sent(step, shape, Codec::bytes)
    }

    /// The bytes that such a send mostly has, as [`Codec::likely_bytes`] reckons them.
    pub fn likely_send_bytes(&self, step: usize, shape: &[usize]) -> u64 {
        self.sent(step, shape, Codec::likely_bytes)
    }

    /// Elements that such a send has.
    pub fn sent_elements(&self, step: usize, shape: &[usize]) -> u64 {
        self.sent(step, shape, |_, kept| Some(kept.iter().product()))
    }

    fn sent(
        &self,
        step: usize,
        shape: &[usize],
        bytes: impl Fn(&Codec, &[usize]) -> Option<usize>,
    ) -> u64 {
        let mut shape = shape.to_vec();
        if let Some(channels) = shape.get_mut(1) {
            *channels = self.levels.keep(self.steps[step].level, *channels);
        }
        match shape.contains(&0) {
            true => 0,
            false => bytes(&self.codec_of(step), &shape).unwrap_or(0) as u64,
        }
    }

    /// The paper's communication cost, as a fraction of a ring all-reduce after every block.
    ///
    /// `(Σ_t senders_t · p_t) / (2(G − 1) · B)`, halved for f16 (Tables 5 and 6). It counts sends
    /// and ignores how large the tensors are. The paper knows no i8 and i4; here a step in them counts
    /// a quarter and an eighth, scales and packing ignored like sizes.
    pub fn paper_cost(&self, blocks: usize) -> f64 {
        let sent = |(index, step): (usize, &Step)| {
            let width = self.dtype_of(index).bits() as f64 / Dtype::F32.bits() as f64;
            step.decision.sends().count() as f64 * self.levels.percent(step.level) * width
        };
        let sent: f64 = self.steps.iter().enumerate().map(sent).sum();
        let ring = 2.0 * (self.groups as f64 - 1.0) * blocks as f64;
        if ring > 0.0 { sent / 100.0 / ring } else { 0.0 }
    }
}

/// The policy file as it is written: both forms, nothing checked yet.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    title = "snn policy",
    description = "Which group sends its features to which, when, and how much of them.",
    extend("oneOf" = [{ "required": ["steps"] }, { "required": ["decisions"] }])
)]
pub struct PolicyFile {
    /// Version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    version: u32,
    /// G, the number of groups, 2 to 8.
    #[schemars(range(min = 2, max = 8))]
    groups: usize,
    /// α, blocks computed per exchange, at least 1.
    #[schemars(range(min = 1))]
    staleness: usize,
    /// Element type on the wire, where a step names none.
    #[serde(default)]
    dtype: Dtype,
    /// What becomes of zeros on the wire, where a step does not say: `none` or `zeros`.
    #[serde(default, skip_serializing_if = "Packing::is_none")]
    packing: Packing,
    /// Sparsity levels; nine from 50 % to 100 % when absent.
    #[serde(default)]
    levels: Levels,
    /// One entry a step. Either this or `decisions`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<StepFile>>,
    /// Shorthand: a decision's number, or `[number, level]`. Either this or `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    decisions: Option<Vec<Shorthand>>,
    /// Free object: where the policy came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    provenance: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct StepFile {
    /// Destination of each group's tensor: a permutation of 0 … G − 1.
    send_to: Vec<usize>,
    /// Sparsity level; everything is sent when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    level: Option<usize>,
    /// Element type on the wire; the policy's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<Dtype>,
    /// What becomes of zeros on the wire; as the policy says when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    packing: Option<Packing>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Shorthand {
    /// Number of the decision, in lexicographic order.
    Id(usize),
    /// Number of the decision, and its sparsity level.
    IdAndLevel(usize, usize),
}

impl From<Policy> for PolicyFile {
    fn from(policy: Policy) -> PolicyFile {
        let steps = policy
            .steps
            .into_iter()
            .map(|Step { decision, level, wire: Wire { dtype, packing } }| StepFile {
                send_to: decision.0,
                level: Some(level),
                dtype,
                packing,
            })
            .collect();
        PolicyFile {
            version: POLICY_VERSION,
            groups: policy.groups,
            staleness: policy.staleness,
            dtype: policy.dtype,
            packing: policy.packing,
            levels: policy.levels,
            steps: Some(steps),
            decisions: None,
            provenance: policy.provenance,
        }
    }
}

impl TryFrom<PolicyFile> for Policy {
    type Error = PolicyError;

    fn try_from(file: PolicyFile) -> Result<Policy, PolicyError> {
        let PolicyFile { version, groups, staleness, dtype, packing, levels, .. } = file;
        if version != POLICY_VERSION {
            return Err(PolicyError::Version { found: version });
        }
        if !(2..=MAX_GROUPS).contains(&groups) {
            return Err(PolicyError::Groups { found: groups });
        }
        if staleness == 0 {
            return Err(PolicyError::Staleness);
        }
        if packing == Packing::Pixels {
            return Err(PolicyError::Pixels);
        }
        let percent_fits = (0.0..=100.0).contains(&levels.min_percent);
        if !(1..=MAX_LEVELS).contains(&levels.count) || !percent_fits {
            return Err(PolicyError::Levels { count: levels.count, percent: levels.min_percent });
        }
        let raw: Vec<(Result<Decision, PolicyError>, Option<usize>, Wire)> =
            match (file.steps, file.decisions) {
                (Some(steps), None) => steps
                    .into_iter()
                    .map(|StepFile { send_to, level, dtype, packing }| {
                        (Decision::new(send_to), level, Wire { dtype, packing })
                    })
                    .collect(),
                (None, Some(decisions)) => decisions
                    .into_iter()
                    .map(|shorthand| {
                        let (id, level) = match shorthand {
                            Shorthand::Id(id) => (id, None),
                            Shorthand::IdAndLevel(id, level) => (id, Some(level)),
                        };
                        let known = Decision::from_id(id, groups);
                        (
                            known.ok_or(PolicyError::DecisionId { id, groups }),
                            level,
                            Wire::default(),
                        )
                    })
                    .collect(),
                _ => return Err(PolicyError::Form),
            };
        let steps = raw
            .into_iter()
            .enumerate()
            .map(|(index, (decision, level, wire))| {
                match wire.packing {
                    Some(Packing::Pixels) => Err(PolicyError::Pixels),
                    _ => check_step(decision, level, groups, &levels),
                }
                .map(|step| Step { wire, ..step })
                .map_err(|reason| PolicyError::Step { step: index, reason: Box::new(reason) })
            })
            .collect::<Result<Vec<Step>, PolicyError>>()?;
        Ok(Policy { groups, staleness, dtype, packing, levels, steps, provenance: file.provenance })
    }
}

fn check_step(
    decision: Result<Decision, PolicyError>,
    level: Option<usize>,
    groups: usize,
    levels: &Levels,
) -> Result<Step, PolicyError> {
    let decision = decision?;
    if decision.0.len() != groups {
        return Err(PolicyError::Length { found: decision.0.len(), groups });
    }
    let level = level.unwrap_or(levels.full());
    if level >= levels.count {
        return Err(PolicyError::Level { found: level, last: levels.full() });
    }
    Ok(Step::new(decision, level))
}

/// Why a policy file is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Not JSON, a missing or unknown key, or a value of the wrong type.
    #[error("{0}")]
    Json(#[source] serde_json::Error),
    /// The file is larger than [`MAX_POLICY_BYTES`].
    #[error("{bytes} bytes are more than the {MAX_POLICY_BYTES} a policy may have")]
    TooLarge {
        /// Size of the file.
        bytes: usize,
    },
    /// Made for a newer or an unknown format.
    #[error("version {found}, expected {POLICY_VERSION}")]
    Version {
        /// The file's version.
        found: u32,
    },
    /// The number of groups is out of range.
    #[error("groups: {found}, expected 2 to {MAX_GROUPS}")]
    Groups {
        /// The file's value.
        found: usize,
    },
    /// Staleness 0 would add a tensor before it is sent.
    #[error("staleness: 0, expected at least 1")]
    Staleness,
    /// The sparsity levels make no sense.
    #[error(
        "levels: count {count}, min_percent {percent}, expected count 1 to {MAX_LEVELS} and min_percent 0 to 100"
    )]
    Levels {
        /// The file's number of levels.
        count: usize,
        /// The file's lowest percentage.
        percent: f64,
    },
    /// Neither form is present, or both.
    #[error("expected exactly one of \"steps\" and \"decisions\"")]
    Form,
    /// The element type is none of ours.
    #[error("dtype \"{found}\", expected \"f32\", \"f16\", \"i8\" or \"i4\"")]
    Dtype {
        /// The name that was given.
        found: String,
    },
    /// Features are no pictures.
    #[error("packing \"pixels\", expected \"none\" or \"zeros\"")]
    Pixels,
    /// Something is wrong with one step.
    #[error("step {step}: {reason}")]
    Step {
        /// Which step, counted from 0.
        step: usize,
        /// What is wrong with it.
        #[source]
        reason: Box<PolicyError>,
    },
    /// Two groups share a destination, or a destination does not exist.
    #[error("send_to {found:?} is not a permutation of 0 to {}", found.len().saturating_sub(1))]
    NotAPermutation {
        /// The list that was given.
        found: Vec<usize>,
    },
    /// The permutation is for another number of groups.
    #[error("send_to has {found} entries, expected {groups}, one a group")]
    Length {
        /// Entries given.
        found: usize,
        /// Entries expected.
        groups: usize,
    },
    /// No decision has this number.
    #[error("decision {id}, expected 0 to {}", Decision::count(*groups) - 1)]
    DecisionId {
        /// The number that was given.
        id: usize,
        /// The policy's groups.
        groups: usize,
    },
    /// No level has this number.
    #[error("level {found}, expected 0 to {last}")]
    Level {
        /// The level that was given.
        found: usize,
        /// The highest level there is.
        last: usize,
    },
}
