//! A destination whose process has no descriptors left. Alone in its file: the limit is the process's.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use migration_net::incoming::{Acceptor, Limits, Refusal};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Lets the process have descriptors below this number.
fn allow_below(number: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(number);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

#[test]
fn a_host_without_descriptors_is_waited_for_without_spinning_and_takes_the_source_later() {
    let before = getrlimit(Resource::Nofile).current.unwrap_or(1024);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || TcpStream::connect(address).unwrap();
    let silent: Vec<_> = (0..8).map(|_| connect()).collect();
    let mut main = connect();
    main.write_all(b"QEVM").unwrap();
    let (tell, refused) = mpsc::channel();
    let limits = Limits::default().grace(Duration::from_secs(3600));
    let mut acceptor = Acceptor::new(listener, None, limits)
        .unwrap()
        .on_refused(move |refusal| tell.send(refusal.clone()).unwrap());
    // Room for three of them: those that are open have the lowest numbers.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
    allow_below(open + 3);
    let accept = thread::spawn(move || {
        let incoming = acceptor.accept(None);
        (incoming, clock_gettime(ClockId::ThreadCPUTime))
    });
    let limit = Duration::from_secs(20);
    let refusal = refused.recv_timeout(limit).unwrap();
    assert!(matches!(refusal, Refusal::Exhausted(_)), "{refusal}");
    // Said once, however long it lasts.
    assert!(refused.recv_timeout(Duration::from_millis(700)).is_err());
    allow_below(before);
    let (incoming, cpu) = accept.join().unwrap();
    incoming.unwrap();
    // Whoever spins for 0.7 s needs far more than this.
    assert!(
        Duration::try_from(cpu).unwrap() < Duration::from_millis(200),
        "{cpu:?}"
    );
    drop(silent);
}
