//! A guest moves from one `colo-vmm` to another, without COLO: it goes on there with the next byte
//! of its output.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::Result;
use tests::harness::{self, Needs};
use tests::resident::Resident;
use tests::vmm::{ColoVmm, Connection, LINE, Pair, check_count};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run([
        kvm("running_guest_goes_on_plain", || {
            running(&guest(), PLAIN, &["return-path"])
        }),
        kvm("running_guest_goes_on_by_two_channels", || {
            running(&guest(), Connection::channels(2), &["return-path"])
        }),
        kvm("running_guest_goes_on_by_sixteen_channels", || {
            running(&guest(), Connection::channels(16), &["return-path"])
        }),
        kvm("running_guest_goes_on_by_zstd_channels", || {
            running(&guest(), ZSTD, &["return-path"])
        }),
        kvm(
            "running_guest_goes_on_by_zstd_at_a_level_that_adapts",
            || {
                let guest = guest().args(["--zstd-level", "auto:-3:9"]);
                running(&guest, ZSTD, &["return-path"])
            },
        ),
        kvm("running_guest_goes_on_in_memory_that_is_there", prealloc),
        kvm(
            "huge_pages_are_asked_for_unless_they_are_not_wanted",
            huge_pages,
        ),
        kvm("running_guest_goes_on_over_unix_sockets", || {
            let unix = Connection {
                unix: true,
                ..PLAIN
            };
            running(&guest(), unix, &["return-path"])
        }),
        kvm("running_guest_goes_on_without_return_path", || {
            running(&guest(), PLAIN, &[])
        }),
        kvm("running_guest_goes_on_as_differences", as_differences),
        kvm("running_guest_goes_on_without_a_copy", without_a_copy),
        kvm("guest_waits_before_the_switch_over_for_continue", pause),
        kvm(
            "guest_that_waits_before_the_switch_over_runs_on_when_it_is_cancelled",
            cancelled_pause,
        ),
        kvm("uuids_are_compared_where_that_is_asked_for", uuids),
        kvm(
            "unlike_cpus_are_refused_by_name_while_the_guest_runs",
            unlike_cpus,
        ),
        kvm(
            "unlike_cpus_are_taken_by_whoever_does_not_compare",
            uncompared_cpus,
        ),
        kvm(
            "hosts_of_unlike_cpus_have_in_common_what_a_mask_leaves",
            masked_cpus,
        ),
        kvm("running_guest_of_two_vcpus_goes_on", || {
            running(
                &guest().args(["--vcpus", "2"]),
                Connection::channels(2),
                &["return-path"],
            )
        }),
        Needs::NOTHING.test("simulated_guest_goes_on", || {
            running(
                &guest().simulated(),
                Connection::channels(2),
                &["return-path"],
            )
        }),
        kvm("bandwidth_is_no_more_than_the_limit", bandwidth),
        kvm("paused_guest_stays_paused", paused_at_the_source),
        kvm(
            "guest_waits_for_cont_at_a_target_that_was_told_to_stop",
            stopped_at_the_target,
        ),
        kvm(
            "guest_moves_on_from_where_it_has_come_to",
            there_and_further,
        ),
    ])
}

const PLAIN: Connection = Connection::PLAIN;
const ZSTD: Connection = Connection {
    multifd: Some((2, "zstd")),
    unix: false,
};

/// Lines that show that the guest goes on.
const ENCORE: u64 = 20;

fn guest() -> ColoVmm {
    ColoVmm::new("colo-vmm").dirty_pages(2000)
}

fn running(guest: &ColoVmm, connection: Connection, capabilities: &[&str]) -> Result<()> {
    let mut pair = Pair::start(guest, connection, capabilities)?;
    pair.migrate(connection)?;
    let migration = pair.primary.wait_migration("completed")?;
    assert!(
        migration["ram"]["normal"].as_u64() >= Some(2000),
        "{migration}"
    );
    assert!(migration["downtime"].is_u64(), "{migration}");
    pair.secondary.wait_migration("completed")?;
    assert_eq!(pair.primary.status()?, "postmigrate");
    assert_eq!(pair.secondary.status()?, "running");
    pair.secondary.wait_lines(ENCORE)?;
    seamless(&pair)
}

/// The limit holds from the first byte to the last, whatever carries the pages.
fn bandwidth() -> Result<()> {
    const LIMIT: u64 = 16 << 20;
    const MEMORY: u32 = 32;
    let guest = ColoVmm::new("colo-vmm")
        .dirty_pages(100)
        .memory(MEMORY)
        .args(["--fill-ram"]);
    for connection in [PLAIN, Connection::channels(2)] {
        let mut pair = Pair::start(&guest, connection, &["return-path"])?;
        pair.primary
            .qmp
            .set_parameters(json!({"max-bandwidth": LIMIT}))?;
        // Its RAM is full before it says anything.
        pair.primary.wait_lines(1)?;
        let since = Instant::now();
        pair.migrate(connection)?;
        let migration = pair.primary.wait_migration("completed")?;
        let took = since.elapsed();
        let sent = migration["ram"]["transferred"].as_u64();
        let sent = sent.ok_or("nothing was sent")?;
        // But for the 2 MiB in which the guest itself and its tables are.
        assert!(sent >= u64::from(MEMORY - 2) << 20, "{migration}");
        // A tenth more, and a packet at once.
        let least = sent.saturating_sub(1 << 20) * 1000 / (LIMIT + LIMIT / 10);
        assert!(took >= Duration::from_millis(least), "{sent} in {took:?}");
        seamless(&pair)?;
    }
    Ok(())
}

/// Both sides have all of their memory before they need it.
fn prealloc() -> Result<()> {
    let guest = guest().memory(256).args(["--prealloc"]);
    let connection = Connection::channels(2);
    let mut pair = Pair::start(&guest, connection, &["return-path"])?;
    pair.migrate(connection)?;
    pair.secondary.wait_migration("completed")?;
    for vmm in [&pair.primary, &pair.secondary] {
        let memory = Resident::of(vmm.process.id())?;
        assert!(memory.anonymous >= 256 << 20, "{memory:?}");
    }
    pair.secondary.wait_lines(ENCORE)?;
    seamless(&pair)
}

fn huge_pages() -> Result<()> {
    for (options, is_asked) in [(&[][..], true), (&["--no-huge-pages"], false)] {
        let vmm = guest().args(options).start()?;
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", vmm.process.id()))?;
        // `hg`: advised with MADV_HUGEPAGE (Linux, Documentation/filesystems/proc.rst).
        let mut flags = maps.lines().filter_map(|l| l.strip_prefix("VmFlags:"));
        let is_advised = flags.any(|flags| flags.split_whitespace().any(|flag| flag == "hg"));
        assert_eq!(is_advised, is_asked, "{options:?}");
    }
    Ok(())
}

fn as_differences() -> Result<()> {
    // Few pages, again and again: they stay in the cache.
    let guest = ColoVmm::new("colo-vmm").dirty_pages(100);
    let mut pair = Pair::start(&guest, PLAIN, &["return-path", "xbzrle"])?;
    // Not before there were rounds in which pages are known.
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 2 << 20, "downtime-limit": 0}))?;
    pair.migrate(PLAIN)?;
    pair.primary
        .qmp
        .wait_event_if("MIGRATION_PASS", |d| d["pass"] == 4)?;
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    let migration = pair.primary.wait_migration("completed")?;
    let xbzrle = &migration["xbzrle-cache"];
    assert!(xbzrle["pages"].as_u64() > Some(0), "{migration}");
    pair.secondary.wait_migration("completed")?;
    pair.secondary.wait_lines(ENCORE)?;
    seamless(&pair)
}

fn without_a_copy() -> Result<()> {
    let connection = Connection::channels(2);
    let mut pair = Pair::start(&guest(), connection, &["return-path", "zero-copy-send"])?;
    pair.migrate(connection)?;
    let migration = pair.primary.wait_migration("completed")?;
    // Over loopback the kernel copies after all, and says so.
    let missed = &migration["ram"]["dirty-sync-missed-zero-copy"];
    assert!(missed.as_u64() > Some(0), "{migration}");
    pair.secondary.wait_migration("completed")?;
    pair.secondary.wait_lines(ENCORE)?;
    seamless(&pair)
}

const PAUSE: &[&str] = &["return-path", "pause-before-switchover"];

/// Stands still before the switch-over, and says so.
fn paused_before_switch_over() -> Result<Pair> {
    let mut pair = Pair::start(&guest(), PLAIN, PAUSE)?;
    let go_on = |state: &str| json!({"state": state});
    let refusal = pair
        .primary
        .qmp
        .refused("migrate-continue", go_on("pre-switchover"))?;
    assert_eq!(refusal.desc, "Migration not in expected state: none");
    pair.migrate(PLAIN)?;
    pair.primary.wait_migration("pre-switchover")?;
    assert_eq!(pair.primary.status()?, "finish-migrate");
    let refusal = pair
        .primary
        .qmp
        .refused("migrate-continue", go_on("device"))?;
    assert_eq!(
        refusal.desc,
        "Migration not in expected state: pre-switchover"
    );
    Ok(pair)
}

fn pause() -> Result<()> {
    let mut pair = paused_before_switch_over()?;
    pair.primary
        .qmp
        .execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    pair.primary.wait_migration("completed")?;
    pair.secondary.wait_migration("completed")?;
    pair.secondary.wait_lines(ENCORE)?;
    seamless(&pair)
}

fn cancelled_pause() -> Result<()> {
    let mut pair = paused_before_switch_over()?;
    pair.primary.qmp.execute("migrate_cancel", Value::Null)?;
    pair.primary.wait_migration("cancelled")?;
    assert_eq!(pair.primary.status()?, "running");
    let before = pair.primary.output()?.len();
    pair.primary.wait_lines(ENCORE)?;
    assert!(pair.primary.output()?.len() > before);
    check_count(0, &pair.primary.output()?)?;
    Ok(())
}

const ONE: [&str; 2] = ["--uuid", "00112233-4455-6677-8899-aabbccddeeff"];
const OTHER: [&str; 2] = ["--uuid", "00112233-4455-6677-8899-aabbccddee00"];

fn uuids() -> Result<()> {
    for (theirs, validated, arrives) in [
        (ONE, true, true),
        (OTHER, true, false),
        (OTHER, false, true),
    ] {
        let mut source = guest().args(ONE).start()?;
        let mut target = guest().args(theirs).incoming().start()?;
        for vmm in [&mut source, &mut target] {
            vmm.qmp.enable(&["return-path"])?;
            if validated {
                vmm.qmp.enable(&["validate-uuid"])?;
            }
        }
        source.wait_lines(ENCORE)?;
        let uri = target.listen()?;
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        source.migrate(&uri)?;
        if arrives {
            source.wait_migration("completed")?;
            target.wait_migration("completed")?;
        } else {
            let reason = target.wait_failure()?;
            assert!(reason.contains("uuid"), "{reason}");
            source.wait_failure()?;
            assert_eq!(source.status()?, "running");
        }
    }
    Ok(())
}

/// Migrates from a guest with `source`'s options to one with `target`'s. Returns what went wrong at the
/// target, and how often the guest was stopped.
fn from_cpu_to_cpu(source: &[&str], target: &[&str]) -> Result<(Option<String>, usize)> {
    let mut source = guest().args(source.iter().copied()).start()?;
    let mut target = guest().args(target.iter().copied()).incoming().start()?;
    for vmm in [&mut source, &mut target] {
        vmm.qmp.enable(&["return-path"])?;
    }
    source.wait_lines(ENCORE)?;
    let uri = target.listen()?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    source.migrate(&uri)?;
    let status = source.poll("end of the migration", |source| {
        let status = source.migration()?["status"].clone();
        Ok((status == "completed" || status == "failed").then_some(status))
    })?;
    let failure = if status == "failed" {
        assert_eq!(source.status()?, "running");
        let reason = target.wait_failure()?;
        // It goes on counting.
        let lines = source.output()?.len() as u64 / LINE;
        source.wait_lines(lines + ENCORE)?;
        Some(reason)
    } else {
        target.wait_migration("completed")?;
        None
    };
    let events = source.qmp.take_events()?;
    let stops = events.iter().filter(|e| e["event"] == "STOP").count();
    Ok((failure, stops))
}

fn unlike_cpus() -> Result<()> {
    let plain = from_cpu_to_cpu(&[], &[])?;
    assert_eq!(plain, (None, 1));
    for (source, target, told) in [
        (
            &["--cpu-pretend", "0x7.0.ebx=0x100"][..],
            &[][..],
            "cpuid leaf 0x7 subleaf 0x0 ebx",
        ),
        (&[], &["--vcpus", "2"], "1 vcpus at the source, 2 here"),
        (
            &["--cpu-mask", "6.0.eax=0"],
            &[],
            "cpuid leaf 0x6 subleaf 0x0 eax is 0x00000000 at the source",
        ),
    ] {
        let (failure, stops) = from_cpu_to_cpu(source, target)?;
        let failure = failure.ok_or(told)?;
        assert!(failure.contains(told), "{failure}");
        assert_eq!(stops, 0, "the guest was stopped before: {failure}");
    }
    Ok(())
}

fn uncompared_cpus() -> Result<()> {
    const UNLIKE: &[&str] = &["--cpu-pretend", "0x7.0.ebx=0x100"];
    const SILENT: &[&str] = &["--cpu-pretend", "0x7.0.ebx=0x100", "--no-cpu-check"];
    for (source, target) in [(SILENT, &[][..]), (UNLIKE, &["--no-cpu-check"])] {
        assert_eq!(from_cpu_to_cpu(source, target)?, (None, 1));
    }
    Ok(())
}

fn masked_cpus() -> Result<()> {
    let masks = &["--cpu-mask", "6.0.eax=0,6.0.ecx=0", "--clock", "stands"];
    assert_eq!(from_cpu_to_cpu(masks, masks)?, (None, 1));
    Ok(())
}

/// The target goes on with the byte after the source's last one.
fn seamless(pair: &Pair) -> Result<()> {
    let source = pair.primary.output()?;
    check_count(0, &source)?;
    check_count(source.len() as u64, &pair.secondary.output()?)?;
    Ok(())
}

fn paused_at_the_source() -> Result<()> {
    let mut pair = Pair::start(&guest(), PLAIN, &["return-path"])?;
    pair.primary.qmp.execute("stop", Value::Null)?;
    pair.migrate(PLAIN)?;
    pair.primary.wait_migration("completed")?;
    pair.secondary.wait_migration("completed")?;
    arrives_paused(&mut pair)
}

fn stopped_at_the_target() -> Result<()> {
    let mut pair = Pair::start(&guest(), PLAIN, &["return-path"])?;
    pair.secondary.qmp.execute("stop", Value::Null)?;
    pair.migrate(PLAIN)?;
    pair.primary.wait_migration("completed")?;
    pair.secondary.wait_migration("completed")?;
    arrives_paused(&mut pair)
}

fn arrives_paused(pair: &mut Pair) -> Result<()> {
    assert_eq!(pair.primary.status()?, "postmigrate");
    assert_eq!(pair.secondary.status()?, "paused");
    assert_eq!(pair.secondary.output()?, b"");
    pair.secondary.qmp.execute("cont", Value::Null)?;
    pair.secondary.wait_lines(ENCORE)?;
    seamless(pair)
}

fn there_and_further() -> Result<()> {
    let connection = Connection::channels(2);
    let mut pair = Pair::start(&guest(), connection, &["return-path"])?;
    pair.migrate(connection)?;
    pair.secondary.wait_migration("completed")?;
    pair.secondary.wait_lines(ENCORE)?;
    let before = pair.primary.output()?.len();

    let mut third = guest().incoming().start()?;
    third.qmp.enable(&["events", "return-path", "multifd"])?;
    let uri = third.listen()?;
    pair.secondary
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    pair.secondary.migrate(&uri)?;
    pair.secondary.wait_migration("completed")?;
    third.wait_lines(ENCORE)?;
    let middle = pair.secondary.output()?;
    check_count(before as u64, &middle)?;
    check_count((before + middle.len()) as u64, &third.output()?)?;
    Ok(())
}
