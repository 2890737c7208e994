//! `colo-vmm`: a running one with its QMP session and its guest's serial line, and two of them as a
//! pair.

mod command;
mod output;
mod pair;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::command::ColoVmm;
pub use self::output::{LINE, check_count, first_line};
pub use self::pair::{Connection, Pair, Side};
use crate::process::{Process, workspace_program};
use crate::qmp::Qmp;
use crate::{PATIENCE, Result};

/// How often a state that there is no event for is asked after.
const POLL: Duration = Duration::from_millis(5);

/// Names of the socket and the file in the directory of a [`Vmm`].
const QMP: &str = "qmp";
const SERIAL: &str = "serial";

/// Whether an error of COLO's says that a wait for a silent peer has run out: that for the main stream, or
/// a channel's whose peer fell silent between its synchronisation and the main stream's.
#[must_use]
pub fn has_run_out(error: &str) -> bool {
    error.contains("deadline") || error.contains("no flush on the main stream")
}

/// The program `colo-vmm`, built once for all trials of a test program.
///
/// # Errors
/// It does not build.
pub fn program() -> Result<&'static Path> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| workspace_program("colo-vmm", "colo-vmm").map_err(|e| e.to_string()))
        .as_deref()
        .map_err(|e| e.as_str().into())
}

/// A running `colo-vmm`; dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    /// Its QMP session.
    pub qmp: Qmp,
    /// The process: to kill it, and for what it said.
    pub process: Process,
    dir: TempDir,
}

impl Vmm {
    /// Runs a command of [`ColoVmm::command`], possibly wrapped in another.
    ///
    /// # Errors
    /// It does not come as far as QMP; the error quotes what it said.
    pub fn start(name: &str, mut command: Command, dir: TempDir) -> Result<Self> {
        Self::connect(Process::spawn(name, &mut command)?, dir)
    }

    fn connect(mut process: Process, dir: TempDir) -> Result<Self> {
        let qmp = Qmp::connect(&dir.path().join(QMP), || {
            if process.is_running()? {
                Ok(())
            } else {
                Err(process.failure("ended before QMP"))
            }
        })?;
        Ok(Self { qmp, process, dir })
    }

    /// Starts `colo-vmm standby` with these arguments, besides the address of QMP.
    ///
    /// # Errors
    /// It does not come as far as QMP; the error quotes what it said.
    pub fn standby<T: Into<OsString>>(args: impl IntoIterator<Item = T>) -> Result<Self> {
        Self::standby_as(args, |command| command)
    }

    /// As [`Vmm::standby`], by the command that `wrap` makes of its own.
    ///
    /// # Errors
    /// As there.
    pub fn standby_as<T: Into<OsString>>(
        args: impl IntoIterator<Item = T>,
        wrap: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("standby-").tempdir()?;
        let mut command = Command::new(program()?);
        command.arg("standby");
        command.arg("--qmp");
        command.arg(format!("unix:{}", dir.path().join(QMP).display()));
        command.args(args.into_iter().map(Into::into));
        Self::start("standby", wrap(command), dir)
    }

    /// A directory that lives as long as this process, for its sockets and files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// All that its guest's serial line has let out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn output(&self) -> Result<Vec<u8>> {
        match fs::read(self.dir.path().join(SERIAL)) {
            // It is at the process's own output: see `ColoVmm::interactive`.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(self.process.stdout().bytes()),
            result => Ok(result?),
        }
    }

    /// Waits until the guest has printed `lines` more lines than now.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`].
    pub fn wait_lines(&mut self, lines: u64) -> Result<()> {
        let wanted = self.output()?.len() as u64 + lines * LINE;
        self.poll("more lines of the guest", |vmm| {
            Ok((vmm.output()?.len() as u64 >= wanted).then_some(()))
        })
    }

    /// Starts an outgoing migration without waiting for it.
    ///
    /// # Errors
    /// It refuses.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        Ok(())
    }

    /// Listens on a free port of this machine, and returns its URI.
    ///
    /// # Errors
    /// It refuses.
    pub fn listen(&mut self) -> Result<String> {
        self.listen_on("tcp:127.0.0.1:0")
    }

    /// Listens, without ending the process should the migration fail, and returns where, as a URI.
    ///
    /// # Errors
    /// It refuses.
    pub fn listen_on(&mut self, uri: &str) -> Result<String> {
        let arguments = json!({"uri": uri, "exit-on-error": false});
        self.qmp.execute("migrate-incoming", arguments)?;
        self.listens_at()
    }

    /// Where it listens, as a URI. A standby answers before it listens.
    ///
    /// # Errors
    /// Nowhere within [`PATIENCE`].
    pub fn listens_at(&mut self) -> Result<String> {
        self.poll("a place where it listens", |vmm| {
            let migration = vmm.migration()?;
            let address = &migration["socket-address"][0];
            let text = |key: &str| address[key].as_str().unwrap_or_default().to_owned();
            Ok(match address["type"].as_str() {
                Some("inet") => Some(format!("tcp:{}:{}", text("host"), text("port"))),
                Some("unix") => Some(format!("unix:{}", text("path"))),
                _ => None,
            })
        })
    }

    /// What `query-migrate` answers.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn migration(&mut self) -> Result<Value> {
        self.qmp.execute("query-migrate", Value::Null)
    }

    /// What `x-query-colo-heartbeat` answers.
    ///
    /// # Errors
    /// It has none, or the connection is lost.
    pub fn heartbeat(&mut self) -> Result<Value> {
        self.qmp.execute("x-query-colo-heartbeat", Value::Null)
    }

    /// Waits until `query-migrate` gives `status`, and returns all that it gives.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or has failed instead.
    pub fn wait_migration(&mut self, status: &str) -> Result<Value> {
        self.poll(&format!("migration status {status}"), |vmm| {
            let migration = vmm.migration()?;
            if migration["status"] == status {
                return Ok(Some(migration));
            }
            if ["failed", "cancelled"]
                .map(Value::from)
                .contains(&migration["status"])
            {
                return Err(vmm
                    .process
                    .failure(&format!("has no migration in status {status}: {migration}")));
            }
            Ok(None)
        })
    }

    /// Waits until the migration has failed, and returns why.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or gives no reason.
    pub fn wait_failure(&mut self) -> Result<String> {
        let migration = self.wait_migration("failed")?;
        let reason = migration["error-desc"].as_str();
        Ok(reason
            .ok_or_else(|| format!("no error-desc in {migration}"))?
            .to_owned())
    }

    /// The run state.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", Value::Null)?;
        let name = status["status"].as_str().unwrap_or_default();
        assert_eq!(status["running"], name == "running");
        Ok(name.to_owned())
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// It is another one after [`PATIENCE`].
    pub fn wait_status(&mut self, status: &str) -> Result<()> {
        self.poll(&format!("run state {status}"), |vmm| {
            Ok((vmm.status()? == status).then_some(()))
        })
    }

    /// COLO's checkpoints so far: the data of their events.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn checkpoints(&mut self) -> Result<Vec<Value>> {
        if self.process.is_running()? {
            self.status()?;
        } else {
            self.qmp.hear_out()?;
        }
        let checkpoints = self
            .qmp
            .events()
            .filter(|e| e["event"] == "X_COLO_CHECKPOINT");
        Ok(checkpoints.map(|e| e["data"].clone()).collect())
    }

    /// Waits until COLO has taken so many checkpoints.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or has ended.
    pub fn wait_checkpoints(&mut self, count: usize) -> Result<()> {
        self.poll(&format!("{count} checkpoints"), |vmm| {
            if vmm.qmp.events().any(|e| e["event"] == "COLO_EXIT") {
                let migration = vmm.migration()?;
                return Err(vmm.process.failure(&format!("has left COLO: {migration}")));
            }
            Ok((vmm.checkpoints()?.len() >= count).then_some(()))
        })
    }

    /// Has it go on alone, its peer being dead, and waits until its guest runs.
    ///
    /// # Errors
    /// It refuses, or does not go on within [`PATIENCE`].
    pub fn go_on_alone(&mut self) -> Result<()> {
        let instances = self.qmp.execute_oob("query-yank", Value::Null)?;
        self.qmp
            .execute_oob("yank", json!({"instances": instances}))?;
        self.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
        self.wait_migration("completed")?;
        self.wait_status("running")
    }

    /// Stops the process, which does not notice: a host that says nothing any more.
    ///
    /// # Errors
    /// There is no such process.
    pub fn freeze(&self) -> Result<()> {
        self.process.freeze()
    }

    /// Lets a stopped process go on.
    ///
    /// # Errors
    /// There is no such process.
    pub fn thaw(&self) -> Result<()> {
        self.process.thaw()
    }

    /// Asks `found` until it gives something.
    ///
    /// # Errors
    /// It gives nothing within [`PATIENCE`], or an error.
    pub fn poll<T>(
        &mut self,
        what: &str,
        mut found: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = found(self)? {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                return Err(self.process.failure(&format!("has no {what}")));
            }
            thread::sleep(POLL);
        }
    }
}
