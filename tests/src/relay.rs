//! A link between source and target that can be made to stall where a test wants it to.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{PATIENCE, Result};

/// How often a state is looked at.
const POLL: Duration = Duration::from_millis(1);

/// Name of the socket in the directory of a [`Relay`].
const SOCKET: &str = "migration";

/// More than the source sends between two answers, but for memory.
const MESSAGES: usize = 1 << 20;

/// Passes one connection on, in both directions, until it is told to [stall](Relay::stall). Its
/// sockets are those of the unix domain, which hold little. Dropping it breaks the link.
#[derive(Debug)]
pub struct Relay {
    dir: TempDir,
    link: Arc<Link>,
}

#[derive(Debug, Default)]
struct Link {
    is_armed: AtomicBool,
    has_stalled: AtomicBool,
    is_broken: AtomicBool,
    /// Bytes from the source since the target last said something.
    unanswered: AtomicUsize,
}

impl Relay {
    /// A link to the target that listens at `uri`, which is one of a unix socket.
    ///
    /// # Errors
    /// No socket can be had.
    pub fn to(uri: &str) -> Result<Self> {
        let target = uri.strip_prefix("unix:").ok_or("not a unix socket")?;
        let target = Path::new(target).to_owned();
        let dir = tempfile::Builder::new().prefix("relay-").tempdir()?;
        let listener = UnixListener::bind(dir.path().join(SOCKET))?;
        let link = Arc::<Link>::default();
        let passing = Arc::clone(&link);
        // A link that breaks is what the test's processes have to report.
        thread::spawn(move || passing.run(&listener, &target).ok());
        Ok(Self { dir, link })
    }

    /// Where the source is to go.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.dir.path().join(SOCKET).display())
    }

    /// From now on, takes nothing more from the source as soon as it is within a checkpoint's
    /// memory. Such a checkpoint has to be larger than what sockets hold, or all of it may be on its
    /// way by then.
    pub fn stall(&self) {
        self.link.is_armed.store(true, Ordering::Release);
    }

    /// Waits until it has come to that.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`].
    pub fn wait_stalled(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.link.has_stalled.load(Ordering::Acquire) {
            if Instant::now() > deadline {
                return Err("no memory came over the link".into());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.link.is_broken.store(true, Ordering::Release);
    }
}

impl Link {
    fn run(self: &Arc<Self>, listener: &UnixListener, target: &Path) -> io::Result<()> {
        let (source, _) = listener.accept()?;
        let target = UnixStream::connect(target)?;
        let link = Arc::clone(self);
        let (from, to) = (target.try_clone()?, source.try_clone()?);
        thread::spawn(move || {
            link.pass(from, to, |_| link.unanswered.store(0, Ordering::Release));
        });
        self.pass(source, target, |n| {
            let unanswered = self.unanswered.fetch_add(n, Ordering::AcqRel) + n;
            if unanswered > MESSAGES && self.is_armed.load(Ordering::Acquire) {
                self.has_stalled.store(true, Ordering::Release);
            }
            while self.has_stalled.load(Ordering::Acquire)
                && !self.is_broken.load(Ordering::Acquire)
            {
                thread::sleep(POLL);
            }
        });
        Ok(())
    }

    fn pass(&self, mut from: UnixStream, mut to: UnixStream, passed: impl Fn(usize)) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
            passed(n);
            if self.is_broken.load(Ordering::Acquire) {
                break;
            }
        }
        for end in [from, to] {
            // It may be shut already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}
