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
/// How a boot sector ends.
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];

impl Dirtier {
    /// Writes a disk with the boot sector on it, for [`crate::qemu::Machine::boot`].
    ///
    /// # Errors
    /// The file system's.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        write_disk(path, &self.boot_sector())
    }

    /// The 512 bytes.
    #[must_use]
    pub fn boot_sector(&self) -> [u8; 512] {
        protected(&[&self.code()])
    }

    /// Checks that `memory`, all of a paused guest's from address 0 on, is this guest's: its boot sector was
    /// loaded, and each page's first byte is the count of rounds, or one less behind where it stands.
    ///
    /// # Errors
    /// Another guest's memory, or one that was not taken at one moment.
    pub fn check(&self, memory: &[u8]) -> Result<()> {
        let boot = usize::from(BOOT_ADDRESS);
        if memory.get(boot + 510..boot + 512) != Some(&BOOT_SIGNATURE) {
            return Err("no boot sector was loaded".into());
        }
        let first = usize::try_from(self.start)?;
        let length = usize::try_from(self.pages)? * PAGE_SIZE;
        let pages = memory
            .get(first..first + length)
            .ok_or("too little memory")?;
        let mut rounds = pages.chunks(PAGE_SIZE).map(|page| page[0]);
        let current = rounds.next().unwrap_or_default();
        let behind = current.wrapping_sub(1);
        let mut expected = current;
        for (page, found) in rounds.enumerate() {
            if found == behind {
                expected = behind;
            }
            if found != expected {
                return Err(format!(
                    "page {}: round {found:#x}, not {expected:#x}; the first page: {current:#x}",
                    page + 1
                )
                .into());
            }
        }
        Ok(())
    }

    fn code(&self) -> Vec<u8> {
        let (start, pages) = (self.start.to_le_bytes(), self.pages.to_le_bytes());
        let code: &[&[u8]] = &[
            &[0x31, 0xdb],             // xor ebx, ebx
            &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
            // round:
            &[0xbf],
            &start, // mov edi, start
            &[0xb9],
            &pages, // mov ecx, pages
            // page:
            &[0xfe, 0x07],                         // inc byte [edi]
            &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00], // add edi, 4096
            &[0x49],                               // dec ecx
            &[0x75, 0xf5],                         // jnz page
            &[0xfe, 0xc3],                         // inc bl
            &[0x88, 0xd8, 0xee],                   // mov al, bl; out dx, al
            &[0xeb, 0xe4],                         // jmp round
        ];
        code.concat()
    }
}

/// A boot sector whose guest uses all of its memory: it writes something into every page from 1 MiB on,
/// once, and then goes on as a [`Dirtier`].
#[derive(Clone, Copy, Debug)]
pub struct Filler {
    /// Guest physical address of the end of memory.
    pub end: u32,
    /// What it does then.
    pub then: Dirtier,
}

impl Filler {
    /// As [`Dirtier::write_disk`].
    ///
    /// # Errors
    /// The file system's.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        let end = self.end.to_le_bytes();
        write_disk(
            path,
            &protected(&[
                &[0xbf, 0x00, 0x00, 0x10, 0x00], // mov edi, 1 MiB
                // page:
                &[0xc7, 0x47, 0x08, 0x01, 0x00, 0x00, 0x00], // mov dword [edi + 8], 1
                &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00],       // add edi, 4096
                &[0x81, 0xff],
                &end,          // cmp edi, end
                &[0x72, 0xeb], // jb page
                &self.then.code(),
            ]),
        )
    }
}

/// A boot sector whose guest checks its own memory for ever. In each pass it looks whether every
/// byte of every page of a region still is what it wrote there in the pass before, which depends
/// on the page's address and the pass, and writes what belongs there now. After a pass it writes
/// the number of passes to the serial port, seven bits of it; for a page that is not as it should
/// be a byte of [`Checker::ERROR`] and seven bits of the page's number.
#[derive(Clone, Copy, Debug)]
pub struct Checker {
    /// Guest physical address of the first page; at least 1 MiB, beyond what firmware uses.
    pub start: u32,
    /// Number of pages.
    pub pages: u32,
}

impl Checker {
    /// Set in a byte that reports a wrong page.
    pub const ERROR: u8 = 0x80;

    /// As [`Dirtier::write_disk`].
    ///
    /// # Errors
    /// The file system's.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        write_disk(path, &self.boot_sector())
    }

    /// The 512 bytes.
    #[must_use]
    pub fn boot_sector(&self) -> [u8; 512] {
        let start = self.start.to_le_bytes();
        let end = (self.start + (self.pages << 12)).to_le_bytes();
        // Odd, so that every pass differs from every other.
        let factor = 0x9e37_79b1_u32.to_le_bytes();
        protected(&[
            &[0xfc],                   // cld
            &[0x31, 0xdb],             // xor ebx, ebx
            &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
            // pass:
            &[0xbe],
            &start, // mov esi, start
            // page:
            &[0x85, 0xdb],       // test ebx, ebx
            &[0x74, 0x16],       // jz write
            &[0x8d, 0x43, 0xff], // lea eax, [ebx - 1]
            &[0x69, 0xc0],
            &factor,                         // imul eax, eax, factor
            &[0x01, 0xf0],                   // add eax, esi
            &[0x89, 0xf7],                   // mov edi, esi
            &[0xb9, 0x00, 0x04, 0x00, 0x00], // mov ecx, 1024
            &[0xf3, 0xaf],                   // repe scasd
            &[0x75, 0x27],                   // jne wrong
            // write:
            &[0x69, 0xc3],
            &factor,                               // imul eax, ebx, factor
            &[0x01, 0xf0],                         // add eax, esi
            &[0x89, 0xf7],                         // mov edi, esi
            &[0xb9, 0x00, 0x04, 0x00, 0x00],       // mov ecx, 1024
            &[0xf3, 0xab],                         // rep stosd
            &[0x81, 0xc6, 0x00, 0x10, 0x00, 0x00], // add esi, 4096
            &[0x81, 0xfe],
            &end,                      // cmp esi, end
            &[0x72, 0xc7],             // jb page
            &[0x43],                   // inc ebx
            &[0x88, 0xd8, 0x24, 0x7f], // mov al, bl; and al, 0x7f
            &[0xee],                   // out dx, al
            &[0xeb, 0xba],             // jmp pass
            // wrong:
            &[0x89, 0xf0, 0xc1, 0xe8, 0x0c], // mov eax, esi; shr eax, 12
            &[0x0c, Self::ERROR, 0xee],      // or al, ERROR; out dx, al
            &[0xeb, 0xcf],                   // jmp write
        ])
    }

    /// How many passes `output` tells of, which may begin with any of them.
    ///
    /// # Errors
    /// A page was wrong, or a pass is missing.
    pub fn passes(output: &[u8]) -> Result<usize> {
        if let Some(at) = output.iter().position(|b| b & Self::ERROR != 0) {
            let wrong = output.iter().filter(|b| *b & Self::ERROR != 0).count();
            return Err(format!(
                "after {at} passes page {:#x} (of 128) was wrong, {wrong} in all",
                output[at] & !Self::ERROR
            )
            .into());
        }
        match output
            .windows(2)
            .position(|pair| (pair[0] + 1) & !Self::ERROR != pair[1])
        {
            None => Ok(output.len()),
            Some(at) => {
                Err(format!("pass {:#x} follows on {:#x}", output[at + 1], output[at]).into())
            }
        }
    }
}

/// A boot sector whose guest writes what is there already: in each pass it looks whether the first word of
/// every page of a region is what it wrote there in the pass before, and writes what belongs there now,
/// which depends on the page's address and changes only every so many passes. It says what a [`Checker`]
/// says, to be read by [`Checker::passes`].
#[derive(Clone, Copy, Debug)]
pub struct Rewriter {
    /// Guest physical address of the first page; at least 1 MiB, beyond what firmware uses.
    pub start: u32,
    /// Number of pages.
    pub pages: u32,
    /// The logarithm (to base 2) of the number of passes that write the same; less than 32.
    pub log_passes: u8,
}

impl Rewriter {
    /// As [`Dirtier::write_disk`].
    ///
    /// # Errors
    /// The file system's.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        let start = self.start.to_le_bytes();
        let end = (self.start + (self.pages << 12)).to_le_bytes();
        let sector = protected(&[
            &[0x31, 0xdb],             // xor ebx, ebx
            &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
            // pass:
            &[0x8d, 0x6b, 0xff],            // lea ebp, [ebx - 1]
            &[0xc1, 0xed, self.log_passes], // shr ebp, log_passes
            &[0x89, 0xd9],                  // mov ecx, ebx
            &[0xc1, 0xe9, self.log_passes], // shr ecx, log_passes
            &[0xbf],
            &start, // mov edi, start
            // page:
            &[0x85, 0xdb],       // test ebx, ebx
            &[0x74, 0x07],       // jz write
            &[0x8d, 0x04, 0x2f], // lea eax, [edi + ebp]
            &[0x39, 0x07],       // cmp [edi], eax
            &[0x75, 0x1b],       // jne wrong
            // write:
            &[0x8d, 0x04, 0x0f],                   // lea eax, [edi + ecx]
            &[0x89, 0x07],                         // mov [edi], eax
            &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00], // add edi, 4096
            &[0x81, 0xff],
            &end,                      // cmp edi, end
            &[0x72, 0xe2],             // jb page
            &[0x43],                   // inc ebx
            &[0x88, 0xd8, 0x24, 0x7f], // mov al, bl; and al, 0x7f
            &[0xee],                   // out dx, al
            &[0xeb, 0xca],             // jmp pass
            // wrong:
            &[0x89, 0xf8, 0xc1, 0xe8, 0x0c], // mov eax, edi; shr eax, 12
            &[0x0c, Checker::ERROR, 0xee],   // or al, ERROR; out dx, al
            &[0xeb, 0xdb],                   // jmp write
        ]);
        write_disk(path, &sector)
    }
}

/// Writes a disk with a boot sector on it whose guest writes a byte to the serial port and stands still
/// from then on, without interrupts: nothing in it writes its memory any more.
///
/// # Errors
/// The file system's.
pub fn write_halting_disk(path: &Path) -> Result<()> {
    let sector = protected(&[
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
        &[0xb0, b'.', 0xee],       // mov al, '.'; out dx, al
        // still:
        &[0xf4],       // hlt
        &[0xeb, 0xfd], // jmp still
    ]);
    write_disk(path, &sector)
}

/// Writes a disk with `boot_sector` on it, for [`crate::qemu::Machine::boot`].
///
/// # Errors
/// The file system's.
pub fn write_disk(path: &Path, boot_sector: &[u8; 512]) -> Result<()> {
    /// SeaBIOS boots no AHCI or virtio disk that is as small as one sector.
    const DISK_BYTES: u64 = 1 << 20;
    let mut file = File::create(path)?;
    file.write_all(boot_sector)?;
    file.set_len(DISK_BYTES)?;
    Ok(())
}

/// A boot sector that runs the pieces of `code` one after the other in flat 32-bit protected mode,
/// without stack and interrupts.
fn protected(code: &[&[u8]]) -> [u8; 512] {
    const PROTECTED: u8 = 0x18;
    const CODE: usize = 0x22;
    const GDT: usize = 0xd0;
    const GDT_POINTER: usize = GDT + 24;
    let at = |offset: usize| (usize::from(BOOT_ADDRESS) + offset).to_le_bytes();
    let code = code.concat();
    assert!(CODE + code.len() <= GDT, "the code is too long");

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
    put(0x18, &[0x66, 0xb8, 0x10, 0x00]); // mov ax, 0x10
    put(0x1c, &[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]); // mov ds/es/ss, ax
    put(CODE, &code);
    // Null, flat code (0x08) and flat data (0x10) descriptors.
    put(GDT + 8, &[0xff, 0xff, 0, 0, 0, 0x9a, 0xcf, 0]);
    put(GDT + 16, &[0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0]);
    let [low, high, ..] = at(GDT);
    put(GDT_POINTER, &[0x17, 0x00, low, high, 0, 0]);
    put(510, &BOOT_SIGNATURE);
    sector
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
    fn memory_of_a_dirtier_is_told_from_others_in_every_round() {
        let guest = Dirtier {
            start: 1 << 20,
            pages: 3,
        };
        let memory = |rounds: [u8; 3]| {
            let mut memory = vec![0; (1 << 20) + 3 * PAGE_SIZE];
            memory[0x7c00..0x7e00].copy_from_slice(&guest.boot_sector());
            for (page, round) in memory[1 << 20..].chunks_mut(PAGE_SIZE).zip(rounds) {
                page[0] = round;
            }
            memory
        };
        for rounds in [[0; 3], [0, 255, 255], [0, 0, 255], [1, 0, 0], [7, 7, 6]] {
            guest.check(&memory(rounds)).unwrap();
        }
        for rounds in [[7, 6, 7], [7, 7, 8], [7, 5, 5], [0, 1, 0]] {
            let e = guest.check(&memory(rounds)).unwrap_err();
            assert!(e.to_string().starts_with("page "), "{rounds:?}: {e}");
        }
        let e = guest.check(&vec![0; 2 << 20]).unwrap_err();
        assert_eq!(e.to_string(), "no boot sector was loaded");
    }

    #[test]
    fn a_guest_that_checks_itself_is_believed_only_without_gaps_and_errors() {
        assert_eq!(Checker::passes(&[126, 127, 0, 1]).unwrap(), 4);
        assert_eq!(Checker::passes(&[]).unwrap(), 0);
        let e = Checker::passes(&[1, 2, 0x85, 3]).unwrap_err();
        assert_eq!(
            e.to_string(),
            "after 2 passes page 0x5 (of 128) was wrong, 1 in all"
        );
        let e = Checker::passes(&[1, 2, 4]).unwrap_err();
        assert_eq!(e.to_string(), "pass 0x4 follows on 0x2");
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
