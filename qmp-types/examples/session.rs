//! A QMP session over a socket pair: a VMM that answers, and a tool that asks.
//!
//! `cargo run -p migration-qmp-types --example session`

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use qmp_types::{
    Client, Command, CommandKind, Event, QmpError, RunState, ServerMessage, Session, SessionConfig,
    StatusInfo, Timestamp, VersionInfo, done, returns,
};

type Failure = Box<dyn Error + Send + Sync>;

/// The VMM's end: bytes in, commands out, replies and events in, bytes out.
fn serve(mut socket: UnixStream) -> Result<(), Failure> {
    let mut session = Session::new(SessionConfig {
        version: VersionInfo::new(11, 1, 3, "example"),
        oob: false,
        commands: CommandKind::ALL,
    });
    let mut state = RunState::Running;
    let mut input = [0; 4096];
    loop {
        while let Some(request) = session.poll_request() {
            let was = state;
            let result = match request.command {
                Command::QueryStatus => returns(&StatusInfo::from(state)),
                Command::Stop => {
                    state = RunState::Paused;
                    done()
                }
                _ => Err(QmpError::generic("this VMM has no such command")),
            };
            session.reply(request.id, result);
            if was != state {
                session.emit(&Event::Stop, Timestamp::default())?;
            }
        }
        while let Some(bytes) = session.take_output() {
            socket.write_all(&bytes)?;
        }
        match socket.read(&mut input)? {
            0 => return Ok(()),
            len => session.feed(&input[..len]),
        }
    }
}

/// The tool's end: waits for the next message of the VMM.
fn next(client: &mut Client, socket: &mut UnixStream) -> Result<ServerMessage, Failure> {
    let mut input = [0; 4096];
    loop {
        if let Some(message) = client.poll() {
            let message = message?;
            println!("{message:?}");
            return Ok(message);
        }
        match socket.read(&mut input)? {
            0 => return Err("the VMM has closed the connection".into()),
            len => client.feed(&input[..len]),
        }
    }
}

fn main() -> Result<(), Failure> {
    let (vmm, mut tool) = UnixStream::pair()?;
    let vmm = thread::spawn(move || serve(vmm));
    let mut client = Client::new();
    let greeting = next(&mut client, &mut tool)?;
    assert!(matches!(greeting, ServerMessage::Greeting(_)));

    let capabilities = Command::QmpCapabilities { enable: Vec::new() };
    for command in [
        capabilities,
        Command::Stop,
        Command::QueryStatus,
        Command::Quit,
    ] {
        let (id, bytes) = client.command(&command);
        tool.write_all(&bytes)?;
        loop {
            match next(&mut client, &mut tool)? {
                ServerMessage::Return { id: of, value } if of == Some(id) => {
                    let asked = command == Command::QueryStatus;
                    assert!(!asked || value["status"] == "paused");
                    break;
                }
                ServerMessage::Error { .. } => {
                    assert_eq!(command, Command::Quit);
                    break;
                }
                // An event may stand before or behind a reply.
                ServerMessage::Event(event) => assert_eq!(event.known(), Some(Event::Stop)),
                other => return Err(format!("unexpected: {other:?}").into()),
            }
        }
    }
    drop(tool);
    vmm.join().map_err(|_| "the VMM's thread has panicked")?
}
