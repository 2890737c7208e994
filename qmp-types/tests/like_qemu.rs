//! The same input gets the same reply as from QEMU 11.1.3.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a crate of its own"
)]

use qmp_types::{
    ColoExitReason, ColoMode, ColoStatus, Command, CommandKind, CommandResult, MigrationInfo,
    QmpError, RunState, Session, SessionConfig, Settings, StatusInfo, Support, VersionInfo,
    YankInstance, done, returns,
};
use serde_json::Value;

/// A VM that was started stopped and never does anything.
struct IdleVm {
    settings: Settings,
}

impl IdleVm {
    fn run(&mut self, command: &Command) -> CommandResult {
        match command {
            Command::QueryStatus => returns(&StatusInfo::from(RunState::PreLaunch)),
            Command::QueryYank => returns(&Vec::<YankInstance>::new()),
            Command::Yank { instances } if instances.is_empty() => done(),
            Command::Yank { .. } => Err(QmpError::yank_instance_not_found()),
            Command::MigrateSetCapabilities { capabilities } => {
                self.settings.set_capabilities(capabilities)?;
                done()
            }
            Command::QueryMigrateCapabilities => returns(&self.settings.capabilities().to_list()),
            Command::MigrateSetParameters(changes) => {
                self.settings.set_parameters(changes)?;
                done()
            }
            Command::QueryMigrateParameters => returns(self.settings.parameters()),
            Command::QueryMigrate => returns(&MigrationInfo::default()),
            Command::MigrateCancel => done(),
            Command::MigrateIncoming(_) => Err(QmpError::incoming_not_specified()),
            Command::XColoLostHeartbeat => Err(QmpError::not_in_colo()),
            Command::QueryColoStatus => returns(&ColoStatus {
                mode: ColoMode::None,
                last_mode: ColoMode::None,
                reason: ColoExitReason::None,
            }),
            other => panic!("{other:?} is not in the capture"),
        }
    }
}

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((plain, escape)) = rest.split_once("\\x") {
        bytes.extend_from_slice(plain.as_bytes());
        let (digits, after) = escape.split_at(2);
        bytes.push(u8::from_str_radix(digits, 16).expect("two digits"));
        rest = after;
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

fn replies(output: &[u8]) -> Vec<Value> {
    String::from_utf8(output.to_vec())
        .expect("ASCII")
        .split_terminator("\r\n")
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

fn new_session() -> (Session, IdleVm) {
    let mut session = Session::new(SessionConfig {
        version: VersionInfo::new(11, 1, 3, "test"),
        oob: true,
        commands: CommandKind::ALL,
    });
    session.take_output().expect("the greeting");
    let vm = IdleVm {
        settings: Settings::new(Support::ALL),
    };
    (session, vm)
}

#[test]
fn the_same_input_gets_the_same_reply_as_from_qemu() {
    let capture = include_str!("data/qemu-11.1.3.txt");
    let (mut session, mut vm) = new_session();
    let mut got: Vec<Value> = Vec::new();
    let (mut input, mut checked, mut escaped) = ("", 0, 0);
    for line in capture.lines() {
        match line.split_at(2) {
            ("# ", _) => {}
            ("= ", _) => (session, vm) = new_session(),
            ("> ", text) => {
                assert!(got.is_empty(), "{input} got more replies: {got:?}");
                input = text;
                session.feed(&unescape(text));
                session.feed(b"\n");
                while let Some(request) = session.poll_request() {
                    let result = vm.run(&request.command);
                    session.reply(request.id, result);
                }
                got = replies(&session.take_output().unwrap_or_default());
                got.reverse();
            }
            ("< ", text) => {
                let mut want: Value = serde_json::from_str(text).expect(text);
                // QEMU repeats control characters of its input, where they are escaped here.
                if let Some(Value::String(desc)) = want.pointer_mut("/error/desc")
                    && desc.contains(char::is_control)
                {
                    let shown = |c: char| match c.is_control() {
                        true => c.escape_debug().to_string(),
                        false => c.to_string(),
                    };
                    *desc = desc.chars().map(shown).collect();
                    escaped += 1;
                }
                assert_eq!(got.pop(), Some(want), "{input}");
                checked += 1;
            }
            _ => panic!("{line} is no line of a capture"),
        }
    }
    assert!(got.is_empty(), "{input} got more replies: {got:?}");
    assert!(escaped > 0, "no reply with control characters");
    assert!(checked > 200, "only {checked} replies");
}
