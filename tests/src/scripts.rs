//! Scripts out of QEMU's sources, which say what ours has to say: they are not part of this project, and
//! `COLO_QEMU_SCRIPTS` names the directory that has them. They run in `python3`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;

/// Where the scripts are looked for.
pub const VARIABLE: &str = "COLO_QEMU_SCRIPTS";

/// The path of the script called `name`.
///
/// # Errors
/// What is missing.
pub fn find(name: &str) -> std::result::Result<PathBuf, String> {
    let dir = env::var_os(VARIABLE).filter(|dir| !dir.is_empty());
    let dir =
        dir.ok_or_else(|| format!("needs QEMU's {name} in a directory that {VARIABLE} names"))?;
    let path = Path::new(&dir).join(name);
    if !path.is_file() {
        return Err(format!(
            "needs {name} in the directory that {VARIABLE} names"
        ));
    }
    match Command::new("python3").arg("--version").output() {
        Ok(output) if output.status.success() => Ok(path),
        Ok(output) => Err(format!("needs python3, which ends with {}", output.status)),
        Err(e) => Err(format!("needs python3: {e}")),
    }
}

/// What the script prints and the code that it exits with.
///
/// # Errors
/// It does not run, dies, or prints to standard error: an exception that it does not catch.
pub fn run(script: &Path, arguments: &[&Path]) -> Result<(String, i32)> {
    let output = Command::new("python3")
        .arg(script)
        .args(arguments)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(code) if said.is_empty() => Ok((String::from_utf8(output.stdout)?, code)),
        _ => Err(format!("{} ends with {}: {said}", script.display(), output.status).into()),
    }
}

/// What `analyze-migration.py` prints of the stream in a file; files that it extracts are written to
/// the directory `cwd`.
///
/// # Errors
/// It fails.
pub fn analyze(script: &Path, stream: &Path, args: &[&str], cwd: &Path) -> Result<String> {
    let output = Command::new("python3")
        .arg(script)
        .arg("-f")
        .arg(stream)
        .args(args)
        .current_dir(cwd)
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    // It quotes the whole description.
    let said = String::from_utf8_lossy(&output.stderr);
    let start: String = said.chars().take(2000).collect();
    Err(format!("{} ends with {}: {start}", script.display(), output.status).into())
}
