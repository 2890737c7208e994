//! A Linux kernel by the 64-bit boot protocol.
//!
//! The kernel finds the zero page (with the memory map, the command line and the initial RAM
//! disk), a GDT, and page tables that map the first GiB. There is no firmware: no ACPI, no
//! MP table, so it sees one CPU and finds the interrupt controllers at their customary places.
//!
//! ```text
//! 0x500       GDT
//! 0x7000      zero page
//! 0x9000      page tables: PML4, PDPT, PD
//! 0x2_0000    command line
//! 0x10_0000   kernel
//! top         initial RAM disk, page aligned, below 3 GiB
//! ```

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, Error as ElfError};
use linux_loader::loader::{Error as LoaderError, KernelLoader, load_cmdline};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{LoadError, length, read};
use crate::memory::Memory;
use crate::vcpu::BootState;

const GDT: GuestAddress = GuestAddress(0x500);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// Conventional memory ends here: above it is what firmware would use.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const CMDLINE_CAPACITY: usize = 2048;
const PAGE: u64 = 4096;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const XLF_KERNEL_64: u16 = 1;
/// A bzImage's 64-bit entry point, from its start in memory.
const ENTRY_64: u64 = 0x200;
const E820_RAM: u32 = 1;

const PRESENT_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

/// The descriptor and page tables that the kernel enters with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongModeTables {
    /// The global descriptor table.
    pub gdt: GuestAddress,
    /// The PML4.
    pub page_map: GuestAddress,
}

impl LongModeTables {
    /// The boot protocol's `__BOOT_CS`.
    pub const CODE_SELECTOR: u16 = 0x10;
    /// The boot protocol's `__BOOT_DS`.
    pub const DATA_SELECTOR: u16 = 0x18;
    /// Limit of the GDT, bytes less one.
    pub const GDT_LIMIT: u16 = 4 * 8 - 1;

    const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

    fn write(memory: &Memory) -> Result<Self, LoadError> {
        let put = |value: u64, at: GuestAddress| {
            memory
                .guest()
                .write_obj(value, at)
                .map_err(|source| LoadError::Write {
                    what: "the boot tables",
                    source,
                })
        };
        for (at, descriptor) in (GDT.0..).step_by(8).zip(Self::DESCRIPTORS) {
            put(descriptor, GuestAddress(at))?;
        }
        put(PDPT.0 | PRESENT_WRITABLE, PML4)?;
        put(PAGE_DIRECTORY.0 | PRESENT_WRITABLE, PDPT)?;
        for i in 0..512 {
            put(
                (i << 21) | HUGE | PRESENT_WRITABLE,
                PAGE_DIRECTORY.unchecked_add(i * 8),
            )?;
        }
        Ok(Self {
            gdt: GDT,
            page_map: PML4,
        })
    }
}

pub fn load(
    file: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
    memory: &Memory,
) -> Result<BootState, LoadError> {
    let mut image = File::open(file).map_err(|source| LoadError::Read {
        file: file.to_owned(),
        source,
    })?;
    let broken = |source| LoadError::Kernel {
        file: file.to_owned(),
        source,
    };
    let guest = memory.guest();
    let mut params = boot_params::default();

    let (loaded, entry) = match Elf::load(guest, None, &mut image, Some(HIGH_MEMORY)) {
        Ok(loaded) => (loaded, loaded.kernel_load),
        Err(LoaderError::Elf(ElfError::InvalidElfMagicNumber)) => {
            image
                .seek(SeekFrom::Start(0))
                .map_err(|source| LoadError::Read {
                    file: file.to_owned(),
                    source,
                })?;
            let loaded =
                BzImage::load(guest, None, &mut image, Some(HIGH_MEMORY)).map_err(broken)?;
            if let Some(header) = loaded.setup_header {
                params.hdr = header;
            }
            if params.hdr.xloadflags & XLF_KERNEL_64 == 0 {
                return Err(LoadError::Not64Bit {
                    file: file.to_owned(),
                });
            }
            (loaded, loaded.kernel_load.unchecked_add(ENTRY_64))
        }
        Err(source) => return Err(broken(source)),
    };

    // A bzImage has filled in some of these; an ELF kernel none.
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    if params.hdr.kernel_alignment == 0 {
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }

    let mut line =
        Cmdline::new(CMDLINE_CAPACITY).map_err(|reason| LoadError::Cmdline { reason })?;
    line.insert_str(cmdline)
        .map_err(|reason| LoadError::Cmdline { reason })?;
    load_cmdline(guest, CMDLINE, &line).map_err(broken)?;
    params.hdr.cmd_line_ptr = low(CMDLINE.0);
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);

    if let Some(initrd) = initrd {
        let (at, size) = load_initrd(initrd, loaded.kernel_end, memory)?;
        params.hdr.ramdisk_image = low(at);
        params.hdr.ramdisk_size = low(size);
    }

    let mut entries = vec![(0, LOW_MEMORY_END)];
    for region in memory.regions() {
        let start = region.base.0.max(HIGH_MEMORY.0);
        let end = region.base.0 + region.mapping.size() as u64;
        entries.push((start, end.saturating_sub(start)));
    }
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: E820_RAM,
        };
    }
    params.e820_entries = u8::try_from(entries.len()).unwrap_or(u8::MAX);

    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, ZERO_PAGE), guest).map_err(
        |_| LoadError::NoRoom {
            what: "the zero page",
            bytes: PAGE,
        },
    )?;
    Ok(BootState::Long {
        entry,
        zero_page: ZERO_PAGE,
        tables: LongModeTables::write(memory)?,
    })
}

/// At the top of what the boot protocol lets a kernel look for it.
fn load_initrd(file: &Path, kernel_end: u64, memory: &Memory) -> Result<(u64, u64), LoadError> {
    let size = length(file)?;
    let no_room = || LoadError::NoRoom {
        what: "the initial ram disk",
        bytes: size,
    };
    let top = memory
        .regions()
        .first()
        .map_or(0, |region| region.mapping.size() as u64);
    let at = top
        .checked_sub(size)
        .map(|at| at & !(PAGE - 1))
        .filter(|at| *at >= kernel_end.max(HIGH_MEMORY.0))
        .ok_or_else(no_room)?;
    let bytes = read(file, size)?;
    memory
        .guest()
        .write_slice(&bytes, GuestAddress(at))
        .map_err(|source| LoadError::Write {
            what: "the initial ram disk",
            source,
        })?;
    Ok((at, bytes.len() as u64))
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}
