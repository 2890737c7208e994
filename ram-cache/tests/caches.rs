//! What every cache promises to a COLO secondary, against naive models.
#![cfg(not(loom))] // loom's atomics work inside its models only

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::sync::Arc;

    use proptest::prelude::*;
    use ram_cache::{
        CacheBlockSpec, CacheError, CacheKind, DiscardControl, FlushPool, FlushReport,
        GuestStopped, PAGE_SIZE, RamCache,
    };
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{
        Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion, VolatileMemory,
    };

    const PAGE: usize = 4096;
    const _: () = assert!(PAGE as u64 == PAGE_SIZE);

    /// Each of these holds for each cache.
    macro_rules! for_every_cache {
        ($($test:ident),* $(,)?) => {
            mod mirror {
                $(#[test] fn $test() { super::$test(ram_cache::CacheKind::Mirror); })*
            }
            mod cow {
                $(#[test] fn $test() { super::$test(ram_cache::CacheKind::Cow); })*
            }
        };
    }

    for_every_cache!(
        after_each_commit_the_guest_equals_the_primary_and_before_it_nothing_received_shows,
        precopy_reaches_the_guest_and_marks_nothing,
        a_checkpoint_that_never_completes_leaves_the_guest_as_it_was,
        a_range_is_every_page_it_touches,
        a_page_that_comes_again_is_what_came_last,
        a_zero_page_that_was_never_used_takes_no_memory,
        a_large_commit_on_several_cores_copies_every_page,
        channel_threads_that_receive_at_once_lose_no_page,
        a_range_outside_its_block_is_refused_and_named,
        blocks_that_are_no_ram_of_their_own_are_refused,
        c11_discard_is_allowed_after_a_release_only_where_it_shows_no_old_page,
        c13_a_cache_that_cannot_be_made_is_a_typed_error_and_leaves_nothing_behind,
        c21_a_block_that_grows_to_its_full_length_under_colo_is_cached_and_flushed_whole,
        the_cache_stays_out_of_core_dumps,
        memory_with_a_bitmap_has_a_cache_that_marks_nothing_in_it,
    );

    fn region(pages: usize) -> Arc<MmapRegion> {
        Arc::new(MmapRegion::new(pages * PAGE).unwrap())
    }

    /// A cache, and the guest's memory in it.
    struct Secondary {
        cache: Box<dyn RamCache>,
        guest: Arc<MmapRegion>,
        /// Where each block begins in the guest's memory, pages.
        firsts: Vec<usize>,
        pool: FlushPool,
    }

    impl Secondary {
        fn new(kind: CacheKind, pages: usize) -> Self {
            Self::with(kind, region(pages), &[(0, pages)], 1)
        }

        /// With blocks of some pages at some pages of one mapping.
        fn with(
            kind: CacheKind,
            guest: Arc<MmapRegion>,
            blocks: &[(usize, usize)],
            threads: usize,
        ) -> Self {
            let specs = blocks.iter().map(|&(first, pages)| CacheBlockSpec {
                name: format!("ram at {first}"),
                guest: Arc::clone(&guest).into(),
                offset_in_region: first * PAGE,
                len: pages * PAGE,
            });
            let discard = DiscardControl::new().disable().unwrap();
            Self {
                cache: kind.make(specs.collect(), discard).unwrap(),
                firsts: blocks.iter().map(|&(first, _)| first).collect(),
                guest,
                pool: FlushPool::new(threads).unwrap(),
            }
        }

        fn in_colo(kind: CacheKind, pages: usize) -> Self {
            let secondary = Self::new(kind, pages);
            secondary.cache.enter_colo().unwrap();
            secondary
        }

        /// Pages arrive, in one piece or several.
        fn receive(&self, block: usize, page: usize, pages: usize, byte: u8) {
            let (start, len) = ((page * PAGE) as u64, pages * PAGE);
            let mut done = 0;
            while done < len {
                let at = start + done as u64;
                let slice = self.cache.prepare(block, at, len - done).unwrap();
                assert!(!slice.is_empty() && slice.len().is_multiple_of(PAGE));
                slice.copy_from(&vec![byte; slice.len()]);
                done += slice.len();
            }
            self.cache.landed(block, start, len).unwrap();
        }

        fn receive_zero(&self, block: usize, page: usize, pages: usize) {
            let start = (page * PAGE) as u64;
            self.cache.zero(block, start, pages * PAGE).unwrap();
        }

        /// The guest writes a page, and its dirty log tells of it.
        fn write(&self, block: usize, page: usize, byte: u8) {
            self.write_unlogged(block, page, byte);
            let first = (page / 64 * 64) as u64;
            let word = 1 << (page % 64);
            self.cache.or_dirty_word(block, first, word).unwrap();
        }

        fn write_unlogged(&self, block: usize, page: usize, byte: u8) {
            let at = (self.firsts[block] + page) * PAGE;
            let memory = self.guest.get_slice(at, PAGE).unwrap();
            memory.copy_from(&[byte; PAGE]);
        }

        fn read(&self, block: usize, page: usize) -> Vec<u8> {
            let mut bytes = vec![0xeeu8; PAGE];
            let at = (self.firsts[block] + page) * PAGE;
            self.guest.get_slice(at, PAGE).unwrap().copy_to(&mut bytes);
            bytes
        }

        fn commit(&self) -> FlushReport {
            let stopped = GuestStopped::witnessed_by(&self.guest);
            self.cache.guest_stopped(stopped).unwrap();
            let report = self.cache.commit(stopped, &self.pool).unwrap();
            self.cache.reclaim(stopped).unwrap();
            report
        }
    }

    /// What can happen to pages between two checkpoints, with the byte they are filled with.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Received(u8),
        ReceivedZero,
        DirtiedBySecondary(u8),
        /// A write that the hypervisor has prepared and the guest has not carried out: it may leave a
        /// copy of the page, and is in no log.
        Prepared,
        /// The cache is told that the guest is stopped. It need not be.
        Stopped,
    }

    /// Block, page, number of pages, and what happens to them.
    type Happening = (usize, usize, usize, Event);

    fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let event = prop_oneof![
            4 => any::<u8>().prop_map(Event::Received),
            2 => Just(Event::ReceivedZero),
            4 => any::<u8>().prop_map(Event::DirtiedBySecondary),
            1 => Just(Event::Prepared),
            1 => Just(Event::Stopped),
        ];
        let pages = prop_oneof![Just(1), 1..20usize];
        proptest::collection::vec((0..2usize, 0..200usize, pages, event), 0..200)
    }

    fn after_each_commit_the_guest_equals_the_primary_and_before_it_nothing_received_shows(
        kind: CacheKind,
    ) {
        const PAGES: [usize; 2] = [200, 70];
        let checkpoints = proptest::collection::vec(happenings(), 1..5);
        let case = (happenings(), checkpoints, 1..3usize, any::<bool>());
        let config = ProptestConfig::with_cases(48);
        proptest!(config, |((precopy, checkpoints, threads, is_aborted) in case)| {
            // Two blocks in one mapping, with a hole between them.
            let secondary = Secondary::with(kind, region(300), &[(0, PAGES[0]), (210, PAGES[1])], threads);
            let cache = &secondary.cache;
            // One byte stands for a page: what the primary has, and what the secondary's guest has.
            let mut primary = PAGES.map(|pages| vec![0u8; pages]);
            let shows = |model: &[Vec<u8>; 2]| {
                for (block, pages) in model.iter().enumerate() {
                    for (page, &byte) in pages.iter().enumerate() {
                        prop_assert_eq!(secondary.read(block, page), [byte; PAGE]);
                    }
                }
                Ok(())
            };
            for (block, page, count, event) in precopy {
                let page = page % PAGES[block];
                let count = count.min(PAGES[block] - page);
                match event {
                    Event::Received(byte) => {
                        secondary.receive(block, page, count, byte);
                        primary[block][page..page + count].fill(byte);
                    }
                    Event::ReceivedZero => {
                        secondary.receive_zero(block, page, count);
                        primary[block][page..page + count].fill(0);
                    }
                    _ => {}
                }
            }
            cache.enter_colo().unwrap();
            shows(&primary)?;
            let mut guest = primary.clone();
            let last = checkpoints.len() - 1;
            for (index, checkpoint) in checkpoints.into_iter().enumerate() {
                let mut marked = PAGES.map(|pages| vec![false; pages]);
                for (block, page, count, event) in checkpoint {
                    let page = page % PAGES[block];
                    let count = count.min(PAGES[block] - page);
                    let pages = page..page + count;
                    match event {
                        Event::Received(byte) => {
                            secondary.receive(block, page, count, byte);
                            primary[block][pages.clone()].fill(byte);
                        }
                        Event::ReceivedZero => {
                            secondary.receive_zero(block, page, count);
                            primary[block][pages.clone()].fill(0);
                        }
                        Event::DirtiedBySecondary(byte) => {
                            pages.clone().for_each(|page| secondary.write(block, page, byte));
                            guest[block][pages.clone()].fill(byte);
                        }
                        Event::Prepared => {
                            secondary.write_unlogged(block, page, guest[block][page]);
                            continue;
                        }
                        Event::Stopped => {
                            let stopped = GuestStopped::witnessed_by(&secondary);
                            cache.guest_stopped(stopped).unwrap();
                            continue;
                        }
                    }
                    marked[block][pages].fill(true);
                }
                // The guest has what it wrote itself.
                shows(&guest)?;
                let pages: usize = marked.iter().flatten().filter(|&&m| m).count();
                prop_assert_eq!(cache.dirty_pages(), pages as u64);
                if is_aborted && index == last {
                    break;
                }
                let report = secondary.commit();
                prop_assert_eq!(report.pages, pages as u64);
                prop_assert_eq!(report.bytes, (pages * PAGE) as u64);
                prop_assert_eq!(cache.dirty_pages(), 0);
                guest = primary.clone();
                shows(&guest)?;
            }
            // Whatever was left of a checkpoint goes with the cache, and the guest keeps its memory.
            let Secondary { cache, guest: memory, firsts, .. } = secondary;
            cache.release();
            for (block, pages) in guest.iter().enumerate() {
                for (page, &byte) in pages.iter().enumerate() {
                    let mut bytes = [0xeeu8; PAGE];
                    let at = (firsts[block] + page) * PAGE;
                    memory.get_slice(at, PAGE).unwrap().copy_to(&mut bytes);
                    prop_assert_eq!(bytes, [byte; PAGE]);
                }
            }
            // The hole belongs to nobody.
            let mut hole = vec![0xeeu8; 10 * PAGE];
            memory.get_slice(200 * PAGE, 10 * PAGE).unwrap().copy_to(&mut hole);
            prop_assert!(hole.iter().all(|&b| b == 0));
        });
    }

    fn precopy_reaches_the_guest_and_marks_nothing(kind: CacheKind) {
        let secondary = Secondary::new(kind, 4);
        secondary.receive(0, 1, 2, 7);
        assert_eq!(secondary.read(0, 1), [7; PAGE]);
        // What landed before is there to be changed.
        let again = secondary.cache.prepare(0, PAGE_SIZE, PAGE).unwrap();
        let mut held = [0u8; PAGE];
        again.copy_to(&mut held);
        assert_eq!(held, [7; PAGE]);
        secondary.receive_zero(0, 1, 1);
        // A part of a page.
        secondary.cache.zero(0, 2 * PAGE_SIZE + 5, 10).unwrap();
        assert_eq!(secondary.read(0, 1), [0; PAGE]);
        let mut third = vec![7; PAGE];
        third[5..15].fill(0);
        assert_eq!(secondary.read(0, 2), third);
        assert_eq!(secondary.cache.dirty_pages(), 0);
    }

    fn a_checkpoint_that_never_completes_leaves_the_guest_as_it_was(kind: CacheKind) {
        let secondary = Secondary::new(kind, 4);
        secondary.receive(0, 0, 4, 3);
        secondary.cache.enter_colo().unwrap();
        secondary.write(0, 2, 5);
        let stopped = GuestStopped::witnessed_by(&secondary);
        secondary.cache.guest_stopped(stopped).unwrap();
        secondary.receive_zero(0, 0, 1);
        // The channel broke after half a page.
        for page in [1, 2] {
            let slice = secondary.cache.prepare(0, page * PAGE_SIZE, PAGE).unwrap();
            slice
                .subslice(0, PAGE / 2)
                .unwrap()
                .copy_from(&[9u8; PAGE / 2]);
        }
        let Secondary { cache, guest, .. } = secondary;
        cache.release();
        let mut all = vec![0u8; 4 * PAGE];
        guest.as_volatile_slice().copy_to(&mut all[..]);
        for (page, byte) in [3, 3, 5, 3].into_iter().enumerate() {
            assert_eq!(all[page * PAGE..][..PAGE], [byte; PAGE], "page {page}");
        }
    }

    fn a_range_is_every_page_it_touches(kind: CacheKind) {
        let secondary = Secondary::in_colo(kind, 200);
        secondary.receive(0, 1, 2, 1);
        assert_eq!(secondary.cache.dirty_pages(), 2);
        let none = secondary.cache.prepare(0, PAGE_SIZE * 100, 0).unwrap();
        assert!(none.is_empty());
        assert_eq!(secondary.cache.dirty_pages(), 2);
        secondary.receive(0, 0, 200, 2);
        assert_eq!(secondary.cache.dirty_pages(), 200);
        assert_eq!(secondary.commit().pages, 200);
        assert!((0..200).all(|page| secondary.read(0, page) == [2; PAGE]));
    }

    fn a_page_that_comes_again_is_what_came_last(kind: CacheKind) {
        let secondary = Secondary::in_colo(kind, 8);
        secondary.receive(0, 3, 1, 1);
        // In another run than before, and next to a page that has come in between.
        secondary.receive(0, 5, 1, 2);
        secondary.receive(0, 2, 4, 3);
        secondary.receive_zero(0, 4, 1);
        secondary.receive_zero(0, 5, 1);
        secondary.receive(0, 5, 1, 4);
        assert_eq!(secondary.commit().pages, 4);
        let pages = [0, 0, 3, 3, 0, 4, 0, 0];
        for (page, byte) in pages.into_iter().enumerate() {
            assert_eq!(secondary.read(0, page), [byte; PAGE], "page {page}");
        }
    }

    fn a_zero_page_that_was_never_used_takes_no_memory(kind: CacheKind) {
        // More than other tests use that run beside this one.
        const PAGES: usize = 64 << 10;
        let secondary = Secondary::new(kind, PAGES);
        let before = resident();
        secondary.receive_zero(0, 0, PAGES);
        secondary.cache.enter_colo().unwrap();
        secondary.receive_zero(0, 0, PAGES);
        if kind == CacheKind::Cow {
            // A mirror's commit copies them into the guest.
            secondary.commit();
        }
        let grown = resident().saturating_sub(before);
        assert!(grown < PAGES * PAGE / 2, "{grown} bytes became resident");
    }

    /// Memory of this process, bytes.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let kib = |key| {
            let line = status.lines().find(|l| l.starts_with(key)).unwrap();
            let kib = line.split_whitespace().nth(1).unwrap();
            kib.parse::<usize>().unwrap()
        };
        (kib("RssAnon:") + kib("RssShmem:")) * 1024
    }

    fn a_large_commit_on_several_cores_copies_every_page(kind: CacheKind) {
        const PAGES: usize = 4096;
        let mut secondary = Secondary::in_colo(kind, PAGES);
        secondary.pool = FlushPool::new(4).unwrap();
        let byte = |page: usize| u8::try_from(page % 251 + 1).unwrap();
        let is_sent = |page: &usize| !page.is_multiple_of(7);
        for round in 0..2 {
            for page in (0..PAGES).filter(is_sent) {
                // Of some the guest has its own copy.
                if page.is_multiple_of(5) {
                    secondary.write(0, page, 0xff);
                }
                secondary.receive(0, page, 1, byte(page + round));
            }
            let report = secondary.commit();
            assert_eq!(report.pages, (0..PAGES).filter(is_sent).count() as u64);
            for page in 0..PAGES {
                let expected = if is_sent(&page) {
                    byte(page + round)
                } else {
                    0
                };
                assert_eq!(secondary.read(0, page), [expected; PAGE], "page {page}");
            }
        }
    }

    fn channel_threads_that_receive_at_once_lose_no_page(kind: CacheKind) {
        const PAGES: usize = 1024;
        const CHANNELS: usize = 4;
        let mut secondary = Secondary::in_colo(kind, PAGES);
        secondary.pool = FlushPool::new(2).unwrap();
        for round in 1..=3u8 {
            std::thread::scope(|scope| {
                for channel in 0..CHANNELS {
                    let secondary = &secondary;
                    scope.spawn(move || {
                        for page in (channel..PAGES).step_by(CHANNELS) {
                            secondary.receive(0, page, 1, round);
                        }
                    });
                }
                // The guest writes meanwhile, and is stopped.
                for page in (0..PAGES).step_by(3) {
                    secondary.write(0, page, 0xff);
                }
                let stopped = GuestStopped::witnessed_by(&secondary);
                secondary.cache.guest_stopped(stopped).unwrap();
            });
            assert_eq!(secondary.commit().pages, PAGES as u64);
            for page in 0..PAGES {
                assert_eq!(secondary.read(0, page), [round; PAGE]);
            }
        }
    }

    fn memory_with_a_bitmap_has_a_cache_that_marks_nothing_in_it(kind: CacheKind) {
        let place = (GuestAddress(1 << 30), 64 * PAGE);
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&[place]).unwrap();
        let region = memory.iter().next().unwrap();
        let block = CacheBlockSpec::whole_region("pc.ram", region.get_mmap());
        let discard = DiscardControl::new().disable().unwrap();
        let cache = kind.make(vec![block], discard).unwrap();
        let pool = FlushPool::new(1).unwrap();
        let stopped = GuestStopped::witnessed_by(&memory);
        let receive = |page: u64, byte| {
            let slice = cache.prepare(0, page * PAGE_SIZE, PAGE).unwrap();
            slice.copy_from(&[byte; PAGE]);
            cache.landed(0, page * PAGE_SIZE, PAGE).unwrap();
        };
        (0..64).for_each(|page| receive(page, 1));
        cache.enter_colo().unwrap();
        // A device writes, which the VMM's own log has.
        memory
            .write_obj(9_u8, GuestAddress((1 << 30) + 5 * PAGE_SIZE))
            .unwrap();
        cache.or_dirty_word(0, 0, 1 << 5).unwrap();
        receive(7, 2);
        cache.guest_stopped(stopped).unwrap();
        cache.commit(stopped, &pool).unwrap();
        let byte = |page: u64| {
            let at = GuestAddress((1 << 30) + page * PAGE_SIZE);
            memory.read_obj::<u8>(at).unwrap()
        };
        assert_eq!([byte(4), byte(5), byte(7)], [1, 1, 2]);
        let marked = (0..64).filter(|page| region.get_mmap().bitmap().dirty_at(page * PAGE));
        assert_eq!(marked.collect::<Vec<_>>(), [5]);
    }

    fn a_range_outside_its_block_is_refused_and_named(kind: CacheKind) {
        for in_colo in [false, true] {
            let secondary = Secondary::new(kind, 2);
            let cache = &secondary.cache;
            if in_colo {
                cache.enter_colo().unwrap();
            }
            let len = 2 * PAGE_SIZE;
            for (offset, n) in [
                (len, 1),
                (len - 1, 2),
                (u64::MAX, 1),
                (1, usize::MAX),
                (0, 2 * PAGE + 1),
            ] {
                let results = [
                    cache.prepare(0, offset, n).map(drop),
                    cache.landed(0, offset, n),
                    cache.zero(0, offset, n),
                ];
                for result in results {
                    assert!(
                        matches!(&result, Err(CacheError::OutOfBlock { name, offset: o, len: l, block_len })
                            if name == "ram at 0" && *o == offset && *l == n && *block_len == 2 * PAGE),
                        "{result:?}"
                    );
                }
            }
            assert!(matches!(
                cache.prepare(1, 0, 1).map(drop),
                Err(CacheError::NoBlock {
                    block: 1,
                    blocks: 1
                })
            ));
            assert!(matches!(
                cache.or_dirty_word(0, 0, 0b100),
                Err(CacheError::Bitmap { .. })
            ));
            assert_eq!(cache.dirty_pages(), 0);
        }
    }

    fn blocks_that_are_no_ram_of_their_own_are_refused(kind: CacheKind) {
        let guest = region(4);
        let spec = |offset_in_region, len| CacheBlockSpec {
            name: format!("{offset_in_region}+{len}"),
            guest: Arc::clone(&guest).into(),
            offset_in_region,
            len,
        };
        let refused = |blocks| {
            let made = kind.make(blocks, DiscardControl::new().disable().unwrap());
            made.map(drop).unwrap_err()
        };
        for (offset, len) in [(0, 0), (0, PAGE + 1), (1, PAGE)] {
            assert!(matches!(
                refused(vec![spec(offset, len)]),
                CacheError::NotWholePages { .. }
            ));
        }
        for (offset, len) in [
            (0, 5 * PAGE),
            (4 * PAGE, PAGE),
            (PAGE, usize::MAX - PAGE + 1),
        ] {
            assert!(matches!(
                refused(vec![spec(offset, len)]),
                CacheError::OutsideRegion { .. }
            ));
        }
        let twice = refused(vec![spec(0, 2 * PAGE), spec(PAGE, PAGE)]);
        assert_eq!(
            twice.to_string(),
            "ram blocks '0+8192' and '4096+4096' overlap in guest memory"
        );
    }

    fn c11_discard_is_allowed_after_a_release_only_where_it_shows_no_old_page(kind: CacheKind) {
        let control = DiscardControl::new();
        let block = || vec![CacheBlockSpec::whole_region("pc.ram", region(1))];
        let cache = kind.make(block(), control.disable().unwrap()).unwrap();
        assert!(!control.allowed());
        assert!(control.require().is_err());
        cache.release();
        let is_mirror = kind == CacheKind::Mirror;
        assert_eq!(control.allowed(), is_mirror);
        assert_eq!(control.require().is_ok(), is_mirror);
        // However it goes.
        let control = DiscardControl::new();
        drop(kind.make(block(), control.disable().unwrap()).unwrap());
        assert_eq!(control.allowed(), is_mirror);
        assert_eq!(control.discard(|| ()).is_ok(), is_mirror);
    }

    fn c13_a_cache_that_cannot_be_made_is_a_typed_error_and_leaves_nothing_behind(kind: CacheKind) {
        // Twice this is the whole address space; the guest's part reserves nothing.
        let len = 64 << 40;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let huge = Arc::new(MmapRegion::<()>::build(None, len, libc::PROT_NONE, flags).unwrap());
        let control = DiscardControl::new();
        let small = region(64);
        small.as_volatile_slice().copy_from(&[7u8]);
        let blocks = vec![
            CacheBlockSpec::whole_region("pc.bios", Arc::clone(&small)),
            CacheBlockSpec::whole_region("pc.ram", huge),
        ];
        let error = kind.make(blocks, control.disable().unwrap()).map(drop);
        let error = error.unwrap_err();
        let is_memory = match &error {
            CacheError::Map { name, len: l, .. } => name == "pc.ram" && *l == len,
            // More places than can be told apart are not asked for.
            CacheError::Staging { .. } => kind == CacheKind::Cow,
            _ => false,
        };
        assert!(is_memory, "{error:?}");
        assert!(error.source().is_some());
        assert!(control.allowed());
        // The guest's memory is what it was.
        let mut byte = [0u8];
        small.as_volatile_slice().copy_to(&mut byte);
        assert_eq!(byte, [7]);
    }

    fn c21_a_block_that_grows_to_its_full_length_under_colo_is_cached_and_flushed_whole(
        kind: CacheKind,
    ) {
        let (used, full) = (8usize, 16usize);
        let secondary = Secondary::new(kind, full);
        // Precopy knew the length in use only.
        secondary.receive(0, 0, used, 1);
        secondary.cache.enter_colo().unwrap();
        // The block has grown: the primary sends its new pages, the secondary dirties one.
        secondary.receive(0, used, full - 1 - used, 2);
        secondary.write(0, full - 1, 9);
        assert_eq!(secondary.commit().pages, 8);
        for page in 0..full {
            let expected = match page {
                _ if page < used => 1,
                _ if page < full - 1 => 2,
                _ => 0,
            };
            assert_eq!(secondary.read(0, page), [expected; PAGE], "page {page}");
        }
        // The full length is the end.
        let beyond = secondary.cache.prepare(0, (full * PAGE) as u64, PAGE);
        assert!(beyond.is_err());
    }

    fn the_cache_stays_out_of_core_dumps(kind: CacheKind) {
        let secondary = Secondary::new(kind, 3);
        let is_left_out = || {
            let slice = secondary.cache.prepare(0, 0, PAGE).unwrap();
            let start = slice.ptr_guard().as_ptr().addr();
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut lines = maps.lines().skip_while(|line| {
                let range = line
                    .split_once(' ')
                    .and_then(|(range, _)| range.split_once('-'));
                let parsed = range.map(|(from, to)| {
                    (
                        usize::from_str_radix(from, 16),
                        usize::from_str_radix(to, 16),
                    )
                });
                !matches!(parsed, Some((Ok(from), Ok(to))) if (from..to).contains(&start))
            });
            let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
            flags.split_whitespace().any(|flag| flag == "dd")
        };
        assert!(is_left_out());
        secondary.cache.enter_colo().unwrap();
        assert!(is_left_out());
    }
}
