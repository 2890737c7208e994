use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Set(u64),
    Range(u64, u64),
    Word(u64, u64),
    Drain,
    DrainSome(usize),
}

fn ops(pages: u64) -> impl Strategy<Value = Vec<Op>> {
    // A little beyond the end, so that refusals are part of the model.
    let page = 0..pages + 3;
    let op = prop_oneof![
        4 => page.clone().prop_map(Op::Set),
        4 => (page.clone(), 0..200u64).prop_map(|(p, n)| Op::Range(p, n)),
        2 => (0..pages / 64 + 2, any::<u64>()).prop_map(|(w, bits)| Op::Word(w * 64, bits)),
        1 => Just(Op::Drain),
        1 => (0..4usize).prop_map(Op::DrainSome),
    ];
    proptest::collection::vec(op, 0..40)
}

fn runs_of(model: &BTreeSet<u64>) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for &page in model {
        match runs.last_mut() {
            Some(run) if run.first_page + run.pages == page => run.pages += 1,
            _ => runs.push(PageRun {
                first_page: page,
                pages: 1,
            }),
        }
    }
    runs
}

proptest! {
    #[test]
    fn the_bitmap_behaves_as_a_set_of_pages(
        (pages, ops) in (1..400u64).prop_flat_map(|pages| (Just(pages), ops(pages))),
    ) {
        let bitmap = DirtyBitmap::new(pages).unwrap();
        let mut model = BTreeSet::new();
        for op in ops {
            match op {
                Op::Set(page) => {
                    prop_assert_eq!(bitmap.set(page).is_ok(), page < pages);
                    if page < pages {
                        model.insert(page);
                    }
                }
                Op::Range(first, count) => {
                    let fits = first + count <= pages;
                    prop_assert_eq!(bitmap.set_range(first, count).is_ok(), fits);
                    if fits {
                        model.extend(first..first + count);
                    }
                }
                Op::Word(first, bits) => {
                    let set: Vec<u64> =
                        (0..64).filter(|i| bits >> i & 1 == 1).map(|i| first + i).collect();
                    let fits = set.iter().all(|&page| page < pages);
                    prop_assert_eq!(bitmap.or_word(first, bits).is_ok(), fits);
                    if fits {
                        model.extend(set);
                    }
                }
                Op::Drain => {
                    let drained: Vec<_> = bitmap.drain_runs().collect();
                    prop_assert_eq!(drained, runs_of(&model));
                    model.clear();
                }
                Op::DrainSome(count) => {
                    let drained: Vec<_> = bitmap.drain_runs().take(count).collect();
                    prop_assert_eq!(&drained[..], &runs_of(&model)[..drained.len()]);
                    for run in drained {
                        for page in run.first_page..run.first_page + run.pages {
                            model.remove(&page);
                        }
                    }
                }
            }
            prop_assert_eq!(bitmap.count(), model.len() as u64);
            for page in 0..pages {
                prop_assert_eq!(bitmap.test(page).unwrap(), model.contains(&page));
            }
        }
        for (index, word) in bitmap.snapshot().into_iter().enumerate() {
            for bit in 0..64 {
                let page = index as u64 * 64 + bit;
                prop_assert_eq!(word >> bit & 1 == 1, model.contains(&page));
            }
        }
    }
}

proptest! {
    #[test]
    fn shares_cover_every_marked_page_once_and_are_balanced(
        words in proptest::collection::vec(any::<u64>(), 1..40),
        pages in 0..500u64,
    ) {
        let bitmap = DirtyBitmap::new(words.len() as u64 * 64).unwrap();
        for (index, &word) in words.iter().enumerate() {
            bitmap.or_word(index as u64 * 64, word).unwrap();
        }
        let total = bitmap.count();
        let shares = bitmap.shares(pages);
        prop_assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        let sizes: Vec<u64> = shares
            .into_iter()
            .map(|share| bitmap.drain_words(share).map(|run| run.pages).sum())
            .collect();
        prop_assert_eq!(sizes.iter().sum::<u64>(), total);
        let (_, whole) = sizes.split_last().unwrap_or((&0, &[]));
        prop_assert!(whole.iter().all(|&size| (pages..pages.max(1) + 64).contains(&size)));
    }
}

#[test]
fn a_run_across_many_words_comes_out_as_one() {
    let bitmap = DirtyBitmap::new(1000).unwrap();
    bitmap.set_range(60, 900).unwrap();
    let runs: Vec<_> = bitmap.drain_runs().collect();
    assert_eq!(
        runs,
        [PageRun {
            first_page: 60,
            pages: 900
        }]
    );
    assert_eq!(bitmap.count(), 0);
}

#[test]
fn a_word_of_a_dirty_log_must_be_aligned_and_inside() {
    let bitmap = DirtyBitmap::new(70).unwrap();
    assert_eq!(
        bitmap.or_word(1, 1),
        Err(BitmapError::Unaligned { first_page: 1 })
    );
    bitmap.or_word(64, 0b10_0000).unwrap();
    assert!(bitmap.or_word(64, 0b100_0000).is_err());
    assert!(bitmap.or_word(128, 1).is_err());
    // KVM reports whole words, zero padded.
    bitmap.or_word(128, 0).unwrap();
    assert_eq!(bitmap.snapshot(), [0, 0b10_0000]);
}

#[test]
fn a_range_that_overflows_is_refused() {
    let bitmap = DirtyBitmap::new(64).unwrap();
    assert!(bitmap.set_range(u64::MAX, 2).is_err());
    assert!(bitmap.set_range(2, u64::MAX).is_err());
    assert!(bitmap.set_range(65, 0).is_err());
    assert_eq!(bitmap.count(), 0);
}

#[test]
fn a_bitmap_too_large_for_memory_is_an_error() {
    assert_eq!(
        DirtyBitmap::new(u64::MAX).map(|b| b.pages()),
        Err(BitmapError::NoMemory { pages: u64::MAX })
    );
}

#[test]
fn threads_that_mark_while_another_drains_lose_no_page_and_repeat_none() {
    const PAGES: u64 = 64 * 257 + 13;
    const THREADS: u64 = 4;
    let bitmap = DirtyBitmap::new(PAGES).unwrap();
    let mut times_drained = vec![0u8; usize::try_from(PAGES).unwrap()];
    let mut take = || {
        for run in bitmap.drain_runs() {
            for page in run.first_page..run.first_page + run.pages {
                times_drained[usize::try_from(page).unwrap()] += 1;
            }
        }
    };
    std::thread::scope(|scope| {
        let setters: Vec<_> = (0..THREADS)
            .map(|thread| {
                let bitmap = &bitmap;
                // Interleaved, so that every word is shared by all setters.
                scope.spawn(move || {
                    for page in (thread..PAGES).step_by(4) {
                        bitmap.set(page).unwrap();
                    }
                })
            })
            .collect();
        while !setters.iter().all(|setter| setter.is_finished()) {
            take();
        }
    });
    take();
    assert!(times_drained.iter().all(|&times| times == 1));
    assert_eq!(bitmap.count(), 0);
}
