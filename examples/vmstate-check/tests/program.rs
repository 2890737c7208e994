//! The program: what it prints and how it exits.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::fs;
use std::io;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;
use vmstate::VmState;

#[derive(VmState)]
#[vmstate(name = "pit", version = 1)]
struct Old {
    count: u32,
}

#[derive(VmState)]
#[vmstate(name = "pit", version = 2, minimum_version = 1)]
struct New {
    count: u32,
    #[vmstate(since = 2)]
    latch: u16,
}

/// A directory with the dumps `old` and `new`, and what is none.
fn dumps() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let old = vmstate::Dump::new("board").section::<Old>("pit");
    let old = old.section::<Old>("gone");
    let new = vmstate::Dump::new("board").section::<New>("pit");
    fs::write(dir.path().join("old"), old.to_json()).unwrap();
    fs::write(dir.path().join("new"), new.to_json()).unwrap();
    fs::write(dir.path().join("none"), "{").unwrap();
    dir
}

/// Exit code, standard output and standard error.
fn run(dir: &TempDir, arguments: &str) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmstate-check"))
        .current_dir(dir.path())
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_finding_is_a_line_and_the_last_line_is_the_verdict() {
    let dir = dumps();
    let expected = "\
        error: gone: the destination has no such device\n\
        not compatible: 1 error, 0 warnings\n";
    let said = (Some(1), expected.to_owned(), String::new());
    assert_eq!(run(&dir, "old new"), said);
    assert_eq!(run(&dir, "-s old -d new"), said);
    assert_eq!(run(&dir, "--src new --dest old --reverse"), said);
    let compatible = "compatible: 0 errors, 0 warnings\n";
    let said = (Some(0), compatible.to_owned(), String::new());
    assert_eq!(run(&dir, "--device pit old new"), said);
    assert_eq!(run(&dir, "-r --device pit new old"), said);
}

#[test]
fn programs_get_an_object() {
    let (code, out, _) = run(&dumps(), "--json new old");
    assert_eq!(code, Some(1));
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["compatible"], json!(false));
    assert_eq!(
        report["findings"][0],
        json!({
            "severity": "error",
            "device": "pit",
            "path": [{"description": "pit"}],
            "difference": {"kind": "version-too-new", "source": 2, "destination": 1},
            "message": "version 2 in the source is newer than the destination's 1",
        })
    );
    let (code, out, _) = run(&dumps(), "--json old old");
    let nothing = json!({"compatible": true, "findings": []});
    assert_eq!(code, Some(0));
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), nothing);
}

#[test]
fn what_is_no_verdict_is_exit_code_2_with_a_reason() {
    let dir = dumps();
    for (arguments, reason) in [
        ("old", "2 values required"),
        (
            "old no/such",
            "vmstate-check: no/such: it cannot be read: No such file",
        ),
        (
            "none old",
            "vmstate-check: none: it is no dump of device state: EOF while parsing",
        ),
        (
            "--device rtc old new",
            "vmstate-check: the source has no device 'rtc'",
        ),
    ] {
        let (code, out, err) = run(&dir, arguments);
        assert_eq!((code, &*out), (Some(2), ""), "{arguments}");
        assert!(err.contains(reason), "{arguments}: {err}");
    }
}

#[test]
fn a_reader_that_has_gone_ends_the_program_quietly() {
    let dir = dumps();
    for arguments in ["new old", "new old --json", "--help"] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_vmstate-check"))
            .current_dir(dir.path())
            .args(arguments.split_whitespace())
            .stdout(writer)
            .stderr(std::process::Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.stderr, b"", "{arguments}");
        let status = output.status.code();
        assert!(matches!(status, Some(0 | 141)), "{arguments}: {status:?}");
    }
}

#[test]
fn names_in_a_dump_are_escaped() {
    let dir = dumps();
    let hostile = "p\u{1b}[2J\u{202e}";
    let mut dump = fs::read_to_string(dir.path().join("old")).unwrap();
    dump = dump.replace("gone", r"p\u001b[2J\u202e");
    fs::write(dir.path().join("hostile"), dump).unwrap();
    let (_, out, error) = run(&dir, "hostile new");
    assert!(out.contains(r"p\u{1b}[2J\u{202e}"), "{out:?} {error:?}");
    let (_, _, error) = run(&dir, "hostile new --device none\u{1b}x");
    for text in [out, error] {
        assert!(
            !text.contains(hostile) && !text.contains('\u{1b}'),
            "{text:?}"
        );
    }
    let (_, json, _) = run(&dir, "hostile new --json");
    assert!(json.is_ascii(), "{json:?}");
}
