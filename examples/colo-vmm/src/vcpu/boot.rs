//! The registers a guest begins with.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

use crate::loader::LongModeTables;

/// Where and how the first vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootState {
    /// Real mode at `cs:ip`, all segments alike, DL = 0x80 (the first hard disk).
    Real {
        /// Code segment; its base is 16 times this.
        segment: u16,
        /// Offset in it.
        ip: u16,
    },
    /// 64-bit mode by the Linux boot protocol: RSI points to the zero page, the first GiB is
    /// mapped one to one.
    Long {
        /// Entry point.
        entry: GuestAddress,
        /// The zero page.
        zero_page: GuestAddress,
        /// GDT and page tables in guest memory.
        tables: LongModeTables,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 reads as one, always.
const RFLAGS_RESERVED: u64 = 2;
/// A BIOS leaves its stack below the boot sector.
const REAL_MODE_STACK: u64 = 0x7c00;
/// The drive number a BIOS passes for the first hard disk.
const FIRST_HARD_DISK: u64 = 0x80;

/// Puts a vCPU at power-on into `state`.
pub fn enter(fd: &VcpuFd, state: &BootState) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = fd.get_sregs()?;
    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    };
    match state {
        BootState::Real { segment, ip } => {
            sregs.cs.selector = *segment;
            sregs.cs.base = u64::from(*segment) << 4;
            regs.rip = u64::from(*ip);
            regs.rsp = REAL_MODE_STACK;
            regs.rdx = FIRST_HARD_DISK;
        }
        BootState::Long {
            entry,
            zero_page,
            tables,
        } => {
            sregs.cs = flat_segment(LongModeTables::CODE_SELECTOR, 0xb, true);
            let data = flat_segment(LongModeTables::DATA_SELECTOR, 0x3, false);
            (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
            sregs.gdt.base = tables.gdt.0;
            sregs.gdt.limit = LongModeTables::GDT_LIMIT;
            sregs.idt.base = 0;
            sregs.idt.limit = 0;
            sregs.cr3 = tables.page_map.0;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            regs.rip = entry.0;
            regs.rsi = zero_page.0;
        }
    }
    fd.set_sregs(&sregs)?;
    fd.set_regs(&regs)
}

const fn flat_segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: !code as u8,
        s: 1,
        l: code as u8,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
