//! Bytes that a policy sends between G nodes, from the network's shapes alone.
//!
//! Takes the settings of a network and a policy for it, and gives [`Wire`]: what crosses per image
//! if every send is made (at most, where zeros are packed), what crosses once sends that the
//! classifier cannot feel are left out, and what a ring all-reduce in f32 after every block would send.
//! The compiler counts the same on the graph itself; for networks of this crate both agree.
//! [`relaxed`] is the same of steps that gradients flow into.

use burn::tensor::{Tensor, TensorData};
use serde::Serialize;
use snn_schemas::{Dtype, Policy, Reach};

use crate::config::NetConfig;
use crate::exchange::Relaxed;

/// Bytes per image between G nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Wire {
    /// What really crosses: sends that can still reach the classifier.
    pub bytes: u64,
    /// What every send of the policy amounts to.
    pub planned_bytes: u64,
    /// A ring all-reduce after every block: 2(G − 1) times one group's tensor, in f32.
    pub ring_bytes: u64,
}

impl Wire {
    /// What `policy` sends in the network that `net` describes.
    pub fn of(net: &NetConfig, policy: &Policy) -> Wire {
        let elements =
            |block: usize| net.block_shape(block).into_iter().map(|n| n as u64).product::<u64>();
        let once = 2 * (net.groups as u64).saturating_sub(1) * (Dtype::F32.bits() / 8) as u64;
        let ring_bytes = (0..net.blocks()).map(|block| once * elements(block)).sum();
        let each: Vec<u64> = (0..policy.steps.len())
            .map(|step| {
                let [channels, height, width] = net.block_shape(policy.sent_after(step));
                policy.send_bytes(step, &[1, channels, height, width])
            })
            .collect();
        let planned = policy.steps.iter().zip(&each);
        let planned_bytes =
            planned.map(|(step, bytes)| step.decision.sends().count() as u64 * bytes).sum();
        let reach = Reach::of(policy, net.blocks(), net.classified(), |step| each[step] > 0);
        let needed = reach.sends.iter().zip(&each);
        let bytes = needed.map(|(sends, bytes)| sends.len() as u64 * bytes).sum();
        Wire { bytes, planned_bytes, ring_bytes }
    }

    /// [`Wire::bytes`] as a part of the ring's.
    pub fn fraction(&self) -> f64 {
        match self.ring_bytes {
            0 => 0.0,
            ring => self.bytes as f64 / ring as f64,
        }
    }

    /// [`Wire::planned_bytes`] as a part of the ring's.
    pub fn planned_fraction(&self) -> f64 {
        match self.ring_bytes {
            0 => 0.0,
            ring => self.planned_bytes as f64 / ring as f64,
        }
    }
}

/// [`Wire::fraction`] of the steps `steps` of `policy`: the same where they are those of a policy, and
/// smooth in between, a group being needed by as much as it sends to those that are.
pub(crate) fn relaxed(net: &NetConfig, policy: &Policy, steps: &[Relaxed]) -> Tensor<1> {
    let ring = Wire::of(net, policy).ring_bytes.max(1) as f64;
    let Some(device) = steps.first().map(|step| step.routes.device()) else {
        return Tensor::zeros([1], &crate::judge::host());
    };
    let vector = |values: Vec<f32>| {
        let count = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [count]), &device)
    };
    let groups = policy.groups;
    let others = Tensor::<2>::ones([groups, groups], &device) - Tensor::eye(groups, &device);
    let mut needed = vector((0..groups).map(|group| f32::from(group < net.classified())).collect());
    let mut sum = Tensor::<1>::zeros([1], &device);
    for (index, step) in steps.iter().enumerate().rev() {
        let [channels, height, width] = net.block_shape(policy.sent_after(index));
        let mut at = policy.clone();
        let parts: Vec<f32> = (0..policy.levels.count)
            .map(|level| {
                at.steps[index].level = level;
                (at.send_bytes(index, &[1, channels, height, width]) as f64 / ring) as f32
            })
            .collect();
        let carries = vector(parts.iter().map(|&part| f32::from(part > 0.0)).collect());
        let part = (step.levels.clone() * vector(parts)).sum(); // [1]
        let carries = (step.levels.clone() * carries).sum(); // [1]
        let routes = step.routes.clone() * others.clone();
        let sends = routes.matmul(needed.clone().unsqueeze_dim(1)).reshape([groups]) * carries;
        sum = sum + sends.clone().sum() * part;
        needed = needed.clone() + sends.clone() - needed * sends;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures that the compiler's tests have for the paper's Table 6, on the graph itself.
    #[test]
    fn table_6_sends_what_the_compiler_counts() {
        let net = NetConfig::preset("sep-resnext-56-4x16d", 100).unwrap();
        let rows = [
            ("[12,12,7,9,10,23,9,16,18]", "f32", 30.16, 4_653_056),
            (
                "[[0,8],[10,3],[18,7],[22,8],[16,8],[18,8],[9,7],[13,8],[22,7]]",
                "f32",
                24.40,
                3_653_632,
            ),
            (
                "[[9,4],[22,6],[18,6],[3,6],[16,7],[23,8],[9,8],[13,8],[20,7]]",
                "f16",
                14.20,
                2_185_216,
            ),
        ];
        for (decisions, dtype, planned, bytes) in rows {
            let json = format!(
                r#"{{"version":1,"groups":4,"staleness":2,"dtype":"{dtype}","decisions":{decisions}}}"#
            );
            let wire = Wire::of(&net, &Policy::from_json(json.as_bytes()).unwrap());
            assert_eq!((wire.planned_fraction() * 1e4).round() / 100.0, planned);
            assert_eq!(wire.bytes, bytes);
            assert_eq!(wire.ring_bytes, 6 * 4 * 6 * (64 * 1024 + 128 * 256 + 256 * 64));
        }
    }

    /// Two groups that swap everything in each of three blocks: with α = 1 the last swap brings
    /// group 1's features to group 0 and not the other way.
    #[test]
    fn the_last_exchange_needs_one_direction() {
        let net = NetConfig {
            depth: 11,
            groups: 2,
            cardinality: 2,
            path_width: 1,
            trunk_width: 2,
            input: [1, 4, 4],
            ..NetConfig::default()
        };
        let json = br#"{"version":1,"groups":2,"staleness":1,"decisions":[1,1,1]}"#;
        let wire = Wire::of(&net, &Policy::from_json(json).unwrap());
        let each = [2 * 16 * 4, 4 * 4 * 4, 8 * 4];
        assert_eq!(wire.planned_bytes, 2 * each.iter().sum::<u64>());
        assert_eq!(wire.bytes, 2 * (each[0] + each[1]) + each[2]);
        let silent = Wire::of(&net, &Policy::silent(2, 1, 3));
        assert_eq!((silent.bytes, silent.planned_bytes, silent.fraction()), (0, 0, 0.0));
    }
}
