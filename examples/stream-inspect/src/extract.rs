//! RAM blocks and devices as files, as `analyze-migration.py -x` writes them: a file for each block
//! under its name, `desc.json` and `state.json`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Component, Path, PathBuf};

use migration_stream::io::PositionedFile;
use migration_stream::ram::{BlockId, RamBlockTable};
use migration_stream::raw::ram::PageAddress;
use migration_stream::raw::xbzrle::{Run, Runs, XbzrleError};
use migration_stream::{Escaped, PAGE_SIZE};

use crate::pages::PageSet;

const PAGE_LEN: usize = 4096;
/// How much is written at once, bytes.
const PIECE: usize = 256 << 10;

/// Writes RAM blocks into files that are as long as the blocks. What is zero stays a hole.
#[derive(Debug)]
pub struct Extract {
    dir: PathBuf,
    blocks: Vec<Target>,
    /// Pages that follow each other and are not written yet.
    held: Vec<u8>,
    /// Where the first of them belongs.
    at: Option<PageAddress>,
}

#[derive(Debug)]
struct Target {
    path: PathBuf,
    file: File,
    /// Pages that have been written.
    written: PageSet,
}

impl Extract {
    /// Into the directory `dir`, which is made if it is not there. No file in it is overwritten.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn into(dir: impl Into<PathBuf>) -> Result<Self, ExtractError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(|source| ExtractError::File {
            path: dir.clone(),
            source,
        })?;
        Ok(Self {
            dir,
            blocks: Vec::new(),
            held: Vec::new(),
            at: None,
        })
    }

    /// Writes a file of the directory.
    ///
    /// # Errors
    /// It is there, or cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<(), ExtractError> {
        let path = self.dir.join(name);
        let written = create(&path).and_then(|file| file.write_at(0, text.as_bytes()));
        written.map_err(|source| ExtractError::File { path, source })
    }

    pub(crate) fn begin(&mut self, blocks: &RamBlockTable) -> Result<(), ExtractError> {
        for (_, block) in blocks.iter() {
            let path = self.dir.join(relative(block.name())?);
            let length = block.used_length();
            let created = || {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent)?;
                }
                let file = create(&path)?;
                file.set_len(length)?;
                Ok(file)
            };
            let file = created().map_err(|source| ExtractError::File {
                path: path.clone(),
                source,
            })?;
            self.blocks.push(Target {
                path,
                file,
                written: PageSet::default(),
            });
        }
        Ok(())
    }

    pub(crate) fn page(&mut self, page: PageAddress, bytes: &[u8]) -> Result<(), ExtractError> {
        let follows = self.at.is_some_and(|at| {
            at.block == page.block && at.offset + self.held.len() as u64 == page.offset
        });
        if !follows || self.held.len() >= PIECE {
            self.flush()?;
            self.at = Some(page);
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }

    pub(crate) fn zero(&mut self, page: PageAddress) -> Result<(), ExtractError> {
        self.flush()?;
        let Some(target) = self.blocks.get(page.block.index()) else {
            return Ok(());
        };
        if target.written.contains(page.offset / PAGE_SIZE) {
            target.write(page.offset, &[0; PAGE_LEN])?;
        }
        Ok(())
    }

    pub(crate) fn xbzrle(&mut self, page: PageAddress, encoded: &[u8]) -> Result<(), ExtractError> {
        self.flush()?;
        let Some(target) = self.blocks.get_mut(page.block.index()) else {
            return Ok(());
        };
        let name = || target.path.display().to_string();
        let bad = |source| ExtractError::Xbzrle {
            block: name(),
            offset: page.offset,
            source,
        };
        let mut bytes = [0; PAGE_LEN];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let read = target.file.read_at(page.offset + done as u64, rest);
            match read.map_err(|source| target.failed(source))? {
                0 => break,
                n => done += n,
            }
        }
        let runs = Runs::new(encoded);
        runs.check().map_err(bad)?;
        for Run { offset, bytes: new } in runs.flatten() {
            if let Some(place) = bytes.get_mut(offset..offset + new.len()) {
                place.copy_from_slice(new);
            }
        }
        target.written.insert(page.offset / PAGE_SIZE, 1);
        target.write(page.offset, &bytes)
    }

    /// Copies `count` pages from byte `from` of `file`.
    pub(crate) fn copy(
        &mut self,
        file: &dyn PositionedFile,
        mut from: u64,
        block: BlockId,
        first: u64,
        count: u64,
    ) -> Result<(), ExtractError> {
        let Some(target) = self.blocks.get(block.index()) else {
            return Ok(());
        };
        let (mut to, end) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
        let mut piece = vec![0; PIECE];
        while to < end {
            let len = usize::try_from(end - to).map_or(PIECE, |rest| rest.min(PIECE));
            let here = piece.get_mut(..len).unwrap_or_default();
            let n = file
                .read_at(from, here)
                .and_then(|n| match n {
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    n => Ok(n),
                })
                .map_err(|source| ExtractError::Pages {
                    offset: from,
                    source,
                })?;
            target.write(to, here.get(..n).unwrap_or_default())?;
            (from, to) = (from + n as u64, to + n as u64);
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self) -> Result<(), ExtractError> {
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ExtractError> {
        if let Some(at) = self.at.take()
            && let Some(target) = self.blocks.get_mut(at.block.index())
        {
            target.write(at.offset, &self.held)?;
            let pages = self.held.len() as u64 / PAGE_SIZE;
            target.written.insert(at.offset / PAGE_SIZE, pages);
        }
        self.held.clear();
        Ok(())
    }
}

impl Target {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ExtractError> {
        self.file
            .write_at(offset, bytes)
            .map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ExtractError {
        ExtractError::File {
            path: self.path.clone(),
            source,
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
}

/// A block's name as a path below the directory. The names come out of the stream.
fn relative(name: &str) -> Result<PathBuf, ExtractError> {
    let refused = || ExtractError::Name {
        name: name.to_owned(),
    };
    let mut path = PathBuf::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(refused()),
        }
    }
    if path.as_os_str().is_empty() || name.contains('\0') {
        return Err(refused());
    }
    Ok(path)
}

/// Why what was found could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// A file could not be made or written.
    #[error("writing {}", tool_support::Escaped(&.path.to_string_lossy()))]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The pages could not be read.
    #[error("reading pages at byte {offset:#x} of the file")]
    Pages {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A block's name leads out of the directory, or is none.
    #[error("no file can have the name of ram block '{}'", Escaped(.name))]
    Name {
        /// The block.
        name: String,
    },
    /// A page's difference is not sound.
    #[error("page {offset:#x} for {}", Escaped(.block))]
    Xbzrle {
        /// The block's file.
        block: String,
        /// Which page, bytes in the block.
        offset: u64,
        /// Why.
        source: XbzrleError,
    },
}

#[cfg(test)]
mod tests {
    use migration_stream::ram::RamBlock;

    use super::*;

    #[test]
    fn no_name_leads_out_of_the_directory() {
        for (name, path) in [
            ("pc.ram", "pc.ram"),
            ("0000:00:02.0/vga.vram", "0000:00:02.0/vga.vram"),
            ("/rom@etc/acpi/tables", "rom@etc/acpi/tables"),
            ("a/./b", "a/b"),
        ] {
            assert_eq!(relative(name).unwrap(), PathBuf::from(path));
        }
        for name in ["..", "a/../../b", "/", "", "."] {
            assert!(relative(name).is_err(), "{name}");
        }
    }

    #[test]
    fn pages_land_in_their_files_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let blocks = RamBlockTable::new(vec![RamBlock::new("d/ram", 8 << 12).unwrap()]).unwrap();
        let mut extract = Extract::into(dir.path()).unwrap();
        extract.begin(&blocks).unwrap();
        let page = |page: u64| PageAddress {
            block: BlockId::new(0),
            offset: page << 12,
        };
        for (i, fill) in [(1, 1), (2, 2), (5, 5), (1, 9)] {
            extract.page(page(i), &[fill; PAGE_LEN]).unwrap();
        }
        extract.zero(page(2)).unwrap();
        extract.zero(page(3)).unwrap();
        // Nothing for 2 bytes, then 1 byte.
        extract.xbzrle(page(5), &[2, 1, 0xee]).unwrap();
        extract.finish().unwrap();
        let found = fs::read(dir.path().join("d/ram")).unwrap();
        let mut expected = vec![0; 8 << 12];
        expected[1 << 12..2 << 12].fill(9);
        expected[5 << 12..6 << 12].fill(5);
        expected[(5 << 12) + 2] = 0xee;
        assert!(found == expected);

        let error = Extract::into(dir.path())
            .unwrap()
            .begin(&blocks)
            .unwrap_err();
        assert!(matches!(error, ExtractError::File { .. }), "{error}");
        extract.write("desc.json", "{}").unwrap();
        assert!(extract.write("desc.json", "{}").is_err());
    }
}
