//! The moments at which something begins or ends on one side: every message, every step of a
//! checkpoint, every change of status. Failover is tried at each of them: this side notes them in a
//! file, dies at one by the SIGKILL that it sends itself, or waits at one while somebody does something
//! to the world around it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;

use migration_stream::Escaped;
use rustix::process::{Signal, getpid, kill_process};

use super::lock;

/// One of the moments: its name, and the how many-eth of that name, from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    name: String,
    occurrence: u32,
}

impl FromStr for Boundary {
    type Err = String;

    /// `NAME#OCCURRENCE`.
    fn from_str(s: &str) -> Result<Self, String> {
        let (name, occurrence) = s.rsplit_once('#').ok_or("expected NAME#OCCURRENCE")?;
        match occurrence.parse() {
            Ok(occurrence @ 1..) => Ok(Self {
                name: name.to_owned(),
                occurrence,
            }),
            _ => Err(format!(
                "'{}' is not the number of an occurrence",
                Escaped(occurrence)
            )),
        }
    }
}

/// A moment to wait at, as long as somebody has the FIFO open for writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Halt {
    at: Boundary,
    fifo: PathBuf,
}

impl FromStr for Halt {
    type Err = String;

    /// `NAME#OCCURRENCE=FIFO`.
    fn from_str(s: &str) -> Result<Self, String> {
        let (at, fifo) = s.split_once('=').ok_or("expected NAME#OCCURRENCE=FIFO")?;
        Ok(Self {
            at: at.parse()?,
            fifo: fifo.into(),
        })
    }
}

/// What is done at the moments of this process: nothing, unless a test asks for it.
#[derive(Debug, Default)]
pub struct Boundaries {
    /// A line `NAME#OCCURRENCE` for each.
    log: Option<Mutex<File>>,
    last: Option<Boundary>,
    halt: Option<Halt>,
    occurrences: Mutex<HashMap<String, u32>>,
}

impl Boundaries {
    /// Notes each moment in `log`, waits at `halt`, and has `last` be the last one.
    #[must_use]
    pub fn new(log: Option<File>, last: Option<Boundary>, halt: Option<Halt>) -> Self {
        Self {
            log: log.map(Mutex::new),
            last,
            halt,
            occurrences: Mutex::default(),
        }
    }

    /// The moment `name` is here.
    pub(super) fn reach(&self, name: &str) {
        if self.log.is_none() && self.last.is_none() && self.halt.is_none() {
            return;
        }
        let occurrence = {
            let mut occurrences = lock(&self.occurrences);
            let count = occurrences.entry(name.to_owned()).or_default();
            *count += 1;
            *count
        };
        if let Some(log) = &self.log {
            // One write for a line. A test that misses it fails.
            let _ = lock(log).write_all(format!("{name}#{occurrence}\n").as_bytes());
        }
        let is_here = |b: &Boundary| b.name == name && b.occurrence == occurrence;
        if let Some(halt) = self.halt.as_ref().filter(|halt| is_here(&halt.at))
            && let Err(error) = wait(&halt.fifo)
        {
            tracing::error!(%error, fifo = ?halt.fifo, "cannot be waited for");
        }
        if self.last.as_ref().is_some_and(is_here) {
            // It is the process's own.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}

/// Waits until somebody has opened the FIFO for writing, and nobody has any more.
fn wait(fifo: &Path) -> io::Result<()> {
    File::open(fifo)?.read_to_end(&mut Vec::new()).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_has_a_name_and_a_number() {
        assert_eq!(
            "sending ram begins#3".parse(),
            Ok(Boundary {
                name: "sending ram begins".to_owned(),
                occurrence: 3
            })
        );
        for text in ["sending ram begins", "x#0", "x#y", ""] {
            assert!(text.parse::<Boundary>().is_err(), "{text}");
        }
        assert!("pass#1=/tmp/a=b".parse::<Halt>().is_ok());
        assert!("pass#1".parse::<Halt>().is_err());
    }

    #[test]
    fn moments_are_noted_and_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let boundaries = Boundaries::new(Some(file.reopen().unwrap()), None, None);
        for name in ["a", "b", "a"] {
            boundaries.reach(name);
        }
        let noted = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(noted, "a#1\nb#1\na#2\n");
    }
}
