//! Counters of a block device, as `query-blockstats` gives them.

use std::time::Duration;

/// A kind of request, for counters and for observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes, and those of zeroes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Unmap,
}

/// Counters of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindStats {
    /// Bytes of requests that were done.
    pub bytes: u64,
    /// Requests that were done.
    pub operations: u64,
    /// Time that they took altogether, nanoseconds.
    pub total_time_ns: u64,
    /// Requests that the disk failed.
    pub failed_operations: u64,
    /// Requests that no disk could do: outside of it, or not whole sectors.
    pub invalid_operations: u64,
}

/// Counters of a block device since it was made. They do not travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Reads.
    pub read: KindStats,
    /// Writes, and those of zeroes.
    pub write: KindStats,
    /// Flushes.
    pub flush: KindStats,
    /// Discards.
    pub unmap: KindStats,
}

impl BlockStats {
    pub(super) const fn of(&mut self, kind: RequestKind) -> &mut KindStats {
        match kind {
            RequestKind::Read => &mut self.read,
            RequestKind::Write => &mut self.write,
            RequestKind::Flush => &mut self.flush,
            RequestKind::Unmap => &mut self.unmap,
        }
    }
}

impl KindStats {
    pub(super) fn done(&mut self, bytes: u64, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.bytes = self.bytes.wrapping_add(bytes);
        self.operations = self.operations.wrapping_add(1);
        self.total_time_ns = self.total_time_ns.saturating_add(nanoseconds);
    }
}
