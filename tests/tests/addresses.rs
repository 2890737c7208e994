//! Where programs listen and connect: both IP families, sockets that a dead process left, and
//! options of an address.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use serde_json::{Value, json};
use tests::Result;
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Vmm};

fn main() -> ExitCode {
    let test = |name, test: fn() -> Result<()>| Needs::NOTHING.test(name, test);
    harness::run([
        test(
            "an_empty_host_takes_a_guest_by_either_family",
            both_families,
        ),
        test(
            "a_socket_that_a_dead_process_left_is_bound_anew",
            dead_socket,
        ),
        test("an_option_of_an_address_is_done_or_refused", options),
    ])
}

fn pair() -> Result<(Vmm, Vmm)> {
    let guest = ColoVmm::new("colo-vmm").simulated();
    Ok((guest.clone().start()?, guest.incoming().start()?))
}

fn both_families() -> Result<()> {
    for host in ["127.0.0.1", "[::1]", "localhost", ""] {
        let (mut source, mut target) = pair()?;
        target.listen_on("tcp::0")?;
        let listening = target.migration()?["socket-address"].clone();
        let all = listening.as_array().ok_or("no socket-address")?;
        let hosts: Vec<_> = all.iter().map(|address| &address["host"]).collect();
        assert_eq!(hosts, ["0.0.0.0", "::"], "{listening}");
        let port = all[0]["port"].as_str().ok_or("no port")?;
        assert_eq!(all[1]["port"], port, "{listening}");
        source.migrate(&format!("tcp:{host}:{port}"))?;
        source.wait_migration("completed")?;
        target.wait_migration("completed")?;
    }
    Ok(())
}

fn dead_socket() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("incoming");
    let uri = format!("unix:{}", path.display());
    // What a process that was killed leaves behind.
    drop(UnixListener::bind(&path)?);
    for _ in 0..2 {
        let (mut source, mut target) = pair()?;
        target.listen_on(&uri)?;
        let (_, mut other) = pair()?;
        let refused = other.qmp.refused("migrate-incoming", json!({"uri": uri}))?;
        assert!(refused.desc.contains("is in use"), "{}", refused.desc);
        source.migrate(&uri)?;
        target.wait_migration("completed")?;
        assert!(!path.exists(), "the socket's name stays behind");
    }
    fs::write(&path, "precious")?;
    let (_, mut target) = pair()?;
    let refused = target
        .qmp
        .refused("migrate-incoming", json!({"uri": uri}))?;
    assert!(refused.desc.contains("no socket"), "{}", refused.desc);
    assert_eq!(fs::read(&path)?, b"precious");
    Ok(())
}

fn channels(address: &Value) -> Value {
    json!({"channels": [{"channel-type": "main", "addr": address}], "exit-on-error": false})
}

fn options() -> Result<()> {
    let (mut source, mut target) = pair()?;
    let inet = |more: &[(&str, Value)]| {
        let mut address = json!({
            "transport": "socket", "type": "inet", "host": "127.0.0.1", "port": "0"
        });
        for (name, value) in more {
            address[name] = value.clone();
        }
        address
    };
    for (address, why) in [
        (
            inet(&[("ipv6", json!(true))]),
            "'127.0.0.1' has no IPv6 address",
        ),
        (inet(&[("keep-alive-idle", json!(3))]), "'keep-alive-idle'"),
        (
            json!({"transport": "socket", "type": "unix", "path": "/nowhere", "tight": true}),
            "'tight'",
        ),
    ] {
        let refused = target.qmp.refused("migrate-incoming", channels(&address))?;
        assert!(refused.desc.contains(why), "{}", refused.desc);
    }
    let name = format!("colo-addresses-{}", std::process::id());
    let address = json!({
        "transport": "socket", "type": "unix", "path": name, "abstract": true, "tight": false
    });
    target.qmp.execute("migrate-incoming", channels(&address))?;
    let to = json!({"channels": [{"channel-type": "main", "addr": inet(&[("to", json!(9))])}]});
    let refused = source.qmp.refused("migrate", to)?;
    assert!(refused.desc.contains("'to'"), "{}", refused.desc);
    let to = json!({"channels": [{"channel-type": "main", "addr": address}]});
    source.qmp.execute("migrate", to)?;
    target.wait_migration("completed")?;
    Ok(())
}
