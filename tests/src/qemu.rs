//! QEMU: which binaries this machine has, and a running one with its QMP session.
//!
//! Binaries come from the environment variable `COLO_QEMU` (paths, separated by colons), and then
//! from `qemu-system-x86_64` on `PATH`.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use std::{env, fmt, fs, thread};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::contents::Contents;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::{PATIENCE, Result};

/// How often a state that QEMU sends no event for is asked after.
const POLL: Duration = Duration::from_millis(10);

/// Where QEMU is looked for first.
pub const VARIABLE: &str = "COLO_QEMU";

/// A QEMU binary and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binary {
    path: PathBuf,
    version: (u32, u32, u32),
}

impl Binary {
    /// Asks the program at `path` for its version.
    ///
    /// # Errors
    /// It does not run, or is not QEMU.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let output = Command::new(&path)
            .arg("--version")
            .output()
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = parse_version(&text).ok_or_else(|| {
            format!(
                "{} is not QEMU: it says '{}'",
                path.display(),
                first_line(&text)
            )
        })?;
        Ok(Self { path, version })
    }

    /// Major, minor and micro version.
    #[must_use]
    pub const fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// Writes what the devices of the machine type `machine` declare of their state to `file`
    /// (`-dump-vmstate`).
    ///
    /// # Errors
    /// It does not know the machine type, or cannot write; the error quotes what it said.
    pub fn dump_vmstate(&self, machine: &str, file: &Path) -> Result<()> {
        let output = Command::new(&self.path)
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-M", machine, "-dump-vmstate"])
            .arg(file)
            .output()?;
        if output.status.success() {
            Ok(())
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{self} -M {machine} -dump-vmstate: {}", said.trim()).into())
        }
    }

    /// How guests run that migrate while they write memory. Under TCG, QEMU 7.2 misses pages that
    /// the guest dirties while they are sent: no destination gets them.
    #[must_use]
    pub fn live_accel(&self) -> Accel {
        if self.is_since((10, 0)) {
            Accel::Tcg
        } else {
            Accel::Kvm
        }
    }

    /// Whether it is at least of this major and minor version.
    #[must_use]
    pub fn is_since(&self, (major, minor): (u32, u32)) -> bool {
        self.version >= (major, minor, 0)
    }
}

impl fmt::Display for Binary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, micro) = self.version;
        write!(f, "QEMU {major}.{minor}.{micro}")
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// "QEMU emulator version 11.1.3 (Debian …)"
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let number = text
        .strip_prefix("QEMU emulator version ")?
        .split_whitespace()
        .next()?;
    let mut parts = number.split('.').map(|p| p.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

/// All binaries of this machine, one per version, looked up once per process.
///
/// # Errors
/// A path that `COLO_QEMU` names is not a QEMU that runs.
pub fn binaries() -> std::result::Result<&'static [Binary], &'static str> {
    static FOUND: OnceLock<std::result::Result<Vec<Binary>, String>> = OnceLock::new();
    FOUND
        .get_or_init(|| find_binaries().map_err(|e| format!("{VARIABLE}: {e}")))
        .as_deref()
        .map_err(String::as_str)
}

fn find_binaries() -> Result<Vec<Binary>> {
    let mut found: Vec<Binary> = Vec::new();
    let named = env::var_os(VARIABLE).unwrap_or_default();
    for path in env::split_paths(&named).filter(|p| !p.as_os_str().is_empty()) {
        found.push(Binary::at(path)?);
    }
    let path = env::var_os("PATH").unwrap_or_default();
    // What merely lies on PATH and does not run was not asked for.
    found.extend(
        env::split_paths(&path)
            .map(|dir| dir.join("qemu-system-x86_64"))
            .filter(|program| program.is_file())
            .filter_map(|program| Binary::at(program).ok()),
    );
    let mut versions = Vec::new();
    found.retain(|b| {
        let is_new = !versions.contains(&b.version);
        versions.push(b.version);
        is_new
    });
    Ok(found)
}

/// How guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// In QEMU's translator: anywhere.
    Tcg,
    /// In KVM.
    Kvm,
}

/// A small machine without any device that was not asked for. Stopped until `cont`, unless
/// [`Machine::running`].
#[derive(Clone, Debug)]
pub struct Machine {
    machine: String,
    memory_mib: u32,
    accel: Accel,
    memory_file: Option<(PathBuf, bool)>,
    prealloc: bool,
    boot: Option<PathBuf>,
    runs: bool,
    incoming: bool,
    args: Vec<OsString>,
}

impl Machine {
    /// A machine type (`pc`, `q35`, `microvm`, or one with its version) and its memory in MiB.
    pub fn new(machine: impl Into<String>, memory_mib: u32) -> Self {
        Self {
            machine: machine.into(),
            memory_mib,
            accel: Accel::Tcg,
            memory_file: None,
            prealloc: false,
            boot: None,
            runs: false,
            incoming: false,
            args: Vec::new(),
        }
    }

    /// Chooses how guest code runs; [`Accel::Tcg`] without it.
    #[must_use]
    pub const fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Guest RAM begins as the content of `file`, which must be as long as RAM. QEMU's writes stay
    /// its own.
    #[must_use]
    pub fn memory_from(mut self, file: &Path) -> Self {
        self.memory_file = Some((file.to_owned(), false));
        self
    }

    /// Guest RAM *is* `file`, byte `i` of it byte `i` of the machine's main RAM block; the file is
    /// made if need be.
    #[must_use]
    pub fn memory_in(mut self, file: &Path) -> Self {
        self.memory_file = Some((file.to_owned(), true));
        self
    }

    /// RAM that is read from a file, or made of it, is all there when the machine is.
    #[must_use]
    pub const fn prealloc(mut self, prealloc: bool) -> Self {
        self.prealloc = prealloc;
        self
    }

    /// Boots from the disk `file`, whose changes are thrown away.
    #[must_use]
    pub fn boot(mut self, file: &Path) -> Self {
        self.boot = Some(file.to_owned());
        self
    }

    /// Runs from the start.
    #[must_use]
    pub const fn running(mut self) -> Self {
        self.runs = true;
        self
    }

    /// Waits for `migrate-incoming`.
    #[must_use]
    pub const fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// Further arguments, as they are.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// It does not come as far as QMP; the error quotes what it said.
    pub fn start(&self, qemu: &Binary) -> Result<Qemu> {
        self.start_as(qemu, |command| command)
    }

    /// Starts it by the command that `wrap` makes of its own, to run it on another host, say.
    ///
    /// # Errors
    /// As for [`Machine::start`].
    pub fn start_as(&self, qemu: &Binary, wrap: impl FnOnce(Command) -> Command) -> Result<Qemu> {
        let dir = tempfile::Builder::new().prefix("qemu-").tempdir()?;
        let socket = dir.path().join("qmp");
        let mut command = Command::new(&qemu.path);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(self.machine_args()?);
        command.arg("-qmp");
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(&self.args);
        let name = format!("{qemu} ({})", self.machine);
        let mut process = Process::spawn(name, &mut wrap(command))?;
        let qmp = Qmp::connect(&socket, || {
            if process.is_running()? {
                Ok(())
            } else {
                Err(process.failure("ended before QMP"))
            }
        })?;
        Ok(Qemu {
            qmp,
            process,
            dir,
            can_outlive_failure: qemu.is_since((9, 1)),
        })
    }

    /// A line for a shell that starts it without QMP, waiting at the address that takes the place of
    /// `{}`.
    ///
    /// # Errors
    /// An argument is no text.
    pub fn restore_line(&self, qemu: &Binary) -> Result<String> {
        let mut args = vec![text(&qemu.path)?.to_owned()];
        args.extend(["-nodefaults", "-no-user-config", "-display", "none"].map(str::to_owned));
        args.extend(self.machine_args()?);
        for arg in &self.args {
            args.push(arg.to_str().ok_or("an argument is no text")?.to_owned());
        }
        args.extend(["-incoming", "{}"].map(str::to_owned));
        let quoted = args.iter().map(|arg| format!("'{arg}'"));
        Ok(format!("exec {}", quoted.collect::<Vec<_>>().join(" ")))
    }

    fn machine_args(&self) -> Result<Vec<String>> {
        let accel = match self.accel {
            Accel::Tcg => "tcg",
            Accel::Kvm => "kvm",
        };
        let mut machine = format!("{},accel={accel}", self.machine);
        let mut args = vec!["-m".to_owned(), format!("{}M", self.memory_mib)];
        if let Some((file, is_shared)) = &self.memory_file {
            machine.push_str(",memory-backend=ram0");
            let share = if *is_shared { "on" } else { "off" };
            let prealloc = if self.prealloc { "on" } else { "off" };
            args.extend([
                "-object".to_owned(),
                format!(
                    "memory-backend-file,id=ram0,size={}M,mem-path={},share={share},prealloc={prealloc}",
                    self.memory_mib,
                    text(file)?
                ),
            ]);
        }
        if let Some(file) = &self.boot {
            let drive = format!("format=raw,snapshot=on,file={}", text(file)?);
            if self.machine.starts_with("microvm") {
                args.extend(["-drive".to_owned(), format!("if=none,id=boot0,{drive}")]);
                args.extend(["-device", "virtio-blk-device,drive=boot0"].map(str::to_owned));
                // SeaBIOS drives no virtio-mmio device of the old kind, which is QEMU's default.
                args.extend(["-global", "virtio-mmio.force-legacy=false"].map(str::to_owned));
            } else {
                args.extend(["-drive".to_owned(), format!("if=ide,{drive}")]);
            }
        }
        args.extend(["-M".to_owned(), machine]);
        if !self.runs {
            args.push("-S".to_owned());
        }
        if self.incoming {
            args.extend(["-incoming", "defer"].map(str::to_owned));
        }
        Ok(args)
    }
}

fn text(path: &Path) -> Result<&str> {
    // A comma would end the option's value.
    path.to_str()
        .filter(|p| !p.contains(','))
        .ok_or_else(|| format!("QEMU takes no path like {}", path.display()).into())
}

/// A line of `info ramblock`.
struct RamBlockInfo {
    name: String,
    /// Bytes.
    used: u64,
    /// In the process.
    address: Option<u64>,
}

/// A running QEMU; dropping it kills it.
#[derive(Debug)]
pub struct Qemu {
    /// Its QMP session.
    pub qmp: Qmp,
    /// The process: to kill it, and for what it said.
    pub process: Process,
    dir: TempDir,
    /// Whether `migrate-incoming` can be told to keep the process when the migration fails.
    can_outlive_failure: bool,
}

impl Qemu {
    /// A directory that lives as long as this QEMU, for its sockets and files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts an outgoing migration without waiting for it.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        Ok(())
    }

    /// Listens for an incoming migration and returns the URI to migrate to: a TCP port 0 is
    /// replaced by the one QEMU got. The process stays when the migration fails, so that its
    /// reason can be asked for (from QEMU 9.1 on).
    ///
    /// # Errors
    /// QEMU refuses it.
    pub fn listen(&mut self, uri: &str) -> Result<String> {
        let mut arguments = json!({"uri": uri});
        if self.can_outlive_failure {
            arguments["exit-on-error"] = Value::from(false);
        }
        self.qmp.execute("migrate-incoming", arguments)?;
        if !uri.starts_with("tcp:") {
            return Ok(uri.to_owned());
        }
        let info = self.qmp.execute("query-migrate", Value::Null)?;
        let address = &info["socket-address"][0];
        match (address["host"].as_str(), address["port"].as_str()) {
            (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
            _ => Err(format!("no address among {info}").into()),
        }
    }

    /// Waits until the migration has `status`, and returns all that `query-migrate` says then.
    ///
    /// # Errors
    /// It failed instead (with QEMU's reason), or is not there within [`PATIENCE`].
    pub fn wait_migration(&mut self, status: &str) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.qmp.execute("query-migrate", Value::Null)?;
            if info["status"] == status {
                return Ok(info);
            }
            let has_ended = ["failed", "cancelled", "completed"].map(Value::from);
            if has_ended.contains(&info["status"]) || Instant::now() >= deadline {
                return Err(self.process.failure(&format!(
                    "should have migration status {status}, not {info}"
                )));
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until the outgoing migration has sent pages as differences (`xbzrle`).
    ///
    /// # Errors
    /// It has not within [`PATIENCE`].
    pub fn wait_differences(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.qmp.execute("query-migrate", Value::Null)?;
            if info["xbzrle-cache"]["pages"].as_u64() > Some(0) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("no page was sent as a difference: {info}").into());
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until `query-status` says `status`.
    ///
    /// # Errors
    /// It does not within [`PATIENCE`].
    pub fn wait_status(&mut self, status: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.qmp.execute("query-status", Value::Null)?;
            if info["status"] == status {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self
                    .process
                    .failure(&format!("should have status {status}, not {info}")));
            }
            thread::sleep(POLL);
        }
    }

    /// The names and used lengths of all RAM blocks, as `info ramblock` has them.
    ///
    /// # Errors
    /// QEMU's answer is not understood.
    pub fn ram_blocks(&mut self) -> Result<Vec<(String, u64)>> {
        let blocks = self.info_ramblock()?.into_iter();
        Ok(blocks.map(|block| (block.name, block.used)).collect())
    }

    /// The name and the bytes of every RAM block, out of the process's memory; `None` from a QEMU
    /// that does not say where they are (before 8.0).
    ///
    /// # Errors
    /// QEMU's answer is not understood, or its memory cannot be read.
    pub fn ram_contents(&mut self) -> Result<Option<Contents>> {
        let memory = File::open(format!("/proc/{}/mem", self.process.id()))?;
        let mut contents = Contents::new();
        for block in self.info_ramblock()? {
            let Some(address) = block.address else {
                return Ok(None);
            };
            let mut bytes = vec![0; usize::try_from(block.used)?];
            memory.read_exact_at(&mut bytes, address)?;
            contents.insert(block.name, bytes);
        }
        Ok(Some(contents))
    }

    fn info_ramblock(&mut self) -> Result<Vec<RamBlockInfo>> {
        let text = self.qmp.execute(
            "human-monitor-command",
            json!({"command-line": "info ramblock"}),
        )?;
        let text = text.as_str().unwrap_or_default();
        // Block name, page size as a number and its unit, offset, used length, total length, and
        // where it is in the process.
        let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let block = |line: &str| {
            let mut fields = line.split_whitespace();
            Some(RamBlockInfo {
                name: fields.next()?.to_owned(),
                used: number(fields.nth(3)?)?,
                address: fields.nth(1).and_then(number),
            })
        };
        let lines = text.lines().skip(1).filter(|l| !l.trim().is_empty());
        lines
            .map(|line| block(line).ok_or_else(|| format!("not a RAM block: '{line}'").into()))
            .collect()
    }

    /// `length` bytes of the guest's physical memory from `address` on, as the guest would read
    /// them: firmware shadows and device holes included.
    ///
    /// # Errors
    /// QEMU refuses it, or writes less.
    pub fn pmemsave(&mut self, address: u64, length: u64) -> Result<Vec<u8>> {
        let file = self.dir.path().join("pmem");
        self.qmp.execute(
            "pmemsave",
            json!({"val": address, "size": length, "filename": text(&file)?}),
        )?;
        let bytes = fs::read(&file)?;
        fs::remove_file(&file)?;
        if bytes.len() as u64 == length {
            Ok(bytes)
        } else {
            Err(format!("pmemsave wrote {} bytes, not {length}", bytes.len()).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_with_and_without_a_package() {
        let debian = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\nCopyright";
        assert_eq!(parse_version(debian), Some((11, 1, 3)));
        let own = "QEMU emulator version 7.2.0\n";
        assert_eq!(parse_version(own), Some((7, 2, 0)));
        assert_eq!(parse_version("bash, version 5"), None);
        assert_eq!(parse_version("QEMU emulator version 11"), None);
    }

    #[test]
    fn a_program_that_is_not_qemu_is_refused_by_name() {
        let error = Binary::at("/bin/echo").unwrap_err().to_string();
        assert!(
            error.starts_with("/bin/echo is not QEMU: it says '"),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}
