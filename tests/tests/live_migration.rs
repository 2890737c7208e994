//! A guest moves from one `colo-vmm` to another, without COLO: it goes on there with the next byte
//! of its output.

use std::process::ExitCode;

use serde_json::{Value, json};
use tests::vmm::{ColoVmm, Connection, Pair, check_count};
use tests::{Result, harness};

fn main() -> ExitCode {
    let kvm = harness::on_kvm;
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
        kvm("running_guest_of_two_vcpus_goes_on", || {
            running(
                &guest().args(["--vcpus", "2"]),
                Connection::channels(2),
                &["return-path"],
            )
        }),
        harness::anywhere("simulated_guest_goes_on", || {
            running(
                &guest().simulated(),
                Connection::channels(2),
                &["return-path"],
            )
        }),
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

const PLAIN: Connection = Connection {
    multifd: None,
    unix: false,
};
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
