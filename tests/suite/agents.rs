//! Agents that run something, and what others do to them: messages that are none, two who deploy at
//! once, nodes that freeze.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::Bytes;
use snn_compiler::Nodes;
use snn_runtime::agent::Remote;
use snn_runtime::agent::store::MAX_VERSIONS;
use snn_runtime::agent::wire::{File, MAX_CHUNK, MAX_MESSAGE, Request, Version};
use snn_runtime::client::Client;
use snn_schemas::Dtype;

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{children, kill};
use crate::site::{Site, connect, first, infer, net, second, text, versions, written};
use crate::{assert_close, image, reference, ring};

/// Malformed messages to an agent.
const MESSAGES: usize = 1_500;
/// What they may make its memory grow by, in KiB.
const MAX_GROWTH: u64 = 32 << 10;
/// Whoever made the messages says he is this.
const STRANGER: [u8; 16] = [7; 16];

/// A message, whatever the parts are.
fn message(length: u32, header: &[u8], piece: &[u8]) -> Vec<u8> {
    [b"SNNA\x02", &STRANGER[..], &length.to_le_bytes(), header, piece].concat()
}

/// A message as it should be, with a request that a stranger has no right to.
fn sound(request: &Request, piece: &[u8]) -> Vec<u8> {
    let header = serde_json::to_vec(request).unwrap();
    message(header.len() as u32, &header, piece)
}

/// What no agent should be sent, another for each seed.
fn garbage(seed: usize, version: &Version) -> Vec<u8> {
    // A multiplicative hash: places all over the message, the same in every run.
    let at = |salt: usize| (seed * 2_654_435_761 + salt * 40_503) >> 7;
    let (version, file) = (version.clone(), File::Shard(at(1) % 9));
    let put = Request::Put { version: version.clone(), file, offset: at(2) as u64, last: true };
    let mut good = sound(&put, &vec![1; at(3) % 3_000]);
    match seed % 10 {
        0 => good.truncate(at(4) % good.len()),
        1 => {
            let place = at(5) % good.len().min(150);
            good[place] ^= 1 << (at(6) % 8);
        }
        2 => good = (0..at(7) % 2_000).map(|i| (at(i + 8) % 256) as u8).collect(),
        3 => good = message(u32::MAX - (at(9) % 9) as u32, b"{}", b""),
        4 => good = sound(&put, &vec![0; MAX_CHUNK + 1 + at(10) % 100_000]),
        5 => good = message(60_000, &vec![b'['; 60_000], b""),
        6 => {
            let path = r#"{"ask":"have","version":"../../../../etc","file":"manifest"}"#;
            good = message(path.len() as u32, path.as_bytes(), b"");
        }
        // Well written, but he has not claimed the agent: what was overheard may be sent again.
        7 => good = sound(&Request::Stop { version }, b""),
        8 => good = sound(&Request::Forget { version }, b""),
        _ => {}
    }
    good
}

/// A process's resident memory, in KiB.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Every file under a folder.
pub(crate) fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> =
        entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    all.sort();
    all
}

async fn remote(site: &Site, device: usize) -> Remote {
    let address = &site.devices[device].address;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Remote::connect(address, site.key().as_ref()).await {
            Ok(remote) => return remote,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

async fn malformed_messages_change_nothing(site: Site) {
    let net = net();
    let split = tempfile::tempdir().unwrap();
    let made = crate::split(&net, Some(&first(&net)), Nodes::Even(1));
    snn::compile::write(&made, split.path()).unwrap();
    site.deploy(split.path(), &[]);
    let device = &site.devices[0];
    let manifest = std::fs::read(split.path().join("cluster.json")).unwrap();
    let version = Version::of(&manifest);
    let (before, kept) = (memory(device.process.id()), files(&device.dir));
    let stranger = remote(&site, 0).await;
    let mut refused = 0;
    for seed in 0..MESSAGES {
        let bytes = Bytes::from(garbage(seed, &version));
        let answer = stranger.ask_raw(bytes, PATIENCE).await.unwrap();
        let answer = answer.unwrap_or_else(|| panic!("message {seed} has no answer"));
        let said = String::from_utf8_lossy(&answer);
        assert!(said.contains(r#"{"reply":"refused","reason":""#), "message {seed}: {said}");
        refused += 1;
    }
    assert_eq!(refused, MESSAGES);
    // Before any handshake. Where there is TLS, zenoh accepts nobody for 100 ms after one that failed.
    let connections = if site.key.is_some() { 60 } else { 600 };
    for seed in 0..connections {
        let address = [&device.address, &device.front][seed % 2];
        let mut stream = TcpStream::connect(address).unwrap();
        // Whoever is thrown out while he talks is welcome to be.
        let _ = stream.write_all(&garbage(seed, &version));
    }
    let after = memory(device.process.id());
    assert!(after < before + MAX_GROWTH, "{before} to {after} KiB");
    // Larger than what is taken at all; it may cost the stranger his connection.
    for bytes in [MAX_MESSAGE + 1, 80 << 20] {
        let within = Duration::from_secs(2);
        let answer = stranger.ask_raw(Bytes::from(vec![0; bytes]), within).await;
        if let Ok(Some(answer)) = answer {
            assert!(String::from_utf8_lossy(&answer).contains("refused"));
        }
    }

    // A file of another hash, from one who has claimed the agent; then his own words again, too late.
    let owner = remote(&site, 0).await;
    owner.order(&Request::Claim { by: "owner".to_owned() }, PATIENCE).await.unwrap();
    let other = Version::of(b"another manifest");
    let wrong = std::io::Cursor::new(manifest.clone());
    let length = manifest.len() as u64;
    let sent = owner.send((&other, File::Manifest), wrong, length, PATIENCE).await;
    let said = sent.unwrap_err().to_string();
    assert!(said.contains("cluster.json: sha256 ") && said.contains(", expected "), "{said}");
    owner.order(&Request::Forget { version: other }, PATIENCE).await.unwrap();
    owner.order(&Request::Release {}, PATIENCE).await.unwrap();
    let late = owner.order(&Request::Stop { version: version.clone() }, PATIENCE).await;
    let said = late.unwrap_err().to_string();
    assert!(said.ends_with("changed by nobody but who has claimed it"), "{said}");

    assert_eq!(files(&device.dir), kept);
    site.assert_answers(&net, &first(&net)).await;
    assert_eq!(site.deploy(split.path(), &[])["sent"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_to_an_agent_with_a_key_change_nothing() {
    malformed_messages_change_nothing(Site::new(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_to_an_agent_without_a_key_change_nothing() {
    malformed_messages_change_nothing(Site::without_key(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_who_deploy_at_once_are_kept_apart() {
    let (net, site) = (net(), Site::new(4));
    let (one, two) = (written(&net, &first(&net)), written(&net, &second(&net)));
    // Somebody is at work on one of the devices.
    let anna = remote(&site, 2).await;
    anna.order(&Request::Claim { by: "anna@laptop\n".to_owned() }, PATIENCE).await.unwrap();
    for arguments in [&[one.path().to_str().unwrap()][..], &["--stop"]] {
        let refused = site.snnc(arguments);
        let said = text(&refused.stderr);
        assert_eq!((refused.status.code(), said.lines().count()), (Some(2), 1), "{said}");
        assert!(said.starts_with("snnc: claim: pi2: "), "{said}");
        assert!(said.contains("anna@laptop is deploying here; should that have died, "), "{said}");
    }
    assert!(site.devices.iter().all(|device| versions(&device.dir).is_empty()));
    // To look is nobody's business.
    assert!(site.snnc(&[one.path().to_str().unwrap(), "--dry-run"]).status.success());
    assert!(site.snnc(&["--status"]).status.success());
    anna.order(&Request::Release {}, PATIENCE).await.unwrap();

    // Both at the same time: one of them is told, or comes second.
    let start = |split: &Path| {
        let mut command = site.command(&[split.to_str().unwrap(), "--json"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let started = [start(one.path()), start(two.path())];
    let done = started.map(|process| process.wait_with_output().unwrap());
    let served = done.iter().filter(|output| output.status.success()).count();
    assert!(served > 0, "{done:?}");
    for refused in done.iter().filter(|output| !output.status.success()) {
        let said = text(&refused.stderr);
        assert_eq!((refused.status.code(), said.lines().count()), (Some(2), 1), "{said}");
        assert!(said.contains(" is deploying here; "), "{said}");
    }
    if served == 1 {
        let policy = if done[0].status.success() { first(&net) } else { second(&net) };
        site.assert_answers(&net, &policy).await;
    }
    site.deploy(two.path(), &[]);
    site.assert_answers(&net, &second(&net)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_that_were_left_half_way_make_room_for_another() {
    let (net, site) = (net(), Site::new(1));
    let split = tempfile::tempdir().unwrap();
    let made = crate::split(&net, Some(&first(&net)), Nodes::Even(1));
    snn::compile::write(&made, split.path()).unwrap();
    site.deploy(split.path(), &[]);
    let owner = remote(&site, 0).await;
    owner.order(&Request::Claim { by: "owner".to_owned() }, PATIENCE).await.unwrap();
    for number in 0..MAX_VERSIONS + 2 {
        let manifest = number.to_string().into_bytes();
        let (version, length) = (Version::of(&manifest), manifest.len() as u64);
        let manifest = std::io::Cursor::new(manifest);
        owner.send((&version, File::Manifest), manifest, length, PATIENCE).await.unwrap();
    }
    owner.order(&Request::Release {}, PATIENCE).await.unwrap();
    assert_eq!(versions(&site.devices[0].dir).len(), MAX_VERSIONS);
    // What runs is not among those that went.
    site.assert_answers(&net, &first(&net)).await;
    assert_eq!(site.deploy(split.path(), &[])["sent"], 0);
}

/// Two megabytes, more than the queue of any link takes, at the address of an agent, whatever its node's rank.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_input_reaches_the_cluster_through_any_agent() {
    let net = Net { image: [3, 400, 400], ..residual(2, &[2], 8) };
    let policy = ring(&net, 1, Dtype::F16);
    let (site, split) = (Site::new(2), written(&net, &policy));
    site.deploy(split.path(), &[]);
    for (seed, device) in site.devices.iter().enumerate() {
        let fronts = [device.front.clone()];
        let client = Client::connect(&fronts, site.key().as_ref(), PATIENCE).await.unwrap();
        let input = image(&net, seed);
        let expected = reference::logits(&net, Some(&policy), input.data());
        let answer = client.infer(vec![input], PATIENCE).await.unwrap();
        assert_close(answer.outputs[0].data(), &expected, &device.front);
    }
}

pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = connect(address);
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Waits until the metrics of a device have this line.
#[track_caller]
fn wait_for_line(address: SocketAddr, line: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let metrics = get(address, "/metrics");
        if metrics.lines().any(|found| found == line) {
            return;
        }
        assert!(Instant::now() < deadline, "{line}\n{metrics}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_agents_run_as_the_deployer_says_and_takeovers_are_counted() {
    let net = residual(2, &[2, 2], 8);
    let policy = ring(&net, 2, Dtype::F32);
    let mut site = Site::new(2);
    let split = written(&net, &policy);
    let dir = split.path().to_str().unwrap();
    site.deploy(split.path(), &["--degrade", "50", "--deadline", "0.001"]);
    let settings = serde_json::json!({ "degrade_ms": 50, "within_ms": 1 });
    for agent in site.status()["agents"].as_array().unwrap() {
        assert_eq!(agent["versions"][0]["settings"], settings);
    }
    // Other settings for what runs already would have to stop it.
    let refused = site.snnc(&[dir]);
    let said = text(&refused.stderr);
    assert_eq!((refused.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("(degrade 50 ms, deadline 1 ms; asked for: degrade none, "), "{said}");
    // Of a peer that is frozen nothing comes within a millisecond.
    let frozen = children(site.devices[1].process.id());
    kill(frozen[0], "-STOP");
    let mut connection = connect(site.devices[0].http);
    let (status, said) = infer(&mut connection, image(&net, 0).data(), &net);
    assert!(status == 504 && said.contains("within 0.001 s") || status == 503, "{status}: {said}");
    kill(frozen[0], "-CONT");

    // As long as the agent was started with, and kept over a power cut.
    assert!(site.snnc(&["--stop"]).status.success());
    site.deploy(split.path(), &["--degrade", "50"]);
    for device in &mut site.devices {
        device.restart();
    }
    let settings = serde_json::json!({ "degrade_ms": 50, "within_ms": null });
    for agent in site.status()["agents"].as_array().unwrap() {
        assert_eq!(agent["versions"][0]["settings"], settings);
    }
    let fronts = [site.devices[0].front.clone()];
    let client = Client::connect(&fronts, site.key().as_ref(), PATIENCE).await.unwrap();
    let ask = async || client.infer(vec![image(&net, 1)], PATIENCE).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while ask().await.degraded {
        assert!(Instant::now() < deadline);
    }
    wait_for_line(site.devices[0].http, "snn_takeovers_total 0");
    // Who has just joined has yet to hand his shard on.
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Frozen, it is not noticed at once; what it does not send is gone without.
    let frozen = children(site.devices[1].process.id());
    kill(frozen[0], "-STOP");
    let start = Instant::now();
    assert!(ask().await.degraded);
    assert!(start.elapsed() < PATIENCE / 2);
    // Then somebody stands in for it, and nothing is gone without any more.
    wait_for_line(site.devices[0].http, "snn_takeovers_total 1");
    let deadline = Instant::now() + PATIENCE;
    while ask().await.degraded {
        assert!(Instant::now() < deadline);
    }
    let status = get(site.devices[0].http, "/status");
    assert!(status.contains(r#""guest_of":0"#), "{status}");
    kill(frozen[0], "-CONT");
}
