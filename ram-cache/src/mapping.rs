//! The memory of guest and cache.
#![allow(unsafe_code)] // mappings have no safe wrapper among our dependencies

use std::fs::File;
use std::sync::Arc;
use std::{fmt, io};

use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileSlice};

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A mapping of guest memory, whatever bitmap it has. What a cache writes there is not marked in it.
///
/// It is a reference: clones are the same mapping, which is unmapped when the last one has gone.
#[derive(Clone)]
pub struct GuestMapping(Arc<dyn Mapping>);

/// Mapped memory that stays where it is as long as this lives.
pub(crate) trait Mapping: Send + Sync {
    fn address(&self) -> *mut u8;
    fn len(&self) -> usize;
}

impl<B: Bitmap + Send + Sync> Mapping for MmapRegion<B> {
    fn address(&self) -> *mut u8 {
        self.as_ptr()
    }

    fn len(&self) -> usize {
        self.size()
    }
}

impl<B: Bitmap + Send + Sync + 'static> From<Arc<MmapRegion<B>>> for GuestMapping {
    fn from(region: Arc<MmapRegion<B>>) -> Self {
        Self(region)
    }
}

impl GuestMapping {
    /// Returns the length in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn address(&self) -> usize {
        self.0.address().addr()
    }

    pub(crate) fn as_mapping(&self) -> &dyn Mapping {
        &*self.0
    }

    /// The memory of a range, which writes mark nowhere; `None` if it is not in the mapping.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        check(self.as_mapping(), offset, len).ok()?;
        let address = self.0.address().wrapping_add(offset);
        // SAFETY: `check` has the range lie in the mapping, which stays as long as `self` is borrowed. It is reached by
        // volatile accesses alone; no reference to what it holds exists.
        Some(unsafe { VolatileSlice::new(address, len) })
    }
}

impl fmt::Debug for GuestMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMapping")
            .field("address", &self.0.address())
            .field("size", &self.size())
            .finish()
    }
}

/// Anonymous private memory of `len` bytes, all zero, none of it allocated before it is touched.
///
/// Not `MAP_NORESERVE`, unlike guest RAM as VMMs map it: the kernel is asked to account for the
/// copy, so that a host that cannot hold it says so here, as an error of the set-up, rather than
/// by killing the secondary in the middle of a checkpoint. Under the default overcommit heuristic
/// this refuses only what exceeds RAM and swap by itself; under strict accounting the flag would
/// be ignored anyway.
pub(crate) fn anonymous(len: usize) -> Result<MmapRegion, MmapRegionError> {
    build(None, len, ANONYMOUS | MapFlags::PRIVATE)
}

/// The same for memory of which only a part is expected to be used: nobody accounts for it.
pub(crate) fn anonymous_unreserved(len: usize) -> Result<MmapRegion, MmapRegionError> {
    build(
        None,
        len,
        ANONYMOUS | MapFlags::PRIVATE | MapFlags::NORESERVE,
    )
}

/// A file of `len` bytes in memory, all zero, none of it allocated before it is touched.
pub(crate) fn memory_file(len: usize) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(c"guest-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(len as u64)?;
    Ok(file)
}

/// The first `len` bytes of `file`, mapped so that what is written is in the file.
pub(crate) fn shared(file: File, len: usize) -> Result<MmapRegion, MmapRegionError> {
    build(Some(FileOffset::new(file, 0)), len, MapFlags::SHARED)
}

/// `rustix` makes anonymous mappings by a call of their own and has no flag for them (`MAP_ANONYMOUS`).
const ANONYMOUS: MapFlags = MapFlags::from_bits_retain(0x20);

fn build(
    file: Option<FileOffset>,
    len: usize,
    flags: MapFlags,
) -> Result<MmapRegion, MmapRegionError> {
    let bits = |bits: u32| bits.cast_signed();
    MmapRegion::build(file, len, bits(READ_WRITE.bits()), bits(flags.bits()))
}

/// Puts a private mapping of the first `len` bytes of `file` in the place of `len` bytes of `region`.
/// Whoever reads there now sees the file, whoever writes a page gets a copy of it, and what was there
/// before is gone. Nobody sees anything in between.
///
/// # Errors
/// The range is not in the region, or the host's.
pub(crate) fn replace_by_private(
    region: &dyn Mapping,
    offset: usize,
    len: usize,
    file: &File,
) -> io::Result<()> {
    check(region, offset, len)?;
    // SAFETY: `check` has the range lie within the mapping that `region` owns: no other is replaced, it
    // stays readable and writable, and `region` unmaps it whole. No reference to guest memory exists
    // whose referent would change: it is reached by volatile accesses through raw pointers alone.
    unsafe {
        rustix::mm::mmap(
            region.address().wrapping_add(offset).cast(),
            len,
            READ_WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            file,
            0,
        )
    }?;
    Ok(())
}

/// Drops a mapping's own pages in a range: reading there gives what the mapping is of, the file, or
/// zero if it is anonymous.
///
/// # Errors
/// The range is not in the region, or the host's: it is locked into memory.
pub(crate) fn drop_own_pages(region: &dyn Mapping, offset: usize, len: usize) -> io::Result<()> {
    advise(region, offset, len, Advice::LinuxDontNeed)
}

/// Keeps a region out of core dumps: it holds what the guest holds, and as much.
pub(crate) fn exclude_from_core_dumps(region: &dyn Mapping) -> io::Result<()> {
    advise(region, 0, region.len(), Advice::LinuxDontDump)
}

/// Takes a range of a region from the system, as a write to each page would, which changes nothing of
/// what is in it.
///
/// # Errors
/// The range is not in the region, or the host's.
pub(crate) fn populate(region: &dyn Mapping, offset: usize, len: usize) -> io::Result<()> {
    advise(region, offset, len, Advice::LinuxPopulateWrite)
}

/// Asks for huge pages behind a region.
pub(crate) fn advise_huge(region: &dyn Mapping) -> io::Result<()> {
    advise(region, 0, region.len(), Advice::LinuxHugepage)
}

/// How many pages of a region are in memory.
#[cfg(test)]
pub(crate) fn resident_pages(region: &dyn Mapping) -> io::Result<usize> {
    let mut pages = vec![0_u8; region.len().div_ceil(4096)];
    // SAFETY: the range is that of a mapping which `region` keeps alive, and the vector has a byte for
    // each of its pages.
    let result =
        unsafe { libc::mincore(region.address().cast(), region.len(), pages.as_mut_ptr()) };
    if result == 0 {
        Ok(pages.iter().filter(|page| **page & 1 != 0).count())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn advise(region: &dyn Mapping, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
    check(region, offset, len)?;
    let address = region.address().wrapping_add(offset);
    // Of these advices only MADV_DONTNEED changes contents, as a write of another thread would: of
    // memory that is only ever reached by volatile accesses through raw pointers.
    // SAFETY: the range lies within the mapping that `region` owns and keeps alive during the call,
    // and no reference to what it holds exists.
    unsafe { rustix::mm::madvise(address.cast(), len, advice) }?;
    Ok(())
}

fn check(region: &dyn Mapping, offset: usize, len: usize) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= region.len() => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
