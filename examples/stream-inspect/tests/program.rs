//! The program: where it takes a stream from, what it says of what is none, and how it ends.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use tempfile::TempDir;

mod streams;

fn program(dir: &Path, arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stream-inspect"));
    command
        .current_dir(dir)
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

/// A directory with `stream` and whatever is made of it.
fn directory() -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let stream = streams::whole();
    fs::write(dir.path().join("stream"), &stream).unwrap();
    (dir, stream)
}

/// Standard output of a run that went well.
fn said(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Standard error of a run that did not.
fn refused(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// The report without its times.
fn blocks(text: &str) -> Vec<&str> {
    let lines = text.lines().skip_while(|l| !l.starts_with("ram block"));
    lines.take_while(|l| !l.starts_with("device")).collect()
}

fn fed(mut command: Command, bytes: &[u8]) -> Output {
    let mut child: Child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // The program may end before it has read everything.
    let _ = stdin.write_all(bytes);
    drop(stdin);
    child.wait_with_output().unwrap()
}

#[test]
fn a_stream_is_read_through_a_pipe_and_from_standard_input() {
    let (dir, stream) = directory();
    let expected = said(&program(dir.path(), "stream").output().unwrap());
    assert!(expected.contains("pc-q35-11.1"));
    let piped = said(&fed(program(dir.path(), "-"), &stream));
    assert_eq!(blocks(&piped), blocks(&expected));
    // Standard input that is a file.
    let mut command = program(dir.path(), "-");
    command.stdin(fs::File::open(dir.path().join("stream")).unwrap());
    assert_eq!(blocks(&said(&command.output().unwrap())), blocks(&expected));
    // A pipe with something before the stream, and pages extracted from it.
    let garbage = [&[7; 0x1000], stream.as_slice()].concat();
    let extracted = fed(
        program(dir.path(), "- --offset 0x1000 --extract out"),
        &garbage,
    );
    assert_eq!(blocks(&said(&extracted)), blocks(&expected));
    assert_eq!(fs::read(dir.path().join("out/ram")).unwrap().len(), 8 << 12);
}

#[test]
fn a_stream_is_read_out_of_a_fifo() {
    let (dir, stream) = directory();
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let child = program(dir.path(), "fifo --json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    fs::write(&fifo, &stream).unwrap();
    assert!(said(&child.wait_with_output().unwrap()).contains("\"level\""));
}

#[test]
fn what_has_to_be_sought_in_says_so_in_a_pipe() {
    let (dir, _) = directory();
    let output = fed(program(dir.path(), "-"), &streams::mapped());
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("mapped-ram") && error.contains("the file itself"),
        "{error}"
    );
}

#[test]
fn device_state_is_bounded_by_an_option_that_the_error_names() {
    const BODY: usize = 3 << 20;
    let dir = tempfile::tempdir().unwrap();
    let stream = streams::with_device_state(BODY);
    fs::write(dir.path().join("stream"), &stream).unwrap();
    // Something behind it, or no way to look at its end: the length is known when it has come.
    fs::write(dir.path().join("padded"), [&stream[..], &[0; 9]].concat()).unwrap();
    for limit in ["3", "1M"] {
        let arguments = |file: &str| format!("{file} --max-device-state {limit}");
        let option = "bytes that are taken: a larger --max-device-state takes it";
        for error in [
            refused(program(dir.path(), &arguments("padded"))),
            String::from_utf8(fed(program(dir.path(), &arguments("-")), &stream).stderr).unwrap(),
        ] {
            assert!(error.contains("more device state than the"), "{error}");
            assert!(error.contains(option), "{error}");
        }
        let error = refused(program(dir.path(), &arguments("stream")));
        let said = "bytes of device state, more than the";
        assert!(error.contains(said), "{error}");
        assert!(error.contains("a larger --max-device-state"), "{error}");
    }
    for limit in ["4", "1G"] {
        for file in ["stream", "padded"] {
            let arguments = format!("{file} --max-device-state {limit}");
            let text = said(&program(dir.path(), &arguments).output().unwrap());
            assert!(text.contains("device"), "{text}");
        }
    }
}

#[test]
fn a_file_with_too_much_device_state_is_refused_before_its_memory_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut stream = streams::with_device_state(3 << 20);
    // Nobody comes as far as the pages, where something is wrong.
    let page = stream.windows(4096).position(|w| w == [7; 4096]).unwrap();
    stream[page + 4096..page + 4104].fill(0xff);
    fs::write(dir.path().join("stream"), &stream).unwrap();
    let error = refused(program(dir.path(), "stream --max-device-state 1"));
    assert!(error.contains("--max-device-state"), "{error}");
    let error = refused(program(dir.path(), "stream"));
    assert!(!error.contains("--max-device-state"), "{error}");
}

#[test]
fn offsets_are_read_in_the_usual_notations() {
    let (dir, stream) = directory();
    let behind = [&[0; 4096], stream.as_slice()].concat();
    fs::write(dir.path().join("behind"), behind).unwrap();
    for offset in ["0x1000", "4096", "4k", "4KiB"] {
        said(
            &program(dir.path(), &format!("behind --offset {offset}"))
                .output()
                .unwrap(),
        );
    }
    let output = program(dir.path(), "behind --offset 4kb").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is no number"));
}

#[test]
fn a_stream_without_configuration_section_is_read() {
    let (dir, _) = directory();
    fs::write(dir.path().join("old"), streams::without_configuration()).unwrap();
    let text = said(&program(dir.path(), "old").output().unwrap());
    assert!(text.starts_with("no configuration section"), "{text}");
    assert!(text.contains("device"), "{text}");
}

#[test]
fn a_stream_is_found_in_an_image_of_libvirt() {
    let (dir, stream) = directory();
    fs::write(dir.path().join("saved"), streams::libvirt(0, &stream)).unwrap();
    let text = said(&program(dir.path(), "saved").output().unwrap());
    assert!(text.contains("pc-q35-11.1"));
    fs::write(
        dir.path().join("zipped"),
        streams::libvirt(5, b"\x28\xb5\x2f\xfd"),
    )
    .unwrap();
    let error = refused(program(dir.path(), "zipped"));
    assert!(
        error.contains("`tail -c +") && error.contains("zstd -dc`"),
        "{error}"
    );
    let mut partial = streams::libvirt(0, &stream);
    partial[..16].copy_from_slice(b"LibvirtQemudPart");
    fs::write(dir.path().join("partial"), partial).unwrap();
    let error = refused(program(dir.path(), "partial"));
    assert!(error.contains("did not finish saving"), "{error}");
}

#[test]
fn compressed_files_and_disk_images_are_named_with_what_to_do() {
    let (dir, _) = directory();
    for (begin, said) in [
        (&b"\x1f\x8b\x08\x00rest"[..], "`gzip -dc`"),
        (b"\x28\xb5\x2f\xfdrest", "`zstd -dc`"),
        (b"\xfd7zXZ\x00rest", "`xz -dc`"),
        (b"\x89LZO\x00rest", "`lzop -dc`"),
        (b"QFI\xfb\x00\x00\x00\x03", "qcow2"),
    ] {
        fs::write(dir.path().join("file"), begin).unwrap();
        let error = refused(program(dir.path(), "file"));
        assert!(error.contains(said), "{error}");
        let piped = fed(program(dir.path(), "-"), begin);
        assert!(String::from_utf8_lossy(&piped.stderr).contains(said));
    }
}

#[test]
fn names_out_of_a_stream_are_escaped() {
    let (dir, _) = directory();
    let hostile = "d\u{1b}]0;x\u{7}\u{9b}2J\n\u{202e}e";
    fs::write(dir.path().join("hostile"), streams::named(hostile)).unwrap();
    for arguments in ["hostile", "hostile --fields"] {
        let text = said(&program(dir.path(), arguments).output().unwrap());
        assert!(
            text.contains(r"d\u{1b}]0;x\u{7}\u{9b}2J\n\u{202e}e"),
            "{text:?}"
        );
        assert!(
            !text.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']),
            "{text:?}"
        );
    }
    fs::write(dir.path().join("cut"), streams::cut(hostile)).unwrap();
    let error = refused(program(dir.path(), "cut"));
    assert!(
        !error.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']),
        "{error:?}"
    );
    assert_eq!(error.lines().count(), 1, "{error:?}");
}

#[test]
fn a_reader_that_has_gone_ends_the_program_quietly() {
    let (dir, _) = directory();
    for arguments in [
        "stream",
        "stream --fields",
        "stream --json",
        "stream --json=desc",
        "--help",
    ] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = program(dir.path(), arguments)
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(output.stderr, b"", "{arguments}");
        assert!(
            matches!(output.status.code(), Some(0 | 141)),
            "{arguments}: {}",
            output.status
        );
    }
    // Nobody reads standard error.
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let status = program(dir.path(), "missing")
        .stderr(writer)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_stream_with_something_behind_it_is_read_to_its_own_end() {
    let early = [b"\x7e\0\0\0\x09".as_slice(), &[0x7e; 100_000]].concat();
    for stream in [streams::whole(), streams::with_early(&early)] {
        let dir = tempfile::tempdir().unwrap();
        let padded = [stream.as_slice(), &[0; 4096], b"an older stream's rest }"].concat();
        fs::write(dir.path().join("stream"), &stream).unwrap();
        fs::write(dir.path().join("padded"), &padded).unwrap();
        let json = |path: &str| said(&program(dir.path(), path).output().unwrap());
        let expected = json("stream --json");
        assert!(expected.contains("device (3)"));
        assert_eq!(json("padded --json"), expected);
        // And without any end.
        let piped = fed(program(dir.path(), "- --json"), &padded);
        assert_eq!(said(&piped), expected);
    }
}

#[test]
fn a_stream_on_a_block_device_is_read() {
    let stream = streams::with_early(b"early");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, &stream).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let Some(device) = LoopDevice::over(&path) else {
        eprintln!("left out: no loop device can be had");
        return;
    };
    let text = said(&program(dir.path(), &device.0).output().unwrap());
    assert!(text.contains("first") && text.contains("device"), "{text}");
    // With mapped-ram the length of the device is looked at.
    fs::write(&path, streams::mapped()).unwrap();
    drop(device);
    let Some(device) = LoopDevice::over(&path) else {
        return;
    };
    let error = refused(program(dir.path(), &device.0));
    assert!(!error.contains("the file has"), "{error}");
}

/// A block device over a file, as long as this is there.
struct LoopDevice(String);

impl LoopDevice {
    fn over(path: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(path)
            .output()
            .ok()?;
        let name = String::from_utf8(made.stdout).ok()?;
        (made.status.success()).then(|| Self(name.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let ended = Command::new("losetup").args(["--detach", &self.0]).status();
        drop(ended);
    }
}
