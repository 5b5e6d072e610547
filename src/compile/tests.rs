//! What `snnc` leaves on disk, and what it says where it leaves nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::{CommandFactory as _, Parser as _};
use snn_compiler::{Split, sha256};
use snn_schemas::Manifest;
use tempfile::TempDir;

use super::fixtures::{Net, Style, residual, style};
use super::*;

const POLICY: &str = r#"{"version":1,"groups":4,"staleness":1,"dtype":"f16",
    "decisions":[[9,4],[23,8],[18,0],7]}"#;

fn net() -> Net {
    residual(4, &[2, 2], 8)
}

/// A folder with a model, a policy that fits it, and files with all kinds of faults.
fn folder() -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let write =
        |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("written");
    let model = net().onnx(style("burn"));
    write("model.onnx", &model);
    write("best.json", POLICY.as_bytes());
    write("cut.onnx", &model[..model.len() / 2]);
    write("dynamic.onnx", &net().onnx(Style { dynamic: true, ..style("burn") }));
    write("three.json", br#"{"version":1,"groups":3,"staleness":1,"decisions":[0,1,2,3]}"#);
    write("short.json", br#"{"version":1,"groups":4,"staleness":1,"decisions":[0,1,2]}"#);
    write("bad.json", br#"{"version":1,"groups":4,"staleness":1,"decisions":[0,99,2,3]}"#);
    let mut mixing = net().model(style("burn"));
    for node in &mut mixing.graph.as_mut().expect("a graph").node {
        if node.name() == "stage1.0/out:Relu" {
            node.op_type = Some("Softmax".to_owned());
        }
    }
    write("mixing.onnx", &snn_schemas::onnx::encode(&mixing));
    let mut unknown = net().model(style("burn"));
    unknown.graph.as_mut().expect("a graph").node[2].op_type = Some("Frobnicate".to_owned());
    write("unknown.onnx", &snn_schemas::onnx::encode(&unknown));
    dir
}

/// Every file of a folder, by name, with its bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, if path.is_dir() { vec![] } else { fs::read(&path).expect("a file") })
        })
        .collect()
}

/// Arguments in which every word with a dot, or that is a folder, is a path in `dir`.
fn args(dir: &Path, line: &str) -> Args {
    let word = |word: &str| match word.contains('.') || word == "out" {
        true => dir.join(word).to_string_lossy().into_owned(),
        false => word.to_owned(),
    };
    let words = line.split_whitespace().map(word);
    Args::try_parse_from(["snnc".to_owned()].into_iter().chain(words)).expect("a command line")
}

#[test]
fn bad_input_gets_one_line_and_nothing_is_written() {
    let dir = folder();
    let before = files(dir.path());
    let cases = [
        ("split none.onnx", "none.onnx: read: No such file or directory (os error 2)"),
        ("split best.json", "best.json: read: not an ONNX model: "),
        (
            "split unknown.onnx",
            r#"unknown.onnx: shapes: op "stem/act:Relu" has the unknown type Frobnicate"#,
        ),
        (
            "split dynamic.onnx",
            r#"dynamic.onnx: shapes: input "image" has the dynamic shape [?,3,8,8]; give --input-shape"#,
        ),
        (
            "split mixing.onnx",
            r#"mixing.onnx: groups: op "stage1.0/out:Relu" mixes all 4 groups (Softmax)"#,
        ),
        (
            "inspect mixing.onnx",
            r#"mixing.onnx: groups: op "stage1.0/out:Relu" mixes all 4 groups (Softmax)"#,
        ),
        (
            "split model.onnx --policy three.json",
            "three.json: policy: made for 3 groups, the model has 4",
        ),
        (
            "split model.onnx --policy short.json",
            "short.json: policy: 3 steps, expected 4 (⌊4 blocks / staleness 1⌋)",
        ),
        (
            "split model.onnx --policy bad.json",
            "bad.json: policy: step 1: decision 99, expected 0 to 23",
        ),
        (
            "split model.onnx --nodes 5",
            "model.onnx: placement: 5 nodes for 4 groups, expected 1 to 4",
        ),
        ("split model.onnx -o best.json", "best.json: write: Not a directory (os error 20)"),
        ("show best.json", "best.json: manifest: unknown field `dtype`, expected"),
        ("show none.shards", "none.shards: read: No such file or directory (os error 2)"),
    ];
    for (line, expected) in cases {
        let error = dispatch(&args(dir.path(), line)).expect_err(line);
        let message = one_line(&error).replace(&format!("{}/", dir.path().display()), "");
        assert!(message.starts_with(expected), "{line}: {message}");
        assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
        assert!(files(dir.path()) == before, "{line} left something behind");
    }
    let error = dispatch(&args(dir.path(), "split cut.onnx")).expect_err("it is cut");
    assert!(one_line(&error).contains("cut.onnx: read: ONNX model is cut short: "), "{error:?}");
    assert!(files(dir.path()) == before);
}

fn split_in(dir: &Path, line: &str) -> Split {
    let Command::Split(split) = args(dir, line).command else { panic!("a split") };
    compile(&split.model, &split.compile).expect("it compiles")
}

fn write(dir: &Path, line: &str, out: &str) -> Result<()> {
    output::write(&split_in(dir, line), &dir.join(out))
}

fn manifest(dir: &Path) -> Manifest {
    show::read_manifest(&dir.join("cluster.json")).expect("a manifest")
}

#[test]
fn a_split_is_written_whole_and_the_same_each_time() {
    let dir = folder();
    for out in ["first", "deeper/second"] {
        write(dir.path(), "split model.onnx --policy best.json", out).expect("written");
    }
    let first = files(&dir.path().join("first"));
    let names: Vec<&str> = first.keys().map(String::as_str).collect();
    let expected = ["cluster.json", "shard_0.onnx", "shard_1.onnx", "shard_2.onnx", "shard_3.onnx"];
    assert_eq!(names, expected);
    assert!(files(&dir.path().join("deeper/second")) == first);
    for node in manifest(&dir.path().join("first")).nodes {
        assert_eq!(sha256(&first[&node.shard]), node.sha256);
    }
    // Nothing is left beside the folders.
    assert!(!files(dir.path()).keys().any(|name| name.starts_with('.')));
}

#[test]
fn an_earlier_split_is_replaced_and_nothing_else() {
    let dir = folder();
    let line = "split model.onnx --policy best.json";
    write(dir.path(), line, "out").expect("written");
    let out = dir.path().join("out");
    fs::write(out.join("notes.txt"), "mine").expect("written");
    let mut edited = manifest(&out);
    edited.nodes[1].address = Some("tcp/192.168.1.11:7447".to_owned());
    fs::write(out.join("cluster.json"), edited.to_json()).expect("written");

    write(dir.path(), line, "out").expect("written");
    assert_eq!(manifest(&out), edited);
    write(dir.path(), &format!("{line} --nodes 2"), "out").expect("written");
    let names: Vec<String> = files(&out).into_keys().collect();
    assert_eq!(names, ["cluster.json", "notes.txt", "shard_0.onnx", "shard_1.onnx"]);
    assert_eq!(manifest(&out).nodes[1].address, None);
}

#[test]
fn a_folder_of_somebody_else_is_not_touched() {
    let dir = folder();
    let out = dir.path().join("out");
    fs::create_dir(&out).expect("a folder");
    write(dir.path(), "split model.onnx", "out").expect("an empty folder is taken");
    fs::remove_file(out.join("cluster.json")).expect("removed");
    let before = files(&out);
    let error = write(dir.path(), "split model.onnx", "out").expect_err("no folder of a split");
    let expected = "write: the folder has files but no cluster.json; choose another with -o";
    assert!(one_line(&error).ends_with(expected), "{error:?}");
    assert!(files(&out) == before);
}

#[test]
fn a_picture_is_what_its_name_says() {
    let dir = folder();
    for (name, start) in [("p.svg", "<svg "), ("p.dot", "digraph snn {"), ("p.txt", "        b1")] {
        let line = format!("show model.onnx --policy best.json -o {name}");
        dispatch(&args(dir.path(), &line)).expect("drawn");
        let text = fs::read_to_string(dir.path().join(name)).expect("a picture");
        assert!(text.starts_with(start), "{name}: {text}");
    }
    // A folder is drawn as it was compiled.
    write(dir.path(), "split model.onnx --policy best.json", "out").expect("written");
    dispatch(&args(dir.path(), "show out -o again.svg")).expect("drawn");
    let drawn = files(dir.path());
    assert!(drawn["again.svg"] == drawn["p.svg"]);
}

#[test]
fn a_shard_is_not_taken_for_a_model() {
    let dir = folder();
    write(dir.path(), "split model.onnx --policy best.json", ".").expect_err("not a split's");
    write(dir.path(), "split model.onnx --policy best.json", "out").expect("written");
    let error =
        dispatch(&args(&dir.path().join("out"), "split shard_1.onnx")).expect_err("a shard");
    let expected = "shard_1.onnx: read: shard 1 of a split network, not a whole one";
    assert!(one_line(&error).ends_with(expected), "{error:?}");
    // One that holds everything is a model like any other, whole: its groups are apart already.
    write(dir.path(), "split model.onnx --policy best.json --nodes 1", "fused").expect("written");
    split_in(&dir.path().join("fused"), "split shard_0.onnx --nodes 1");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let broken = anyhow::Error::new(io::Error::from(io::ErrorKind::BrokenPipe));
    assert!(is_broken_pipe(&broken.context("standard output")));
    let full = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull));
    assert!(!is_broken_pipe(&full.context("standard output")));
}

#[test]
fn every_command_has_help_with_an_example() {
    let mut command = Args::command();
    assert!(command.render_long_help().to_string().contains("Example"));
    for name in ["split", "inspect", "show", "cost"] {
        let sub = command.find_subcommand_mut(name).expect("a command");
        let help = sub.render_long_help().to_string();
        assert!(help.contains("Example") && help.contains(&format!("snnc {name} ")), "{help}");
    }
}

#[test]
fn a_sweep_has_a_line_for_each_staleness_that_fits() {
    let dir = folder();
    let line = "cost model.onnx --policy best.json --sweep -o sweep.svg";
    dispatch(&args(dir.path(), line)).expect("a chart");
    let svg = fs::read_to_string(dir.path().join("sweep.svg")).expect("written");
    for name in ["α = 1", "α = 2", "300 Mbit/s, 5 GFLOP/s"] {
        assert!(svg.contains(name), "{name}");
    }
    // Three blocks a step would cross the stride after two.
    assert!(!svg.contains("α = 3"));
}

#[test]
fn zeros_are_a_share_of_packed_features() {
    let zeros = |words: &[&str]| {
        let mut line = vec!["snnc", "cost", "model.onnx"];
        line.extend(words);
        match Args::try_parse_from(line).map(|args| args.command) {
            Ok(Command::Cost(cost)) => Ok(cost.zeros),
            Ok(_) => panic!("a cost"),
            Err(error) => Err(error.to_string()),
        }
    };
    assert_eq!(zeros(&[]), Ok(0.5));
    assert_eq!(zeros(&["--zeros", "0.25"]), Ok(0.25));
    for share in ["--zeros=-0.1", "--zeros=1.5", "--zeros=NaN", "--zeros=half"] {
        let said = zeros(&[share]).expect_err("no share");
        assert!(said.contains("expected a share, 0 to 1"), "{said}");
    }
}
