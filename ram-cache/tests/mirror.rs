//! What the cache promises to a COLO secondary, against naive models.
#![cfg(not(loom))] // loom's atomics work inside its models only

#[cfg(test)]
mod tests {
    use std::error::Error as _;
    use std::sync::Arc;

    use proptest::prelude::*;
    use ram_cache::{
        CacheBlockSpec, CacheError, DiscardControl, FlushPool, FlushReport, GuestStopped,
        MirrorCache, PAGE_SIZE,
    };
    use vm_memory::{Bytes, MmapRegion};

    const PAGE: usize = 4096;
    const _: () = assert!(PAGE as u64 == PAGE_SIZE);

    fn region(pages: usize) -> Arc<MmapRegion> {
        Arc::new(MmapRegion::new(pages * PAGE).unwrap())
    }

    fn cache_of(blocks: Vec<CacheBlockSpec>) -> MirrorCache {
        MirrorCache::new(blocks, DiscardControl::new().disable().unwrap()).unwrap()
    }

    fn one_block(pages: usize) -> MirrorCache {
        cache_of(vec![CacheBlockSpec::whole_region("pc.ram", region(pages))])
    }

    fn flush(cache: &MirrorCache, pool: &FlushPool) -> FlushReport {
        cache
            .flush(GuestStopped::witnessed_by(cache), pool)
            .unwrap()
    }

    fn read_guest(cache: &MirrorCache, block: usize, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        let slice = cache.guest_slice(block, (page * PAGE) as u64, PAGE);
        slice.unwrap().read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    fn fill_cache(cache: &MirrorCache, block: usize, page: usize, byte: u8) {
        let slice = cache.cache_slice(block, (page * PAGE) as u64, PAGE);
        slice.unwrap().copy_from(&[byte; PAGE]);
    }

    fn fill_guest(cache: &MirrorCache, block: usize, page: usize, byte: u8) {
        let slice = cache.guest_slice(block, (page * PAGE) as u64, PAGE);
        slice.unwrap().copy_from(&[byte; PAGE]);
    }

    /// What can happen to a page between two checkpoints, with the byte it is filled with.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Received(u8),
        ReceivedZero,
        DirtiedBySecondary(u8),
    }

    fn events() -> impl Strategy<Value = Vec<(usize, usize, Event)>> {
        let event = prop_oneof![
            any::<u8>().prop_map(Event::Received),
            Just(Event::ReceivedZero),
            any::<u8>().prop_map(Event::DirtiedBySecondary),
        ];
        proptest::collection::vec((0..2usize, 0..200usize, event), 0..300)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn after_each_flush_the_guest_equals_the_primary_and_before_it_nothing_received_shows(
            checkpoints in proptest::collection::vec(events(), 1..4),
            threads in 1..3usize,
        ) {
            const PAGES: [usize; 2] = [200, 70];
            let pool = FlushPool::new(threads).unwrap();
            // Two blocks in one mapping, with a hole between them.
            let guest = region(300);
            let block = |name: &str, first: usize, pages: usize| CacheBlockSpec {
                name: name.into(),
                guest: Arc::clone(&guest),
                offset_in_region: first * PAGE,
                len: pages * PAGE,
            };
            let cache = cache_of(vec![block("low", 0, PAGES[0]), block("high", 210, PAGES[1])]);
            // One byte stands for a page: what the primary has, and what the secondary's guest has.
            let mut primary = PAGES.map(|pages| vec![0u8; pages]);
            let mut secondary = primary.clone();
            for checkpoint in checkpoints {
                let mut marked = PAGES.map(|pages| vec![false; pages]);
                for (block, page, event) in checkpoint {
                    let page = page % PAGES[block];
                    let offset = (page * PAGE) as u64;
                    match event {
                        Event::Received(byte) => {
                            cache.mark(block, offset, PAGE).unwrap();
                            fill_cache(&cache, block, page, byte);
                            primary[block][page] = byte;
                        }
                        Event::ReceivedZero => {
                            cache.zero_cache_and_mark(block, offset, PAGE).unwrap();
                            primary[block][page] = 0;
                        }
                        Event::DirtiedBySecondary(byte) => {
                            fill_guest(&cache, block, page, byte);
                            let first = (page / 64 * 64) as u64;
                            cache.or_dirty_word(block, first, 1 << (page % 64)).unwrap();
                            secondary[block][page] = byte;
                        }
                    }
                    marked[block][page] = true;
                }
                for (block, pages) in secondary.iter().enumerate() {
                    for (page, &byte) in pages.iter().enumerate() {
                        prop_assert_eq!(read_guest(&cache, block, page), [byte; PAGE]);
                    }
                }
                let pages: usize = marked.iter().flatten().filter(|&&m| m).count();
                prop_assert_eq!(cache.dirty_pages(), pages as u64);
                let report = flush(&cache, &pool);
                prop_assert_eq!(report.pages, pages as u64);
                prop_assert_eq!(report.bytes, (pages * PAGE) as u64);
                if threads == 1 {
                    let runs = |block: &Vec<bool>| block.split(|&m| !m).filter(|r| !r.is_empty()).count();
                    prop_assert_eq!(report.runs, marked.iter().map(runs).sum::<usize>() as u64);
                }
                prop_assert_eq!(cache.dirty_pages(), 0);
                secondary = primary.clone();
                for (block, pages) in primary.iter().enumerate() {
                    for (page, &byte) in pages.iter().enumerate() {
                        prop_assert_eq!(read_guest(&cache, block, page), [byte; PAGE]);
                    }
                }
            }
            // The hole belongs to nobody.
            let mut hole = vec![0; 10 * PAGE];
            vm_memory::VolatileMemory::get_slice(&*guest, 200 * PAGE, 10 * PAGE)
                .unwrap()
                .read_slice(&mut hole, 0)
                .unwrap();
            prop_assert!(hole.iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn precopy_writes_both_copies_and_marks_nothing() {
        let cache = one_block(4);
        fill_cache(&cache, 0, 1, 7);
        cache.copy_to_guest(0, PAGE_SIZE, PAGE).unwrap();
        assert_eq!(read_guest(&cache, 0, 1), [7; PAGE]);
        cache.zero_both(0, PAGE_SIZE, PAGE).unwrap();
        assert_eq!(read_guest(&cache, 0, 1), [0; PAGE]);
        let mut cached = [1; PAGE];
        let slice = cache.cache_slice(0, PAGE_SIZE, PAGE).unwrap();
        slice.read_slice(&mut cached, 0).unwrap();
        assert_eq!(cached, [0; PAGE]);
        assert_eq!(cache.dirty_pages(), 0);
    }

    #[test]
    fn a_checkpoint_that_never_completes_leaves_the_guest_as_it_was() {
        let cache = one_block(4);
        fill_guest(&cache, 0, 2, 5);
        cache.mark(0, 2 * PAGE_SIZE, PAGE).unwrap();
        // The channel broke after half a page.
        let slice = cache.cache_slice(0, 2 * PAGE_SIZE, PAGE / 2).unwrap();
        slice.copy_from(&[9u8; PAGE / 2]);
        assert_eq!(read_guest(&cache, 0, 2), [5; PAGE]);
        cache.release();
    }

    #[test]
    fn a_range_marks_every_page_it_touches() {
        let cache = one_block(200);
        cache.mark(0, PAGE_SIZE - 1, 2).unwrap();
        assert_eq!(cache.dirty_pages(), 2);
        cache.mark(0, PAGE_SIZE * 100, 0).unwrap();
        assert_eq!(cache.dirty_pages(), 2);
        cache.mark(0, 0, 200 * PAGE).unwrap();
        assert_eq!(cache.dirty_pages(), 200);
    }

    #[test]
    fn a_large_flush_on_several_cores_copies_every_page() {
        const PAGES: usize = 4096;
        let pool = FlushPool::new(4).unwrap();
        let cache = one_block(PAGES);
        for page in (0..PAGES).filter(|page| page % 7 != 0) {
            cache.mark(0, (page * PAGE) as u64, PAGE).unwrap();
            fill_cache(&cache, 0, page, u8::try_from(page % 251 + 1).unwrap());
        }
        let report = flush(&cache, &pool);
        assert_eq!(report.pages, cache_pages(PAGES));
        for page in 0..PAGES {
            let expected = match page % 7 {
                0 => 0,
                _ => u8::try_from(page % 251 + 1).unwrap(),
            };
            assert_eq!(read_guest(&cache, 0, page), [expected; PAGE], "page {page}");
        }
    }

    fn cache_pages(pages: usize) -> u64 {
        (0..pages).filter(|page| page % 7 != 0).count() as u64
    }

    #[test]
    fn channel_threads_that_receive_at_once_lose_no_page() {
        const PAGES: usize = 1024;
        const CHANNELS: usize = 4;
        let cache = one_block(PAGES);
        let pool = FlushPool::new(2).unwrap();
        for round in 1..=3u8 {
            std::thread::scope(|scope| {
                for channel in 0..CHANNELS {
                    let cache = &cache;
                    scope.spawn(move || {
                        for page in (channel..PAGES).step_by(CHANNELS) {
                            cache.mark(0, (page * PAGE) as u64, PAGE).unwrap();
                            fill_cache(cache, 0, page, round);
                        }
                    });
                }
            });
            assert_eq!(flush(&cache, &pool).pages, PAGES as u64);
            for page in 0..PAGES {
                assert_eq!(read_guest(&cache, 0, page), [round; PAGE]);
            }
        }
    }

    #[test]
    fn a_range_outside_its_block_is_refused_and_named() {
        let cache = one_block(2);
        let len = 2 * PAGE_SIZE;
        for (offset, n) in [
            (len, 1),
            (len - 1, 2),
            (u64::MAX, 1),
            (1, usize::MAX),
            (0, 2 * PAGE + 1),
        ] {
            let results = [
                cache.cache_slice(0, offset, n).map(drop),
                cache.guest_slice(0, offset, n).map(drop),
                cache.copy_to_guest(0, offset, n),
                cache.zero_both(0, offset, n),
                cache.zero_cache_and_mark(0, offset, n),
                cache.mark(0, offset, n),
            ];
            for result in results {
                assert!(
                    matches!(&result, Err(CacheError::OutOfBlock { name, offset: o, len: l, block_len })
                        if name == "pc.ram" && *o == offset && *l == n && *block_len == 2 * PAGE),
                    "{result:?}"
                );
            }
        }
        assert!(matches!(
            cache.mark(1, 0, 1),
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

    #[test]
    fn blocks_that_are_no_ram_of_their_own_are_refused() {
        let guest = region(4);
        let spec = |offset_in_region, len| CacheBlockSpec {
            name: format!("{offset_in_region}+{len}"),
            guest: Arc::clone(&guest),
            offset_in_region,
            len,
        };
        let refused = |blocks| {
            MirrorCache::new(blocks, DiscardControl::new().disable().unwrap()).unwrap_err()
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

    #[test]
    fn c11_discard_is_allowed_again_after_the_cache_is_released() {
        let control = DiscardControl::new();
        let block = || vec![CacheBlockSpec::whole_region("pc.ram", region(1))];
        let cache = MirrorCache::new(block(), control.disable().unwrap()).unwrap();
        assert!(!control.allowed());
        assert!(control.require().is_err());
        cache.release();
        assert!(control.allowed());
        assert!(control.require().is_ok());
        // However it goes.
        drop(MirrorCache::new(block(), control.disable().unwrap()).unwrap());
        assert!(control.allowed());
    }

    #[test]
    fn c13_a_cache_that_cannot_be_made_is_a_typed_error_and_leaves_nothing_behind() {
        // Twice this is the whole address space; the guest's part reserves nothing.
        let len = 64 << 40;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let huge = Arc::new(MmapRegion::build(None, len, libc::PROT_NONE, flags).unwrap());
        let control = DiscardControl::new();
        let blocks = vec![
            CacheBlockSpec::whole_region("pc.bios", region(64)),
            CacheBlockSpec::whole_region("pc.ram", huge),
        ];
        let error = MirrorCache::new(blocks, control.disable().unwrap()).unwrap_err();
        assert!(
            matches!(&error, CacheError::Map { name, len: l, .. } if name == "pc.ram" && *l == len)
        );
        assert!(error.source().is_some());
        assert!(control.allowed());
    }

    #[test]
    fn c21_a_block_that_grows_to_its_full_length_under_colo_is_cached_and_flushed_whole() {
        let (used, full) = (8usize, 16usize);
        let cache = one_block(full);
        // Precopy knew the length in use only.
        for page in 0..used {
            fill_cache(&cache, 0, page, 1);
            cache.copy_to_guest(0, (page * PAGE) as u64, PAGE).unwrap();
        }
        // The block has grown: the primary sends its new pages, the secondary dirties one.
        for page in used..full - 1 {
            cache.mark(0, (page * PAGE) as u64, PAGE).unwrap();
            fill_cache(&cache, 0, page, 2);
        }
        fill_guest(&cache, 0, full - 1, 9);
        cache.or_dirty_word(0, 0, 1 << (full - 1)).unwrap();
        assert_eq!(flush(&cache, &FlushPool::new(1).unwrap()).pages, 8);
        for page in 0..full {
            let expected = match page {
                _ if page < used => 1,
                _ if page < full - 1 => 2,
                _ => 0,
            };
            assert_eq!(read_guest(&cache, 0, page), [expected; PAGE], "page {page}");
        }
        // The full length is the end.
        assert!(cache.mark(0, (full * PAGE) as u64, 1).is_err());
    }

    #[test]
    fn the_cache_stays_out_of_core_dumps() {
        let cache = one_block(3);
        let slice = cache.cache_slice(0, 0, 3 * PAGE).unwrap();
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
        assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    }
}
