//! Putting a guest into RAM.

mod kernel;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use migration_stream::PAGE_SIZE;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

pub use kernel::LongModeTables;

use crate::guest::{
    BOOT_SECTOR_ADDRESS, BOOT_SECTOR_BYTES, SectorError, WorkloadConfig, WorkloadError, answers,
    workload,
};
use crate::machine::GuestImage;
use crate::memory::{HOLE_END, Memory};
use crate::vcpu::BootState;

/// The end of what real mode reaches by segments.
const REAL_MODE_END: u64 = 1 << 20;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be read.
    #[error("cannot read {}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a boot sector.
    #[error("{} is no boot sector: {what}", .file.display())]
    NotBootSector {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A flat binary that real mode cannot enter.
    #[error("a flat binary at {address:#x}: expected a multiple of 16 below 1 MiB")]
    FlatAddress {
        /// The address asked for.
        address: u64,
    },
    /// Something does not fit where it has to go.
    #[error("{what} of {bytes} bytes does not fit in guest memory")]
    NoRoom {
        /// What.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// Guest memory does not take it.
    #[error("{what} cannot be written to guest memory")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// Neither an ELF nor a bzImage kernel, or a broken one.
    #[error("{} cannot be loaded as a kernel", .file.display())]
    Kernel {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error("{} has no 64-bit entry point", .file.display())]
    Not64Bit {
        /// The file.
        file: PathBuf,
    },
    /// The command line is not one.
    #[error("the kernel's command line cannot be used: {reason}")]
    Cmdline {
        /// Why.
        reason: linux_loader::cmdline::Error,
    },
    /// The built-in guest could not be made.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The one that answers could not be made.
    #[error(transparent)]
    Answers(#[from] SectorError),
}

/// Loads `image`, and says how the first vCPU is to enter it.
///
/// # Errors
/// See [`LoadError`].
pub fn load(image: &GuestImage, memory: &Memory) -> Result<BootState, LoadError> {
    match image {
        GuestImage::Workload(config) => {
            let config = fitted(config, memory);
            let sector = workload(&config)?;
            if config.fills_ram {
                fill_above_the_hole(memory)?;
            }
            boot_sector(&sector, memory)
        }
        GuestImage::Answers => boot_sector(&answers()?, memory),
        GuestImage::BootSector(file) => {
            let sector = read(file, BOOT_SECTOR_BYTES as u64)?;
            let not = |what| LoadError::NotBootSector {
                file: file.clone(),
                what,
            };
            if sector.len() < BOOT_SECTOR_BYTES {
                return Err(not("shorter than 512 bytes"));
            }
            if !sector.ends_with(&[0x55, 0xaa]) {
                return Err(not("its first 512 bytes do not end in 55 aa"));
            }
            boot_sector(&sector, memory)
        }
        GuestImage::Flat { file, address } => flat(file, *address, memory),
        GuestImage::Kernel {
            file,
            initrd,
            cmdline,
        } => kernel::load(file, initrd.as_deref(), cmdline, memory),
    }
}

/// `config` for a machine with this much RAM.
pub(crate) fn fitted(config: &WorkloadConfig, memory: &Memory) -> WorkloadConfig {
    WorkloadConfig {
        memory_mib: config.memory_mib.min(memory.bytes() >> 20),
        ..*config
    }
}

/// Writes its address to every page above 4 GiB, as the workload does to those below: it has no way
/// to get there.
fn fill_above_the_hole(memory: &Memory) -> Result<(), LoadError> {
    for region in memory.regions().iter().filter(|r| r.base.0 >= HOLE_END) {
        let pages = region.mapping.size() as u64 / PAGE_SIZE;
        for page in 0..pages {
            let address = region.base.unchecked_add(page * PAGE_SIZE);
            memory
                .guest()
                .write_obj(address.0, address)
                .map_err(|source| LoadError::Write {
                    what: "what fills ram",
                    source,
                })?;
        }
    }
    Ok(())
}

fn boot_sector(sector: &[u8], memory: &Memory) -> Result<BootState, LoadError> {
    write(
        "the boot sector",
        sector,
        BOOT_SECTOR_ADDRESS.into(),
        memory,
    )?;
    Ok(BootState::Real {
        segment: 0,
        ip: BOOT_SECTOR_ADDRESS,
    })
}

fn flat(file: &Path, address: u64, memory: &Memory) -> Result<BootState, LoadError> {
    let segment = u16::try_from(address >> 4)
        .ok()
        .filter(|_| address < REAL_MODE_END && address.is_multiple_of(16))
        .ok_or(LoadError::FlatAddress { address })?;
    let code = read(file, memory.bytes())?;
    write("the flat binary", &code, address, memory)?;
    Ok(BootState::Real { segment, ip: 0 })
}

fn write(what: &'static str, bytes: &[u8], address: u64, memory: &Memory) -> Result<(), LoadError> {
    memory
        .guest()
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| LoadError::Write { what, source })
}

/// The first `limit` bytes of a file.
fn read(file: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(file)?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|source| LoadError::Read {
        file: file.to_owned(),
        source,
    })
}

fn length(file: &Path) -> Result<u64, LoadError> {
    fs::metadata(file)
        .map(|metadata| metadata.len())
        .map_err(|source| LoadError::Read {
            file: file.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn memory() -> Memory {
        Memory::new(64 << 20).unwrap()
    }

    #[test]
    fn a_boot_sector_needs_its_signature() {
        let image = |bytes: &[u8]| {
            let file = file(bytes);
            load(&GuestImage::BootSector(file.path().into()), &memory())
        };
        let mut sector = vec![0x90; 2048];
        assert!(matches!(
            image(&sector),
            Err(LoadError::NotBootSector { .. })
        ));
        assert!(matches!(
            image(&sector[..100]),
            Err(LoadError::NotBootSector { .. })
        ));
        sector[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(
            image(&sector).unwrap(),
            BootState::Real {
                segment: 0,
                ip: 0x7c00
            }
        );
    }

    #[test]
    fn ram_that_the_workload_does_not_reach_is_filled_for_it() {
        let memory = Memory::new((3 << 30) + (1 << 20)).unwrap();
        let config = WorkloadConfig {
            memory_mib: memory.bytes() >> 20,
            ..WorkloadConfig::default()
        };
        let words = || {
            (0..256)
                .map(|page| GuestAddress(HOLE_END + page * PAGE_SIZE))
                .map(|address| {
                    let word: u64 = memory.guest().read_obj(address).unwrap();
                    (address.0, word)
                })
        };
        load(&GuestImage::Workload(config), &memory).unwrap();
        assert!(words().all(|(_, word)| word == 0));
        let fills_ram = true;
        let config = WorkloadConfig {
            fills_ram,
            ..config
        };
        load(&GuestImage::Workload(config), &memory).unwrap();
        assert!(words().all(|(address, word)| word == address));
    }

    #[test]
    fn a_flat_binary_runs_where_it_was_put() {
        let memory = memory();
        let file = file(b"\xf4abc");
        let image = |address| GuestImage::Flat {
            file: file.path().into(),
            address,
        };
        assert_eq!(
            load(&image(0x1_0000), &memory).unwrap(),
            BootState::Real {
                segment: 0x1000,
                ip: 0
            }
        );
        let mut seen = [0; 4];
        memory
            .guest()
            .read_slice(&mut seen, GuestAddress(0x1_0000))
            .unwrap();
        assert_eq!(&seen, b"\xf4abc");
        for bad in [0x1_0008, 1 << 20] {
            assert!(matches!(
                load(&image(bad), &memory),
                Err(LoadError::FlatAddress { .. })
            ));
        }
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused() {
        let file = file(&[0; 4096]);
        let image = GuestImage::Kernel {
            file: file.path().into(),
            initrd: None,
            cmdline: String::new(),
        };
        assert!(matches!(
            load(&image, &memory()),
            Err(LoadError::Kernel { .. })
        ));
    }
}
