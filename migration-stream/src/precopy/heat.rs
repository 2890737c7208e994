//! Which pages are written so often that it is of no use to send them before the guest stops.

use crate::ram::{BlockId, RamBlockTable};

/// Readings of the dirty log that are remembered.
const ROUNDS: usize = 3;

/// The pages that the last readings of the dirty log have reported. A page is *hot* if most of them
/// have.
#[derive(Debug)]
pub struct Heat {
    /// A bit a page for each block, one map for each of the last rounds.
    rounds: [Vec<Vec<u64>>; ROUNDS],
    current: usize,
}

impl Heat {
    /// Nothing is hot yet.
    pub fn new(table: &RamBlockTable) -> Self {
        let words = |pages: u64| usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        let map: Vec<Vec<u64>> = table
            .iter()
            .map(|(_, block)| vec![0; words(block.pages())])
            .collect();
        Self {
            rounds: std::array::from_fn(|_| map.clone()),
            current: 0,
        }
    }

    /// The log is about to be read again.
    pub fn begin_round(&mut self) {
        self.current = (self.current + 1) % ROUNDS;
        if let Some(round) = self.rounds.get_mut(self.current) {
            round.iter_mut().for_each(|map| map.fill(0));
        }
    }

    /// The log reports pages, as [`DirtyLog::sync`](crate::DirtyLog::sync) does.
    pub fn note(&mut self, block: BlockId, first_page: u64, word: u64) {
        let place = self
            .rounds
            .get_mut(self.current)
            .and_then(|round| round.get_mut(block.index()))
            .zip(usize::try_from(first_page / 64).ok())
            .and_then(|(map, index)| map.get_mut(index));
        if let Some(place) = place {
            *place |= word;
        }
    }

    /// The hot pages of 64: those of word `index` of a block.
    pub fn hot(&self, block: usize, index: usize) -> u64 {
        let word = |round: &Vec<Vec<u64>>| {
            let map = round.get(block)?;
            map.get(index).copied()
        };
        let [a, b, c] = self.rounds.each_ref().map(|round| word(round).unwrap_or(0));
        (a & b) | (a & c) | (b & c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use crate::ram::RamBlock;

    #[test]
    fn a_page_is_hot_that_most_of_the_last_rounds_report() {
        let blocks = vec![RamBlock::new("ram", 130 * PAGE_SIZE).unwrap()];
        let mut heat = Heat::new(&RamBlockTable::new(blocks).unwrap());
        let ram = BlockId::new(0);
        // Page 64 is written in each round, 65 in every second, 66 once, 67 in two that follow.
        let mut hot = Vec::new();
        for word in [0b1111_u64, 0b1001, 0b0011, 0b0001, 0b0011] {
            heat.begin_round();
            heat.note(ram, 64, word);
            hot.push(heat.hot(0, 1));
        }
        assert_eq!(hot, [0, 0b1001, 0b1011, 0b0001, 0b0011]);
        assert_eq!(heat.hot(0, 0), 0);
        // Nothing of the kind.
        heat.note(BlockId::new(1), 0, 1);
        heat.note(ram, 1 << 40, 1);
        assert_eq!(heat.hot(7, 7), 0);
    }
}
