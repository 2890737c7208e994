//! Our destination in a process of its own, as any other VMM is: it shares no page tables with the
//! source.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use ::tests::Result;
use ::tests::guest::compare;
use ::tests::process::Process;
use benches::connection::Way;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::ours::Receiver;
use crate::ram::Ram;

/// What such a process is told.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// How the memory crosses.
    pub way: Way,
    /// Where to listen.
    pub uri: String,
    /// The blocks and their lengths.
    pub blocks: Vec<(String, u64)>,
    /// Whether the memory is taken from the system before the guest comes.
    pub is_populated: bool,
    /// What has to arrive in the main block, if it is to be looked at.
    pub expected: Option<PathBuf>,
}

impl FromStr for Arguments {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let block = |b: &Value| Some((b[0].as_str()?.to_owned(), b[1].as_u64()?));
        let blocks = value["blocks"]
            .as_array()
            .and_then(|blocks| blocks.iter().map(block).collect());
        Ok(Self {
            way: Way::deserialize(&value["way"]).map_err(|e| e.to_string())?,
            uri: value["uri"].as_str().ok_or("no address")?.to_owned(),
            blocks: blocks.ok_or("no blocks")?,
            is_populated: value["populated"] == true,
            expected: value["expected"].as_str().map(PathBuf::from),
        })
    }
}

impl Arguments {
    /// Says where it listens, and takes one guest in.
    pub fn run(&self) -> Result<()> {
        let ram = Ram::fresh(&self.blocks)?;
        if self.is_populated {
            ram.populate()?;
        }
        let receiver = Receiver::listen(&self.uri, ram, self.way.multifd())?;
        println!("{}", receiver.uri());
        let (_, ram) = receiver.join()?;
        match &self.expected {
            Some(file) => compare("RAM that arrived", &fs::read(file)?, &ram.content()?),
            None => Ok(()),
        }
    }
}

/// A destination of ours that waits for its source.
#[derive(Debug)]
pub struct Destination {
    process: Process,
    uri: String,
    /// Where its socket is, if it has one.
    _dir: TempDir,
}

impl Destination {
    /// Starts it.
    pub fn start(arguments: &Arguments, dir: TempDir) -> Result<Self> {
        let Arguments {
            way,
            uri,
            blocks,
            is_populated,
            expected,
        } = arguments;
        let arguments = json!({
            "way": way,
            "uri": uri,
            "blocks": blocks,
            "populated": is_populated,
            "expected": expected,
        });
        let mut command = Command::new(env::current_exe()?);
        command.args(["--destination", &arguments.to_string()]);
        let process = Process::spawn("our destination", &mut command)?;
        let uri = process.stdout().wait_for("an address", |bytes| {
            let line = bytes.strip_suffix(b"\n")?;
            Some(String::from_utf8_lossy(line).into_owned())
        })?;
        Ok(Self {
            process,
            uri,
            _dir: dir,
        })
    }

    /// Where it listens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Waits for its end.
    pub fn join(mut self) -> Result<()> {
        if self.process.wait()?.success() {
            Ok(())
        } else {
            Err(self.process.failure("did not take the guest in"))
        }
    }
}
