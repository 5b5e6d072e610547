//! Requests at a steady rate for as long as asked, at each node in turn, watched as a monitor would.
//!
//! Prints a line a minute; at the end what has grown since the first tenth, when caches are warm.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::devices::{Devices, Model, Usage};
use crate::http::{Connection, Request, same};
use crate::quantile;

const INPUTS: usize = 16;
/// How often metrics and status are asked for, as a monitor and a page would.
const WATCH_EVERY: Duration = Duration::from_secs(5);

pub(crate) fn run(model: &Model, minutes: u64, rate: f64) -> Result<bool> {
    let devices = Devices::start(model, &[])?;
    let requests: Vec<Request> = (0..INPUTS).map(|seed| model.request(seed)).collect();
    let nodes = devices.http.iter().map(|&http| Connection::open(http));
    let mut nodes: Vec<Connection> = nodes.collect::<Result<_>>()?;
    let expected: Vec<Vec<f64>> = requests
        .iter()
        .map(|request| nodes[0].infer(request).and_then(|answer| answer.numbers()))
        .collect::<Result<_>>()?;
    println!("minute  answers  wrong  lost  median ms  p99 ms  resident KiB  descriptors  threads");
    let start = Instant::now();
    let (mut asked, mut wrong, mut lost) = (0u32, 0u32, 0u32);
    let mut samples: Vec<(Vec<Usage>, f64, f64)> = Vec::new();
    let mut watched = start;
    for minute in 1..=minutes {
        let mut latencies = Vec::new();
        while start.elapsed() < Duration::from_secs(60 * minute) {
            let due = start + Duration::from_secs_f64(f64::from(asked) / rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let (input, node) = (asked as usize % INPUTS, asked as usize / INPUTS % nodes.len());
            asked += 1;
            let began = Instant::now();
            match nodes[node].infer(&requests[input]) {
                Ok(answer) if answer.status == 200 => {
                    latencies.push(began.elapsed().as_secs_f64() * 1e3);
                    wrong += u32::from(!same(&answer.numbers()?, &expected[input]));
                }
                Ok(_) | Err(_) => {
                    lost += 1;
                    nodes[node] = Connection::open(devices.http[node])?;
                }
            }
            if watched.elapsed() > WATCH_EVERY {
                watched = Instant::now();
                for node in &mut nodes {
                    node.get("/metrics")?;
                    node.get("/status")?;
                }
            }
        }
        let usage = devices.usage()?;
        let (median, worst) = (quantile(&latencies, 0.5), quantile(&latencies, 0.99));
        let list =
            |of: fn(&Usage) -> u64| usage.iter().map(of).map(|n| n.to_string()).collect::<Vec<_>>();
        println!(
            "{minute:6}  {:7}  {wrong:5}  {lost:4}  {median:9.2}  {worst:6.2}  {}  {}  {}",
            latencies.len(),
            list(|u| u.resident).join(" "),
            list(|u| u.descriptors as u64).join(" "),
            list(|u| u.threads).join(" "),
        );
        samples.push((usage, median, worst));
    }
    conclude(&samples);
    println!("{asked} requests, {wrong} wrong, {lost} lost");
    Ok(wrong + lost == 0)
}

/// Says what has grown between the end of the first tenth and the end.
fn conclude(samples: &[(Vec<Usage>, f64, f64)]) {
    let (Some(last), Some(first)) = (samples.last(), samples.get(samples.len() / 10)) else {
        return;
    };
    for (rank, (before, after)) in first.0.iter().zip(&last.0).enumerate() {
        println!(
            "rank {rank}: resident {} → {} KiB ({:+.1} %), descriptors {} → {}, threads {} → {}",
            before.resident,
            after.resident,
            100.0 * (after.resident as f64 / before.resident as f64 - 1.0),
            before.descriptors,
            after.descriptors,
            before.threads,
            after.threads,
        );
    }
    let quarter = (samples.len() / 4).max(1);
    let median = |part: &[(Vec<Usage>, f64, f64)]| {
        quantile(&part.iter().map(|sample| sample.1).collect::<Vec<_>>(), 0.5)
    };
    let (early, late) = (median(&samples[..quarter]), median(&samples[samples.len() - quarter..]));
    println!("median latency, first quarter → last: {early:.2} → {late:.2} ms");
}
