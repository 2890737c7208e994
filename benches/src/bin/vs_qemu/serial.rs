//! The guest's serial line, heard by a client of the guest that knows when something came.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::tests::{PATIENCE, Result};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// How often the line is listened to. To be woken for each byte would take from the guest, which
/// shares the machine, more than there is to measure.
const TICK: Duration = Duration::from_micros(200);

/// A pipe in the file system, from which everything is read at once.
#[derive(Debug)]
pub struct Line {
    path: PathBuf,
    /// When something came, since the epoch.
    arrivals: Arc<Mutex<Vec<Duration>>>,
    /// How much came.
    bytes: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Line {
    /// Makes the pipe and listens.
    pub fn listen(path: &Path) -> Result<Self> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // Open for writing as well, so that there is always one who might write.
        let pipe = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let arrivals = Arc::default();
        let bytes = Arc::default();
        let is_over = Arc::new(AtomicBool::new(false));
        let (sink, count, stop) = (
            Arc::clone(&arrivals),
            Arc::clone(&bytes),
            Arc::clone(&is_over),
        );
        let thread = thread::spawn(move || hear(pipe, &sink, &count, &stop));
        Ok(Self {
            path: path.to_owned(),
            arrivals,
            bytes,
            is_over,
            thread: Some(thread),
        })
    }

    /// Where the guest's output is to go.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for something to come after `since`.
    pub fn wait(&self, since: Duration) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.lock().last().is_none_or(|last| *last <= since) {
            if Instant::now() >= deadline {
                return Err("the guest says nothing".into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// How much has come so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// When something came.
    pub fn finish(mut self) -> Result<Vec<Duration>> {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "the listener panicked")??;
        }
        Ok(std::mem::take(&mut self.lock()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Duration>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Now, since the epoch: the clock of QEMU's trace and of QMP's events.
pub fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn hear(
    mut pipe: File,
    arrivals: &Mutex<Vec<Duration>>,
    count: &AtomicU64,
    is_over: &AtomicBool,
) -> io::Result<()> {
    let mut bytes = vec![0; 1 << 16];
    while !is_over.load(Ordering::Relaxed) {
        match pipe.read(&mut bytes) {
            Ok(0) => {}
            Ok(len) => {
                count.fetch_add(len as u64, Ordering::Relaxed);
                let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                arrivals.push(now());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
        thread::sleep(TICK);
    }
    Ok(())
}

/// What a client hears of checkpoints.
#[derive(Debug)]
pub struct Stalls {
    /// For each, the longest silence that began between its predecessor's end and its own.
    pub longest: Vec<Duration>,
    /// The median of all silences.
    pub usual: Duration,
}

impl Stalls {
    /// What is heard from `from` on, with checkpoints that ended at these times.
    pub fn of(arrivals: &[Duration], from: Duration, ends: &[Duration]) -> Self {
        let silences = || {
            let pairs = arrivals.iter().zip(arrivals.iter().skip(1));
            pairs.map(|(begin, end)| (*begin, end.saturating_sub(*begin)))
        };
        let longest = |from: Duration, to: Duration| {
            let within = silences().filter(|(begin, _)| (from..to).contains(begin));
            within.map(|(_, length)| length).max().unwrap_or_default()
        };
        let begins = [from].into_iter().chain(ends.iter().copied());
        let last = ends.last().copied().unwrap_or(from);
        let mut all: Vec<_> = silences()
            .filter(|(begin, _)| (from..last).contains(begin))
            .map(|(_, length)| length)
            .collect();
        all.sort_unstable();
        Self {
            longest: begins
                .zip(ends)
                .map(|(from, to)| longest(from, *to))
                .collect(),
            usual: all.get(all.len() / 2).copied().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_comes_is_heard_and_timed() {
        let dir = tempfile::tempdir().unwrap();
        let line = Line::listen(&dir.path().join("line")).unwrap();
        let before = now();
        let mut guest = File::create(line.path()).unwrap();
        guest.write_all(b"x").unwrap();
        line.wait(before).unwrap();
        assert_eq!(line.bytes(), 1);
        let arrivals = line.finish().unwrap();
        assert_eq!(arrivals.len(), 1);
        assert!(arrivals[0] >= before);
    }

    #[test]
    fn the_longest_silence_belongs_to_the_checkpoint_before_whose_end_it_began() {
        let ms = Duration::from_millis;
        let arrivals = [0, 10, 20, 50, 60, 70, 90, 100].map(ms);
        // The silence from 20 to 50 is over after the checkpoint is; the one from 70 on as well.
        let stalls = Stalls::of(&arrivals, ms(5), &[ms(48), ms(88)]);
        assert_eq!(stalls.longest, [ms(30), ms(20)]);
        assert_eq!(stalls.usual, ms(10));
        assert_eq!(Stalls::of(&[], ms(5), &[ms(9)]).longest, [ms(0)]);
    }
}
