//! Agents and those who deploy, as processes over loopback: from four waiting devices to answers, and
//! from one version to the next without a failed request.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use snn::run::input::write_npy;
use snn_compiler::Nodes;
use snn_runtime::agent::{AGENT_PORT, FRONT_PORT};
use snn_runtime::client::Client;
use snn_runtime::key::ClusterKey;
use snn_runtime::transport::zenoh::{Link, Options};
use snn_schemas::Dtype;

use crate::agents::get;
use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{NodeProcess, SNN_RUN, children, kill};
use crate::segment::{Segment, assert_answers};
use crate::site::{
    Device, Site, connect, first, infer, logits, net, second, text, versions, written,
};
use crate::trust::write_key;
use crate::{array, image, reference, ring, split};

#[tokio::test(flavor = "multi_thread")]
async fn four_devices_get_their_shards_answer_and_stop() {
    let (net, site) = (net(), Site::new(4));
    let split = written(&net, &first(&net));
    let report = site.deploy(split.path(), &[]);
    assert_eq!(report["serves"], true);
    let devices: Vec<&str> =
        (0..4).map(|r| report["plan"][r]["device"].as_str().unwrap()).collect();
    assert_eq!(devices, ["pi0", "pi1", "pi2", "pi3"]);
    site.assert_answers(&net, &first(&net)).await;

    let status = site.status();
    for rank in 0..4 {
        let version = &status["agents"][rank]["versions"][0];
        assert_eq!(
            (&version["rank"], &version["node"]),
            (&rank.into(), &"ready".into()),
            "{status}"
        );
        assert_eq!(version["serves"], true);
    }
    // The same again has nothing to send, and stops nothing.
    let again = site.deploy(split.path(), &[]);
    assert_eq!((&again["sent"], &again["serves"]), (&0.into(), &true.into()), "{again}");
    site.assert_answers(&net, &first(&net)).await;

    let stopped = site.snnc(&["--stop"]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    assert_eq!(text(&stopped.stdout).lines().count(), 4);
    let (status, body) = infer(&mut connect(site.devices[0].http), image(&net, 0).data(), &net);
    assert_eq!((status, body.as_str()), (503, r#"{"error":"nothing is deployed here"}"#));
    assert_eq!(text(&site.snnc(&["--stop"]).stdout), "nothing runs\n");
    let table = text(&site.snnc(&["--status"]).stdout);
    assert_eq!(table.matches("waits for work").count(), 4, "{table}");
}

/// Asks without end, until told to stop; every answer must be right by one of the two policies.
fn ask_on(
    address: SocketAddr,
    net: Net,
    (stop, answers): (Arc<AtomicBool>, Arc<AtomicUsize>),
    keep: bool,
) -> std::thread::JoinHandle<Vec<String>> {
    std::thread::spawn(move || {
        let input = image(&net, 7);
        let right: Vec<Vec<f32>> = [first(&net), second(&net)]
            .iter()
            .map(|policy| reference::logits(&net, Some(policy), input.data()))
            .collect();
        let is = |found: &[f32], right: &[f32]| {
            found.iter().zip(right).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0))
        };
        let mut connection = connect(address);
        let mut failures = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            if !keep {
                connection = connect(address);
            }
            match infer(&mut connection, input.data(), &net) {
                (200, answer) => {
                    let found = logits(&answer);
                    if !right.iter().any(|right| is(&found, right)) {
                        failures.push(format!("wrong: {found:?}"));
                    }
                }
                // Four askers never fill the queue.
                (status, answer) => failures.push(format!("{status}: {answer}")),
            }
            answers.fetch_add(1, Ordering::Relaxed);
        }
        failures
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_is_replaced_without_a_failed_request() {
    let (net, site) = (net(), Site::new(4));
    let (one, two) = (written(&net, &first(&net)), written(&net, &second(&net)));
    site.deploy(one.path(), &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let answers = Arc::new(AtomicUsize::new(0));
    // Over connections that stay open for all of it, and over one a request.
    let askers: Vec<_> = (0..4)
        .map(|number| {
            let shared = (Arc::clone(&stop), Arc::clone(&answers));
            ask_on(site.devices[number].http, residual(4, &[2, 2], 8), shared, number % 2 == 0)
        })
        .collect();
    let (fronts, key) = ([site.devices[1].front.clone()], site.key());
    let client = Client::connect(&fronts, key.as_ref(), PATIENCE).await.unwrap();
    let before = answers.load(Ordering::Relaxed);
    for split in [&two, &one, &two] {
        assert_eq!(site.deploy(split.path(), &[])["serves"], true);
        // At once; a node may be slow to report, but not to all of them.
        let is_ready =
            |device: &Device| get(device.http, "/v2/health/ready").starts_with("HTTP/1.1 200 ");
        assert!(site.devices.iter().any(is_ready));
        client.infer(vec![image(&net, 1)], PATIENCE).await.unwrap();
    }
    let meanwhile = answers.load(Ordering::Relaxed) - before;
    stop.store(true, Ordering::Relaxed);
    let failures: Vec<String> =
        askers.into_iter().flat_map(|asker| asker.join().unwrap()).collect();
    assert_eq!(failures, [""; 0], "of {meanwhile} requests");
    assert!(meanwhile > 20, "{meanwhile} requests tell nothing");
    site.assert_answers(&net, &second(&net)).await;
    // The old version is stopped, and still there to go back to.
    for agent in site.status()["agents"].as_array().unwrap() {
        assert_eq!(agent["versions"].as_array().unwrap().len(), 1, "{agent}");
    }
    for device in &site.devices {
        assert_eq!(versions(&device.dir).len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_answers_wrongly_is_rolled_back_and_power_cuts_are_survived() {
    let (net, mut site) = (net(), Site::new(4));
    let (one, two) = (written(&net, &first(&net)), written(&net, &second(&net)));
    let at = |name: &str| site.folder.path().join(name).display().to_string();
    let input = array(&image(&net, 3));
    let mut truth = reference::logits(&net, Some(&second(&net)), &input.data);
    let output = |data: Vec<f32>| snn::run::input::Array { shape: vec![1, net.classes], data };
    write_npy(Path::new(&at("x.npy")), &input).unwrap();
    write_npy(Path::new(&at("right.npy")), &output(truth.clone())).unwrap();
    truth[2] += 1.0;
    write_npy(Path::new(&at("wrong.npy")), &output(truth)).unwrap();
    let checked = |expect: &str| {
        let (x, y) = (at("x.npy"), at(expect));
        site.snnc(&[two.path().to_str().unwrap(), "--input", &x, "--expect", &y])
    };

    // With nothing to go back to, nothing is left running.
    let refused = checked("wrong.npy");
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stderr));
    assert!(text(&site.snnc(&["--status"]).stdout).contains("waits for work"));
    assert!(site.devices.iter().all(|device| versions(&device.dir).is_empty()));

    site.deploy(one.path(), &[]);
    let refused = checked("wrong.npy");
    let said = text(&refused.stderr);
    assert_eq!((refused.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("deploy: the cluster answers wrongly: off by "), "{said}");
    assert!(said.ends_with("; rolled back\n"), "{said}");
    site.assert_answers(&net, &first(&net)).await;
    assert!(site.devices.iter().all(|device| versions(&device.dir).len() == 1));

    // The plug of every device is pulled; each goes on with what was current.
    for device in &mut site.devices {
        device.restart();
    }
    let deadline = Instant::now() + PATIENCE;
    let ready = |site: &Site| {
        let status = site.status();
        let agents = status["agents"].as_array().unwrap().clone();
        agents.iter().all(|agent| agent["versions"][0]["node"] == "ready")
    };
    while !ready(&site) {
        assert!(Instant::now() < deadline, "{}", site.status());
        std::thread::sleep(Duration::from_millis(100));
    }
    site.assert_answers(&net, &first(&net)).await;
    let right = site.snnc(&[
        two.path().to_str().unwrap(),
        "--input",
        &site.folder.path().join("x.npy").display().to_string(),
        "--expect",
        &site.folder.path().join("right.npy").display().to_string(),
    ]);
    assert!(right.status.success(), "{}", text(&right.stderr));
    site.assert_answers(&net, &second(&net)).await;

    // A node that is killed is started again by its agent.
    let node = children(site.devices[2].process.id());
    kill(node[0], "-KILL");
    let deadline = Instant::now() + PATIENCE;
    while children(site.devices[2].process.id()) == node || !ready(&site) {
        assert!(Instant::now() < deadline, "{}", site.status());
        std::thread::sleep(Duration::from_millis(100));
    }
    site.assert_answers(&net, &second(&net)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_agents_meet_at_a_peer_where_the_deployers_addresses_are_not_theirs() {
    let Some(segment) = Segment::new(2) else { return };
    segment.block_multicast();
    segment.separate_addresses();
    let net = residual(2, &[2, 2], 8);
    let policy = ring(&net, 2, Dtype::F32);
    let (split, folder) = (written(&net, &policy), tempfile::tempdir().unwrap());
    let (key, file) =
        (ClusterKey::new(Duration::from_secs(3600)).unwrap(), folder.path().join("cluster.key"));
    write_key(&file, &key);
    let at = |device: usize, port: u16| format!("{}:{port}", segment.ip(device));
    let agent = |device: usize, more: &[&str]| {
        let prefix = segment.prefix(device);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).args([SNN_RUN, "--agent", "--name", &format!("pi{device}")]);
        command.arg("--dir").arg(folder.path().join(device.to_string()));
        command.arg("--key").arg(&file).args(more);
        let mut agent = NodeProcess::spawn(command);
        while !agent.line().starts_with("agent ") {}
        agent
    };
    let deploy = |within: Duration| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snnc"));
        command.arg("deploy").arg(split.path()).arg("--key").arg(&file);
        command.args(["--within", &within.as_secs().to_string()]);
        command.args((0..2).flat_map(|device| ["--to".to_owned(), at(device, AGENT_PORT)]));
        command.output().unwrap()
    };
    {
        let _agents = [agent(0, &[]), agent(1, &[])];
        let said = text(&deploy(Duration::from_secs(5)).stderr);
        assert!(said.contains(" not ready within 5 s"), "{said}");
    }
    // What is no node of theirs, and knows both: it tells each where the other is.
    let listen = format!("{}:0", segment.here());
    let meeting = Options { listen, key: Some(key.clone()), ..Options::default() };
    let meeting = Link::open_router(&meeting).await.unwrap();
    let _agents = [0, 1].map(|device| agent(device, &["--peer", meeting.address()]));
    let done = deploy(PATIENCE);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let expected = reference::logits(&net, Some(&policy), image(&net, 1).data());
    for device in 0..2 {
        assert_answers(&at(device, FRONT_PORT), Some(&key), &net, &expected).await;
    }
}

/// Passes bytes on to `to`; the first connection is cut once `limit` bytes have gone there.
fn fragile(to: &str, limit: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (to, passed) = (to.to_owned(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&passed);
    std::thread::spawn(move || {
        for inner in listener.incoming().map_while(Result::ok) {
            let Ok(outer) = TcpStream::connect(&to) else { return };
            let (mut back, mut to) = (outer.try_clone().unwrap(), inner.try_clone().unwrap());
            std::thread::spawn(move || drop(std::io::copy(&mut back, &mut to)));
            let (mut inner, mut outer, counted) = (inner, outer, Arc::clone(&counted));
            std::thread::spawn(move || {
                let mut bytes = [0; 16 << 10];
                while let Ok(count @ 1..) = inner.read(&mut bytes) {
                    let before = counted.fetch_add(count, Ordering::Relaxed);
                    let cut = before < limit && before + count >= limit;
                    if cut || outer.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
                let _ = inner.shutdown(std::net::Shutdown::Both);
                let _ = outer.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (address, passed)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_link_costs_a_piece_and_a_part_goes_on_from_its_length() {
    let net = residual(2, &[2, 2], 128);
    let mut site = Site::new(1);
    let folder = tempfile::tempdir().unwrap();
    snn::compile::write(&split(&net, None, Nodes::Even(1)), folder.path()).unwrap();
    let shard = std::fs::read(folder.path().join("shard_0.onnx")).unwrap();
    assert!(shard.len() > 1 << 20, "{} bytes are too few to be cut", shard.len());

    let (address, passed) = fragile(&site.devices[0].address, shard.len() / 2);
    let direct = std::mem::replace(&mut site.devices[0].address, address);
    let report = site.deploy(folder.path(), &[]);
    assert_eq!((&report["sent"], &report["kept"]), (&shard.len().into(), &0.into()));
    let passed = passed.load(Ordering::Relaxed);
    assert!(passed > shard.len() && passed < shard.len() * 3 / 2, "{passed} of {}", shard.len());
    site.devices[0].address = direct;

    // As if the power had gone off half way.
    assert!(site.snnc(&["--stop"]).status.success());
    let version = versions(&site.devices[0].dir).remove(0);
    std::fs::remove_file(version.join("shard_0.onnx")).unwrap();
    std::fs::write(version.join("shard_0.onnx.part"), &shard[..shard.len() / 2]).unwrap();
    let report = site.deploy(folder.path(), &[]);
    assert_eq!(report["kept"], shard.len() / 2);
    assert_eq!(report["sent"], shard.len() - shard.len() / 2);
    // A part that is not what it should be is found out, and sent anew.
    assert!(site.snnc(&["--stop"]).status.success());
    std::fs::remove_file(version.join("shard_0.onnx")).unwrap();
    std::fs::write(version.join("shard_0.onnx.part"), vec![0; shard.len() / 2]).unwrap();
    let refused = site.snnc(&[folder.path().to_str().unwrap()]);
    let said = text(&refused.stderr);
    assert_eq!((refused.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("shard_0.onnx: sha256 ") && said.contains(", expected "), "{said}");
    assert_eq!(site.deploy(folder.path(), &[])["sent"], shard.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_has_changed_on_disk_is_sent_again() {
    let (net, mut site) = (net(), Site::new(1));
    let folder = tempfile::tempdir().unwrap();
    snn::compile::write(&split(&net, Some(&first(&net)), Nodes::Even(1)), folder.path()).unwrap();
    let shard = std::fs::read(folder.path().join("shard_0.onnx")).unwrap();
    site.deploy(folder.path(), &[]);
    let file = versions(&site.devices[0].dir).remove(0).join("shard_0.onnx");
    let mut changed = shard.clone();
    *changed.last_mut().unwrap() ^= 1;
    // After a power cut, as that of the current version, which cannot be started any more.
    site.devices[0].pull_the_plug();
    std::fs::write(&file, &changed).unwrap();
    site.devices[0].plug_in();
    assert_eq!(site.deploy(folder.path(), &[])["sent"], shard.len());
    assert_eq!(std::fs::read(&file).unwrap(), shard);
    site.assert_answers(&net, &first(&net)).await;
    // While it runs.
    std::fs::write(&file, &changed).unwrap();
    assert_eq!(site.deploy(folder.path(), &[])["sent"], shard.len());
    assert_eq!(std::fs::read(&file).unwrap(), shard);
    site.assert_answers(&net, &first(&net)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_has_the_key_deploys_and_only_what_is_whole() {
    let (net, site) = (net(), Site::new(2));
    let split = written(&net, &first(&net));
    let dir = split.path().to_str().unwrap();
    let other = Site::new(0);

    let ask = |key: Option<&Path>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snnc"));
        command.args(["deploy", dir, "--to", &site.devices[0].address]);
        if let Some(key) = key {
            command.arg("--key").arg(key);
        }
        command.output().unwrap()
    };
    for stranger in [None, other.key.as_deref()] {
        let refused = ask(stranger);
        let said = text(&refused.stderr);
        assert_eq!((refused.status.code(), said.lines().count()), (Some(2), 1), "{said}");
        let expected = "no agent answers there, or none that has this key\n";
        assert!(said.ends_with(expected), "{said}");
    }
    // Too few devices, with the way out.
    let few = site.snnc(&[dir]);
    let said = text(&few.stderr);
    assert_eq!(few.status.code(), Some(2));
    assert!(said.contains("4 nodes, but only 2 agents: pi0, pi1 (snnc split --nodes 2"), "{said}");
    // A shard that was changed is named before anybody is asked.
    let shard = split.path().join("shard_2.onnx");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let said = text(&site.snnc(&[dir]).stderr);
    assert!(said.starts_with(&format!("snnc: {}: sha256 ", shard.display())), "{said}");
    assert!(site.devices.iter().all(|device| versions(&device.dir).is_empty()));

    // Without a key an agent keeps to its own machine.
    let exposed = Command::new(SNN_RUN)
        .args(["--agent", "--serve", "127.0.0.1:0", "--listen", "0.0.0.0:0", "--dir"])
        .arg(site.folder.path().join("exposed"))
        .output()
        .unwrap();
    let said = text(&exposed.stderr);
    assert_eq!((exposed.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("without a key only this machine may connect"), "{said}");
    // And nobody shares its folder.
    let twice = Command::new(SNN_RUN)
        .args(["--agent", "--serve", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--dir"])
        .arg(&site.devices[0].dir)
        .output()
        .unwrap();
    assert!(text(&twice.stderr).ends_with("another agent uses this folder\n"));
}
