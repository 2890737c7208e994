//! Guests with known memory: prepared content, a boot sector that dirties pages at full speed, and
//! the comparison of two memories.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::Result;

/// The page size of an x86 guest, bytes.
pub const PAGE_SIZE: usize = 4096;

/// What a page of prepared memory holds. A guest that has run for a while is a mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zero.
    Zero,
    /// Bytes that no compression makes smaller.
    Random,
    /// In every hundred pages 42 of zeros, 29 random ones, and 29 that repeat a few words.
    Mixed,
}

/// Writes `length` bytes of content to a file, the same ones each time.
///
/// # Errors
/// The file system's.
pub fn write_memory(path: &Path, length: u64, content: Content) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut random = Random::new(0x5eed);
    let mut page = [0; PAGE_SIZE];
    for index in 0..length / PAGE_SIZE as u64 {
        fill_page(&mut page, index, content, &mut random);
        file.write_all(&page)?;
    }
    file.flush()?;
    file.get_ref().set_len(length)?;
    Ok(())
}

fn fill_page(page: &mut [u8; PAGE_SIZE], index: u64, content: Content, random: &mut Random) {
    let kind = match content {
        Content::Mixed => match index % 100 {
            0..42 => Content::Zero,
            42..71 => Content::Random,
            _ => Content::Mixed,
        },
        pure => pure,
    };
    match kind {
        Content::Zero => page.fill(0),
        Content::Random => {
            for word in page.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        }
        Content::Mixed => {
            for (i, word) in page.chunks_exact_mut(8).enumerate() {
                let value = (index << 16) + (i as u64 % 16);
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// Marsaglia's xorshift64: fast, and the same everywhere.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    const fn new(seed: u64) -> Self {
        Self(seed)
    }

    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A boot sector whose guest goes round a region for ever: it increments the first byte of each
/// page and then writes its count of rounds, one byte, to the serial port.
#[derive(Clone, Copy, Debug)]
pub struct Dirtier {
    /// Guest physical address of the first page; at least 1 MiB, beyond what firmware uses.
    pub start: u32,
    /// Number of pages.
    pub pages: u32,
}

/// Where firmware loads a boot sector.
const BOOT_ADDRESS: u16 = 0x7c00;

impl Dirtier {
    /// Writes a disk with the boot sector on it, for [`crate::qemu::Machine::boot`].
    ///
    /// # Errors
    /// The file system's.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        /// SeaBIOS boots no AHCI or virtio disk that is as small as one sector.
        const DISK_BYTES: u64 = 1 << 20;
        let mut file = File::create(path)?;
        file.write_all(&self.boot_sector())?;
        file.set_len(DISK_BYTES)?;
        Ok(())
    }

    /// The 512 bytes.
    #[must_use]
    pub fn boot_sector(&self) -> [u8; 512] {
        const GDT: usize = 0x80;
        const GDT_POINTER: usize = 0x98;
        const PROTECTED: u8 = 0x20;
        let at = |offset: usize| (usize::from(BOOT_ADDRESS) + offset).to_le_bytes();
        let (start, pages) = (self.start.to_le_bytes(), self.pages.to_le_bytes());

        let mut sector = [0; 512];
        let mut put = |offset: usize, bytes: &[u8]| {
            sector[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        // Real mode: to flat 32-bit protected mode.
        let [low, high, ..] = at(GDT_POINTER);
        put(0x00, &[0xfa]); // cli
        put(0x01, &[0x31, 0xc0, 0x8e, 0xd8]); // xor ax, ax; mov ds, ax
        put(0x05, &[0x0f, 0x01, 0x16, low, high]); // lgdt [gdt_pointer]
        put(0x0a, &[0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0]); // cr0 |= PE
        let [low, high, ..] = at(usize::from(PROTECTED));
        put(0x12, &[0xea, low, high, 0x08, 0x00]); // jmp 0x08:protected
        // Protected mode.
        put(0x20, &[0x66, 0xb8, 0x10, 0x00]); // mov ax, 0x10
        put(0x24, &[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // mov ds/es/ss, ax
        put(0x2a, &[0x31, 0xdb]); // xor ebx, ebx
        put(0x2c, &[0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
        // round, at 0x30:
        put(0x30, &[0xbf, start[0], start[1], start[2], start[3]]); // mov edi, start
        put(0x35, &[0xb9, pages[0], pages[1], pages[2], pages[3]]); // mov ecx, pages
        // page, at 0x3a:
        put(0x3a, &[0xfe, 0x07]); // inc byte [edi]
        put(0x3c, &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]); // add edi, 4096
        put(0x42, &[0x49]); // dec ecx
        put(0x43, &[0x75, 0xf5]); // jnz page
        put(0x45, &[0xfe, 0xc3]); // inc bl
        put(0x47, &[0x88, 0xd8, 0xee]); // mov al, bl; out dx, al
        put(0x4a, &[0xeb, 0xe4]); // jmp round
        // Null, flat code (0x08) and flat data (0x10) descriptors.
        put(GDT + 8, &[0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0]);
        put(GDT + 16, &[0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]);
        let [low, high, ..] = at(GDT);
        put(GDT_POINTER, &[0x17, 0x00, low, high, 0, 0]);
        put(510, &[0x55, 0xaa]);
        sector
    }
}

/// Compares two memories page by page.
///
/// # Errors
/// They differ: says in how many pages, and where the first one is.
pub fn compare(what: &str, expected: &[u8], found: &[u8]) -> Result<()> {
    if expected.len() != found.len() {
        return Err(format!("{what}: {} bytes, not {}", found.len(), expected.len()).into());
    }
    let mut differing = expected
        .chunks(PAGE_SIZE)
        .zip(found.chunks(PAGE_SIZE))
        .enumerate()
        .filter(|(_, (a, b))| a != b);
    let Some((first, (a, b))) = differing.next() else {
        return Ok(());
    };
    let byte = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
    Err(format!(
        "{what}: {} pages differ, the first at {:#x} (byte {byte:#x} of it is {:#04x}, not {:#04x})",
        differing.count() + 1,
        first * PAGE_SIZE,
        b[byte],
        a[byte],
    )
    .into())
}

/// Parts of a machine's main RAM block that the guest sees at the same physical address: all but
/// the legacy hole, where firmware and graphics memory lie over it. For [`crate::qemu::Qemu::pmemsave`],
/// on machines with less than 2 GiB.
#[must_use]
pub fn plain_ram(memory_mib: u32) -> [std::ops::Range<u64>; 2] {
    [0..0xa_0000, 0x10_0000..u64::from(memory_mib) << 20]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prepared_memory_is_what_its_name_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let zero_pages = |content| {
            write_memory(file.path(), 100 * PAGE_SIZE as u64, content).unwrap();
            let bytes = std::fs::read(file.path()).unwrap();
            assert_eq!(bytes.len(), 100 * PAGE_SIZE);
            let is_zero = |page: &&[u8]| page.iter().all(|b| *b == 0);
            bytes.chunks(PAGE_SIZE).filter(is_zero).count()
        };
        assert_eq!(zero_pages(Content::Zero), 100);
        assert_eq!(zero_pages(Content::Random), 0);
        assert_eq!(zero_pages(Content::Mixed), 42);
    }

    #[test]
    fn a_difference_is_named_by_its_page_and_byte() {
        let (a, mut b) = ([0; 3 * PAGE_SIZE], [0; 3 * PAGE_SIZE]);
        compare("ram", &a, &b).unwrap();
        b[PAGE_SIZE + 5] = 9;
        b[2 * PAGE_SIZE] = 1;
        assert_eq!(
            compare("ram", &a, &b).unwrap_err().to_string(),
            "ram: 2 pages differ, the first at 0x1000 (byte 0x5 of it is 0x09, not 0x00)"
        );
        assert_eq!(
            compare("ram", &a, &b[1..]).unwrap_err().to_string(),
            "ram: 12287 bytes, not 12288"
        );
    }
}
