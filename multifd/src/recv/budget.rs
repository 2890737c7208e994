//! Memory that all channels together may have taken.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::ChannelError;

/// So many bytes, and how many of them are left.
#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    left: AtomicUsize,
}

impl Budget {
    pub(super) const fn new(limit: usize) -> Self {
        Self {
            limit,
            left: AtomicUsize::new(limit),
        }
    }

    /// Takes nothing yet.
    pub(super) const fn begin(&self) -> Taken<'_> {
        Taken {
            budget: self,
            bytes: 0,
        }
    }
}

/// What one channel has taken; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    budget: &'a Budget,
    bytes: usize,
}

impl Taken<'_> {
    /// Takes more, until it is `bytes` in all.
    pub(super) fn grow_to(&mut self, bytes: usize) -> Result<(), ChannelError> {
        let more = bytes.saturating_sub(self.bytes);
        // Relaxed: it is a count, and orders nothing.
        let taken = (self.budget.left).fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(more)
        });
        if taken.is_err() {
            return Err(ChannelError::DeviceStateMemory {
                limit: self.budget.limit,
            });
        }
        self.bytes += more;
        Ok(())
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_have_taken_is_never_more_than_the_limit_and_comes_back() {
        let budget = Budget::new(100);
        let mut one = budget.begin();
        one.grow_to(60).unwrap();
        one.grow_to(60).unwrap();
        let mut other = budget.begin();
        other.grow_to(40).unwrap();
        let e = other.grow_to(41).unwrap_err();
        assert!(matches!(e, ChannelError::DeviceStateMemory { limit: 100 }));
        drop(one);
        other.grow_to(100).unwrap();
        drop(other);
        budget.begin().grow_to(100).unwrap();
    }
}
