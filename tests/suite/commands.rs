//! What users type, and what bad input gets from `snn-run`: one line, exit code 2, nothing written.

use std::path::Path;
use std::process::{Command, Output};

use snn::run::input::{Array, write_npy};
use snn_compiler::Nodes;
use snn_schemas::Dtype;

use crate::fixtures::{Net, residual};
use crate::{array, folder, image, reference, ring, shape};

fn net() -> Net {
    residual(2, &[2], 8)
}

fn cluster() -> tempfile::TempDir {
    folder(&net(), Some(&ring(&net(), 1, Dtype::F16)), Nodes::PerGroup)
}

fn local(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_snn-run"))
        .arg("--local")
        .arg(folder)
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The one line an error is, without the folder it is about.
#[track_caller]
fn complaint(output: &Output, folder: &Path) -> String {
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
    let said = text(&output.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    said.trim_end().replace(&format!("{}/", folder.display()), "")
}

#[test]
fn several_inputs_are_answered_written_and_checked() {
    let (net, folder) = (net(), cluster());
    let policy = ring(&net, 1, Dtype::F16);
    let images: Vec<Vec<f32>> = (0..3).map(|seed| image(&net, seed).data().to_vec()).collect();
    let mut stacked = shape(&net);
    stacked[0] = 2;
    let two = Array { shape: stacked, data: images[..2].concat() };
    let one = array(&image(&net, 2));
    let at = |name: &str| folder.path().join(name).display().to_string();
    write_npy(Path::new(&at("two.npy")), &two).unwrap();
    write_npy(Path::new(&at("one.npy")), &one).unwrap();
    let expected: Vec<f32> =
        images.iter().flat_map(|image| reference::logits(&net, Some(&policy), image)).collect();
    let mut truth = Array { shape: vec![3, net.classes], data: expected };
    write_npy(Path::new(&at("truth.npy")), &truth).unwrap();
    truth.data[4] += 1.0;
    write_npy(Path::new(&at("wrong.npy")), &truth).unwrap();

    let inputs = ["--input", &at("two.npy"), &at("one.npy"), "--output", &at("y.npy")];
    let checked = |reference: &str| {
        local(folder.path(), &[&inputs[..], &["--check", &at(reference), "--json"]].concat())
    };
    let right = checked("truth.npy");
    assert_eq!(right.status.code(), Some(0), "{}", text(&right.stderr));
    let measured: serde_json::Value = serde_json::from_slice(&right.stdout).unwrap();
    assert_eq!(measured["nodes"].as_array().unwrap().len(), 2);
    assert!(measured["latency_ms"]["median"].as_f64().unwrap() > 0.0);
    let wrong = checked("wrong.npy");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(text(&wrong.stderr).contains("wrong.npy: check: differs by 1.0e0 at [0, 4]"));
}

#[test]
fn bad_folders_and_files_are_named() {
    let folder = cluster();
    let at = |name: &str| folder.path().join(name);
    let complain = |arguments: &[&str]| complaint(&local(folder.path(), arguments), folder.path());

    std::fs::write(at("x.npy"), b"\x93NUMPY\x01").unwrap();
    let x = at("x.npy").display().to_string();
    let said = complain(&["--input", &x]);
    assert_eq!(said, "snn-run: x.npy: input: .npy header cut short, or longer than 65535 bytes");
    std::fs::write(at("x.npy"), b"hello").unwrap();
    assert_eq!(complain(&["--input", &x]), "snn-run: x.npy: input: not a .npy, PNG or JPEG file");
    let small = Array { shape: vec![1, 3, 4, 4], data: vec![0.0; 48] };
    write_npy(&at("x.npy"), &small).unwrap();
    let said = complain(&["--input", &x]);
    let expected = "shape [1, 3, 4, 4], expected [1, 3, 8, 8] or a multiple of it along axis 0";
    assert_eq!(said, format!("snn-run: x.npy: input: {expected}"));

    let shard = std::fs::read(at("shard_1.onnx")).unwrap();
    std::fs::write(at("shard_1.onnx"), &shard[..shard.len() / 2]).unwrap();
    let said = complain(&[]);
    let expected = "snn-run: shard_1.onnx: shard: ONNX model is cut short: at least ";
    assert!(said.starts_with(expected), "{said}");

    let manifest = std::fs::read_to_string(at("cluster.json")).unwrap();
    std::fs::write(at("cluster.json"), manifest.replace("\"version\": 1", "\"version\": 9"))
        .unwrap();
    assert_eq!(complain(&[]), "snn-run: cluster.json: manifest: version 9, expected 1");
    std::fs::remove_file(at("cluster.json")).unwrap();
    let said = complain(&[]);
    assert!(said.starts_with("snn-run: cluster.json: manifest: No such file"), "{said}");
}

#[test]
fn shards_of_two_splits_in_one_folder_are_refused() {
    let (ours, net) = (cluster(), net());
    let theirs = folder(&net, Some(&ring(&net, 1, Dtype::F32)), Nodes::PerGroup);
    std::fs::copy(theirs.path().join("shard_1.onnx"), ours.path().join("shard_1.onnx")).unwrap();
    let said = complaint(&local(ours.path(), &[]), ours.path());
    let expected = "snn-run: shard_1.onnx: addresses: cluster.json beside it is of split ";
    assert!(said.starts_with(expected), "{said}");
}

#[test]
fn nobody_to_ask_is_an_error() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let nobody = "127.0.0.1:1: connect: nobody listens on tcp/127.0.0.1:1: ";
    for (input, expected) in [(manifest, nobody), ("x.npy", "x.npy: input: No such file")] {
        let output = Command::new(env!("CARGO_BIN_EXE_snn-run"))
            .args(["infer", "--node", "127.0.0.1:1", input, "--timeout", "2"])
            .output()
            .unwrap();
        let said = text(&output.stderr);
        assert!(said.starts_with(&format!("snn-run: {expected}")), "{said}");
        assert_eq!((said.lines().count(), output.status.code()), (1, Some(2)));
    }
}

#[test]
fn what_could_not_be_written_is_refused_before_anything_runs() {
    let folder = cluster();
    let name = folder.path().display().to_string();
    for (option, path, expected) in [
        ("--output", "/nonexistent/y.npy", "output: /nonexistent/y.npy: there is no such folder"),
        ("--trace", &name, &format!("trace: {name}: it is a folder")),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snn-run"));
        let output = command.args(["--local", &name, option, path]).output().unwrap();
        assert_eq!(text(&output.stderr), format!("snn-run: {expected}\n"));
        assert_eq!((output.stdout.len(), output.status.code()), (0, Some(2)));
    }
}

#[test]
fn an_address_that_is_none_is_named() {
    let folder = cluster();
    let shard = folder.path().join("shard_0.onnx");
    for (option, address, expected) in [
        ("--listen", "nonsense", "address \"nonsense\", expected tcp/HOST:PORT or HOST:PORT"),
        ("--peer", "nonsense", "address \"nonsense\", expected tcp/HOST:PORT or HOST:PORT"),
        ("--http", "70000", "http on 70000: expected PORT or HOST:PORT"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snn-run"));
        let output = command.arg(&shard).args([option, address]).output().unwrap();
        let expected = format!("snn-run: {}: {expected}\n", shard.display());
        assert_eq!((text(&output.stderr), output.status.code()), (expected, Some(2)));
    }
}

#[test]
fn an_emulated_device_and_link_cost_time_and_no_answer() {
    let (net, folder) = (net(), cluster());
    let at = |name: &str| folder.path().join(name).display().to_string();
    write_npy(Path::new(&at("x.npy")), &array(&image(&net, 0))).unwrap();
    let expected = reference::logits(&net, Some(&ring(&net, 1, Dtype::F16)), image(&net, 0).data());
    write_npy(Path::new(&at("y.npy")), &Array { shape: vec![1, net.classes], data: expected })
        .unwrap();
    let (x, y) = (at("x.npy"), at("y.npy"));
    let arguments = ["--input", &x, "--check", &y, "--json", "--device", "3x", "--link"];
    let output = local(folder.path(), &[&arguments[..], &["1gbit,60ms"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The input travels for half of the round trip, and what comes back for the other half.
    assert!(found["latency_ms"]["median"].as_f64().unwrap() > 60.0, "{found}");
    let output = local(folder.path(), &["--device", "1000tflops"]);
    let said = complaint(&output, folder.path());
    let expected = "snn-run: --device: 1000000 GFLOP/s are more than the ";
    assert!(said.starts_with(expected), "{said}");
}

/// The README cannot drift: what its console blocks show is what happens.
#[test]
fn the_readme_says_what_happens() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let start = folder.path().join("README.in");
    std::fs::create_dir(&start).unwrap();
    for name in ["digits.onnx", "digits.json"] {
        std::fs::copy(root.join("examples/models").join(name), start.join(name)).unwrap();
    }
    let readme = folder.path().join("README.md");
    std::fs::copy(root.join("README.md"), &readme).unwrap();
    // Both write into the folder the blocks run in.
    std::fs::write(folder.path().join("README.toml"), "fs.sandbox = true\n").unwrap();
    trycmd::TestCases::new()
        .register_bin("snnc", Path::new(env!("CARGO_BIN_EXE_snnc")))
        .register_bin("snn-run", Path::new(env!("CARGO_BIN_EXE_snn-run")))
        .case(readme.to_str().unwrap());
}
