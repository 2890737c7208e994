//! No input may make us take more than 256 MiB, at any moment.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What may be in use at a time, bytes, the target's own guest memory included.
const LIMIT: usize = 256 << 20;

struct Counting(AtomicUsize);

#[global_allocator]
static ALLOCATOR: Counting = Counting(AtomicUsize::new(0));

impl Counting {
    fn take(&self, len: usize) {
        let before = self.0.fetch_add(len, Ordering::Relaxed);
        if before.saturating_add(len) > LIMIT {
            // Nothing may be allocated for the message.
            std::process::abort();
        }
    }

    fn give_back(&self, len: usize) {
        self.0.fetch_sub(len, Ordering::Relaxed);
    }
}

// SAFETY: everything is handed on to the system's allocator; only lengths are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.take(layout.size());
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.take(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        self.give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.take(new_size);
        self.give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
