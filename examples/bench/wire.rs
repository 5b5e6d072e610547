//! What the shaped network itself takes: a tensor's time from one namespace to the next, less the link's.
//!
//! Takes the second namespace; gives a signed time. The shapers let the first packets after a pause pass at
//! once, by which a tensor is early; the kernel's own way is some tens of µs, by which it is late. Nodes delay
//! what they send by what is lacking of the link's round trip, so that a tensor takes what it would there.

use std::env;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use snn_schemas::cost::Link;

use crate::links::Place;
use crate::quantile;

/// Set in the process that takes the tensors: where to listen.
pub(crate) const TAKER: &str = "SNN_BENCH_TAKER";
/// Bytes of the tensor: an exchange of the second stage in f16.
const TENSOR: usize = 32_768;
/// Tensors, and the pause before each: the shapers' buckets are full again.
const TENSORS: usize = 41;
const PAUSE: Duration = Duration::from_millis(4);

/// Takes tensors at `address`, a byte back for each, until the other end goes.
pub(crate) fn take(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| address.to_owned())?;
    println!("{}", listener.local_addr()?);
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut tensor = vec![0; TENSOR];
    while stream.read_exact(&mut tensor).is_ok() {
        stream.write_all(&[1])?;
    }
    Ok(())
}

/// Seconds that a tensor and the byte back take beside the time for which the tensor occupies the link.
pub(crate) fn beside(place: &Place, link: &Link) -> Result<f64> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &place.namespace]).arg(env::current_exe()?);
    command.env(TAKER, format!("{}:0", place.address)).stdout(Stdio::piped());
    let mut taker = command.spawn().context("ip: needed")?;
    let mut address = String::new();
    if let Some(output) = taker.stdout.take() {
        BufReader::new(output).read_line(&mut address)?;
    }
    let times = times(address.trim());
    // It ends with the connection; where there was none, it is ended.
    if times.is_err() {
        let _ = taker.kill();
    }
    let _ = taker.wait();
    Ok(quantile(&times?, 0.5) - link.occupied(TENSOR as u64).as_secs_f64())
}

fn times(address: &str) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address).context("the second namespace")?;
    stream.set_nodelay(true)?;
    let tensor = vec![0; TENSOR];
    let once = |_| {
        thread::sleep(PAUSE);
        let start = Instant::now();
        stream.write_all(&tensor)?;
        stream.read_exact(&mut [0])?;
        Ok(start.elapsed().as_secs_f64())
    };
    (0..TENSORS).map(once).collect()
}
