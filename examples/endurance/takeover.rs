//! From the death of a node to the next answer: a request is made as soon as the node is dead, at
//! another node, and timed until it is answered. Each rank in turn, the one with the head among them.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::devices::{Devices, Model};
use crate::http::{Connection, same};
use crate::quantile;

/// Time for shards to be handed back before the next death.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) fn run(model: &Model, rounds: usize) -> Result<bool> {
    let mut devices = Devices::start(model, &["--http-within", "10"])?;
    let request = model.request(1);
    let expected = Connection::open(devices.http[0])?.infer(&request)?.numbers()?;
    let (mut times, mut bad) = (Vec::new(), 0);
    for round in 0..rounds {
        let rank = round % model.nodes;
        let mut other = Connection::open(devices.http[(rank + 1) % model.nodes])?;
        other.infer(&request)?;
        std::thread::sleep(PAUSE);
        let start = Instant::now();
        devices.kill(rank)?;
        let answer = other.infer(&request)?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        bad += usize::from(answer.status != 200 || !same(&answer.numbers()?, &expected));
        println!("round {round:2}: rank {rank} killed, next answer after {took:.0} ms");
        times.push(took);
        devices.restart(rank)?;
    }
    let worst = times.iter().copied().fold(0.0, f64::max);
    println!(
        "takeover: median {:.0} ms, worst {worst:.0} ms of {rounds}; {bad} wrong or lost",
        quantile(&times, 0.5)
    );
    Ok(bad == 0)
}
