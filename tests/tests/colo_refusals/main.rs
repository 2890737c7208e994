//! What goes wrong at the operator's end, or is wrong with the peer: each time a clear error, a
//! status that says that it failed, and a guest that runs on at the source.

mod channels;
mod lost;
mod operator;
mod streams;
mod wire;

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tests::Result;
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Vmm, check_count};

use self::channels::{broken_channel, left_early, silent_connection, unexpected_channel};
use self::lost::{
    cancel, cancel_connecting, cancel_incoming, cancel_silent, killed_source, killed_target,
    nobody_listens, quit_incoming, silent_target,
};
use self::operator::{
    addresses, busy_port, capabilities, no_memory, parameters, twice, wrong_time,
};
use self::streams::{exit_on_error, long_lengths, other_size, wrong_streams};

fn main() -> ExitCode {
    let anywhere = |name, test: fn() -> Result<()>| Needs::NOTHING.test(name, test);
    harness::run_waiting([
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
        anywhere(
            "cancel_ends_connecting_to_a_host_that_takes_no_connection",
            cancel_connecting,
        ),
        anywhere(
            "cancel_ends_a_target_that_waits_and_another_guest_can_come",
            cancel_incoming,
        ),
        anywhere("quit_ends_a_target_that_waits", quit_incoming),
        anywhere("target_can_be_told_again_after_a_busy_port", busy_port),
        anywhere(
            "target_without_memory_for_the_cache_can_be_told_again",
            no_memory,
        ),
        anywhere("silent_connection_holds_nobody_up", silent_connection),
        anywhere(
            "source_that_leaves_before_its_last_channel_holds_nobody_up",
            left_early,
        ),
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

/// What both sides of COLO have to be able to do.
const COLO: &[&str] = &["return-path", "x-colo"];

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

/// Somebody who takes connections and never says or reads a thing.
fn silent_listener() -> Result<(TcpListener, String)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let uri = format!("tcp:{}", listener.local_addr()?);
    Ok((listener, uri))
}

/// A target that waits for COLO, and where.
fn listening() -> Result<(Vmm, String)> {
    let mut target = target().start()?;
    target.qmp.enable(COLO)?;
    let uri = target.listen()?;
    Ok((target, uri))
}

/// A connection to a target that listens at `uri`.
fn connect(uri: &str) -> Result<TcpStream> {
    Ok(TcpStream::connect(&uri["tcp:".len()..])?)
}

/// Whether the other side closes a connection, with a reset or without one, and does not say a thing.
fn is_closed(connection: &mut TcpStream) -> Result<bool> {
    connection.set_read_timeout(Some(AT_ONCE))?;
    Ok(match connection.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    })
}

/// A guest arrives in COLO at `target`, which listens at `uri`. The result is where it comes from.
fn migrates_to(target: &mut Vmm, uri: &str) -> Result<Vmm> {
    let mut source = source().start()?;
    source.qmp.enable(COLO)?;
    source
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 100, "max-bandwidth": 0}))?;
    source.migrate(uri)?;
    target.wait_checkpoints(1)?;
    Ok(source)
}
