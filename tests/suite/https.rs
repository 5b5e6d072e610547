//! HTTPS: who knows the cluster's authority is answered, and a listener on the wire learns nothing.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use snn_compiler::Nodes;
use snn_runtime::http::HANDSHAKE_WITHIN;
use snn_runtime::key::ClusterKey;
use snn_schemas::{Dtype, Policy};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::cluster::PATIENCE;
use crate::fixtures::{Net, residual};
use crate::processes::{NodeProcess, SNN_RUN};
use crate::site::{self, logits};
use crate::trust::{eavesdrop, good_and_expired, write_key};
use crate::{assert_close, folder, image, reference, ring};

/// Connections that begin a handshake and never end it, at once.
const SILENT: usize = 50;
/// Connections that send garbage, one after another.
const GARBAGE: usize = 500;

fn net() -> Net {
    residual(2, &[2], 8)
}

fn policy(net: &Net) -> Policy {
    ring(net, 1, Dtype::F16)
}

/// A node that is a whole cluster, with a key, and its HTTPS.
struct Served {
    net: Net,
    folder: tempfile::TempDir,
    key: PathBuf,
    address: SocketAddr,
    _node: NodeProcess,
}

impl Served {
    fn start(arguments: impl Fn(&Path) -> Vec<String>) -> Served {
        let net = net();
        let folder = folder(&net, Some(&policy(&net)), Nodes::Even(1));
        let key = folder.path().join("cluster.key");
        write_key(&key, &ClusterKey::new(Duration::from_secs(3600)).unwrap());
        let own = ["--key", key.to_str().unwrap(), "--listen", "127.0.0.1:0", "--https"];
        let more = arguments(folder.path());
        let words: Vec<&str> = own.into_iter().chain(more.iter().map(String::as_str)).collect();
        let mut node = NodeProcess::start(&folder.path().join("shard_0.onnx"), &words);
        let address = node.line().strip_prefix("https://").unwrap().parse().unwrap();
        while node.line() != "ready" {}
        Served { net, folder, key, address, _node: node }
    }

    /// What snnc prints of its key.
    fn authority(&self) -> String {
        let key = self.key.to_str().unwrap();
        let output = snnc(&["key", "authority", key]);
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }
}

fn snnc(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_snnc")).args(arguments).output().unwrap()
}

/// A connection to `address` that must prove to be `name` by a certificate that leads to `roots`.
fn connect(address: SocketAddr, name: &str, roots: &str) -> Encrypted {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(certificate.unwrap()).unwrap();
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    StreamOwned::new(connection, stream)
}

type Encrypted = StreamOwned<ClientConnection, TcpStream>;

/// One request; gives status and body, or why the handshake failed.
fn ask(mut stream: Encrypted, line: &str, body: &str) -> Result<(u16, String), String> {
    let head = format!(
        "{line} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok((head[9..12].parse().unwrap(), body.to_owned()))
}

pub(crate) fn question(net: &Net, seed: usize) -> String {
    let [channels, height, width] = net.image;
    json!({ "inputs": [{
        "name": "image", "datatype": "FP32", "shape": [1, channels, height, width],
        "data": image(net, seed).data(),
    }] })
    .to_string()
}

fn assert_answers(served: &Served, name: &str, roots: &str) {
    let infer = "POST /v2/models/model/infer";
    for seed in 0..2 {
        let stream = connect(served.address, name, roots);
        let (status, answer) = ask(stream, infer, &question(&served.net, seed)).unwrap();
        assert_eq!(status, 200, "{answer}");
        let input = image(&served.net, seed);
        let expected = reference::logits(&served.net, Some(&policy(&served.net)), input.data());
        assert_close(&logits(&answer), &expected, name);
    }
}

#[test]
fn who_knows_the_authority_is_answered_and_who_does_not_refuses() {
    let served = Served::start(|_| vec!["127.0.0.1:0".into()]);
    let authority = served.authority();
    // Public, and nothing else.
    assert!(!authority.contains("PRIVATE"), "{authority}");
    assert_eq!(authority.matches("BEGIN CERTIFICATE").count(), 1);
    // By address and by any name at which it is reached.
    for name in ["127.0.0.1", "::1", "localhost", "pi1", "pi1.example.org"] {
        assert_answers(&served, name, &authority);
    }
    for path in ["/", "/status", "/metrics", "/v2", "/v2/health/ready", "/v2/models/model"] {
        let (status, body) =
            ask(connect(served.address, "pi1", &authority), &format!("GET {path}"), "").unwrap();
        assert_eq!(status, 200, "{path}: {body}");
    }

    let key = std::fs::read_to_string(&served.key).unwrap();
    let members = key.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap();
    let other = ClusterKey::new(Duration::from_secs(3600)).unwrap();
    let strangers = [members, other.web_authority().unwrap()];
    for (roots, name) in strangers.iter().map(|roots| (*roots, "127.0.0.1")).chain([
        // An address that is not its own.
        (authority.as_str(), "192.0.2.1"),
    ]) {
        let refused = ask(connect(served.address, name, roots), "GET /v2", "").unwrap_err();
        assert!(refused.starts_with("invalid peer certificate: "), "{refused}");
    }
    assert_answers(&served, "127.0.0.1", &authority);
}

/// Writes the parts of a key, a file each: they are a certificate of the owner's own too, for its members' is
/// good for the name "snn". The first is the authority's, the next two are that certificate and its key.
fn write_parts(folder: &Path, key: &ClusterKey) -> Vec<PathBuf> {
    let key = key.to_pem();
    let blocks = key.split_inclusive("-----\n").collect::<Vec<_>>();
    let write = |(number, block): (usize, &[&str])| {
        let path = folder.join(format!("part{number}.pem"));
        std::fs::write(&path, block.concat()).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
        std::fs::set_permissions(&path, mode).unwrap();
        path
    };
    blocks.chunks(2).enumerate().map(write).collect()
}

/// What a node is given to serve with that certificate.
fn options(certificate: &Path, key: &Path) -> [String; 5] {
    let [certificate, key] = [certificate, key].map(|path| path.display().to_string());
    ["127.0.0.1:0".into(), "--https-cert".into(), certificate, "--https-key".into(), key]
}

#[test]
fn a_certificate_that_has_expired_is_refused_by_who_knows_its_authority() {
    let [_, good, expired] = good_and_expired();
    // One authority's, one after the other.
    for (key, is_good) in [(good, true), (expired, false)] {
        let served = Served::start(|folder| {
            let parts = write_parts(folder, &key);
            options(&parts[1], &parts[2]).to_vec()
        });
        let roots = std::fs::read_to_string(served.folder.path().join("part0.pem")).unwrap();
        if is_good {
            assert_answers(&served, "snn", &roots);
            continue;
        }
        let refused = ask(connect(served.address, "snn", &roots), "GET /v2", "").unwrap_err();
        let expected = "invalid peer certificate: certificate expired";
        assert!(refused.starts_with(expected), "{refused}");
    }
}

#[test]
fn a_certificate_of_the_owners_own_is_shown() {
    let served = Served::start(|folder| {
        let key = ClusterKey::new(Duration::from_secs(3600)).unwrap();
        let parts = write_parts(folder, &key);
        options(&parts[1], &parts[2]).to_vec()
    });
    let path = |number: usize| served.folder.path().join(format!("part{number}.pem"));
    let roots = std::fs::read_to_string(path(0)).unwrap();
    assert_answers(&served, "snn", &roots);
    let refused = ask(connect(served.address, "pi1", &roots), "GET /v2", "").unwrap_err();
    assert!(
        refused.starts_with("invalid peer certificate: certificate not valid for"),
        "{refused}"
    );

    let missing = served.folder.path().join("none.pem");
    let open = path(2).with_file_name("open.pem");
    std::fs::copy(path(2), &open).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&open, mode).unwrap();
    let pair = "certificate and private key do not belong together";
    for (certificate, key, reason) in [
        (path(1), path(4), pair),
        (path(2), path(2), "no certificate in PEM: nothing between BEGIN and END"),
        (path(1), path(1), "no private key in PEM: "),
        (missing.clone(), path(2), "https: No such file or directory"),
        (path(1), missing, "https: No such file or directory"),
        (path(1), open, "https: others can read it (mode 644); chmod 600 "),
    ] {
        let mut words = vec!["--https".to_owned()];
        words.extend(options(&certificate, &key));
        let said = refusal(&served, &words);
        assert!(said.contains(reason), "{said}");
    }
}

/// The one line with which a node does not start.
fn refusal(served: &Served, arguments: &[String]) -> String {
    let shard = served.folder.path().join("shard_0.onnx");
    let output = Command::new(SNN_RUN).arg(&shard).args(arguments).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    said
}

#[test]
fn handshakes_that_are_none_hold_nobody_up() {
    let served = Served::start(|_| vec!["127.0.0.1:0".into()]);
    let authority = served.authority();
    // Half a handshake, or nothing at all, and then silence.
    let begun = Instant::now();
    let silent: Vec<TcpStream> = (0..SILENT)
        .map(|number| {
            let mut stream = TcpStream::connect(served.address).unwrap();
            let hello = [22, 3, 1, 0, 200, 1, 0, 0];
            stream.write_all(&hello[..number % (hello.len() + 1)]).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        })
        .collect();
    for seed in 0..GARBAGE {
        let mut stream = TcpStream::connect(served.address).unwrap();
        let byte = |at: usize| ((seed * 2_654_435_761 + at * 40_503) >> 7) as u8;
        let mut bytes: Vec<u8> = (0..seed % 700).map(byte).collect();
        // Every other one begins as a handshake does.
        if let Some(first) = bytes.first_mut().filter(|_| seed % 2 == 0) {
            *first = 22;
        }
        // It may be thrown out while it talks.
        let _ = stream.write_all(&bytes);
    }
    let mut plain = TcpStream::connect(served.address).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n").unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    let said: Value = serde_json::from_str(body).unwrap();
    assert_eq!(said, json!({ "error": "this address speaks HTTPS only" }));
    let asked = Instant::now();
    assert_answers(&served, "127.0.0.1", &authority);
    // Not after those that say nothing.
    assert!(asked.elapsed() < HANDSHAKE_WITHIN || asked - begun > HANDSHAKE_WITHIN);
    for mut stream in silent {
        let mut rest = Vec::new();
        // The end, or that the connection was reset.
        let _ = stream.read_to_end(&mut rest);
    }
    assert!(begun.elapsed() < HANDSHAKE_WITHIN + PATIENCE);
    assert_answers(&served, "127.0.0.1", &authority);
}

#[test]
fn whoever_listens_on_the_wire_reads_no_https() {
    let served = Served::start(|_| vec!["127.0.0.1:0".into()]);
    let question = question(&served.net, 3);
    let secret = &question.as_bytes()[question.len() / 2..][..24];
    let contains = |heard: &[u8]| heard.windows(secret.len()).any(|window| window == secret);
    let infer = "POST /v2/models/model/infer";
    let (address, heard) = eavesdrop(&served.address.to_string());
    let stream = connect(address.parse().unwrap(), "127.0.0.1", &served.authority());
    let (status, answer) = ask(stream, infer, &question).unwrap();
    assert_eq!(status, 200);
    let heard = heard.lock().unwrap();
    assert!(heard.len() > question.len() && !contains(&heard));
    let name = b"logits";
    assert!(answer.contains("logits") && !heard.windows(name.len()).any(|part| part == name));

    // Without TLS it is there to be heard: else the test would prove nothing.
    let shard = served.folder.path().join("shard_0.onnx");
    let mut open = NodeProcess::start(&shard, &["--http", "0"]);
    let plain = open.line().strip_prefix("http://").unwrap().to_owned();
    while open.line() != "ready" {}
    let (address, heard) = eavesdrop(&plain);
    let mut connection = site::connect(address.parse().unwrap());
    let (status, answer) = site::infer(&mut connection, image(&served.net, 3).data(), &served.net);
    assert_eq!(status, 200, "{answer}");
    assert!(contains(&heard.lock().unwrap()));
}

#[test]
fn https_is_open_to_the_network_and_says_so_or_why_not() {
    let served = Served::start(|_| vec!["127.0.0.1:0".into()]);
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let said = refusal(&served, &words("--https 0.0.0.0:0"));
    let expected = "https on 0.0.0.0:0: it needs a certificate; give --key FILE, or \
        --https-cert FILE and --https-key FILE\n";
    assert!(said.ends_with(expected), "{said}");
    let said = refusal(&served, &words("--http 0.0.0.0:0"));
    assert!(said.ends_with("machine only, behind a proxy, or --insecure\n"), "{said}");
    // A key of before: its nodes go on, without HTTPS.
    let key = std::fs::read_to_string(&served.key).unwrap();
    let three: String = key.split_inclusive("-----\n").take(6).collect();
    let before = served.folder.path().join("before.key");
    write_key(&before, &ClusterKey::from_pem(&three).unwrap());
    let before = before.to_str().unwrap();
    let said = refusal(&served, &words(&format!("--https 0 --key {before}")));
    let expected =
        "https: the key has no authority for HTTPS; make a new one with \"snnc key new\"\n";
    assert!(said.ends_with(expected), "{said}");
    let output = snnc(&["key", "authority", before]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");

    let shard = served.folder.path().join("shard_0.onnx");
    let key = served.key.to_str().unwrap();
    let arguments = ["--key", key, "--listen", "127.0.0.1:0", "--https", "0.0.0.0:0"];
    let mut node = NodeProcess::start(&shard, &arguments);
    let address = node.line().strip_prefix("https://").unwrap().to_owned();
    assert_eq!(node.line(), format!("https on {address} asks nobody who he is"));
}
