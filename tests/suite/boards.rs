//! The guide of `examples/raspberry-pi.md` on four boards that are network namespaces on a bridge.
//!
//! Its agent is started as its unit says, and its `sh laptop` blocks are run as they stand, from a
//! namespace of their own: agents are found by multicast, and nothing but the bridge connects anybody.
//! Needs root and `ip`; where there is neither nothing is run.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::not_tested;
use crate::processes::SNN_RUN;

/// What the guide's boards are called in this test's network.
const NETWORK: &str = "192.168.1.";
const BOARDS: usize = 4;
/// How long the guide's commands may take altogether: tests share the machine.
const WITHIN: Duration = Duration::from_secs(120);

/// Hosts on a bridge, each a network namespace; removed when dropped.
struct Bench {
    names: Vec<String>,
}

fn ip(arguments: &str) -> bool {
    let done = Command::new("ip").args(arguments.split(' ')).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

impl Bench {
    /// The laptop is host 0, boards are 1 to 4; `None` where this machine has no namespaces to give.
    fn new() -> Option<Bench> {
        let name = |host: usize| format!("snn{}-{host}", std::process::id());
        let switch = format!("snn{}-s", std::process::id());
        if !ip(&format!("netns add {switch}")) {
            return None;
        }
        let mut bench = Bench { names: vec![switch.clone()] };
        let steps = [
            format!("-n {switch} link add br0 type bridge"),
            format!("-n {switch} addr add {NETWORK}1/24 dev br0"),
            format!("-n {switch} link set br0 up"),
        ];
        let mut sound = steps.iter().all(|step| ip(step));
        for host in 0..=BOARDS {
            let name = name(host);
            sound &= ip(&format!("netns add {name}"));
            bench.names.push(name.clone());
            let steps = [
                format!("-n {switch} link add port{host} type veth peer name eth0 netns {name}"),
                format!("-n {switch} link set port{host} master br0"),
                format!("-n {switch} link set port{host} up"),
                format!("-n {name} link set lo up"),
                format!("-n {name} addr add {NETWORK}{}/24 dev eth0", 10 + host),
                format!("-n {name} link set eth0 up"),
                format!("-n {name} route add default via {NETWORK}1"),
            ];
            sound &= steps.iter().all(|step| ip(step));
        }
        sound.then_some(bench)
    }

    /// A command on a host.
    fn on(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host + 1], program]);
        command
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

/// The guide, block by block: what stands after the fence, and the block.
fn blocks(guide: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut parts = guide.split("```");
    parts.next();
    while let (Some(block), _) = (parts.next(), parts.next()) {
        let (info, text) = block.split_once('\n').unwrap();
        blocks.push((info.to_owned(), text.to_owned()));
    }
    blocks
}

/// A board's credentials as systemd shows them: the group may read, though by another list nobody does.
fn credentials(desk: &Path, number: usize) -> PathBuf {
    let folder = desk.join(format!("credentials{number}"));
    let key = folder.join("cluster.key");
    if !key.exists() {
        fs::create_dir_all(&folder).unwrap();
        fs::copy(desk.join("cluster.key"), &key).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o440)).unwrap();
    }
    folder
}

/// A board's agent, as the guide's unit starts it.
struct Board {
    process: Child,
}

impl Board {
    fn start(bench: &Bench, number: usize, unit: &str, desk: &Path) -> Board {
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        let credentials = credentials(desk, number);
        let line = line
            .replace("/usr/local/bin/snn-run", SNN_RUN)
            .replace("${CREDENTIALS_DIRECTORY}", credentials.to_str().unwrap());
        let mut words = line.split(' ');
        let mut command = bench.on(number, words.next().unwrap());
        command.args(words).args(["--name", &format!("pi{number}")]);
        command.env("CREDENTIALS_DIRECTORY", &credentials);
        command.env("STATE_DIRECTORY", desk.join(format!("board{number}")));
        command.stderr(Stdio::null()).process_group(0);
        Board { process: command.spawn().unwrap() }
    }

    /// Everything on the board ends at once.
    fn pull_the_plug(&mut self) {
        let group = format!("-{}", self.process.id());
        let kill =
            Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        // It may have ended already.
        drop(kill);
        let _ = self.process.wait();
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.pull_the_plug();
    }
}

fn text(output: &Output) -> String {
    let [out, error] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{error}")
}

/// What lies on the laptop's desk: the example network, another version of it, and a picture.
fn lay_out(desk: &Path) {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models");
    let policy = fs::read_to_string(models.join("digits.json")).unwrap();
    assert!(policy.contains("\"f16\""));
    fs::write(desk.join("digits.json"), &policy).unwrap();
    fs::write(desk.join("better.json"), policy.replace("\"f16\"", "\"f32\"")).unwrap();
    for name in ["digits.onnx", "better.onnx"] {
        fs::copy(models.join("digits.onnx"), desk.join(name)).unwrap();
    }
    let seven = image::GrayImage::from_fn(8, 8, |x, y| image::Luma([(x * 30 * (y % 2)) as u8]));
    seven.save(desk.join("seven.png")).unwrap();
}

#[test]
fn the_guide_says_what_happens() {
    let Some(bench) = Bench::new() else {
        return not_tested("the guide", "needs root and ip");
    };
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/raspberry-pi.md");
    let guide = blocks(&fs::read_to_string(guide).unwrap());
    let unit = &guide.iter().find(|(info, _)| info == "ini").unwrap().1;
    let folder = tempfile::tempdir().unwrap();
    let desk = folder.path();
    lay_out(desk);
    let programs = PathBuf::from(SNN_RUN).parent().unwrap().display().to_string();
    let path = format!("{programs}:{}", std::env::var("PATH").unwrap());
    let has_curl = Command::new("curl").arg("--version").output().is_ok();
    if !has_curl {
        not_tested("the guide's lines with curl", "needs curl");
    }
    let run = |block: &str| {
        let lines = block.lines().filter(|line| has_curl || !line.starts_with("curl "));
        let script: String = lines.flat_map(|line| [line, "\n"]).collect();
        let mut shell = bench.on(0, "sh");
        shell.args(["-e", "-c", &script]).current_dir(desk).env("PATH", &path);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{script}{}", text(&output));
        text(&output)
    };

    let mut boards: Vec<Board> = Vec::new();
    let deadline = Instant::now() + WITHIN;
    let mut ran = 0;
    for (info, block) in &guide {
        match info.as_str() {
            "sh laptop" => {
                run(block);
                ran += 1;
            }
            "sh laptop survivors" => {
                let before = run(block);
                boards[0].pull_the_plug();
                boards[3].pull_the_plug();
                // Asked again at a board that is left, once more as the guide says it.
                assert_eq!(run(block), before);
                for number in [0, 3] {
                    boards[number] = Board::start(&bench, number + 1, unit, desk);
                }
                ran += 1;
            }
            _ => {}
        }
        if info == "ini" {
            boards = (1..=BOARDS).map(|number| Board::start(&bench, number, unit, desk)).collect();
            // Bound, and so found.
            std::thread::sleep(Duration::from_millis(500));
        }
        assert!(Instant::now() < deadline, "the guide takes too long");
    }
    assert_eq!(ran, 8);
}
