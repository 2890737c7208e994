//! Listeners and connections of every kind of address.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a crate of its own"
)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use migration_net::{Address, AddressError, Listener, ResolvedAddress};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn listen(text: &str) -> Listener {
    Listener::bind(&text.parse().unwrap()).unwrap()
}

fn connect(address: &Address) -> io::Result<std::os::fd::OwnedFd> {
    let deadline = Instant::now() + Duration::from_secs(5);
    ResolvedAddress::new(address, deadline, None)?.connect(deadline, None)
}

/// Whether a connection waits: what a driver that polls sees.
fn has_visitor(listener: &Listener) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

fn port(listener: &Listener) -> u16 {
    match listener.address() {
        Address::Tcp { port, .. } => *port,
        other => panic!("{other}"),
    }
}

#[test]
fn an_empty_host_is_reached_by_both_families_at_one_port() {
    let listener = listen("tcp::0");
    let port = port(&listener);
    assert_eq!(listener.address().to_string(), format!("tcp::{port}"));
    let all: Vec<_> = listener
        .addresses()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        all,
        [format!("tcp:0.0.0.0:{port}"), format!("tcp:[::]:{port}")]
    );
    for host in ["127.0.0.1", "::1", "localhost", ""] {
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
        let mut client = UnixStream::from(connect(&Address::tcp(host, port)).unwrap());
        assert!(has_visitor(&listener), "{host}");
        let mut server = UnixStream::from(listener.accept().unwrap());
        client.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        server.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }
}

#[test]
fn a_family_that_is_excluded_is_neither_listened_on_nor_tried() {
    for (option, at, not_at) in [
        ("ipv4=on", "127.0.0.1", "::1"),
        ("ipv6=off", "127.0.0.1", "::1"),
        ("ipv6=on", "::1", "127.0.0.1"),
        ("ipv4=off", "::1", "127.0.0.1"),
    ] {
        let listener = listen(&format!("tcp::0,{option}"));
        let port = port(&listener);
        connect(&Address::tcp(at, port)).unwrap();
        connect(&Address::tcp(not_at, port)).unwrap_err();
        // A peer that excludes the family it would need says so.
        let text = format!("tcp:{not_at}:{port},{option}");
        let text = text.replace("tcp:::1:", "tcp:[::1]:");
        let error = connect(&text.parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("has no IPv"), "{error}");
    }
}

#[test]
fn a_wildcard_of_ipv6_alone_takes_ipv4_too_unless_it_is_excluded() {
    let listener = listen("tcp:[::]:0");
    connect(&Address::tcp("127.0.0.1", port(&listener))).unwrap();
    let listener = listen("tcp:[::]:0,ipv4=off");
    connect(&Address::tcp("127.0.0.1", port(&listener))).unwrap_err();
    connect(&Address::tcp("::1", port(&listener))).unwrap();
}

#[test]
fn a_port_that_is_busy_in_one_family_is_busy() {
    let v6 = TcpListener::bind("[::1]:0").unwrap();
    let port = v6.local_addr().unwrap().port();
    let address: Address = format!("tcp:localhost:{port}").parse().unwrap();
    // Where the name has no IPv6 address there is nothing to be busy.
    let named = format!("tcp:localhost:{port},ipv6=on").parse().unwrap();
    if ResolvedAddress::new(&named, Instant::now() + Duration::from_secs(5), None).is_ok() {
        let error = Listener::bind(&address).unwrap_err();
        assert!(matches!(error, AddressError::Busy { .. }), "{error}");
    }
    let error = Listener::bind(&format!("tcp:[::1]:{port}").parse().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), format!("tcp:[::1]:{port} is in use"));
}

#[test]
fn the_next_port_up_to_the_last_is_taken_where_one_is_busy() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let first = busy.local_addr().unwrap().port();
    let last = first.saturating_add(20);
    let found = listen(&format!("tcp:127.0.0.1:{first},to={last}"));
    assert!((first + 1..=last).contains(&port(&found)), "{found:?}");
    let none = Listener::bind(&format!("tcp:127.0.0.1:{first},to={first}").parse().unwrap());
    assert!(matches!(none, Err(AddressError::Busy { .. })));
    // It means nothing to who connects.
    let to = format!("tcp:127.0.0.1:{first},to={last}").parse().unwrap();
    let error = connect(&to).unwrap_err().to_string();
    assert_eq!(error, "option 'to' is for listening");
}

#[test]
fn a_unix_socket_that_a_dead_process_left_is_replaced_and_removed_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let address = Address::Unix(path.clone());
    for _ in 0..2 {
        let listener = Listener::bind(&address).unwrap();
        connect(&address).unwrap();
        assert!(has_visitor(&listener));
        listener.accept().unwrap();
        let second = Listener::bind(&address);
        assert!(matches!(second, Err(AddressError::Busy { .. })));
        drop(listener);
        assert!(!path.exists());
    }
    std::fs::write(&path, "precious").unwrap();
    let refused = Listener::bind(&address);
    assert!(matches!(refused, Err(AddressError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn abstract_sockets_have_no_file_and_know_their_padding() {
    let name = format!("multifd-addresses-{}", std::process::id());
    for tight in [true, false] {
        let address = Address::abstract_unix(name.as_bytes(), tight).unwrap();
        let other = Address::abstract_unix(name.as_bytes(), !tight).unwrap();
        let listener = Listener::bind(&address).unwrap();
        connect(&address).unwrap();
        listener.accept().unwrap();
        connect(&other).unwrap_err();
        let second = Listener::bind(&address);
        assert!(matches!(second, Err(AddressError::Busy { .. })));
    }
}

#[test]
fn a_flood_on_one_family_does_not_keep_the_other_out() {
    let listener = listen("tcp::0");
    let port = port(&listener);
    let _flood: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    let v6 = TcpStream::connect(("::1", port)).unwrap();
    let ours = v6.local_addr().unwrap();
    let found = (0..2).any(|_| {
        let accepted = TcpStream::from(listener.accept().unwrap());
        accepted.peer_addr().unwrap() == ours
    });
    assert!(found, "one of the first two is the other family's");
}

#[test]
fn a_peer_that_does_not_answer_costs_its_share_of_the_time_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _full = UnixStream::connect(&path).unwrap();
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(100);
    let route = ResolvedAddress::new(&Address::Unix(path), deadline, None).unwrap();
    let error = route.connect(deadline, None).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[test]
fn multipath_tcp_is_used_or_refused_by_the_system() {
    match Listener::bind(&"tcp:127.0.0.1:0,mptcp=on".parse().unwrap()) {
        Ok(listener) => {
            let to = format!("{},mptcp=on", listener.address());
            connect(&to.parse().unwrap()).unwrap();
            listener.accept().unwrap();
        }
        Err(error) => assert!(matches!(error, AddressError::Bind { .. }), "{error}"),
    }
}
