//! Programs of others that ask a cluster: a browser, and the Python client of NVIDIA's Triton.
//!
//! Four nodes as processes serve HTTP. Headless Chromium opens the page and says what it shows; the example
//! `ask_with_triton.py` compares what nodes answer. Each is run where it is installed (`SNN_PYTHON` names a Python
//! with `tritonclient[http]`); elsewhere the test says so and passes. `.ci/run` installs both.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::agents::get;
use crate::cluster::PATIENCE;
use crate::devices::{Devices, net, policy_of};
use crate::{Nodes, folder, not_tested};

/// What Chromium may be called.
const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// How long the page lives before it is written down, by its own clock, in ms: it asks every second.
const LIVES_MS: u32 = 3000;

/// Whether a command can be run, and ends well.
fn runs(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|done| done.success())
}

/// Four nodes that serve HTTP, all of them ready.
async fn start() -> (Devices, Vec<SocketAddr>) {
    let net = net();
    let split = folder(&net, Some(&policy_of(&net)), Nodes::Even(4));
    let (devices, http) = Devices::start_with_http(split);
    let deadline = Instant::now() + PATIENCE;
    let ready = |&address: &SocketAddr| {
        // A node may not listen yet.
        TcpStream::connect(address).is_ok()
            && get(address, "/v2/health/ready").starts_with("HTTP/1.1 200")
    };
    while !http.iter().all(ready) {
        assert!(Instant::now() < deadline, "not all are ready");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    (devices, http)
}

/// The text of the page as a browser shows it.
fn shown(browser: &str, address: SocketAddr) -> String {
    let budget = format!("--virtual-time-budget={LIVES_MS}");
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", &budget])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{address}/"))
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let document = String::from_utf8(output.stdout).unwrap();
    let body = document.split_once("<body").map_or("", |(_, body)| body);
    body.split('<').filter_map(|tag| Some(tag.split_once('>')?.1)).collect::<Vec<_>>().join(" ")
}

/// Opens the page until it shows all of `texts`.
#[track_caller]
fn wait_to_see(browser: &str, address: SocketAddr, texts: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let page = shown(browser, address);
        if texts.iter().all(|text| page.contains(text)) {
            return;
        }
        assert!(Instant::now() < deadline, "no {texts:?} in: {page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_shows_the_nodes_a_death_and_its_takeover() {
    let found = BROWSERS.into_iter().find(|name| runs(Command::new(name).arg("--version")));
    let Some(browser) = found else {
        not_tested("the page in a browser", "needs Chromium");
        return;
    };
    let (mut devices, http) = start().await;
    wait_to_see(browser, http[0], &["all 4 nodes are there", "node 0 → node 1"]);
    devices.kill(2);
    wait_to_see(browser, http[0], &["node 2 gone", "stands in", "rank 2 is gone"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tritons_client_is_answered_by_any_node() {
    let python = std::env::var_os("SNN_PYTHON").unwrap_or_else(|| "python3".into());
    let import = ["-c", "import tritonclient.http"];
    if !runs(Command::new(&python).args(import)) {
        not_tested("Triton's client", "needs a Python with tritonclient[http] (SNN_PYTHON)");
        return;
    }
    let (_devices, http) = start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/ask_with_triton.py");
    let output = Command::new(&python)
        .arg(script)
        .args(http.iter().map(SocketAddr::to_string))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("largest difference").count(), 2 * http.len(), "{said}");
}
