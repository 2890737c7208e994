//! Commands that cannot be carried out: unknown, out of range, at the wrong time, without the means.

use std::process::Command as Program;

use serde_json::{Value, json};
use tests::Result;
use tests::vmm::Vmm;

use crate::{COLO, migrates_to, runs_on, says, silent_listener, source, target};

pub fn capabilities() -> Result<()> {
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
    vmm.qmp.enable(COLO)?;
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

pub fn parameters() -> Result<()> {
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

pub fn wrong_time() -> Result<()> {
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

pub fn addresses() -> Result<()> {
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

pub fn twice() -> Result<()> {
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

pub fn busy_port() -> Result<()> {
    let (_listener, uri) = silent_listener()?;
    let mut target = target().start()?;
    target.qmp.enable(COLO)?;
    let refusal = target
        .qmp
        .refused("migrate-incoming", json!({"uri": uri}))?;
    says(&refusal.desc, &["migrate-incoming", "in use", &uri[4..]]);
    assert_eq!(target.migration()?["status"], Value::Null);
    let uri = target.listen()?;
    migrates_to(&mut target, &uri)?;
    Ok(())
}

/// Room for guest memory, not for a second copy of it.
pub fn no_memory() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run = target().memory(3000).command(dir.path())?;
    let mut shell = Program::new("sh");
    shell.args(["-c", "ulimit -v 4500000 && exec \"$0\" \"$@\""]);
    shell.arg(run.get_program()).args(run.get_args());
    let mut target = Vmm::start("target", shell, dir)?;
    target.qmp.enable(COLO)?;
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
