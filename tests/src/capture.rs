//! The bytes of a migration: to a file, or through a tap between source and destination that keeps
//! what each channel carried.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;

use crate::Result;
use crate::qemu::Qemu;

/// How often a tap looks for new connections.
const POLL: Duration = Duration::from_millis(5);

/// Migrates `source` to a file and returns its content: the main stream, without return path.
///
/// # Errors
/// The migration fails.
pub fn to_file(source: &mut Qemu) -> Result<Vec<u8>> {
    let file = source.dir().join("stream");
    source.migrate(&format!("file:{}", file.display()))?;
    source.wait_migration("completed")?;
    let bytes = fs::read(&file)?;
    fs::remove_file(&file)?;
    Ok(bytes)
}

/// What the channels of one migration carried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capture {
    /// From source to destination on the main channel.
    pub main: Vec<u8>,
    /// From destination to source on the main channel.
    pub return_path: Vec<u8>,
    /// From source to destination on the multifd channels, by channel id.
    pub multifd: BTreeMap<u8, Vec<u8>>,
}

/// A listening socket that logs each connection, and passes it on to a destination if it has one.
#[derive(Debug)]
pub struct Tap {
    dir: TempDir,
    is_closing: Arc<AtomicBool>,
    acceptor: JoinHandle<Result<Vec<Connection>>>,
}

/// Both directions of one logged connection.
#[derive(Debug)]
struct Connection {
    forward: JoinHandle<io::Result<Vec<u8>>>,
    backward: JoinHandle<io::Result<Vec<u8>>>,
}

impl Tap {
    /// A tap that takes everything and answers nothing: for sources without return path.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn sink() -> Result<Self> {
        Self::new(None)
    }

    /// A tap before the destination that listens on the unix socket `destination`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn before(destination: &Path) -> Result<Self> {
        Self::new(Some(destination.to_owned()))
    }

    fn new(destination: Option<PathBuf>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("tap-").tempdir()?;
        let listener = UnixListener::bind(dir.path().join("tap"))?;
        listener.set_nonblocking(true)?;
        let is_closing = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&is_closing);
        let acceptor = thread::spawn(move || accept(&listener, destination.as_deref(), &flag));
        Ok(Self {
            dir,
            is_closing,
            acceptor,
        })
    }

    /// The URI the source migrates to.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("tap")
    }

    /// Waits until every connection has ended, and returns what they carried.
    ///
    /// # Errors
    /// The destination could not be reached, or a connection was neither a main nor a multifd one.
    pub fn finish(self) -> Result<Capture> {
        // Relaxed: nothing but the flag itself is handed over.
        self.is_closing.store(true, Ordering::Relaxed);
        let connections = join(self.acceptor)??;
        let mut capture = Capture::default();
        for connection in connections {
            let forward = join(connection.forward)??;
            let backward = join(connection.backward)??;
            match Kind::of(&forward)? {
                Kind::Main => {
                    capture.main = forward;
                    capture.return_path = backward;
                }
                Kind::Multifd(id) => {
                    if capture.multifd.insert(id, forward).is_some() {
                        return Err(format!("two channels with id {id}").into());
                    }
                }
            }
        }
        Ok(capture)
    }
}

/// What a connection is, from its first bytes.
enum Kind {
    Main,
    Multifd(u8),
}

impl Kind {
    fn of(bytes: &[u8]) -> Result<Self> {
        /// Where a multifd handshake has the channel's id.
        const ID: usize = 24;
        match (bytes.get(..4), bytes.get(ID)) {
            (Some(b"QEVM"), _) => Ok(Self::Main),
            (Some([0x11, 0x22, 0x33, 0x44]), Some(id)) => Ok(Self::Multifd(*id)),
            (start, _) => Err(format!("a connection that begins with {start:02x?}").into()),
        }
    }
}

fn accept(
    listener: &UnixListener,
    destination: Option<&Path>,
    is_closing: &AtomicBool,
) -> Result<Vec<Connection>> {
    let mut connections = Vec::new();
    loop {
        // Read before the queue is looked at: who had connected by then is served.
        let is_last_look = is_closing.load(Ordering::Relaxed);
        let source = match listener.accept() {
            Ok((source, _)) => source,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if is_last_look {
                    return Ok(connections);
                }
                thread::sleep(POLL);
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        let upstream = destination.map(UnixStream::connect).transpose()?;
        connections.push(Connection {
            forward: pump(source.try_clone()?, clone(upstream.as_ref())?),
            backward: match upstream {
                Some(upstream) => pump(upstream, Some(source)),
                None => thread::spawn(|| Ok(Vec::new())),
            },
        });
    }
}

fn clone(stream: Option<&UnixStream>) -> io::Result<Option<UnixStream>> {
    stream.map(UnixStream::try_clone).transpose()
}

/// Copies one direction until it ends, and keeps what was copied.
fn pump(mut from: UnixStream, mut to: Option<UnixStream>) -> JoinHandle<io::Result<Vec<u8>>> {
    thread::spawn(move || {
        let mut log = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // A reset is how a peer that dies ends its stream.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => 0,
                Err(e) => return Err(e),
            };
            let bytes = &buffer[..n];
            log.extend_from_slice(bytes);
            if let Some(to) = &mut to {
                // A peer that has gone takes no more; what was sent to it still counts as sent.
                if n == 0 || to.write_all(bytes).is_err() {
                    let _ = to.shutdown(Shutdown::Write);
                }
            }
            if n == 0 {
                return Ok(log);
            }
        }
    })
}

fn join<T>(thread: JoinHandle<T>) -> Result<T> {
    thread
        .join()
        .map_err(|_| "a thread of the tap panicked".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_sorts_channels_by_what_they_say_they_are() {
        let tap = Tap::sink().unwrap();
        let channel = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(tap.socket()).unwrap();
            stream.write_all(bytes).unwrap();
        };
        let mut hello = [0; 64];
        hello[..4].copy_from_slice(&[0x11, 0x22, 0x33, 0x44]);
        hello[24] = 1;
        channel(&hello);
        channel(b"QEVM and so on");
        let capture = tap.finish().unwrap();
        assert_eq!(capture.main, b"QEVM and so on");
        assert_eq!(capture.multifd[&1], hello);
        assert_eq!(capture.return_path, b"");
    }

    #[test]
    fn a_tap_passes_both_directions_on_and_keeps_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("destination");
        let listener = UnixListener::bind(&path).unwrap();
        let destination = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            stream.write_all(b"pong").unwrap();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        let tap = Tap::before(&path).unwrap();
        let mut source = UnixStream::connect(tap.socket()).unwrap();
        source.write_all(b"QEVMping").unwrap();
        let mut answer = [0; 4];
        source.read_exact(&mut answer).unwrap();
        drop(source);
        assert_eq!(&answer, b"pong");
        assert_eq!(destination.join().unwrap(), b"QEVMping");
        let capture = tap.finish().unwrap();
        assert_eq!(capture.main, b"QEVMping");
        assert_eq!(capture.return_path, b"pong");
    }

    #[test]
    fn a_connection_of_no_known_kind_is_an_error() {
        let tap = Tap::sink().unwrap();
        let mut stream = UnixStream::connect(tap.socket()).unwrap();
        stream.write_all(b"GET /").unwrap();
        drop(stream);
        let error = tap.finish().unwrap_err().to_string();
        assert_eq!(
            error,
            "a connection that begins with Some([47, 45, 54, 20])"
        );
    }
}
