//! Pages that follow each other, as ranges.

use migration_stream::PAGE_SIZE;

const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// The ranges `(offset, length)` in bytes of pages that follow each other both in `offsets` and in
/// memory, in their order.
pub(crate) fn runs(offsets: &[u64]) -> impl Iterator<Item = (u64, usize)> + '_ {
    offsets
        .chunk_by(|a, b| a.checked_add(PAGE_SIZE) == Some(*b))
        .filter_map(|run| run.first().map(|first| (*first, run.len() * PAGE_LEN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_follow_each_other_make_a_run() {
        let got: Vec<_> = runs(&[0x1000, 0x2000, 0x2000, 0x1000, 0x5000, 0x6000, 0x7000]).collect();
        assert_eq!(
            got,
            [
                (0x1000, 8192),
                (0x2000, 4096),
                (0x1000, 4096),
                (0x5000, 3 * 4096)
            ]
        );
        assert_eq!(runs(&[]).count(), 0);
    }
}
