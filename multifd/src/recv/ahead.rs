//! What has been read of a channel before it is known what it is: headers, mostly one.

use crate::packet::HEADER_LEN;

/// Headers that are read at once where packets bring nothing else.
const HEADERS: usize = 16;

/// A buffer that is filled behind and emptied in front.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; HEADERS * HEADER_LEN].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Room to read into behind what is there: for the rest of one header, or for as many as fit.
    pub(super) fn room(&mut self, for_many: bool) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let limit = if for_many {
            self.bytes.len()
        } else {
            HEADER_LEN.max(self.end)
        };
        &mut self.bytes[self.end..limit]
    }

    /// So much of the room has been filled.
    pub(super) fn filled(&mut self, len: usize) {
        self.end = (self.end + len).min(self.bytes.len());
    }

    /// The first `len` bytes are done with.
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len.min(self.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_comes_out_in_order_whatever_is_consumed_in_between() {
        let mut ahead = Ahead::new();
        assert_eq!(ahead.room(false).len(), HEADER_LEN);
        let many = ahead.room(true).len();
        assert_eq!(many, HEADERS * HEADER_LEN);
        let mut sent = 0_u8;
        let mut expected = std::collections::VecDeque::new();
        for (read, consumed) in [(5, 2), (HEADER_LEN, HEADER_LEN), (many, 7), (100, many)] {
            for byte in ahead.room(true).iter_mut().take(read) {
                *byte = sent;
                expected.push_back(sent);
                sent = sent.wrapping_add(1);
            }
            let room = ahead.room(true).len();
            ahead.filled(read.min(room));
            assert!(expected.iter().eq(ahead.bytes()));
            assert_eq!(ahead.len(), expected.len());
            ahead.consume(consumed);
            expected.drain(..consumed.min(expected.len()));
            assert!(expected.iter().eq(ahead.bytes()));
        }
        assert_eq!(ahead.len(), 0);
        // No more than a header where a payload may follow, and nothing where more is there.
        ahead.room(false).fill(1);
        ahead.filled(10);
        assert_eq!(ahead.room(false).len(), HEADER_LEN - 10);
        assert_eq!(ahead.room(true).len(), many - 10);
        ahead.filled(2 * HEADER_LEN);
        assert!(ahead.room(false).is_empty());
    }
}
