//! Many clients at once over HTTP, spread over the nodes, each asking again as soon as it is answered.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::devices::{Devices, Model};
use crate::http::{Connection, same};
use crate::quantile;

/// What a client waits after it was turned away, as `retry-after` says in whole seconds at least.
const TURNED_AWAY: Duration = Duration::from_secs(1);

pub(crate) fn run(model: &Model, count: usize, seconds: u64) -> Result<bool> {
    let devices = Devices::start(model, &["--http-within", "10"])?;
    let request = model.request(2);
    let expected = Connection::open(devices.http[0])?.infer(&request)?.numbers()?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let client = |number: usize| -> Result<(Vec<f64>, BTreeMap<u16, usize>, usize)> {
        let mut node = Connection::open(devices.http[number % model.nodes])?;
        let (mut latencies, mut statuses, mut wrong) = (Vec::new(), BTreeMap::new(), 0);
        while Instant::now() < end {
            let start = Instant::now();
            let answer = node.infer(&request)?;
            *statuses.entry(answer.status).or_insert(0) += 1;
            match answer.status {
                200 => {
                    latencies.push(start.elapsed().as_secs_f64() * 1e3);
                    wrong += usize::from(!same(&answer.numbers()?, &expected));
                }
                _ => std::thread::sleep(TURNED_AWAY),
            }
        }
        Ok((latencies, statuses, wrong))
    };
    let (mut latencies, mut statuses, mut wrong) = (Vec::new(), BTreeMap::new(), 0);
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..count).map(|n| scope.spawn(move || client(n))).collect();
        for client in clients {
            let (times, codes, bad) =
                client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            latencies.extend(times);
            codes.into_iter().for_each(|(code, n)| *statuses.entry(code).or_insert(0) += n);
            wrong += bad;
        }
        Ok(())
    })?;
    println!(
        "{count} clients, {seconds} s: {:.1} answers/s, p50 {:.1} ms, p99 {:.1} ms; statuses {statuses:?}, {wrong} wrong",
        latencies.len() as f64 / seconds as f64,
        quantile(&latencies, 0.5),
        quantile(&latencies, 0.99),
    );
    Ok(wrong == 0 && statuses.keys().all(|status| matches!(status, 200 | 429)))
}
