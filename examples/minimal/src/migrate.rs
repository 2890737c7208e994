//! Live migration: to another process, by channels or without, and to a file and back.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use migration_net::{Address, Destination, Origin, Route};
use migration_stream::precopy::SwitchedOver;
use migration_stream::{BoxError, KvmDirtyLog, MachineName, PageTransport, VmControl};
use multifd::{ChannelCount, MultifdConfig};

use crate::machine::Machine;

// ANCHOR: route
/// How guests of this VMM migrate: by `channels` channels, or none.
pub fn route(channels: u8) -> Result<Route, BoxError> {
    let multifd = ChannelCount::new(channels).map(MultifdConfig::new);
    let route = Route::new(MachineName::new("minimal-1")?).multifd(multifd);
    Ok(route.patience(Duration::from_secs(10)))
}
// ANCHOR_END: route

/// What is left of the source when the guest has gone.
pub type Gone = SwitchedOver<Box<dyn PageTransport>, KvmDirtyLog>;

// ANCHOR: send
/// Sends the running guest. If this fails the guest runs on.
fn send(
    route: &Route,
    machine: &mut Machine,
    log: KvmDirtyLog,
    to: impl Into<Destination>,
) -> Result<Gone, BoxError> {
    let source = route.source(to, machine.ram.clone(), log, &mut machine.vm)?;
    Ok(source.run(&mut machine.vm).completed()?)
}
// ANCHOR_END: send

// ANCHOR: away
/// Sends the running guest to the process at `address`.
pub fn away(
    route: &Route,
    machine: &mut Machine,
    log: KvmDirtyLog,
    address: &Address,
) -> Result<Gone, BoxError> {
    send(route, machine, log, route.connect(address)?)
}
// ANCHOR_END: away

// ANCHOR: save
/// Writes the running guest into a file.
pub fn save(
    route: &Route,
    machine: &mut Machine,
    log: KvmDirtyLog,
    path: &str,
) -> Result<(), BoxError> {
    let file = Arc::new(File::create(path)?);
    send(route, machine, log, Arc::clone(&file))?;
    Ok(file.sync_all()?)
}
// ANCHOR_END: save

// ANCHOR: here
/// Receives a guest, and runs it.
pub fn receive(
    route: &Route,
    machine: &mut Machine,
    from: impl Into<Origin>,
) -> Result<(), BoxError> {
    let arrived = route.receive(from, machine.ram.clone(), &mut machine.vm)?;
    arrived.settle(&mut machine.vm)?.confirm()?;
    machine.vm.resume()?;
    Ok(())
}
// ANCHOR_END: here
