//! A link between source and target that carries only so much a second.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Result;

/// Name of the socket in the directory of a [`Narrow`].
const SOCKET: &str = "migration";

/// Passes connections on, in both directions: what goes forth, on all of them together, no faster than
/// so many bytes a second. Its sockets are those of the unix domain, which hold little.
#[derive(Debug)]
pub struct Narrow {
    dir: TempDir,
}

#[derive(Debug)]
struct Link {
    bandwidth: u64,
    /// When it has carried what it was given.
    free_at: Mutex<Instant>,
}

impl Narrow {
    /// A link to the target that listens at `uri`, which is one of a unix socket.
    ///
    /// # Errors
    /// No socket can be had.
    pub fn to(uri: &str, bandwidth: u64) -> Result<Self> {
        let target = uri.strip_prefix("unix:").ok_or("not a unix socket")?;
        let target = Path::new(target).to_owned();
        let dir = tempfile::Builder::new().prefix("narrow-").tempdir()?;
        let listener = UnixListener::bind(dir.path().join(SOCKET))?;
        let link = Arc::new(Link {
            bandwidth,
            free_at: Mutex::new(Instant::now()),
        });
        // A link that breaks is what the test's processes have to report.
        thread::spawn(move || link.run(&listener, &target).ok());
        Ok(Self { dir })
    }

    /// Where the source is to go.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.dir.path().join(SOCKET).display())
    }
}

impl Link {
    fn run(self: &Arc<Self>, listener: &UnixListener, target: &PathBuf) -> io::Result<()> {
        for source in listener.incoming() {
            let (source, target) = (source?, UnixStream::connect(target)?);
            let (mut from, mut to) = (target.try_clone()?, source.try_clone()?);
            thread::spawn(move || {
                // Either may be shut already.
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            let link = Arc::clone(self);
            thread::spawn(move || link.carry(source, target));
        }
        Ok(())
    }

    fn carry(&self, mut from: UnixStream, mut to: UnixStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            self.wait(n);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    /// Waits until it has carried so much more.
    fn wait(&self, bytes: usize) {
        let nanos = bytes as u64 * 1_000_000_000 / self.bandwidth;
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (*free_at).max(Instant::now()) + Duration::from_nanos(nanos);
        *free_at = free;
        drop(free_at);
        thread::sleep(free.saturating_duration_since(Instant::now()));
    }
}
