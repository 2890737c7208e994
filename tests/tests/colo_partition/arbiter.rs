//! An etcd on a third host, which one side or both cannot reach.
//!
//! A primary that reaches neither etcd nor its secondary has its guest stand still when its right has run
//! out, until etcd says who runs. A secondary that has lost its primary asks etcd until it is answered, or an operator overrules it.

use std::time::Duration;

use serde_json::Value;
use tests::Result;
use tests::harness::{Needs, Tests};
use tests::hosts::{Fate, Hosts, Options, host};
use tests::netns::{Host, Traffic};
use tests::vmm::{Connection, Pair, Side};

use crate::PLAIN;
use crate::everywhere::Cuts;

pub fn trials() -> Vec<Tests> {
    let mut trials = Vec::new();
    for (guest, is_simulated) in [("kvm", false), ("simulated", true)] {
        let on_hosts = |name: &str, test: Test| {
            let needs = Needs::NOTHING.network().kvm_if(!is_simulated);
            let test = needs.test_etcd(&format!("{guest}_{name}"), move |etcd| {
                let hosts = Hosts::with_etcd(etcd)?;
                let pair = hosts.pair_in_colo(&Options::asking(is_simulated), PLAIN)?;
                test(&hosts, pair)
            });
            test.sampled(&[name])
        };
        trials.extend([
            on_hosts(
                "secondary_of_a_primary_that_is_cut_off_from_all_goes_on",
                |hosts, pair| isolated(hosts, pair, Side::Primary),
            ),
            on_hosts(
                "primary_of_a_secondary_that_is_cut_off_from_all_goes_on",
                |hosts, pair| isolated(hosts, pair, Side::Secondary),
            ),
            on_hosts(
                "secondary_of_a_primary_that_nobody_hears_goes_on",
                mute,
            ),
            on_hosts(
                "secondary_of_a_primary_that_hears_nobody_goes_on",
                deaf,
            ),
            on_hosts(
                "no_guest_runs_while_nobody_reaches_etcd_or_the_other_and_the_secondary_goes_on_then",
                |hosts, pair| all_cut(hosts, pair, Word::Etcd),
            ),
            on_hosts(
                "no_guest_runs_while_nobody_reaches_etcd_or_the_other_until_an_operator_overrules_it",
                |hosts, pair| all_cut(hosts, pair, Word::Operator),
            ),
        ]);
    }
    // Two guests that keep a busy machine's processors busy would be enough for beats to be missed, which
    // nobody forgives whom etcd does not answer.
    trials.push(Needs::NOTHING.network().test_etcd(
        "simulated_pair_goes_on_as_two_while_etcd_is_out_of_reach_of_either_or_both",
        |etcd| {
            let hosts = Hosts::with_etcd(etcd)?;
            let pair = hosts.pair_in_colo(&Options::asking(true), PLAIN)?;
            out_of_reach(&hosts, pair)
        },
    ));
    for (name, is_simulated, connection) in [
        ("kvm_multifd", false, Connection::channels(2)),
        ("simulated_plain", true, PLAIN),
    ] {
        trials.push(Needs::NOTHING.network().kvm_if(!is_simulated).test_etcd(
            &format!("{name}_primary_may_be_cut_off_from_all_at_any_moment"),
            move |etcd| {
                let cuts = Cuts {
                    what: "the primary cut off from all".to_owned(),
                    is_simulated,
                    connection,
                    etcd: Some(etcd),
                    cut: Hosts::isolate,
                    side: Side::Primary,
                };
                cuts.everywhere()
            },
        ));
    }
    trials
}

/// Of a pair in COLO.
type Test = fn(&Hosts, Pair) -> Result<()>;

/// Waits until the primary knows by itself that it may not run any more.
fn stands_still(pair: &mut Pair) -> Result<()> {
    pair.primary.poll("suspended guest", |primary| {
        Ok((Fate::of(primary)? == Fate::Suspended).then_some(()))
    })?;
    let beat = pair.primary.heartbeat()?;
    assert_eq!(beat["stop-reason"], "the lease has expired");
    Ok(())
}

/// One side reaches nobody: it is the other that goes on.
fn isolated(hosts: &Hosts, mut pair: Pair, side: Side) -> Result<()> {
    hosts.isolate(side)?;
    if side == Side::Primary {
        stands_still(&mut pair)?;
        assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    } else {
        pair.primary.poll("state alone", |primary| {
            Ok((primary.heartbeat()?["state"] == "alone").then_some(()))
        })?;
        pair.primary.wait_lines(ENCORE)?;
        // It asks until it is answered, and its guest is not heard meanwhile.
        pair.secondary.poll("question", |secondary| {
            Ok((secondary.heartbeat()?["state"] == "asking").then_some(()))
        })?;
        assert_eq!(Fate::of(&mut pair.secondary)?, Fate::Open);
        hosts.heal()?;
        assert_eq!(hosts.outcome(&mut pair)?, Side::Primary);
    }
    let beat = side.other().of(&mut pair).0.heartbeat()?;
    assert_eq!(beat["arbiter-state"], "won");
    Ok(())
}

fn mute(hosts: &Hosts, mut pair: Pair) -> Result<()> {
    for to in [Host::B, Host::C] {
        hosts.network.cut(Host::A, to, Traffic::All)?;
    }
    assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    Ok(())
}

fn deaf(hosts: &Hosts, mut pair: Pair) -> Result<()> {
    for from in [Host::B, Host::C] {
        hosts.network.cut(from, Host::A, Traffic::All)?;
    }
    assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    Ok(())
}

/// Lines that show that the guest goes on.
const ENCORE: u64 = 3;
/// Longer than a right lasts, and than etcd is waited for.
const LONG: Duration = Duration::from_secs(6);

fn out_of_reach(hosts: &Hosts, mut pair: Pair) -> Result<()> {
    for sides in [
        &[Side::Primary][..],
        &[Side::Secondary],
        &[Side::Primary, Side::Secondary],
    ] {
        for side in sides {
            hosts
                .network
                .cut_apart(host(*side), Host::C, Traffic::All)?;
        }
        std::thread::sleep(LONG);
        for side in [&mut pair.primary, &mut pair.secondary] {
            assert_eq!(side.heartbeat()?["state"], "paired", "{sides:?}");
            let taken = side.checkpoints()?.len();
            side.wait_checkpoints(taken + 3)?;
        }
        hosts.heal()?;
        pair.primary.poll("renewed right", |primary| {
            Ok((primary.heartbeat()?["arbiter-state"] == "won").then_some(()))
        })?;
    }
    // And etcd decides as if nothing had been.
    hosts.isolate(Side::Primary)?;
    assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    Ok(())
}

/// Who has the secondary go on in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// Its host reaches etcd again.
    Etcd,
    /// Somebody who has ended the primary.
    Operator,
}

fn all_cut(hosts: &Hosts, mut pair: Pair, word: Word) -> Result<()> {
    hosts.isolate(Side::Primary)?;
    hosts.network.cut_apart(Host::B, Host::C, Traffic::All)?;
    stands_still(&mut pair)?;
    let side = &mut pair.secondary;
    side.poll("question to etcd without an answer", |side| {
        let beat = side.heartbeat()?;
        let state = beat["arbiter-state"].as_str().unwrap_or_default();
        Ok((beat["state"] == "asking" && state.contains("etcd")).then_some(()))
    })?;
    let said = pair.primary.output()?;
    std::thread::sleep(LONG);
    // The secondary's copy may run, and is not heard.
    assert_eq!(Fate::of(&mut pair.secondary)?, Fate::Open);
    assert_eq!(Fate::of(&mut pair.primary)?, Fate::Suspended);
    assert_eq!(pair.primary.output()?, said);
    assert_eq!(pair.secondary.output()?, b"");
    let refusal = pair
        .secondary
        .qmp
        .refused("x-colo-lost-heartbeat", Value::Null)?;
    assert!(
        refusal.desc.contains("x-colo-override-arbiter"),
        "{}",
        refusal.desc
    );
    match word {
        Word::Etcd => {
            hosts.network.heal(Host::B, Host::C)?;
            assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
        }
        Word::Operator => {
            // It would go on when etcd is back.
            pair.primary.process.kill()?;
            let side = &mut pair.secondary;
            side.qmp.execute("x-colo-override-arbiter", Value::Null)?;
            side.wait_lines(ENCORE)?;
            hosts.heal()?;
            side.wait_lines(ENCORE)?;
            pair.check_history(Side::Secondary)?;
        }
    }
    // Etcd has heard of it, or does now.
    pair.secondary.poll("right", |side| {
        Ok((side.heartbeat()?["arbiter-state"] == "won").then_some(()))
    })
}
