//! A child process that does not outlive its test and whose output can be waited for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{PATIENCE, Result};

/// How often a process that can only be polled is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A running child; dropping it kills it and waits until it is gone.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Output,
    stderr: Output,
}

impl Process {
    /// Starts `command` with both outputs captured. `name` is what errors call it.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn spawn(name: impl Into<String>, command: &mut Command) -> Result<Self> {
        Self::start(name.into(), command.stdin(Stdio::null()))
    }

    /// The same with an input for [`Process::type_in`].
    ///
    /// # Errors
    /// As there.
    pub fn spawn_with_input(name: impl Into<String>, command: &mut Command) -> Result<Self> {
        Self::start(name.into(), command.stdin(Stdio::piped()))
    }

    fn start(name: String, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{name} does not start: {:?}: {e}", command.get_program()))?;
        let stdin = child.stdin.take();
        let stdout = Output::collect(child.stdout.take());
        let stderr = Output::collect(child.stderr.take());
        Ok(Self {
            name,
            child,
            stdin,
            stdout,
            stderr,
        })
    }

    /// The process id, for signals.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// It has none, or reads no more.
    pub fn type_in(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.stdin {
            Some(stdin) => Ok(stdin.write_all(bytes)?),
            None => Err(self.failure("has no input")),
        }
    }

    /// What it has written to standard output.
    #[must_use]
    pub const fn stdout(&self) -> &Output {
        &self.stdout
    }

    /// What it has written to standard error.
    #[must_use]
    pub const fn stderr(&self) -> &Output {
        &self.stderr
    }

    /// Whether it is still there.
    ///
    /// # Errors
    /// The system call's.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Kills it with SIGKILL and waits for its end: what a lost host looks like to its peer.
    ///
    /// # Errors
    /// The system call's.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Stops it, which it does not notice: a host that says nothing any more.
    ///
    /// # Errors
    /// There is no such process.
    pub fn freeze(&self) -> Result<()> {
        self.signal("STOP")?;
        // Each of its threads takes the signal when it gets a processor, and goes on until then.
        let deadline = Instant::now() + PATIENCE;
        while !self.is_frozen()? {
            if Instant::now() >= deadline {
                return Err(self.failure("does not stop"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Whether none of its threads does anything. What waits for a disk stops when it has it.
    fn is_frozen(&self) -> Result<bool> {
        for task in fs::read_dir(format!("/proc/{}/task", self.id()))? {
            // One that has ended meanwhile does nothing either.
            let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
            let state = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.chars().next());
            if matches!(state, Some('R' | 'S')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Lets it go on after [`Process::freeze`].
    ///
    /// # Errors
    /// There is no such process.
    pub fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, name: &str) -> Result<()> {
        let id = self.id().to_string();
        let status = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(id)
            .status()?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure("takes no signal"))
        }
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It is still running after [`PATIENCE`].
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(self.failure("is still running"));
            }
            thread::sleep(POLL);
        }
    }

    /// An error about this process that quotes what it said last.
    #[must_use]
    pub fn failure(&self, what: &str) -> crate::Error {
        let said = self.stderr.text();
        let said = said.trim();
        if said.is_empty() {
            format!("{} {what}", self.name).into()
        } else {
            format!("{} {what}; it said: {said}", self.name).into()
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One captured output of a process. Clones share it.
#[derive(Clone, Debug)]
pub struct Output(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    fn collect(pipe: Option<impl Read + Send + 'static>) -> Self {
        let output = Self(Arc::default());
        let sink = output.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            if let Some(mut pipe) = pipe {
                loop {
                    match pipe.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(n) => sink.update(|c| c.bytes.extend_from_slice(&buffer[..n])),
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            }
            sink.update(|c| c.ended = true);
        });
        output
    }

    fn update(&self, change: impl FnOnce(&mut Captured)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }

    /// All bytes so far.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let captured = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        captured.bytes.clone()
    }

    /// All bytes so far, as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// All bytes of a process that was [killed](Process::kill) or ends by itself.
    ///
    /// # Errors
    /// It goes on for longer than [`PATIENCE`].
    pub fn whole(&self) -> Result<Vec<u8>> {
        let (lock, changed) = &*self.0;
        let captured = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let (captured, _) = changed
            .wait_timeout_while(captured, PATIENCE, |c| !c.ended)
            .unwrap_or_else(PoisonError::into_inner);
        if captured.ended {
            Ok(captured.bytes.clone())
        } else {
            Err("the output does not end".into())
        }
    }

    /// Waits until there are more than `length` bytes, the output ends, or `deadline`. Returns those
    /// behind the first `length`.
    #[must_use]
    pub fn more(&self, length: usize, deadline: Instant) -> Vec<u8> {
        let (lock, changed) = &*self.0;
        let captured = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let (captured, _) = changed
            .wait_timeout_while(captured, left, |c| !c.ended && c.bytes.len() <= length)
            .unwrap_or_else(PoisonError::into_inner);
        captured.bytes.get(length..).unwrap_or_default().to_vec()
    }

    /// Waits until `found` makes something of all bytes so far.
    ///
    /// # Errors
    /// Nothing was found before [`PATIENCE`] ran out or the output ended.
    pub fn wait_for<T>(&self, what: &str, mut found: impl FnMut(&[u8]) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        let (lock, changed) = &*self.0;
        let mut captured = lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = found(&captured.bytes) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if captured.ended || left.is_zero() {
                let text = String::from_utf8_lossy(&captured.bytes).into_owned();
                return Err(format!("no {what} in the output: {text}").into());
            }
            captured = changed
                .wait_timeout(captured, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The path of a program of this workspace, in the profile of the running test. It is built first, once
/// for each process.
///
/// # Errors
/// It does not build.
pub fn workspace_program(package: &str, program: &str) -> Result<PathBuf> {
    static BUILT: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = built.get(program) {
        return Ok(path.clone());
    }
    let path = build(package, program)?;
    built.insert(program.to_owned(), path.clone());
    Ok(path)
}

fn build(package: &str, program: &str) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    // What Cargo has told this process of its own package would pass for a change of the environment in
    // which dependencies were built (ring's build script looks at it), and each run would build them again.
    for (name, _) in std::env::vars_os() {
        let of_a_package = ["CARGO_MANIFEST_", "CARGO_PKG_"];
        if (name.to_str()).is_some_and(|name| of_a_package.iter().any(|of| name.starts_with(of))) {
            build.env_remove(name);
        }
    }
    build.args([
        "build",
        "--quiet",
        "--locked",
        "--message-format=json-render-diagnostics",
    ]);
    build.args(["--package", package, "--bin", program]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let output = build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()?;
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|m| m["target"]["name"] == program)
        .find_map(|m| m["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| format!("{package} does not build a program {program}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::spawn("sh", Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn both_outputs_are_kept_and_can_be_waited_for() {
        let mut sh = shell("echo one; echo two >&2; exec sleep 60");
        let line = sh
            .stdout()
            .wait_for("line", |b| b.ends_with(b"\n").then(|| b.to_vec()))
            .unwrap();
        assert_eq!(line, b"one\n");
        sh.stderr()
            .wait_for("line", |b| (b == b"two\n").then_some(()))
            .unwrap();
        assert!(sh.is_running().unwrap());
        sh.kill().unwrap();
        assert!(!sh.is_running().unwrap());
    }

    #[test]
    fn waiting_for_output_ends_with_the_output() {
        let mut sh = shell("echo last words >&2; exit 3");
        let error = sh
            .stderr()
            .wait_for("greeting", |b| b.starts_with(b"hello").then_some(()))
            .unwrap_err();
        assert_eq!(error.to_string(), "no greeting in the output: last words\n");
        assert_eq!(sh.stderr().whole().unwrap(), b"last words\n");
        assert_eq!(sh.wait().unwrap().code(), Some(3));
        assert_eq!(
            sh.failure("failed").to_string(),
            "sh failed; it said: last words"
        );
    }
}
