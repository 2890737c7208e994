//! Starting a side that outlives whoever started it.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::remote::Remote;
use crate::qmp::QmpAddress;

/// A side that was started. It is killed when this is dropped, unless it is [kept](Started::keep).
#[derive(Debug)]
pub(super) struct Started {
    process: Option<Child>,
    qmp: QmpAddress,
}

/// Starts `colo-vmm run` with `options` in the background, with its files in `dir`, and connects.
pub(super) fn start(
    name: &'static str,
    dir: &Path,
    incoming: bool,
    options: &[String],
) -> Result<(Remote, Option<Started>), Box<dyn Error>> {
    fs::create_dir_all(dir).map_err(|e| format!("making {}: {e}", dir.display()))?;
    let dir = dir.canonicalize()?;
    let file = |extension: &str| dir.join(format!("{name}.{extension}"));
    let (socket, log) = (file("qmp"), file("log"));
    if socket.exists() {
        return Err(format!("{} is there already", socket.display()).into());
    }
    let written = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    let mut command = Command::new(env::current_exe()?);
    command
        .arg("run")
        .args(options)
        .arg("--qmp")
        .arg(format!("unix:{}", socket.display()))
        .stdin(Stdio::null())
        .stdout(written.try_clone()?)
        .stderr(written)
        .env("NO_COLOR", "1")
        // A terminal's Ctrl-C is not for it.
        .process_group(0);
    if !options
        .iter()
        .any(|o| o == "--serial" || o.starts_with("--serial="))
    {
        command
            .arg("--serial")
            .arg(format!("file:{}", file("serial").display()));
    }
    if incoming {
        command.args(["--incoming", "defer"]);
    }
    let process = command
        .spawn()
        .map_err(|e| format!("starting the {name}: {e}"))?;
    let qmp = QmpAddress::Unix(socket);
    let mut started = Started {
        process: Some(process),
        qmp: qmp.clone(),
    };
    let remote = Remote::connect_when_ready(name, &qmp, || started.runs()).map_err(|e| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        format!("{e}; the {name} wrote: {}", said.trim_end())
    })?;
    Ok((remote, Some(started)))
}

impl Started {
    fn runs(&mut self) -> bool {
        self.process
            .as_mut()
            .is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// The number of its process.
    pub(super) fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Child::id)
    }

    /// Where it is commanded.
    pub(super) const fn qmp(&self) -> &QmpAddress {
        &self.qmp
    }

    /// Lets it run on.
    pub(super) fn keep(mut self) {
        self.process = None;
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended long ago.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
