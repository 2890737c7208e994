//! A pair of `colo-vmm` on two hosts, with a heartbeat, whose network is cut while both live: in both
//! directions, in each alone, for everything and for one connection, from the arbiter too, wherever
//! something begins or ends on either side. One guest runs on, and what the network does later changes
//! nothing.

mod arbiter;
mod everywhere;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tests::harness::{self, Needs};
use tests::hosts::{HEARTBEAT, Hosts, Options, host};
use tests::netns::{Host, Traffic};
use tests::vmm::{Connection, Side};
use tests::{Result, moments, sample};

use self::everywhere::{Cuts, report};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (guest, is_simulated) in [("kvm", false), ("simulated", true)] {
        trials.push(Needs::NOTHING.network().kvm_if(!is_simulated).test(
            &format!("{guest}_pair_that_is_cut_apart_goes_on_once"),
            move || cut_apart(is_simulated),
        ));
        for (name, connection) in [("plain", PLAIN), ("multifd", Connection::channels(2))] {
            for from in Side::BOTH {
                let test = Needs::NOTHING.network().kvm_if(!is_simulated).test(
                    &format!("{guest}_{name}_what_the_{from}_sends_may_be_lost_from_any_moment_on"),
                    move || {
                        let cuts = Cuts {
                            what: format!("what the {from} sends cut"),
                            is_simulated,
                            connection,
                            etcd: None,
                            cut: |hosts, from| {
                                let to = host(from.other());
                                hosts.network.cut(host(from), to, Traffic::All)
                            },
                            side: from,
                        };
                        cuts.everywhere()
                    },
                );
                trials.push(test.sampled(&[guest, name, from.name()]));
            }
        }
    }
    for (name, test) in [
        (
            "heartbeat_that_is_cut_alone_ends_colo_by_the_arbiter",
            heartbeat_alone as fn() -> Result<()>,
        ),
        (
            "heartbeat_that_is_cut_alone_ends_colo_by_the_policies",
            heartbeat_alone_by_policy,
        ),
        ("colo_that_is_cut_alone_ends_by_the_arbiter", colo_alone),
        (
            "colo_that_is_cut_alone_waits_for_an_operator_without_an_arbiter",
            colo_alone_by_policy,
        ),
    ] {
        trials.push(Needs::NOTHING.network().test(name, test));
    }
    trials.extend(arbiter::trials());
    harness::run(trials)
}

const PLAIN: Connection = Connection::PLAIN;

/// How often a pair is cut apart in each trial of that.
const REPETITIONS: usize = 5;

/// Cuts the two sides off from each other, and from nobody else.
fn cut_between(hosts: &Hosts, traffic: Traffic) -> Result<()> {
    hosts.network.cut_apart(Host::A, Host::B, traffic)
}

/// At some moment, of a checkpoint or between two.
fn cut_apart(is_simulated: bool) -> Result<()> {
    let mut random = sample::random("moments of cuts")?;
    let microseconds = (0..REPETITIONS).map(|_| random.u64(..40_000).to_string());
    let moments: Vec<String> = microseconds.collect();
    let (winners, failures) = moments::each(&moments, 2, |moment| {
        let hosts = Hosts::new()?;
        let mut pair = hosts.pair_in_colo(&Options::asking(is_simulated), PLAIN)?;
        thread::sleep(Duration::from_micros(moment.parse()?));
        cut_between(&hosts, Traffic::All)?;
        hosts.outcome(&mut pair)
    });
    report("both directions cut", &winners, &failures)
}

fn heartbeat_alone() -> Result<()> {
    let hosts = Hosts::new()?;
    let mut pair = hosts.pair_in_colo(&Options::asking(true), PLAIN)?;
    cut_between(&hosts, Traffic::Only(HEARTBEAT))?;
    // It holds the right, and asks first or second: the other one waits for it to run out.
    assert_eq!(hosts.outcome(&mut pair)?, Side::Primary);
    assert_eq!(pair.primary.heartbeat()?["state"], "alone");
    assert_eq!(pair.secondary.heartbeat()?["state"], "stopped");
    Ok(())
}

fn heartbeat_alone_by_policy() -> Result<()> {
    for (policies, winner) in [
        (["take-over", "stop"], Side::Primary),
        (["stop", "take-over"], Side::Secondary),
    ] {
        let hosts = Hosts::new()?;
        let options = Options {
            policies,
            ..Options::asking(true)
        };
        let mut pair = hosts.pair_in_colo(&options, PLAIN)?;
        cut_between(&hosts, Traffic::Only(HEARTBEAT))?;
        assert_eq!(hosts.outcome(&mut pair)?, winner, "{policies:?}");
    }
    Ok(())
}

fn colo_alone() -> Result<()> {
    let hosts = Hosts::new()?;
    let mut pair = hosts.pair_in_colo(&Options::asking(true), PLAIN)?;
    cut_between(&hosts, Traffic::AllBut(HEARTBEAT))?;
    // The holder of the right needs no loss of the heartbeat when COLO's own deadlines have passed.
    assert_eq!(hosts.outcome(&mut pair)?, Side::Primary);
    let beat = pair.primary.heartbeat()?;
    assert_eq!(beat["peer"], "alive");
    let beat = pair.secondary.heartbeat()?;
    assert_eq!(beat["stop-reason"], "the peer goes on alone");
    Ok(())
}

/// Neither side is lost to the other, so that nobody may go on by itself.
fn colo_alone_by_policy() -> Result<()> {
    let hosts = Hosts::new()?;
    let options = Options {
        policies: ["stop", "take-over"],
        ..Options::asking(true)
    };
    let mut pair = hosts.pair_in_colo(&options, PLAIN)?;
    cut_between(&hosts, Traffic::AllBut(HEARTBEAT))?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_migration("failing")?;
        let beat = side.heartbeat()?;
        assert_eq!(
            (&beat["peer"], &beat["state"]),
            (&json!("alive"), &json!("paired"))
        );
    }
    pair.secondary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    let beat = pair.primary.heartbeat()?;
    assert_eq!(beat["stop-reason"], "the peer goes on alone");
    Ok(())
}
