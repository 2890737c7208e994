//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p colo-ram-cache --lib loom`.

use loom::sync::Arc;
use loom::thread;

use super::*;

fn drain(bitmap: &DirtyBitmap, seen: &mut [u32; 128]) {
    for run in bitmap.drain_runs() {
        for page in run.first_page..run.first_page + run.pages {
            seen[usize::try_from(page).unwrap()] += 1;
        }
    }
}

#[test]
fn loom_no_bit_is_lost_or_seen_twice_when_setters_race_a_drain() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
        // They share the second word.
        let setters = [(62u64, 3u64), (65, 1)].map(|(first, count)| {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.set_range(first, count).unwrap())
        });
        let mut seen = [0; 128];
        drain(&bitmap, &mut seen);
        for setter in setters {
            setter.join().unwrap();
        }
        drain(&bitmap, &mut seen);
        for (page, times) in seen.into_iter().enumerate() {
            assert_eq!(times, u32::from((62..66).contains(&page)), "page {page}");
        }
    });
}

#[test]
fn loom_a_drained_page_shows_what_was_written_before_it_was_marked() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
        let page = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let setters = [0usize, 1].map(|index| {
            let (bitmap, page) = (Arc::clone(&bitmap), Arc::clone(&page));
            thread::spawn(move || {
                page[index].store(1, Ordering::Relaxed);
                bitmap.set(index as u64).unwrap();
            })
        });
        for run in bitmap.drain_runs() {
            for index in run.first_page..run.first_page + run.pages {
                let index = usize::try_from(index).unwrap();
                assert_eq!(page[index].load(Ordering::Relaxed), 1);
            }
        }
        for setter in setters {
            setter.join().unwrap();
        }
    });
}

#[test]
fn loom_a_page_that_a_thread_has_marked_is_never_passed_over_by_it() {
    // Another thread marks the same word and may not have come to its group yet, or drains it.
    for another_drains in [false, true] {
        loom::model(move || {
            let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
            let another = {
                let bitmap = Arc::clone(&bitmap);
                thread::spawn(move || {
                    let mut seen = [0; 128];
                    if another_drains {
                        drain(&bitmap, &mut seen);
                    } else {
                        bitmap.set(65).unwrap();
                    }
                    seen
                })
            };
            bitmap.set(64).unwrap();
            let mut seen = [0; 128];
            drain(&bitmap, &mut seen);
            if !another_drains {
                assert_eq!(seen[64], 1);
            }
            let also = another.join().unwrap();
            assert_eq!(seen[64] + also[64], 1);
            drain(&bitmap, &mut seen);
            assert_eq!(seen[64] + also[64], 1);
            assert_eq!(seen[65], u32::from(!another_drains));
        });
    }
}

#[test]
fn loom_a_drain_given_up_early_leaves_the_rest_marked() {
    loom::model(|| {
        let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
        bitmap.or_word(0, 0b101).unwrap();
        let setter = {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || bitmap.set(4).unwrap())
        };
        let first = bitmap.drain_runs().next().unwrap();
        assert_eq!((first.first_page, first.pages), (0, 1));
        setter.join().unwrap();
        assert_eq!(bitmap.snapshot(), [0b10100, 0]);
    });
}
