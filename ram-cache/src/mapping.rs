//! The memory of a cache.
#![allow(unsafe_code)] // none of this has a safe wrapper among our dependencies

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion};

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Anonymous private memory of `len` bytes, all zero, none of it allocated before it is touched.
///
/// Not `MAP_NORESERVE`, unlike guest RAM as VMMs map it: the kernel is asked to account for the
/// copy, so that a host that cannot hold it says so here, as an error of the set-up, rather than
/// by killing the secondary in the middle of a checkpoint. Under the default overcommit heuristic
/// this refuses only what exceeds RAM and swap by itself; under strict accounting the flag would
/// be ignored anyway.
pub(crate) fn anonymous(len: usize) -> Result<MmapRegion, MmapRegionError> {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    MmapRegion::build(None, len, READ_WRITE, flags)
}

/// The same for memory of which only a part is expected to be used: nobody accounts for it.
pub(crate) fn anonymous_unreserved(len: usize) -> Result<MmapRegion, MmapRegionError> {
    let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    MmapRegion::build(None, len, READ_WRITE, flags)
}

/// A file of `len` bytes in memory, all zero, none of it allocated before it is touched.
pub(crate) fn memory_file(len: usize) -> io::Result<File> {
    // SAFETY: the name is a C string that lives as long as the program, and the call has no other
    // requirement.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now, is valid, and is nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len as u64)?;
    Ok(file)
}

/// The first `len` bytes of `file`, mapped so that what is written is in the file.
pub(crate) fn shared(file: File, len: usize) -> Result<MmapRegion, MmapRegionError> {
    let file = FileOffset::new(file, 0);
    MmapRegion::build(Some(file), len, READ_WRITE, libc::MAP_SHARED)
}

/// Puts a private mapping of the first `len` bytes of `file` in the place of `len` bytes of `region`.
/// Whoever reads there now sees the file, whoever writes a page gets a copy of it, and what was there
/// before is gone. Nobody sees anything in between.
///
/// # Errors
/// The range is not in the region, or the host's.
pub(crate) fn replace_by_private(
    region: &MmapRegion,
    offset: usize,
    len: usize,
    file: &File,
) -> io::Result<()> {
    check(region, offset, len)?;
    // SAFETY: `check` has the range lie within the mapping that `region` owns: no other is replaced, it
    // stays readable and writable, and `region` unmaps it whole. No reference to guest memory exists
    // whose referent would change: it is reached by volatile accesses through raw pointers alone.
    let address = unsafe {
        libc::mmap(
            region.as_ptr().wrapping_add(offset).cast(),
            len,
            READ_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Drops a mapping's own pages in a range: reading there gives what the mapping is of, the file, or
/// zero if it is anonymous.
///
/// # Errors
/// The range is not in the region, or the host's: it is locked into memory.
pub(crate) fn drop_own_pages(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    advise(region, offset, len, libc::MADV_DONTNEED)
}

/// Keeps a region out of core dumps: it holds what the guest holds, and as much.
pub(crate) fn exclude_from_core_dumps(region: &MmapRegion) -> io::Result<()> {
    advise(region, 0, region.size(), libc::MADV_DONTDUMP)
}

/// Takes a range of a region from the system, as a write to each page would, which changes nothing of
/// what is in it.
///
/// # Errors
/// The range is not in the region, or the host's.
pub(crate) fn populate(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    advise(region, offset, len, libc::MADV_POPULATE_WRITE)
}

/// Asks for huge pages behind a region.
pub(crate) fn advise_huge(region: &MmapRegion) -> io::Result<()> {
    advise(region, 0, region.size(), libc::MADV_HUGEPAGE)
}

/// How many pages of a region are in memory.
#[cfg(test)]
pub(crate) fn resident_pages(region: &MmapRegion) -> io::Result<usize> {
    let mut pages = vec![0_u8; region.size().div_ceil(4096)];
    // SAFETY: the range is that of a mapping which `region` keeps alive, and the vector has a byte for
    // each of its pages.
    let result =
        unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
    if result == 0 {
        Ok(pages.iter().filter(|page| **page & 1 != 0).count())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn advise(region: &MmapRegion, offset: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
    check(region, offset, len)?;
    let address = region.as_ptr().wrapping_add(offset);
    // Of these advices only MADV_DONTNEED changes contents, as a write of another thread would: of
    // memory that is only ever reached by volatile accesses through raw pointers.
    // SAFETY: the range lies within the mapping that `region` owns and keeps alive during the call,
    // and no reference to what it holds exists.
    let result = unsafe { libc::madvise(address.cast(), len, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn check(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= region.size() => Ok(()),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}
