//! A node as a child process, and what parent and child say to each other: both ends.
//!
//! The parent gives a child its orders as JSON in the environment variable [`ORDERS`]. The child binds a
//! free port and says so in a line on its standard output, before it loads anything; the parent hands
//! the addresses of the children so far to the next one. No port is chosen beforehand. A child's standard
//! input is a pipe that the parent holds and never writes to: its end is the order to stop.
//!
//! [`NodeProcess`] is the parent's end, and gives [`News`]; [`serve_if_child`] is the child's.

use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::emulation::Emulation;
use super::http::Settings;
use super::local::LocalOptions;
use super::serve::{self, Progress, Setup};

/// Environment variable that makes a process a child: its orders, as JSON.
pub const ORDERS: &str = "SNN_LOCAL_NODE";
/// How long children may take to end before they are killed: shutting a session down takes
/// milliseconds, the segment that is being computed perhaps a second.
pub const STOP_GRACE: Duration = Duration::from_secs(3);
/// Longest line taken from a child: an error message fits.
const MAX_LINE: u64 = 16 << 10;
/// Pause between looks at whether a child has ended.
const POLL: Duration = Duration::from_millis(5);

/// What a child says, a line each, and that it has ended.
#[derive(Debug)]
pub(super) enum News {
    Listening(String),
    Http(SocketAddr),
    Ready,
    Failed(String),
    Ended,
}

pub(super) type Sender = mpsc::Sender<(usize, News)>;
pub(super) type Receiver = mpsc::Receiver<(usize, News)>;

/// What a child is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) shard: PathBuf,
    pub(super) peers: Vec<String>,
    pub(super) threads: usize,
    pub(super) http: Option<Settings>,
    /// Whether its HTTP may be open beyond this machine.
    pub(super) insecure: bool,
    pub(super) trace: bool,
    pub(super) emulation: Emulation,
    /// Address to listen on, where that is not the loopback interface.
    pub(super) listen: Option<String>,
    /// For nodes of an agent, which serve other machines too.
    pub(super) device: Option<Device>,
}

/// What a node of an agent is told besides.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Device {
    /// The cluster's key file.
    pub(super) key: Option<PathBuf>,
    /// Whether to listen beyond this machine without a key.
    pub(super) insecure: bool,
    /// Name by which the nodes of the cluster look for each other.
    pub(super) cluster: String,
    /// How long a tensor is waited for, where not as long as the request may take.
    pub(super) degrade: Option<Duration>,
    /// Where to keep what a restart of all nodes needs, and how long absent ones are waited for then.
    pub(super) keep: (PathBuf, Duration),
}

/// One child. It ends when its pipe does: when it is told to, and when whoever holds this ends.
#[derive(Debug)]
pub(super) struct NodeProcess {
    rank: usize,
    shard: PathBuf,
    process: Child,
    lifeline: Option<ChildStdin>,
}

impl NodeProcess {
    pub(super) fn spawn(
        rank: usize,
        orders: &Orders,
        options: &LocalOptions,
        tell: Sender,
    ) -> Result<Self> {
        let executable = match &options.executable {
            Some(path) => path.clone(),
            None => env::current_exe().context("own executable")?,
        };
        let launcher = options.hosts.get(rank).map_or(&[][..], |host| &host.launcher);
        let mut words = launcher.iter().map(OsString::as_os_str).chain([executable.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        // A child takes no arguments; the shard only tells readers of process lists who it is.
        command.args(&options.leading_args).arg(&orders.shard);
        command.env(ORDERS, serde_json::to_string(orders)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // Ctrl-C in a terminal reaches the parent alone, which then stops the children in order.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut process =
            command.spawn().with_context(|| format!("start {}", executable.display()))?;
        let lifeline = process.stdin.take();
        if let Some(output) = process.stdout.take() {
            // Ends when the child's output does, which is when the child does.
            thread::Builder::new()
                .name(format!("snn-child-{rank}"))
                .spawn(move || read_lines(rank, output, &tell))?;
        }
        Ok(NodeProcess { rank, shard: orders.shard.clone(), process, lifeline })
    }

    pub(super) fn wait_until(&mut self, deadline: Instant) -> Option<std::process::ExitStatus> {
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn shard(&self) -> &Path {
        &self.shard
    }

    /// Tells it to stop, and does not wait.
    pub(super) fn tell_to_stop(&mut self) {
        drop(self.lifeline.take());
    }

    /// Tells it to stop, waits, and kills it where it takes longer than [`STOP_GRACE`]. Blocks.
    pub(super) fn end(&mut self) {
        self.tell_to_stop();
        if self.wait_until(Instant::now() + STOP_GRACE).is_none() {
            self.kill();
        }
    }

    pub(super) fn kill(&mut self) {
        // An error means that it has just ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn read_lines(rank: usize, output: ChildStdout, tell: &Sender) {
    let mut output = BufReader::new(output);
    let mut line = String::new();
    loop {
        line.clear();
        let read = output.by_ref().take(MAX_LINE).read_line(&mut line);
        if !read.is_ok_and(|bytes| bytes > 0) {
            break;
        }
        let news = match line.trim_end().split_once(' ') {
            Some(("listening", address)) => News::Listening(address.to_owned()),
            Some(("http", address)) => match address.parse() {
                Ok(address) => News::Http(address),
                Err(_) => News::Failed(format!("no address: {address}")),
            },
            Some(("failed", reason)) => News::Failed(reason.to_owned()),
            None if line.trim_end() == "ready" => News::Ready,
            _ => News::Failed("this executable does not serve as a node".to_owned()),
        };
        if tell.blocking_send((rank, news)).is_err() {
            return;
        }
    }
    // Nobody listens any more when the cluster is being stopped.
    let _ = tell.blocking_send((rank, News::Ended));
}

/// Serves a shard where this process was started as a node by [`LocalCluster`], and gives its exit
/// code when it is done; gives `None` at once in any other process. To be called first in `main`.
pub fn serve_if_child() -> Option<ExitCode> {
    let orders = env::var(ORDERS).ok()?;
    super::start_logging();
    let done =
        serde_json::from_str(&orders).context("orders").and_then(|orders| serve_child(&orders));
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("failed {}", crate::terminal::one_line(&error)));
            ExitCode::from(crate::terminal::EXIT_ERROR)
        }
    })
}

fn serve_child(orders: &Orders) -> Result<()> {
    let stopped = follow_lifeline()?;
    let device = orders.device.as_ref();
    let setup = Setup {
        shard: orders.shard.clone(),
        listen: orders.listen.clone(),
        peers: orders.peers.clone(),
        timeout: None,
        threads: orders.threads,
        key: device.and_then(|device| device.key.clone()),
        insecure: device.map_or(orders.listen.is_some(), |device| device.insecure),
        cluster: device.map(|device| device.cluster.clone()),
        // Where a process of one machine dies, that is worth knowing, not hiding.
        takeover: device.is_some(),
        keep: device.map(|device| device.keep.clone()),
        degrade: device.and_then(|device| device.degrade),
        http: orders.http.clone(),
        open_http: orders.insecure,
        // A cluster on one machine has no key, and is not asked for HTTPS.
        may_encrypt: false,
        trace: orders.trace,
        trace_file: None,
        through_router: false,
        emulation: orders.emulation,
    };
    let tell = |progress: Progress<'_>| match progress {
        Progress::Listening(address) => say(&format!("listening {address}")),
        Progress::Http(url) => say(&format!("http {}", url.address)),
        Progress::Waiting(_) | Progress::StandingIn(_) | Progress::Through(_) => {}
        Progress::Unaided(obstacle) => tracing::warn!("{obstacle}"),
        Progress::Ready => say("ready"),
    };
    let stop = async {
        // The thread that holds the other end never drops it unused.
        let _ = stopped.await;
    };
    super::block_on(serve::serve(&setup, &tell, stop))
}

/// Watches standard input; its end means that the parent wants this process to end, or has ended
/// itself. A process that takes longer than [`STOP_GRACE`] then is cut off.
fn follow_lifeline() -> Result<oneshot::Receiver<()>> {
    let (stop, stopped) = oneshot::channel();
    let watch = move || {
        // Nothing is ever written: whatever ends this, the parent is gone.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = stop.send(());
        thread::sleep(STOP_GRACE);
        exit_now();
    };
    thread::Builder::new().name("snn-lifeline".to_owned()).spawn(watch)?;
    Ok(stopped)
}

#[allow(clippy::exit, reason = "the last resort against a process that nobody owns any more")]
fn exit_now() {
    std::process::exit(i32::from(crate::terminal::EXIT_ERROR));
}

/// Tells the parent something. A parent that is gone is noticed by the lifeline.
fn say(line: &str) {
    let mut output = io::stdout().lock();
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}
