//! A Linux guest whose init uses every device that it finds: kernel and initial RAM disk are made by
//! `.ci/linux-guest DIR`, and `COLO_LINUX_GUEST` names that directory.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::guest::{self, Content};
use crate::qemu::{Machine, Qemu};

/// Where the guest is looked for.
pub const VARIABLE: &str = "COLO_LINUX_GUEST";

/// Length of each of its disks, bytes.
const DISK: u64 = 4 << 20;

/// The guest's kernel and initial RAM disk.
#[derive(Clone, Debug)]
pub struct Linux {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Linux {
    /// The guest that the environment names.
    ///
    /// # Errors
    /// What is missing.
    pub fn find() -> std::result::Result<Self, String> {
        let dir = env::var_os(VARIABLE).filter(|dir| !dir.is_empty());
        let dir = dir.ok_or_else(|| {
            format!("needs a Linux guest (.ci/linux-guest DIR), of which {VARIABLE} names the DIR")
        })?;
        let file = |name: &str| {
            let path = Path::new(&dir).join(name);
            path.is_file()
                .then_some(path)
                .ok_or_else(|| format!("needs {name} in the directory that {VARIABLE} names"))
        };
        Ok(Self {
            kernel: file("vmlinuz")?,
            initrd: file("initrd")?,
        })
    }

    /// A q35 for it with disks on virtio, AHCI and USB, networks on virtio and e1000, and a virtio
    /// serial port that writes to the file `port`. The disks are in `dir`, the same for every
    /// machine with that one.
    ///
    /// # Errors
    /// The file system's.
    pub fn machine(&self, dir: &Path, port: &Path) -> Result<Machine> {
        let disk = dir.join("disk");
        if !disk.exists() {
            guest::write_memory(&disk, DISK, Content::Random)?;
        }
        let path = |path: &Path| -> Result<String> {
            let text = path.to_str().filter(|text| !text.contains(','));
            Ok(text.ok_or("QEMU takes no such path")?.to_owned())
        };
        let drive = |id: &str| -> Result<String> {
            let disk = path(&disk)?;
            Ok(format!(
                "if=none,id={id},format=raw,snapshot=on,file={disk}"
            ))
        };
        let args = [
            ["-kernel".into(), path(&self.kernel)?],
            ["-initrd".into(), path(&self.initrd)?],
            ["-append".into(), "console=ttyS0 panic=-1".into()],
            ["-serial".into(), "stdio".into()],
            ["-drive".into(), drive("virtio")?],
            ["-device".into(), "virtio-blk-pci,drive=virtio".into()],
            ["-drive".into(), drive("ahci")?],
            ["-device".into(), "ide-hd,drive=ahci,bus=ide.0".into()],
            ["-device".into(), "qemu-xhci".into()],
            ["-drive".into(), drive("usb")?],
            ["-device".into(), "usb-storage,drive=usb".into()],
            ["-device".into(), "usb-tablet".into()],
            ["-netdev".into(), "user,id=net0,net=10.0.2.0/24".into()],
            [
                "-device".into(),
                "virtio-net-pci,netdev=net0,romfile=".into(),
            ],
            ["-netdev".into(), "user,id=net1,net=10.0.3.0/24".into()],
            ["-device".into(), "e1000,netdev=net1,romfile=".into()],
            ["-device".into(), "virtio-serial-pci".into()],
            [
                "-chardev".into(),
                format!("file,id=port,path={}", path(port)?),
            ],
            [
                "-device".into(),
                "virtserialport,chardev=port,name=port".into(),
            ],
        ];
        Ok(Machine::new("q35", 192).args(args.into_iter().flatten()))
    }
}

/// How often the guest's heart has beaten according to `output`, its serial line from the boot on.
///
/// # Errors
/// A beat is missing, or with one of them a device did not do as before.
pub fn beats(output: &[u8]) -> Result<u64> {
    let text = String::from_utf8_lossy(output);
    let mut beats = 0;
    // What is behind the last end of a line is not said in full.
    let lines = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    for line in lines.lines().map(str::trim_end) {
        let Some(beat) = line.strip_prefix("beat ") else {
            continue;
        };
        beats += 1;
        if beat != format!("{beats} lost:") {
            return Err(format!("'{line}' instead of beat {beats} without loss").into());
        }
    }
    Ok(beats)
}

/// As [`beats`], from what the guest wrote to its virtio serial ports, one file after the other.
///
/// # Errors
/// A beat is missing.
pub fn port_beats(ports: &[PathBuf]) -> Result<u64> {
    let mut text = String::new();
    for port in ports {
        text.push_str(&fs::read_to_string(port)?);
    }
    for (line, beat) in text.lines().zip(1..) {
        if line != format!("beat {beat}") {
            return Err(format!("'{line}' instead of beat {beat} on the virtio port").into());
        }
    }
    Ok(text.lines().count() as u64)
}

/// Waits for `wanted` beats in all of a guest that said `before` elsewhere.
///
/// # Errors
/// It does not come that far, or tells of an error.
pub fn wait_for_beats(before: &[u8], vm: &Qemu, wanted: u64) -> Result<()> {
    // Under TCG a kernel takes its time, which the wait for one thing is not made for.
    for line in ["Linux version", "Freeing unused kernel image", "eth1 is"] {
        let is_there = |b: &[u8]| {
            [before, b]
                .concat()
                .windows(line.len())
                .any(|w| w == line.as_bytes())
        };
        vm.process
            .stdout()
            .wait_for(line, |b| is_there(b).then_some(()))?;
    }
    vm.process.stdout().wait_for("beats", |b| {
        let heard = beats(&[before, b].concat());
        // An error is as good as what is waited for.
        heard.map_or(true, |heard| heard >= wanted).then_some(())
    })?;
    beats(&[before, &vm.process.stdout().bytes()].concat()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heart_is_heard_through_other_messages_and_only_if_nothing_is_lost() {
        let boot = "[0.0] Linux\r\neth0 is virtio_net\r\n";
        let heard = |text: &str| beats(format!("{boot}{text}").as_bytes());
        assert_eq!(heard("").unwrap(), 0);
        assert_eq!(
            heard("beat 1 lost:\r\nbeat 2 lost:\r\nbeat 3 lo").unwrap(),
            2
        );
        assert!(heard("beat 1 lost:\r\nbeat 3 lost:\r\n").is_err());
        let e = heard("beat 1 lost: eth1\r\n").unwrap_err();
        assert_eq!(
            e.to_string(),
            "'beat 1 lost: eth1' instead of beat 1 without loss"
        );
    }
}
