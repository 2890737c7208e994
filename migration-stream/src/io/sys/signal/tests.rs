//! A process in which these signals are deadly, as in a host that is not a Rust program.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::*;
use crate::io::{ByteSink, Chunk, FdChannel, PositionedFile, SendMode};

/// Set in the process in which the signals are deadly.
const CHILD: &str = "MIGRATION_STREAM_DEADLY_SIGNALS";
/// How large a file may be there, bytes.
const FILE_LIMIT: u64 = 64 << 10;

fn make_deadly() {
    for signal in OF_WRITES {
        // SAFETY: the default action has no handler to point to.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let limit = libc::rlimit {
        rlim_cur: FILE_LIMIT,
        rlim_max: FILE_LIMIT,
    };
    // SAFETY: the limit lives for the call.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
    assert_eq!(set, 0);
}

fn is_pending(signal: libc::c_int) -> bool {
    let mut pending = set_of(&[]);
    // SAFETY: the set lives for the call.
    unsafe { libc::sigpending(&raw mut pending) };
    contains(&pending, signal)
}

fn block(how: libc::c_int) {
    let set = set_of(&OF_WRITES);
    // SAFETY: the set lives for the call.
    let error = unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) };
    assert_eq!(error, 0);
}

/// Writes until it fails; TCP hears of its peer by what it sends.
fn write_to_the_end(channel: &mut FdChannel) -> io::Error {
    let mut page = vec![7u8; 4096];
    let guest = VolatileSlice::from(page.as_mut_slice());
    let write = |_| {
        channel
            .write_all(&[Chunk::Bytes(b"head"), Chunk::Guest(guest)])
            .err()
    };
    (0..1000).find_map(write).unwrap()
}

fn sockets() -> [(OwnedFd, OwnedFd); 2] {
    let (a, b) = UnixStream::pair().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let c = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let d = listener.accept().unwrap().0;
    [(a.into(), b.into()), (c.into(), d.into())]
}

/// A connection that has such a mode.
fn socket_for(mode: SendMode) -> (OwnedFd, OwnedFd) {
    let [unix, tcp] = sockets();
    if mode == SendMode::ZeroCopy {
        tcp
    } else {
        unix
    }
}

fn channel(fd: impl Into<OwnedFd>) -> FdChannel {
    FdChannel::new(fd, Duration::from_secs(10)).unwrap()
}

fn gone(error: &io::Error) {
    let kind = error.kind();
    let is_gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&kind);
    assert!(is_gone, "{error}");
}

fn every_write_that_can_raise_one() {
    for (ours, theirs) in sockets() {
        drop(theirs);
        gone(&write_to_the_end(&mut channel(ours)));
    }
    for mode in [SendMode::ZeroCopy, SendMode::Splice] {
        let (ours, theirs) = socket_for(mode);
        let mut ours = channel(ours);
        ours.set_send_mode(mode).unwrap();
        drop(theirs);
        gone(&write_to_the_end(&mut ours));
    }
    // The peer goes while much is on its way.
    for mode in [SendMode::ZeroCopy, SendMode::Splice] {
        let (ours, theirs) = socket_for(mode);
        let mut ours = channel(ours);
        ours.set_send_mode(mode).unwrap();
        let reader = std::thread::spawn(move || {
            File::from(theirs)
                .read_exact(&mut vec![0; 300_000])
                .unwrap();
        });
        let mut pages = vec![7u8; 8 << 20];
        let guest = VolatileSlice::from(pages.as_mut_slice());
        gone(&ours.write_all(&[Chunk::Guest(guest)]).unwrap_err());
        reader.join().unwrap();
    }
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    gone(&write_to_the_end(&mut channel(writer)));

    let file = tempfile::tempfile().unwrap();
    let mut page = vec![7u8; 4096];
    let guest = VolatileSlice::from(page.as_mut_slice());
    file.write_guest(FILE_LIMIT - 4096, &guest).unwrap();
    let too_large = |error: io::Error| assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    too_large(file.write_guest(FILE_LIMIT, &guest).unwrap_err());
    too_large(PositionedFile::write_at(&file, FILE_LIMIT, b"x").unwrap_err());
    too_large(write_to_the_end(&mut channel(file)));
    assert!(OF_WRITES.into_iter().all(|signal| !is_pending(signal)));
}

fn what_others_have_blocked_stays() {
    let (reader, mut writer) = io::pipe().unwrap();
    drop(reader);
    block(libc::SIG_BLOCK);
    let mut channel = channel(writer.try_clone().unwrap());
    gone(&write_to_the_end(&mut channel));
    assert!(!is_pending(libc::SIGPIPE));
    gone(&writer.write(b"x").unwrap_err());
    assert!(is_pending(libc::SIGPIPE));
    gone(&write_to_the_end(&mut channel));
    assert!(is_pending(libc::SIGPIPE), "somebody else's");
    // SAFETY: no handler to point to; ignoring a signal takes away what is pending of it.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    block(libc::SIG_UNBLOCK);
    assert!(!is_pending(libc::SIGPIPE));
}

#[test]
fn a_write_that_fails_is_an_error_where_its_signal_would_be_deadly() {
    if std::env::var_os(CHILD).is_some() {
        make_deadly();
        every_write_that_can_raise_one();
        what_others_have_blocked_stays();
        println!("alive");
        return;
    }
    let this = std::thread::current().name().unwrap().to_owned();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &this])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let complained = String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success(),
        "{}: {said}{complained}",
        child.status
    );
    assert!(said.contains("alive"), "{said}");
}
