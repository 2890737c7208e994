//! The target: listen, take a guest in, and go on as the COLO secondary.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use colo_core::driver::{SecondaryLink, run_secondary};
use colo_core::{ColoStore, MigrationPlan, Role};
use migration_net::incoming::{Acceptor, Incoming, IncomingError, Limits};
use migration_net::{Address, Listener};
use migration_stream::precopy::{Arrived, Target, TargetConfig, TargetError};
use migration_stream::{
    BoxError, ConfigurationRule, DecoderConfig, DeviceSections, DeviceState, GuestRamMmap,
    PageStore, Parsed, SectionHeader, StreamReader,
};
use multifd::{IncomingPages, MultifdConfig, RecvChannel, RecvSet};
use qmp_types::{MigrationStatus, RunState, SocketAddress};
use ram_cache::{FlushPool, Populate};
use vmstate::{ResetDone, Staged, VmState};

use super::address::qmp_addresses;
use super::devices::{Devices, Section};
use super::{Cancel, Migration, colo, failed};
use crate::devices::CpuModelState;
use crate::memory::populated;

/// How often a cancel is looked for while guest RAM is taken from the system.
const POPULATE_POLL: Duration = Duration::from_millis(10);

/// What `migrate-incoming` has made before it returns.
pub(super) struct Prepared {
    acceptor: Acceptor,
    listening: Vec<SocketAddress>,
    multifd: Option<MultifdConfig>,
    store: Store,
    /// Guest RAM is taken from the system meanwhile.
    populate: Option<Populate>,
}

/// Where pages land.
enum Store {
    /// In the guest, which does not run before all are there.
    Guest(Arc<GuestRamMmap>),
    /// In cache and guest.
    Colo(Box<ColoStore>),
}

impl Prepared {
    /// All addresses it listens on, with the port that the kernel chose.
    pub(super) fn listening(&self) -> &[SocketAddress] {
        &self.listening
    }
}

/// Binds the address, and makes the RAM cache if there is to be one: what fails here fails the
/// command, and nothing has changed.
pub(super) fn prepare(
    migration: &Migration,
    plan: &MigrationPlan,
    multifd: Option<MultifdConfig>,
    address: &Address,
) -> Result<Prepared, BoxError> {
    let memory = migration.vm.memory();
    let store = if plan.migrate_colo() {
        Store::Colo(Box::new(ColoStore::over(
            migration.options.ram_cache,
            memory.ram(),
            migration.discard.disable()?,
        )?))
    } else {
        Store::Guest(Arc::clone(memory.ram()))
    };
    let listener = Listener::bind(address)?;
    let listening = qmp_addresses(&listener);
    let limits = Limits::default()
        .complete(migration.options.io_limit)
        .channel(migration.options.io_limit);
    let acceptor = Acceptor::new(listener, multifd.as_ref(), limits)?
        .on_refused(|refusal| tracing::warn!(%refusal, "connection refused"));
    // A cache would replace what was populated, or be as large again.
    let populate = (migration.options.prealloc && !plan.migrate_colo())
        .then(|| memory.populate())
        .transpose()?;
    Ok(Prepared {
        acceptor,
        listening,
        multifd,
        store,
        populate,
    })
}

/// Takes a guest in; false if that failed.
pub(super) fn run(
    migration: &Arc<Migration>,
    plan: &MigrationPlan,
    prepared: Prepared,
    cancel: &Cancel,
) -> bool {
    let result = accept_and_load(migration, plan, prepared, cancel);
    if let Err(error) = &result {
        failed(migration, cancel, &**error);
    }
    result.is_ok()
}

fn accept_and_load(
    migration: &Arc<Migration>,
    plan: &MigrationPlan,
    prepared: Prepared,
    cancel: &Cancel,
) -> Result<(), BoxError> {
    let Prepared {
        mut acceptor,
        multifd,
        store,
        populate,
        ..
    } = prepared;
    let incoming = accept(migration, &mut acceptor, cancel)?;
    // Nobody else is taken in: the address is free again.
    drop(acceptor);
    migration.connections.add(&incoming.main);
    incoming
        .channels
        .iter()
        .for_each(|channel| migration.connections.add(channel));
    migration.options.boundaries.reach("connected");
    // Those that were turned away before do not matter any more.
    migration.status.clear_error();
    migration.status.set(MigrationStatus::Active);
    match store {
        Store::Guest(memory) => {
            let arrived = load(migration, plan, incoming, multifd.as_ref(), memory, cancel)?;
            if let Some(populate) = populate {
                while !populate.has_ended() {
                    cancel.token().check()?;
                    thread::sleep(POPULATE_POLL);
                }
                populated(populate)?;
            }
            complete(migration, arrived)
        }
        Store::Colo(store) => {
            let arrived = load(migration, plan, incoming, multifd.as_ref(), *store, cancel)?;
            enter_colo(migration, arrived)
        }
    }
}

/// Waits for all connections of a source. Peers that do not make up one are turned away, and
/// waiting goes on.
fn accept(
    migration: &Migration,
    acceptor: &mut Acceptor,
    cancel: &Cancel,
) -> Result<Incoming, IncomingError> {
    loop {
        match acceptor.accept(Some(cancel.token())) {
            Err(error) if error.is_of_the_source() => {
                migration.status.note_error(super::chain(&error));
            }
            other => return other,
        }
    }
}

fn load<S: PageStore + 'static>(
    migration: &Migration,
    plan: &MigrationPlan,
    incoming: Incoming,
    multifd: Option<&MultifdConfig>,
    store: S,
    cancel: &Cancel,
) -> Result<Arrived<IncomingPages<S>, Staged>, BoxError> {
    let Incoming {
        main,
        prefix,
        channels,
        ..
    } = incoming;
    let pages = match multifd {
        None => IncomingPages::plain(store),
        Some(config) => {
            let channels = channels.into_iter().map(RecvChannel::from).collect();
            // The loader of the main stream notices at once when a channel breaks.
            let connections = migration.connections.clone();
            IncomingPages::multifd(RecvSet::start(store, channels, config, move |error| {
                connections.stop_reading_for(super::chain(error));
            })?)
        }
    };
    let rule = ConfigurationRule::Matching(migration.configuration(true)?);
    let config = TargetConfig::new(DecoderConfig::new(rule).xbzrle(plan.xbzrle()))
        .max_devices(migration.options.max_device_state);
    let mut reader = StreamReader::new(main.share(), &prefix);
    reader.set_cancel(cancel.token());
    // A source that opens a return path is answered, whatever was set here, as by QEMU.
    let return_path = Some(Box::new(main.share()) as _);
    let mut incoming = IncomingDevices::new(migration);
    let arrived = Target::new(config, reader, return_path, pages.store())
        .confirming_before_it_runs()
        .load(pages, &mut incoming)
        .map_err(named)?;
    incoming.warn_if_not_compared();
    migration.options.boundaries.reach("stream loaded");
    Ok(arrived)
}

/// The error, with the option that would avoid it, if there is one.
fn named(error: TargetError) -> BoxError {
    match error {
        TargetError::DeviceTooLong { .. } => {
            format!("{error}: a larger --max-device-state takes it").into()
        }
        error => error.into(),
    }
}

/// The devices of a VM whose guest is arriving.
struct IncomingDevices<'a> {
    migration: &'a Migration,
    devices: Devices<'a>,
    /// How many device sections have begun.
    seen: u32,
    /// The source has said what CPU its guest has.
    compared: bool,
}

impl<'a> IncomingDevices<'a> {
    fn new(migration: &'a Migration) -> Self {
        Self {
            migration,
            devices: Devices(&migration.vm),
            seen: 0,
            compared: false,
        }
    }

    /// Says that nothing was compared, if there was something to compare with.
    fn warn_if_not_compared(&self) {
        let compares = (self.migration.vm).with_machine(|machine| machine.compares());
        if compares && !self.compared {
            tracing::warn!(
                "the source does not say what cpu its guest has: that it is like this host's was not \
                 compared"
            );
        }
    }
}

impl DeviceState for IncomingDevices<'_> {
    type Section = Section;
    type Staged = Staged;
    type Reset = ResetDone;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.devices.save(out)
    }

    fn parse(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Parsed<Section>, BoxError> {
        if header.idstr.as_str() != CpuModelState::NAME && self.seen < 2 {
            self.migration.options.boundaries.reach("device section");
        }
        let parsed = self.devices.parse(header, body)?;
        match &parsed {
            Parsed::Section(Section::Compared, _) => self.compared = true,
            Parsed::Section(Section::Device(_), _) => self.seen += 1,
            Parsed::NeedMore => {}
        }
        Ok(parsed)
    }

    fn stage(&mut self, sections: Vec<Section>) -> Result<Staged, BoxError> {
        self.devices.stage(sections)
    }

    fn reset(&mut self, staged: Staged) -> Result<ResetDone, BoxError> {
        self.devices.reset(staged)
    }

    fn install(&mut self, reset: ResetDone) -> Result<(), BoxError> {
        self.devices.install(reset)
    }
}

/// A plain migration is at its end: the guest is ours once the source is told. What can fail comes
/// before.
fn complete(
    migration: &Migration,
    arrived: Arrived<IncomingPages<Arc<GuestRamMmap>>, Staged>,
) -> Result<(), BoxError> {
    let settled = arrived.settle(&mut Devices(&migration.vm))?;
    migration.options.boundaries.reach("to confirm");
    settled.confirm()?;
    migration.options.boundaries.reach("confirmed");
    migration.connections.clear();
    if let Err(error) = migration.vm.arrived(ran(migration)) {
        // The source has given the guest away: it is here, whatever state it is in.
        let error = format!(
            "the guest has arrived and does not run: {}",
            super::chain(&error)
        );
        migration.status.note_error(error);
    }
    migration.status.set(MigrationStatus::Completed);
    Ok(())
}

/// Goes on as the secondary, from the moment at which the source is told. What can fail comes before.
fn enter_colo(
    migration: &Arc<Migration>,
    arrived: Arrived<IncomingPages<ColoStore>, Staged>,
) -> Result<(), BoxError> {
    let settled = arrived.settle_for_checkpoints(&mut Devices(&migration.vm))?;
    let log = migration.vm.with_machine(|machine| machine.dirty_log());
    let pool = FlushPool::for_this_host()?;
    let control = colo::control(migration, Role::Secondary)?;
    migration.options.boundaries.reach("to confirm");
    let confirmed = match settled.confirm() {
        Ok(confirmed) => confirmed,
        Err(error) => {
            super::lock(&migration.job).colo = None;
            return Err(error.into());
        }
    };
    migration.options.boundaries.reach("confirmed");
    let link = SecondaryLink::new(confirmed, log, pool);
    // From here on nothing ends this side but COLO's own end, which is reported.
    migration.status.set(MigrationStatus::Colo);
    migration.vm.arrived_for_checkpoints(ran(migration));
    let mut parts = colo::parts(migration, Role::Secondary);
    let outcome = run_secondary(link, &mut parts, &control, colo::config(migration))?;
    colo::finish(migration, outcome);
    Ok(())
}

/// Whether the guest ran where it comes from.
fn ran(migration: &Migration) -> bool {
    migration.global_state.get() == RunState::Running
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_too_long_is_named_with_the_option_that_takes_it() {
        let error = named(TargetError::DeviceTooLong {
            idstr: "cpu".to_owned(),
            instance: 0,
            offset: 7,
            max: 1 << 20,
        });
        let error = error.to_string();
        assert!(
            error.contains("'cpu'") && error.contains("1048576"),
            "{error}"
        );
        assert!(
            error.ends_with("a larger --max-device-state takes it"),
            "{error}"
        );
        let other = named(TargetError::SourceGone { offset: 7 });
        assert!(!other.to_string().contains("--max-device-state"));
    }
}
