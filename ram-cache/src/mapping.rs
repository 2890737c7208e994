//! The memory of a cache.
#![allow(unsafe_code)] // madvise has no safe wrapper among our dependencies

use std::io;

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

/// Anonymous private memory of `len` bytes, all zero, none of it allocated before it is touched.
///
/// Not `MAP_NORESERVE`, unlike guest RAM as VMMs map it: the kernel is asked to account for the
/// copy, so that a host that cannot hold it says so here, as an error of the set-up, rather than
/// by killing the secondary in the middle of a checkpoint. Under the default overcommit heuristic
/// this refuses only what exceeds RAM and swap by itself; under strict accounting the flag would
/// be ignored anyway.
pub(crate) fn anonymous(len: usize) -> Result<MmapRegion, MmapRegionError> {
    MmapRegion::build(
        None,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_ANONYMOUS | libc::MAP_PRIVATE,
    )
}

/// Keeps a region out of core dumps: it holds what the guest holds, and as much.
pub(crate) fn exclude_from_core_dumps(region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is exactly the mapping that `region` owns and keeps alive during the call,
    // page aligned because mmap made it. MADV_DONTDUMP changes neither contents nor protection.
    let result =
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
