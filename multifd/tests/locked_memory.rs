//! Zero-copy send in a process that may lock no memory. Alone in its file: the limit is the process's.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use common::{LIMIT, Pages, memory};
use migration_stream::StreamWriter;
use migration_stream::io::{FdChannel, SendMode};
use migration_stream::ram::BlockId;
use migration_stream::raw::transport::SendPages;
use multifd::{ChannelCount, ChannelError, MultifdConfig, SendSet};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

const PAGES: u64 = 600;

fn connection() -> (FdChannel, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    (FdChannel::new(ours, LIMIT).unwrap(), theirs)
}

#[test]
fn the_error_names_the_limit_on_locked_memory() {
    // Whoever has the capability has no limit. It is this thread's, and that of the threads it
    // starts.
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, sets).unwrap();
    let none = Rlimit {
        current: Some(4096),
        maximum: getrlimit(Resource::Memlock).maximum,
    };
    setrlimit(Resource::Memlock, none).unwrap();

    let config = MultifdConfig::new(ChannelCount::new(1).unwrap())
        .send_mode(SendMode::ZeroCopy)
        .stall_limit(LIMIT);
    let (channel, _peer) = connection();
    let (main, _main_peer) = connection();
    let ram = Arc::new(memory(&[PAGES]));
    (0..PAGES).for_each(|page| ram.fill(0, page, 0));
    let mut set = SendSet::start(ram, vec![channel.into()], &config).unwrap();
    let mut main = StreamWriter::new(main);
    let sent = set
        .send(&mut main, BlockId::new(0), 0, PAGES)
        .and_then(|()| set.sync(&mut main));
    let error = sent.unwrap_err();
    assert!(matches!(
        common::cause(&error),
        (Some(0), ChannelError::Io { .. })
    ));
    let text = common::text(&error);
    assert!(
        text.contains("too little locked memory") && text.contains("4096 bytes"),
        "{text}"
    );
}
