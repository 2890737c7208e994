//! Channels over real descriptors.

use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::io::sys::MAX_IOVECS;
use crate::io::{deadline_after, is_cancelled};

const SHORT: Duration = Duration::from_millis(20);

fn pair() -> (FdChannel, FdChannel) {
    let (a, b) = UnixStream::pair().unwrap();
    (
        FdChannel::new(a, SHORT).unwrap(),
        FdChannel::new(b, SHORT).unwrap(),
    )
}

fn tcp_pair() -> (FdChannel, FdChannel) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let a = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (
        FdChannel::new(a, SHORT).unwrap(),
        FdChannel::new(listener.accept().unwrap().0, SHORT).unwrap(),
    )
}

#[test]
fn a_gather_write_arrives_in_order_and_scatters_into_guest_memory_first() {
    let (mut a, mut b) = pair();
    let mut page = vec![7u8; 4096];
    let guest = VolatileSlice::from(page.as_mut_slice());
    a.write_all(&[
        Chunk::Bytes(b"ab"),
        Chunk::Bytes(b""),
        Chunk::Guest(guest),
        Chunk::Bytes(b"z"),
    ])
    .unwrap();
    let mut head = [0; 2];
    assert_eq!(b.read(&mut head).unwrap(), 2);
    assert_eq!(&head, b"ab");
    let mut landed = vec![0u8; 4096];
    let slice = VolatileSlice::from(landed.as_mut_slice());
    let mut tail = [0; 16];
    assert_eq!(b.read_scatter(&[slice], &mut tail).unwrap(), 4097);
    assert_eq!(tail[0], b'z');
    assert_eq!(landed, page);
}

#[test]
fn a_silent_peer_is_an_error_when_the_deadline_has_passed() {
    let (_a, mut b) = pair();
    assert_eq!(b.try_read(&mut [0; 4]).unwrap(), None);
    assert_eq!(
        b.read(&mut [0; 4]).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    b.set_read_deadline(Some(Instant::now()));
    assert_eq!(
        b.read(&mut [0; 4]).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    assert_eq!(
        b.wait(None, Some(Instant::now())).unwrap(),
        Readiness::TimedOut
    );
}

#[test]
fn a_limit_without_an_end_is_no_limit() {
    for ((a, b), mode) in [(pair(), SendMode::Splice), (tcp_pair(), SendMode::ZeroCopy)] {
        let [mut a, mut b] = [a, b].map(|channel| FdChannel {
            limit: Duration::MAX,
            ..channel
        });
        a.set_send_mode(mode).unwrap();
        let mut pages = vec![7u8; 8 << 20];
        let reader = thread::spawn(move || {
            let (mut n, mut buf) = (0, vec![0; 1 << 20]);
            while n < 8 << 20 {
                n += b.read(&mut buf).unwrap();
            }
            b
        });
        let guest = VolatileSlice::from(pages.as_mut_slice());
        a.write_all(&[Chunk::Guest(guest)]).unwrap();
        a.wait_until_released().unwrap();
        let mut b = reader.join().unwrap();
        let writer = thread::spawn(move || a.write_all(&[Chunk::Bytes(b"z")]).map(|()| a));
        let far = Some(deadline_after(Duration::MAX));
        assert_eq!(b.wait(None, far).unwrap(), Readiness::Channel);
        assert_eq!(b.read(&mut [0; 4]).unwrap(), 1);
        writer.join().unwrap().unwrap();
    }
}

#[test]
fn a_peer_that_takes_nothing_is_an_error_when_the_deadline_has_passed() {
    let (mut a, _b) = pair();
    let big = vec![0u8; 8 << 20];
    assert_eq!(
        a.write_all(&[Chunk::Bytes(&big)]).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
}

#[test]
fn what_tcp_has_received_is_acknowledged_at_once_by_who_waits() {
    let (_peer, mut channel) = tcp_pair();
    let is_prompt = |channel: &FdChannel| sockopt::tcp_quickack(channel).unwrap();
    let be_late = |channel: &FdChannel| {
        // As after something was sent.
        sockopt::set_tcp_quickack(channel, false).unwrap();
        assert!(!is_prompt(channel));
    };
    be_late(&channel);
    channel.read(&mut [0; 4]).unwrap_err();
    assert!(is_prompt(&channel));
    be_late(&channel);
    channel.wait(None, Some(Instant::now() + SHORT)).unwrap();
    assert!(is_prompt(&channel));
    // Nobody waits for the acknowledgement.
    channel.set_quick_ack(false);
    for mut handle in [channel.share(), channel] {
        be_late(&handle);
        handle.read(&mut [0; 4]).unwrap_err();
        assert!(!is_prompt(&handle));
        handle.set_quick_ack(true);
        handle.read(&mut [0; 4]).unwrap_err();
        assert!(is_prompt(&handle));
    }
}

#[test]
fn a_spliced_page_is_what_the_memory_holds_when_the_peer_reads_it() {
    let (mut a, mut b) = pair();
    a.set_send_mode(SendMode::Splice).unwrap();
    let mut pages = vec![7u8; 3 * 4096];
    let guest = VolatileSlice::from(pages.as_mut_slice());
    let (odd, rest) = guest.split_at(100).unwrap();
    a.write_all(&[Chunk::Bytes(b"ab"), Chunk::Guest(odd), Chunk::Guest(rest)])
        .unwrap();
    let late = a.wait_until_released().unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::TimedOut, "{late}");
    guest.subslice(4096, 4096).unwrap().copy_from(&[8u8; 4096]);
    let reader = thread::spawn(move || {
        let mut landed = vec![0; 2 + 3 * 4096];
        let mut n = 0;
        while n < landed.len() {
            n += b.read(&mut landed[n..]).unwrap();
        }
        landed
    });
    a.set_write_deadline(Some(Instant::now() + Duration::from_secs(60)));
    assert_eq!(a.wait_until_released().unwrap(), 0);
    let landed = reader.join().unwrap();
    assert_eq!(landed, [&b"ab"[..], &pages].concat());
    assert_eq!(pages[4096..8192], [8; 4096]);
}

#[test]
fn much_more_than_the_socket_holds_is_spliced_as_the_peer_reads_it() {
    let (mut a, mut b) = pair();
    b.set_read_deadline(Some(Instant::now() + Duration::from_secs(60)));
    a.set_send_mode(SendMode::Splice).unwrap();
    let mut pages: Vec<u8> = (0..8_usize << 20)
        .map(|i| (i / 4096 + i).to_le_bytes()[0])
        .collect();
    let sent = pages.clone();
    let reader = thread::spawn(move || {
        let mut landed = vec![0; 8 << 20];
        let slice = VolatileSlice::from(landed.as_mut_slice());
        let mut n = 0;
        while n < slice.len() {
            n += b
                .read_scatter(&[slice.offset(n).unwrap()], &mut [])
                .unwrap();
        }
        landed
    });
    a.set_write_deadline(Some(Instant::now() + Duration::from_secs(60)));
    let guest = VolatileSlice::from(pages.as_mut_slice());
    let pieces: Vec<_> = (0..guest.len())
        .step_by(4096)
        .map(|at| Chunk::Guest(guest.subslice(at, 4096).unwrap()))
        .collect();
    a.write_all(&pieces).unwrap();
    a.wait_until_released().unwrap();
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn pieces_of_our_own_between_spliced_pages_may_be_written_again_at_once() {
    const RECORDS: usize = 3000;
    // Together more than there is room for, and one that is too long to be spliced.
    const HEADERS: [usize; 3] = [8, 256, 4000];
    let (mut a, mut b) = pair();
    b.set_read_deadline(Some(Instant::now() + Duration::from_secs(60)));
    a.set_write_deadline(Some(Instant::now() + Duration::from_secs(60)));
    a.set_send_mode(SendMode::Splice).unwrap();
    let mut page = vec![7u8; 4096];
    let sent: Vec<u8> = (0..RECORDS)
        .flat_map(|i| {
            let header = vec![i.to_le_bytes()[0]; HEADERS[i % HEADERS.len()]];
            [header, page.clone()].concat()
        })
        .collect();
    let wanted = sent.len();
    let reader = thread::spawn(move || {
        let mut landed = vec![0; wanted];
        let mut n = 0;
        while n < wanted {
            n += b.read(&mut landed[n..]).unwrap();
        }
        landed
    });
    let guest = VolatileSlice::from(page.as_mut_slice());
    let mut headers = [[0u8; 4000]; 2];
    for i in (0..RECORDS).step_by(2) {
        for (of, header) in (i..).zip(&mut headers) {
            header.fill(of.to_le_bytes()[0]);
        }
        let [first, second] = &headers;
        a.write_all(&[
            Chunk::Bytes(&first[..HEADERS[i % HEADERS.len()]]),
            Chunk::Guest(guest),
            Chunk::Bytes(&second[..HEADERS[(i + 1) % HEADERS.len()]]),
            Chunk::Guest(guest),
        ])
        .unwrap();
        if i == RECORDS / 2 {
            a.wait_until_released().unwrap();
        }
    }
    a.wait_until_released().unwrap();
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn a_peer_that_has_gone_takes_no_spliced_page() {
    let mut page = vec![7u8; 4096];
    let guest = VolatileSlice::from(page.as_mut_slice());
    let (mut a, b) = pair();
    a.set_send_mode(SendMode::Splice).unwrap();
    drop(b);
    let gone = a.write_all(&[Chunk::Guest(guest)]).unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe, "{gone}");
}

#[test]
fn nobody_waits_for_a_peer_that_goes_without_reading_spliced_pages() {
    let mut page = vec![7u8; 4096];
    let guest = VolatileSlice::from(page.as_mut_slice());
    let far = Some(Instant::now() + Duration::from_secs(600));
    let (mut a, b) = pair();
    a.set_send_mode(SendMode::Splice).unwrap();
    a.write_all(&[Chunk::Guest(guest)]).unwrap();
    drop(b);
    a.set_write_deadline(far);
    // It reads nothing any more, whether that is said or not.
    if let Err(gone) = a.wait_until_released() {
        assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe, "{gone}");
    }
    // Nor when it is we who have closed the connection.
    let (mut a, _b) = pair();
    a.set_send_mode(SendMode::Splice).unwrap();
    a.write_all(&[Chunk::Guest(guest)]).unwrap();
    a.set_write_deadline(far);
    a.share().shutdown();
    let closed = a.wait_until_released().unwrap_err();
    assert_eq!(closed.kind(), io::ErrorKind::BrokenPipe, "{closed}");
}

#[test]
fn pages_are_spliced_over_unix_stream_sockets_alone_and_only_when_asked() {
    let (_, pipe) = std::io::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let others: [OwnedFd; 3] = [pipe.into(), file.into(), datagram.into()];
    let others = others.map(|other| FdChannel::new(other, SHORT).unwrap());
    for mut other in others.into_iter().chain([tcp_pair().0]) {
        let refused = other.set_send_mode(SendMode::Splice).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported, "{refused}");
        // It goes on with copies.
        assert!(other.taken().is_some());
    }
    let (mut a, _b) = pair();
    let mut page = vec![7u8; 4096];
    let guest = [Chunk::Guest(VolatileSlice::from(page.as_mut_slice()))];
    a.write_all(&guest).unwrap();
    assert_eq!(a.taken(), Some(4096));
    a.wait_until_released().unwrap();
    a.set_send_mode(SendMode::Splice).unwrap();
    // Another handle sends copies.
    let mut other = a.share();
    other.write_all(&guest).unwrap();
    assert_eq!((other.taken(), a.taken()), (Some(4096), None));
}

/// Cancels while a call waits, and says how that ended.
fn cancelled(
    mut channel: FdChannel,
    call: impl FnOnce(&mut FdChannel) -> io::Result<()>,
) -> io::Error {
    let token = CancelToken::new().unwrap();
    ByteSink::set_cancel(&mut channel, &token);
    let far = Some(deadline_after(Duration::MAX));
    (channel.read_deadline, channel.write_deadline) = (far, far);
    let canceller = thread::spawn(move || {
        thread::sleep(SHORT);
        token.cancel();
    });
    let error = call(&mut channel).unwrap_err();
    canceller.join().unwrap();
    assert!(is_cancelled(&error), "{error}");
    // It stays so, whatever the peer does.
    assert!(is_cancelled(&channel.write_all(&[]).unwrap_err()));
    assert!(is_cancelled(
        &channel.share().read(&mut [0; 1]).unwrap_err()
    ));
    error
}

#[test]
fn every_wait_ends_when_it_is_cancelled() {
    let mut much = vec![7u8; 32 << 20];
    let guest = VolatileSlice::from(much.as_mut_slice());
    for (a, b) in [pair(), tcp_pair()] {
        cancelled(a, |a| a.write_all(&[Chunk::Guest(guest)]));
        cancelled(b, |b| {
            loop {
                b.read(&mut [0; 1 << 16])?;
            }
        });
    }
    let (a, _b) = pair();
    cancelled(a, |a| {
        a.set_send_mode(SendMode::Splice).unwrap();
        a.write_all(&[Chunk::Guest(guest)])
    });
    let (a, _b) = pair();
    cancelled(a, |a| {
        a.set_send_mode(SendMode::Splice).unwrap();
        a.write_all(&[Chunk::Guest(guest.subslice(0, 4096).unwrap())])
            .unwrap();
        a.wait_until_released().map(drop)
    });
    for (_other, unread) in [pair(), tcp_pair()] {
        cancelled(unread, |c| c.wait(None, None).map(drop));
    }
    let (a, _b) = tcp_pair();
    cancelled(a, |a| {
        // Loopback copies; a full socket is what is waited for.
        a.set_send_mode(SendMode::ZeroCopy).unwrap();
        a.write_all(&[Chunk::Guest(guest)])?;
        a.wait_until_released().map(drop)
    });
}

#[test]
fn shutdown_wakes_the_other_handles() {
    let (a, mut b) = pair();
    let mut other = a.share();
    a.shutdown();
    assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(b.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn more_pieces_than_one_call_takes_are_written_in_several() {
    let (mut a, mut b) = pair();
    let chunks = vec![Chunk::Bytes(b"x"); MAX_IOVECS + 10];
    a.write_all(&chunks).unwrap();
    let mut buf = vec![0; MAX_IOVECS + 10];
    let mut n = 0;
    while n < buf.len() {
        n += b.read(&mut buf[n..]).unwrap();
    }
    assert!(buf.iter().all(|b| *b == b'x'));
}
