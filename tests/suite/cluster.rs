//! A cluster within this process: nodes on a memory network.
//!
//! Takes a split; gives nodes that answer, on any engine and behind any transport.

use std::sync::Arc;
use std::time::Duration;

use snn_compiler::Split;
use snn_runtime::transport::memory::{MemoryTransport, Network};
use snn_runtime::transport::{Sink, Transport};
use snn_runtime::{Answer, Engine, InferError, Node, Shard, Tensor, TractEngine};

/// How long anything may take before a test gives up on it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Nodes of one split, by rank.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    pub(crate) network: Network,
}

impl Cluster {
    pub(crate) async fn start(split: &Split) -> Cluster {
        Cluster::start_with(split, || TractEngine::new(1), |transport| Arc::new(transport)).await
    }

    /// Starts every node with an engine and a transport made by the functions given.
    pub(crate) async fn start_with<E: Engine>(
        split: &Split,
        engine: impl Fn() -> E + Clone + Send + 'static,
        transport: impl Fn(MemoryTransport) -> Arc<dyn Transport>,
    ) -> Cluster {
        let network = Network::new();
        let mut nodes = Vec::new();
        for rank in 0..split.shards.len() {
            let shard = shard(split, rank);
            let mut node = Node::load(&shard, engine.clone()).await.unwrap();
            let member = network.join(rank, &split.manifest.split, node.sink());
            node.connect(transport(member));
            nodes.push(node);
        }
        Cluster { nodes, network }
    }

    pub(crate) fn entry(&self) -> &Node {
        self.nodes.iter().find(|node| node.is_entry()).unwrap()
    }

    pub(crate) async fn infer(&self, input: Tensor) -> Result<Answer, InferError> {
        self.entry().infer(vec![input], PATIENCE).await
    }

    /// The only output of a request.
    pub(crate) async fn logits(&self, input: Tensor) -> Vec<f32> {
        let mut answer = self.infer(input).await.unwrap();
        assert!(!answer.degraded);
        answer.outputs.remove(0).into_parts().1
    }
}

pub(crate) fn shard(split: &Split, rank: usize) -> Shard {
    Shard::from_bytes(split.shards[rank].to_bytes().into()).unwrap()
}

/// A member of `network` that takes part by hand.
pub(crate) fn outsider(network: &Network, rank: usize, split: &str, sink: Sink) -> MemoryTransport {
    network.join(rank, split, sink)
}
