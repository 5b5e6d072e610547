//! `snnc deploy --render`: the same cluster for systemd, Docker Compose or Kubernetes.
//!
//! Takes a bundle; writes files to a folder, and says what is left to do. Nodes listen where the manifest
//! says, else on port [`PORT`] of every interface, and run with the given settings. The key is mounted, never written; memory is limited
//! to what [`memory_mib`] says a node needs, and every node is started again when it ends. What a restart of
//! all nodes needs is kept where a restart of the machine leaves it. The same
//! folder gives the same bytes.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use snn_runtime::agent::Settings;
use snn_runtime::http::{MAX_BODIES, oip};

use super::super::args::Render;
use super::super::print;
use super::bundle::Bundle;
use crate::run::input::{MAX_PICTURE_BYTES, TIMES_PICTURE};

/// Where nodes listen when the manifest has no address.
const PORT: u16 = 7447;
/// Where nodes serve HTTP.
const HTTP_PORT: u16 = 8000;
/// What a node takes before its first shard, in MiB: the program, its queues, 64 open requests.
const BASE_MIB: u64 = 256;
/// Memory for each byte of the shards: every node keeps the files of all, and plans, buffers and
/// reordered weights of those it computes, which may be all of them.
const TIMES_SHARDS: u64 = 6;
/// Limits are multiples of this, in MiB.
const STEP_MIB: u64 = 64;
/// Where a container keeps what a restart of all nodes needs.
const KEPT: &str = "/kept";
/// Processes and threads of a node.
const TASKS: u32 = 128;
/// Where the containers' image comes from.
const IMAGE: &str = "# The image: docker build -t snn -f examples/container/Dockerfile . in snn's repository, or --image.\n";

/// A file to be written.
struct Rendered {
    name: String,
    text: String,
}

/// Renders a bundle.
pub(super) fn render(
    bundle: &Bundle,
    settings: Settings,
    (kind, image): (Render, &str),
    output: &Path,
) -> Result<ExitCode> {
    let settings = words(settings);
    let (files, next) = match kind {
        Render::Systemd => systemd(bundle, &settings),
        Render::Compose => compose(bundle, &settings, image)?,
        Render::K8s => k8s(bundle, &settings, image),
    };
    fs::create_dir_all(output).with_context(|| format!("{}: write", output.display()))?;
    for file in &files {
        let path = output.join(&file.name);
        fs::write(&path, &file.text).with_context(|| format!("{}: write", path.display()))?;
    }
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    print(format_args!("wrote {} to {}\n{next}\n", names.join(", "), output.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Most memory a node may take, in MiB.
fn memory_mib(bundle: &Bundle) -> u64 {
    let shards: u64 = bundle.shards.iter().map(|shard| shard.bytes).sum();
    let needed = shards * TIMES_SHARDS + http_bytes(bundle);
    (BASE_MIB + needed.div_ceil(1 << 20)).next_multiple_of(STEP_MIB)
}

/// Most memory that requests over HTTP may take, in bytes: bodies, of which one is taken however large the
/// model's inputs make it, and the one picture that is decoded at a time.
fn http_bytes(bundle: &Bundle) -> u64 {
    let bodies = oip::largest_body(&bundle.manifest.inputs).max(MAX_BODIES);
    bodies as u64 + MAX_PICTURE_BYTES * TIMES_PICTURE
}

/// Where a rank listens: the manifest's address without its scheme, and whether it has one.
fn listen(bundle: &Bundle, rank: usize) -> (String, bool) {
    match &bundle.manifest.nodes[rank].address {
        Some(address) => {
            let place = address.split_once('/').map_or(address.as_str(), |(_, place)| place);
            (place.to_owned(), true)
        }
        None => (format!("0.0.0.0:{PORT}"), false),
    }
}

/// `--peer ADDR` for every other rank that has an address.
fn peers(bundle: &Bundle, rank: usize) -> Vec<String> {
    let others = (0..bundle.manifest.nodes.len()).filter(|&other| other != rank);
    let known = others.map(|other| listen(bundle, other)).filter(|(_, known)| *known);
    known.flat_map(|(address, _)| ["--peer".to_owned(), address]).collect()
}

/// What a node's command line says of its settings.
fn words(settings: Settings) -> Vec<String> {
    let degrade = settings.degrade_ms.map(|ms| ["--degrade".to_owned(), ms.to_string()]);
    let within = settings.within_ms.map(|ms| {
        let seconds = Duration::from_millis(ms).as_secs_f64();
        ["--http-within".to_owned(), seconds.to_string()]
    });
    degrade.into_iter().chain(within).flatten().collect()
}

/// The first line of every file.
fn head(bundle: &Bundle) -> String {
    let nodes = bundle.manifest.nodes.len();
    format!("# {nodes} nodes, version {}. Written by snnc deploy --render.\n", bundle.version)
}

fn systemd(bundle: &Bundle, settings: &[String]) -> (Vec<Rendered>, String) {
    let memory = memory_mib(bundle);
    let unit = |rank: usize| {
        let shard = &bundle.manifest.nodes[rank].shard;
        let (listen, _) = listen(bundle, rank);
        let mut command = format!(
            "/usr/local/bin/snn-run /var/lib/snn/{shard} --key ${{CREDENTIALS_DIRECTORY}}/cluster.key \
             --listen {listen} --http 127.0.0.1:{HTTP_PORT} --keep ${{STATE_DIRECTORY}}"
        );
        for word in settings.iter().cloned().chain(peers(bundle, rank)) {
            let _ = write!(command, " {word}");
        }
        let text = format!(
            "{}\
             # Rank {rank}. On its device: shards and cluster.json in /var/lib/snn, the key in\n\
             # /etc/snn/cluster.key (mode 600), this file in /etc/systemd/system.\n\
             [Unit]\n\
             Description=snn node, rank {rank}\n\
             Wants=network-online.target\n\
             After=network-online.target\n\
             StartLimitIntervalSec=0\n\
             \n\
             [Service]\n\
             ExecStart={command}\n\
             LoadCredential=cluster.key:/etc/snn/cluster.key\n\
             DynamicUser=yes\n\
             StateDirectory=snn-node-{rank}\n\
             Restart=always\n\
             RestartSec=1\n\
             TimeoutStopSec=10\n\
             MemoryMax={memory}M\n\
             TasksMax={TASKS}\n\
             NoNewPrivileges=yes\n\
             ProtectSystem=strict\n\
             ProtectHome=yes\n\
             PrivateTmp=yes\n\
             RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            head(bundle)
        );
        Rendered { name: format!("snn-node-{rank}.service"), text }
    };
    let files = (0..bundle.manifest.nodes.len()).map(unit).collect();
    let next =
        "on each device: copy its unit, the shards and the key, then systemctl enable --now it";
    (files, next.to_owned())
}

/// A string as YAML takes it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn quoted_list(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("[{}]", words.join(", "))
}

/// The command of a node whose peers have names of their own, as services have.
fn command(
    (bundle, settings): (&Bundle, &[String]),
    rank: usize,
    key: &str,
    name: impl Fn(usize) -> String,
) -> Vec<String> {
    let shard = format!("/shards/{}", bundle.manifest.nodes[rank].shard);
    let (listen, https) = (format!("0.0.0.0:{PORT}"), format!("0.0.0.0:{HTTP_PORT}"));
    let fixed =
        ["snn-run", &shard, "--key", key, "--listen", &listen, "--https", &https, "--keep", KEPT];
    let mut command: Vec<String> = fixed.iter().map(|&word| word.to_owned()).collect();
    command.extend_from_slice(settings);
    for other in (0..bundle.manifest.nodes.len()).filter(|&other| other != rank) {
        command.extend(["--peer".to_owned(), format!("{}:{PORT}", name(other))]);
    }
    command
}

fn compose(bundle: &Bundle, settings: &[String], image: &str) -> Result<(Vec<Rendered>, String)> {
    let (memory, image) = (memory_mib(bundle), quoted(image));
    let shards = bundle.absolute()?;
    let shards = quoted(&shards.display().to_string());
    let mut text = head(bundle) + IMAGE;
    text.push_str(
        "# The key is read from cluster.key beside this file (snnc key new cluster.key). It stays its owner's alone,\n\
         # hence the capability to read what is somebody else's.\n\
         # Rank r serves HTTPS on port 8000 + r of this machine (snnc key authority cluster.key).\n\
         services:\n",
    );
    for rank in 0..bundle.manifest.nodes.len() {
        let name = |rank: usize| format!("node-{rank}");
        let command = command((bundle, settings), rank, "/run/secrets/cluster.key", name);
        let _ = write!(
            text,
            "  node-{rank}:\n    \
             image: {image}\n    \
             command: {}\n    \
             restart: unless-stopped\n    \
             read_only: true\n    \
             cap_drop: [ALL]\n    \
             cap_add: [DAC_READ_SEARCH]\n    \
             security_opt: [\"no-new-privileges:true\"]\n    \
             pids_limit: {TASKS}\n    \
             secrets: [cluster.key]\n    \
             volumes:\n      \
             - type: bind\n        \
             source: {shards}\n        \
             target: /shards\n        \
             read_only: true\n      \
             - type: volume\n        \
             source: kept-{rank}\n        \
             target: {KEPT}\n    \
             ports: [\"127.0.0.1:{}:{HTTP_PORT}\"]\n    \
             deploy:\n      \
             resources:\n        \
             limits:\n          \
             memory: {memory}M\n",
            quoted_list(&command),
            usize::from(HTTP_PORT) + rank,
        );
    }
    text.push_str("volumes:\n");
    for rank in 0..bundle.manifest.nodes.len() {
        let _ = writeln!(text, "  kept-{rank}: {{}}");
    }
    text.push_str("secrets:\n  cluster.key:\n    file: ./cluster.key\n");
    let next = "put cluster.key beside it, then docker compose up -d";
    Ok((vec![Rendered { name: "compose.yaml".into(), text }], next.to_owned()))
}

fn k8s(bundle: &Bundle, settings: &[String], image: &str) -> (Vec<Rendered>, String) {
    let (memory, image) = (memory_mib(bundle), quoted(image));
    let mut text = head(bundle) + IMAGE;
    text.push_str(
        "# Before: kubectl create secret generic snn-key --from-file=cluster.key\n\
         # and the shards with cluster.json in a volume that the claim snn-shards gives.\n",
    );
    let _ = write!(
        text,
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: snn\nspec:\n  \
         selector: {{app: snn}}\n  ports:\n    - {{name: https, port: {HTTP_PORT}}}\n"
    );
    for rank in 0..bundle.manifest.nodes.len() {
        let name = |rank: usize| format!("snn-node-{rank}");
        let command = command((bundle, settings), rank, "/key/cluster.key", name);
        let command = quoted_list(&command);
        let _ = write!(
            text,
            "---\n{}---\n{}",
            k8s_service(rank),
            k8s_node(rank, &image, &command, memory)
        );
    }
    let next = "make the secret and the claim it names, then kubectl apply -f k8s.yaml";
    (vec![Rendered { name: "k8s.yaml".into(), text }], next.to_owned())
}

/// The name at which others reach a rank.
fn k8s_service(rank: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: snn-node-{rank}\nspec:\n  \
         clusterIP: None\n  publishNotReadyAddresses: true\n  \
         selector: {{app: snn, rank: \"{rank}\"}}\n  ports:\n    - {{name: node, port: {PORT}}}\n"
    )
}

/// One node, on a device of its own. It runs as root without any capability: a mounted secret that only
/// its owner may read is root's.
fn k8s_node(rank: usize, image: &str, command: &str, memory: u64) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata:
  name: snn-node-{rank}
  labels: {{app: snn, rank: \"{rank}\"}}
spec:
  replicas: 1
  strategy: {{type: Recreate}}
  selector:
    matchLabels: {{app: snn, rank: \"{rank}\"}}
  template:
    metadata:
      labels: {{app: snn, rank: \"{rank}\"}}
    spec:
      automountServiceAccountToken: false
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels: {{app: snn}}
      containers:
        - name: node
          image: {image}
          command: {command}
          ports:
            - {{containerPort: {PORT}}}
            - {{containerPort: {HTTP_PORT}}}
          readinessProbe:
            httpGet: {{path: /v2/health/ready, port: {HTTP_PORT}, scheme: HTTPS}}
            periodSeconds: 2
          livenessProbe:
            httpGet: {{path: /v2/health/live, port: {HTTP_PORT}, scheme: HTTPS}}
            initialDelaySeconds: 30
            periodSeconds: 10
          resources:
            requests: {{cpu: 500m, memory: {request}Mi}}
            limits: {{memory: {memory}Mi}}
          securityContext:
            runAsUser: 0
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {{drop: [ALL]}}
          volumeMounts:
            - {{name: shards, mountPath: /shards, readOnly: true}}
            - {{name: key, mountPath: /key, readOnly: true}}
            - {{name: kept, mountPath: {KEPT}}}
      volumes:
        - name: shards
          persistentVolumeClaim: {{claimName: snn-shards, readOnly: true}}
        - name: key
          secret: {{secretName: snn-key, defaultMode: 0400}}
        - name: kept
          emptyDir: {{}}
",
        request = BASE_MIB,
    )
}
