//! Hosts of our own on this machine: network namespaces on a bridge, every interface shaped.
//!
//! Takes a number of hosts; gives them, named `snn-bench-R`, at addresses 10.77.0.R+1. Dropping them removes
//! everything. Fails before anything is made where the rights or the tools are missing.

use std::env;
use std::ffi::OsString;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use snn_schemas::cost::Link;

use crate::links::{Measured, Place};

const BRIDGE: &str = "snn-bench";
/// Bytes of a full packet as the shaper counts them.
const PACKET: u64 = 1514;
/// Time that packets take which pass the shapers in one piece, as network hardware takes them: each piece
/// costs four passes of the machine and a timer, and one by one at four times 300 Mbit/s they keep two
/// cores busy. A longer time would let tensors pass unshaped.
const PIECE_SECONDS: f64 = 165e-6;
/// By how much the shaper's timer may be late: what it could not send meanwhile must not be lost.
const LATE_SECONDS: f64 = 60e-6;

pub(crate) struct Namespaces {
    nodes: usize,
}

fn name(rank: usize) -> String {
    format!("snn-bench-{rank}")
}

fn address(rank: usize) -> String {
    format!("10.77.0.{}", rank + 1)
}

/// Runs a command line, whose words have no spaces.
fn sh(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    let done = Command::new(program).args(words).stdout(Stdio::null()).output();
    let done = done.with_context(|| format!("{program}: needed"))?;
    let error = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{line}: {} (are you root?)", error.trim());
    Ok(())
}

impl Namespaces {
    pub(crate) fn make(nodes: usize) -> Result<Namespaces> {
        // From here on whatever was made is removed.
        let made = Namespaces { nodes };
        sh(&format!("ip link add {BRIDGE} type bridge"))?;
        sh(&format!("ip link set {BRIDGE} up"))?;
        for rank in 0..nodes {
            let (name, address, outer) = (name(rank), address(rank), format!("snnb{rank}"));
            sh(&format!("ip netns add {name}"))?;
            sh(&format!("ip link add {outer} type veth peer name eth0 netns {name}"))?;
            sh(&format!("ip link set {outer} master {BRIDGE}"))?;
            sh(&format!("ip link set {outer} up"))?;
            sh(&format!("ip -n {name} addr add {address}/24 dev eth0"))?;
            sh(&format!("ip -n {name} link set eth0 up"))?;
            sh(&format!("ip -n {name} link set lo up"))?;
        }
        Ok(made)
    }

    /// Shapes every host's interface, outwards and inwards.
    pub(crate) fn shape(&self, link: &Link) -> Result<()> {
        let rate = link.bits_per_second.round() as u64;
        let bytes = |seconds: f64| link.bits_per_second * seconds / 8.0;
        let packets = (bytes(PIECE_SECONDS) / PACKET as f64) as u64;
        let spare = (bytes(LATE_SECONDS) as u64).max(PACKET);
        let burst = PACKET * packets.max(1) + spare;
        let piece = if packets > 1 { PACKET * packets } else { 1 << 16 };
        let shaper = format!("root tbf rate {rate}bit burst {burst} latency 500ms");
        for rank in 0..self.nodes {
            // Larger pieces are taken apart by the shaper.
            sh(&format!("ip -n {} link set eth0 gso_max_size {piece}", name(rank)))?;
            sh(&format!("tc -n {} qdisc replace dev eth0 {shaper}", name(rank)))?;
            sh(&format!("tc qdisc replace dev snnb{rank} {shaper}"))?;
        }
        Ok(())
    }

    pub(crate) fn hosts(&self) -> Vec<Place> {
        (0..self.nodes)
            .map(|rank| Place { namespace: name(rank), address: address(rank) })
            .collect()
    }

    /// Runs this program in the first namespace, with its orders in a variable.
    pub(crate) fn run_in_first(&self, variable: &str, orders: &str) -> Result<Measured> {
        let [program, first] = [env::current_exe()?.into(), OsString::from(name(0))];
        let words = ["netns".into(), "exec".into(), first, program];
        let mut command = Command::new("ip");
        command.args(words).env(variable, orders).stderr(Stdio::inherit());
        let done = command.output().context("ip: needed")?;
        ensure!(done.status.success(), "measuring in {}: {}", name(0), done.status);
        serde_json::from_slice(&done.stdout).context("what was measured")
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for rank in 0..self.nodes {
            // What was not made cannot be removed; a namespace takes its end of the pair along.
            let _ = sh(&format!("ip netns del {}", name(rank)));
            let _ = sh(&format!("ip link del snnb{rank}"));
        }
        let _ = sh(&format!("ip link del {BRIDGE}"));
    }
}
