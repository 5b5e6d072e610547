//! Nodes that an agent keeps running: a process each, started again whenever it ends.
//!
//! Takes orders; gives a [`Kept`] node, which tells what it is doing. The processes are children of the
//! same kind as those of a local cluster ([`super::child`]): they end with the agent, however it ends.
//! Between a death and the next start there is a pause, longer each time, so that a node that cannot
//! live does not keep a device busy.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use snn_runtime::agent::{Launched, Launcher, NodeOrder, NodeState};
use tokio::sync::mpsc;

use super::child::{Device, News, NodeProcess, Orders, STOP_GRACE};
use super::emulation::Emulation;
use super::local::LocalOptions;

/// Pauses before a node that has ended is started again: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A node that lived this long has not failed to start: the next pause is the first again.
const LIVED: Duration = Duration::from_secs(60);
/// News queued from a node: a handful.
const NEWS_QUEUE: usize = 16;

/// Folder beside a version's own files in which its node keeps what a restart of all nodes needs.
const KEPT: &str = "kept";

/// Starts nodes, all in the same way.
pub(super) struct Keeper {
    /// Executable that becomes the nodes.
    pub(super) executable: PathBuf,
    /// The cluster's key file.
    pub(super) key: Option<PathBuf>,
    /// Whether they listen beyond this machine without a key.
    pub(super) insecure: bool,
    /// Compute threads of a node.
    pub(super) threads: usize,
    /// How long they wait for absent ones after a restart of all.
    pub(super) grace: Duration,
}

impl Launcher for Keeper {
    fn launch(&self, order: NodeOrder) -> std::io::Result<Box<dyn Launched>> {
        let folder = order.shard.parent().unwrap_or(Path::new("")).join(KEPT);
        let orders = Orders {
            shard: order.shard,
            peers: order.peers,
            threads: self.threads,
            http: None,
            insecure: false, // it serves no HTTP
            trace: false,
            emulation: Emulation::default(),
            listen: Some(order.listen),
            device: Some(Device {
                key: self.key.clone(),
                insecure: self.insecure,
                cluster: order.version.as_str().to_owned(),
                degrade: order.settings.degrade_ms.map(Duration::from_millis),
                keep: (folder, self.grace),
            }),
        };
        let executable = Some(self.executable.clone());
        let options = LocalOptions { executable, ..LocalOptions::default() };
        let shared = Arc::new(Shared::default());
        let keeping = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("snn-keep".to_owned())
            .spawn(move || keeping.keep(&orders, &options))?;
        Ok(Box::new(Kept { shared, thread: Some(thread) }))
    }
}

/// A node that is kept running; dropping it ends it.
struct Kept {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the keeping thread and its owner share.
struct Shared {
    inner: Mutex<Inner>,
    stopped: Condvar,
}

struct Inner {
    state: NodeState,
    process: Option<NodeProcess>,
    stopping: bool,
}

impl Default for Shared {
    fn default() -> Shared {
        let inner = Inner { state: NodeState::Starting, process: None, stopping: false };
        Shared { inner: Mutex::new(inner), stopped: Condvar::new() }
    }
}

impl Launched for Kept {
    fn state(&self) -> NodeState {
        self.shared.lock().state.clone()
    }

    fn stop(self: Box<Self>) {}
}

impl Drop for Kept {
    fn drop(&mut self) {
        let process = {
            let mut inner = self.shared.lock();
            inner.stopping = true;
            inner.process.take()
        };
        self.shared.stopped.notify_all();
        if let Some(mut process) = process {
            process.end();
        }
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by its hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the node until it is stopped.
    fn keep(&self, orders: &Orders, options: &LocalOptions) {
        let mut pause = PAUSES.0;
        loop {
            let start = Instant::now();
            let Some(reason) = self.run(orders, options) else { return };
            tracing::warn!(shard = %orders.shard.display(), reason, "a node has ended");
            if start.elapsed() > LIVED {
                pause = PAUSES.0;
            }
            let mut inner = self.lock();
            inner.state = NodeState::Failed { reason };
            let waited = self.stopped.wait_timeout_while(inner, pause, |inner| !inner.stopping);
            if waited.unwrap_or_else(PoisonError::into_inner).0.stopping {
                return;
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Runs the node once; gives why it ended, or nothing once it has been stopped.
    fn run(&self, orders: &Orders, options: &LocalOptions) -> Option<String> {
        let (tell, mut news) = mpsc::channel(NEWS_QUEUE);
        {
            let mut inner = self.lock();
            if inner.stopping {
                return None;
            }
            match NodeProcess::spawn(0, orders, options, tell) {
                Ok(process) => inner.process = Some(process),
                Err(error) => return Some(crate::terminal::one_line(&error)),
            }
        }
        let mut reason = None;
        while let Some((_, news)) = news.blocking_recv() {
            match news {
                News::Listening(_) => self.lock().state = NodeState::Starting,
                News::Http(_) => {}
                News::Ready => self.lock().state = NodeState::Ready,
                News::Failed(why) => reason = Some(why),
                News::Ended => break,
            }
        }
        let mut inner = self.lock();
        if inner.stopping {
            return None;
        }
        let ended = inner.process.take();
        drop(inner);
        let mut ended = ended?;
        let status = ended.wait_until(Instant::now() + STOP_GRACE);
        if status.is_none() {
            ended.end();
        }
        let how = status.map_or("without a word".to_owned(), |status| status.to_string());
        Some(reason.unwrap_or_else(|| format!("the node ended ({how})")))
    }
}
