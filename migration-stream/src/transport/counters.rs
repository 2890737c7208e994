//! What was sent.

use crate::XbzrleCounters;

/// What a [`PageTransport`](crate::PageTransport) has sent since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// Pages sent with their data.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages that were compared with what was sent of them before.
    pub compared_pages: u64,
    /// Pages that were left out because they were sent like that before.
    pub unchanged_pages: u64,
    /// Bytes on channels other than the main stream.
    pub channel_bytes: u64,
    /// Pages sent as differences.
    pub xbzrle: XbzrleCounters,
    /// Synchronisations of a channel before which the kernel copied pages that were to be sent
    /// without (`dirty-sync-missed-zero-copy`).
    pub missed_zero_copy: u64,
}
