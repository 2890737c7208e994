//! What the benchmarks share.
//!
//! - [`link`]: what joins the two sides, with [`delay`], and [`way`]: how pages cross
//! - [`case`](mod@case): a guest and its connection
//! - [`iperf`]: the rate of a link
//! - [`usage`]: CPU time and memory of a process
//! - [`host`], [`report`], [`render`]: where something was measured, the figures, and RESULTS.md
#![deny(unsafe_code)]

pub mod case;
pub mod delay;
pub mod host;
pub mod iperf;
pub mod link;
pub mod render;
pub mod report;
pub mod usage;
pub mod way;

use std::time::Duration;

use criterion::Criterion;
use vm_memory::{MmapRegion, VolatileMemory};

/// Few and short samples: the whole suite is over in minutes, on a machine that is never quiet
/// enough for more to say more.
#[must_use]
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// `len` bytes of memory that `fill` has written page by page: no page fault is measured.
///
/// # Panics
/// There is no memory; a benchmark has nothing to go on with.
#[must_use]
pub fn memory(len: usize, mut fill: impl FnMut(usize, &mut [u8; 4096])) -> MmapRegion {
    let region = MmapRegion::new(len).expect("memory for the benchmark");
    let all = region.as_volatile_slice();
    let mut page = [0; 4096];
    for index in 0..len / page.len() {
        fill(index, &mut page);
        all.subslice(index * page.len(), page.len())
            .expect("a page of the region")
            .copy_from(&page);
    }
    region
}
