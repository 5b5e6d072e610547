//! How long an image takes on a cluster, from the network's shapes alone.
//!
//! Takes the settings of a network, a policy for it, and the device and link of `[search]`; gives the
//! latency that the cost model of [`snn_schemas::cost`] predicts for a node a group: what a perfect
//! runtime reaches. The compiler predicts the same from the graph itself.

use snn_schemas::Policy;
use snn_schemas::codec::Pixels;
use snn_schemas::cost::{Trunk, TrunkBlock};

use crate::config::{Config, NetConfig};
use crate::error::TrainError;

/// Milliseconds from an image to its class under `policy`, on the cluster of `config.search`.
///
/// # Errors
/// The cluster is not written as the cost model reads it, or the policy is for another network.
pub fn latency(config: &Config, policy: &Policy) -> Result<f64, TrainError> {
    let (device, link) = config.search.cluster()?;
    let plan = trunk(&config.net).plan(policy)?;
    Ok(1e3 * plan.predict(&[device], &link)?.latency)
}

/// The network as the cost model knows it: operations of one group, a multiply-add as two.
fn trunk(net: &NetConfig) -> Trunk {
    let [channels, height, width] = net.input;
    let mut before = [net.stem_channels, height, width];
    let mut block = |index: usize| {
        let after = net.block_shape(index);
        let stage = index / net.blocks_per_stage().max(1);
        // All groups' channels, and of one group: C·d lie evenly over the groups.
        let inner = ((net.cardinality * net.path_width) << stage) / net.groups;
        let path = inner * net.groups / net.paths();
        let [from, to] = [before, after].map(|[_, height, width]| height * width);
        let mut products = before[0] * inner * from; // 1×1
        products += 9 * inner * path * to; // 3×3 in paths
        products += inner * after[0] * to; // 1×1
        if before != after {
            products += before[0] * after[0] * to; // the shortcut
        }
        before = after;
        TrunkBlock { flops: 2 * products as u64, channels: after[0], elements: to }
    };
    let blocks: Vec<TrunkBlock> = (0..net.blocks()).map(&mut block).collect();
    let last = blocks.last().map_or(0, |block| block.channels);
    Trunk {
        // Exported models say how they are normalised, so that images travel as their pixels.
        input_bytes: Pixels::CODEC.likely_bytes(&[1, channels, height, width]).unwrap_or(0) as u64,
        stem_flops: 2 * (9 * channels * net.stem_channels * height * width) as u64,
        blocks,
        classified: net.classified(),
        head_flops: 2 * (net.classified() * last * net.classes) as u64,
    }
}

#[cfg(test)]
mod tests {
    use snn_schemas::cost::{Device, Link, Plan};

    use super::*;

    /// The figures that the compiler's tests have for Table 6's sparse f16 policy, on the graph
    /// itself, from a simulation of its own: of a model that does not say how it is normalised, so that
    /// its input travels in f32.
    #[test]
    fn four_devices_are_as_fast_as_the_compiled_network() {
        let net = NetConfig::preset("sep-resnext-56-4x16d", 100).unwrap();
        let trunk = Trunk { input_bytes: 4 * 3 * 32 * 32, ..trunk(&net) };
        let json = br#"{"version":1,"groups":4,"staleness":2,"dtype":"f16",
            "decisions":[[9,4],[22,6],[18,6],[3,6],[16,7],[23,8],[9,8],[13,8],[20,7]]}"#;
        let policy = Policy::from_json(json).unwrap();
        let all: u64 = trunk.blocks.iter().map(|block| 4 * block.flops).sum();
        let device = [Device::new(5.0).unwrap()];
        for (link, expected) in
            [("100mbit,0.3ms", 1.921), ("300mbit,0.3ms", 3.436), ("1gbit,0.3ms", 3.985)]
        {
            let link: Link = link.parse().unwrap();
            let seconds = |plan: &Plan| plan.predict(&device, &link).unwrap().latency;
            let alone = seconds(&Plan::alone(trunk.stem_flops + all + trunk.head_flops));
            let found = alone / seconds(&trunk.plan(&policy).unwrap());
            assert!((found - expected).abs() < 0.005, "{link:?}: {found}");
        }
    }

    /// Worked out by hand: one group of the digits' network, alone.
    #[test]
    fn a_silent_network_takes_what_one_group_computes() {
        let mut config = Config::digits();
        let stem = 9 * 16 * 64;
        let block = |before: usize, after: usize, inner: usize, [from, to]: [usize; 2]| {
            before * inner * from + 9 * inner * inner * to + inner * after * to
        };
        let blocks = block(16, 16, 4, [64, 64]) * 2
            + block(16, 32, 8, [64, 16]) + 16 * 32 * 16 // with a shortcut
            + block(32, 32, 8, [16, 16])
            + block(32, 64, 16, [16, 4]) + 32 * 64 * 4
            + block(64, 64, 16, [4, 4]);
        let flops = 2 * (stem + blocks + 64 * 10);
        config.search.device = "1mflops".to_owned();
        config.search.link = "1kbit,1s".to_owned();
        let found = latency(&config, &config.silent()).unwrap();
        assert!((found - flops as f64 / 1e3).abs() < 1e-6, "{found}");
    }
}
