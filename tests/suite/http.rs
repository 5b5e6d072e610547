//! HTTP on a node: the Open Inference Protocol, pictures, limits, and what there is to watch.
//!
//! In one process where a cluster has to be slow or alone, in real ones where `--http` is meant. The
//! client here is a socket: what is malformed must be malformed to the byte.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use snn::run::http::{Encryption, Settings};
use snn::run::local::{LocalCluster, LocalOptions};
use snn_compiler::Nodes;
use snn_runtime::client::ClusterInfo;
use snn_runtime::http::{Asker, Http, Limits, Own, Unanswered};
use snn_runtime::transport::BoxFuture;
use snn_runtime::{Answer, NodeReport, Tensor};
use snn_schemas::Dtype;
use snn_schemas::manifest::Port;
use tokio_util::sync::CancellationToken;

use crate::cluster::PATIENCE;
use crate::equality::options;
use crate::fixtures::{Net, residual};
use crate::{assert_close, folder, image, reference, ring};

/// Malformed requests sent to one server.
pub(crate) const MALFORMED: usize = 2_400;
/// Those who send them at once.
const SENDERS: usize = 8;

/// Status, head and body of an answer.
pub(crate) struct Answered {
    pub(crate) status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answered {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    fn field(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find_map(|line| line.split_once(": ").filter(|l| l.0 == name));
        line.map(|(_, value)| value)
    }

    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, sentence: &str) {
        assert_eq!((self.status, self.json()), (status, json!({ "error": sentence })));
    }
}

/// Sends bytes as they are, and reads whatever comes until the server closes.
fn send(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A server that has read enough to refuse may close while this is written.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn parse(answer: &[u8]) -> Answered {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("an answer with a head");
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let status = head[9..12].parse().unwrap();
    Answered { status, head, body: answer[end + 4..].to_vec() }
}

pub(crate) fn request(address: SocketAddr, line: &str, fields: &str, body: &[u8]) -> Answered {
    let length = body.len();
    let head = format!(
        "{line} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{fields}content-length: {length}\r\n\r\n"
    );
    parse(&send(address, &[head.as_bytes(), body].concat()))
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Answered {
    request(address, &format!("GET {path}"), "", &[])
}

pub(crate) fn infer(address: SocketAddr, body: &Value) -> Answered {
    request(address, "POST /v2/models/model/infer", "", body.to_string().as_bytes())
}

pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// A cluster without nodes, which answers after a while with its input doubled.
pub(crate) struct Doubler {
    pub(crate) takes: Duration,
    pub(crate) missing: BTreeSet<usize>,
}

impl Doubler {
    fn info() -> ClusterInfo {
        let port = |name: &str| Port { name: name.into(), shape: vec![1, 2] };
        ClusterInfo {
            split: "ab".repeat(32),
            nodes: 2,
            inputs: vec![port("x")],
            outputs: vec![port("y")],
            metadata: vec![("snn.classes".into(), "cat,dog".into())],
        }
    }
}

impl Asker for Doubler {
    fn model(&self, _: Duration) -> BoxFuture<'_, Result<Arc<ClusterInfo>, Unanswered>> {
        Box::pin(async { Ok(Arc::new(Doubler::info())) })
    }

    fn infer(
        &self,
        inputs: Vec<Tensor>,
        within: Duration,
    ) -> BoxFuture<'_, Result<Answer, Unanswered>> {
        Box::pin(async move {
            if !self.missing.is_empty() {
                return Err(Unanswered("rank 1 missing for 0 s".into()));
            }
            if tokio::time::timeout(within, tokio::time::sleep(self.takes)).await.is_err() {
                return Err(Unanswered("no answer in time".into()));
            }
            let doubled = inputs[0].data().iter().map(|x| 2.0 * x).collect();
            let output = Tensor::new(vec![1, 2], doubled).unwrap();
            Ok(Answer { outputs: vec![output], degraded: false })
        })
    }

    fn reports(&self) -> BoxFuture<'_, Vec<NodeReport>> {
        Box::pin(async { vec![] })
    }

    fn own(&self) -> Own {
        Own { missing: self.missing.clone(), ..Own::default() }
    }

    fn nodes(&self) -> usize {
        2
    }
}

/// Serves until the test's runtime ends.
pub(crate) async fn serve(asker: impl Asker, limits: Limits) -> SocketAddr {
    let http = Http::bind("0").await.unwrap();
    let address = http.address();
    assert!(address.ip().is_loopback());
    let picture = |body: &bytes::Bytes, _: &ClusterInfo| match &body[..] {
        b"cat" => Ok(vec![Tensor::new(vec![1, 2], vec![1.0, -1.0]).unwrap()]),
        b"panic" => panic!("a decoder's own mistake"),
        _ => Err("not a PNG or JPEG image".to_owned()),
    };
    tokio::spawn(http.serve(Arc::new(asker), Arc::new(picture), limits, CancellationToken::new()));
    address
}

async fn quick() -> SocketAddr {
    serve(Doubler { takes: Duration::ZERO, missing: [].into() }, Limits::default()).await
}

pub(crate) fn good() -> Value {
    json!({ "inputs": [{ "name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.5, -2] }] })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_and_its_model_describe_themselves() {
    let address = quick().await;
    blocking(move || {
        let server = get(address, "/v2").json();
        assert_eq!(server["extensions"], json!(["binary_tensor_data"]));
        assert_eq!(get(address, "/v2/health/live").json(), json!({ "live": true }));
        assert_eq!(get(address, "/v2/health/ready").json(), json!({ "ready": true }));
        let ready = get(address, "/v2/models/model/ready");
        assert_eq!((ready.status, ready.json()["ready"].as_bool()), (200, Some(true)));
        let port = |name: &str| json!({ "name": name, "datatype": "FP32", "shape": [1, 2] });
        let expected = json!({
            "name": "model", "versions": ["1"], "platform": "snn_onnx",
            "inputs": [port("x")], "outputs": [port("y")],
        });
        assert_eq!(get(address, "/v2/models/model").json(), expected);
        assert_eq!(get(address, "/v2/models/model/versions/1").json(), expected);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_and_binary_tensors_are_taken_and_given() {
    let address = quick().await;
    blocking(move || {
        let answer = infer(address, &good());
        assert_eq!((answer.status, answer.field("content-type")), (200, Some("application/json")));
        assert_eq!(answer.json()["outputs"][0]["data"], json!([1.0, -4.0]));

        let json = json!({
            "inputs": [{ "name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": { "binary_data_size": 8 } }],
            "outputs": [{ "name": "y", "parameters": { "binary_data": true } }],
        })
        .to_string();
        let numbers = [0.5f32, -2.0].map(f32::to_le_bytes).concat();
        let fields = format!("inference-header-content-length: {}\r\n", json.len());
        let body = [json.as_bytes(), &numbers].concat();
        let answer = request(address, "POST /v2/models/model/infer", &fields, &body);
        assert_eq!((answer.status, answer.field("content-type")), (200, Some("application/octet-stream")));
        let length = answer.field("inference-header-content-length").unwrap().parse().unwrap();
        let (head, tensor) = answer.body.split_at(length);
        let head: Value = serde_json::from_slice(head).unwrap();
        assert_eq!(head["outputs"][0]["parameters"]["binary_data_size"], 8);
        assert_eq!(tensor, [1.0f32, -4.0].map(f32::to_le_bytes).concat());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_has_its_status_and_its_sentence() {
    let address = quick().await;
    blocking(move || {
        let wrong = |key: &str, value: Value| {
            let mut body = good();
            body["inputs"][0][key] = value;
            infer(address, &body)
        };
        wrong("name", json!("w")).assert_error(400, "the model has no input \"w\"");
        wrong("datatype", json!("INT8")).assert_error(400, "input \"x\" is INT8, expected FP32");
        wrong("shape", json!([2])).assert_error(400, "input \"x\" has shape [2], expected [1, 2]");
        wrong("data", json!([1])).assert_error(400, "input \"x\" has 1 numbers, expected 2");
        let post = |path: &str, fields: &str, body: &[u8]| {
            request(address, &format!("POST {path}"), fields, body)
        };
        let model = "/v2/models/model/infer";
        let answer = post(model, "inference-header-content-length: x\r\n", b"{}");
        answer.assert_error(400, "inference-header-content-length is no number of bytes");
        post("/v2/models/m/infer", "", b"{}")
            .assert_error(404, "unknown model \"m\", this cluster serves \"model\"");
        post("/v2/models/model/versions/2/infer", "", b"{}")
            .assert_error(404, "unknown version \"2\", the model has \"1\"");
        get(address, "/v2/models/m").assert_error(404, "unknown model \"m\", this cluster serves \"model\"");
        get(address, "/v3").assert_error(404, "nothing is here");
        get(address, model).assert_error(405, "GET is not possible here");
        post(model, "content-encoding: gzip\r\n", b"{}")
            .assert_error(415, "content encoding \"gzip\" is not supported");
        let large = vec![b' '; 200_000];
        let limit = snn_runtime::http::oip::largest_body(&Doubler::info().inputs);
        let sentence = format!("the body has more than {limit} bytes");
        post(model, "", &large).assert_error(413, &sentence);
        // The same without saying beforehand how much comes.
        let mut chunked = b"POST /v2/models/model/infer HTTP/1.1\r\nhost: t\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        chunked.extend(format!("{:x}\r\n", large.len()).bytes().chain(large).chain(*b"\r\n0\r\n\r\n"));
        parse(&send(address, &chunked)).assert_error(413, &sentence);
        let cut = b"POST /v2/models/model/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 9\r\n\r\n{";
        let answer = parse(&send(address, cut));
        assert_eq!(answer.status, 400);
        assert!(answer.text().contains("the body ends early"), "{}", answer.text());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_gives_the_most_likely_classes() {
    let address = quick().await;
    blocking(move || {
        let post = |fields: &str, body: &[u8]| request(address, "POST /classify", fields, body);
        let expected = json!({
            "top": [
                { "index": 0, "class": "cat", "value": 2.0 },
                { "index": 1, "class": "dog", "value": -2.0 },
            ],
            "degraded": false,
        });
        assert_eq!(post("", b"cat").json(), expected);
        post("", b"bird").assert_error(400, "not a PNG or JPEG image");
        post("", b"panic").assert_error(400, "the picture cannot be decoded");
        post("content-type: multipart/form-data; boundary=x\r\n", b"cat").assert_error(
            415,
            "the body must be the picture itself, as curl --data-binary @FILE sends it",
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_queue_requests_are_turned_away_and_the_others_answered() {
    let takes = Duration::from_millis(400);
    let limits = Limits { running: 2, queued: 3, within: PATIENCE, ..Limits::default() };
    let address = serve(Doubler { takes, missing: [].into() }, limits).await;
    let asked: Vec<_> =
        (0..20).map(|_| tokio::task::spawn_blocking(move || infer(address, &good()))).collect();
    let mut answers = Vec::new();
    for asked in asked {
        answers.push(asked.await.unwrap());
    }
    let answered = answers.iter().filter(|answer| answer.status == 200).count();
    let away: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!(answered >= 5, "{answered}");
    assert!(!away.is_empty());
    assert_eq!(answered + away.len(), 20);
    for answer in away {
        answer.assert_error(429, "all 5 places for requests are taken");
        assert_eq!(answer.field("retry-after"), Some("1"));
    }
    let counted = blocking(move || get(address, "/metrics").text()).await;
    let line = format!("snn_http_answers_total{{endpoint=\"infer\",code=\"200\"}} {answered}");
    assert!(counted.lines().any(|found| found == line), "{counted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_ends_within_its_time() {
    let never = Duration::from_secs(3600);
    let limits = Limits {
        running: 1,
        within: Duration::from_millis(300),
        body_within: Duration::from_millis(300),
        head_within: Duration::from_millis(300),
        ..Limits::default()
    };
    let address = serve(Doubler { takes: never, missing: [].into() }, limits).await;
    blocking(move || {
        infer(address, &good()).assert_error(504, "no answer in time (within 0.3 s)");
        let mut hurried = good();
        hurried["parameters"] = json!({ "timeout": 50_000 });
        infer(address, &hurried).assert_error(504, "no answer in time (within 0.05 s)");
        // Bodies and heads that never end, on connections that stay open.
        let stays = |bytes: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            answer
        };
        let body = stays(b"POST /v2/models/model/infer HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: 9\r\n\r\n{");
        parse(&body).assert_error(408, "the body took longer than 0.3 s");
        assert!(!stays(b"GET /v2 HTTP/1.1\r\nhost:").starts_with(b"HTTP/1.1 200"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_not_complete_says_so() {
    let doubler = Doubler { takes: Duration::ZERO, missing: [1].into() };
    let address = serve(doubler, Limits::default()).await;
    blocking(move || {
        let ready = get(address, "/v2/health/ready");
        assert_eq!((ready.status, ready.json()), (503, json!({ "ready": false })));
        assert_eq!(get(address, "/v2/models/model/ready").status, 503);
        assert_eq!(get(address, "/v2/health/live").status, 200);
        infer(address, &good()).assert_error(503, "rank 1 missing for 0 s");
        assert_eq!(get(address, "/status").json()["missing"], json!([1]));
        assert!(get(address, "/metrics").text().contains("snn_peers_missing 1\n"));
    })
    .await;
}

/// A request of a good body that is wrong in a way that follows from `seed`.
fn malformed(body: &str, seed: usize) -> Vec<u8> {
    let head = format!(
        "POST /v2/models/model/infer HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut bytes = [head.as_bytes(), body.as_bytes()].concat();
    // A multiplicative hash: positions all over the request, the same in every run.
    let at = |salt: usize| (seed * 2_654_435_761 + salt * 40_503) >> 7;
    match seed % 6 {
        0 => bytes.truncate(at(1) % bytes.len()),
        1 => {
            let place = at(2) % bytes.len();
            bytes[place] ^= 1 << (at(3) % 8);
        }
        2 => {
            let place = at(4) % bytes.len();
            bytes.insert(place, (at(5) % 256) as u8);
        }
        3 => bytes = (0..at(6) % 400).map(|i| (at(i + 7) % 256) as u8).collect(),
        4 => {
            let length = format!("content-length: {}", at(8) % 100_000);
            bytes = head.replace(&format!("content-length: {}", body.len()), &length).into_bytes();
            bytes.extend(body.bytes().cycle().take(at(9) % 2_000));
        }
        _ => {
            let place = head.len() + at(10) % body.len();
            let end = (place + at(11) % 20).min(bytes.len());
            bytes.drain(place..end);
        }
    }
    bytes
}

/// Sends malformed requests made of a good body, several at once; gives the statuses they get.
pub(crate) fn send_malformed(
    address: SocketAddr,
    body: &str,
    seeds: Range<usize>,
) -> BTreeSet<u16> {
    let of_sender = |sender: usize| {
        let answers = seeds.clone().skip(sender).step_by(SENDERS);
        let answers = answers.map(|seed| send(address, &malformed(body, seed)));
        let statuses =
            answers.filter(|answer| !answer.is_empty()).map(|answer| parse(&answer).status);
        statuses.collect::<BTreeSet<u16>>()
    };
    std::thread::scope(|scope| {
        let of_sender = &of_sender;
        let senders: Vec<_> =
            (0..SENDERS).map(|sender| scope.spawn(move || of_sender(sender))).collect();
        senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_requests_harm_nobody() {
    let address = quick().await;
    let statuses =
        blocking(move || send_malformed(address, &good().to_string(), 0..MALFORMED)).await;
    assert!(statuses.contains(&400), "{statuses:?}");
    // What is malformed is the client's fault, and some changes leave a request that makes sense.
    assert!(
        statuses.iter().all(|&status| status == 200 || (400..500).contains(&status)),
        "{statuses:?}"
    );
    let answer = blocking(move || infer(address, &good())).await;
    assert_eq!(answer.json()["outputs"][0]["data"], json!([1.0, -4.0]));
    let metrics = blocking(move || get(address, "/metrics").text()).await;
    assert!(
        metrics.contains("snn_http_running 0\nsnn_http_queued 0")
            || metrics.contains("snn_http_queued 0\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_nothing_from_elsewhere() {
    let address = quick().await;
    blocking(move || {
        let page = get(address, "/");
        assert_eq!(
            (page.status, page.field("content-type")),
            (200, Some("text/html; charset=utf-8"))
        );
        let text = page.text();
        assert!(text.contains("fetch(\"/status\""));
        assert!(text.contains("prefers-color-scheme: dark"));
        // The one address in it is the name of SVG's elements, which nobody fetches.
        assert_eq!(text.replace("http://www.w3.org/2000/svg", "").matches("://").count(), 0);
        assert!(page.field("content-security-policy").unwrap().starts_with("default-src 'none'"));
    })
    .await;
}

fn net() -> Net {
    residual(2, &[2, 2], 8)
}

async fn processes(net: &Net) -> (LocalCluster, tempfile::TempDir) {
    let folder = folder(net, Some(&ring(net, 2, Dtype::F16)), Nodes::PerGroup);
    let encryption = Encryption::None;
    let http = Some(Settings { address: "0".into(), within: PATIENCE, encryption });
    let options = LocalOptions { http, trace: true, ..options() };
    (LocalCluster::start(folder.path(), options).await.unwrap(), folder)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_answers_over_http_and_tells_what_it_counts() {
    let net = net();
    let (cluster, _folder) = processes(&net).await;
    let addresses = cluster.http_addresses().to_vec();
    assert_eq!(addresses.len(), 2);
    let input = image(&net, 3);
    let expected = reference::logits(&net, Some(&ring(&net, 2, Dtype::F16)), input.data());
    for address in addresses.clone() {
        let input = input.clone();
        let answer = blocking(move || {
            let described = get(address, "/v2/models/model").json();
            let name = &described["inputs"][0]["name"];
            let tensor = json!({ "name": name, "shape": input.shape(), "datatype": "FP32", "data": input.data() });
            infer(address, &json!({ "inputs": [tensor] })).json()
        })
        .await;
        let logits = answer["outputs"][0]["data"].as_array().unwrap();
        let logits: Vec<f32> = logits.iter().map(|x| x.as_f64().unwrap() as f32).collect();
        assert_close(&logits, &expected, &address.to_string());
    }
    blocking(move || {
        let status = get(addresses[1], "/status").json();
        assert_eq!((&status["nodes"], &status["missing"]), (&json!(2), &json!([])));
        let reports = status["reports"].as_array().unwrap();
        assert_eq!(reports.len(), 2);
        assert!(reports.iter().all(|report| report["requests"] == 2), "{status}");
        assert_eq!(
            reports[0]["latency"]["counts"]
                .as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_u64().unwrap())
                .sum::<u64>(),
            2
        );
        for (address, rank, other) in [(addresses[0], 0, 1), (addresses[1], 1, 0)] {
            let metrics = get(address, "/metrics").text();
            let has = |line: &str| {
                assert!(metrics.lines().any(|found| found == line), "{line}\n{metrics}")
            };
            has("snn_peers_present 1");
            has(&format!("snn_requests_total{{rank=\"{rank}\"}} 2"));
            has("snn_http_answers_total{endpoint=\"infer\",code=\"200\"} 1");
            let sent = format!("snn_transfer_sent_frames_total{{rank=\"{rank}\",transfer=\"t");
            let to = format!("\",to=\"{other}\"}} 2");
            assert!(metrics.lines().any(|l| l.starts_with(&sent) && l.ends_with(&to)), "{metrics}");
        }
    })
    .await;
    cluster.stop().await.unwrap();
}

/// A photograph of sorts, in a format's own bytes.
fn photograph(format: image::ImageFormat) -> Vec<u8> {
    let pixel = |x: u32, y: u32| image::Rgb([(9 * x) as u8, (250 - 11 * y) as u8, (x * y) as u8]);
    let mut bytes = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_fn(24, 20, pixel).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_png_and_a_jpeg_are_classified_by_any_node() {
    use snn::run::input::{InputSpec, picture};
    use snn_schemas::metadata::Normalisation;

    let net = net();
    let (cluster, _folder) = processes(&net).await;
    let addresses = cluster.http_addresses().to_vec();
    for (format, address) in
        [image::ImageFormat::Png, image::ImageFormat::Jpeg].into_iter().zip(addresses)
    {
        let bytes = photograph(format);
        let normalisation = Normalisation::read(|_| None, 3).unwrap();
        let spec = InputSpec { shape: crate::shape(&net), normalisation };
        let input = picture(&bytes, &spec).unwrap();
        let expected = reference::logits(&net, Some(&ring(&net, 2, Dtype::F16)), &input.data);
        let answer = blocking(move || request(address, "POST /classify", "", &bytes)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let json = answer.json();
        assert_eq!(json["degraded"], false);
        let top = json["top"].as_array().unwrap();
        let entries = top.iter().map(|entry| {
            let index = entry["index"].as_u64().unwrap() as usize;
            (expected[index], entry["value"].as_f64().unwrap() as f32)
        });
        let (wanted, found): (Vec<f32>, Vec<f32>) = entries.unzip();
        assert_close(&found, &wanted, &format!("{format:?}"));
        let largest = expected.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(wanted[0], largest);
    }
    cluster.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_has_every_node_and_its_transfers_on_one_axis() {
    use snn_runtime::watch::trace::{document, hidden};

    let net = net();
    let (cluster, _folder) = processes(&net).await;
    for seed in 0..3 {
        cluster.infer(&[crate::array(&image(&net, seed))]).await.unwrap();
    }
    let lanes = cluster.trace().await.unwrap();
    cluster.stop().await.unwrap();
    let hidden = hidden(&lanes);
    // Both nodes send at each of the ring's steps, and the parts of the head travel too.
    assert!(hidden.transfers >= 6 && hidden.transfers.is_multiple_of(3), "{hidden:?}");
    let share = hidden.share().unwrap();
    assert!((0.0..=1.0).contains(&share), "{hidden:?}");
    let document = document(&lanes);
    assert_eq!(document["otherData"]["hidden_share"].as_f64(), Some(share));
    let events = document["traceEvents"].as_array().unwrap();
    let count = |phase: &str| events.iter().filter(|event| event["ph"] == phase).count();
    assert_eq!((count("s"), count("f")), (hidden.transfers, hidden.transfers));
    assert_eq!(count("b"), 3);
    let lanes: BTreeSet<u64> = events
        .iter()
        .filter(|e| e["cat"] == "compute")
        .map(|e| e["tid"].as_u64().unwrap())
        .collect();
    assert_eq!(lanes, [0, 1].into());
}

/// The entry node passes on what the other has recorded, which is more than the queue of any link takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_trace_has_every_node() {
    let net = net();
    let (cluster, _folder) = processes(&net).await;
    let input = [crate::array(&image(&net, 0))];
    for _ in 0..4000 {
        cluster.infer(&input).await.unwrap();
    }
    let lanes = cluster.trace().await.unwrap();
    cluster.stop().await.unwrap();
    assert_eq!(lanes.iter().map(|aligned| aligned.lane.rank).collect::<Vec<_>>(), [0, 1]);
    let passed_on = serde_json::to_vec(&lanes[1].lane).unwrap().len();
    assert!(passed_on > 1 << 20, "{passed_on} bytes");
}
