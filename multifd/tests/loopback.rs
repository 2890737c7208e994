//! Both ends over real sockets: every page that was sent is there after the sync point.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, PAGE, Pages, memory};
use migration_stream::io::{ByteSource, FdChannel, SendMode};
use migration_stream::ram::{BlockId, ZeroPageDetection};
use migration_stream::raw::transport::{PageBarrier, SendPages};
use migration_stream::{GuestRamMmap, PAGE_SIZE, StreamWriter, TransportCounters, WhenToCompare};
use multifd::{ChannelCount, Compression, MultifdConfig, RecvSet, SendSet, ZlibLevel, ZstdLevel};

fn config(channels: u8, compression: Compression) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap())
        .compression(compression)
        .uuid([9; 16])
        .stall_limit(LIMIT)
}

fn zlib() -> Compression {
    Compression::Zlib(ZlibLevel::default())
}

fn zstd() -> Compression {
    Compression::Zstd(ZstdLevel::default())
}

/// Where both ends meet.
#[derive(Clone, Copy, Debug)]
enum Over {
    Tcp,
    Unix,
}

/// The connected ends of the main channel and of the others.
struct Ends {
    main: FdChannel,
    channels: Vec<FdChannel>,
}

fn connections(over: Over, config: &MultifdConfig) -> (Ends, Ends) {
    let connection = || -> (OwnedFd, OwnedFd) {
        match over {
            Over::Unix => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                (ours.into(), theirs.into())
            }
            Over::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                ours.set_nodelay(true).unwrap();
                (ours.into(), listener.accept().unwrap().0.into())
            }
        }
    };
    let channel = |fd| FdChannel::new(fd, LIMIT).unwrap();
    let pair = || {
        let (ours, theirs) = connection();
        (channel(ours), channel(theirs))
    };
    let (main, incoming_main) = pair();
    let (ours, theirs) = config.channels.ids().map(|_| pair()).unzip();
    let ends = |main, channels| Ends { main, channels };
    (ends(main, ours), ends(incoming_main, theirs))
}

/// The main stream here carries nothing but the flushes.
fn wait_for_flush(main: &mut FdChannel, barrier: &mut dyn PageBarrier) {
    let mut record = [0; 8];
    let mut have = 0;
    while have < record.len() {
        let n = main.read(&mut record[have..]).unwrap();
        assert_ne!(n, 0, "the main stream ended instead of a flush");
        have += n;
    }
    assert_eq!(record, [0, 0, 0, 0, 0, 0, 2, 0]);
    barrier.flush().unwrap();
}

struct Migration {
    ram: Arc<GuestRamMmap>,
    main: StreamWriter,
    send: SendSet,
    incoming_main: FdChannel,
    recv: RecvSet<GuestRamMmap>,
}

const PAGES: [u64; 2] = [700, 33];

impl Migration {
    fn start(over: Over, config: &MultifdConfig) -> Self {
        let (outgoing, incoming) = connections(over, config);
        let ram = Arc::new(memory(&PAGES));
        let channels = outgoing.channels.into_iter().map(Into::into).collect();
        let send = SendSet::start(ram.clone(), channels, config).unwrap();
        let channels = incoming.channels.into_iter().map(Into::into).collect();
        let recv = RecvSet::start(memory(&PAGES), channels, config, |e| panic!("{e}")).unwrap();
        let main = StreamWriter::new(outgoing.main);
        Self {
            ram,
            main,
            send,
            incoming_main: incoming.main,
            recv,
        }
    }

    fn send(&mut self, block: u32, page: u64, pages: u64) {
        self.send
            .send(&mut self.main, BlockId::new(block), page * PAGE_SIZE, pages)
            .unwrap();
    }

    /// Syncs, and checks that both memories are equal then.
    fn sync(&mut self) {
        self.send.sync(&mut self.main).unwrap();
        wait_for_flush(&mut self.incoming_main, &mut self.recv.barrier());
        assert_eq!(self.ram.differing_pages(self.recv.store()), []);
    }

    fn finish(self) -> TransportCounters {
        let counters = self.send.join().unwrap();
        let joined = self.recv.join().unwrap();
        joined.outcome.unwrap();
        assert_eq!(self.ram.differing_pages(&joined.store), []);
        counters
    }
}

/// A whole round, then rounds with few pages as checkpoints have them.
fn migrate(over: Over, config: &MultifdConfig) -> TransportCounters {
    let mut m = Migration::start(over, config);
    for page in (0..PAGES[0]).filter(|p| p % 3 != 0) {
        m.ram.fill(0, page, 0);
    }
    m.ram.put(1, 32, &[1; PAGE]);
    m.send(0, 0, PAGES[0]);
    m.send(1, 0, PAGES[1]);
    m.sync();
    m.sync();
    for round in 1..5 {
        for page in (u64::from(round)..PAGES[0]).step_by(7) {
            m.ram.fill(0, page, round);
            m.send(0, page, 1);
        }
        m.ram.put(1, 32, &[0; PAGE]);
        m.send(1, 32, 1);
        m.sync();
    }
    m.finish()
}

#[test]
fn every_page_arrives_over_tcp_by_any_number_of_channels() {
    for channels in [1, 2, 4] {
        for compression in [Compression::None, zlib(), zstd()] {
            let counters = migrate(Over::Tcp, &config(channels, compression));
            assert!(
                counters.normal_pages > 466 && counters.zero_pages > 234 + 32,
                "{counters:?}"
            );
        }
    }
}

#[test]
fn every_page_arrives_over_unix_sockets() {
    for (channels, compression) in [(1, Compression::None), (2, zlib()), (3, zstd())] {
        migrate(Over::Unix, &config(channels, compression));
    }
}

#[test]
fn every_page_arrives_by_255_channels() {
    migrate(Over::Tcp, &config(255, Compression::None));
    migrate(Over::Unix, &config(255, Compression::None));
}

#[test]
fn without_zero_page_detection_every_page_travels_with_its_data() {
    for compression in [Compression::None, zlib(), zstd()] {
        let config = config(2, compression).zero_pages(ZeroPageDetection::None);
        assert_eq!(migrate(Over::Tcp, &config).zero_pages, 0);
    }
}

#[test]
fn every_page_arrives_without_being_copied_on_its_way_out() {
    for channels in [1, 3] {
        let zero_copy = config(channels, Compression::None).send_mode(SendMode::ZeroCopy);
        let counters = migrate(Over::Tcp, &zero_copy);
        // Loopback has no wire that could be waited for: the kernel copies for the receiver.
        assert!(counters.missed_zero_copy > 0, "{counters:?}");
        assert!(counters.normal_pages > 466, "{counters:?}");
    }
}

#[test]
fn spliced_pages_are_the_peers_own_when_they_are_synchronised() {
    for (over, send_mode) in [
        (Over::Unix, SendMode::Copy),
        (Over::Unix, SendMode::Splice),
        // Copies all the same.
        (Over::Tcp, SendMode::Splice),
        (Over::Tcp, SendMode::ZeroCopy),
    ] {
        let config = config(2, Compression::None).send_mode(send_mode);
        let mut m = Migration::start(over, &config);
        for round in 1..10 {
            for page in 0..PAGES[0] {
                m.ram.put(0, page, &[round; PAGE]);
            }
            m.send(0, 0, PAGES[0]);
            m.send.sync(&mut m.main).unwrap();
            // The guest goes on.
            for page in 0..PAGES[0] {
                m.ram.put(0, page, &[0xee; PAGE]);
            }
            wait_for_flush(&mut m.incoming_main, &mut m.recv.barrier());
            for page in 0..PAGES[0] {
                assert_eq!(m.recv.store().page(0, page), [round; PAGE], "{page}");
            }
        }
    }
}

#[test]
fn pages_sent_beside_are_read_when_they_have_drained() {
    for (over, send_mode) in [
        (Over::Unix, SendMode::Copy),
        (Over::Unix, SendMode::Splice),
        (Over::Tcp, SendMode::ZeroCopy),
    ] {
        let config = config(2, Compression::None).send_mode(send_mode);
        let mut m = Migration::start(over, &config);
        m.send.beside().unwrap().keep_order();
        for round in 1..10 {
            for page in 0..PAGES[0] {
                m.ram.put(0, page, &[round; PAGE]);
            }
            let beside = m.send.beside().unwrap();
            beside.send_beside(BlockId::new(0), 0, PAGES[0]).unwrap();
            beside.drain().unwrap();
            // The guest goes on, and what it writes belongs to no checkpoint yet.
            for page in 0..PAGES[0] {
                m.ram.put(0, page, &[0xee; PAGE]);
            }
            m.send.sync(&mut m.main).unwrap();
            wait_for_flush(&mut m.incoming_main, &mut m.recv.barrier());
            for page in 0..PAGES[0] {
                assert_eq!(m.recv.store().page(0, page), [round; PAGE], "{page}");
            }
        }
    }
}

#[test]
fn what_cannot_be_sent_without_a_copy_is_refused() {
    let start = |over: Over, compression| {
        let config = config(2, compression).send_mode(SendMode::ZeroCopy);
        let (outgoing, _incoming) = connections(over, &config);
        let channels = outgoing.channels.into_iter().map(Into::into).collect();
        SendSet::start(Arc::new(memory(&PAGES)), channels, &config).unwrap_err()
    };
    let compressed = start(Over::Tcp, zstd());
    assert!(matches!(
        common::cause(&compressed),
        (None, multifd::ChannelError::CompressedZeroCopy)
    ));
    let unix = start(Over::Unix, Compression::None);
    assert!(matches!(
        common::cause(&unix),
        (Some(0), multifd::ChannelError::ZeroCopy { .. })
    ));
    assert!(common::text(&unix).contains("needs a TCP connection"));
}

#[test]
fn a_page_that_became_zero_is_zero_at_the_other_side() {
    let mut m = Migration::start(Over::Tcp, &config(2, zstd()));
    m.ram.fill(0, 5, 0);
    m.send(0, 5, 1);
    m.sync();
    m.ram.put(0, 5, &[0; PAGE]);
    m.send(0, 5, 1);
    m.sync();
    assert_eq!(m.recv.store().page(0, 5), [0; PAGE]);
    let counters = m.finish();
    assert_eq!((counters.normal_pages, counters.zero_pages), (1, 1));
}

#[test]
fn pages_asked_for_one_by_one_share_packets() {
    let mut m = Migration::start(Over::Tcp, &config(1, Compression::None));
    for page in 0..256 {
        m.ram.fill(0, page, 0);
        m.send(0, page, 1);
    }
    m.sync();
    // Two packets and a SYNC packet.
    assert_eq!(m.finish().channel_bytes, 3 * 1344 + 256 * PAGE_SIZE);
}

#[test]
fn a_range_outside_guest_ram_is_refused_and_harms_nothing() {
    let mut m = Migration::start(Over::Tcp, &config(2, Compression::None));
    for (block, offset, pages) in [
        (0, PAGES[0] * PAGE_SIZE, 1),
        (0, 0, u64::MAX),
        (0, 1, 1),
        (0, u64::MAX - 4095, 1),
        (2, 0, 1),
    ] {
        let e = m
            .send
            .send(&mut m.main, BlockId::new(block), offset, pages)
            .unwrap_err();
        assert!(
            matches!(
                common::cause(&e),
                (None, multifd::ChannelError::Memory { .. })
            ),
            "{e}"
        );
    }
    m.ram.fill(0, 0, 1);
    m.send(0, 0, 1);
    m.sync();
    m.finish();
}

#[test]
fn what_was_not_synced_is_written_before_the_sender_leaves() {
    let mut m = Migration::start(Over::Tcp, &config(2, Compression::None));
    for page in 0..300 {
        m.ram.fill(0, page, 0);
    }
    m.send(0, 0, 300);
    assert_eq!(m.send.join().unwrap().normal_pages, 300);
}

#[test]
fn the_store_is_changed_while_no_channel_is_inside_a_packet() {
    let mut m = Migration::start(Over::Tcp, &config(4, Compression::None));
    for round in 0..20 {
        for page in 0..PAGES[0] {
            m.ram.put(0, page, &[round + 1; 8]);
        }
        m.send(0, 0, PAGES[0]);
        let deadline = Some(Instant::now() + LIMIT);
        m.recv
            .between_packets(deadline, |store| assert_eq!(store.page(1, 0), [0; PAGE]))
            .unwrap();
        m.sync();
    }
    m.finish();
}

#[test]
fn a_peer_that_is_idle_for_longer_than_the_channels_limit_is_no_error() {
    // In COLO nothing is sent between checkpoints, for as long as the user likes.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let short = Duration::from_millis(20);
    let config = config(1, Compression::None);
    let channels = vec![FdChannel::new(ours, short).unwrap().into()];
    let recv = RecvSet::start(memory(&PAGES), channels, &config, |e| panic!("{e}")).unwrap();
    thread::sleep(short * 5);
    let channels = vec![FdChannel::new(theirs, LIMIT).unwrap().into()];
    let ram = Arc::new(memory(&PAGES));
    ram.fill(0, 1, 1);
    let mut send = SendSet::start(ram.clone(), channels, &config).unwrap();
    let (main, mut incoming_main) = UnixStream::pair()
        .map(|(a, b)| {
            (
                FdChannel::new(a, LIMIT).unwrap(),
                FdChannel::new(b, LIMIT).unwrap(),
            )
        })
        .unwrap();
    let mut main = StreamWriter::new(main);
    send.send(&mut main, BlockId::new(0), 0, 3).unwrap();
    send.sync(&mut main).unwrap();
    wait_for_flush(&mut incoming_main, &mut recv.barrier());
    assert_eq!(ram.differing_pages(recv.store()), []);
}

#[test]
fn pages_sent_again_beside_the_main_stream_land_in_the_order_in_which_they_were_sent() {
    for channels in [1, 2, 5] {
        let mut m = Migration::start(Over::Tcp, &config(channels, Compression::None));
        let beside = m.send.beside().unwrap();
        beside.keep_order();
        for round in 1..30 {
            for block in [0, 1] {
                let pages = PAGES[block as usize];
                for page in 0..pages {
                    m.ram.fill(block, page, round);
                }
                // Not all of them, in two pieces that meet within a stretch.
                let (first, middle) = (u64::from(round) % 7, pages / 2 + 3);
                let beside = m.send.beside().unwrap();
                for (from, to) in [(middle, pages), (first, middle)] {
                    let (offset, count) = (from * PAGE_SIZE, to - from);
                    beside
                        .send_beside(BlockId::new(block), offset, count)
                        .unwrap();
                }
            }
            // Read, but not landed: the next round may not overtake it.
            m.send.beside().unwrap().drain().unwrap();
        }
        // A section of the main stream goes on with it.
        m.ram.fill(0, 20, 99);
        m.send(0, 0, PAGES[0]);
        m.send(1, 0, 7);
        m.sync();
        m.finish();
    }
}

#[test]
fn pages_that_are_as_they_were_sent_do_not_cross_and_no_packet_is_without_pages() {
    for compression in [Compression::None, zlib(), zstd()] {
        let both = [SendMode::Copy, SendMode::ZeroCopy];
        let ways = if compression == Compression::None {
            &both[..]
        } else {
            &both[..1]
        };
        for &send_mode in ways {
            let config = config(3, compression).send_mode(send_mode);
            let mut m = Migration::start(Over::Tcp, &config);
            for page in (0..PAGES[0]).filter(|p| p % 3 != 0) {
                m.ram.fill(0, page, 0);
            }
            m.send(0, 0, PAGES[0]);
            m.sync();
            assert!(m.send.leave_out_unchanged(WhenToCompare::Always).unwrap());
            let mut crossed = Vec::new();
            for round in 0..5 {
                m.send.begin_round();
                let before = m.send.counters();
                // Changed, changed back and forth, become zero, and no more.
                for page in (1..PAGES[0]).step_by(100) {
                    m.ram.fill(0, page, round % 2);
                    m.ram.put(0, page + 1, &[round / 3; PAGE]);
                }
                m.send(0, 0, PAGES[0]);
                m.sync();
                let after = m.send.counters();
                let crossed_now =
                    after.normal_pages + after.zero_pages - before.normal_pages - before.zero_pages;
                let left_out = after.unchanged_pages - before.unchanged_pages;
                assert_eq!(crossed_now + left_out, PAGES[0]);
                crossed.push(crossed_now);
            }
            // The first time nothing is known of any page.
            assert_eq!(crossed, [PAGES[0], 7, 7, 14, 7], "{compression:?}");
            let before = m.send.counters();
            m.send(0, 0, PAGES[0]);
            m.sync();
            let after = m.send.counters();
            // A SYNC packet for each channel.
            assert_eq!(after.channel_bytes - before.channel_bytes, 3 * 1344);
            m.finish();
        }
    }
}

#[test]
fn what_is_sent_beside_the_main_stream_while_the_guest_writes_is_what_was_compared() {
    let mut m = Migration::start(Over::Tcp, &config(2, Compression::None));
    m.send.beside().unwrap().keep_order();
    assert!(m.send.leave_out_unchanged(WhenToCompare::Always).unwrap());
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        let (ram, stopped) = (Arc::clone(&m.ram), &stopped);
        let writer = scope.spawn(move || {
            for round in (0..3).cycle() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                for page in 0..8 {
                    ram.put(0, page, &[round; PAGE]);
                }
            }
        });
        for _ in 0..300 {
            let beside = m.send.beside().unwrap();
            beside.send_beside(BlockId::new(0), 0, 8).unwrap();
            beside.drain().unwrap();
        }
        stopped.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    // Of pages whose content has been sent before, as all three may have, some do not cross now.
    m.send(0, 0, 8);
    m.sync();
    m.finish();
}
