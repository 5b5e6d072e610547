//! A transport made as slow as a given link: the network of small devices, emulated on one machine.
//!
//! Takes any transport and a [`Link`]; gives a transport whose frames arrive as they would over it.
//! A frame occupies the sender's link for its bytes at the link's rate, one after another whoever
//! they are for, and arrives half a round trip later. What the emulation costs itself (a timer's
//! granularity, about a millisecond at worst) does not add up: the link is reckoned from the clock.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{BoxFuture, Transport, TransportError};

/// Bytes of Ethernet, IP and TCP headers around each full packet of 1448 bytes of payload.
const PACKET_OVERHEAD: f64 = 90.0 / 1448.0;

/// A link between two devices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bits a second of each node's sending side; headers included.
    pub bits_per_second: f64,
    /// Time there and back of an empty packet.
    pub round_trip: Duration,
}

impl Link {
    /// How long `bytes` occupy the link.
    pub fn occupied(&self, bytes: usize) -> Duration {
        let bits = 8.0 * bytes as f64 * (1.0 + PACKET_OVERHEAD);
        Duration::from_secs_f64(bits / self.bits_per_second)
    }
}

/// A frame on its way.
struct Travelling {
    to: usize,
    frame: Bytes,
    arrives: Instant,
}

/// A transport over a slow link. Dropping it drops what is still on its way.
pub struct Shaped {
    link: Link,
    /// When the sender's link is free again, and where frames leave to.
    state: Mutex<Instant>,
    queue: mpsc::UnboundedSender<Travelling>,
    _carrier: JoinSet<()>,
}

impl Shaped {
    /// Slows `inner` down. Must be called within a tokio runtime.
    pub fn new(inner: Arc<dyn Transport>, link: Link) -> Shaped {
        let (queue, mut frames) = mpsc::unbounded_channel::<Travelling>();
        let mut carrier = JoinSet::new();
        carrier.spawn(async move {
            while let Some(Travelling { to, frame, arrives }) = frames.recv().await {
                tokio::time::sleep_until(arrives.into()).await;
                if let Err(error) = inner.send(to, frame).await {
                    tracing::debug!(%error, "frame lost on a shaped link");
                }
            }
        });
        Shaped { link, state: Mutex::new(Instant::now()), queue, _carrier: carrier }
    }
}

impl Transport for Shaped {
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        let sent = {
            let mut free = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            *free = (*free).max(Instant::now()) + self.link.occupied(frame.len());
            *free
        };
        let arrives = sent + self.link.round_trip / 2;
        let queued = self.queue.send(Travelling { to, frame, arrives });
        Box::pin(async move { queued.map_err(|_| TransportError::Unreachable { rank: to }) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_carries_its_rate_less_headers() {
        let link = Link { bits_per_second: 300e6, round_trip: Duration::ZERO };
        let second = link.occupied(35_300_000);
        assert!((second.as_secs_f64() - 1.0).abs() < 0.01, "{second:?}");
    }
}
