//! Requests of the destination for the pages that its guest waits for.

use crate::ram::{BlockId, RamBlockTable};
use crate::raw::return_path::ReturnPathMessage;
use crate::{IdStr, IdStrError, PAGE_SIZE};

/// A run of pages that the destination's guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// The block.
    pub block: BlockId,
    /// First byte in the block, a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Number of bytes, a multiple of [`PAGE_SIZE`] and not 0. Not beyond the block.
    pub length: u32,
}

/// The source's side of one return path, which remembers the block named last.
#[derive(Clone, Debug, Default)]
pub struct RequestDecoder {
    last: Option<BlockId>,
}

impl RequestDecoder {
    /// For a return path on which nothing was asked for yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: None }
    }

    /// The request that a message is, `None` for a message of another kind.
    ///
    /// # Errors
    /// [`RequestError`]; the block named last is what it was.
    pub fn request(
        &mut self,
        message: &ReturnPathMessage,
        blocks: &RamBlockTable,
    ) -> Result<Option<PageRequest>, RequestError> {
        let (block, start, length) = match message {
            ReturnPathMessage::ReqPagesId {
                start,
                length,
                block,
            } => {
                let id = blocks.find(block.as_str().as_bytes());
                let id = id.ok_or_else(|| RequestError::UnknownBlock {
                    name: block.as_str().to_owned(),
                })?;
                (id, *start, *length)
            }
            ReturnPathMessage::ReqPages { start, length } => {
                let last = self.last.ok_or(RequestError::NoBlock)?;
                (last, *start, *length)
            }
            _ => return Ok(None),
        };
        let request = PageRequest {
            block,
            start,
            length,
        };
        check(request, blocks)?;
        self.last = Some(block);
        Ok(Some(request))
    }
}

/// The destination's side of one return path, which names a block only where it is another than
/// the one named last. Nothing but a new connection makes it forget that.
#[derive(Clone, Debug, Default)]
pub struct RequestEncoder {
    last: Option<BlockId>,
}

impl RequestEncoder {
    /// For a return path on which nothing was asked for yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: None }
    }

    /// The message that asks for these pages.
    ///
    /// # Errors
    /// [`RequestError`]: they are none of `blocks`.
    pub fn request(
        &mut self,
        request: PageRequest,
        blocks: &RamBlockTable,
    ) -> Result<ReturnPathMessage, RequestError> {
        let name = check(request, blocks)?;
        let PageRequest {
            block,
            start,
            length,
        } = request;
        if self.last == Some(block) {
            return Ok(ReturnPathMessage::ReqPages { start, length });
        }
        let name = IdStr::new(name).map_err(RequestError::Name)?;
        self.last = Some(block);
        Ok(ReturnPathMessage::ReqPagesId {
            start,
            length,
            block: name,
        })
    }
}

/// The name of the block that the pages are in.
fn check(request: PageRequest, blocks: &RamBlockTable) -> Result<&str, RequestError> {
    let PageRequest {
        block,
        start,
        length,
    } = request;
    let found = blocks
        .get(block)
        .ok_or_else(|| RequestError::UnknownBlock {
            name: block.to_string(),
        })?;
    let (name, used_length) = (found.name(), found.used_length());
    if blocks.is_ignored(block) {
        return Err(RequestError::IgnoredBlock {
            name: name.to_owned(),
        });
    }
    if length == 0 || !start.is_multiple_of(PAGE_SIZE) || u64::from(length) % PAGE_SIZE != 0 {
        return Err(RequestError::Alignment { start, length });
    }
    match start.checked_add(u64::from(length)) {
        Some(end) if end <= used_length => Ok(name),
        _ => Err(RequestError::OutOfBlock {
            name: name.to_owned(),
            start,
            length,
            used_length,
        }),
    }
}

/// What is wrong with a request for pages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// It names no block, and none was named before.
    #[error("request for pages of the block named last, but none was named")]
    NoBlock,
    /// It names a block that there is not.
    #[error("request for pages of an unknown ram block '{name}'", name = crate::Escaped(.name))]
    UnknownBlock {
        /// Its name.
        name: String,
    },
    /// It names a block that both sides share and none sends.
    #[error("request for pages of the shared ram block '{name}', which is not migrated", name = crate::Escaped(.name))]
    IgnoredBlock {
        /// Its name.
        name: String,
    },
    /// Not whole pages, or none.
    #[error("request for {length:#x} bytes from {start:#x} on, expected whole pages")]
    Alignment {
        /// First byte.
        start: u64,
        /// Number of bytes.
        length: u32,
    },
    /// Pages that do not lie in the block.
    #[error(
        "request for {length:#x} bytes from {start:#x} on, outside ram block '{name}' of \
         {used_length:#x} bytes", name = crate::Escaped(.name))]
    OutOfBlock {
        /// The block's name.
        name: String,
        /// First byte.
        start: u64,
        /// Number of bytes.
        length: u32,
        /// Length of the block, bytes.
        used_length: u64,
    },
    /// The block's name cannot go on the wire.
    #[error(transparent)]
    Name(IdStrError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ram::RamBlock;

    fn blocks() -> RamBlockTable {
        RamBlockTable::new(vec![
            RamBlock::new("pc.ram", 0x10_0000).unwrap(),
            RamBlock::new("vga", 0x4000).unwrap(),
            RamBlock::new("shared", 0x4000).unwrap().shared(),
        ])
        .unwrap()
        .ignoring_shared()
    }

    fn request(block: u32, start: u64, length: u32) -> PageRequest {
        PageRequest {
            block: BlockId::new(block),
            start,
            length,
        }
    }

    #[test]
    fn a_block_is_named_where_it_changes() {
        let mut encoder = RequestEncoder::new();
        let mut decoder = RequestDecoder::new();
        for (asked, is_named) in [
            (request(0, 0xc0000, 4096), true),
            (request(0, 0xc1000, 8192), false),
            (request(1, 0, 0x4000), true),
            (request(0, 0, 4096), true),
        ] {
            let message = encoder.request(asked, &blocks()).unwrap();
            assert_eq!(
                matches!(message, ReturnPathMessage::ReqPagesId { .. }),
                is_named
            );
            assert_eq!(decoder.request(&message, &blocks()).unwrap(), Some(asked));
        }
        let other = decoder.request(&ReturnPathMessage::Pong(1), &blocks());
        assert_eq!(other, Ok(None));
    }

    #[test]
    fn what_cannot_be_answered_is_refused_and_leaves_no_trace() {
        let mut decoder = RequestDecoder::new();
        let mut ask = |name: Option<&str>, start, length| {
            let message = match name {
                None => ReturnPathMessage::ReqPages { start, length },
                Some(name) => ReturnPathMessage::ReqPagesId {
                    start,
                    length,
                    block: IdStr::new(name).unwrap(),
                },
            };
            decoder.request(&message, &blocks())
        };
        assert_eq!(ask(None, 0, 4096), Err(RequestError::NoBlock));
        let unknown = RequestError::UnknownBlock { name: "foo".into() };
        assert_eq!(ask(Some("foo"), 0, 4096), Err(unknown));
        let name = "shared".into();
        let ignored = RequestError::IgnoredBlock { name };
        assert_eq!(ask(Some("shared"), 0, 4096), Err(ignored));
        for (start, length) in [(1, 4096), (0, 0), (0, 4095), (0x1000, 0xffff_ffff)] {
            assert_eq!(
                ask(Some("vga"), start, length),
                Err(RequestError::Alignment { start, length })
            );
        }
        for (start, length) in [(0x4000, 4096), (0x3000, 8192), (!0xfff, 4096)] {
            assert!(matches!(
                ask(Some("vga"), start, length),
                Err(RequestError::OutOfBlock { .. })
            ));
        }
        assert_eq!(ask(None, 0, 4096), Err(RequestError::NoBlock));
    }

    proptest! {
        #[test]
        fn only_whole_pages_of_a_block_are_asked_for(
            block in 0_u32..4,
            start in any::<u64>(),
            length in any::<u32>(),
        ) {
            let mut encoder = RequestEncoder::new();
            let asked = request(block, start % 0x12_0000, length % 0x12_0000);
            if encoder.request(asked, &blocks()).is_ok() {
                let blocks = blocks();
                let used = blocks.get(asked.block).unwrap().used_length();
                prop_assert!(asked.start + u64::from(asked.length) <= used);
                prop_assert!(asked.length > 0);
            }
        }
    }
}
