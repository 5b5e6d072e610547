//! What watching costs: short runs of one and the same cluster, watched and not in turns.
//!
//! Watched means that every node records its spans, as for a trace, and that metrics and status are asked
//! of each once a second, as a monitor and a page would. Runs are compared in pairs, one right after the
//! other: how many answers a second, and how much processor time an answer takes, which others on the
//! machine disturb less. The mean of all pairs has an interval by the bootstrap.
//!
//! The second measurement needs no comparison: what a recorded span takes, times the spans of an answer,
//! and what asking for metrics and status takes, are set against the processor time of an answer.

pub(crate) mod node;
mod statistics;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use snn_runtime::watch::{Kind, Recorder};

use self::statistics::bootstrap;
use crate::devices::{Lines, Model, processor_time, wait_ready};
use crate::http::{Connection, Request};

/// How often metrics and status are asked for.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Requests at once: enough that nodes always have something to do.
const CLIENTS: usize = 4;
/// Time after a change before anything is counted: requests that began before it are over.
const SETTLE: Duration = Duration::from_millis(50);
/// Runs before the first pair: caches fill, and records reach the length that they keep.
const WARM_UP: usize = 4;
/// Spans timed in a row.
const SPANS: u32 = 1 << 20;
/// How often each page is asked for to time it.
const PAGES: u32 = 200;

pub(crate) fn run(model: &Model, pairs: usize, seconds: f64) -> Result<bool> {
    let mut cluster = Cluster::start(model)?;
    let request = model.request(3);
    let length = Duration::from_secs_f64(seconds);
    for number in 0..WARM_UP {
        cluster.measure(&request, length, number % 2 == 0)?;
    }
    let (mut rates, mut costs, mut plain, mut spans) = (vec![], vec![], vec![], vec![]);
    for pair in 0..pairs {
        // Each of the two goes first as often.
        let watched_first = pair % 2 == 1;
        let one = cluster.measure(&request, length, watched_first)?;
        let two = cluster.measure(&request, length, !watched_first)?;
        let (off, on) = if watched_first { (two, one) } else { (one, two) };
        rates.push(100.0 * (1.0 - on.rate / off.rate));
        costs.push(100.0 * (on.cost / off.cost - 1.0));
        println!(
            "pair {pair:3}: {:.1} → {:.1} answers/s, {:.4} → {:.4} ms of processor an answer ({:+.2} %)",
            off.rate, on.rate, off.cost, on.cost, costs[pair]
        );
        plain.push(off.cost);
        spans.push(on.spans);
    }
    let (rate, cost) = (bootstrap(&rates), bootstrap(&costs));
    println!("throughput lost, of {pairs} pairs of {seconds} s: {rate}");
    println!("processor time added, of {pairs} pairs of {seconds} s: {cost}");

    let answer = statistics::median(&plain);
    let spans = statistics::median(&spans);
    let span = span_time();
    let recording = 100.0 * spans * span / 1e6 / answer;
    println!(
        "recording: {spans:.0} spans an answer of {span:.0} ns each, {:.2} µs of {:.0} µs: {recording:.2} %",
        spans * span / 1e3,
        1e3 * answer
    );
    cluster.order(false)?;
    let pages = cluster.page_time()?;
    // What the nodes have to give in a second is one second a core.
    let cores = std::thread::available_parallelism()?.get() as f64;
    let asking = 100.0 * pages / WATCH_EVERY.as_secs_f64() / 1e3 / cores;
    println!(
        "metrics and status of all nodes: {pages:.2} ms of processor each second, of {cores} cores: {asking:.2} %"
    );
    println!("together: {:.2} %", recording + asking);
    Ok(cost.is_below(1.0) || recording + asking < 1.0)
}

/// Nanoseconds that recording one span takes, its own look at the clock included.
fn span_time() -> f64 {
    let recorder = Recorder::default();
    recorder.start();
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        (0..SPANS).for_each(|id| recorder.span(Kind::Compute, id, 1, start));
        times.push(start.elapsed().as_nanos() as f64 / f64::from(SPANS));
    }
    statistics::median(&times)
}

/// What a run has shown.
struct Run {
    /// Answers a second.
    rate: f64,
    /// Processor time an answer of all nodes, in ms.
    cost: f64,
    /// Spans recorded an answer.
    spans: f64,
}

/// Four nodes that are told when to record.
struct Cluster {
    nodes: Vec<Told>,
    http: Vec<SocketAddr>,
}

/// A node, and the two ends of what is said to it.
struct Told {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Told {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Told {
    fn start(line: &[String]) -> Result<Told> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(line)
            .env(crate::NODE, crate::TOLD)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = process.stdin.take().context("no pipe")?;
        let answers = BufReader::new(process.stdout.take().context("no pipe")?);
        Ok(Told { process, orders, answers })
    }
}

impl Cluster {
    fn start(model: &Model) -> Result<Cluster> {
        let Lines { lines, http } = Lines::new(model, &[])?;
        let nodes = lines.iter().map(|line| Told::start(line)).collect::<Result<_>>()?;
        http.iter().try_for_each(|&address| wait_ready(address))?;
        Ok(Cluster { nodes, http })
    }

    /// Tells all nodes to record, or not to; gives how many spans they have recorded so far.
    fn order(&mut self, record: bool) -> Result<u64> {
        let mut spans = 0;
        for node in &mut self.nodes {
            writeln!(node.orders, "{}", if record { "on" } else { "off" })?;
            node.orders.flush()?;
            let mut answer = String::new();
            node.answers.read_line(&mut answer)?;
            spans += answer.trim().parse::<u64>().context("a node has ended")?;
        }
        Ok(spans)
    }

    fn processor_time(&self) -> Result<Duration> {
        self.nodes.iter().map(|node| processor_time(node.process.id())).sum()
    }

    fn measure(&mut self, request: &Request, length: Duration, watch: bool) -> Result<Run> {
        let spans = self.order(watch)?;
        std::thread::sleep(SETTLE);
        let (before, start) = (self.processor_time()?, Instant::now());
        let end = start + length;
        let http = &self.http;
        let ask = |number: usize| -> Result<usize> {
            let mut node = Connection::open(http[number % http.len()])?;
            let mut answers = 0;
            while Instant::now() < end {
                answers += usize::from(node.infer(request)?.status == 200);
            }
            Ok(answers)
        };
        let look = || -> Result<usize> {
            while watch && Instant::now() < end {
                http.iter().try_for_each(|&http| look_at(http))?;
                std::thread::sleep(WATCH_EVERY.min(end.saturating_duration_since(Instant::now())));
            }
            Ok(0)
        };
        let answers = std::thread::scope(|scope| -> Result<usize> {
            let mut threads: Vec<_> = (0..CLIENTS).map(|n| scope.spawn(move || ask(n))).collect();
            threads.push(scope.spawn(look));
            threads.into_iter().try_fold(0, |sum, thread| {
                Ok(sum + thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??)
            })
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let spent = self.processor_time()? - before;
        let answers = answers.max(1) as f64;
        let spans = (self.order(false)? - spans) as f64;
        let cost = spent.as_secs_f64() * 1e3 / answers;
        Ok(Run { rate: answers / seconds, cost, spans: spans / answers })
    }

    /// Processor time of all nodes for the metrics and the status of each, in ms.
    fn page_time(&self) -> Result<f64> {
        let before = self.processor_time()?;
        for _ in 0..PAGES {
            self.http.iter().try_for_each(|&http| look_at(http))?;
        }
        let spent = self.processor_time()? - before;
        Ok(spent.as_secs_f64() * 1e3 / f64::from(PAGES))
    }
}

/// Looks at a node once, as a monitor and a page do.
fn look_at(http: SocketAddr) -> Result<()> {
    let mut node = Connection::open(http)?;
    node.get("/metrics")?;
    node.get("/status")?;
    Ok(())
}
