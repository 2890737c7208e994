//! A link between a primary and its secondary, with any number of channels, that stops in a checkpoint:
//! at its end, where the primary stands still and what it is can be compared with what the secondary
//! has of it, or in the middle of its memory.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{PATIENCE, Result};

/// How often a state is looked at.
const POLL: Duration = Duration::from_millis(1);

/// Name of the socket in the directory of a [`Gate`].
const SOCKET: &str = "migration";

/// More than a checkpoint's device state.
const KEPT: usize = 4 << 20;

/// How much of a checkpoint a link lets through that is to stop in the middle of one, bytes: less than
/// one page with its header on the main channel, or a packet's header on another.
const PART: usize = 3000;

/// COLO's messages that matter here (`COLOMessage`, `qapi/migration.json`).
const CHECKPOINT_REPLY: [u8; 4] = [0, 0, 0, 2];
const VMSTATE_SIZE: [u8; 4] = [0, 0, 0, 4];
const VMSTATE_LOADED: [u8; 4] = [0, 0, 0, 6];
/// The return path's last framed message.
const SHUT: [u8; 2] = [0, 1];

/// Passes connections on, in both directions. Dropping it breaks them.
#[derive(Debug)]
pub struct Gate {
    dir: TempDir,
    link: Arc<Link>,
}

#[derive(Debug, Default)]
struct Link {
    /// To stop at the end of a checkpoint.
    is_armed: AtomicBool,
    /// To stop in the middle of one.
    is_cutting: AtomicBool,
    /// To spoil what channels carry of one.
    is_spoiling: AtomicBool,
    /// It is in the middle of one.
    is_within: AtomicBool,
    /// What of it has come through, bytes.
    passed: AtomicUsize,
    is_held: AtomicBool,
    is_broken: AtomicBool,
    /// The end of what the primary has sent on its main channel.
    sent: Mutex<Vec<u8>>,
}

impl Gate {
    /// A link to the secondary that listens at `uri`, which is one of a unix socket.
    ///
    /// # Errors
    /// No socket can be had.
    pub fn to(uri: &str) -> Result<Self> {
        let target = uri.strip_prefix("unix:").ok_or("not a unix socket")?;
        let target = Path::new(target).to_owned();
        let dir = tempfile::Builder::new().prefix("gate-").tempdir()?;
        let listener = UnixListener::bind(dir.path().join(SOCKET))?;
        let link = Arc::<Link>::default();
        let passing = Arc::clone(&link);
        thread::spawn(move || passing.run(&listener, &target).ok());
        Ok(Self { dir, link })
    }

    /// Where the primary is to go.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.dir.path().join(SOCKET).display())
    }

    /// From now on, keeps the next *vmstate-loaded* from the primary: its guest stands still at a
    /// checkpoint that the secondary has completed. Returns the device state that the primary sent in
    /// that checkpoint.
    ///
    /// # Errors
    /// There is no checkpoint within [`PATIENCE`], or no device state in it.
    pub fn hold(&self) -> Result<Vec<u8>> {
        self.link.is_armed.store(true, Ordering::Release);
        self.wait()?;
        let sent = self
            .link
            .sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // It is the last thing that was sent: message, be64 size, and that many bytes.
        let blob = sent.windows(12).enumerate().find_map(|(at, head)| {
            let size = u64::from_be_bytes(head[4..].try_into().ok()?);
            let blob = &sent[at + 12..];
            (head[..4] == VMSTATE_SIZE && size == blob.len() as u64).then(|| blob.to_vec())
        });
        Ok(blob.ok_or("no device state at the end of a checkpoint")?)
    }

    /// From now on, lets only the beginning of a checkpoint through; waits until that has come to
    /// pass.
    ///
    /// # Errors
    /// There is no checkpoint within [`PATIENCE`].
    pub fn cut(&self) -> Result<()> {
        self.link.is_cutting.store(true, Ordering::Release);
        self.wait()
    }

    /// From the next checkpoint on, lets through nonsense in place of what multifd's channels carry.
    pub fn spoil(&self) {
        self.link.is_spoiling.store(true, Ordering::Release);
    }

    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.link.is_held.load(Ordering::Acquire) {
            if Instant::now() > deadline {
                return Err("no checkpoint came over the link".into());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.link.is_broken.store(true, Ordering::Release);
    }
}

impl Link {
    /// A connection for each that the primary makes.
    fn run(self: &Arc<Self>, listener: &UnixListener, target: &PathBuf) -> io::Result<()> {
        for source in listener.incoming() {
            let source = source?;
            let target = UnixStream::connect(target)?;
            let (from, to) = (target.try_clone()?, source.try_clone()?);
            let link = Arc::clone(self);
            thread::spawn(move || link.back(from, to));
            let link = Arc::clone(self);
            thread::spawn(move || link.forth(source, target));
        }
        Ok(())
    }

    fn forth(&self, mut from: UnixStream, mut to: UnixStream) {
        let mut buffer = vec![0; 64 << 10];
        let mut is_main = None;
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let allowed = self.allowed(n);
            let piece = &mut buffer[..allowed];
            if *is_main.get_or_insert(piece.starts_with(b"QEVM")) {
                let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
                sent.extend_from_slice(piece);
                let surplus = sent.len().saturating_sub(KEPT);
                sent.drain(..surplus);
            } else if self.is_spoiling.load(Ordering::Acquire)
                && self.is_within.load(Ordering::Acquire)
            {
                piece.fill(0xff);
            }
            if to.write_all(piece).is_err() || self.is_broken.load(Ordering::Acquire) {
                break;
            }
            if allowed < n {
                self.stay();
                break;
            }
        }
        end(&from, &to);
    }

    /// How many of the next `n` bytes may go through.
    fn allowed(&self, n: usize) -> usize {
        if !self.is_within.load(Ordering::Acquire) || self.is_spoiling.load(Ordering::Acquire) {
            return n;
        }
        let before = self.passed.fetch_add(n, Ordering::AcqRel);
        n.min(PART.saturating_sub(before))
    }

    /// The link has stopped, until it is broken.
    fn stay(&self) {
        self.is_held.store(true, Ordering::Release);
        while !self.is_broken.load(Ordering::Acquire) {
            thread::sleep(POLL);
        }
    }

    /// What the secondary says: framed messages up to SHUT, and COLO's behind it.
    fn back(&self, mut from: UnixStream, mut to: UnixStream) {
        let mut is_colo = false;
        loop {
            let mut message = vec![0; 4];
            if from.read_exact(&mut message).is_err() {
                break;
            }
            if !is_colo {
                is_colo = message[..2] == SHUT;
                let payload = usize::from(u16::from_be_bytes([message[2], message[3]]));
                message.resize(4 + payload, 0);
                if from.read_exact(&mut message[4..]).is_err() {
                    break;
                }
            } else if message == VMSTATE_LOADED && self.is_armed.load(Ordering::Acquire) {
                self.stay();
                break;
            } else if message == CHECKPOINT_REPLY
                && (self.is_cutting.load(Ordering::Acquire)
                    || self.is_spoiling.load(Ordering::Acquire))
            {
                self.is_within.store(true, Ordering::Release);
            }
            if to.write_all(&message).is_err() {
                break;
            }
        }
        end(&from, &to);
    }
}

fn end(one: &UnixStream, other: &UnixStream) {
    for end in [one, other] {
        // It may be shut already.
        let _ = end.shutdown(Shutdown::Both);
    }
}
