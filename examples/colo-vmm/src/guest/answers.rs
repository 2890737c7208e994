//! A guest that answers: for what depends on what it has been told.
//!
//! Every byte that it receives on COM1 is a request: it becomes part of the guest's history. The
//! guest counts it, folds it into a digest of all requests so far, writes the count into one of
//! [`ANSWER_PAGES`] pages, the next in turn, and answers with count and digest, as eight hexadecimal
//! digits each with a space between and a line feed behind. [`ASK`] is no request: it is answered
//! with count and digest as they are, behind a copy of itself.
//!
//! The count is in a register, the digest in memory, and a page that does not hold what the guest
//! has last left there ends it: a mixture of two of its states is noticed.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::sector::{
    BOOT_SECTOR_BYTES, DEBUG_EXIT, SERIAL_DATA, SERIAL_LINE_STATUS, SectorError, assemble, output,
    segments,
};

/// The byte that asks for the present count and digest.
pub const ASK: u8 = b'?';
/// The pages that it writes to, one for each request; a power of two.
pub const ANSWER_PAGES: u32 = 256;

const FIRST_PAGE: u32 = 2 << 20;
const PAGE_SHIFT: i32 = 12;
/// The digest's address, on a page of its own.
const DIGEST: u32 = 1 << 20;
const FACTOR: i32 = 33;
const DATA_READY: i32 = 1;
/// Turns of an empty loop between two looks at the port.
const REST: u32 = 200;

/// The digest after one more request.
#[must_use]
pub const fn digest(before: u32, request: u8) -> u32 {
    before
        .wrapping_mul(FACTOR.cast_unsigned())
        .wrapping_add(request as u32)
}

/// The boot sector of the guest that answers.
///
/// # Errors
/// It cannot be assembled.
pub fn answers() -> Result<[u8; BOOT_SECTOR_BYTES], SectorError> {
    assemble(|at, _| protected_mode(at))
}

/// EBP: requests so far.
fn protected_mode(at: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut clear = a.create_label();
    let mut next = a.create_label();
    let mut rest = a.create_label();
    let mut poll = a.create_label();
    let mut seen = a.create_label();
    let mut request = a.create_label();
    let mut answer = a.create_label();
    let mut bad = a.create_label();
    let mut halt = a.create_label();
    let mut hex = a.create_label();
    let mut put = a.create_label();

    segments(&mut a)?;
    a.xor(ebp, ebp)?;
    a.mov(dword_ptr(DIGEST), ebp)?;
    // They have something in them if the machine was reset.
    a.mov(edi, FIRST_PAGE)?;
    a.set_label(&mut clear)?;
    a.mov(dword_ptr(edi), ebp)?;
    a.add(edi, 1 << PAGE_SHIFT)?;
    a.cmp(edi, FIRST_PAGE + (ANSWER_PAGES << PAGE_SHIFT))?;
    a.jb(clear)?;

    a.set_label(&mut next)?;
    a.mov(edx, SERIAL_LINE_STATUS)?;
    a.set_label(&mut poll)?;
    a.mov(ecx, REST)?;
    a.set_label(&mut rest)?;
    a.dec(ecx)?;
    a.jnz(rest)?;
    a.in_(al, dx)?;
    a.test(al, DATA_READY)?;
    a.jz(poll)?;
    a.mov(edx, SERIAL_DATA)?;
    a.in_(al, dx)?;
    a.cmp(al, i32::from(ASK))?;
    a.jne(request)?;
    a.call(put)?;
    a.jmp(answer)?;
    a.set_label(&mut request)?;

    a.and(eax, 0xff)?;
    a.imul_3(ebx, dword_ptr(DIGEST), FACTOR)?;
    a.add(ebx, eax)?;
    a.mov(dword_ptr(DIGEST), ebx)?;
    a.mov(edi, ebp)?;
    a.and(edi, ANSWER_PAGES - 1)?;
    a.shl(edi, PAGE_SHIFT)?;
    a.add(edi, FIRST_PAGE)?;
    a.inc(ebp)?;
    // What the page was given a round ago; nothing in the first.
    a.mov(eax, ebp)?;
    a.sub(eax, ANSWER_PAGES)?;
    a.ja(seen)?;
    a.xor(eax, eax)?;
    a.set_label(&mut seen)?;
    a.cmp(dword_ptr(edi), eax)?;
    a.jne(bad)?;
    a.mov(dword_ptr(edi), ebp)?;

    a.set_label(&mut answer)?;
    a.mov(eax, ebp)?;
    a.call(hex)?;
    a.mov(al, i32::from(b' '))?;
    a.call(put)?;
    a.mov(eax, dword_ptr(DIGEST))?;
    a.call(hex)?;
    a.mov(al, i32::from(b'\n'))?;
    a.call(put)?;
    a.jmp(next)?;

    a.set_label(&mut bad)?;
    a.mov(al, i32::from(b'E'))?;
    a.call(put)?;
    a.mov(al, 1)?;
    a.out(DEBUG_EXIT, al)?;
    a.set_label(&mut halt)?;
    a.hlt()?;
    a.jmp(halt)?;

    output(&mut a, &mut hex, &mut put)?;
    a.assemble(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_in_a_boot_sector() {
        assert_eq!(answers().unwrap()[510..], [0x55, 0xaa]);
    }
}
