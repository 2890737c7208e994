//! Where something was measured.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use serde::{Deserialize, Serialize};

/// The machine, and what was built on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Model of the CPU.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// RAM, MiB.
    pub memory_mib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Modules that make KVM what it is here.
    pub kvm: Vec<String>,
    /// The compiler.
    pub rustc: String,
    /// Version of the crates.
    pub version: String,
    /// Their commit, with `-dirty` behind it if something is not committed.
    pub commit: String,
}

impl Host {
    /// This machine. What it does not tell is `unknown`.
    #[must_use]
    pub fn this() -> Self {
        let line = |file: &str, key: &str| {
            let text = fs::read_to_string(file).ok()?;
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let said = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments);
            let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output();
            let output = output.ok().filter(|output| output.status.success())?;
            Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
        };
        let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".to_owned());
        let kib = line("/proc/meminfo", "MemTotal");
        let kib = kib.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        Self {
            cpu: known(line("/proc/cpuinfo", "model name")),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib.unwrap_or_default() >> 10,
            kernel: known(release.map(|text| text.trim().to_owned())),
            kvm: ["kvm_intel", "kvm_amd", "kvm_pvm"]
                .into_iter()
                .filter(|module| Path::new("/sys/module").join(module).exists())
                .map(str::to_owned)
                .collect(),
            rustc: known(said("rustc", &["--version"])),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: known(said(
                "git",
                &["describe", "--always", "--dirty", "--abbrev=12"],
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_cpu_kernel_and_memory() {
        let host = Host::this();
        assert!(host.cpus >= 1);
        assert!(host.memory_mib > 100, "{host:?}");
        assert!(
            host.kernel.starts_with(|c: char| c.is_ascii_digit()),
            "{host:?}"
        );
        assert!(!host.commit.contains('\n'));
    }
}
