//! A guest in 512 bytes.
//!
//! It enters 32-bit protected mode without paging and works on a region of pages for ever. One
//! *pass* visits every page of the region once: checks that its first word holds what the last
//! pass left there, and adds one to it. After each pass the first CPU prints the number of passes
//! so far on COM1, as eight hexadecimal digits and a line feed. After pass *p* the word at address
//! *a* is *a + p*, so a page that is lost, stale or misplaced is noticed in the next pass. The guest
//! then prints `E`, the page's address, what it found and what it expected, and writes 1 to the
//! debug-exit port.
//!
//! With more CPUs the first starts the others by INIT and SIPI. Each works on a region of its
//! own, one after the other; only the first prints.
//!
//! The sector runs wherever a PC's BIOS would run it: in this VMM, and in QEMU with
//! `-drive if=ide,format=raw,snapshot=on,file=FILE`. It uses plain integer instructions only.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::sector::{
    BOOT_SECTOR_ADDRESS, BOOT_SECTOR_BYTES, DEBUG_EXIT, SectorError, assemble, output, segments,
};

const PAGE: u32 = 4096;
/// Pages that one turn of the loop of a pass visits.
const GROUP: u32 = 4;
/// RAM ends here for a guest that looks no further than 4 GiB.
const HOLE_START: u64 = crate::memory::HOLE_START;

/// Stacks grow down from the boot sector, this much for each CPU.
const STACK_SHIFT: i32 = 8;

const APIC_SPURIOUS: u64 = 0xfee0_00f0;
const APIC_ICR_LOW: u64 = 0xfee0_0300;
const APIC_ENABLE: u32 = 0x1ff;
const INIT_ALL_BUT_SELF: u32 = 0x000c_4500;
/// The vector is the page at which the others begin, in real mode.
const SIPI_ALL_BUT_SELF: u32 = 0x000c_4600 | (TRAMPOLINE >> 12);
/// Holds a far jump to the boot sector, which does not begin on a page.
const TRAMPOLINE: u32 = 0x8000;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkloadConfig {
    /// RAM of the machine it runs on, MiB: the regions end with it.
    pub memory_mib: u64,
    /// Pages each CPU dirties in a pass; fewer if RAM does not have as many.
    pub dirty_pages: u32,
    /// Where the first region begins; a multiple of the page size, beyond the first MiB.
    pub start: u32,
    /// How often each CPU turns in an empty loop after a pass, to bound the rate of passes.
    pub pass_delay: u32,
    /// How many CPUs take part.
    pub cpus: u8,
    /// Whether the first CPU writes to every page of RAM from `start` on before its first pass, as a
    /// guest that has run for a while has.
    pub fills_ram: bool,
}

impl Default for WorkloadConfig {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            dirty_pages: 256,
            start: 2 << 20,
            pass_delay: 0,
            cpus: 1,
            fills_ram: false,
        }
    }
}

/// Where the workload works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address of the first CPU's region; the others follow.
    pub start: u32,
    /// Pages of each CPU's region.
    pub pages: u32,
}

impl Region {
    /// Length of each CPU's region, bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        self.pages * PAGE
    }
}

/// Why there is no such guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// The start is not where pages of the guest's can be.
    #[error("the dirtied region begins at {start:#x}, expected a whole page from 1 MiB on")]
    Start {
        /// The start asked for.
        start: u32,
    },
    /// Not a page for each CPU.
    #[error(
        "no room for {cpus} regions of {dirty_pages} pages from {start:#x} in {memory_mib} MiB"
    )]
    NoRoom {
        /// CPUs, each with a region.
        cpus: u8,
        /// Pages asked for.
        dirty_pages: u32,
        /// Where the first region begins.
        start: u32,
        /// Size of RAM, MiB.
        memory_mib: u64,
    },
    /// There is no boot sector that does this.
    #[error(transparent)]
    Sector(#[from] SectorError),
}

impl WorkloadConfig {
    /// Where the guest works, after clamping to RAM.
    ///
    /// # Errors
    /// There is no room for even one page for each CPU.
    pub fn region(&self) -> Result<Region, WorkloadError> {
        if !self.start.is_multiple_of(PAGE) || self.start < 1 << 20 {
            return Err(WorkloadError::Start { start: self.start });
        }
        let room = self.ram_end().saturating_sub(self.start.into())
            / u64::from(PAGE)
            / u64::from(self.cpus).max(1);
        let pages = u32::try_from(room)
            .unwrap_or(u32::MAX)
            .min(self.dirty_pages);
        if pages == 0 || self.cpus == 0 {
            return Err(WorkloadError::NoRoom {
                cpus: self.cpus,
                dirty_pages: self.dirty_pages,
                start: self.start,
                memory_mib: self.memory_mib,
            });
        }
        Ok(Region {
            start: self.start,
            pages,
        })
    }

    /// Where RAM ends, as far as the guest looks.
    fn ram_end(&self) -> u64 {
        self.memory_mib.saturating_mul(1 << 20).min(HOLE_START)
    }
}

/// The boot sector of a guest that does what `config` says.
///
/// # Errors
/// The configuration makes no sense for its RAM.
pub fn workload(config: &WorkloadConfig) -> Result<[u8; BOOT_SECTOR_BYTES], WorkloadError> {
    let region = config.region()?;
    let sector = assemble(|at, cpu_count_at| protected_mode(config, region, at, cpu_count_at))?;
    Ok(sector)
}

/// EBX: number of this CPU; EBP: passes so far; `[esp]`: start of this CPU's region.
fn protected_mode(
    config: &WorkloadConfig,
    region: Region,
    at: u64,
    cpu_count_at: u64,
) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut init_page = a.create_label();
    let mut pass = a.create_label();
    let mut group = a.create_label();
    let mut middle = a.create_label();
    let mut after_print = a.create_label();
    let mut delay = a.create_label();
    let mut bad = a.create_label();
    let mut halt = a.create_label();
    let mut hex = a.create_label();
    let mut put = a.create_label();
    let mut others = a.create_label();

    segments(&mut a)?;
    if config.cpus > 1 {
        // Numbers go by order of arrival. The first starts the others.
        a.mov(ebx, 1)?;
        a.lock().xadd(dword_ptr(cpu_count_at), ebx)?;
        a.test(ebx, ebx)?;
        a.jnz(others)?;
        fill(&mut a, config)?;
        a.mov(dword_ptr(TRAMPOLINE), trampoline())?;
        a.mov(byte_ptr(TRAMPOLINE + 4), 0)?;
        a.mov(dword_ptr(APIC_SPURIOUS), APIC_ENABLE)?;
        a.mov(dword_ptr(APIC_ICR_LOW), INIT_ALL_BUT_SELF)?;
        a.mov(dword_ptr(APIC_ICR_LOW), SIPI_ALL_BUT_SELF)?;
        a.set_label(&mut others)?;
        a.mov(eax, ebx)?;
        a.shl(eax, STACK_SHIFT)?;
        a.sub(esp, eax)?;
        a.imul_3(eax, ebx, region.bytes())?;
        a.add(eax, region.start)?;
    } else {
        fill(&mut a, config)?;
        a.xor(ebx, ebx)?;
        a.mov(eax, region.start)?;
    }
    a.push(eax)?;

    // Pass zero: every page holds its own address.
    a.mov(edi, eax)?;
    a.lea(esi, dword_ptr(edi + region.bytes()))?;
    a.xor(ebp, ebp)?;
    a.set_label(&mut init_page)?;
    a.mov(dword_ptr(edi), edi)?;
    a.add(edi, PAGE)?;
    a.cmp(edi, esi)?;
    a.jb(init_page)?;

    // A group of pages at a time: where the guest's kernel is emulated every instruction counts.
    // What does not fill a group comes first, by way of a jump into its middle.
    let skipped = region.pages.next_multiple_of(GROUP) - region.pages;
    a.set_label(&mut pass)?;
    a.mov(edi, dword_ptr(esp))?;
    if skipped > 0 {
        a.sub(edi, skipped * PAGE)?;
        a.jmp(middle)?;
    }
    a.set_label(&mut group)?;
    for i in 0..GROUP {
        if i == skipped && i > 0 {
            a.set_label(&mut middle)?;
        }
        a.lea(eax, dword_ptr(edi + ebp + i * PAGE))?;
        a.cmp(dword_ptr(edi + i * PAGE), eax)?;
        a.jne(bad)?;
        a.inc(dword_ptr(edi + i * PAGE))?;
    }
    a.add(edi, GROUP * PAGE)?;
    a.cmp(edi, esi)?;
    a.jb(group)?;
    a.inc(ebp)?;
    a.test(ebx, ebx)?;
    a.jnz(after_print)?;
    a.mov(eax, ebp)?;
    a.call(hex)?;
    a.mov(al, i32::from(b'\n'))?;
    a.call(put)?;
    a.set_label(&mut after_print)?;
    if config.pass_delay > 0 {
        a.mov(ecx, config.pass_delay)?;
        a.set_label(&mut delay)?;
        a.dec(ecx)?;
        a.jnz(delay)?;
    }
    a.jmp(pass)?;

    a.set_label(&mut bad)?;
    a.push(eax)?;
    a.mov(al, i32::from(b'E'))?;
    a.call(put)?;
    a.mov(eax, dword_ptr(esp))?;
    a.sub(eax, ebp)?;
    a.mov(edi, eax)?;
    a.call(hex)?;
    a.mov(al, i32::from(b' '))?;
    a.call(put)?;
    a.mov(eax, dword_ptr(edi))?;
    a.call(hex)?;
    a.mov(al, i32::from(b' '))?;
    a.call(put)?;
    a.pop(eax)?;
    a.call(hex)?;
    a.mov(al, i32::from(b'\n'))?;
    a.call(put)?;
    a.mov(al, 1)?;
    a.out(DEBUG_EXIT, al)?;
    a.set_label(&mut halt)?;
    a.hlt()?;
    a.jmp(halt)?;

    output(&mut a, &mut hex, &mut put)?;
    a.assemble(at)
}

/// Writes its address to every page of RAM. Destroys EDI.
fn fill(a: &mut CodeAssembler, config: &WorkloadConfig) -> Result<(), IcedError> {
    if config.fills_ram {
        let end = u32::try_from(config.ram_end()).unwrap_or(u32::MAX);
        let mut page = a.create_label();
        a.mov(edi, config.start)?;
        a.set_label(&mut page)?;
        a.mov(dword_ptr(edi), edi)?;
        a.add(edi, PAGE)?;
        a.cmp(edi, end)?;
        a.jb(page)?;
    }
    Ok(())
}

/// The first four bytes of `jmp 0:BOOT_SECTOR_ADDRESS`; the fifth is zero.
const fn trampoline() -> u32 {
    let [low, high] = BOOT_SECTOR_ADDRESS.to_le_bytes();
    u32::from_le_bytes([0xea, low, high, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_fits_in_a_boot_sector() {
        for (cpus, memory_mib) in [(1, 1 << 20), (2, 1 << 20), (8, 1 << 20), (1, 3), (7, 5)] {
            for (pass_delay, fills_ram) in [(0, true), (u32::MAX, false), (u32::MAX, true)] {
                let sector = workload(&WorkloadConfig {
                    cpus,
                    pass_delay,
                    fills_ram,
                    dirty_pages: u32::MAX,
                    memory_mib,
                    ..WorkloadConfig::default()
                })
                .unwrap();
                assert_eq!(sector[510..], [0x55, 0xaa]);
            }
        }
    }

    #[test]
    fn regions_end_with_ram() {
        let config = WorkloadConfig {
            memory_mib: 8,
            dirty_pages: 10_000,
            cpus: 2,
            ..WorkloadConfig::default()
        };
        let region = config.region().unwrap();
        assert_eq!(region.pages, 3 * 256);
        let none = WorkloadConfig {
            memory_mib: 2,
            ..config
        };
        assert!(matches!(none.region(), Err(WorkloadError::NoRoom { .. })));
        let odd = WorkloadConfig {
            start: (2 << 20) + 1,
            ..config
        };
        assert!(matches!(odd.region(), Err(WorkloadError::Start { .. })));
    }
}
