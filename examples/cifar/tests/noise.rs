//! The network in `examples/models/`, on four processes, gives what it gives on one.

use std::process::Command;

#[test]
fn four_processes_say_what_the_whole_network_says() {
    let run = Command::new(env!("CARGO_BIN_EXE_cifar")).output().unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{said}{}", String::from_utf8_lossy(&run.stderr));
    assert!(said.contains("50 of 50 as the whole network says"), "{said}");
}

#[test]
fn a_file_that_is_missing_is_named() {
    let run = Command::new(env!("CARGO_BIN_EXE_cifar")).arg("nowhere.png").output().unwrap();
    assert_eq!(run.status.code(), Some(2));
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(said.contains("nowhere.png") && said.lines().count() == 1, "{said}");
}
