//! The way to the cluster of a process that may leave it and join again.
//!
//! Takes, one after another, the [`Asker`]s of what the process is; HTTP is answered through the relay, at
//! the same address and over the same connections, for as long as the process lives. While it is joining
//! a request waits, within its own time; one that was at hand when it left is asked again once it has
//! joined.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::asker::{Asker, Own, Unanswered};
use crate::client::ClusterInfo;
use crate::transport::BoxFuture;
use crate::{Answer, NodeReport, Tensor};

/// Reaches a cluster through whatever the process is at the time.
pub struct Relay {
    nodes: usize,
    rank: usize,
    current: watch::Sender<Option<Arc<dyn Asker>>>,
}

impl Relay {
    /// A relay of the process of `rank` in a cluster of `nodes`, which has yet to join.
    pub fn new(nodes: usize, rank: usize) -> Relay {
        Relay { nodes, rank, current: watch::Sender::new(None) }
    }

    /// Asks through `next` from now on; through nothing while the process is joining.
    pub fn switch(&self, next: Option<Arc<dyn Asker>>) {
        self.current.send_replace(next);
    }

    fn current(&self) -> Option<Arc<dyn Asker>> {
        self.current.borrow().clone()
    }

    /// What the process is, once it has joined.
    async fn joined(&self, within: Duration) -> Result<Arc<dyn Asker>, Unanswered> {
        let mut current = self.current.subscribe();
        let joined = tokio::time::timeout(within, current.wait_for(Option::is_some)).await;
        let joined = joined.ok().and_then(Result::ok).and_then(|joined| joined.clone());
        joined.ok_or_else(|| Unanswered("the node is joining its cluster".to_owned()))
    }

    async fn ask(&self, inputs: Vec<Tensor>, within: Duration) -> Result<Answer, Unanswered> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let asker = self.joined(left).await?;
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = asker.infer(inputs.clone(), left).await;
            let is_left = || self.current().is_none_or(|current| !Arc::ptr_eq(&current, &asker));
            match answer {
                // What went wrong is that the process has left.
                Err(_) if is_left() && Instant::now() < deadline => {}
                answer => return answer,
            }
        }
    }
}

impl Asker for Relay {
    fn model(&self, within: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
        Box::pin(async move { self.joined(within).await?.model(within).await })
    }

    fn infer(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Answer, Unanswered>> {
        Box::pin(self.ask(inputs, within))
    }

    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
        Box::pin(async {
            match self.current() {
                Some(current) => current.reports().await,
                None => Vec::new(),
            }
        })
    }

    fn own(&self) -> Own {
        match self.current() {
            Some(current) => current.own(),
            // Its own rank, at least, is not computed: so that nobody counts it as ready.
            None => Own { missing: BTreeSet::from([self.rank]), ..Own::default() },
        }
    }

    fn within(&self) -> Option<Duration> {
        self.current()?.within()
    }

    fn nodes(&self) -> usize {
        self.nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its number, once its process has not left.
    struct Numbered(f32, tokio::sync::Semaphore);

    impl Asker for Numbered {
        fn model(&self, _: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
            Box::pin(async { Err(Unanswered("no model".to_owned())) })
        }

        fn infer(&self, _: Vec<Tensor>, _: Duration) -> BoxFuture<'_, Result<Answer, Unanswered>> {
            Box::pin(async {
                let _place = self.1.acquire().await.map_err(|e| Unanswered(e.to_string()))?;
                let outputs = vec![Tensor::new(vec![1], vec![self.0]).unwrap()];
                Ok(Answer { outputs, degraded: false })
            })
        }

        fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
            Box::pin(async { Vec::new() })
        }

        fn own(&self) -> Own {
            Own::default()
        }

        fn nodes(&self) -> usize {
            2
        }
    }

    fn numbered(number: f32, places: usize) -> Arc<Numbered> {
        Arc::new(Numbered(number, tokio::sync::Semaphore::new(places)))
    }

    #[tokio::test]
    async fn a_request_waits_for_the_process_to_join_and_is_asked_again_where_it_leaves() {
        let relay = Relay::new(2, 1);
        let soon = Duration::from_millis(20);
        let refused = relay.infer(Vec::new(), soon).await.unwrap_err();
        assert_eq!(refused.to_string(), "the node is joining its cluster");
        assert_eq!(relay.own().missing, BTreeSet::from([1]));

        let first = numbered(1.0, 0);
        let within = Duration::from_secs(10);
        let (answer, ()) = tokio::join!(relay.infer(Vec::new(), within), async {
            tokio::time::sleep(soon).await;
            relay.switch(Some(Arc::clone(&first) as Arc<dyn Asker>));
            tokio::time::sleep(soon).await;
            relay.switch(None);
            first.1.close();
            tokio::time::sleep(soon).await;
            relay.switch(Some(numbered(2.0, 1)));
        });
        assert_eq!(answer.unwrap().outputs[0].data(), [2.0]);
        assert!(relay.own().missing.is_empty());

        // What goes wrong otherwise is passed on.
        let broken = numbered(3.0, 0);
        broken.1.close();
        relay.switch(Some(broken));
        assert_eq!(relay.infer(Vec::new(), within).await.unwrap_err().0, "semaphore closed");
    }
}
