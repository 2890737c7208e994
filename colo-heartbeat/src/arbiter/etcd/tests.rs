//! The gateway against servers of the tests' own, which answer what no etcd does.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::*;

/// A server that answers each connection with the next of `answers`, as it is; after the last it
/// is silent. What it was sent arrives at the receiver.
fn server(answers: Vec<String>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, requests) = channel();
    thread::spawn(move || {
        let mut silent = Vec::new();
        let mut answers = answers.into_iter();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            match answers.next() {
                Some(answer) => {
                    let request = request(&mut stream);
                    let _ = stream.write_all(answer.as_bytes());
                    if sender.send(request).is_err() {
                        return;
                    }
                }
                None => silent.push(stream),
            }
        }
    });
    (address, requests)
}

/// Reads a request up to the end of its body.
fn request(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    loop {
        let length = |head: &str| -> Option<usize> {
            let at = head.to_ascii_lowercase().find("content-length: ")?;
            head.get(at + 16..)?.lines().next()?.parse().ok()
        };
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && length(head).is_some_and(|length| body.len() >= length)
        {
            return text;
        }
        let n = stream.read(&mut buffer).unwrap();
        assert_ne!(n, 0, "{text}");
        text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
}

fn http(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn ok(cluster: u64, revision: u64) -> String {
    let body = format!(r#"{{"header":{{"cluster_id":"{cluster}","revision":"{revision}"}}}}"#);
    http("200 OK", &body)
}

fn gateway(endpoints: &str) -> Gateway {
    gateway_with(endpoints, EtcdOptions::default())
}

fn gateway_with(endpoints: &str, options: EtcdOptions) -> Gateway {
    Gateway::new(&endpoints.parse().unwrap(), "colo/a", options).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(600)
}

fn patient() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

#[test]
fn a_request_is_a_post_of_json_on_a_connection_of_its_own() {
    let (endpoint, requests) = server(vec![ok(1, 5), ok(1, 6)]);
    let mut gateway = gateway(&endpoint);
    for _ in 0..2 {
        assert_eq!(gateway.read(patient()).unwrap().version, 0);
        let request = requests.recv().unwrap();
        assert!(
            request.starts_with("POST /v3/kv/range HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.ends_with("\r\n\r\n{\"key\":\"Y29sby9h\"}"),
            "{request}"
        );
    }
}

#[test]
fn whatever_is_no_answer_of_etcd_s_is_an_error() {
    let long = " ".repeat(9 * 1024);
    for (answer, what) in [
        (String::new(), "no answer"),
        ("garbage\r\n\r\n".into(), "no answer"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{}".into(), "no answer"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".into(), "no answer"),
        (http("200 OK", &long), "no answer"),
        (format!("HTTP/1.1 200 OK\r\nX: {long}\r\n\r\n"), "no answer"),
        (http("200 OK", "{}"), "an answer that is none"),
        (http("200 OK", "<html>"), "an answer that is none"),
        (http("503 Service Unavailable", r#"{"error":"no leader"}"#), "status 503: no leader"),
        (http("404 Not Found", "404 page not found"), "status 404: 404 page"),
        ("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".into(), "status 307"),
    ] {
        let (endpoint, _requests) = server(vec![answer.clone()]);
        let error = gateway(&endpoint).read(patient()).unwrap_err();
        assert!(error.chain().contains(what), "{answer:.60}: {}", error.chain());
        assert!(error.chain().contains(&endpoint));
    }
}

#[test]
fn a_silent_etcd_is_waited_for_until_the_deadline_only() {
    let (endpoint, _requests) = server(vec![]);
    let deadline = soon();
    let error = gateway(&endpoint).read(deadline).unwrap_err();
    assert!(Instant::now() >= deadline);
    assert!(error.chain().contains("no answer"), "{}", error.chain());
    // One that drips is no better.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n");
        while stream.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let begun = Instant::now();
    assert!(gateway(&endpoint).read(soon()).is_err());
    assert!(begun.elapsed() < Duration::from_secs(60));
    // Too late for anything.
    let error = gateway(&endpoint).read(Instant::now()).unwrap_err();
    assert_eq!(error.to_string(), "no time is left to ask etcd");
}

#[test]
fn an_endpoint_that_does_not_answer_is_left_for_the_next() {
    let (silent, _none) = server(vec![]);
    let (good, requests) = server(vec![ok(1, 5), ok(1, 5)]);
    // Nobody listens on port 1 of this machine.
    let mut gateway = gateway(&format!("127.0.0.1:1,{silent},{good}"));
    assert!(
        gateway
            .read(Instant::now() + Duration::from_secs(3))
            .is_ok()
    );
    assert!(requests.recv().is_ok());
    // The one that answered is asked first from now on.
    assert!(gateway.read(soon()).is_ok());
    assert!(requests.recv().is_ok());
}

#[test]
fn endpoints_of_two_clusters_or_one_that_has_lost_data_are_not_believed() {
    let (endpoint, _requests) = server(vec![ok(1, 5), ok(2, 6), ok(1, 4), ok(1, 5)]);
    let mut gateway = gateway(&endpoint);
    assert!(gateway.read(patient()).is_ok());
    let other = gateway.read(patient()).unwrap_err();
    assert!(
        other
            .chain()
            .contains("cluster 2 answers, and 1 did before")
    );
    let back = gateway.read(patient()).unwrap_err();
    assert!(back.chain().contains("revision 4 follows 5"));
    assert!(gateway.read(patient()).is_ok());
}

const PASSWORD: &str = "open sesame";

fn user(password: &str) -> EtcdOptions {
    EtcdOptions::default().user("colo", Credential::new("the test", password))
}

fn token(token: &str) -> String {
    let header = r#""header":{"cluster_id":"1","revision":"5"}"#;
    http("200 OK", &format!(r#"{{{header},"token":"{token}"}}"#))
}

fn refuses(status: &str, why: &str) -> String {
    http(status, &format!(r#"{{"error":"{why}","message":"{why}"}}"#))
}

fn stale() -> String {
    refuses("401 Unauthorized", "etcdserver: invalid auth token")
}

/// What a request asks for, and the token it has.
fn asked(request: &str) -> (String, Option<String>) {
    let path = request.split(' ').nth(1).unwrap_or_default();
    let token = request.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("authorization")
            .then(|| value.to_owned())
    });
    (path.to_owned(), token)
}

#[test]
fn a_user_is_authenticated_once_and_its_token_goes_with_every_request() {
    let (endpoint, requests) = server(vec![token("t.1"), ok(1, 5), ok(1, 6)]);
    let mut gateway = gateway_with(&endpoint, user("open sesame\r\n"));
    for _ in 0..2 {
        assert!(gateway.read(patient()).is_ok());
    }
    let first = requests.recv().unwrap();
    assert_eq!(asked(&first), ("/v3/auth/authenticate".into(), None));
    let (_, body) = first.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        body,
        serde_json::json!({"name": "colo", "password": PASSWORD})
    );
    for _ in 0..2 {
        let next = requests.recv().unwrap();
        assert_eq!(asked(&next), ("/v3/kv/range".into(), Some("t.1".into())));
    }
}

#[test]
fn a_token_that_etcd_has_forgotten_is_replaced_once() {
    for forgotten in [
        stale(),
        refuses("400 Bad Request", "etcdserver: user name is empty"),
        refuses(
            "400 Bad Request",
            "etcdserver: revision of auth store is old",
        ),
    ] {
        let (endpoint, requests) = server(vec![
            token("t.1"),
            ok(1, 5),
            forgotten,
            token("t.2"),
            ok(1, 5),
        ]);
        let mut gateway = gateway_with(&endpoint, user(PASSWORD));
        for _ in 0..2 {
            assert!(gateway.read(patient()).is_ok());
        }
        let tokens: Vec<_> = requests.iter().take(5).map(|r| asked(&r).1).collect();
        let [one, two] = ["t.1", "t.2"].map(|token| Some(token.to_owned()));
        assert_eq!(tokens, [None, one.clone(), one, None, two]);
    }
    // One that is refused at once will be refused again.
    let (endpoint, requests) = server(vec![
        token("t.1"),
        stale(),
        token("t.2"),
        stale(),
        token("t.3"),
        ok(1, 5),
    ]);
    let mut gateway = gateway_with(&endpoint, user(PASSWORD));
    let error = gateway.read(patient()).unwrap_err();
    assert!(
        error.chain().contains("invalid auth token"),
        "{}",
        error.chain()
    );
    assert_eq!(requests.iter().take(4).count(), 4);
    assert!(requests.try_recv().is_err());
    // The next request tries again.
    assert!(gateway.read(patient()).is_ok());
}

#[test]
fn an_etcd_that_asks_nobody_who_he_is_is_asked_without_a_token_until_it_does() {
    let off = || {
        let why = "etcdserver: authentication is not enabled";
        refuses("412 Precondition Failed", why)
    };
    let (endpoint, requests) = server(vec![
        off(),
        ok(1, 5),
        ok(1, 5),
        refuses("400 Bad Request", "etcdserver: user name is empty"),
        token("t.1"),
        ok(1, 5),
    ]);
    let mut gateway = gateway_with(&endpoint, user(PASSWORD));
    for _ in 0..3 {
        assert!(gateway.read(patient()).is_ok());
    }
    let last = requests.iter().nth(5).unwrap();
    assert_eq!(asked(&last), ("/v3/kv/range".into(), Some("t.1".into())));
}

#[test]
fn a_password_that_is_refused_is_an_error_that_says_whose_and_not_which() {
    for (answer, what) in [
        (
            refuses(
                "400 Bad Request",
                "etcdserver: authentication failed, invalid user ID or password",
            ),
            "refused with status 400: etcdserver: authentication failed",
        ),
        (
            refuses("400 Bad Request", "no open sesame here"),
            "has a secret in it",
        ),
        (http("200 OK", r#""open sesame""#), "a token that is none"),
        (token("a b"), "a token that is none"),
    ] {
        let (endpoint, requests) = server(vec![answer]);
        let mut gateway = gateway_with(&endpoint, user(PASSWORD));
        let error = gateway.read(patient()).unwrap_err();
        let chain = error.chain();
        assert!(
            chain.contains(r#"user "colo" is not authenticated"#),
            "{chain}"
        );
        assert!(chain.contains(what), "{chain}");
        assert_eq!(requests.iter().take(1).count(), 1);
        for said in [chain, format!("{error:?}"), format!("{gateway:?}")] {
            assert!(!said.contains("sesame"), "{said}");
        }
    }
}

#[test]
fn neither_password_nor_token_is_in_what_is_said_of_a_gateway() {
    let (endpoint, _requests) = server(vec![token("t.secret"), ok(1, 5)]);
    let mut gateway = gateway_with(&endpoint, user(PASSWORD));
    assert!(gateway.read(patient()).is_ok());
    let said = format!("{gateway:?} {:?}", user(PASSWORD));
    assert!(said.contains("colo") && said.contains("the test"), "{said}");
    assert!(
        !said.contains("sesame") && !said.contains("t.secret"),
        "{said}"
    );
}

#[test]
fn authentication_has_no_more_time_than_the_request_it_is_for() {
    for answers in [vec![], vec![token("t.1")], vec![token("t.1"), stale()]] {
        let (endpoint, _requests) = server(answers);
        let deadline = soon();
        let error = gateway_with(&endpoint, user(PASSWORD))
            .read(deadline)
            .unwrap_err();
        assert!(Instant::now() >= deadline);
        assert!(deadline.elapsed() < Duration::from_secs(30));
        assert!(error.chain().contains("no answer"), "{}", error.chain());
    }
}

#[test]
fn an_etcd_that_will_not_be_content_is_told_from_one_that_may() {
    for (answer, lasts) in [
        (
            refuses("403 Forbidden", "etcdserver: permission denied"),
            true,
        ),
        (
            refuses("400 Bad Request", "etcdserver: user name is empty"),
            true,
        ),
        (
            refuses("503 Service Unavailable", "etcdserver: no leader"),
            false,
        ),
        (http("200 OK", "{}"), false),
        (String::new(), false),
    ] {
        let (endpoint, _requests) = server(vec![answer.clone()]);
        let error = gateway(&endpoint).read(patient()).unwrap_err();
        let error = EtcdError::of(&error).unwrap();
        assert_eq!(error.is_lasting(), lasts, "{answer}");
    }
    // Even if an endpoint that is down is asked after it.
    let (endpoint, _requests) = server(vec![refuses("403 Forbidden", "no")]);
    let mut gateway = gateway(&format!("{endpoint},127.0.0.1:1"));
    let error = gateway.read(patient()).unwrap_err();
    assert!(EtcdError::of(&error).unwrap().is_lasting(), "{error:?}");
    assert!(error.chain().contains("403"));
}

#[test]
fn a_password_is_one_line_of_a_file_and_read_again_when_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    for (text, what) in [
        (b"".as_slice(), "nothing"),
        (b"\n", "nothing"),
        (b"a\nb\n", "several lines"),
        (b"\xff", "no utf-8 text"),
    ] {
        std::fs::write(&file, text).unwrap();
        let password = Credential::file(&file).unwrap();
        let error = Gateway::new(
            &"a:1".parse().unwrap(),
            "k",
            EtcdOptions::default().user("colo", password),
        )
        .unwrap_err();
        let said = format!("{} has {what} instead of a password", file.display());
        assert_eq!(error.to_string(), said);
    }
    let denied = || {
        let why = "etcdserver: authentication failed, invalid user ID or password";
        refuses("400 Bad Request", why)
    };
    let (endpoint, requests) = server(vec![denied(), denied(), token("t.1"), ok(1, 5)]);
    std::fs::write(&file, "old").unwrap();
    let mut gateway = gateway_with(
        &endpoint,
        EtcdOptions::default().user("colo", Credential::file(&file).unwrap()),
    );
    assert!(gateway.read(patient()).is_err());
    assert_eq!(requests.iter().take(1).count(), 1);
    std::fs::write(&file, "new\n").unwrap();
    assert!(gateway.read(patient()).is_ok());
    let passwords: Vec<_> = requests.iter().take(2).collect();
    assert!(passwords[0].ends_with(r#""password":"old"}"#));
    assert!(passwords[1].ends_with(r#""password":"new"}"#));
    // What is no password any more changes nothing.
    std::fs::write(&file, "").unwrap();
    assert!(!gateway.read_again());
}

#[test]
fn a_file_that_is_too_long_or_not_there_is_named() {
    let error = Credential::file("/none/such").unwrap_err();
    assert_eq!(error.to_string(), "cannot read /none/such");
    let error = Credential::file("/dev/zero").unwrap_err();
    assert_eq!(error.to_string(), "/dev/zero has more than 1048576 bytes");
}

#[test]
fn options_that_do_not_fit_the_endpoints_are_refused() {
    let new = |address: &str, options| {
        Gateway::new(&address.parse().unwrap(), "k", options)
            .unwrap_err()
            .to_string()
    };
    let ca = || EtcdOptions::default().authority(Credential::new("the test", ""));
    assert_eq!(
        new("a:1", ca()),
        "certificates are given, and the endpoints are not https://"
    );
    let mut nobody = user(PASSWORD);
    nobody.user.as_mut().unwrap().name.clear();
    assert_eq!(new("a:1", nobody), "a user of etcd's without a name");
    if cfg!(feature = "etcd-tls") {
        assert_eq!(
            new("https://a:1", ca()),
            "the test has no certificate in pem"
        );
        assert_eq!(
            new("https://a:1", EtcdOptions::default()),
            "https:// endpoints need the certificates of their authority"
        );
    } else {
        assert_eq!(
            new("https://a:1", ca()),
            "https:// endpoints need the feature etcd-tls, which was not built"
        );
    }
}

/// Each error of a chain, as it is shown.
fn shown(error: &dyn Error) -> Vec<String> {
    let mut texts = vec![error.to_string()];
    texts.extend(error.source().map(shown).into_iter().flatten());
    texts
}

#[test]
fn what_etcd_or_a_path_puts_into_an_error_moves_no_cursor() {
    let is_plain = |text: &str| !text.contains(|c: char| c.is_control() || c == '\u{202e}');
    let evil = "\x1b[2J\u{202e}";
    let (escape, reversed) = (r"\u001b[2J", r"\u202e");
    for answer in [
        format!("{evil}\r\n\r\n"),
        format!("HTTP/1.1 200 {evil}\r\n{evil}: {evil}\r\n\r\n"),
        refuses("400 Bad Request", &format!("{escape}{reversed}")),
        http("500 No", evil),
        http("200 OK", evil),
        http("200 OK", &format!(r#"{{"header":"{escape}{reversed}"}}"#)),
        http(
            "200 OK",
            &format!(r#"{{"header":{{"cluster_id":"{escape}","revision":"{reversed}"}}}}"#),
        ),
    ] {
        let (endpoint, _requests) = server(vec![answer.clone()]);
        let error = gateway(&endpoint).read(patient()).unwrap_err();
        assert!(is_plain(&error.chain()), "{answer:?}: {:?}", error.chain());
        for text in shown(&error) {
            assert!(is_plain(&text), "{answer:?}: {text:?}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let error = Credential::file(dir.path().join(evil)).unwrap_err();
    assert!(is_plain(&error.to_string()), "{error:?}");
    let error = ArbiterError::because(evil, io::Error::other(evil));
    assert!(is_plain(&error.chain()), "{error:?}");
    let name = user(PASSWORD).user(evil, Credential::new(evil, PASSWORD));
    let (endpoint, _requests) = server(vec![refuses("400 Bad Request", "no")]);
    let error = gateway_with(&endpoint, name).read(patient()).unwrap_err();
    assert!(is_plain(&error.chain()), "{:?}", error.chain());
}
