//! The gateway against servers of the tests' own, which answer what no etcd does.

use std::io::{Read, Write};
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
    Gateway::new(&endpoints.parse().unwrap(), "colo/a")
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
