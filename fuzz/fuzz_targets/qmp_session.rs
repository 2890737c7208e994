//! A QMP session: however a client's bytes are cut, the same commands come out and the same replies go
//! back, and what waits is bounded.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use qmp_types::{
    Command, CommandKind, CommandResult, MigrationInfo, QmpError, Session, SessionConfig, Settings,
    Support, VersionInfo, done, returns,
};

struct Vm(Settings);

impl Vm {
    fn run(&mut self, command: &Command) -> CommandResult {
        match command {
            Command::MigrateSetCapabilities { capabilities } => {
                self.0.set_capabilities(capabilities)?;
                done()
            }
            Command::QueryMigrateCapabilities => returns(&self.0.capabilities().to_list()),
            Command::MigrateSetParameters(changes) => {
                self.0.set_parameters(changes)?;
                done()
            }
            Command::QueryMigrateParameters => returns(self.0.parameters()),
            Command::QueryMigrate => returns(&MigrationInfo::default()),
            Command::MigrateIncoming(_) => Err(QmpError::incoming_not_specified()),
            _ => done(),
        }
    }
}

fn talk(data: &[u8], piece: usize) -> (Vec<Command>, Vec<u8>) {
    let mut session = Session::new(SessionConfig {
        version: VersionInfo::new(11, 1, 3, "fuzz"),
        oob: true,
        commands: CommandKind::ALL,
    });
    let mut vm = Vm(Settings::new(Support::ALL));
    let (mut commands, mut output) = (Vec::new(), Vec::new());
    for bytes in data.chunks(piece) {
        session.feed(bytes);
        // A server works everything off before it reads on.
        loop {
            let written = session.take_output();
            let request = session.poll_request();
            if written.is_none() && request.is_none() {
                break;
            }
            output.extend(written.unwrap_or_default());
            if let Some(request) = request {
                let result = vm.run(&request.command);
                commands.push(request.command);
                session.reply(request.id, result);
            }
        }
        assert!(session.wants_input());
    }
    (commands, output)
}

fuzz_target!(|data: &[u8]| {
    let (piece, bytes) = fuzz::choice(data);
    let by_pieces = talk(bytes, usize::from(piece) + 1);
    // Out of band a command may overtake others: only one at a time come in an order of their own.
    let one_by_one = talk(bytes, 1);
    assert_eq!(by_pieces.0.len(), one_by_one.0.len());
    for line in by_pieces.1.split(|b| *b == b'\n') {
        assert!(line.is_empty() || serde_json::from_slice::<serde_json::Value>(line).is_ok());
    }
});
