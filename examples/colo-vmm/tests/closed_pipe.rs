//! What the program does when nobody reads what it prints.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::io;
use std::process::{Command, Stdio};

/// Exit status and standard error of a run whose output nobody reads.
fn unread(arguments: &str) -> (Option<i32>, String) {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_colo-vmm"))
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn help_and_a_watched_status_end_quietly_when_nobody_reads_them() {
    for arguments in [
        "--help",
        "status --help",
        "status unix:/nowhere/at/all --watch --interval 10",
    ] {
        assert_eq!(unread(arguments), (Some(0), String::new()), "{arguments}");
    }
}

#[test]
fn an_error_that_nobody_reads_is_still_an_exit_status() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let status = Command::new(env!("CARGO_BIN_EXE_colo-vmm"))
        .args(["status", "unix:/nowhere/at/all"])
        .stderr(writer)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}
