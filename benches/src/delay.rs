//! Two hosts that are some way apart: each has a TUN device, and what one sends comes out of the other's
//! when it is due. The kernel's own delay (`netem`) is not everywhere.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Of the largest packet that the kernel leaves for a later device to cut, and the header before it.
const PACKET: usize = (64 << 10) + 64;
/// Packets under way in one direction. Those that do not fit wait in the device, which drops what it has
/// no room for.
const UNDER_WAY: usize = 4096;

/// A packet, and when it is due.
type Due = (Instant, Vec<u8>);

/// A TUN device.
#[derive(Debug)]
pub struct Tun {
    file: File,
    name: String,
}

impl Tun {
    /// Makes one, in the namespace of this thread. It goes when this is dropped.
    ///
    /// # Errors
    /// There is no TUN driver, or this process may not.
    pub fn new() -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        let name = attach(&file)?;
        Ok(Self { file, name })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Has a new device behind an open `/dev/net/tun`, one that takes and gives segments of 64 KiB. Returns
/// its name.
#[allow(unsafe_code)]
fn attach(file: &File) -> io::Result<String> {
    const FLAGS: i32 = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: the structure is plain data, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = i16::try_from(FLAGS).map_err(io::Error::other)?;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: the request reads and writes one `ifreq`, which outlives the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the argument of this request is a number.
    let set = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::TUN_F_CSUM | libc::TUN_F_TSO4,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|c| c.cast_unsigned());
    let name = name.take_while(|c| *c != 0).collect();
    String::from_utf8(name).map_err(io::Error::other)
}

/// Passes what comes out of each device on to the other, `delay` later, until the devices are gone with
/// their namespaces.
pub fn join([a, b]: [Tun; 2], delay: Duration) {
    let (a, b) = (Arc::new(a.file), Arc::new(b.file));
    for (from, to) in [(Arc::clone(&a), Arc::clone(&b)), (b, a)] {
        relay(
            delay,
            move |bytes| (&*from).read(bytes),
            move |packet| (&*to).write(packet).map(drop),
        );
    }
}

/// Starts two threads: `read` gives packets until it fails, and `write` gets each `delay` after it came.
fn relay(
    delay: Duration,
    read: impl FnMut(&mut [u8]) -> io::Result<usize> + Send + 'static,
    write: impl FnMut(&[u8]) -> io::Result<()> + Send + 'static,
) {
    let (sender, receiver) = sync_channel(UNDER_WAY);
    thread::spawn(move || take(delay, read, &sender));
    thread::spawn(move || give(write, &receiver));
}

fn take(
    delay: Duration,
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    sender: &SyncSender<Due>,
) {
    let mut bytes = vec![0; PACKET];
    while let Ok(len) = read(&mut bytes) {
        let packet = bytes.get(..len).unwrap_or_default().to_vec();
        if sender.send((Instant::now() + delay, packet)).is_err() {
            return;
        }
    }
}

fn give(mut write: impl FnMut(&[u8]) -> io::Result<()>, receiver: &Receiver<Due>) {
    for (due, packet) in receiver {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        // A device that is not up, or has no room, loses a packet as a network does. The reader ends
        // when the device is gone.
        let _ = write(&packet);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn packets_come_in_order_and_none_before_it_is_due() {
        let delay = Duration::from_millis(20);
        let (source, from) = UnixDatagram::pair().unwrap();
        let (to, sink) = UnixDatagram::pair().unwrap();
        let pass_on = move |packet: &[u8]| to.send(packet).map(drop);
        relay(delay, move |bytes| from.recv(bytes), pass_on);
        let sent: Vec<_> = (0..3_u8)
            .map(|number| {
                let begun = Instant::now();
                source.send(&[number; 9]).unwrap();
                begun
            })
            .collect();
        for (number, begun) in (0..).zip(sent) {
            let mut packet = [0xff; 16];
            assert_eq!(sink.recv(&mut packet).unwrap(), 9);
            assert_eq!(packet[..9], [number; 9]);
            assert!(begun.elapsed() >= delay);
        }
    }
}
