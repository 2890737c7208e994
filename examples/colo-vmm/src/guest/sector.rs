//! What guests of one boot sector have in common: the way into protected mode, and words on the
//! serial line.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Where a BIOS loads a boot sector, and where it runs.
pub const BOOT_SECTOR_ADDRESS: u16 = 0x7c00;
/// Its size, with the signature 55 aa at the end.
pub const BOOT_SECTOR_BYTES: usize = 512;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u32 = 0x10;
/// Flat 4 GiB segments: null, code, data.
const GDT: [u64; 3] = [0, 0x00cf_9a00_0000_ffff, 0x00cf_9200_0000_ffff];

pub(super) const SERIAL_DATA: u32 = 0x3f8;
pub(super) const SERIAL_LINE_STATUS: u32 = 0x3fd;
const TRANSMITTER_EMPTY: i32 = 0x20;
pub(super) const DEBUG_EXIT: i32 = 0xf4;
const FAST_A20: i32 = 0x92;

/// Why there is no such boot sector.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SectorError {
    /// The assembler refused.
    #[error("the guest cannot be assembled")]
    Assemble(#[from] IcedError),
    /// The code has outgrown the sector.
    #[error("the guest takes {bytes} bytes, a boot sector has room for 510")]
    TooLong {
        /// How many bytes it takes.
        bytes: usize,
    },
}

/// A boot sector that goes over to protected mode, where it runs the code that `protected_mode` gives
/// for its own address and that of a word of zero behind the code. Its length must not depend on
/// either.
pub(super) fn assemble(
    protected_mode: impl Fn(u64, u64) -> Result<Vec<u8>, IcedError>,
) -> Result<[u8; BOOT_SECTOR_BYTES], SectorError> {
    let base = u64::from(BOOT_SECTOR_ADDRESS);

    // The lengths of the parts do not depend on the addresses in them: assemble the first once to
    // learn where the second begins, and so on.
    let real_length = real_mode(0, 0)?.len();
    let protected_at = base + real_length as u64;
    let protected_length = protected_mode(protected_at, 0)?.len();
    let gdt_at = (protected_at + protected_length as u64).next_multiple_of(8);
    let gdtr_at = gdt_at + size_of_val(&GDT) as u64;
    let word_at = gdtr_at + 8;

    let mut code = real_mode(protected_at, gdtr_at)?;
    code.extend(protected_mode(protected_at, word_at)?);
    code.resize(to_index(gdt_at - base), 0);
    code.extend(GDT.iter().flat_map(|entry| entry.to_le_bytes()));
    let limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(u16::MAX);
    code.extend(limit.to_le_bytes());
    code.extend(low(gdt_at).to_le_bytes());
    code.resize(to_index(word_at - base), 0);
    code.extend(0u32.to_le_bytes());

    let mut sector = [0; BOOT_SECTOR_BYTES];
    let room = &mut sector[..BOOT_SECTOR_BYTES - 2];
    match room.get_mut(..code.len()) {
        Some(room) => room.copy_from_slice(&code),
        None => return Err(SectorError::TooLong { bytes: code.len() }),
    }
    sector[BOOT_SECTOR_BYTES - 2..].copy_from_slice(&[0x55, 0xaa]);
    Ok(sector)
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn to_index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// A BIOS starts the first CPU here; others are sent here by the first.
fn real_mode(protected_at: u64, gdtr_at: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.cld()?;
    a.xor(eax, eax)?;
    a.mov(ds, eax)?;
    // A20 on; bit 0 would reset the machine.
    a.in_(al, FAST_A20)?;
    a.or(al, 2)?;
    a.and(al, 0xfe)?;
    a.out(FAST_A20, al)?;
    // lgdt [gdtr], with a 32-bit base and a 16-bit address.
    a.db(&[0x66, 0x0f, 0x01, 0x16])?;
    a.db(&low16(gdtr_at).to_le_bytes())?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    // jmp CODE_SELECTOR:protected_at
    a.db(&[0xea])?;
    a.db(&low16(protected_at).to_le_bytes())?;
    a.db(&CODE_SELECTOR.to_le_bytes())?;
    a.assemble(BOOT_SECTOR_ADDRESS.into())
}

fn low16(address: u64) -> u16 {
    u16::try_from(address).unwrap_or(u16::MAX)
}

/// The first of the code in protected mode: flat segments, and a stack below the sector.
pub(super) fn segments(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(eax, DATA_SELECTOR)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(esp, u32::from(BOOT_SECTOR_ADDRESS))
}

/// Two routines: `hex` prints EAX as eight digits and destroys ECX and EDX as well, `put` prints AL
/// and destroys AH and EDX.
pub(super) fn output(
    a: &mut CodeAssembler,
    hex: &mut CodeLabel,
    put: &mut CodeLabel,
) -> Result<(), IcedError> {
    let mut digit = a.create_label();
    let mut decimal = a.create_label();
    let mut wait = a.create_label();
    a.set_label(hex)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut digit)?;
    a.rol(eax, 4)?;
    a.push(eax)?;
    a.and(al, 0xf)?;
    a.cmp(al, 10)?;
    a.jb(decimal)?;
    a.add(al, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut decimal)?;
    a.add(al, i32::from(b'0'))?;
    a.call(*put)?;
    a.pop(eax)?;
    a.dec(ecx)?;
    a.jnz(digit)?;
    a.ret()?;

    a.set_label(put)?;
    a.mov(ah, al)?;
    a.mov(edx, SERIAL_LINE_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, TRANSMITTER_EMPTY)?;
    a.jz(wait)?;
    a.mov(al, ah)?;
    a.mov(edx, SERIAL_DATA)?;
    a.out(dx, al)?;
    a.ret()
}
