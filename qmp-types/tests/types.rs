//! Types and JSON: samples of QEMU 11.1.3, and what is written is read as the same.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a crate of its own"
)]

use proptest::prelude::*;
use qmp_types::yank::YankInstance;
use qmp_types::{
    Client, ColoExitReason, ColoFigures, ColoMode, ColoStatus, Command, CommandKind, Event,
    EventMessage, InetSocketAddress, MigrateIncoming, MigrateSetParameters, MigrationAddress,
    MigrationCapability, MigrationCapabilityStatus, MigrationInfo, MigrationStatus,
    MultiFdCompression, Parameters, QmpCapability, RunState, ServerMessage, Session, SessionConfig,
    SocketAddress, StatusInfo, VersionInfo, ZeroPageDetection,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn identical<T: Serialize + DeserializeOwned>(sample: &Value) -> T {
    let value: T = serde_json::from_value(sample.clone()).unwrap();
    assert_eq!(&serde_json::to_value(&value).unwrap(), sample);
    value
}

#[test]
fn samples_of_qemu_are_read_and_written_unchanged() {
    let info: MigrationInfo = identical(&json!({
        "status": "setup",
        "socket-address": [{"port": "34291", "ipv4": true, "host": "127.0.0.1", "type": "inet"}]
    }));
    assert_eq!(info.status, Some(MigrationStatus::Setup));
    identical::<MigrationInfo>(&json!({"status": "failed", "error-desc": "no route"}));
    identical::<MigrationInfo>(&json!({}));
    identical::<MigrationInfo>(&json!({
        "status": "active", "total-time": 5, "expected-downtime": 300, "setup-time": 1,
        "remaining": 4096,
        "ram": {
            "transferred": 1, "remaining": 2, "total": 3, "duplicate": 4, "normal": 5,
            "normal-bytes": 6, "dirty-pages-rate": 7, "mbps": 8.5, "dirty-sync-count": 9,
            "postcopy-requests": 0, "page-size": 4096, "multifd-bytes": 10,
            "pages-per-second": 11, "precopy-bytes": 12, "downtime-bytes": 13,
            "postcopy-bytes": 0, "dirty-sync-missed-zero-copy": 0
        }
    }));
    let colo: ColoStatus =
        identical(&json!({"last-mode": "none", "mode": "primary", "reason": "processing"}));
    assert_eq!(colo.mode, ColoMode::Primary);
    identical::<StatusInfo>(&json!({"status": "prelaunch", "running": false}));
    identical::<VersionInfo>(&json!({
        "qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "x"
    }));
    identical::<Vec<YankInstance>>(&json!([
        {"type": "migration"}, {"type": "chardev", "id": "c"},
        {"type": "block-node", "node-name": "n"}
    ]));
    identical::<MigrationAddress>(&json!({
        "transport": "socket", "type": "inet", "host": "h", "port": "1", "keep-alive": true
    }));
    identical::<MigrationAddress>(&json!({
        "transport": "socket", "type": "unix", "path": "/x", "abstract": true
    }));
    identical::<MigrationAddress>(&json!({"transport": "socket", "type": "fd", "str": "7"}));
    identical::<MigrationAddress>(&json!({"transport": "exec", "args": ["a"]}));
    identical::<MigrationAddress>(&json!({"transport": "file", "filename": "f", "offset": 0}));
    identical::<MigrationAddress>(&json!({"transport": "rdma", "host": "h", "port": "1"}));
    identical::<MigrationCapabilityStatus>(&json!({"state": false, "capability": "x-colo"}));
}

#[test]
fn events_are_spelled_as_in_the_schema() {
    for (event, sample) in [
        (Event::Stop, json!({"event": "STOP"})),
        (Event::Resume, json!({"event": "RESUME"})),
        (
            Event::Migration {
                status: MigrationStatus::Colo,
            },
            json!({"event": "MIGRATION", "data": {"status": "colo"}}),
        ),
        (
            Event::MigrationPass { pass: 2 },
            json!({"event": "MIGRATION_PASS", "data": {"pass": 2}}),
        ),
        (
            Event::ColoExit {
                mode: ColoMode::Primary,
                reason: ColoExitReason::Request,
            },
            json!({"event": "COLO_EXIT", "data": {"mode": "primary", "reason": "request"}}),
        ),
        (
            serde_json::from_value(
                json!({"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}),
            )
            .unwrap(),
            json!({"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}),
        ),
    ] {
        assert_eq!(identical::<Event>(&sample), event);
        let mut message = sample;
        message["timestamp"] = json!({"seconds": 1, "microseconds": 2});
        assert_eq!(identical::<EventMessage>(&message).known(), Some(event));
    }
}

#[test]
fn the_event_of_a_checkpoint_is_marked_as_an_extension() {
    let mut sample = json!({"event": "X_COLO_CHECKPOINT", "data": {
        "mode": "primary", "checkpoint": 1, "pause-us": 9_000, "transfer-us": 700,
        "loaded-us": 900, "ahead-pages": 3, "compared-pages": 5, "unchanged-pages": 4, "ram-bytes": 8192, "dirty-pages": 2, "flushed-pages": 0, "device-bytes": 700, "serial-bytes": 12,
        "steps": [{"step": "save-devices", "us": 400}, {"step": "send", "us": 500}],
    }});
    let Event::ColoCheckpoint(checkpoint) = identical(&sample) else {
        panic!("a checkpoint");
    };
    assert_eq!((checkpoint.checkpoint, checkpoint.ram_hash), (1, None));
    sample["data"]["ram-hash"] = json!("0123456789abcdef");
    sample["data"]["device-hash"] = json!("fedcba9876543210");
    identical::<Event>(&sample);
}

#[test]
fn how_much_is_sent_between_checkpoints_is_a_number_of_bytes() {
    let parse = |arguments: Value| {
        let arguments = arguments.as_object().unwrap().clone();
        Command::parse(CommandKind::XSetColoGapBandwidth, arguments)
    };
    let command = Command::XSetColoGapBandwidth { bandwidth: 1 << 40 };
    assert_eq!(
        parse(json!({"bandwidth": 1_u64 << 40})),
        Ok(command.clone())
    );
    assert_eq!(command.kind().name(), "x-set-colo-gap-bandwidth");
    for (arguments, text) in [
        (json!({}), "Parameter 'bandwidth' is missing"),
        (
            json!({"bandwidth": "64M"}),
            "Parameter 'bandwidth' expects uint64",
        ),
        (
            json!({"bandwidth": -1}),
            "Parameter 'bandwidth' expects uint64",
        ),
        (
            json!({"bandwidth": 0, "unit": "MiB"}),
            "Parameter 'unit' is unexpected",
        ),
    ] {
        assert_eq!(parse(arguments).unwrap_err().desc, text);
    }
    let mut sample = json!({"checkpoints": 2, "total-pause-us": 300});
    assert_eq!(identical::<ColoFigures>(&sample).gap_bandwidth, None);
    sample["gap-bandwidth"] = json!(0);
    assert_eq!(identical::<ColoFigures>(&sample).gap_bandwidth, Some(0));
}

#[test]
fn an_event_of_another_command_set_is_handed_on_by_name() {
    let mut client = Client::new();
    client.feed(br#"{"timestamp":{"seconds":1,"microseconds":2},"event":"JOB","data":{"id":"j"}}"#);
    let Some(Ok(ServerMessage::Event(message))) = client.poll() else {
        panic!("an event");
    };
    assert_eq!(message.event, "JOB");
    assert_eq!(message.known(), None);
}

#[test]
fn parameters_have_qemus_names_and_defaults() {
    let defaults = serde_json::to_value(Parameters::default()).unwrap();
    assert_eq!(
        defaults,
        json!({
            "cpu-throttle-tailslow": false, "xbzrle-cache-size": 67_108_864,
            "cpu-throttle-initial": 20, "announce-max": 550, "direct-io": false,
            "avail-switchover-bandwidth": 0, "zero-page-detection": "multifd",
            "multifd-qatzip-level": 1, "x-rdma-chunk-size": 1_048_576, "multifd-channels": 2,
            "mode": "normal", "multifd-zstd-level": 1, "announce-initial": 50,
            "downtime-limit": 300, "tls-authz": "", "cpr-exec-command": [],
            "vcpu-dirty-limit": 1, "multifd-compression": "none", "announce-rounds": 5,
            "announce-step": 100, "tls-creds": "", "x-vcpu-dirty-limit-period": 1000,
            "multifd-zlib-level": 1, "max-cpu-throttle": 99, "max-postcopy-bandwidth": 0,
            "tls-hostname": "", "throttle-trigger-threshold": 50, "max-bandwidth": 134_217_728,
            "x-checkpoint-delay": 20000, "cpu-throttle-increment": 10
        })
    );
    // A QEMU that lacks a parameter has it at its default.
    assert_eq!(
        serde_json::from_value::<Parameters>(json!({"x-checkpoint-delay": 5})).unwrap(),
        Parameters {
            x_checkpoint_delay: 5,
            ..Parameters::default()
        }
    );
}

#[test]
fn only_a_running_vm_is_told_to_be_running() {
    for &state in RunState::ALL {
        let info = StatusInfo::from(state);
        assert_eq!(info.running, state == RunState::Running);
        assert_eq!(RunState::from_name(state.name()), Some(state));
    }
}

fn address() -> impl Strategy<Value = MigrationAddress> {
    let inet = || {
        (
            "[a-z0-9.:,=\\]]{0,70}",
            "[a-z0-9,:]{0,6}",
            any::<Option<bool>>(),
            any::<Option<u16>>(),
            any::<Option<u32>>(),
        )
            .prop_map(
                |(host, port, ipv4, to, keep_alive_count)| InetSocketAddress {
                    ipv4,
                    to,
                    keep_alive_count,
                    ..InetSocketAddress::new(host, port)
                },
            )
    };
    prop_oneof![
        inet().prop_map(|inet| MigrationAddress::Socket(SocketAddress::Inet(inet))),
        inet().prop_map(MigrationAddress::Rdma),
        ".{0,20}".prop_map(|path| MigrationAddress::Socket(SocketAddress::unix(path))),
        (".{0,5}", ".{0,5}").prop_map(|(cid, port)| {
            MigrationAddress::Socket(SocketAddress::Vsock { cid, port })
        }),
        prop::collection::vec(".{0,9}", 0..4).prop_map(|args| MigrationAddress::Exec { args }),
        (".{0,9}(,offset=5)?", any::<u64>())
            .prop_map(|(filename, offset)| MigrationAddress::File { filename, offset }),
    ]
}

fn changes() -> impl Strategy<Value = MigrateSetParameters> {
    (
        any::<Option<u8>>(),
        any::<Option<u64>>(),
        any::<Option<u32>>(),
        prop::option::of(prop::sample::select(MultiFdCompression::ALL)),
        prop::option::of(prop::sample::select(ZeroPageDetection::ALL)),
        prop::option::of(prop::collection::vec(".{0,9}", 0..3)),
    )
        .prop_map(|(channels, bandwidth, delay, compression, zero, command)| {
            MigrateSetParameters {
                multifd_channels: channels,
                max_bandwidth: bandwidth,
                x_checkpoint_delay: delay,
                multifd_compression: compression,
                zero_page_detection: zero,
                cpr_exec_command: command,
                ..MigrateSetParameters::default()
            }
        })
}

fn command() -> impl Strategy<Value = Command> {
    let statuses = prop::collection::vec(
        (
            prop::sample::select(MigrationCapability::ALL),
            any::<bool>(),
        )
            .prop_map(|(capability, state)| MigrationCapabilityStatus { capability, state }),
        0..5,
    );
    let instances = prop::collection::vec(
        prop_oneof![
            Just(YankInstance::Migration),
            ".{0,9}".prop_map(|id| YankInstance::Chardev { id }),
            ".{0,9}".prop_map(|node_name| YankInstance::BlockNode { node_name }),
        ],
        0..4,
    );
    prop_oneof![
        Just(Command::QueryStatus),
        Just(Command::XColoLostHeartbeat),
        any::<u64>().prop_map(|bandwidth| Command::XSetColoGapBandwidth { bandwidth }),
        (address(), any::<bool>()).prop_map(|(address, resume)| {
            Command::Migrate(qmp_types::Migrate { address, resume })
        }),
        (address(), any::<bool>()).prop_map(|(address, exit_on_error)| {
            Command::MigrateIncoming(MigrateIncoming {
                address,
                exit_on_error,
            })
        }),
        statuses.prop_map(|capabilities| Command::MigrateSetCapabilities { capabilities }),
        changes().prop_map(|changes| Command::MigrateSetParameters(Box::new(changes))),
        instances.prop_map(|instances| Command::Yank { instances }),
    ]
}

proptest! {
    #[test]
    fn a_command_reaches_the_server_as_the_client_meant_it(command in command()) {
        let mut session = Session::new(SessionConfig {
            version: VersionInfo::new(11, 1, 3, "test"),
            oob: true,
            commands: CommandKind::ALL,
        });
        let mut client = Client::new();
        let (_, hello) = client.command(&Command::QmpCapabilities {
            enable: vec![QmpCapability::Oob],
        });
        session.feed(&hello);
        let (id, bytes) = client.command(&command);
        session.feed(&bytes);
        let request = session.poll_request().expect("a request");
        prop_assert_eq!(&request.command, &command);
        session.reply(request.id, qmp_types::done());
        while let Some(bytes) = session.take_output() {
            client.feed(&bytes);
        }
        let mut last = None;
        while let Some(message) = client.poll() {
            last = Some(message.unwrap());
        }
        let value = qmp_types::done().unwrap();
        prop_assert_eq!(last, Some(ServerMessage::Return { id: Some(id), value }));
    }

    #[test]
    fn an_address_survives_its_json(address in address()) {
        let json = serde_json::to_value(&address).unwrap();
        prop_assert_eq!(serde_json::from_value::<MigrationAddress>(json).unwrap(), address);
    }

    #[test]
    fn any_text_as_a_uri_is_an_address_or_an_error(
        uri in "(tcp:|unix:|vsock:|fd:|file:|exec:|rdma:)?[\\[\\]a-z0-9:,=]{0,20}",
    ) {
        if let Ok(address) = uri.parse::<MigrationAddress>() {
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
}
