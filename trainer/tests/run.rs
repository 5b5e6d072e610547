//! Whole runs of a very small network: what they leave behind, what a stop changes, what is refused.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use snn_schemas::{Dtype, Policy, onnx};
use snn_trainer::{
    Candidate, Classifier, Config, Data, DatasetName, ExportConfig, Progress, Report, Source,
    Stage, TrainError, Weights, classify, evaluate, read_network,
};

/// Seconds rather than a minute; accuracy is of no interest here.
fn tiny() -> Config {
    let mut config = Config::digits();
    config.net.trunk_width = 4;
    config.net.path_width = 2;
    config.net.stem_channels = 4;
    config.train.epochs = 4;
    config.train.calibration = 128;
    config.search.steps = 4;
    config.search.samples = 3;
    config.search.cells = 8;
    config.finetune.epochs = 2;
    config
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

/// The lines of `metrics.jsonl` without the time they took.
fn metrics(folder: &Path) -> Vec<serde_json::Value> {
    let text = String::from_utf8(read(folder, "metrics.jsonl")).unwrap();
    let strip = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds");
        line
    };
    text.lines().map(strip).collect()
}

#[test]
fn weights_learn_under_the_policies_asked_for() {
    let loss = |under: Source| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = tiny();
        config.train.under = under;
        config.train.epochs = 1;
        config.search.rounds = 1;
        snn_trainer::train(&config, None, folder.path(), false, &mut ()).unwrap();
        metrics(folder.path())[0]["loss"].as_f64().unwrap()
    };
    let [searched, random, full, silent] =
        [Source::Searched, Source::Random, Source::Full, Source::Silent].map(loss);
    // A controller that has learned nothing draws as the random sampler does.
    assert_eq!(searched, random);
    assert!(random != full && full != silent && silent != random, "{random} {full} {silent}");
}

#[test]
fn a_run_leaves_a_model_whose_predictions_are_those_of_training() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let config = tiny();
    let (mut stages, mut left) = (Vec::new(), Vec::new());
    let mut listen = |report: &Report| {
        stages.push(report.stage);
        left.push(report.left.unwrap());
    };
    let outcome = snn_trainer::run(&config, None, &out, false, &mut listen).unwrap();
    stages.dedup();
    assert!(left[0] > Duration::ZERO);
    assert_eq!(left.last(), Some(&Duration::ZERO));
    let round = [Stage::Train, Stage::Search, Stage::Select];
    let end = [Stage::Baseline, Stage::Finetune, Stage::Test, Stage::Export];
    assert_eq!(stages, [&round[..], &round, &end].concat());
    for name in [
        "model.onnx",
        "best.json",
        "config.toml",
        "metrics.jsonl",
        "report.html",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
    ] {
        assert!(out.join(name).is_file(), "{name}");
    }

    let data = Data::load(&config, None).unwrap();
    let searched = outcome.candidate("searched").unwrap();
    let policy = Policy::from_json(&read(&out, "best.json")).unwrap();
    assert_eq!(policy.steps, searched.policy.steps);
    let provenance = policy.provenance.clone().unwrap();
    assert_eq!(provenance["seed"], 1);
    assert_eq!(provenance["accuracy"]["searched"]["test"], searched.test.accuracy());

    let exported = read_network(read(&out, "model.onnx"), &config).unwrap();
    let trained = classify(&outcome.network, &searched.policy, &data.test).unwrap();
    assert_eq!(classify(&exported, &policy, &data.test).unwrap(), trained);
    let right = trained.iter().zip(data.test.labels()).filter(|(told, label)| told == label);
    assert_eq!(right.count(), searched.test.correct);
    // tract, on the file, tells as many right as training did.
    let score = evaluate(&out, None, None).unwrap();
    assert_eq!((score.correct, score.images), (searched.test.correct, 599));
    assert!((score.loss - searched.test.loss).abs() < 1e-3, "{score:?}");
    // Without its exchanges it is another network.
    let plain = evaluate(&out, None, Some(&out.join("model.onnx"))).unwrap();
    assert!((plain.loss - score.loss).abs() > 1e-3, "{plain:?}");

    let model = onnx::decode(read(&out, "model.onnx").into()).unwrap();
    assert_eq!(model.metadata("snn.classes"), Some("0,1,2,3,4,5,6,7,8,9"));
    assert_eq!(model.metadata("snn.mean"), Some(data.normalisation.mean[0].to_string().as_str()));
    let input = &model.graph.as_ref().unwrap().input;
    assert_eq!(input.len(), 1);
    assert_eq!(input[0].shape().unwrap(), [1, 1, 8, 8].map(Some));

    let page = String::from_utf8(read(&out, "report.html")).unwrap();
    assert!(page.contains("Stage 1: loss") && page.contains("<td>searched</td>"));
    assert!(page.contains("t2: decision") && page.contains("Fine-tuning: loss"));
    assert!(!page.contains("Not finished"));
    assert!(!page.contains("http://") || page.matches("http://").all(|found| found.len() == 7));
}

#[test]
fn a_classifier_of_all_groups_under_codes_is_exported_as_it_was_trained() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny();
    config.net.classifier = Classifier::All;
    config.exchange.dtype = Dtype::I4;
    let outcome = snn_trainer::run(&config, None, folder.path(), false, &mut ()).unwrap();
    let searched = outcome.candidate("searched").unwrap();
    let score = evaluate(folder.path(), None, None).unwrap();
    assert_eq!((score.correct, score.images), (searched.test.correct, 599));
    assert!((score.loss - searched.test.loss).abs() < 1e-3, "{score:?}");
    // Four times the weights of a classifier that reads one group's 16 channels.
    let model = onnx::decode(read(folder.path(), "model.onnx").into()).unwrap();
    let weights = &model.graph.as_ref().unwrap().initializer;
    let classifier = weights.iter().find(|tensor| tensor.name() == "classifier.weight").unwrap();
    assert_eq!(classifier.dims, [4 * 16, 10]);
}

#[test]
fn weights_of_half_precision_are_judged_as_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny();
    config.train.epochs = 1;
    config.search.rounds = 1;
    config.finetune.epochs = 1;
    config.export.weights = Weights::F16;
    let outcome = snn_trainer::run(&config, None, folder.path(), false, &mut ()).unwrap();
    let searched = outcome.candidate("searched").unwrap();
    let exported = read_network(read(folder.path(), "model.onnx"), &config).unwrap();
    let data = Data::load(&config, None).unwrap();
    let told = classify(&exported, &searched.policy, &data.test).unwrap();
    assert_eq!(told, classify(&outcome.network, &searched.policy, &data.test).unwrap());
    let right = told.iter().zip(data.test.labels()).filter(|(told, label)| told == label);
    assert_eq!(right.count(), searched.test.correct);
    let score = evaluate(folder.path(), None, None).unwrap();
    assert_eq!(score.correct, searched.test.correct);
    // What was judged rounded is not exported otherwise.
    config.export = ExportConfig::default();
    let other = snn_trainer::export(&config, None, folder.path(), &mut ()).unwrap_err();
    assert!(other.to_string().ends_with("was begun with another [export]"), "{other}");
}

#[test]
fn a_run_that_was_stopped_ends_as_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let config = tiny();
    snn_trainer::run(&config, None, &whole, false, &mut ()).unwrap();
    // Stopped in the middle of something, again and again: in an epoch, between steps, while
    // choosing. What lies on the disk is then all that is left.
    for stop in [2, 4, 7, 12, 12, 12] {
        let begun = parts.exists();
        let stopped = std::panic::catch_unwind(|| {
            let mut told = 0;
            let mut listen = |_: &Report| {
                told += 1;
                if told == stop {
                    std::panic::resume_unwind(Box::new("stopped"));
                }
            };
            snn_trainer::run(&config, None, &parts, begun, &mut listen)
        });
        assert!(stopped.is_err(), "stop {stop} came after the end");
    }
    snn_trainer::run(&config, None, &parts, true, &mut ()).unwrap();
    assert_same(&whole, &parts);
}

/// Checks that two runs have the same figures and left the same files.
fn assert_same(one: &Path, other: &Path) {
    assert_eq!(metrics(one), metrics(other));
    for name in ["model.onnx", "best.json", "config.toml", "run.json", "report.html"] {
        assert!(read(one, name) == read(other, name), "{name} differs");
    }
}

/// The program at work; killed when dropped.
struct Program(Child);

impl Program {
    /// Starts `snn-train run` on the settings `config`, or goes on with the run that `out` holds.
    fn start(config: &Path, out: &Path) -> Program {
        let mut program = Command::new(env!("CARGO_BIN_EXE_snn-train"));
        program.args(["run", "--quiet", "--resume", "--out"]).arg(out).arg(config);
        Program(program.stdout(Stdio::null()).spawn().unwrap())
    }

    /// Kills it without warning once so many lines of `file` contain `text`.
    fn kill_at(mut self, file: &Path, (count, text): (usize, &str)) {
        // Far more than any machine needs: only a run that hangs comes to it.
        let deadline = Instant::now() + Duration::from_secs(300);
        loop {
            let seen = std::fs::read_to_string(file).unwrap_or_default();
            if seen.lines().filter(|line| line.contains(text)).count() >= count {
                break;
            }
            let ended = self.0.try_wait().unwrap();
            assert!(ended.is_none(), "ended before {count} lines of {text:?}: {ended:?}");
            assert!(Instant::now() < deadline, "no {count} lines of {text:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
        self.0.kill().unwrap(); // SIGKILL
        let status = self.0.wait().unwrap();
        assert_eq!(status.code(), None, "ended by itself while it should have been killed");
    }

    fn end(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and need not be.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_program_that_is_killed_again_and_again_ends_with_the_same_figures() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let mut config = tiny();
    // Enough to do after each kill that it cannot come too late.
    (config.search.steps, config.search.samples) = (40, 20);
    let settings = folder.path().join("tiny.toml");
    std::fs::write(&settings, config.to_toml()).unwrap();
    Program::start(&settings, &whole).end();
    // While the weights learn, while the controller does, and while policies are chosen among.
    let lines = parts.join("metrics.jsonl");
    Program::start(&settings, &parts).kill_at(&lines, (1, "\"stage\":\"train\""));
    Program::start(&settings, &parts).kill_at(&lines, (2, "\"stage\":\"search\""));
    let scores = parts.join("checkpoints/scores.jsonl");
    Program::start(&settings, &parts).kill_at(&scores, (2, "\"correct\":"));
    Program::start(&settings, &parts).end();
    assert_same(&whole, &parts);
}

#[test]
fn policies_that_were_judged_before_a_stop_are_not_judged_again() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let mut config = tiny();
    (config.train.epochs, config.search.rounds) = (1, 1);
    snn_trainer::train(&config, None, out, false, &mut ()).unwrap();
    let stopped = std::panic::catch_unwind(|| {
        let mut listen = |report: &Report| {
            if report.stage == Stage::Select && report.done == 2 {
                std::panic::resume_unwind(Box::new("stopped"));
            }
        };
        snn_trainer::search(&config, None, out, &mut listen)
    });
    assert!(stopped.is_err());
    // As if the first had told all images right.
    let path = out.join("checkpoints/scores.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let (first, others) = text.split_once('\n').unwrap();
    let mut first: serde_json::Value = serde_json::from_str(first).unwrap();
    first["correct"] = first["images"].clone();
    std::fs::write(&path, format!("{first}\n{others}")).unwrap();
    snn_trainer::search(&config, None, out, &mut ()).unwrap();
    let lines = metrics(out);
    let chosen = lines.iter().find(|line| line["stage"] == "select").unwrap();
    assert_eq!(chosen["validation_accuracy"], 1.0);
}

/// Keeps what it is warned of.
#[derive(Default)]
struct Warned(Vec<String>);

impl Progress for Warned {
    fn report(&mut self, _: &Report) {}

    fn warn(&mut self, warning: &str) {
        self.0.push(warning.to_owned());
    }
}

#[test]
fn images_that_cannot_be_used_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let parts = [("train/a", 60_u8), ("train/b", 60), ("test/a", 2), ("test/b", 2)];
    for (part, count) in parts {
        let inside = data.join(part);
        std::fs::create_dir_all(&inside).unwrap();
        for index in 0..count {
            let image = image::GrayImage::from_pixel(8, 8, image::Luma([index]));
            image.save(inside.join(format!("{index}.png"))).unwrap();
        }
    }
    std::fs::write(data.join("train/a/broken.png"), "no image").unwrap();
    let mut config = tiny();
    config.data.name = DatasetName::Folder;
    (config.net.classes, config.train.epochs, config.search.rounds) = (2, 1, 1);
    let mut warned = Warned::default();
    let out = folder.path().join("run");
    snn_trainer::train(&config, Some(&data), &out, false, &mut warned).unwrap();
    let [warning] = &warned.0[..] else { panic!("{:?}", warned.0) };
    assert!(warning.starts_with("1 image is left out: ") && warning.contains("broken.png: "));
}

/// A file system of its own for a test, of so many bytes; unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Nothing where this process may not mount one.
    fn mount(bytes: usize) -> Option<SmallDisk> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(SmallDisk(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What stays mounted is seen by the temporary folder's own removal.
        let _ = Command::new("umount").arg(self.0.path()).output();
    }
}

#[test]
fn a_full_disk_ends_a_run_that_can_be_gone_on_with() {
    const DISK: usize = 16 << 20;
    let Some(disk) = SmallDisk::mount(DISK) else {
        eprintln!("skipped: no file system can be mounted here");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let config = tiny();
    snn_trainer::train(&config, None, folder.path(), false, &mut ()).unwrap();
    let (out, ballast) = (disk.0.path().join("run"), disk.0.path().join("ballast"));
    let mut told = 0;
    let mut fill = |_: &Report| {
        told += 1;
        if told == 2 {
            let full = std::fs::write(&ballast, vec![0_u8; DISK]).unwrap_err();
            assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        }
    };
    let error = snn_trainer::train(&config, None, &out, false, &mut fill).unwrap_err();
    let TrainError::Io { path, source } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
    assert!(path.starts_with(&out) && error.to_string().lines().count() == 1, "{error}");
    let files = std::fs::read_dir(out.join("checkpoints")).unwrap();
    let mut files: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["best.ckpt", "last.ckpt"], "nothing half written is left");
    // With room again the run goes on from its last checkpoint, and ends as if nothing had been.
    std::fs::remove_file(&ballast).unwrap();
    snn_trainer::train(&config, None, &out, true, &mut ()).unwrap();
    assert_eq!(metrics(&out), metrics(folder.path()));
}

#[test]
fn stages_one_by_one_and_out_of_order() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let config = tiny();
    let sentence = |result: Result<(), TrainError>| result.unwrap_err().to_string();
    let early = sentence(snn_trainer::search(&config, None, out, &mut ()));
    assert!(early.ends_with("has no trained weights; run \"train\" first"), "{early}");
    assert_eq!(std::fs::read_dir(out).unwrap().count(), 0, "what is refused writes nothing");
    snn_trainer::train(&config, None, out, false, &mut ()).unwrap();
    let page = String::from_utf8(read(out, "report.html")).unwrap();
    assert!(page.contains("Not finished: train, round 2 of 2, 2 of 2; 0 s left"), "{page}");
    let early = sentence(snn_trainer::finetune(&config, None, out, &mut ()));
    assert!(early.ends_with("has no chosen policy; run \"search\" first"), "{early}");
    snn_trainer::search(&config, None, out, &mut ()).unwrap();
    let early = snn_trainer::export(&config, None, out, &mut ()).unwrap_err().to_string();
    assert!(early.ends_with("has no fine-tuned weights; run \"finetune\" first"), "{early}");
    snn_trainer::finetune(&config, None, out, &mut ()).unwrap();
    let outcome = snn_trainer::export(&config, None, out, &mut ()).unwrap();
    assert_eq!(outcome.candidates.len(), 3);
    assert!(outcome.model.is_file());
}

/// The rows of an evidence table, from one set of shared weights.
#[test]
fn candidates_keep_to_their_limits_and_may_be_added() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let mut config = tiny();
    config.exchange.dtype = Dtype::F32;
    config.search.rounds = 1;
    config.search.judged_images = 50;
    config.finetune.epochs = 1;
    snn_trainer::train(&config, None, out, false, &mut ()).unwrap();
    let row = |name: &str, source, search_levels, dtype| Candidate {
        name: name.to_owned(),
        search_levels,
        dtype,
        ..Candidate::new(source)
    };
    config.candidates = vec![
        row("searched", Source::Searched, Some(false), None),
        row("sparse", Source::Searched, Some(true), None),
        row("sparse-f16", Source::Searched, Some(true), Some(Dtype::F16)),
        row("random", Source::Random, Some(false), None),
        row("full", Source::Full, None, None),
    ];
    snn_trainer::run(&config, None, out, true, &mut ()).unwrap();
    // A row more, after the end: the others stay what they were.
    let before = metrics(out);
    config.candidates.push(row("silent", Source::Silent, None, None));
    let outcome = snn_trainer::run(&config, None, out, true, &mut ()).unwrap();
    let names: Vec<&str> =
        outcome.candidates.iter().map(|judged| judged.candidate.name.as_str()).collect();
    assert_eq!(names, ["searched", "sparse", "sparse-f16", "random", "full", "silent"]);
    let after = metrics(out);
    assert_eq!(after[..before.len()], before[..]);
    assert_eq!(after.len(), before.len() + 3, "an epoch, a judgement, a test");

    // The same once more, fine-tuned for longer.
    let longer = Candidate { epochs: Some(3), ..row("longer", Source::Full, None, None) };
    config.candidates.push(longer);
    let outcome = snn_trainer::run(&config, None, out, true, &mut ()).unwrap();
    let lines = metrics(out);
    assert_eq!(lines[..after.len()], after[..]);
    assert_eq!(lines.len(), after.len() + 5, "three epochs, a judgement, a test");
    let page = String::from_utf8(read(out, "report.html")).unwrap();
    assert_eq!(page.matches(", epochs of fine-tuning: 3, from ").count(), 1);

    let of = |name: &str| outcome.candidate(name).unwrap();
    let full = |name: &str| of(name).policy.steps.iter().all(|step| step.level == 8);
    assert!(full("searched") && full("random") && full("full") && !full("sparse"));
    assert_eq!(of("sparse").policy.steps, of("sparse-f16").policy.steps);
    assert_eq!(of("sparse-f16").policy.dtype, Dtype::F16);
    assert_eq!(2 * of("sparse-f16").wire.bytes, of("sparse").wire.bytes);
    assert_eq!(of("silent").wire.bytes, 0);
    assert!(of("full").wire.bytes < of("full").wire.planned_bytes);
    assert_eq!(of("full").test.images, 599);
    let exported = Policy::from_json(&read(out, "best.json")).unwrap();
    assert_eq!(exported.steps, of("searched").policy.steps);
    assert_eq!(evaluate(out, None, None).unwrap().correct, of("searched").test.correct);
    let judged = |stage: &str| before.iter().filter(move |line| line["stage"] == stage).count();
    assert_eq!((judged("search"), judged("baseline")), (2 * 4, 1));

    // The one that is put first is exported, and nothing is computed for it.
    config.candidates.rotate_right(1);
    let outcome = snn_trainer::run(&config, None, out, true, &mut ()).unwrap();
    assert_eq!(metrics(out), lines);
    let longer = outcome.exported().unwrap();
    assert_eq!(longer.candidate.name, "longer");
    assert_eq!(Policy::from_json(&read(out, "best.json")).unwrap().steps, longer.policy.steps);
    assert_eq!(evaluate(out, None, None).unwrap().correct, longer.test.correct);

    let refused = |change: &dyn Fn(&mut Candidate)| {
        let mut other = config.clone();
        let searched = other.candidates.iter_mut().find(|other| other.name == "searched").unwrap();
        change(searched);
        let other = snn_trainer::run(&other, None, out, true, &mut ()).unwrap_err().to_string();
        assert!(other.ends_with("was begun with another [candidates]"), "{other}");
    };
    refused(&|searched| searched.dtype = Some(Dtype::F16));
    refused(&|searched| searched.epochs = Some(4));
}

#[test]
fn an_ordinary_network_has_nothing_to_search() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = tiny();
    config.net.groups = 1;
    config.search.rounds = 1;
    let outcome = snn_trainer::run(&config, None, folder.path(), false, &mut ()).unwrap();
    assert_eq!(outcome.candidates.len(), 1);
    assert_eq!(outcome.policy, None);
    let score = evaluate(folder.path(), None, None).unwrap();
    assert_eq!(score.correct, outcome.candidate("silent").unwrap().test.correct);
}

#[test]
fn a_folder_in_use_and_other_settings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path();
    let config = tiny();
    snn_trainer::train(&config, None, out, false, &mut ()).unwrap();
    let again = snn_trainer::train(&config, None, out, false, &mut ()).unwrap_err().to_string();
    assert!(again.ends_with("holds a run already; --resume goes on with it"), "{again}");
    let mut other = config.clone();
    other.train.lr = 0.05;
    let refused = snn_trainer::train(&other, None, out, true, &mut ()).unwrap_err().to_string();
    assert!(refused.ends_with("was begun with another [train]"), "{refused}");
    // What has not begun may still be changed.
    let mut other = config.clone();
    other.search.steps = 2;
    snn_trainer::search(&other, None, out, &mut ()).unwrap();

    let about = String::from_utf8(read(out, "run.json")).unwrap();
    let sha256 = Data::load(&config, None).unwrap().sha256;
    assert!(about.contains(&sha256));
    std::fs::write(out.join("run.json"), about.replace(&sha256, "0")).unwrap();
    let settings = read(out, "config.toml");
    let mut changed = other.clone();
    changed.finetune.epochs += 1;
    let images = snn_trainer::search(&changed, None, out, &mut ()).unwrap_err().to_string();
    assert!(images.ends_with("was begun with other images"), "{images}");
    assert!(read(out, "config.toml") == settings, "what is refused changes nothing");
    std::fs::write(out.join("run.json"), about).unwrap();

    let checkpoint = out.join("checkpoints/last.ckpt");
    let bytes = std::fs::read(&checkpoint).unwrap();
    std::fs::write(&checkpoint, &bytes[..bytes.len() / 2]).unwrap();
    let cut = snn_trainer::search(&other, None, out, &mut ()).unwrap_err().to_string();
    assert!(cut.ends_with("not a whole checkpoint of this version"), "{cut}");
}

#[test]
fn what_is_wrong_is_said_once_and_on_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("c.toml");
    let said = |arguments: &[&str]| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_snn-train"));
        let out = folder.path().join("run");
        let done = program.arg("run").arg(&file).args(arguments).arg("--out").arg(out).output();
        let done = done.unwrap();
        assert_eq!(done.status.code(), Some(2));
        String::from_utf8(done.stderr).unwrap()
    };
    let name = file.display();
    let missing = "No such file or directory (os error 2)";
    assert_eq!(said(&[]), format!("snn-train: {name}: {missing}\n"));
    std::fs::write(&file, "[data]\nnme = 1\n").unwrap();
    let unknown =
        "config: at line 2, column 1: unknown field `nme`, expected `name` or `validation`";
    assert_eq!(said(&[]), format!("snn-train: {name}: {unknown}\n"));
    std::fs::write(&file, "[data]\nname = \"folder\"\n").unwrap();
    let nowhere = folder.path().join("nowhere");
    let expected = format!("snn-train: {}: {missing}\n", nowhere.join("train").display());
    assert_eq!(said(&["--data", nowhere.to_str().unwrap()]), expected);
}
