//! Makes the seeds of the fuzz targets from what real QEMU writes:
//! `COLO_QEMU=... cargo run -p tests --example fuzz_seeds -- fuzz/seeds`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;
use tests::Result;
use tests::capture::{self, Tap};
use tests::qemu::{self, Binary, Machine, Qemu};

/// Guest memory, MiB.
const MEMORY: u32 = 8;
/// How much of a stream or a file is kept, bytes: beginnings are short and are what is parsed.
const HEAD: usize = 2 << 10;
/// The first two bytes of inputs say how the rest is used.
const ONE_BY_ONE: [u8; 2] = [0, 0];
const AT_ONCE: [u8; 2] = [0, 255];

fn main() -> ExitCode {
    match make() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fuzz_seeds: {e}");
            ExitCode::FAILURE
        }
    }
}

struct Seeds(PathBuf);

impl Seeds {
    fn put(&self, target: &str, name: &str, pieces: &[&[u8]]) -> Result<()> {
        let dir = self.0.join(target);
        fs::create_dir_all(&dir)?;
        Ok(fs::write(dir.join(name), pieces.concat())?)
    }
}

fn make() -> Result<()> {
    let dir = env::args_os().nth(1).ok_or("usage: fuzz_seeds DIR")?;
    let seeds = Seeds(dir.into());
    let qemu = qemu::binaries()?
        .iter()
        .find(|binary| binary.is_since((11, 1)))
        .ok_or("needs QEMU 11.1 or newer")?;
    for machine in ["q35", "microvm"] {
        plain(&seeds, qemu, machine)?;
    }
    mapped(&seeds, qemu)?;
    channels(&seeds, qemu)?;
    vectors(&seeds)?;
    qmp(&seeds)
}

fn source(qemu: &Binary, machine: &str) -> Result<Qemu> {
    Machine::new(machine, MEMORY).start(qemu)
}

/// What comes before the first RAM section's body in a stream without capabilities.
fn ram_body(stream: &[u8]) -> Result<usize> {
    let head = b"\x03ram\0\0\0\0\0\0\0\x04";
    stream
        .windows(head.len())
        .position(|window| window == head)
        .map(|at| at + head.len())
        .ok_or_else(|| "no RAM section".into())
}

fn plain(seeds: &Seeds, qemu: &Binary, machine: &str) -> Result<()> {
    let stream = capture::to_file(&mut source(qemu, machine)?)?;
    let head = &stream[..HEAD];
    let body = ram_body(&stream)?;
    seeds.put("stream_decoder", machine, &[&AT_ONCE, head])?;
    seeds.put(
        "stream_decoder",
        &format!("{machine}-slow"),
        &[&ONE_BY_ONE, head],
    )?;
    seeds.put(
        "ram_section",
        machine,
        &[&AT_ONCE, &stream[body..body + HEAD]],
    )?;
    // The last section of RAM, the devices and their description: only the small machine's.
    if machine == "microvm" {
        let end = stream
            .windows(5)
            .rposition(|window| window == b"\x03\0\0\0\x01" || window == b"\x03\0\0\0\x02")
            .ok_or("no last section of RAM")?;
        let list = stream[body..]
            .windows(13)
            .position(|w| w == b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
        if let Some(list) = list {
            let setup = &stream[body..body + list + 13];
            seeds.put("ram_section", "whole", &[&AT_ONCE, setup, &stream[end..]])?;
        }
        let description = stream
            .windows(2)
            .rposition(|window| window == b"{\"")
            .unwrap_or_default();
        let begin = stream
            .windows(13)
            .position(|window| window == b"\"devices\": [{")
            .map_or(description, |at| {
                stream[..at].iter().rposition(|b| *b == b'{').unwrap_or(at)
            });
        seeds.put("vmdesc", machine, &[&[0], &stream[begin..]])?;
    }
    Ok(())
}

fn mapped(seeds: &Seeds, qemu: &Binary) -> Result<()> {
    let mut vm = source(qemu, "microvm")?;
    vm.qmp.enable(&["mapped-ram"])?;
    let file = capture::to_file(&mut vm)?;
    seeds.put("mapped_ram", "file", &[&[1, 255], &file[..HEAD]])?;
    seeds.put(
        "mapped_ram",
        "body",
        &[&AT_ONCE, &file[ram_body(&file)?..HEAD]],
    )
}

fn channels(seeds: &Seeds, qemu: &Binary) -> Result<()> {
    for (choice, method) in [(0, "none"), (1, "zlib"), (2, "zstd")] {
        let mut vm = source(qemu, "microvm")?;
        vm.qmp.enable(&["multifd"])?;
        vm.qmp
            .set_parameters(json!({"multifd-channels": 1, "multifd-compression": method}))?;
        let tap = Tap::sink()?;
        vm.migrate(&tap.uri())?;
        vm.wait_migration("completed")?;
        drop(vm);
        let capture = tap.finish()?;
        let channel = capture.multifd.get(&0).ok_or("no channel")?;
        let packet = |at: usize| channel.get(at..at + 1344).unwrap_or_default();
        seeds.put("multifd_packet", "hello", &[&[0], &channel[..64]])?;
        // It says as well how long the block is.
        let choice = 252 + choice;
        seeds.put("multifd_packet", method, &[&[choice], packet(64)])?;
    }
    Ok(())
}

/// What is too short to be looked for in a capture, as captured.
fn vectors(seeds: &Seeds) -> Result<()> {
    for (name, bytes) in [
        ("open", &b"\0\x01\0\0"[..]),
        ("ping", b"\0\x02\0\x04\0\0\0\x01"),
        (
            "advise",
            b"\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0",
        ),
        ("advise-short", b"\0\x03\0\0"),
        ("listen", b"\0\x04\0\0"),
        ("run", b"\0\x05\0\0"),
        (
            "discard",
            b"\0\x06\0\x19\0\x06pc.ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0",
        ),
        ("packaged", b"\0\x07\0\x04\0\0\x10\0"),
        ("resume", b"\0\x09\0\0"),
        ("bitmap", b"\0\x0a\0\x07\x06pc.ram"),
        ("switchover", b"\0\x0b\0\0"),
    ] {
        seeds.put("command", name, &[bytes])?;
    }
    for (name, bytes) in [
        ("shut", &b"\0\x01\0\x04\0\0\0\0"[..]),
        ("pong", b"\0\x02\0\x04\0\0\0\x01"),
        (
            "pages-id",
            b"\0\x03\0\x13\0\0\0\0\0\x0c\0\0\0\0\x10\0\x06pc.ram",
        ),
        ("pages", b"\0\x04\0\x0c\0\0\0\0\0\x0c\x10\0\0\0\x10\0"),
        ("bitmap", b"\0\x05\0\x07\x06pc.ram"),
        ("resume", b"\0\x06\0\x04\0\0\0\x01"),
        ("ack", b"\0\x07\0\0"),
    ] {
        seeds.put("return_path", name, &[bytes])?;
    }
    seeds.put("xbzrle", "runs", &[b"\x04\x02ab\x80\x01\x03xyz"])?;
    seeds.put(
        "xbzrle",
        "pages",
        &[&[7; 300], &[7; 100], &[8; 20], &[7; 180]],
    )?;
    // All fields of the target's own structure, version 5.
    let mut state = vec![5, 1, 3];
    state.extend([0; 8 + 5 + 12 + 8 + 16]);
    state.extend(b"\0\x02\xaa\xbb\0\x01\0\x02");
    state.extend(b"1\0\x07001\0\x08\x02");
    state.extend(b"0\0\x09\0\x0a\0\x0b\0\0\0\x01");
    state.extend(b"\x05\x09all/extra\0\0\0\x01");
    state.extend([0; 34]);
    seeds.put("vmstate_load", "all", &[&state])
}

/// What clients have said to QEMU, each a session.
fn qmp(seeds: &Seeds) -> Result<()> {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../qmp-types/tests/data/qemu-11.1.3.txt");
    let text = fs::read_to_string(file)?;
    for (number, session) in text.split("\n= ").skip(1).enumerate() {
        let mut input = vec![255];
        for line in session.lines().filter_map(|line| line.strip_prefix("> ")) {
            input.extend(line.as_bytes());
            input.push(b'\n');
        }
        seeds.put("qmp_session", &format!("session-{number}"), &[&input])?;
    }
    Ok(())
}
