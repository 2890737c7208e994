//! A guest in a directory.
//!
//! ```text
//! DIR/manifest.json   machine, blocks, lengths and checksums
//! DIR/devices         the device sections and their description, as they came
//! DIR/early           device sections that go before memory, if it has any
//! DIR/bitmaps         dirty bitmaps of its disks, if it has any
//! DIR/ram-0 ...       a block each, byte i of it byte i of the file; zero pages are holes
//! ```
//!
//! It is written under another name beside it, synced, and then renamed: after a crash there is all
//! of it or none. What a killed relay left beside it is removed when the store is written or read again. Who reads it back believes nothing: files must be regular ones of the length that
//! the manifest says, everything is bounded, and a checksum goes over what is in memory afterwards.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migration_stream::ram::{BlockId, RamBlock, RamBlockError, RamBlockTable};
use migration_stream::raw::configuration::IGNORE_SHARED;
use migration_stream::raw::dirty_bitmap::BitmapSections;
use migration_stream::raw::early::{EarlyError, EarlySections};
use migration_stream::raw::ram::zero_check;
use migration_stream::{
    Configuration, ConfigurationError, DecodeError, GuestRam, IdStr, MachineName, MemoryError,
    PAGE_SIZE, SectionId, Tail, TailError,
};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tool_support::device_state::Excess;
use twox_hash::XxHash64;
use vm_memory::VolatileSlice;

use crate::guest::{Devices, Guest};
use crate::incoming::limits;
use crate::memory::{HoldError, Memory};
use crate::outgoing::sync_directory;
use crate::partial::{self, PartialDirectory, parent};
use crate::progress::{Progress, Stage};

/// The first file of a store that is being written, and the last of one that is removed.
pub(crate) const MANIFEST: &str = "manifest.json";
const DEVICES: &str = "devices";
const EARLY: &str = "early";
const BITMAPS: &str = "bitmaps";
const VERSION: u32 = 1;
/// A block's name takes 255 bytes, of which each may be escaped in six; there are 1024 at most.
const MAX_MANIFEST: u64 = 4 << 20;
/// Bytes of memory that are moved at a time.
const PIECE: usize = 1 << 20;
const PAGE: usize = 4096;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    /// The machine type; none if the source sends no configuration section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    page_bits: Option<u32>,
    capabilities: Vec<String>,
    /// 32 hexadecimal digits.
    uuid: Option<String>,
    blocks: Vec<Block>,
    devices: Contents,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    early: Option<Early>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bitmaps: Option<Contents>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Early {
    /// How many sections there are.
    sections: usize,
    contents: Contents,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    name: String,
    contents: Contents,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    /// Bytes.
    length: u64,
    /// XXH64, 16 hexadecimal digits. That of a block goes over its pages that are not zero, each
    /// after its index (le64).
    checksum: String,
}

/// Whether a guest can be saved in `dir`: there is nothing of that name, or an empty directory.
///
/// # Errors
/// [`StoreError::Exists`] or the file system's.
pub fn check_free(dir: &Path) -> Result<(), StoreError> {
    match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(StoreError::Exists { path: dir.into() }),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed(dir)(e)),
    }
}

/// Saves `guest` in the directory `dir`, which must not be there yet or be empty. When this returns
/// it is on disk.
///
/// # Errors
/// [`StoreError`]; there is no store then.
pub fn save(guest: &Guest, dir: &Path, progress: &Progress) -> Result<(), StoreError> {
    progress.begin(Stage::Storing);
    check_free(dir)?;
    let beside = parent(dir);
    partial::sweep(dir);
    let partial = PartialDirectory::create(dir).map_err(failed(beside))?;
    let at = partial.path();

    let mut blocks = Vec::with_capacity(guest.memory.blocks().len());
    for (id, block) in guest.memory.blocks().iter() {
        let path = at.join(ram_name(id));
        blocks.push(Block {
            name: block.name().to_owned(),
            contents: Contents {
                length: block.used_length(),
                checksum: save_block(guest, id, block.used_length(), &path)?,
            },
        });
    }
    let devices = guest.devices.tail.as_bytes();
    let save = |name: &str, bytes: &[u8]| -> Result<Contents, StoreError> {
        write_synced(&at.join(name), bytes)?;
        Ok(Contents {
            length: bytes.len() as u64,
            checksum: checksum_of(bytes),
        })
    };
    let devices = save(DEVICES, devices)?;
    let mut early = Vec::new();
    guest.early.encode(SectionId(0), &mut early);
    let early = (!early.is_empty())
        .then(|| {
            save(EARLY, &early).map(|contents| Early {
                sections: guest.early.len(),
                contents,
            })
        })
        .transpose()?;
    let mut bitmaps = Vec::new();
    guest
        .devices
        .bitmaps
        .encode_sections(SectionId(0), &mut bitmaps);
    let bitmaps = (!bitmaps.is_empty())
        .then(|| save(BITMAPS, &bitmaps))
        .transpose()?;
    let configuration = guest.configuration.as_ref();
    let manifest = Manifest {
        version: VERSION,
        machine: configuration.map(|c| c.machine.as_str().to_owned()),
        page_bits: configuration.and_then(|c| c.page_bits),
        capabilities: configuration
            .into_iter()
            .flat_map(|c| &c.capabilities)
            .map(|capability| capability.as_str().to_owned())
            .collect(),
        uuid: configuration
            .and_then(|c| c.uuid)
            .map(|uuid| format!("{:032x}", u128::from_be_bytes(uuid))),
        blocks,
        devices,
        early,
        bitmaps,
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(StoreError::Manifest)?;
    let mut file = partial.manifest();
    file.write_all(&text)
        .and_then(|()| file.sync_all())
        .map_err(failed(&at.join(MANIFEST)))?;
    sync_directory(at).map_err(failed(at))?;
    partial.persist(dir).map_err(failed(dir))?;
    sync_directory(beside).map_err(failed(beside))
}

/// Reads the guest that was saved in `dir`, if it has no more than `max_memory` bytes of memory and
/// `max_device_state` bytes of device state.
///
/// # Errors
/// [`StoreError`]: there is none, or it is not what was saved.
pub fn load(
    dir: &Path,
    max_memory: u64,
    max_device_state: usize,
    progress: &Arc<Progress>,
) -> Result<Guest, StoreError> {
    progress.begin(Stage::Loading);
    partial::sweep(dir);
    let path = dir.join(MANIFEST);
    let (file, length) = open(&path)?;
    if length > MAX_MANIFEST {
        return Err(StoreError::TooLong {
            path,
            length,
            max: MAX_MANIFEST,
        });
    }
    let text = read_all(&path, &file, length)?;
    let manifest: Manifest = serde_json::from_slice(&text).map_err(StoreError::Manifest)?;
    if manifest.version != VERSION {
        return Err(StoreError::Version {
            found: manifest.version,
        });
    }
    let configuration = manifest.configuration()?;
    let limits = limits(max_device_state);
    let load = |name: &str, contents: &Contents| -> Result<Vec<u8>, StoreError> {
        let path = dir.join(name);
        let (file, length) = open(&path)?;
        contents.check_length(&path, length)?;
        if length > limits.len as u64 {
            let max = limits.len as u64;
            return Err(StoreError::DeviceState { path, length, max });
        }
        let bytes = read_all(&path, &file, length)?;
        contents.check(&path, &checksum_of(&bytes))?;
        Ok(bytes)
    };
    let bitmaps = match &manifest.bitmaps {
        None => BitmapSections::new(),
        Some(contents) => BitmapSections::decode(&load(BITMAPS, contents)?)?,
    };
    let sections = manifest.early.as_ref().map_or(0, |early| early.sections);
    let tail = load(DEVICES, &manifest.devices)?;
    let tail = Tail::decode_after_early(&tail, sections, limits)?;
    let early = match &manifest.early {
        None => EarlySections::new(),
        Some(early) => EarlySections::decode(&load(EARLY, &early.contents)?, tail.description())?,
    };
    if early.len() != sections {
        return Err(StoreError::Field {
            field: "early sections",
            value: sections.to_string(),
        });
    }

    let blocks = manifest
        .blocks
        .iter()
        .map(|b| RamBlock::new(b.name.as_str(), b.contents.length))
        .collect::<Result<Vec<_>, _>>()
        .and_then(RamBlockTable::new)?;
    let memory = Memory::new(blocks, max_memory, Arc::clone(progress))?;
    for ((id, _), block) in memory.blocks().iter().zip(&manifest.blocks) {
        load_block(&memory, id, &block.contents, &dir.join(ram_name(id)))?;
    }
    Ok(Guest {
        memory: Arc::new(memory),
        configuration,
        early,
        devices: Devices { tail, bitmaps },
    })
}

/// Removes a store.
///
/// # Errors
/// The file system's.
pub fn remove(dir: &Path) -> Result<(), StoreError> {
    partial::remove(dir).map_err(failed(dir))?;
    let beside = parent(dir);
    sync_directory(beside).map_err(failed(beside))
}

impl Manifest {
    fn configuration(&self) -> Result<Option<Configuration>, StoreError> {
        let Some(machine) = &self.machine else {
            return Ok(None);
        };
        let mut configuration = Configuration::new(MachineName::new(machine.as_str())?);
        configuration.page_bits = self.page_bits;
        configuration.check_page_size()?;
        for name in &self.capabilities {
            let capability = IdStr::new(name.as_str()).ok();
            let capability = capability.filter(|c| c.as_str() != IGNORE_SHARED);
            let capability = capability.ok_or_else(|| StoreError::Field {
                field: "capabilities",
                value: name.clone(),
            })?;
            configuration.capabilities.insert(capability);
        }
        if let Some(uuid) = &self.uuid {
            let digits = u128::from_str_radix(uuid, 16).ok();
            let digits = digits.filter(|_| uuid.len() == 32);
            let digits = digits.ok_or_else(|| StoreError::Field {
                field: "uuid",
                value: uuid.clone(),
            })?;
            configuration.uuid = Some(digits.to_be_bytes());
        }
        Ok(Some(configuration))
    }
}

impl Contents {
    fn check_length(&self, path: &Path, found: u64) -> Result<(), StoreError> {
        if found == self.length {
            Ok(())
        } else {
            Err(StoreError::Length {
                path: path.into(),
                found,
                expected: self.length,
            })
        }
    }

    fn check(&self, path: &Path, found: &str) -> Result<(), StoreError> {
        if found == self.checksum {
            Ok(())
        } else {
            Err(StoreError::Checksum {
                path: path.into(),
                found: found.to_owned(),
                expected: self.checksum.clone(),
            })
        }
    }
}

fn ram_name(id: BlockId) -> String {
    format!("ram-{}", id.index())
}

fn failed(path: &Path) -> impl Fn(io::Error) -> StoreError + '_ {
    |source| StoreError::File {
        path: path.into(),
        source,
    }
}

fn create(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed(path))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = create(path)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(failed(path))
}

/// Opens a regular file, and nothing that would block or lead elsewhere; also its length.
fn open(path: &Path) -> Result<(File, u64), StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed(path))?;
    let metadata = file.metadata().map_err(failed(path))?;
    if metadata.is_file() {
        Ok((file, metadata.len()))
    } else {
        Err(StoreError::NotAFile { path: path.into() })
    }
}

/// What the file has, `length` bytes at most.
fn read_all(path: &Path, file: &File, length: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    file.take(length)
        .read_to_end(&mut bytes)
        .map_err(failed(path))?;
    Ok(bytes)
}

/// The hash of a block's pages that are not zero.
struct Checksum(XxHash64);

impl Checksum {
    fn new() -> Self {
        Self(XxHash64::with_seed(0))
    }

    fn page(&mut self, index: u64, bytes: &[u8]) {
        self.0.write(&index.to_le_bytes());
        self.0.write(bytes);
    }

    fn text(&self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

fn checksum_of(bytes: &[u8]) -> String {
    let mut checksum = XxHash64::with_seed(0);
    checksum.write(bytes);
    format!("{:016x}", checksum.finish())
}

fn is_zero(page: &mut [u8]) -> bool {
    zero_check(&VolatileSlice::from(page))
}

/// Calls `run` with each run of pages in `piece` that are not zero: where it begins, and its bytes.
fn runs<E>(piece: &mut [u8], mut run: impl FnMut(usize, &[u8]) -> Result<(), E>) -> Result<(), E> {
    let is_zero: Vec<bool> = piece.chunks_mut(PAGE).map(is_zero).collect();
    let mut page = 0;
    for same in is_zero.chunk_by(|a, b| a == b) {
        let range = page * PAGE..((page + same.len()) * PAGE).min(piece.len());
        page += same.len();
        if same.first() == Some(&false) {
            let start = range.start;
            run(start, piece.get(range).unwrap_or_default())?;
        }
    }
    Ok(())
}

fn save_block(guest: &Guest, id: BlockId, length: u64, path: &Path) -> Result<String, StoreError> {
    let file = create(path)?;
    file.set_len(length).map_err(failed(path))?;
    let mut checksum = Checksum::new();
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    while offset < length {
        let len = usize::try_from(length - offset).map_or(PIECE, |left| left.min(PIECE));
        let piece = buffer.get_mut(..len).unwrap_or_default();
        guest.memory.slice(id, offset, len)?.copy_to(piece);
        runs(piece, |start, bytes| {
            let at = offset + start as u64;
            for (page, index) in bytes.chunks(PAGE).zip(at / PAGE_SIZE..) {
                checksum.page(index, page);
            }
            file.write_all_at(bytes, at)
        })
        .map_err(failed(path))?;
        offset += len as u64;
    }
    file.sync_all().map_err(failed(path))?;
    Ok(checksum.text())
}

fn load_block(
    memory: &Memory,
    id: BlockId,
    contents: &Contents,
    path: &Path,
) -> Result<(), StoreError> {
    let (file, found) = open(path)?;
    contents.check_length(path, found)?;
    let mut checksum = Checksum::new();
    let mut buffer = vec![0; PIECE];
    let mut offset = 0;
    while let Some((start, end)) = data(&file, offset, contents.length).map_err(failed(path))? {
        offset = start;
        while offset < end {
            let len = usize::try_from(end - offset).map_or(PIECE, |left| left.min(PIECE));
            let piece = buffer.get_mut(..len).unwrap_or_default();
            file.read_exact_at(piece, offset).map_err(failed(path))?;
            runs(piece, |start, bytes| {
                let at = offset + start as u64;
                for (page, index) in bytes.chunks(PAGE).zip(at / PAGE_SIZE..) {
                    checksum.page(index, page);
                }
                memory.slice(id, at, bytes.len())?.copy_from(bytes);
                Ok::<_, StoreError>(())
            })?;
            offset += len as u64;
        }
    }
    contents.check(path, &checksum.text())
}

/// The first range of whole pages from `offset` on, before `length`, that is no hole.
fn data(file: &File, offset: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if offset >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system does not know.
        Err(Errno::INVAL) => return Ok(Some((offset, length))),
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    let start = (start / PAGE_SIZE * PAGE_SIZE).max(offset);
    let end = end.min(length).next_multiple_of(PAGE_SIZE).min(length);
    Ok((start < end).then_some((start, end)))
}

/// Why a guest could not be saved or read back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is something already.
    #[error("{} is there already and not empty", tool_support::Escaped(&.path.to_string_lossy()))]
    Exists {
        /// The store's directory.
        path: PathBuf,
    },
    /// The file system's.
    #[error("{}", tool_support::Escaped(&.path.to_string_lossy()))]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else where a file should be.
    #[error("{} is not a regular file", tool_support::Escaped(&.path.to_string_lossy()))]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// A file is longer than it may be.
    #[error("{} has {length} bytes, at most {max} expected", tool_support::Escaped(&.path.to_string_lossy()))]
    TooLong {
        /// Its path.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// There is more device state than is taken.
    #[error(
        "{}: {}",
        tool_support::Escaped(&.path.to_string_lossy()),
        Excess { len: Some(*.length), max: *.max }
    )]
    DeviceState {
        /// Its path.
        path: PathBuf,
        /// Its length.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// A file is not as long as the manifest says.
    #[error("{} has {found} bytes, not {expected}", tool_support::Escaped(&.path.to_string_lossy()))]
    Length {
        /// Its path.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// That of the manifest.
        expected: u64,
    },
    /// A file has other contents than were saved.
    #[error("{} has checksum {found}, not {expected}", tool_support::Escaped(&.path.to_string_lossy()), found = tool_support::Escaped(.found), expected = tool_support::Escaped(.expected))]
    Checksum {
        /// Its path.
        path: PathBuf,
        /// That of its contents.
        found: String,
        /// That of the manifest.
        expected: String,
    },
    /// The manifest is none.
    #[error("the store's manifest")]
    Manifest(#[source] serde_json::Error),
    /// The manifest is of another time.
    #[error("a store of version {found}, expected {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The manifest says what cannot be.
    #[error("'{value}' among the manifest's {field}", value = tool_support::Escaped(.value))]
    Field {
        /// Which field.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// The machine type is none.
    #[error("the store's machine type")]
    Machine(#[from] ConfigurationError),
    /// The blocks cannot be those of a guest.
    #[error("the store's blocks")]
    Blocks(#[from] RamBlockError),
    /// The guest cannot be held.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// Guest memory could not be reached.
    #[error("guest memory")]
    Memory(#[from] MemoryError),
    /// The devices are none.
    #[error("the store's devices")]
    Devices(#[from] TailError),
    /// The devices before memory are none.
    #[error("the store's devices that go before memory")]
    Early(#[from] EarlyError),
    /// The dirty bitmaps are not sound.
    #[error("the dirty bitmaps in the store")]
    Bitmaps(#[from] DecodeError),
}
