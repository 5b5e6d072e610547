//! What a node's death and return cost those who ask meanwhile: requests are made all the time at each of the
//! other nodes while one dies and comes back, and timed by what had just happened.
//!
//! The node with the head takes every second turn: it is the one whose questions have to find their way.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::devices::{Devices, Model};
use crate::http::{Connection, Request, same};
use crate::quantile;

/// How long a node stays dead, and how long it stays back before the next death.
const DEAD: Duration = Duration::from_millis(300);
const BACK: Duration = Duration::from_millis(700);

/// One answer: when it was asked for, how long it took, and whether it was right.
struct Answer {
    asked: Instant,
    took: Duration,
    right: bool,
}

pub(crate) fn run(model: &Model, rounds: usize) -> Result<bool> {
    let mut devices = Devices::start(model, &["--http-within", "10"])?;
    let request = model.request(1);
    let expected = Connection::open(devices.http[0])?.infer(&request)?.numbers()?;
    let (mut deaths, mut returns, mut bad) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds {
        let rank = if round % 2 == 0 { 0 } else { round / 2 % model.nodes };
        let others: Vec<SocketAddr> =
            (0..model.nodes).filter(|&other| other != rank).map(|o| devices.http[o]).collect();
        let (answers, ended) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        let back = thread::scope(|scope| -> Result<Instant> {
            let askers: Vec<_> = others
                .iter()
                .map(|&at| {
                    let (answers, ended) = (&answers, &ended);
                    let (request, expected) = (&request, &expected);
                    scope.spawn(move || ask(at, request, expected, answers, ended))
                })
                .collect();
            thread::sleep(Duration::from_millis(50));
            devices.kill(rank)?;
            thread::sleep(DEAD);
            let back = Instant::now();
            devices.start_again(rank)?;
            thread::sleep(BACK);
            ended.store(true, Ordering::Relaxed);
            for asker in askers {
                asker.join().ok().context("a client's thread ended")??;
            }
            Ok(back)
        })?;
        crate::devices::wait_ready(devices.http[rank])?;
        let answers = answers.into_inner().unwrap_or_default();
        let longest = |after: bool| {
            let of = answers.iter().filter(|answer| (answer.asked >= back) == after);
            of.map(|answer| answer.took.as_secs_f64() * 1e3).fold(0.0, f64::max)
        };
        let (death, back) = (longest(false), longest(true));
        bad += answers.iter().filter(|answer| !answer.right).count();
        println!(
            "round {round:3}: rank {rank}, longest answer beside its death {death:.0} ms, beside its return {back:.0} ms, {} answers",
            answers.len()
        );
        deaths.push(death);
        returns.push(back);
    }
    for (what, times) in [("death", &deaths), ("return", &returns)] {
        let worst = times.iter().copied().fold(0.0, f64::max);
        println!(
            "longest answer beside a {what}: median {:.0} ms, worst {worst:.0} ms of {rounds}",
            quantile(times, 0.5)
        );
    }
    println!("{bad} wrong or lost");
    Ok(bad == 0)
}

/// Asks one node until the end.
fn ask(
    at: SocketAddr,
    request: &Request,
    expected: &[f64],
    answers: &Mutex<Vec<Answer>>,
    ended: &AtomicBool,
) -> Result<()> {
    let mut connection = Connection::open(at)?;
    while !ended.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let answer = connection.infer(request)?;
        let right = answer.status == 200 && same(&answer.numbers()?, expected);
        let took = asked.elapsed();
        if let Ok(mut answers) = answers.lock() {
            answers.push(Answer { asked, took, right });
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
