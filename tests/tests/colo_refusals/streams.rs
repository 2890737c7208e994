//! Streams of another machine, of no machine, of a guest of another size, and lengths that lie.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::json;
use tests::Result;
use tests::vmm::Vmm;

use crate::wire::{OURS, RAM, RAM_END, preamble, ram_setup};
use crate::{connect, is_closed, listening, migrates_to, runs_on, says, source, target};

pub fn other_size() -> Result<()> {
    for capabilities in [&["return-path"][..], &["return-path", "x-colo", "multifd"]] {
        let mut target = target().memory(32).start()?;
        let mut source = source().start()?;
        target.qmp.enable(capabilities)?;
        source.qmp.enable(capabilities)?;
        let uri = target.listen()?;
        source.migrate(&uri)?;
        let error = target.wait_failure()?;
        says(&error, &["pc.ram", "0x1000000", "0x2000000"]);
        assert_eq!(target.status()?, "inmigrate");
        source.wait_failure()?;
        runs_on(&mut source)?;
    }
    Ok(())
}

pub fn wrong_streams() -> Result<()> {
    let ours = || preamble(OURS);
    let mut setup_total = ours();
    let mut announced = ram_setup("pc.ram", RAM);
    // Less in total than in its blocks.
    announced[17..25].copy_from_slice(&(4096u64 | 4).to_be_bytes());
    setup_total.extend(announced);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        (
            "other machine",
            preamble("pc-q35-11.1"),
            &["pc-q35-11.1", OURS],
        ),
        (
            "prefix of ours",
            preamble("colo-vmm"),
            &["'colo-vmm'", OURS],
        ),
        (
            "ours and more",
            preamble("colo-vmm-10"),
            &["colo-vmm-10", OURS],
        ),
        (
            "a name of 4 GiB",
            [&b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"[..], &[b'x'; 4096]].concat(),
            &["4294967295"],
        ),
        (
            "an old version",
            b"QEVM\0\0\0\x02".to_vec(),
            &["version", "2"],
        ),
        (
            "garbage behind the header",
            b"QEVM\0\0\0\x03garbage".to_vec(),
            &["0x67"],
        ),
        (
            "the command that began colo",
            [ours(), vec![8, 0, 8, 0, 0]].concat(),
            &["ENABLE_COLO", "11.0"],
        ),
        (
            "an unknown command",
            [ours(), vec![8, 0, 99, 0, 0]].concat(),
            &["unknown command 0x63"],
        ),
        (
            "a part of section 0, never announced",
            [ours(), vec![2, 0, 0, 0, 0, 0, 0, 0, 0]].concat(),
            &["section", "0"],
        ),
        (
            "another block",
            [ours(), ram_setup("other.ram", RAM)].concat(),
            &["other.ram"],
        ),
        (
            "a setup list that does not add up",
            setup_total,
            &["pc.ram", "0x1000"],
        ),
        ("the end at once", ours(), &["end"]),
    ];
    for (what, bytes, parts) in cases {
        let (mut target, uri) = listening()?;
        let mut peer = connect(&uri)?;
        peer.write_all(&bytes)?;
        peer.shutdown(Shutdown::Write)?;
        let error = target.wait_failure().map_err(|e| format!("{what}: {e}"))?;
        for part in parts {
            assert!(error.contains(part), "{what}: no '{part}' in: {error}");
        }
        assert_eq!(target.status()?, "inmigrate", "{what}");
    }
    // What does not even begin like a stream does not end the wait for one.
    let (mut target, uri) = listening()?;
    let mut peer = connect(&uri)?;
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    assert!(is_closed(&mut peer)?);
    assert_eq!(target.migration()?["status"], "setup");
    migrates_to(&mut target, &uri)?;
    Ok(())
}

/// Each announces some 4 GiB, and sends nothing of it.
pub fn long_lengths() -> Result<()> {
    let name = b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff".to_vec();
    // QEMU's packaged command, whose payload is the length of what follows.
    let package = [preamble(OURS), vec![8, 0, 7, 0, 4, 0xff, 0xff, 0xff, 0xff]].concat();
    let block = [preamble(OURS), ram_setup("pc.ram", 0xffff_f000)].concat();
    // A whole stream without devices, and its description.
    let description = [
        preamble(OURS),
        ram_setup("pc.ram", RAM),
        RAM_END.to_vec(),
        vec![0, 6, 0xff, 0xff, 0xff, 0xff],
    ]
    .concat();
    for bytes in [name, package, block, description] {
        let mut target = target().start()?;
        target.qmp.enable(&["return-path"])?;
        let before = peak_memory(&target)?;
        let uri = target.listen()?;
        let mut peer = connect(&uri)?;
        peer.write_all(&bytes)?;
        target.wait_failure()?;
        let taken = peak_memory(&target)? - before;
        // The threads of a migration take some: stacks, and the allocator's arenas.
        assert!(taken < 1 << 20, "{taken} KiB of address space");
    }
    Ok(())
}

/// The most address space a process has had, KiB: what it has asked for, whether it was used or
/// not.
fn peak_memory(vmm: &Vmm) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.process.id()))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:"));
    let text = line.ok_or("no VmPeak")?.trim().trim_end_matches(" kB");
    Ok(text.parse()?)
}

pub fn exit_on_error() -> Result<()> {
    for (arguments, ends) in [
        (json!({}), true),
        (json!({"exit-on-error": true}), true),
        (json!({"exit-on-error": false}), false),
    ] {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("migration");
        let mut target = target().start()?;
        let mut arguments = arguments;
        arguments["uri"] = format!("unix:{}", path.display()).into();
        target.qmp.execute("migrate-incoming", arguments)?;
        let mut peer = UnixStream::connect(&path)?;
        peer.write_all(&preamble("pc-q35-11.1"))?;
        if ends {
            let status = target.process.wait()?;
            assert_eq!(status.code(), Some(1));
            thread::sleep(Duration::from_millis(10));
            says(
                &target.process.stderr().text(),
                &["incoming migration", "pc-q35-11.1"],
            );
        } else {
            target.wait_failure()?;
            assert!(target.process.is_running()?);
        }
    }
    Ok(())
}
