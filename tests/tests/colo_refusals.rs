//! What goes wrong at the operator's end, or is wrong with the peer: each time a clear error, a
//! status that says that it failed, and a guest that runs on at the source.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command as Program, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, check_count};
use tests::{Result, harness};

fn main() -> ExitCode {
    let anywhere = harness::anywhere;
    harness::run([
        anywhere(
            "unknown_and_unsupported_capabilities_are_refused",
            capabilities,
        ),
        anywhere(
            "parameters_out_of_range_or_unsupported_are_refused",
            parameters,
        ),
        anywhere("commands_at_the_wrong_time_are_refused", wrong_time),
        anywhere("addresses_that_mean_nothing_are_refused", addresses),
        anywhere("second_migration_is_refused_while_one_is_on_its_way", twice),
        anywhere("source_runs_on_when_nobody_listens", nobody_listens),
        anywhere("source_runs_on_when_the_target_says_nothing", silent_target),
        anywhere("source_runs_on_when_the_target_is_killed", killed_target),
        anywhere("source_runs_on_after_a_cancel", cancel),
        anywhere("cancel_ends_a_wait_for_a_silent_target", cancel_silent),
        anywhere("target_can_be_told_again_after_a_busy_port", busy_port),
        anywhere(
            "target_without_memory_for_the_cache_can_be_told_again",
            no_memory,
        ),
        anywhere("silent_connection_holds_nobody_up", silent_connection),
        anywhere(
            "multifd_channel_of_a_plain_target_is_turned_away",
            unexpected_channel,
        ),
        anywhere("guest_of_another_size_is_refused", other_size),
        anywhere("stream_that_is_none_of_ours_is_refused", wrong_streams),
        anywhere("lengths_from_the_wire_take_no_memory", long_lengths),
        anywhere("broken_multifd_channel_fails_the_target", broken_channel),
        anywhere(
            "target_ends_with_a_failed_migration_unless_told_otherwise",
            exit_on_error,
        ),
        anywhere("target_that_fails_before_colo_is_not_stuck", killed_source),
    ])
}

/// How long an error may take that comes without any limit running out.
const AT_ONCE: Duration = Duration::from_secs(10);

fn source() -> ColoVmm {
    ColoVmm::new("source").simulated().memory(16)
}

fn target() -> ColoVmm {
    ColoVmm::new("target").simulated().memory(16).incoming()
}

/// The guest runs, and is unharmed.
fn runs_on(source: &mut Vmm) -> Result<()> {
    source.wait_status("running")?;
    source.wait_lines(20)?;
    check_count(0, &source.output()?)?;
    Ok(())
}

/// The text has all of `parts`.
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no '{part}' in: {text}");
    }
}

fn capabilities() -> Result<()> {
    let mut vmm = source().start()?;
    let mut refused = |list: &[(&str, bool)]| -> Result<String> {
        let list: Vec<_> = list
            .iter()
            .map(|(name, state)| json!({"capability": name, "state": state}))
            .collect();
        let arguments = json!({"capabilities": list});
        Ok(vmm
            .qmp
            .refused("migrate-set-capabilities", arguments)?
            .to_string())
    };
    let text = refused(&[("bogus", true)])?;
    says(&text, &["GenericError", "does not accept value 'bogus'"]);
    says(
        &refused(&[("postcopy-ram", true)])?,
        &["Postcopy is not supported"],
    );
    says(
        &refused(&[("dirty-limit", true)])?,
        &["dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"],
    );
    says(&refused(&[("mapped-ram", true)])?, &["mapped-ram"]);
    says(
        &refused(&[("return-path", true), ("x-colo", true), ("xbzrle", true)])?,
        &["Capability 'x-colo' is not compatible with capability 'xbzrle'"],
    );
    says(
        &refused(&[("zero-copy-send", true)])?,
        &["Zero copy only available for non-compressed non-TLS multifd migration"],
    );
    let text = refused(&[("x-colo", true)])?;
    says(
        &text,
        &["Capability 'x-colo' requires capability 'return-path'"],
    );
    // All or nothing.
    says(
        &refused(&[("return-path", true), ("bogus", true)])?,
        &["bogus"],
    );
    let now = vmm.qmp.execute("query-migrate-capabilities", Value::Null)?;
    let on: Vec<_> = now
        .as_array()
        .into_iter()
        .flatten()
        .filter(|c| c["state"] == true)
        .collect();
    assert!(on.is_empty(), "{on:?}");
    vmm.qmp.enable(&["return-path", "x-colo"])?;
    let mut vmm = vmm;
    let text = vmm
        .qmp
        .set_capabilities(&["return-path"], false)
        .unwrap_err();
    says(
        &text.to_string(),
        &["Capability 'x-colo' requires capability 'return-path'"],
    );
    runs_on(&mut vmm)
}

fn parameters() -> Result<()> {
    let mut vmm = source().start()?;
    for (parameters, parts) in [
        (
            json!({"multifd-channels": 0}),
            ["multifd-channels", "1 and 255"],
        ),
        (
            json!({"multifd-channels": 256}),
            ["multifd-channels", "uint8_t"],
        ),
        (
            json!({"multifd-compression": "qpl"}),
            ["multifd-compression", "qpl"],
        ),
        (
            json!({"multifd-compression": "none", "multifd-zstd-level": 21}),
            ["zstd", "20"],
        ),
        (json!({"downtime-limit": 2_000_001}), ["downtime", "2000"]),
        (
            json!({"max-postcopy-bandwidth": 1 << 20}),
            ["max-postcopy-bandwidth", "support"],
        ),
        (json!({"bogus": 1}), ["bogus", "unexpected"]),
    ] {
        let refusal = vmm.qmp.refused("migrate-set-parameters", parameters)?;
        says(&refusal.to_string(), &parts);
    }
    runs_on(&mut vmm)
}

fn wrong_time() -> Result<()> {
    let mut vmm = source().start()?;
    let tcp = json!({"uri": "tcp:127.0.0.1:0"});
    let refusal = vmm.qmp.refused("x-colo-lost-heartbeat", Value::Null)?;
    assert_eq!(refusal.desc, "VM is not in COLO mode");
    let yank = json!({"instances": [{"type": "migration"}]});
    let refusal = vmm.qmp.refused("yank", yank)?;
    assert_eq!(refusal.class, "DeviceNotFound");
    let refusal = vmm.qmp.refused("migrate-incoming", tcp.clone())?;
    says(
        &refusal.desc,
        &["'-incoming' was not specified on the command line"],
    );
    // As in QEMU, there is nothing to cancel and nothing to complain about.
    vmm.qmp.execute("migrate_cancel", Value::Null)?;

    let mut waiting = target().start()?;
    let refusal = waiting.qmp.refused("migrate", tcp.clone())?;
    says(&refusal.desc, &["waiting for an incoming migration"]);
    waiting.listen()?;
    let refusal = waiting.qmp.refused("migrate-incoming", tcp)?;
    assert_eq!(
        refusal.desc,
        "The incoming migration has already been started"
    );
    runs_on(&mut vmm)
}

fn addresses() -> Result<()> {
    let mut vmm = source().start()?;
    for (uri, part) in [
        ("bogus:1", "unknown migration protocol: bogus:1"),
        ("exec:cat", "not supported by this VMM"),
        ("tcp:localhost", "localhost"),
        ("tcp:localhost:nosuch-service", "nosuch-service"),
    ] {
        let refusal = vmm.qmp.refused("migrate", json!({"uri": uri}))?;
        says(&refusal.desc, &[part]);
        assert_eq!(vmm.migration()?["status"], Value::Null);
    }
    let refusal = vmm.qmp.refused("migrate", json!({}))?;
    says(&refusal.desc, &["uri", "channels"]);
    runs_on(&mut vmm)
}

/// Somebody who takes connections and never says or reads a thing.
fn silent_listener() -> Result<(TcpListener, String)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let uri = format!("tcp:{}", listener.local_addr()?);
    Ok((listener, uri))
}

fn twice() -> Result<()> {
    let (_listener, uri) = silent_listener()?;
    let mut vmm = source().start()?;
    vmm.qmp.enable(&["return-path"])?;
    vmm.migrate(&uri)?;
    let refusal = vmm.qmp.refused("migrate", json!({"uri": uri}))?;
    assert_eq!(refusal.desc, "There's a migration process in progress");
    let error = vmm.qmp.enable(&["x-colo"]).unwrap_err().to_string();
    says(&error, &["There's a migration process in progress"]);
    Ok(())
}

/// A port that nobody has.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn nobody_listens() -> Result<()> {
    let mut vmm = source().start()?;
    vmm.qmp.enable(&["return-path", "x-colo", "events"])?;
    let port = free_port()?;
    vmm.migrate(&format!("tcp:127.0.0.1:{port}"))?;
    says(
        &vmm.wait_failure()?,
        &["nobody listens on", &port.to_string()],
    );
    runs_on(&mut vmm)?;
    vmm.migrate("unix:/nonexistent/socket")?;
    says(
        &vmm.wait_failure()?,
        &["nobody listens on", "/nonexistent/socket"],
    );
    runs_on(&mut vmm)?;
    // Whoever listens then is migrated to.
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let uri = target.listen()?;
    vmm.migrate(&uri)?;
    vmm.wait_migration("colo")?;
    Ok(())
}

fn silent_target() -> Result<()> {
    for capabilities in [&["return-path"][..], &["return-path", "x-colo", "multifd"]] {
        let (_listener, uri) = silent_listener()?;
        let mut vmm = source().args(["--peer-timeout", "500"]).start()?;
        vmm.qmp.enable(capabilities)?;
        let since = Instant::now();
        vmm.migrate(&uri)?;
        let error = vmm.wait_failure()?;
        assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
        // It takes what the connection holds, and whether that is all of the guest depends on the host.
        let (said, taken) = ("the peer sent nothing", "the peer took nothing");
        assert!(error.contains(said) || error.contains(taken), "{error}");
        says(&error, &["nothing before the deadline"]);
        runs_on(&mut vmm)?;
    }
    Ok(())
}

fn killed_target() -> Result<()> {
    let connection = Connection::channels(2);
    let guest = ColoVmm::new("colo-vmm").simulated();
    let mut pair = Pair::start(&guest, connection, &["return-path", "x-colo"])?;
    // Slow enough to be caught on the way.
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 1 << 20}))?;
    pair.migrate(connection)?;
    pair.primary.wait_migration("active")?;
    pair.secondary.process.kill()?;
    let error = pair.primary.wait_failure()?;
    assert!(!error.is_empty());
    runs_on(&mut pair.primary)
}

fn killed_source() -> Result<()> {
    let connection = Connection::channels(2);
    let guest = ColoVmm::new("colo-vmm").simulated();
    let mut pair = Pair::start(&guest, connection, &["return-path", "x-colo"])?;
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 1 << 20}))?;
    pair.migrate(connection)?;
    pair.secondary.wait_migration("active")?;
    pair.primary.process.kill()?;
    says(&pair.secondary.wait_failure()?, &["stream"]);
    assert_eq!(pair.secondary.status()?, "inmigrate");
    Ok(())
}

fn cancel() -> Result<()> {
    let guest = ColoVmm::new("colo-vmm").simulated();
    for connection in [Connection::default(), Connection::channels(2)] {
        let mut pair = Pair::start(&guest, connection, &["return-path", "x-colo"])?;
        pair.primary
            .qmp
            .set_parameters(json!({"max-bandwidth": 1 << 20}))?;
        pair.migrate(connection)?;
        pair.primary.wait_migration("active")?;
        pair.primary.qmp.execute("migrate_cancel", Value::Null)?;
        let since = Instant::now();
        pair.primary.poll("cancelled migration", |vmm| {
            Ok((vmm.migration()?["status"] == "cancelled").then_some(()))
        })?;
        assert!(since.elapsed() < AT_ONCE);
        runs_on(&mut pair.primary)?;
        pair.secondary.wait_failure()?;
    }
    Ok(())
}

fn cancel_silent() -> Result<()> {
    let (_listener, uri) = silent_listener()?;
    let mut vmm = source().start()?;
    vmm.qmp.enable(&["return-path"])?;
    vmm.migrate(&uri)?;
    vmm.wait_migration("active")
        .or_else(|_| vmm.wait_migration("device"))?;
    let since = Instant::now();
    vmm.qmp.execute("migrate_cancel", Value::Null)?;
    vmm.poll("cancelled migration", |vmm| {
        Ok((vmm.migration()?["status"] == "cancelled").then_some(()))
    })?;
    assert!(since.elapsed() < AT_ONCE);
    runs_on(&mut vmm)
}

fn busy_port() -> Result<()> {
    let (_listener, uri) = silent_listener()?;
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let refusal = target
        .qmp
        .refused("migrate-incoming", json!({"uri": uri}))?;
    says(&refusal.desc, &["migrate-incoming", "in use", &uri[4..]]);
    assert_eq!(target.migration()?["status"], Value::Null);
    migrates_to(&mut target)
}

/// A guest arrives in COLO.
fn migrates_to(target: &mut Vmm) -> Result<()> {
    let uri = target.listen()?;
    let mut source = source().start()?;
    source.qmp.enable(&["return-path", "x-colo"])?;
    source
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 100, "max-bandwidth": 0}))?;
    source.migrate(&uri)?;
    target.wait_checkpoints(1)
}

/// Room for guest memory, not for a second copy of it.
fn no_memory() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run = target().memory(3000).command(dir.path())?;
    let mut shell = Program::new("sh");
    shell.args(["-c", "ulimit -v 4500000 && exec \"$0\" \"$@\""]);
    shell.arg(run.get_program()).args(run.get_args());
    let mut target = Vmm::start("target", shell, dir)?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let tcp = json!({"uri": "tcp:127.0.0.1:0"});
    let refusal = target.qmp.refused("migrate-incoming", tcp)?;
    says(&refusal.desc, &["migrate-incoming", "cache"]);
    assert_eq!(target.migration()?["status"], Value::Null);
    assert_eq!(target.status()?, "inmigrate");
    // Without COLO there is no second copy.
    target.qmp.set_capabilities(&["x-colo"], false)?;
    target.listen()?;
    assert_eq!(target.migration()?["status"], "setup");
    Ok(())
}

fn silent_connection() -> Result<()> {
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let uri = target.listen()?;
    let address = &uri["tcp:".len()..];
    let mut silent = TcpStream::connect(address)?;
    let mut half = TcpStream::connect(address)?;
    half.write_all(b"QE")?;
    let asked = Instant::now();
    for _ in 0..100 {
        target.status()?;
    }
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert_eq!(target.migration()?["status"], "setup");
    let mut source = source().start()?;
    source.qmp.enable(&["return-path", "x-colo"])?;
    source
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 100}))?;
    source.migrate(&uri)?;
    target.wait_checkpoints(1)?;
    // It was closed when the migration had all its connections.
    silent.set_read_timeout(Some(AT_ONCE))?;
    assert_eq!(silent.read(&mut [0])?, 0);
    Ok(())
}

/// A channel's handshake, all zero but for magic, version and id.
fn hello(channel: u8) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
    bytes[24] = channel;
    bytes
}

fn unexpected_channel() -> Result<()> {
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let uri = target.listen()?;
    let mut channel = TcpStream::connect(&uri["tcp:".len()..])?;
    channel.write_all(&hello(0))?;
    channel.set_read_timeout(Some(AT_ONCE))?;
    // Turned away: the end, or a reset, and not silence.
    let closed = match channel.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    };
    assert!(closed);
    let mut source = source().start()?;
    source.qmp.enable(&["return-path", "x-colo"])?;
    source
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 100}))?;
    source.migrate(&uri)?;
    target.wait_checkpoints(1)
}

fn other_size() -> Result<()> {
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

/// What a stream of ours begins with: magic, version, configuration with the machine's name.
fn preamble(machine: &str) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07".to_vec();
    bytes.extend(
        u32::try_from(machine.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    bytes.extend(machine.as_bytes());
    bytes
}

/// The announcement of RAM: section 2, one block.
fn ram_setup(block: &str, length: u64) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0, 0, 2, 3];
    bytes.extend(b"ram");
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    bytes.extend((length | 4).to_be_bytes());
    bytes.push(u8::try_from(block.len()).unwrap_or(0));
    bytes.extend(block.as_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// End of a RAM section's records, and the footer of section 2.
const RAM_END: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2];

const OURS: &str = "colo-vmm-1";
const RAM: u64 = 16 << 20;

fn wrong_streams() -> Result<()> {
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
        let mut target = target().start()?;
        target.qmp.enable(&["return-path", "x-colo"])?;
        let uri = target.listen()?;
        let mut peer = TcpStream::connect(&uri["tcp:".len()..])?;
        peer.write_all(&bytes)?;
        peer.shutdown(std::net::Shutdown::Write)?;
        let error = target.wait_failure().map_err(|e| format!("{what}: {e}"))?;
        for part in parts {
            assert!(error.contains(part), "{what}: no '{part}' in: {error}");
        }
        assert_eq!(target.status()?, "inmigrate", "{what}");
    }
    // What does not even begin like a stream does not end the wait for one.
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo"])?;
    let uri = target.listen()?;
    let mut peer = TcpStream::connect(&uri["tcp:".len()..])?;
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    peer.set_read_timeout(Some(AT_ONCE))?;
    // With or without an error: it is closed.
    assert_eq!(peer.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(target.migration()?["status"], "setup");
    let mut source = source().start()?;
    source.qmp.enable(&["return-path", "x-colo"])?;
    source
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 100}))?;
    source.migrate(&uri)?;
    target.wait_checkpoints(1)
}

/// Each announces some 4 GiB, and sends nothing of it.
fn long_lengths() -> Result<()> {
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
        let mut peer = TcpStream::connect(&uri["tcp:".len()..])?;
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

fn broken_channel() -> Result<()> {
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo", "multifd"])?;
    target.qmp.set_parameters(json!({"multifd-channels": 1}))?;
    let uri = target.listen()?;
    let address = &uri["tcp:".len()..];
    let mut main = TcpStream::connect(address)?;
    let mut channel = TcpStream::connect(address)?;
    channel.write_all(&hello(0))?;
    main.write_all(&[preamble(OURS), ram_setup("pc.ram", RAM), RAM_END.to_vec()].concat())?;
    target.wait_migration("active")?;
    // No packet begins like this. The main channel stays open, and says nothing.
    channel.write_all(&[0xff; 4096])?;
    let since = Instant::now();
    let error = target.wait_failure()?;
    assert!(since.elapsed() < AT_ONCE);
    says(&error, &["channel 0", "packet"]);
    assert_eq!(target.status()?, "inmigrate");
    Ok(())
}

fn exit_on_error() -> Result<()> {
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
        let mut peer = std::os::unix::net::UnixStream::connect(&path)?;
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
