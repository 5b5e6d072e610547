//! What a placement costs in time: a prediction from a device, a link and what each node does.
//!
//! Takes a [`Device`] (operations a second), a [`Link`] (bits a second, round trip) and a [`Plan`], the
//! order in which each node computes, sends and receives; gives a [`Prediction`]: latency, each node's
//! time in computing and in waiting, and when each transfer leaves, arrives and is wanted. A plan comes
//! from a manifest ([`Plan::of_manifest`]) or, before anything is compiled, from a [`Trunk`] and a policy.
//!
//! The timing is the paper's. A node does one thing after another. A send joins the queue of the node's
//! outgoing link, which carries one tensor after another at the link's rate; the receiver's incoming link does
//! the same. Links are full duplex. A tensor arrives half a round trip after its last bit has left; a receive
//! waits until then. Of a device known by its speed alone nothing else takes time, so the prediction is what a
//! perfect runtime reaches. Where its profile says how fast it takes features out and adds them
//! ([`Device::gbytes`]), each exchange costs both nodes that time too. Pure arithmetic: the same input gives the
//! same figures.

use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::codec::LIKELY_ZEROS;
use crate::policy::Dtype;
use crate::{Manifest, Policy, Reach};

/// Bytes of Ethernet, IP and TCP headers around each full packet of 1448 bytes of payload, as a traffic
/// shaper and an interface's counters count them (14 + 20 + 32).
const PACKET_OVERHEAD: f64 = 66.0 / 1448.0;

/// Bits a second of a link on which only travel takes time: a gigabyte in eight nanoseconds.
const UNLIMITED: f64 = 1e18;

/// A computing device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Device {
    /// Floating-point operations of convolutions a second, in 10⁹, a multiply-add as two.
    pub gflops: f64,
    /// Bytes of f32 features a second, in 10⁹, that the device takes out of its trunk to send them, or adds to
    /// it when it has received them. That takes no time where it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gbytes: Option<f64>,
}

impl Device {
    /// A device of this many GFLOP/s.
    ///
    /// # Errors
    /// No number above 0.
    pub fn new(gflops: f64) -> Result<Device, CostError> {
        match gflops.is_finite() && gflops > 0.0 {
            true => Ok(Device { gflops, gbytes: None }),
            false => Err(CostError::Device { found: format!("{gflops} GFLOP/s") }),
        }
    }

    /// Reads a profile as `snn-run --profile --json` writes it; what else it holds is ignored.
    ///
    /// # Errors
    /// Not JSON, or no speed in it.
    pub fn from_json(json: &[u8]) -> Result<Device, CostError> {
        let device: Device = serde_json::from_slice(json).map_err(CostError::Json)?;
        let sound = |gbytes: &f64| gbytes.is_finite() && *gbytes > 0.0;
        Ok(Device { gbytes: device.gbytes.filter(sound), ..Device::new(device.gflops)? })
    }

    /// Seconds for this many operations.
    pub fn seconds(&self, flops: u64) -> f64 {
        flops as f64 / (self.gflops * 1e9)
    }

    /// Seconds in which this many elements are taken out to be sent, or added once received.
    pub fn moving(&self, elements: u64) -> f64 {
        self.gbytes.map_or(0.0, |gbytes| 4.0 * elements as f64 / (gbytes * 1e9))
    }
}

/// `5gflops`, `800mflops`, `1.2tflops`.
impl FromStr for Device {
    type Err = CostError;

    fn from_str(text: &str) -> Result<Device, CostError> {
        let units = [("gflops", 1.0), ("mflops", 1e-3), ("tflops", 1e3)];
        let gflops = quantity(text, &units);
        let gflops = gflops.ok_or_else(|| CostError::Device { found: text.to_owned() })?;
        Device::new(gflops)
    }
}

/// A device's link to the others, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Bits a second in each direction, headers included.
    pub bits_per_second: f64,
    /// Time there and back of an empty packet.
    pub round_trip: Duration,
}

impl Link {
    /// How long `bytes` of payload occupy the link.
    pub fn occupied(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(self.seconds(bytes))
    }

    fn seconds(&self, bytes: u64) -> f64 {
        8.0 * bytes as f64 * (1.0 + PACKET_OVERHEAD) / self.bits_per_second
    }

    fn half(&self) -> f64 {
        self.round_trip.as_secs_f64() / 2.0
    }
}

/// `300mbit,0.3ms`, `1gbit` (no round trip), `unlimited,2ms`.
impl FromStr for Link {
    type Err = CostError;

    fn from_str(text: &str) -> Result<Link, CostError> {
        let wrong = || CostError::Link { found: text.to_owned() };
        let (rate, travel) = text.split_once(',').unwrap_or((text, "0ms"));
        let bits_per_second = match rate.trim() {
            "unlimited" => UNLIMITED,
            rate => {
                let units = [("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];
                quantity(rate, &units).filter(|&bits| bits >= 1.0).ok_or_else(wrong)?
            }
        };
        let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let seconds = quantity(travel.trim(), &units).filter(|&s| s <= 3600.0);
        let round_trip = Duration::from_secs_f64(seconds.ok_or_else(wrong)?);
        Ok(Link { bits_per_second, round_trip })
    }
}

/// A number that is not negative and its unit, the first that fits.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim().to_ascii_lowercase();
    let (number, scale) =
        units.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
    let number: f64 = number.trim_end().parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some(number * scale)
}

/// One thing a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Piece {
    /// Computes this many floating-point operations.
    Compute(u64),
    /// Hands the transfer of this number to its link.
    Send(u32),
    /// Waits for the transfer of this number.
    Receive(u32),
}

/// A tensor that crosses between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Sending rank.
    pub from: usize,
    /// Receiving rank.
    pub to: usize,
    /// Bytes of payload; those it mostly has where that depends on the input.
    pub bytes: u64,
    /// Its elements, before they are encoded.
    pub elements: u64,
    /// Whether a step of the policy asks for it; the model's input, say, is asked for by none.
    pub exchange: bool,
}

/// What every node of a cluster does for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Rank that takes the input and gives the output.
    pub entry: usize,
    /// What each node does, in order, by rank.
    pub nodes: Vec<Vec<Piece>>,
    /// What crosses, by number.
    pub transfers: Vec<Carried>,
}

impl Plan {
    /// The plan of a split network; none where the manifest was written without schedules. Where zeros are
    /// packed, as many are taken for zero as [`LIKELY_ZEROS`] says.
    pub fn of_manifest(manifest: &Manifest) -> Option<Plan> {
        Plan::with_zeros(manifest, LIKELY_ZEROS)
    }

    /// The same with another share of zeros, 0 to 1.
    pub fn with_zeros(manifest: &Manifest, zeros: f64) -> Option<Plan> {
        if manifest.nodes.iter().all(|node| node.schedule.is_empty()) {
            return None;
        }
        let carried = |t: &crate::manifest::Transfer| Carried {
            from: t.from,
            to: t.to,
            bytes: t.bytes_with_zeros(zeros),
            elements: t.shape.iter().product::<usize>() as u64,
            exchange: t.step.is_some(),
        };
        Some(Plan {
            entry: manifest.entry,
            nodes: manifest.nodes.iter().map(|node| node.schedule.clone()).collect(),
            transfers: manifest.transfers.iter().map(carried).collect(),
        })
    }

    /// One device that computes everything.
    pub fn alone(flops: u64) -> Plan {
        Plan { entry: 0, nodes: vec![vec![Piece::Compute(flops)]], transfers: vec![] }
    }

    /// Operations of a node.
    pub fn flops(&self, rank: usize) -> u64 {
        let pieces = self.nodes.get(rank).into_iter().flatten();
        pieces.map(|piece| if let Piece::Compute(flops) = piece { *flops } else { 0 }).sum()
    }

    /// Predicts what a perfect runtime makes of the plan. `devices` has one entry a node, or one for
    /// all of them.
    ///
    /// # Errors
    /// Another number of devices; a transfer that nobody sends, that somebody else receives, or that is
    /// waited for in a circle.
    pub fn predict(&self, devices: &[Device], link: &Link) -> Result<Prediction, CostError> {
        Simulation::new(self, devices, *link)?.run()
    }
}

/// What a plan takes.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds from the entry node having the input to its having the output.
    pub latency: f64,
    /// Each node's part, by rank.
    pub nodes: Vec<NodeTime>,
    /// Each transfer, by number.
    pub transfers: Vec<TransferTime>,
}

/// Where a node's time goes, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NodeTime {
    /// Computing.
    pub compute: f64,
    /// Waiting for tensors, from the request's beginning at the entry node on.
    pub waiting: f64,
    /// When it is done.
    pub finished: f64,
    /// Bytes of payload it sends.
    pub bytes_sent: u64,
}

/// A transfer's times, in seconds from the request's beginning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TransferTime {
    /// When the sender has the tensor.
    pub sent: f64,
    /// When the receiver has it.
    pub arrived: f64,
    /// When the receiver comes to need it.
    pub wanted: f64,
    /// Whether a step of the policy asks for it.
    pub exchange: bool,
}

impl TransferTime {
    /// Seconds between being sent and being there, time in the link's queue included.
    pub fn travel(&self) -> f64 {
        self.arrived - self.sent
    }

    /// Seconds of the travel during which the receiver had nothing else to do.
    pub fn visible(&self) -> f64 {
        (self.arrived - self.wanted.max(self.sent)).max(0.0)
    }
}

impl Prediction {
    /// Share of the exchanges' travel that is hidden behind computation, 0 to 1; none without exchanges.
    pub fn hidden(&self) -> Option<f64> {
        hidden(self.transfers.iter().filter(|transfer| transfer.exchange))
    }
}

/// Share of the transfers' travel during which their receivers computed, 0 to 1; none without travel.
pub fn hidden<'a>(transfers: impl IntoIterator<Item = &'a TransferTime>) -> Option<f64> {
    let (mut travel, mut visible) = (0.0, 0.0);
    for transfer in transfers {
        travel += transfer.travel();
        visible += transfer.visible();
    }
    (travel > 0.0).then(|| 1.0 - visible / travel)
}

/// A plan that is being followed.
struct Simulation<'a> {
    plan: &'a Plan,
    devices: Vec<&'a Device>,
    link: Link,
    /// Each node's next piece, and its clock.
    at: Vec<usize>,
    clock: Vec<f64>,
    /// When each node's outgoing and incoming links are free.
    outgoing: Vec<f64>,
    incoming: Vec<f64>,
    /// When each transfer was sent and arrives, once it is known.
    carried: Vec<Option<(f64, f64)>>,
    wanted: Vec<f64>,
    nodes: Vec<NodeTime>,
}

impl<'a> Simulation<'a> {
    fn new(plan: &'a Plan, devices: &'a [Device], link: Link) -> Result<Self, CostError> {
        let nodes = plan.nodes.len();
        let devices: Vec<&Device> = match devices {
            [one] => vec![one; nodes],
            each if each.len() == nodes => each.iter().collect(),
            _ => return Err(CostError::Devices { found: devices.len(), nodes }),
        };
        Ok(Simulation {
            plan,
            devices,
            link,
            at: vec![0; nodes],
            clock: vec![0.0; nodes],
            outgoing: vec![0.0; nodes],
            incoming: vec![0.0; nodes],
            carried: vec![None; plan.transfers.len()],
            wanted: vec![0.0; plan.transfers.len()],
            nodes: vec![NodeTime::default(); nodes],
        })
    }

    fn run(mut self) -> Result<Prediction, CostError> {
        // The node whose clock is earliest goes on, so that links carry in the order of time.
        while let Some(rank) = self.earliest() {
            self.step(rank)?;
        }
        let stuck = (0..self.at.len()).find(|&rank| self.at[rank] < self.plan.nodes[rank].len());
        if let Some(rank) = stuck {
            return Err(CostError::Stuck { rank });
        }
        let transfers = self.plan.transfers.iter().zip(&self.carried).zip(&self.wanted);
        let transfers = transfers.filter_map(|((transfer, carried), &wanted)| {
            let (sent, arrived) = (*carried)?;
            Some(TransferTime { sent, arrived, wanted, exchange: transfer.exchange })
        });
        let latency = self.nodes.get(self.plan.entry).map_or(0.0, |node| node.finished);
        Ok(Prediction { latency, transfers: transfers.collect(), nodes: self.nodes })
    }

    /// The node with the earliest clock among those that can go on.
    fn earliest(&self) -> Option<usize> {
        let can_go_on = |&rank: &usize| match self.plan.nodes[rank].get(self.at[rank]) {
            None => false,
            Some(Piece::Receive(id)) => {
                self.carried.get(*id as usize).is_none_or(|carried| carried.is_some())
            }
            Some(_) => true,
        };
        let ranks = (0..self.at.len()).filter(can_go_on);
        ranks.min_by(|&a, &b| self.clock[a].total_cmp(&self.clock[b]))
    }

    fn step(&mut self, rank: usize) -> Result<(), CostError> {
        match self.plan.nodes[rank][self.at[rank]] {
            Piece::Compute(flops) => self.busy(rank, self.devices[rank].seconds(flops)),
            Piece::Send(id) => self.send(rank, id)?,
            Piece::Receive(id) => self.receive(rank, id)?,
        }
        self.at[rank] += 1;
        self.nodes[rank].finished = self.clock[rank];
        Ok(())
    }

    /// Keeps a node computing.
    fn busy(&mut self, rank: usize, seconds: f64) {
        self.clock[rank] += seconds;
        self.nodes[rank].compute += seconds;
    }

    /// Has a node take out or add the features of an exchange.
    fn exchange(&mut self, rank: usize, transfer: Carried) {
        if transfer.exchange {
            self.busy(rank, self.devices[rank].moving(transfer.elements));
        }
    }

    fn send(&mut self, rank: usize, id: u32) -> Result<(), CostError> {
        let wrong = CostError::Transfer { rank, id };
        let Some(&transfer) = self.plan.transfers.get(id as usize) else { return Err(wrong) };
        let (from, to) = (transfer.from, transfer.to);
        if from != rank || to >= self.incoming.len() || self.carried[id as usize].is_some() {
            return Err(wrong);
        }
        self.exchange(rank, transfer);
        let occupied = self.link.seconds(transfer.bytes);
        let begins = self.clock[rank].max(self.outgoing[rank]);
        self.outgoing[rank] = begins + occupied;
        // The receiver's link takes the first bit when it is free, and is at best as fast.
        self.incoming[to] = begins.max(self.incoming[to]) + occupied;
        self.carried[id as usize] = Some((self.clock[rank], self.incoming[to] + self.link.half()));
        self.nodes[rank].bytes_sent += transfer.bytes;
        Ok(())
    }

    fn receive(&mut self, rank: usize, id: u32) -> Result<(), CostError> {
        let wrong = CostError::Transfer { rank, id };
        let Some(transfer) = self.plan.transfers.get(id as usize) else { return Err(wrong) };
        let Some((_, arrived)) = self.carried[id as usize].filter(|_| transfer.to == rank) else {
            return Err(wrong);
        };
        self.wanted[id as usize] = self.clock[rank];
        let waited = (arrived - self.clock[rank]).max(0.0);
        self.nodes[rank].waiting += waited;
        self.clock[rank] += waited;
        self.exchange(rank, self.plan.transfers[id as usize]);
        Ok(())
    }
}

/// A separable network before it is compiled: what each of its groups computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Trunk {
    /// Bytes of the model's input as it is sent to other nodes.
    pub input_bytes: u64,
    /// Operations before the first block, which every node does for itself.
    pub stem_flops: u64,
    /// The blocks, in order.
    pub blocks: Vec<TrunkBlock>,
    /// Groups whose last block the classifier reads, pooled to a number a channel: 1 or more.
    pub classified: usize,
    /// Operations after the last block, on group 0's node.
    pub head_flops: u64,
}

/// A block of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrunkBlock {
    /// Operations of one group.
    pub flops: u64,
    /// Channels of one group's output.
    pub channels: usize,
    /// Elements of each of these channels.
    pub elements: usize,
}

impl Trunk {
    /// The plan of a node for each group under a policy, without what no output needs: what the compiler
    /// makes of such a network, op by op, in the same order.
    ///
    /// # Errors
    /// Another number of steps than the blocks allow.
    pub fn plan(&self, policy: &Policy) -> Result<Plan, CostError> {
        let (blocks, found) = (self.blocks.len(), policy.steps.len());
        if found * policy.staleness > blocks {
            return Err(CostError::Steps { found, staleness: policy.staleness, blocks });
        }
        let shape = |step: usize| {
            let TrunkBlock { channels, elements, .. } = self.blocks[policy.sent_after(step)];
            [1, channels, elements]
        };
        let bytes = |step: usize| policy.likely_send_bytes(step, &shape(step));
        let reach = Reach::of(policy, blocks, self.classified, |step| bytes(step) > 0);
        let Reach { sends, blocks: computed } = reach;
        let mut plan = Plan { entry: 0, nodes: vec![vec![]; policy.groups], transfers: vec![] };
        for rank in (1..policy.groups).filter(|&rank| computed[rank] > 0) {
            let input = Carried {
                from: 0,
                to: rank,
                bytes: self.input_bytes,
                elements: self.input_bytes,
                exchange: false,
            };
            let id = plan.carry(input);
            plan.nodes[0].push(Piece::Send(id));
            plan.nodes[rank].push(Piece::Receive(id));
        }
        let stem = |rank: usize| computed[rank] > 0 && self.stem_flops > 0;
        for rank in (0..policy.groups).filter(|&rank| stem(rank)) {
            plan.nodes[rank].push(Piece::Compute(self.stem_flops));
        }
        // What each step has sent, to be received under the same numbers later.
        let mut carried: Vec<Vec<(u32, usize)>> = vec![vec![]; policy.steps.len()];
        for block in 0..blocks {
            for rank in (0..policy.groups).filter(|&rank| block < computed[rank]) {
                plan.nodes[rank].push(Piece::Compute(self.blocks[block].flops));
            }
            for step in (0..policy.steps.len()).filter(|&step| policy.sent_after(step) == block) {
                for &(from, to) in &sends[step] {
                    let elements = policy.sent_elements(step, &shape(step));
                    let exchange =
                        Carried { from, to, bytes: bytes(step), elements, exchange: true };
                    let id = plan.carry(exchange);
                    plan.nodes[from].push(Piece::Send(id));
                    carried[step].push((id, to));
                }
            }
            for step in (0..policy.steps.len()).filter(|&step| policy.added_in(step) == block) {
                for &(id, to) in &carried[step] {
                    plan.nodes[to].push(Piece::Receive(id));
                }
            }
        }
        let pooled = self.blocks.last().map_or(0, |block| block.channels as u64);
        for rank in 1..self.classified.min(policy.groups) {
            let bytes = pooled * (Dtype::F32.bits() / 8) as u64;
            let id =
                plan.carry(Carried { from: rank, to: 0, bytes, elements: pooled, exchange: false });
            plan.nodes[rank].push(Piece::Send(id));
            plan.nodes[0].push(Piece::Receive(id));
        }
        plan.nodes[0].push(Piece::Compute(self.head_flops));
        Ok(plan)
    }
}

impl Plan {
    fn carry(&mut self, transfer: Carried) -> u32 {
        self.transfers.push(transfer);
        self.transfers.len() as u32 - 1
    }
}

/// Why there is no prediction.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CostError {
    /// No device.
    #[error("device \"{found}\", expected a speed such as 5gflops")]
    Device {
        /// What was given.
        found: String,
    },
    /// A profile that cannot be read.
    #[error("device profile: {0}")]
    Json(#[source] serde_json::Error),
    /// No link.
    #[error("link \"{found}\", expected a rate and a round trip such as 300mbit,0.3ms")]
    Link {
        /// What was given.
        found: String,
    },
    /// Neither one device nor one a node.
    #[error("{found} devices for {nodes} nodes, expected one, or one a node")]
    Devices {
        /// Devices given.
        found: usize,
        /// Nodes of the plan.
        nodes: usize,
    },
    /// A policy with more steps than the blocks allow.
    #[error("{found} steps of {staleness} blocks each do not fit {blocks} blocks")]
    Steps {
        /// Steps of the policy.
        found: usize,
        /// α.
        staleness: usize,
        /// Blocks of the trunk.
        blocks: usize,
    },
    /// A node sends or receives what it does not have to.
    #[error("rank {rank} has no transfer t{id} to send or receive")]
    Transfer {
        /// The node.
        rank: usize,
        /// The transfer.
        id: u32,
    },
    /// A node waits for what is never sent.
    #[error("rank {rank} waits for ever")]
    Stuck {
        /// The node.
        rank: usize,
    },
}

#[cfg(test)]
#[path = "cost/tests.rs"]
mod tests;
