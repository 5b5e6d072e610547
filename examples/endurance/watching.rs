//! What watching costs: runs with traces recorded and metrics and status asked for every second,
//! against runs without, in turns.
//!
//! The machine's own noise is far larger than the cost, so runs are compared in pairs, and besides
//! throughput the processor time a request is given, which others on the machine disturb less.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::devices::{Devices, Model};
use crate::http::{Connection, Request};
use crate::quantile;

const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Requests at once: enough that nodes always have something to do.
const CLIENTS: usize = 4;

/// Answers a second, and processor time an answer in ms.
struct Run {
    rate: f64,
    cost: f64,
}

pub(crate) fn run(model: &Model, pairs: usize, seconds: f64) -> Result<bool> {
    let plain = Devices::start(model, &[])?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("trace.json");
    let watched = Devices::start(model, &["--trace", &file.display().to_string()])?;
    let length = Duration::from_secs_f64(seconds);
    let request = model.request(3);
    for devices in [&plain, &watched] {
        measure(devices, &request, length, false)?;
    }
    let (mut rates, mut costs) = (Vec::new(), Vec::new());
    for pair in 0..pairs {
        // Each of the two goes first as often.
        let (off, on) = match pair % 2 {
            0 => {
                let off = measure(&plain, &request, length, false)?;
                (off, measure(&watched, &request, length, true)?)
            }
            _ => {
                let on = measure(&watched, &request, length, true)?;
                (measure(&plain, &request, length, false)?, on)
            }
        };
        rates.push(100.0 * (1.0 - on.rate / off.rate));
        costs.push(100.0 * (on.cost / off.cost - 1.0));
        println!(
            "pair {pair:2}: {:.1} → {:.1} answers/s ({:+.2} %), {:.3} → {:.3} ms of processor an answer",
            off.rate, on.rate, -rates[pair], off.cost, on.cost
        );
    }
    for (what, numbers) in [("throughput lost", &rates), ("processor time added", &costs)] {
        println!(
            "{what}: median {:+.2} %, quartiles {:+.2} and {:+.2} %, of {pairs} pairs",
            quantile(numbers, 0.5),
            quantile(numbers, 0.25),
            quantile(numbers, 0.75)
        );
    }
    Ok(true)
}

fn measure(devices: &Devices, request: &Request, length: Duration, watch: bool) -> Result<Run> {
    let ticks = || -> Result<u64> { Ok(devices.usage()?.iter().map(|usage| usage.ticks).sum()) };
    let before = ticks()?;
    let start = Instant::now();
    let end = start + length;
    let ask = |number: usize| -> Result<usize> {
        let mut node = Connection::open(devices.http[number % devices.http.len()])?;
        let mut answers = 0;
        while Instant::now() < end {
            answers += usize::from(node.infer(request)?.status == 200);
        }
        Ok(answers)
    };
    let look = || -> Result<usize> {
        while watch && Instant::now() < end {
            for &http in &devices.http {
                let mut node = Connection::open(http)?;
                node.get("/metrics")?;
                node.get("/status")?;
            }
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
    let cost = 10.0 * (ticks()? - before) as f64 / answers.max(1) as f64;
    Ok(Run { rate: answers as f64 / seconds, cost })
}
