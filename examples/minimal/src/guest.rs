//! The guest: counts, writes the count to 64 pages in turn, and says it on the serial line.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where the guest begins, in real mode.
pub const ENTRY: u16 = 0x1000;
/// Where the count is.
const COUNT: u32 = 0x800;
/// The data register of the first serial port.
pub const SERIAL: u16 = 0x3f8;

/// Returns the guest's code.
pub fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let mut next = a.create_label();
    let mut digit = a.create_label();
    let mut decimal = a.create_label();
    let mut rest = a.create_label();
    a.set_label(&mut next)?;
    a.inc(dword_ptr(COUNT))?;
    a.mov(esi, dword_ptr(COUNT))?;
    // A page of the 64 that begin at 64 KiB: in real mode a segment is 16 bytes.
    a.mov(ax, si)?;
    a.and(ax, 63)?;
    a.shl(ax, 8)?;
    a.add(ax, 0x1000)?;
    a.mov(es, ax)?;
    a.mov(dword_ptr(0).es(), esi)?;
    // Eight digits and a line feed.
    a.mov(dx, u32::from(SERIAL))?;
    a.mov(cx, 8)?;
    a.set_label(&mut digit)?;
    a.rol(esi, 4)?;
    a.mov(eax, esi)?;
    a.and(al, 0xf)?;
    a.cmp(al, 10)?;
    a.jb(decimal)?;
    a.add(al, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut decimal)?;
    a.add(al, i32::from(b'0'))?;
    a.out(dx, al)?;
    a.dec(cx)?;
    a.jnz(digit)?;
    a.mov(al, i32::from(b'\n'))?;
    a.out(dx, al)?;
    a.mov(ecx, 2000)?;
    a.set_label(&mut rest)?;
    a.dec(ecx)?;
    a.jnz(rest)?;
    a.jmp(next)?;
    a.assemble(ENTRY.into())
}
