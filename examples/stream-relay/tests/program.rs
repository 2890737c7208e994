//! The program: where it takes a guest from, what it says of what is none, and how it ends.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

#[path = "../../stream-inspect/tests/streams/mod.rs"]
mod streams;

fn program(dir: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stream-relay"));
    command
        .current_dir(dir)
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

/// A directory with the file `stream`.
fn directory(stream: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("stream"), stream).unwrap();
    dir
}

fn succeeded(output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
}

/// The pages and devices that a stream written by the relay has; its first bytes.
fn written(dir: &Path) -> Vec<u8> {
    let bytes = fs::read(dir.join("out")).unwrap();
    assert!(bytes.windows(4096).any(|w| w == [9; 4096]));
    assert!(bytes.windows(7).any(|w| w == b"\x06device"));
    bytes
}

/// What is being written for `name`, or was.
fn partials(dir: &Path, name: &str) -> Vec<PathBuf> {
    let begin = format!(".{name}.");
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&begin))
        .map(|entry| entry.path())
        .collect()
}

/// Waits until something is being written for `name` whose owner is seen. Its lock is taken before the first byte of a
/// file, and before a directory has more than its manifest.
fn wait_for_partial(dir: &Path, name: &str) -> PathBuf {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let is_begun = |partial: &PathBuf| match fs::read_dir(partial) {
            Ok(entries) => entries.count() > 1,
            Err(_) => fs::metadata(partial).is_ok_and(|file| file.is_file() && file.len() > 0),
        };
        if let Some(partial) = partials(dir, name).pop().filter(is_begun) {
            return partial;
        }
        assert!(Instant::now() < deadline, "nothing is written for {name}");
        thread::sleep(Duration::from_micros(100));
    }
}

/// A process that does nothing and is ended with this.
struct Frozen(Child);

impl Frozen {
    /// Freezes `child`; none if it ended before.
    fn new(child: Child) -> Option<Self> {
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::STOP).unwrap();
        // The signal takes effect some time later.
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
        status.stopped().then(|| Self(child))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A relay that was frozen while it wrote the store `kept`, and the store as far as it is written.
fn frozen_while_it_stores(dir: &Path) -> (Frozen, PathBuf) {
    const ARGUMENTS: &str = "--incoming file:stream --store kept";
    for mib in [64, 128, 256, 512] {
        fs::write(dir.join("stream"), streams::of_pages(mib << 8)).unwrap();
        let relay = program(dir, ARGUMENTS).spawn().unwrap();
        let partial = wait_for_partial(dir, "kept");
        match Frozen::new(relay) {
            Some(relay) if partial.exists() => return (relay, partial),
            // It was too fast.
            relay => drop(relay),
        }
        fs::remove_dir_all(dir.join("kept")).unwrap();
    }
    panic!("no relay was caught while it wrote");
}

#[test]
fn what_a_killed_relay_has_left_of_a_store_is_removed_by_the_next_one() {
    let dir = directory(b"");
    let (frozen, partial) = frozen_while_it_stores(dir.path());
    // A living relay's is left alone, by who writes and by who reads under that name.
    fs::write(dir.path().join("small"), streams::of_pages(3)).unwrap();
    let (write, read) = (
        "--incoming file:small --store kept",
        "--store kept --outgoing file:out --remove-store",
    );
    for arguments in [write, read] {
        succeeded(&program(dir.path(), arguments).output().unwrap());
        assert_eq!(partials(dir.path(), "kept"), [partial.as_path()]);
    }
    assert!(partial.join("manifest.json").exists());
    drop(frozen);
    assert_eq!(partials(dir.path(), "kept"), [partial.as_path()]);
    // Neither another name's, nor what only looks like one.
    let others = [
        ".kept.abc.partial",
        ".kept.abcdef",
        ".kept.b.abcdef.partial",
    ];
    for other in others {
        fs::create_dir(dir.path().join(other)).unwrap();
    }
    let elsewhere = dir.path().join(".kept.zzzzzz.partial");
    symlink(dir.path(), &elsewhere).unwrap();
    succeeded(&program(dir.path(), write).output().unwrap());
    assert!(!partial.exists());
    assert_eq!(partials(dir.path(), "kept").len(), others.len() + 1);
    assert!(dir.path().join("small").exists());
    // What was killed while it removed has its manifest still, or nothing.
    let (half, empty) = (
        dir.path().join(".kept.aaaaaa.partial"),
        dir.path().join(".kept.bbbbbb.partial"),
    );
    fs::create_dir(&half).unwrap();
    fs::write(half.join("manifest.json"), "{}").unwrap();
    fs::create_dir(&empty).unwrap();
    fs::remove_file(dir.path().join("out")).unwrap();
    succeeded(&program(dir.path(), read).output().unwrap());
    assert!(!half.exists() && !empty.exists());
    assert_eq!(partials(dir.path(), "kept").len(), others.len() + 1);
}

#[test]
fn what_a_killed_relay_has_left_of_a_file_is_removed_by_the_next_one() {
    let dir = directory(&streams::whole());
    let mut waiting = program(dir.path(), FROM_STDIN)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // The announcement of RAM, and some of its pages.
    let stream = streams::whole();
    let mut stdin = waiting.stdin.take().unwrap();
    stdin.write_all(&stream[..stream.len() / 2]).unwrap();
    let partial = wait_for_partial(dir.path(), "out");
    let arguments = "--incoming file:stream --in-xbzrle --outgoing file:out";
    succeeded(&program(dir.path(), arguments).output().unwrap());
    assert_eq!(partials(dir.path(), "out"), [partial.as_path()]);
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    fs::remove_file(dir.path().join("out")).unwrap();
    succeeded(&program(dir.path(), arguments).output().unwrap());
    assert_eq!(partials(dir.path(), "out"), [""; 0].map(PathBuf::from));
    written(dir.path());
}

const FROM_STDIN: &str = "--incoming - --in-xbzrle --outgoing file:out";

#[test]
fn a_guest_is_taken_from_a_pipe_a_fifo_and_a_descriptor() {
    let dir = directory(&streams::whole());
    for arguments in [
        FROM_STDIN,
        "--incoming fd:0 --in-xbzrle --outgoing file:out",
    ] {
        let mut child = program(dir.path(), arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&streams::whole())
            .unwrap();
        succeeded(&child.wait_with_output().unwrap());
        written(dir.path());
        fs::remove_file(dir.path().join("out")).unwrap();
    }
    let fifo = dir.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let child = program(
        dir.path(),
        "--incoming file:fifo --in-xbzrle --outgoing file:out",
    )
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    fs::write(&fifo, streams::whole()).unwrap();
    succeeded(&child.wait_with_output().unwrap());
    written(dir.path());
}

#[test]
fn a_file_that_has_to_be_sought_in_says_so_in_a_pipe() {
    let dir = directory(&streams::mapped());
    let mut cat = Command::new("cat")
        .arg(dir.path().join("stream"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = program(dir.path(), FROM_STDIN)
        .stdin(cat.stdout.take().unwrap())
        .output()
        .unwrap();
    cat.wait().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("mapped-ram") && error.contains("the file itself"),
        "{error}"
    );
}

#[test]
fn a_guest_without_configuration_section_is_kept_and_passed_on_without_one() {
    let dir = directory(&streams::without_configuration());
    for arguments in [
        "--incoming file:stream --in-xbzrle --store kept",
        "--store kept --outgoing file:out",
    ] {
        succeeded(&program(dir.path(), arguments).output().unwrap());
    }
    let bytes = written(dir.path());
    assert_eq!(bytes[..8], *b"QEVM\0\0\0\x03");
    assert_ne!(bytes[8], 7, "a configuration section");
}

#[test]
fn an_image_of_libvirt_is_passed_over_up_to_its_stream() {
    let dir = directory(&streams::libvirt(0, &streams::whole()));
    let arguments = "--incoming file:stream --in-xbzrle --outgoing file:out";
    succeeded(&program(dir.path(), arguments).output().unwrap());
    written(dir.path());
}

#[test]
fn what_is_no_stream_is_named_with_what_to_do() {
    let zipped = streams::libvirt(1, b"\x1f\x8b\x08");
    for (bytes, said) in [
        (&b"\x1f\x8b\x08\x00rest"[..], "`gzip -dc`"),
        (b"\x28\xb5\x2f\xfdrest", "`zstd -dc`"),
        (b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
        (&zipped, "| gzip -dc`"),
    ] {
        let dir = directory(bytes);
        let output = program(dir.path(), "--incoming file:stream --store kept")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_file_with_too_much_device_state_is_refused_before_its_memory_is_read() {
    let mut stream = streams::with_device_state(3 << 20);
    // Nobody comes as far as the pages, where something is wrong.
    let page = stream.windows(4096).position(|w| w == [7; 4096]).unwrap();
    stream[page + 4096..page + 4104].fill(0xff);
    let dir = directory(&stream);
    let relayed = |more: &str| {
        let arguments = format!("--incoming file:stream --in-xbzrle --store kept {more}");
        let output = program(dir.path(), &arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let error = relayed("--max-device-state 1");
    assert!(
        error.contains("bytes of device state, more than the 1048576"),
        "{error}"
    );
    assert!(error.contains("a larger --max-device-state"), "{error}");
    assert!(!relayed("").contains("--max-device-state"));
}

#[test]
fn a_store_with_too_much_device_state_is_refused_before_its_memory_is_read() {
    let dir = directory(&streams::with_device_state(3 << 20));
    let arguments = "--incoming file:stream --in-xbzrle --store kept";
    succeeded(&program(dir.path(), arguments).output().unwrap());
    fs::remove_file(dir.path().join("kept/ram-0")).unwrap();
    let arguments = "--store kept --outgoing file:out --max-device-state 1";
    let output = program(dir.path(), arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("a larger --max-device-state"), "{error}");
}

#[test]
fn a_stream_with_something_behind_it_is_taken_to_its_own_end() {
    let dir = directory(&[streams::whole().as_slice(), &[0; 4096]].concat());
    let arguments = "--incoming file:stream --in-xbzrle --outgoing file:out";
    succeeded(&program(dir.path(), arguments).output().unwrap());
    written(dir.path());
}

#[test]
fn the_guest_crosses_whether_or_not_anybody_reads_what_is_said_of_it() {
    let dir = directory(&streams::whole());
    for (out, arguments) in [
        (
            "out",
            "--incoming file:stream --in-xbzrle --outgoing file:out",
        ),
        ("stream", "--help"),
    ] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = program(dir.path(), arguments)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", output.status);
        assert_eq!(output.stderr, b"");
        assert!(dir.path().join(out).exists());
    }
}
