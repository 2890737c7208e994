//! Peers that are not there, say nothing or die, and operators who do not wait for them.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use serde_json::{Value, json};
use tests::Result;
use tests::vmm::{ColoVmm, Connection, Pair, Vmm};

use crate::{
    AT_ONCE, COLO, connect, is_closed, listening, migrates_to, runs_on, says, silent_listener,
    source, target,
};

/// A connection, on whose port nobody listens: nobody else is given it as long as both ends live.
fn connection() -> Result<(TcpStream, TcpListener)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok((TcpStream::connect(listener.local_addr()?)?, listener))
}

pub fn nobody_listens() -> Result<()> {
    let mut vmm = source().start()?;
    vmm.qmp.enable(&["return-path", "x-colo", "events"])?;
    let (taken, _other_end) = connection()?;
    let port = taken.local_addr()?.port();
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
    let (_target, uri) = listening()?;
    vmm.migrate(&uri)?;
    vmm.wait_migration("colo")?;
    Ok(())
}

pub fn silent_target() -> Result<()> {
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

/// A pair whose migration has begun, slow enough to be caught on the way.
fn on_its_way(connection: Connection) -> Result<Pair> {
    let guest = ColoVmm::new("colo-vmm").simulated();
    let mut pair = Pair::start(&guest, connection, COLO)?;
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 1 << 20}))?;
    pair.migrate(connection)?;
    Ok(pair)
}

/// Cancels a migration, which ends at once.
fn cancelled(vmm: &mut Vmm) -> Result<()> {
    let since = Instant::now();
    vmm.qmp.execute("migrate_cancel", Value::Null)?;
    vmm.poll("cancelled migration", |vmm| {
        Ok((vmm.migration()?["status"] == "cancelled").then_some(()))
    })?;
    // Half as long as a source has for its connections.
    assert!(since.elapsed() < AT_ONCE / 2);
    Ok(())
}

pub fn killed_target() -> Result<()> {
    let mut pair = on_its_way(Connection::channels(2))?;
    pair.primary.wait_migration("active")?;
    pair.secondary.process.kill()?;
    let error = pair.primary.wait_failure()?;
    assert!(!error.is_empty());
    runs_on(&mut pair.primary)
}

pub fn killed_source() -> Result<()> {
    let mut pair = on_its_way(Connection::channels(2))?;
    pair.secondary.wait_migration("active")?;
    pair.primary.process.kill()?;
    // Whichever of its connections is seen to have ended first.
    let error = pair.secondary.wait_failure()?;
    assert!(
        error.contains("stream") || error.contains("channel"),
        "{error}"
    );
    assert_eq!(pair.secondary.status()?, "inmigrate");
    Ok(())
}

pub fn cancel() -> Result<()> {
    for connection in [Connection::default(), Connection::channels(2)] {
        let mut pair = on_its_way(connection)?;
        // Before that the target has only some of the connections, and waits for another source
        // when those are closed.
        pair.secondary.wait_migration("active")?;
        cancelled(&mut pair.primary)?;
        runs_on(&mut pair.primary)?;
        pair.secondary.wait_failure()?;
    }
    Ok(())
}

pub fn cancel_silent() -> Result<()> {
    let (_listener, uri) = silent_listener()?;
    let mut vmm = source().start()?;
    vmm.qmp.enable(&["return-path"])?;
    vmm.migrate(&uri)?;
    vmm.wait_migration("active")
        .or_else(|_| vmm.wait_migration("device"))?;
    cancelled(&mut vmm)?;
    runs_on(&mut vmm)
}

/// A host that drops every SYN, and a unix socket whose backlog is full.
pub fn cancel_connecting() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    rustix::net::listen(&listener, 0)?;
    let _first = TcpStream::connect(listener.local_addr()?)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("full");
    let full = UnixListener::bind(&path)?;
    rustix::net::listen(&full, 0)?;
    let _first = UnixStream::connect(&path)?;
    let mut vmm = source().start()?;
    for uri in [
        format!("tcp:{}", listener.local_addr()?),
        format!("unix:{}", path.display()),
    ] {
        vmm.migrate(&uri)?;
        vmm.wait_migration("setup")?;
        cancelled(&mut vmm)?;
        runs_on(&mut vmm)?;
    }
    // Nothing is left of it: whoever listens is migrated to.
    vmm.qmp.enable(COLO)?;
    let (_target, uri) = listening()?;
    vmm.migrate(&uri)?;
    vmm.wait_migration("colo")?;
    Ok(())
}

/// A target that waits for a source, for the rest of its connections, or for the rest of its guest.
pub fn cancel_incoming() -> Result<()> {
    for multifd in [false, true] {
        let mut target = target().args(["--peer-timeout", "60000"]).start()?;
        target.qmp.enable(COLO)?;
        if multifd {
            target.qmp.enable(&["multifd"])?;
        }
        target.listen()?;
        cancelled(&mut target)?;
        let uri = again(&mut target)?;
        let mut source = connect(&uri)?;
        source.write_all(b"QEVM")?;
        if !multifd {
            target.wait_migration("active")?;
        }
        cancelled(&mut target)?;
        assert!(is_closed(&mut source)?);
        assert_eq!(target.status()?, "inmigrate");
        if !multifd {
            let uri = again(&mut target)?;
            migrates_to(&mut target, &uri)?;
        }
    }
    Ok(())
}

/// Listens once more, when the last migration's thread has ended.
fn again(target: &mut Vmm) -> Result<String> {
    target.poll("a second migrate-incoming", |target| {
        Ok(target.listen().ok())
    })
}

pub fn quit_incoming() -> Result<()> {
    for greeting in [&b""[..], b"QEVM"] {
        let mut target = target().args(["--peer-timeout", "60000"]).start()?;
        target.qmp.enable(COLO)?;
        let uri = target.listen()?;
        let mut source = connect(&uri)?;
        source.write_all(greeting)?;
        if !greeting.is_empty() {
            target.wait_migration("active")?;
        }
        let since = Instant::now();
        target.qmp.execute("quit", Value::Null)?;
        assert!(target.process.wait()?.success());
        assert!(since.elapsed() < AT_ONCE);
    }
    Ok(())
}
