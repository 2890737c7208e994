//! Our source and our destination, each in a process of its own, as any other VMM is: it has a host of
//! its own, and its CPU time is its own.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use ::tests::Result;
use ::tests::guest::compare;
use ::tests::process::Process;
use ::tests::vmm;
use benches::link::Cable;
use benches::usage::CpuTime;
use benches::way::Way;
use migration_stream::{Tail, TailLimits};
use serde::{Deserialize, Serialize};

use crate::ours::{Receiver, send};
use crate::ram::Ram;

/// What such a process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Side {
    /// To send a stopped guest.
    Source {
        /// How the memory crosses.
        way: Way,
        /// To where.
        uri: String,
        /// The name of the machine type.
        machine: String,
        /// The blocks and their lengths.
        blocks: Vec<(String, u64)>,
        /// What the main block begins as.
        content: PathBuf,
        /// The devices, as a QEMU has sent them.
        devices: PathBuf,
        /// Whether the memory is taken from the system before.
        is_populated: bool,
    },
    /// To take one guest in.
    Destination {
        /// How the memory crosses.
        way: Way,
        /// Where to listen.
        uri: String,
        /// The blocks and their lengths.
        blocks: Vec<(String, u64)>,
        /// Whether the memory is taken from the system before the guest comes.
        is_populated: bool,
        /// What has to arrive in the main block, if it is to be looked at.
        expected: Option<PathBuf>,
    },
}

impl FromStr for Side {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

/// What it says at its end.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Told {
    /// How long it took, from the first connection to the confirmation, seconds. A destination says 0.
    pub seconds: f64,
    /// CPU time from when its memory was there, seconds.
    pub cpu_seconds: f64,
}

fn cpu() -> Result<Duration> {
    Ok(CpuTime::of(std::process::id(), |_| false)?.total)
}

impl Side {
    /// Is this side: a destination says where it listens, and both say what it took.
    pub fn run(&self) -> Result<()> {
        let told = match self {
            Self::Source {
                way,
                uri,
                machine,
                blocks,
                content,
                devices,
                is_populated,
            } => {
                let tail = Tail::decode(&fs::read(devices)?, TailLimits::default())?;
                let ram = Ram::with_content(blocks, content)?;
                if *is_populated {
                    ram.populate()?;
                }
                let before = cpu()?;
                let time = send(uri, machine, ram, &tail, way.multifd())?;
                Told {
                    seconds: time.as_secs_f64(),
                    cpu_seconds: (cpu()? - before).as_secs_f64(),
                }
            }
            Self::Destination {
                way,
                uri,
                blocks,
                is_populated,
                expected,
            } => {
                let ram = Ram::fresh(blocks)?;
                if *is_populated {
                    ram.populate()?;
                }
                let before = cpu()?;
                let receiver = Receiver::listen(uri, ram, way.multifd())?;
                println!("{}", receiver.uri());
                let (_, ram) = receiver.join()?;
                let spent = cpu()? - before;
                if let Some(file) = expected {
                    compare("RAM that arrived", &fs::read(file)?, &ram.content()?)?;
                }
                Told {
                    seconds: 0.0,
                    cpu_seconds: spent.as_secs_f64(),
                }
            }
        };
        println!("{}", serde_json::to_string(&told)?);
        Ok(())
    }

    const fn place(&self) -> (vmm::Side, &'static str) {
        match self {
            Self::Source { .. } => (vmm::Side::Primary, "our source"),
            Self::Destination { .. } => (vmm::Side::Secondary, "our destination"),
        }
    }

    /// Starts a process that is this side.
    pub fn start(&self, cable: &Cable) -> Result<Started> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["--side", &serde_json::to_string(self)?]);
        let (place, name) = self.place();
        let process = Process::spawn(name, &mut cable.on(place, command))?;
        Ok(Started(process))
    }
}

/// A side of ours that runs.
#[derive(Debug)]
pub struct Started(Process);

impl Started {
    /// Where a destination listens.
    pub fn uri(&self) -> Result<String> {
        self.0.stdout().wait_for("an address", |bytes| {
            let end = bytes.iter().position(|b| *b == b'\n')?;
            Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
        })
    }

    /// Waits for its end.
    pub fn join(mut self) -> Result<Told> {
        if !self.0.wait()?.success() {
            return Err(self.0.failure("did not come to its end"));
        }
        let said = String::from_utf8(self.0.stdout().whole()?)?;
        let last = said.lines().last().unwrap_or_default();
        Ok(serde_json::from_str(last)?)
    }
}
