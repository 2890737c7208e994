//! The server over real sockets, with an operator that has no VM.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use qmp_types::{
    Client, ColoCheckpoint, ColoMode, Command, CommandKind, CommandResult, Event, EventMessage,
    QmpCapability, QmpError, RunState, ServerMessage, SessionConfig, ShutdownCause, StatusInfo,
    VersionInfo, done, returns,
};
use serde_json::{Value, json};

use super::{QmpAddress, QmpServer, serve};
use crate::operator::{EventBus, Operator};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// `system_reset` hangs until it is released; `stop`, `cont` and `quit` are told as events.
struct FakeOperator {
    events: Arc<EventBus>,
    begun: Sender<CommandKind>,
    release: Receiver<()>,
}

impl Operator for FakeOperator {
    fn execute(&self, command: Command) -> CommandResult {
        match command {
            Command::Stop => self.events.publish(&Event::Stop),
            Command::Cont => self.events.publish(&Event::Resume),
            Command::Quit => self.events.publish(&Event::Shutdown {
                guest: false,
                reason: ShutdownCause::HostQmpQuit,
            }),
            _ => {}
        }
        // Whoever waits for the begin may count on the events.
        self.begun.send(command.kind()).unwrap();
        match command {
            Command::Stop | Command::Cont => {}
            // The main loop ends the VMM while a `quit` is not over yet.
            Command::Quit | Command::SystemReset => {
                let _ = self.release.recv();
            }
            Command::QueryStatus => return returns(&StatusInfo::from(RunState::Running)),
            Command::QueryYank => return returns(&json!([])),
            Command::XColoLostHeartbeat => panic!("the test wants it"),
            _ => return Err(QmpError::generic("there is no VM")),
        }
        done()
    }
}

struct Fixture {
    server: QmpServer,
    events: Arc<EventBus>,
    operator: Arc<FakeOperator>,
    begun: Receiver<CommandKind>,
    release: Sender<()>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let events = Arc::new(EventBus::new());
    let (begun_sender, begun) = unbounded();
    let (release, released) = unbounded();
    let operator = Arc::new(FakeOperator {
        events: Arc::clone(&events),
        begun: begun_sender,
        release: released,
    });
    let server = serve(
        &QmpAddress::Unix(path.clone()),
        SessionConfig {
            version: VersionInfo::new(11, 1, 0, "test"),
            oob: true,
            commands: CommandKind::ALL,
        },
        Arc::clone(&operator) as Arc<dyn Operator>,
        &events,
    )
    .unwrap();
    Fixture {
        server,
        events,
        operator,
        begun,
        release,
        path,
        _directory: directory,
    }
}

impl Fixture {
    /// A client that may give commands out of band.
    fn client(&self) -> TestClient {
        let mut client = TestClient::connect(&self.path);
        assert!(matches!(client.next(), ServerMessage::Greeting(_)));
        client.call(&Command::QmpCapabilities {
            enable: vec![QmpCapability::Oob],
        });
        client
    }

    fn wait_for_begin_of(&self, kind: CommandKind) {
        while self.begun.recv_timeout(PATIENCE).unwrap() != kind {}
    }
}

struct TestClient {
    stream: UnixStream,
    client: Client,
}

impl TestClient {
    fn connect(path: &std::path::Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            client: Client::new(),
        }
    }

    /// What the server says next; `None` if it has closed the connection.
    fn poll(&mut self) -> Option<ServerMessage> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.client.poll() {
                return Some(message.unwrap());
            }
            match self.stream.read(&mut buffer).unwrap() {
                0 => return None,
                count => self.client.feed(&buffer[..count]),
            }
        }
    }

    fn next(&mut self) -> ServerMessage {
        self.poll().expect("the server has closed the connection")
    }

    fn send(&mut self, command: &Command) -> u64 {
        let (id, bytes) = self.client.command(command);
        self.stream.write_all(&bytes).unwrap();
        id
    }

    fn send_oob(&mut self, command: &Command) -> u64 {
        let (id, bytes) = self.client.command_oob(command);
        self.stream.write_all(&bytes).unwrap();
        id
    }

    /// The reply, which has to be next.
    fn reply(&mut self, to: u64) -> Value {
        match self.next() {
            ServerMessage::Return { id, value } if id == Some(to) => value,
            message => panic!("a reply to {to} was expected, not {message:?}"),
        }
    }

    fn call(&mut self, command: &Command) -> Value {
        let id = self.send(command);
        self.reply(id)
    }

    /// The event, which has to be next.
    fn event(&mut self) -> EventMessage {
        match self.next() {
            ServerMessage::Event(event) => event,
            message => panic!("an event was expected, not {message:?}"),
        }
    }

    /// The next line as it is, of a client that has not read otherwise.
    fn value(&mut self) -> Value {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).unwrap();
            line.extend(byte);
        }
        serde_json::from_slice(&line).unwrap()
    }
}

/// Waits for something that other threads bring about.
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "not so: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_client_is_greeted_negotiates_and_gets_its_ids_back() {
    let fixture = fixture();
    let mut client = TestClient::connect(&fixture.path);
    assert_eq!(
        client.value(),
        json!({"QMP": {
            "version": {"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "test"},
            "capabilities": ["oob"],
        }})
    );
    let requests = concat!(
        r#"{"execute": "query-status"}"#,
        r#"{"execute": "qmp_capabilities", "id": "a"}"#,
        r#"{"execute": "query-status", "id": {"b": [1]}}"#,
        r#"{"execute": "migrate_cancel", "id": null}"#,
    );
    client.stream.write_all(requests.as_bytes()).unwrap();
    let negotiate = "Expecting capabilities negotiation with 'qmp_capabilities'";
    for reply in [
        json!({"error": {"class": "CommandNotFound", "desc": negotiate}}),
        json!({"return": {}, "id": "a"}),
        json!({"return": {"status": "running", "running": true}, "id": {"b": [1]}}),
        json!({"error": {"class": "GenericError", "desc": "there is no VM"}, "id": null}),
    ] {
        assert_eq!(client.value(), reply);
    }
}

#[test]
fn an_event_precedes_the_reply_to_its_command_and_reaches_every_client() {
    let fixture = fixture();
    let (mut acting, mut watching) = (fixture.client(), fixture.client());
    for round in 0..100 {
        let (command, event) = match round % 2 {
            0 => (Command::Stop, "STOP"),
            _ => (Command::Cont, "RESUME"),
        };
        let id = acting.send(&command);
        assert_eq!(acting.event().event, event);
        acting.reply(id);
        assert_eq!(watching.event().event, event);
    }
}

#[test]
fn an_event_arrives_unasked_and_with_the_time_it_was_published() {
    let fixture = fixture();
    let mut client = fixture.client();
    let expected = fixture.events.subscribe();
    fixture.events.publish(&Event::MigrationPass { pass: 3 });
    let event = client.event();
    assert_eq!(event.known(), Some(Event::MigrationPass { pass: 3 }));
    assert_eq!(event.timestamp, expected.recv().unwrap().1);
}

#[test]
fn clients_do_not_wait_for_each_other() {
    let fixture = fixture();
    let (mut one, mut other) = (fixture.client(), fixture.client());
    let id = one.send(&Command::SystemReset);
    fixture.wait_for_begin_of(CommandKind::SystemReset);
    assert_eq!(other.call(&Command::QueryStatus)["running"], true);
    fixture.release.send(()).unwrap();
    one.reply(id);
}

#[test]
fn a_command_out_of_band_is_answered_while_another_hangs() {
    let fixture = fixture();
    let mut client = fixture.client();
    let hanging = client.send(&Command::SystemReset);
    let waiting = client.send(&Command::QueryStatus);
    fixture.wait_for_begin_of(CommandKind::SystemReset);
    let id = client.send_oob(&Command::QueryYank);
    assert_eq!(client.reply(id), json!([]));
    // Out of band also overtakes what waits, which keeps its order.
    fixture.release.send(()).unwrap();
    client.reply(hanging);
    client.reply(waiting);
}

#[test]
fn the_reply_to_quit_precedes_the_end_of_the_connection() {
    let fixture = fixture();
    let (mut client, mut other) = (fixture.client(), fixture.client());
    let id = client.send(&Command::Quit);
    fixture.wait_for_begin_of(CommandKind::Quit);
    let release = fixture.release.clone();
    // The main loop is already ending when the command returns.
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        release.send(()).unwrap();
    });
    fixture.server.shutdown(Instant::now() + PATIENCE);
    late.join().unwrap();
    assert_eq!(client.event().event, "SHUTDOWN");
    assert_eq!(client.reply(id), json!({}));
    assert_eq!(client.poll(), None);
    assert_eq!(other.event().event, "SHUTDOWN");
    assert_eq!(other.poll(), None);
    assert!(!fixture.path.exists());
}

#[test]
fn a_command_that_hangs_holds_the_end_up_until_the_deadline_only() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.send(&Command::SystemReset);
    fixture.wait_for_begin_of(CommandKind::SystemReset);
    let begin = Instant::now();
    fixture.server.shutdown(begin + Duration::from_millis(100));
    assert!(begin.elapsed() >= Duration::from_millis(100));
    assert_eq!(client.poll(), None);
    // Its thread is the last to hold on to the operator, until it returns.
    assert_eq!(Arc::strong_count(&fixture.operator), 2);
    fixture.release.send(()).unwrap();
    eventually("the worker has ended", || {
        Arc::strong_count(&fixture.operator) == 1
    });
}

#[test]
fn a_server_that_is_dropped_leaves_no_thread_behind() {
    let fixture = fixture();
    let (mut client, mut gone) = (fixture.client(), fixture.client());
    gone.call(&Command::QueryStatus);
    drop(gone);
    drop(fixture.server);
    assert_eq!(client.poll(), None);
    // Every thread that executes commands or accepts clients has had one.
    assert_eq!(Arc::strong_count(&fixture.operator), 1);
}

#[test]
fn a_client_that_never_reads_is_dropped_and_stalls_nobody() {
    let fixture = fixture();
    let (mut deaf, mut other) = (fixture.client(), fixture.client());
    let event = Event::ColoCheckpoint(Box::new(ColoCheckpoint {
        mode: ColoMode::Primary,
        checkpoint: 1,
        pause_us: 0,
        transfer_us: 0,
        loaded_us: 0,
        ahead_pages: 0,
        compared_pages: 0,
        unchanged_pages: 0,
        ram_bytes: 0,
        dirty_pages: 0,
        flushed_pages: 0,
        device_bytes: 0,
        serial_bytes: 0,
        ram_hash: Some("0".repeat(256 << 10)),
        device_hash: None,
        steps: Vec::new(),
    }));
    let published = 24;
    let mut lines = BufReader::new(other.stream.try_clone().unwrap());
    for _ in 0..published {
        fixture.events.publish(&event);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert!(line.contains("X_COLO_CHECKPOINT"));
    }
    assert_eq!(other.call(&Command::QueryStatus)["running"], true);
    let mut received = 0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match deaf.stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => received += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                break;
            }
        }
    }
    assert!(received < published * (256 << 10) / 2, "{received} bytes");
    // Whoever is dropped leaves room.
    drop(deaf);
    fixture.client();
}

#[test]
fn garbage_is_answered_with_errors_and_the_server_lives() {
    let fixture = fixture();
    let mut client = fixture.client();
    for garbage in [
        &b"}\n"[..],
        b"\xff\xfe\x00\n",
        b"[1, 2\n}",
        b"{\"execute\": 1}\n",
        b"{\"execute\": \"rm -rf\", \"id\": 1}\n",
        b"\"\x01\"\n",
    ] {
        client.stream.write_all(garbage).unwrap();
        assert!(matches!(client.next(), ServerMessage::Error { .. }));
    }
    // A text may have led to more than one error.
    let id = client.send(&Command::QueryStatus);
    loop {
        match client.next() {
            ServerMessage::Error { .. } => {}
            ServerMessage::Return { id: of, .. } => break assert_eq!(of, Some(id)),
            message => panic!("{message:?}"),
        }
    }

    // One that never ends is given up.
    let mut endless = fixture.client();
    let flood = vec![b'['; 4 << 20];
    let _ = endless.stream.write_all(&flood);
    fixture.client().call(&Command::QueryStatus);
}

#[test]
fn a_client_that_has_said_all_still_gets_its_replies() {
    let fixture = fixture();
    let mut client = fixture.client();
    let reset = client.send(&Command::SystemReset);
    let status = client.send(&Command::QueryStatus);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    fixture.wait_for_begin_of(CommandKind::SystemReset);
    fixture.release.send(()).unwrap();
    client.reply(reset);
    client.reply(status);
    assert_eq!(client.poll(), None);
}

#[test]
fn a_client_that_leaves_amid_a_command_is_forgotten_when_the_command_ends() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.send(&Command::SystemReset);
    fixture.wait_for_begin_of(CommandKind::SystemReset);
    let with_client = Arc::strong_count(&fixture.operator);
    drop(client);
    eventually("the talker has ended", || {
        Arc::strong_count(&fixture.operator) == with_client - 1
    });
    fixture.release.send(()).unwrap();
    eventually("the worker has ended", || {
        Arc::strong_count(&fixture.operator) == with_client - 2
    });
}

#[test]
fn an_operator_that_panics_costs_the_connection_and_not_the_server() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.send(&Command::XColoLostHeartbeat);
    assert_eq!(client.poll(), None);
    assert_eq!(
        fixture.client().call(&Command::QueryStatus)["running"],
        true
    );
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let fixture = fixture();
    let mut clients: Vec<_> = (0..super::hub::CLIENTS_MAX)
        .map(|_| fixture.client())
        .collect();
    assert_eq!(TestClient::connect(&fixture.path).poll(), None);
    clients.pop();
    eventually("there is room again", || {
        TestClient::connect(&fixture.path).poll().is_some()
    });
}

#[test]
fn a_flood_of_silent_clients_keeps_no_client_out_and_ends_none_that_has_spoken() {
    let fixture = fixture();
    let mut before = fixture.client();
    let flood: Vec<_> = (0..5 * super::hub::CLIENTS_MAX)
        .map(|i| {
            let mut stream = UnixStream::connect(&fixture.path).unwrap();
            stream.write_all([&b""[..], b"{\"exec"][i % 2]).unwrap();
            stream
        })
        .collect();
    let mut behind = fixture.client();
    behind.call(&Command::QueryYank);
    before.call(&Command::QueryYank);
    drop(flood);
}

#[test]
fn an_address_in_use_is_named() {
    let fixture = fixture();
    let address = QmpAddress::Unix(fixture.path.clone());
    let config = SessionConfig {
        version: VersionInfo::new(11, 1, 0, "test"),
        oob: false,
        commands: &[],
    };
    let operator = Arc::clone(&fixture.operator) as Arc<dyn Operator>;
    let error = serve(&address, config, operator, &fixture.events).unwrap_err();
    let told = error.to_string();
    let begins = format!("cannot listen for QMP on {address}: ");
    assert!(told.starts_with(&begins), "{told}");
    assert!(told.contains("is in use"), "{told}");
    fixture.client();
}
