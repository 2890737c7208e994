//! Limits of time and of bandwidth.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use migration_stream::io::FdChannel;
use migration_stream::ram::{InStream, ZeroPageDetection};

use crate::common::guest::{Pages, memory};
use crate::rig::{BLOCKS, Devices, begin_with, receive, source, source_config};

#[test]
fn limits_without_an_end_are_no_limits() {
    let (ram, mut guest) = source();
    let landed = memory(BLOCKS);
    let (a, b) = UnixStream::pair().unwrap();
    let a = FdChannel::new(a, Duration::MAX).unwrap();
    let b = FdChannel::new(b, Duration::MAX).unwrap();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let config = source_config(&guest).confirm_timeout(Duration::MAX);
            let transport = InStream::new(Arc::clone(&guest.ram) as _, ZeroPageDetection::Multifd);
            begin_with(config, &mut guest, &a, transport)
                .unwrap()
                .run(&mut guest)
                .completed()
                .map(drop)
        });
        receive(&b, &landed, &mut Devices::default()).unwrap();
        sender.join().unwrap().unwrap();
    });
    ram.assert_equals(&landed);
}
