//! What a session promises to the VMM that embeds it, and to the client.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a crate of its own"
)]

use proptest::prelude::*;
use qmp_types::session::{OUTPUT_MAX, QUEUE_MAX};
use qmp_types::{
    Command, CommandKind, Event, Request, ServerMessage, Session, SessionConfig, ShutdownCause,
    Timestamp, VersionInfo, done,
};

fn session(commands: &'static [CommandKind]) -> Session {
    let mut session = Session::new(SessionConfig {
        version: VersionInfo::new(11, 1, 3, "test"),
        oob: true,
        commands,
    });
    session.take_output();
    session
}

fn with_oob() -> Session {
    let mut session = session(CommandKind::ALL);
    session.feed(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    session.take_output();
    session
}

fn output(session: &mut Session) -> String {
    let mut text = String::new();
    while let Some(bytes) = session.take_output() {
        text.push_str(&String::from_utf8(bytes).unwrap());
    }
    text
}

#[test]
fn the_greeting_comes_first_and_offers_oob_only_where_there_is_oob() {
    for (oob, offered) in [(true, "[\"oob\"]"), (false, "[]")] {
        let mut session = Session::new(SessionConfig {
            version: VersionInfo::new(11, 1, 3, "v"),
            oob,
            commands: CommandKind::ALL,
        });
        let greeting = output(&mut session);
        assert!(
            greeting.contains(&format!("\"capabilities\": {offered}")),
            "{greeting}"
        );
        assert!(greeting.ends_with("}}\r\n"));
        session.feed(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
        assert_eq!(output(&mut session).contains("return"), oob);
    }
}

#[test]
fn commands_are_handed_out_one_at_a_time_and_replies_keep_their_order() {
    let mut session = with_oob();
    session
        .feed(br#"{"execute":"stop","id":1}{"execute":"nosuch","id":2}{"execute":"cont","id":3}"#);
    let first = session.poll_request().unwrap();
    assert_eq!(first.command, Command::Stop);
    assert!(session.poll_request().is_none());
    assert_eq!(output(&mut session), "");

    session.reply(first.id, done());
    let replies = output(&mut session);
    assert_eq!(replies.lines().count(), 2);
    assert!(replies.starts_with("{\"return\": {}, \"id\": 1}\r\n"));
    assert!(replies.contains("\"id\": 2"));
    assert_eq!(session.poll_request().unwrap().command, Command::Cont);
}

#[test]
fn a_command_out_of_band_overtakes_one_that_hangs_and_all_that_wait() {
    let mut session = with_oob();
    session.feed(br#"{"execute":"stop","id":1}{"execute":"cont","id":2}"#);
    let hanging = session.poll_request().unwrap();
    session
        .feed(br#"{"exec-oob":"yank","arguments":{"instances":[{"type":"migration"}]},"id":"y"}"#);
    let yank = session.poll_request().unwrap();
    assert!(yank.oob && !hanging.oob);
    assert!(matches!(yank.command, Command::Yank { .. }));
    session.reply(yank.id, done());
    assert_eq!(output(&mut session), "{\"return\": {}, \"id\": \"y\"}\r\n");
    assert!(session.poll_request().is_none());
    session.reply(hanging.id, done());
    assert_eq!(session.poll_request().unwrap().command, Command::Cont);
}

#[test]
fn without_oob_nothing_is_read_while_a_command_executes() {
    let mut session = session(CommandKind::ALL);
    session.feed(br#"{"execute":"qmp_capabilities"}{"execute":"stop"}{"execute":"cont"}"#);
    assert!(!session.wants_input());
    let stop = session.poll_request().unwrap();
    assert!(!session.wants_input());
    session.reply(stop.id, done());
    let cont = session.poll_request().unwrap();
    session.reply(cont.id, done());
    assert!(session.wants_input());
}

#[test]
fn with_oob_no_more_than_the_limit_wait() {
    let mut session = with_oob();
    session.feed(br#"{"execute":"stop"}"#);
    let executing = session.poll_request().unwrap();
    for _ in 0..QUEUE_MAX {
        assert!(session.wants_input());
        session.feed(br#"{"execute":"cont"}"#);
    }
    assert!(!session.wants_input());
    session.feed(br#"{"exec-oob":"query-yank"}"#);
    assert!(session.poll_request().is_none(), "not read yet");
    session.reply(executing.id, done());
    assert_eq!(session.poll_request().unwrap().command, Command::Cont);
    assert_eq!(session.poll_request().unwrap().command, Command::QueryYank);
}

#[test]
fn events_are_told_after_the_negotiation_only_and_only_to_a_client_that_reads() {
    let mut session = session(CommandKind::ALL);
    let event = Event::Shutdown {
        guest: false,
        reason: ShutdownCause::HostQmpQuit,
    };
    let timestamp = Timestamp {
        seconds: 7,
        microseconds: 8,
    };
    session.emit(&event, timestamp).unwrap();
    assert_eq!(output(&mut session), "");

    session.feed(br#"{"execute":"qmp_capabilities"}"#);
    output(&mut session);
    session.emit(&event, timestamp).unwrap();
    assert_eq!(
        output(&mut session),
        concat!(
            r#"{"timestamp": {"seconds": 7, "microseconds": 8}, "event": "SHUTDOWN", "#,
            r#""data": {"guest": false, "reason": "host-qmp-quit"}}"#,
            "\r\n"
        )
    );

    let full = (0..OUTPUT_MAX).find_map(|_| session.emit(&event, timestamp).err());
    assert!(full.unwrap().waiting < OUTPUT_MAX + 1024);
}

#[test]
fn a_command_that_the_vmm_does_not_have_is_not_found() {
    let mut session = session(&[CommandKind::QueryStatus]);
    session.feed(br#"{"execute":"qmp_capabilities"}{"execute":"stop"}"#);
    assert!(output(&mut session).contains("The command stop has not been found"));
}

#[test]
fn a_request_too_large_is_refused_once_and_the_next_one_is_heard() {
    for (start, middle, end) in [
        ("{\"execute\":\"", "x".repeat(2 << 20), "\"}"),
        ("", "[".repeat(200), "]"),
        ("[", "1,".repeat(1 << 17), "1]"),
    ] {
        let mut session = with_oob();
        session.feed(start.as_bytes());
        session.feed(middle.as_bytes());
        session.feed(
            end.repeat(if start.is_empty() { 200 } else { 1 })
                .as_bytes(),
        );
        session.feed(b"{\"execute\":\"stop\"}");
        let refused = output(&mut session);
        assert_eq!(refused.lines().count(), 1, "{refused}");
        assert!(refused.contains("limit exceeded"), "{refused}");
        assert_eq!(session.poll_request().unwrap().command, Command::Stop);
    }
}

#[test]
fn a_mistake_is_answered_at_the_byte_that_makes_it_one() {
    // What QEMU 11.1.3 answers before it has seen any end. (Its limits are larger.)
    let deep = "[".repeat(129);
    let many = format!("[{}", "1,".repeat(1 << 15));
    let long = format!("{{\"execute\":\"{}", "x".repeat(1 << 20));
    for (input, why) in [
        (deep.as_str(), "JSON nesting depth limit exceeded"),
        (&many, "JSON token count limit exceeded"),
        (&long, "JSON token size limit exceeded"),
        ("{\"a\" 1", "expecting ':'"),
        ("{]", "expecting key"),
        ("[nope,", "invalid keyword 'nope'"),
        ("[\"\\q\"", "invalid escape sequence in string"),
        ("{\"a\":1,\"a\":2", "duplicate key"),
        ("{\"a\": @", "stray '@'"),
    ] {
        let mut session = with_oob();
        let (last, first) = input.as_bytes().split_last().unwrap();
        session.feed(first);
        // A word or number is known to have ended by the byte behind it.
        session.feed(&[*last, b' ']);
        let refused = output(&mut session);
        assert!(refused.contains(why), "{why}: {refused}");
        // However long it goes on, that was the answer; but these two end with their mistake.
        let ends = input == "{]" || input.ends_with('@');
        for _ in 0..1000 {
            session.feed(b"[[[{{{ 1, ");
        }
        let more = output(&mut session).lines().count();
        assert_eq!(more, usize::from(ends), "{why}");
    }
}

#[test]
fn the_next_command_is_heard_behind_a_mistake() {
    for mistake in [
        // As QEMU 11.1.3 does.
        format!("{}{}", "[".repeat(129), "]".repeat(129)),
        "{\"a\" 1, [ ]}".to_owned(),
        "{]".to_owned(),
        "{\"a\" 1, @\n".to_owned(),
        format!("{}@\n", "[".repeat(200)),
    ] {
        let mut session = with_oob();
        session.feed(mistake.as_bytes());
        session.feed(b"{\"execute\":\"stop\"}");
        let refused = output(&mut session);
        assert_eq!(refused.lines().count(), 1, "{mistake}: {refused}");
        let request = session.poll_request().map(|request| request.command);
        assert_eq!(request, Some(Command::Stop), "{mistake}");
    }
}

#[test]
fn garbage_is_not_answered_faster_than_the_client_reads() {
    let mut session = with_oob();
    session.feed(&b"}".repeat(1 << 16));
    assert!(!session.wants_input());
    assert!(session.take_output().unwrap().len() < 80 << 10);
    let mut lines = 0;
    while let Some(bytes) = session.take_output() {
        assert!(bytes.len() < 80 << 10);
        lines += bytes.iter().filter(|b| **b == b'\n').count();
    }
    assert!(lines > 60_000);
    assert!(session.wants_input());
}

/// Everything a session says to an input that comes in the pieces given, and all it asks of the
/// VM, sorted: what is given out of band overtakes more or less, depending on what has come.
fn run(pieces: &[&[u8]]) -> (Vec<String>, Vec<String>) {
    let mut session = session(CommandKind::ALL);
    let (mut said, mut asked) = (String::new(), Vec::new());
    for piece in pieces {
        session.feed(piece);
        loop {
            said.push_str(&output(&mut session));
            let Some(Request { command, id, .. }) = session.poll_request() else {
                break;
            };
            asked.push(format!("{command:?}"));
            session.reply(id, done());
        }
    }
    let mut said: Vec<_> = said.split_terminator("\r\n").map(str::to_owned).collect();
    said.sort_unstable();
    asked.sort_unstable();
    (said, asked)
}

/// Bytes that look like QMP more often than chance would have it.
fn nearly_qmp() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        6 => prop::sample::select(vec![
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}",
            "{\"execute\":\"stop\",\"id\":", "{\"exec-oob\":\"query-yank\"}", "{", "}", "[", "]",
            ":", ",", "\"", "'", "\\", "\\u12", "\\ud800", "1", "-", "0", ".", "e", "true", "nul",
            "\"execute\"", "\"arguments\"", "\"id\"", "\"query-status\"", "\n", " ", "é",
        ]).prop_map(|text: &str| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..4),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_bytes_cut_anywhere_say_the_same(bytes in nearly_qmp(), at in any::<prop::sample::Index>()) {
        let whole = run(&[&bytes]);
        let (start, end) = bytes.split_at(at.index(bytes.len() + 1));
        prop_assert_eq!(&run(&[start, end]), &whole);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        prop_assert_eq!(&run(&single), &whole);
        prop_assert!(whole.0.iter().all(|line| line.is_ascii()));
    }

    #[test]
    fn whatever_a_server_sends_the_client_takes(bytes in nearly_qmp()) {
        let mut client = qmp_types::Client::new();
        client.feed(&bytes);
        client.feed(b"\n");
        while let Some(message) = client.poll() {
            let returned = matches!(message, Ok(ServerMessage::Return { .. }));
            prop_assert!(!returned, "there was none");
        }
    }
}

/// What clears a terminal, begins another line, and turns text around.
const HOSTILE: &str = "\x1b[2J\r\n\u{202e}";
const SHOWN: &str = r"\u{1b}[2J\r\n\u{202e}";

#[test]
fn what_an_error_repeats_of_a_clients_input_is_escaped() {
    let name = serde_json::to_string(HOSTILE).unwrap();
    let capability = format!(r#"{{"capability":{name},"state":true}}"#);
    for message in [
        format!(r#"{{"execute":{name}}}"#),
        format!(r#"{{"execute":"stop",{name}:1}}"#),
        format!(r#"{{"execute":"stop","arguments":{{{name}:1}}}}"#),
        format!(r#"{{"execute":"migrate","arguments":{{"uri":{name}}}}}"#),
        format!(r#"{{"execute":"migrate-set-parameters","arguments":{{{name}:1}}}}"#),
        format!(
            r#"{{"execute":"migrate-set-capabilities","arguments":{{"capabilities":[{capability}]}}}}"#
        ),
    ] {
        let mut session = with_oob();
        session.feed(message.as_bytes());
        let said = output(&mut session);
        let said: serde_json::Value = serde_json::from_str(said.trim_end()).unwrap();
        let desc = said["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(SHOWN), "{message}: {desc:?}");
        assert!(!desc.contains(char::is_control), "{message}: {desc:?}");
    }
    // Of what is no JSON too.
    let mut session = with_oob();
    session.feed(b"\x1b]0;x\x07{\"execute\":\"stop\"}");
    for said in output(&mut session).lines() {
        let said: serde_json::Value = serde_json::from_str(said).unwrap();
        let desc = said["error"]["desc"].as_str().unwrap_or_default();
        assert!(!desc.contains(char::is_control), "{desc:?}");
    }
}

#[test]
fn what_a_server_says_is_shown_escaped() {
    let text = serde_json::to_string(HOSTILE).unwrap();
    let mut client = qmp_types::Client::new();
    let error = format!(r#"{{"error":{{"class":"GenericError","desc":{text}}},"id":1}}"#);
    client.feed(error.as_bytes());
    match client.poll() {
        Some(Ok(ServerMessage::Error { error, .. })) => {
            assert_eq!(error.to_string(), format!("GenericError: {SHOWN}"));
        }
        other => panic!("{other:?}"),
    }
    client.feed(format!(r#"{{"x":{text}}}"#).as_bytes());
    let shown = client.poll().unwrap().unwrap_err().to_string();
    assert!(
        !shown.contains(|c: char| c.is_control() || c == '\u{202e}'),
        "{shown:?}"
    );
}
