//! `snnc deploy --render`: the files for other people's tools.

use std::path::Path;
use std::process::Command;

use snn_compiler::Nodes;

use crate::processes::SNN_RUN;
use crate::site::{first, net, text};
use crate::split;

/// The files for other tools are what they were, but for hashes and the folder; `UPDATE=1` writes them. What they
/// tell `snn-run` it knows.
#[test]
fn files_for_other_tools_are_as_kept() {
    let net = net();
    let mut split = split(&net, Some(&first(&net)), Nodes::Even(2));
    for (rank, node) in split.manifest.nodes.iter_mut().enumerate() {
        node.address = Some(format!("tls/192.168.1.{}:7447", 11 + rank));
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("net.shards");
    snn::compile::write(&split, &dir).unwrap();
    let help = Command::new(SNN_RUN).arg("--help").output().unwrap();
    let help = text(&help.stdout);
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/rendered");
    for (kind, files) in [
        ("systemd", &["snn-node-0.service", "snn-node-1.service"][..]),
        ("compose", &["compose.yaml"]),
        ("k8s", &["k8s.yaml"]),
    ] {
        let out = folder.path().join(kind);
        let done = Command::new(env!("CARGO_BIN_EXE_snnc"))
            .arg("deploy")
            .arg(&dir)
            .args(["--render", kind, "-o"])
            .arg(&out)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), files.len());
        for file in files {
            let rendered = std::fs::read_to_string(out.join(file)).unwrap();
            let start = rendered.find("version ").unwrap() + "version ".len();
            let version = &rendered[start..start + 8];
            let path = dir.canonicalize().unwrap().display().to_string();
            let found = rendered.replace(version, "00000000").replace(&path, "/net.shards");
            let path = kept.join(file);
            if std::env::var_os("UPDATE").is_some() {
                std::fs::create_dir_all(&kept).unwrap();
                std::fs::write(&path, &found).unwrap();
            }
            // What snn-run is told stands on lines of its own.
            for line in found.lines().filter(|line| line.contains("snn-run")) {
                for word in line.split([' ', '"']).filter(|word| word.starts_with("--")) {
                    assert!(help.contains(&format!("{word} ")), "{file}: {word}");
                }
            }
            let expected = std::fs::read_to_string(&path).unwrap();
            assert_eq!(found, expected, "{file}; UPDATE=1 cargo test --test suite writes it");
        }
    }
}
