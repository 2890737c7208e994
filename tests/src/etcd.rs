//! etcd: a cluster of one member, started by a test on the loopback with data of its own.
//!
//! The program is the one that the environment variable `COLO_ETCD` names, or `etcd` on `PATH`.

use std::env;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::Result;
use crate::netns::{Host, Network};
use crate::process::Process;

/// Where etcd is looked for first.
pub const VARIABLE: &str = "COLO_ETCD";

/// The program, or why there is none.
///
/// # Errors
/// What was looked for.
pub fn find() -> std::result::Result<PathBuf, String> {
    let named = env::var_os(VARIABLE).filter(|path| !path.is_empty());
    let program = PathBuf::from(named.unwrap_or_else(|| "etcd".into()));
    match Command::new(&program).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(program),
        Ok(output) => Err(format!("needs etcd, which ends with {}", output.status)),
        Err(e) => Err(format!("needs etcd in {VARIABLE} or on PATH: {e}")),
    }
}

/// Where an etcd with a host of its own listens, for clients and for other members.
const PORTS: [u16; 2] = [2379, 2380];

/// A running etcd. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    command: Command,
    endpoint: String,
    _data: TempDir,
}

impl Etcd {
    /// Starts it without data.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(program: &Path) -> Result<Self> {
        // A port that was free may be somebody else's a moment later.
        let mut attempts = 5;
        loop {
            attempts -= 1;
            match Self::listening(program, "127.0.0.1", free_ports()?, |command| command) {
                Err(_) if attempts > 0 => {}
                result => return result,
            }
        }
    }

    /// Starts it without data on a host of `network`, which has none yet.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_on(program: &Path, network: &Network, host: Host) -> Result<Self> {
        let on_host = |command| network.on(host, &command);
        Self::listening(program, host.address(), PORTS, on_host)
    }

    fn listening(
        program: &Path,
        host: &str,
        [clients, members]: [u16; 2],
        placed: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let endpoint = format!("{host}:{clients}");
        let (clients, members) = (
            format!("http://{endpoint}"),
            format!("http://{host}:{members}"),
        );
        let mut command = Command::new(program);
        command
            .arg("--data-dir")
            .arg(data.path().join("etcd"))
            .args(["--listen-client-urls", &clients])
            .args(["--advertise-client-urls", &clients])
            .args(["--listen-peer-urls", &members])
            .args(["--initial-advertise-peer-urls", &members])
            .args(["--initial-cluster", &format!("default={members}")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        let mut command = placed(command);
        Ok(Self {
            process: run(&mut command)?,
            command,
            endpoint,
            _data: data,
        })
    }

    /// `HOST:PORT` for clients.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// It takes requests and answers none.
    ///
    /// # Errors
    /// There is no such process.
    pub fn freeze(&self) -> Result<()> {
        self.process.freeze()
    }

    /// It goes on after [`Etcd::freeze`], with the requests that have come meanwhile.
    ///
    /// # Errors
    /// There is no such process.
    pub fn thaw(&self) -> Result<()> {
        self.process.thaw()
    }

    /// Kills it; its data stay.
    ///
    /// # Errors
    /// The system call's.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again where it was, after [`Etcd::kill`].
    ///
    /// # Errors
    /// It does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.process = run(&mut self.command)?;
        Ok(())
    }
}

fn free_ports() -> Result<[u16; 2]> {
    // Both are held until both are known.
    let listeners = [
        TcpListener::bind("127.0.0.1:0")?,
        TcpListener::bind("127.0.0.1:0")?,
    ];
    let [a, b] = &listeners;
    Ok([a.local_addr()?.port(), b.local_addr()?.port()])
}

/// Starts it, and waits until it serves.
fn run(command: &mut Command) -> Result<Process> {
    let process = Process::spawn("etcd", command)?;
    // Said once it is known who leads: 3.4 and earlier, and 3.5 on.
    let serves = |said: &[u8]| {
        let said = String::from_utf8_lossy(said);
        (said.contains("serving insecure client requests")
            || said.contains("serving client traffic insecurely"))
        .then_some(())
    };
    process.stderr().wait_for("service", serves)?;
    Ok(process)
}
