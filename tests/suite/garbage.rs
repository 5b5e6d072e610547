//! Peers that send what no peer should, before and after the handshake: nobody else is harmed.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_compiler::{Nodes, Split};
use snn_runtime::TractEngine;
use snn_runtime::mailbox::MAX_REQUESTS;
use snn_runtime::membership::Role;
use snn_runtime::transport::memory::MemoryTransport;
use snn_runtime::transport::zenoh::{Identity, Link, MAX_MESSAGE, Options, ZenohTransport};
use snn_runtime::transport::{BoxFuture, Event, Transport, TransportError};
use snn_schemas::MAX_GROUPS;
use snn_schemas::wire::{Cancel, TensorFrame};

use crate::cluster::{Cluster, PATIENCE};
use crate::devices::{Devices, WITHIN, ask_through, die_and_return, net, policy_of};
use crate::fixtures::Net;
use crate::{assert_close, folder, image, reference, split};

/// Malformed frames sent to running nodes.
const FRAMES: usize = 12_000;
/// Connections that say nothing sensible.
const CONNECTIONS: usize = 2_000;
/// Connections that say nothing at all, and stay.
const SILENT: usize = 200;
/// Requests whose frames are sent again.
const REPLAYED: u64 = 3;
/// What a node's memory may grow by, in KiB: far less than any of the frames kept would need.
const MAX_GROWTH: u64 = 32 << 10;

/// A stranger's frames, one for each seed: hardly any is a frame that somebody expects.
struct Garbage {
    good: TensorFrame,
}

impl Garbage {
    /// Garbage made from a frame that one of the ranks expects.
    fn new(split: &Split) -> Garbage {
        let mut transfers = split.manifest.transfers.iter();
        let transfer = transfers.find(|transfer| transfer.step.is_some()).unwrap();
        Garbage {
            good: TensorFrame {
                dtype: transfer.dtype,
                from: transfer.from as u16,
                request: 7,
                transfer: transfer.id,
                within: Duration::from_millis(50),
                degraded: false,
                payload: Bytes::from(vec![1; transfer.bytes as usize]),
            },
        }
    }

    fn frame(&self, seed: usize) -> Bytes {
        // A multiplicative hash: positions all over the frame, the same in every run.
        let at = |salt: usize| (seed * 2_654_435_761 + salt * 40_503) >> 7;
        let mut frame = self.good.encode().to_vec();
        match seed % 9 {
            0 => frame.truncate(at(1) % frame.len()),
            1 => {
                let place = at(2) % frame.len();
                frame[place] ^= 1 << (at(3) % 8);
            }
            2 => frame = (0..at(4) % 2_000).map(|i| (at(i + 5) % 256) as u8).collect(),
            3 => frame[3] = (at(6) % 255) as u8 + 2,
            4 => {
                let transfer = (at(7) % 60_000) as u32 + 1_000;
                return TensorFrame { transfer, ..self.good.clone() }.encode();
            }
            5 => frame.extend(vec![0; at(8) % 100_000]),
            // Again what has been sent before.
            6 => {}
            7 => {
                let from = (at(9) % 65_536) as u16;
                return TensorFrame { from, ..self.good.clone() }.encode();
            }
            _ => {
                let (from, request) = (at(10) as u16, at(11) as u64);
                let reason = "nobody asked".repeat(at(12) % 50);
                return Cancel { from, request, again: seed.is_multiple_of(2), reason }.encode();
            }
        }
        frame.into()
    }

    /// Sends the frames of some seeds to every rank in turn.
    async fn send(&self, transport: &ZenohTransport, seeds: std::ops::Range<usize>) {
        for seed in seeds {
            transport.send(seed % 4, self.frame(seed)).await.unwrap();
        }
    }
}

/// Four nodes, with what they compute.
fn cluster() -> (Net, Split, Devices) {
    let net = net();
    let policy = policy_of(&net);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let devices = Devices::start(folder(&net, Some(&policy), Nodes::PerGroup));
    (net, split, devices)
}

/// Somebody who has joined the cluster's network as a rank that it does not have.
async fn stranger(devices: &Devices, split: &Split) -> (Link, ZenohTransport) {
    let options = Options { peers: devices.addresses.clone(), ..Options::default() };
    let link = Link::open(&options).await.unwrap();
    let split = split.manifest.split.clone();
    let identity = Identity { split, rank: MAX_GROUPS - 1, nodes: 4, role: Role::Guest };
    let transport = link.join(&identity, Arc::new(|_| {})).await.unwrap();
    (link, transport)
}

/// What is said on a bare connection: no handshake, half of one, or another protocol's.
fn connect_and_babble(address: &str, seed: usize) {
    let Ok(mut stream) = TcpStream::connect(address) else { return };
    let at = |salt: usize| (seed * 2_654_435_761 + salt * 40_503) >> 7;
    let bytes: Vec<u8> = match seed % 4 {
        0 => b"GET / HTTP/1.1\r\nhost: node\r\n\r\n".to_vec(),
        // The length of a batch, and less or other than it says.
        1 => [&[0xff, 0xff][..], &vec![0x41; at(1) % 4_000]].concat(),
        2 => (0..at(2) % 1_000).map(|i| (at(i + 3) % 256) as u8).collect(),
        _ => vec![0; at(4) % 10],
    };
    // Whoever is thrown out while he talks is welcome to be.
    let _ = stream.write_all(&bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_frames_and_connections_harm_nobody() {
    let (net, split, mut devices) = cluster();
    ask_through(&net, &mut devices, 5, |_, _| {}).await;
    let before = devices.status("VmRSS");
    let (link, transport) = stranger(&devices, &split).await;
    let garbage = Garbage::new(&split);
    let addresses = devices.addresses.clone();
    let babble = tokio::task::spawn_blocking(move || {
        let silent: Vec<_> = (0..SILENT).map(|n| TcpStream::connect(&addresses[n % 4])).collect();
        (0..CONNECTIONS).for_each(|seed| connect_and_babble(&addresses[seed / 4 % 4], seed));
        silent
    });
    let flood = garbage.send(&transport, 0..FRAMES);
    let asked = ask_through(&net, &mut devices, 50, |_, _| {});
    tokio::join!(flood, asked);
    let _silent = babble.await.unwrap();
    ask_through(&net, &mut devices, 5, |_, _| {}).await;
    assert!(devices.all_run());
    for (rank, (before, after)) in before.iter().zip(devices.status("VmRSS")).enumerate() {
        assert!(after < before + MAX_GROWTH, "rank {rank}: {before} to {after} KiB");
    }
    // Larger than what is taken from anybody: it may cost the stranger his connection.
    let _ = transport.send(1, Bytes::from(vec![0; MAX_MESSAGE + 1])).await;
    ask_through(&net, &mut devices, 20, |_, _| {}).await;
    assert!(devices.all_run());
    let limit = MAX_GROWTH + (MAX_MESSAGE >> 10) as u64;
    for (rank, (before, after)) in before.iter().zip(devices.status("VmHWM")).enumerate() {
        assert!(after < before + limit, "rank {rank}: {before} to {after} KiB at most");
    }
    let _ = link.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_requests_survive_deaths_and_a_peer_that_sends_garbage() {
    let (net, split, mut devices) = cluster();
    let (_link, transport) = stranger(&devices, &split).await;
    let done = AtomicBool::new(false);
    let flood = async {
        let garbage = Garbage::new(&split);
        let mut seed = 0;
        while !done.load(Ordering::Relaxed) {
            for _ in 0..20 {
                // A rank whose node is dead takes nothing.
                let _ = transport.send(seed % 4, garbage.frame(seed)).await;
                seed += 1;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seed
    };
    let asked = async {
        ask_through(&net, &mut devices, 200, die_and_return).await;
        done.store(true, Ordering::Relaxed);
    };
    let (sent, ()) = tokio::join!(flood, asked);
    assert!(sent > 200, "{sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_a_peer_has_made_up_keep_no_other_out() {
    let (net, split, mut devices) = cluster();
    ask_through(&net, &mut devices, 2, |_, _| {}).await;
    let (_link, transport) = stranger(&devices, &split).await;
    let mut opened = 0;
    // Of every transfer to a node where no request begins, which waits for what never comes.
    for transfer in split.manifest.transfers.iter().filter(|t| t.step.is_some() && t.to != 0) {
        for request in 0..MAX_REQUESTS as u64 + 10 {
            let frame = TensorFrame {
                dtype: transfer.dtype,
                from: transfer.from as u16,
                request: request << 8 | u64::from(transfer.id),
                transfer: transfer.id,
                within: Duration::from_secs(600),
                degraded: false,
                payload: Bytes::from(vec![0; transfer.bytes as usize]),
            };
            transport.send(transfer.to, frame.encode()).await.unwrap();
            opened += 1;
        }
    }
    assert!(opened > 3 * MAX_REQUESTS, "{opened}");
    ask_through(&net, &mut devices, 20, |_, _| {}).await;
    assert!(devices.all_run());
}

/// Frames as they were sent, each with the rank it was sent to.
type Sent = Arc<Mutex<Vec<(usize, Bytes)>>>;

/// Sends every frame twice, and keeps it for later.
struct Twice {
    network: MemoryTransport,
    sent: Sent,
}

impl Transport for Twice {
    fn send(&self, to: usize, frame: Bytes) -> BoxFuture<'_, Result<(), TransportError>> {
        self.sent.lock().unwrap().push((to, frame.clone()));
        Box::pin(async move {
            self.network.send(to, frame.clone()).await?;
            self.network.send(to, frame).await
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn real_frames_that_are_sent_again_change_no_answer_and_open_no_request() {
    let net = net();
    let policy = policy_of(&net);
    let split = split(&net, Some(&policy), Nodes::PerGroup);
    let sent = Sent::default();
    let kept = Arc::clone(&sent);
    let twice =
        move |network| Arc::new(Twice { network, sent: Arc::clone(&kept) }) as Arc<dyn Transport>;
    let cluster = Cluster::start_with(&split, || TractEngine::new(1), twice).await;
    let ask = async |seed: usize| {
        let input = image(&net, seed);
        let expected = reference::logits(&net, Some(&policy), input.data());
        let answer = cluster.entry().infer(vec![input], WITHIN).await.unwrap();
        assert_close(answer.outputs[0].data(), &expected, &format!("request {seed}"));
        assert!(!answer.degraded);
    };
    let counts = || -> Vec<(u64, u64)> {
        let reports = cluster.nodes.iter().map(|node| node.report());
        reports.map(|report| (report.requests, report.failures)).collect()
    };
    for seed in 0..REPLAYED as usize {
        ask(seed).await;
    }
    // Nodes may have something left to do when the answer is there.
    let deadline = Instant::now() + PATIENCE;
    while counts() != [(REPLAYED, 0); 4] {
        assert!(Instant::now() < deadline, "{:?}", counts());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let frames = std::mem::take(&mut *sent.lock().unwrap());
    assert!(frames.len() >= 3 * REPLAYED as usize, "{}", frames.len());
    for (to, bytes) in frames {
        let sink = cluster.nodes[to].sink();
        sink(Event::Frame { bytes });
    }
    // A request that they had opened would have ended by then, as one that failed.
    tokio::time::sleep(WITHIN + Duration::from_millis(500)).await;
    assert_eq!(counts(), [(REPLAYED, 0); 4]);
    ask(REPLAYED as usize).await;
}
