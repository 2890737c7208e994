//! What guest RAM that is a private mapping of the last checkpoint promises beyond what every cache
//! does: what it takes of memory.
#![cfg(not(loom))] // loom's atomics work inside its models only

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use ram_cache::{
        CacheBlockSpec, CacheError, CowCache, DiscardControl, FlushPool, GuestStopped, PAGE_SIZE,
        RamCache,
    };
    use vm_memory::{MmapRegion, VolatileMemory};

    const PAGE: usize = 4096;
    const PAGES: usize = 1024;

    struct Secondary {
        cache: CowCache,
        guest: Arc<MmapRegion>,
        pool: FlushPool,
    }

    impl Secondary {
        /// Every page was received in precopy.
        fn new() -> Self {
            let guest = Arc::new(MmapRegion::<()>::new(PAGES * PAGE).unwrap());
            let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
            let discard = DiscardControl::new().disable().unwrap();
            let secondary = Self {
                cache: CowCache::new(vec![block], discard).unwrap(),
                guest,
                pool: FlushPool::new(1).unwrap(),
            };
            (0..PAGES).for_each(|page| secondary.receive(page, 1));
            secondary.cache.enter_colo().unwrap();
            secondary
        }

        fn receive(&self, page: usize, byte: u8) {
            let offset = (page * PAGE) as u64;
            let slice = self.cache.prepare(0, offset, PAGE).unwrap();
            slice.copy_from(&[byte; PAGE]);
            self.cache.landed(0, offset, PAGE).unwrap();
        }

        fn write(&self, page: usize, byte: u8) {
            let memory = self.guest.get_slice(page * PAGE, PAGE).unwrap();
            memory.copy_from(&[byte; PAGE]);
            let (first, bit) = ((page / 64 * 64) as u64, page % 64);
            self.cache.or_dirty_word(0, first, 1 << bit).unwrap();
        }

        fn stop(&self) -> GuestStopped<'_> {
            let stopped = GuestStopped::witnessed_by(self);
            self.cache.guest_stopped(stopped).unwrap();
            stopped
        }

        fn commit(&self) {
            let stopped = self.stop();
            self.cache.commit(stopped, &self.pool).unwrap();
            self.cache.reclaim(stopped).unwrap();
        }

        fn byte(&self, page: usize) -> u8 {
            let mut byte = [0u8];
            let memory = self.guest.get_slice(page * PAGE + 9, 1).unwrap();
            memory.copy_to(&mut byte);
            byte[0]
        }

        /// Which pages the guest has copies of.
        fn copies(&self) -> Vec<usize> {
            let mut words = vec![0; PAGES * 8];
            let at = self.guest.as_ptr().addr() / PAGE * 8;
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            pagemap.read_exact_at(&mut words, at as u64).unwrap();
            let is_own = |word: &[u8]| {
                let word = u64::from_ne_bytes(word.try_into().unwrap());
                word >> 62 != 0 && word >> 61 & 1 == 0
            };
            let words = words.chunks_exact(8).enumerate();
            words
                .filter(|(_, w)| is_own(w))
                .map(|(page, _)| page)
                .collect()
        }
    }

    #[test]
    fn the_guest_has_copies_only_of_what_it_has_written_itself() {
        let secondary = Secondary::new();
        assert!(secondary.copies().is_empty());
        secondary.write(5, 2);
        (0..20).for_each(|page| secondary.receive(page, 3));
        secondary.commit();
        assert!((0..20).all(|page| secondary.byte(page) == 3));
        assert_eq!(secondary.copies(), [5]);
    }

    #[test]
    fn copies_that_the_guest_goes_on_to_write_are_kept_and_many_others_are_dropped() {
        let secondary = Secondary::new();
        let many: Vec<usize> = (0..PAGES).step_by(8).collect();
        many.iter().for_each(|&page| secondary.write(page, 2));
        secondary.commit();
        assert_eq!(secondary.copies(), many);
        let hot = &many[..many.len() / 2];
        hot.iter().for_each(|&page| secondary.write(page, 3));
        secondary.commit();
        assert_eq!(secondary.copies(), hot);
        assert!((0..PAGES).all(|page| secondary.byte(page) == 1));
    }

    #[test]
    fn a_page_that_arrives_after_the_commit_is_not_received_behind_a_copy_that_is_dropped() {
        let secondary = Secondary::new();
        (0..PAGES).for_each(|page| secondary.write(page, 2));
        secondary.commit();
        // Nothing was written by the guest: at the next commit all copies are cold.
        let stopped = secondary.stop();
        secondary.cache.commit(stopped, &secondary.pool).unwrap();
        secondary.receive(7, 9);
        secondary.cache.reclaim(stopped).unwrap();
        assert_eq!(secondary.copies(), [7]);
        secondary.receive(8, 9);
        assert_eq!((secondary.byte(7), secondary.byte(8)), (1, 1));
        secondary.commit();
        assert_eq!((secondary.byte(7), secondary.byte(8)), (9, 9));
    }

    #[test]
    fn what_the_guest_has_written_since_a_commit_is_not_dropped() {
        let secondary = Secondary::new();
        (0..PAGES).for_each(|page| secondary.write(page, 2));
        secondary.commit();
        let stopped = secondary.stop();
        secondary.cache.commit(stopped, &secondary.pool).unwrap();
        // The guest runs, and then its checkpoint breaks off.
        (0..PAGES).for_each(|page| secondary.write(page, 5));
        secondary.cache.reclaim(stopped).unwrap();
        assert!((0..PAGES).all(|page| secondary.byte(page) == 5));
        secondary.cache.reclaim(secondary.stop()).unwrap();
        assert!((0..PAGES).all(|page| secondary.byte(page) == 5));
    }

    #[test]
    fn a_copy_that_no_log_knows_of_hides_nothing_that_arrives() {
        let secondary = Secondary::new();
        let copy_of = |page: usize| {
            let memory = secondary.guest.get_slice(page * PAGE, 1).unwrap();
            let mut byte = [0u8];
            memory.copy_to(&mut byte);
            memory.copy_from(&byte);
        };
        // Pages that arrive, as data and as zero; and one that does not.
        [70, 71, 75, 79].into_iter().for_each(copy_of);
        assert_eq!(secondary.copies(), [70, 71, 75, 79]);
        (64..72).for_each(|page| secondary.receive(page, 9));
        let zero = |page: usize| secondary.cache.zero(0, (page * PAGE) as u64, PAGE).unwrap();
        (72..79).for_each(zero);
        secondary.commit();
        assert!((64..72).all(|page| secondary.byte(page) == 9));
        assert!((72..79).all(|page| secondary.byte(page) == 0));
        assert_eq!(secondary.byte(79), 1);
        // They are known from now on.
        (70..80).for_each(|page| secondary.receive(page, 3));
        assert_eq!((secondary.byte(70), secondary.byte(75)), (9, 0));
        copy_of(72);
        secondary.commit();
        assert!((70..80).all(|page| secondary.byte(page) == 3));
    }

    #[test]
    fn a_log_that_names_every_page_makes_no_copies() {
        let secondary = Secondary::new();
        secondary.write(3, 2);
        for first in (0..PAGES as u64).step_by(64) {
            secondary.cache.or_dirty_word(0, first, u64::MAX).unwrap();
        }
        secondary.receive(4, 9);
        secondary.commit();
        assert_eq!(secondary.copies(), [3]);
        assert_eq!((secondary.byte(3), secondary.byte(4)), (1, 9));
    }

    #[test]
    fn a_part_of_a_page_of_a_checkpoint_is_refused() {
        let secondary = Secondary::new();
        for (offset, len) in [(0, 100), (1, PAGE)] {
            let results = [
                secondary.cache.prepare(0, offset, len).map(drop),
                secondary.cache.zero(0, offset, len),
            ];
            for result in results {
                assert!(matches!(
                    result,
                    Err(CacheError::PartOfPage { offset: o, len: l, .. }) if (o, l) == (offset, len)
                ));
            }
        }
        assert_eq!(secondary.cache.dirty_pages(), 0);
    }

    #[test]
    fn channels_that_send_the_same_pages_again_and_again_run_out_of_no_memory() {
        let secondary = Secondary::new();
        for round in 0..20 {
            // Runs that begin elsewhere each time.
            let mut offset = round % 7 * PAGE_SIZE;
            let end = PAGES as u64 * PAGE_SIZE;
            while offset < end {
                let len = usize::try_from(end - offset).unwrap().min(100 * PAGE);
                let slice = secondary.cache.prepare(0, offset, len).unwrap();
                slice.copy_from(&vec![u8::try_from(round).unwrap(); slice.len()]);
                offset += slice.len() as u64;
            }
        }
        secondary.commit();
        assert!((7..PAGES).all(|page| secondary.byte(page) == 19));
    }
}
