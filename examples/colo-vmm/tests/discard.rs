//! RAM discard (ballooning) and COLO exclude each other, from `migrate-incoming` on.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::sync::Arc;

use colo_vmm::console::Console;
use colo_vmm::machine::{CpuOptions, MachineConfig, SimMachine};
use colo_vmm::memory::Memory;
use colo_vmm::migration::{IncomingMode, Migration, MigrationOptions};
use colo_vmm::operator::EventBus;
use colo_vmm::vm::Vm;
use qmp_types::{MigrationAddress, MigrationCapability, MigrationCapabilityStatus, RunState};
use ram_cache::CacheKind;

fn waiting_for_colo() -> Arc<Migration> {
    waiting_with(CacheKind::Cow)
}

fn waiting_with(ram_cache: CacheKind) -> Arc<Migration> {
    let console = Console::new(Box::new(std::io::sink()));
    let machine = SimMachine::new(MachineConfig {
        memory: Arc::new(Memory::new(16 << 20).unwrap()),
        vcpus: 1,
        guest: None,
        serial: console.sink(),
        cpu: CpuOptions::default(),
    })
    .unwrap();
    let events = Arc::new(EventBus::new());
    let vm = Arc::new(Vm::new(Box::new(machine), RunState::InMigrate, events));
    let options = MigrationOptions {
        ram_cache,
        ..MigrationOptions::default()
    };
    let migration = Migration::new(vm, console, IncomingMode::Deferred, options, || {}).unwrap();
    let on = [MigrationCapability::ReturnPath, MigrationCapability::XColo].map(|capability| {
        MigrationCapabilityStatus {
            capability,
            state: true,
        }
    });
    migration.settings().set_capabilities(&on).unwrap();
    migration
}

fn anywhere() -> MigrationAddress {
    "tcp:127.0.0.1:0".parse().unwrap()
}

#[test]
fn a_device_that_discards_ram_is_an_error_of_migrate_incoming_which_may_be_tried_again() {
    let migration = waiting_for_colo();
    let balloon = migration.discard().require().unwrap();
    let refused = migration.start_incoming(&anywhere(), false).unwrap_err();
    assert!(refused.desc.contains("discard"), "{}", refused.desc);
    assert_eq!(migration.status().get(), None);
    drop(balloon);
    migration.start_incoming(&anywhere(), false).unwrap();
    migration.end();
}

#[test]
fn ram_is_not_discarded_from_migrate_incoming_until_the_cache_is_gone() {
    for cache in [CacheKind::Mirror, CacheKind::Cow] {
        let migration = waiting_with(cache);
        assert!(migration.discard().allowed());
        migration.start_incoming(&anywhere(), false).unwrap();
        assert!(!migration.discard().allowed());
        assert!(migration.discard().require().is_err());
        migration.end();
        // What a cow cache has made of RAM stays: discarding a page would show the checkpoint's.
        assert_eq!(migration.discard().allowed(), cache == CacheKind::Mirror);
    }
}
