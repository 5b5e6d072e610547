//! A transport made as slow as a given link: the network of small devices, emulated on one machine.
//!
//! A [`Port`] is a node's interface: full duplex, one rate out and the same rate in, as a traffic shaper
//! on either side of it would have it. Takes any transport and a [`Link`]; gives a transport whose frames
//! leave one after another, whoever they are for, and arrive half a round trip after their last bit; and a
//! sink that takes frames one after another, where several senders would fill the link at once. What the
//! transport below takes itself comes on top. Frames are released by a thread of the port's own: an
//! async runtime's timers have a granularity of a millisecond, several times the links meant here.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
pub use snn_schemas::cost::Link;
use tokio::runtime::Handle;

use super::{BoxFuture, Event, Sink, Transport, TransportError};
use crate::pause;

/// A node's interface to a slow link. Its thread ends with the last transport and sink made of it.
#[derive(Clone)]
pub struct Port {
    link: Link,
    /// When the port is free again, outwards and inwards.
    free: Arc<Mutex<[Instant; 2]>>,
    queue: Sender<Travelling>,
}

/// A frame on its way.
struct Travelling {
    moment: Instant,
    release: Box<dyn FnOnce() + Send>,
}

impl Port {
    /// A port to `link`.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(link: Link) -> std::io::Result<Port> {
        let (queue, frames) = mpsc::channel();
        thread::Builder::new().name("snn-link".to_owned()).spawn(move || carry(&frames))?;
        let free = Arc::new(Mutex::new([Instant::now(); 2]));
        Ok(Port { link, free, queue })
    }

    /// Sends through this port with `inner`. Must be called within a tokio runtime.
    pub fn transport(&self, inner: Arc<dyn Transport>) -> Shaped {
        Shaped { port: self.clone(), inner, runtime: Handle::current() }
    }

    /// Takes through this port what `inner` takes. News of peers pass at once.
    pub fn sink(&self, inner: Sink) -> Sink {
        let port = self.clone();
        Arc::new(move |event| match event {
            Event::Frame { bytes } => {
                let now = Instant::now();
                let moment = port.arrives(now, bytes.len());
                match moment > now {
                    true => {
                        let inner = Arc::clone(&inner);
                        port.release(moment, move || inner(Event::Frame { bytes }));
                    }
                    false => inner(Event::Frame { bytes }),
                }
            }
            news => inner(news),
        })
    }

    fn free(&self) -> std::sync::MutexGuard<'_, [Instant; 2]> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a frame that is handed over now has left.
    fn leaves(&self, now: Instant, bytes: usize) -> Instant {
        let [outwards, _] = &mut *self.free();
        *outwards = now.max(*outwards) + self.link.occupied(bytes as u64);
        *outwards
    }

    /// When a frame whose last bit is here now, as far as its sender is concerned, has been taken in:
    /// now, if nothing else came meanwhile.
    fn arrives(&self, now: Instant, bytes: usize) -> Instant {
        let [_, inwards] = &mut *self.free();
        let occupied = self.link.occupied(bytes as u64);
        let began = now.checked_sub(occupied).unwrap_or(now);
        *inwards = began.max(*inwards) + occupied;
        *inwards
    }

    fn release(&self, moment: Instant, release: impl FnOnce() + Send + 'static) {
        // The thread ends with the last port only.
        let _ = self.queue.send(Travelling { moment, release: Box::new(release) });
    }
}

/// Releases frames at their moments, until nobody can send any more.
fn carry(frames: &Receiver<Travelling>) {
    let mut waiting: BinaryHeap<Reverse<Queued>> = BinaryHeap::new();
    let mut number = 0;
    loop {
        let next = match waiting.peek() {
            None => frames.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(Reverse(first)) => {
                let left = first.frame.moment.saturating_duration_since(Instant::now());
                match left.checked_sub(pause::early()) {
                    Some(sleep) => {
                        let wake = Instant::now() + sleep;
                        let next = frames.recv_timeout(sleep);
                        if next.is_err() {
                            pause::woken(wake);
                        }
                        next
                    }
                    None => Err(RecvTimeoutError::Timeout),
                }
            }
        };
        match next {
            Ok(frame) => {
                number += 1;
                waiting.push(Reverse(Queued { frame, number }));
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(Reverse(Queued { frame, .. })) = waiting.pop() {
                    pause::until(frame.moment);
                    (frame.release)();
                }
            }
            // What is still on its way is for nobody.
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// A frame in the queue: the earliest first, and those of one moment in their order.
struct Queued {
    frame: Travelling,
    number: u64,
}

impl Queued {
    fn key(&self) -> (Instant, u64) {
        (self.frame.moment, self.number)
    }
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// A transport over a slow link. Dropping it and its port drops what is still on its way.
pub struct Shaped {
    port: Port,
    inner: Arc<dyn Transport>,
    runtime: Handle,
}

impl Shaped {
    /// Slows `inner` down, outwards only. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(inner: Arc<dyn Transport>, link: Link) -> std::io::Result<Shaped> {
        Ok(Port::new(link)?.transport(inner))
    }
}

impl Transport for Shaped {
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        let left = self.port.leaves(Instant::now(), frame.len());
        let moment = left + self.port.link.round_trip / 2;
        let (inner, runtime) = (Arc::clone(&self.inner), self.runtime.clone());
        self.port.release(moment, move || {
            if let Err(error) = runtime.block_on(inner.send(to, frame)) {
                tracing::debug!(%error, "frame lost on a shaped link");
            }
        });
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::transport::memory::Network;

    /// 10 ms for 1000 bytes with their headers, 20 ms there and back.
    fn link() -> Link {
        Link { bits_per_second: 836_464.0, round_trip: Duration::from_millis(20) }
    }

    /// Milliseconds until each of the frames that `send` sends to rank 0 arrives.
    async fn arrivals(send: impl AsyncFn(&[Shaped; 2]), count: usize) -> Vec<f64> {
        let network = Network::new();
        let (tell, arrived) = channel();
        let start = Instant::now();
        let sink: Sink = Arc::new(move |event| {
            if let Event::Frame { .. } = event {
                tell.send(start.elapsed()).unwrap();
            }
        });
        let port = Port::new(link()).unwrap();
        let _receiver = network.join(0, "split", port.sink(sink));
        let sender = |rank| {
            let inner = network.join(rank, "split", Arc::new(|_| {}));
            Shaped::new(Arc::new(inner), link()).unwrap()
        };
        let senders = [sender(1), sender(2)];
        send(&senders).await;
        let wait = || arrived.recv_timeout(Duration::from_secs(10)).unwrap();
        (0..count).map(|_| 1e3 * wait().as_secs_f64()).collect()
    }

    fn assert_times(found: &[f64], expected: &[f64]) {
        for (found, expected) in found.iter().zip(expected) {
            // Never early; late by what a busy machine makes of it.
            assert!(*found > expected - 0.5 && *found < expected + 300.0, "{found} {expected}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn frames_of_one_sender_leave_one_after_another() {
        let frame = Bytes::from(vec![0; 1000]);
        let send = async |senders: &[Shaped; 2]| {
            for _ in 0..3 {
                senders[0].send(0, frame.clone()).await.unwrap();
            }
        };
        assert_times(&arrivals(send, 3).await, &[20.0, 30.0, 40.0]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn frames_of_two_senders_arrive_one_after_another() {
        let frame = Bytes::from(vec![0; 1000]);
        let send = async |senders: &[Shaped; 2]| {
            for sender in senders {
                sender.send(0, frame.clone()).await.unwrap();
            }
        };
        assert_times(&arrivals(send, 2).await, &[20.0, 30.0]);
    }
}
