//! RAM blocks: the named, contiguous pieces of guest memory that a migration moves.

use std::fmt;

use crate::PAGE_SIZE;

/// The index of a block in its [`RamBlockTable`]. It never goes on the wire; names do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(u32);

impl BlockId {
    /// The id of the `index`-th block of a table.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The position in the table.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// One RAM block: its name on the wire (QEMU's `idstr`) and its length in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    name: String,
    used_length: u64,
    address: u64,
    is_shared: bool,
}

impl RamBlock {
    /// A block called `name` of `used_length` bytes.
    ///
    /// # Errors
    /// The name must be 1 to 255 bytes without NUL (it travels as a counted string, and zero
    /// padded in multifd packets), the length a non-zero multiple of [`PAGE_SIZE`].
    pub fn new(name: impl Into<String>, used_length: u64) -> Result<Self, RamBlockError> {
        let name = name.into();
        if name.is_empty() || name.len() > 255 || name.bytes().any(|b| b == 0) {
            return Err(RamBlockError::Name { name });
        }
        if used_length == 0 || !used_length.is_multiple_of(PAGE_SIZE) {
            return Err(RamBlockError::Length { name, used_length });
        }
        Ok(Self {
            name,
            used_length,
            address: 0,
            is_shared: false,
        })
    }

    /// The same block at this guest physical address, 0 without it. Only the capability
    /// `x-ignore-shared` announces it.
    #[must_use]
    pub const fn at(mut self, address: u64) -> Self {
        self.address = address;
        self
    }

    /// The same block in memory that the other side maps too (a file, `share=on`).
    #[must_use]
    pub const fn shared(mut self) -> Self {
        self.is_shared = true;
        self
    }

    /// The name that identifies the block on both sides.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    #[must_use]
    pub const fn used_length(&self) -> u64 {
        self.used_length
    }

    /// Where the guest has it, for blocks that are announced with it.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Number of pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.used_length / PAGE_SIZE
    }
}

/// The RAM blocks of a VM, in the order in which they are announced.
///
/// A table that exists is valid: at least one block, at most [`RamBlockTable::MAX_BLOCKS`], unique
/// names, and a total that fits in 63 bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlockTable {
    blocks: Vec<RamBlock>,
    /// The blocks in the order of their names: every page of a hostile stream may name another block.
    by_name: Vec<BlockId>,
    total: u64,
    ignores_shared: bool,
}

impl RamBlockTable {
    /// More blocks than any machine has; it bounds what a hostile peer can make us look at.
    pub const MAX_BLOCKS: usize = 1024;

    /// A table of `blocks`.
    ///
    /// # Errors
    /// No block, too many, a name twice, or a total length beyond 63 bits.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, RamBlockError> {
        if blocks.is_empty() || blocks.len() > Self::MAX_BLOCKS {
            return Err(RamBlockError::Count {
                count: blocks.len(),
            });
        }
        // MAX_BLOCKS fits in u32.
        #[allow(clippy::cast_possible_truncation)]
        let mut by_name: Vec<_> = (0..blocks.len() as u32).map(BlockId).collect();
        let name = |id: &BlockId| blocks.get(id.index()).map(|b| b.name.as_str());
        by_name.sort_by_key(name);
        let mut names = by_name.iter().filter_map(name);
        let mut last = names.next();
        for name in names {
            if last.replace(name) == Some(name) {
                return Err(RamBlockError::Duplicate {
                    name: name.to_owned(),
                });
            }
        }
        let mut total = 0u64;
        for block in &blocks {
            total = total
                .checked_add(block.used_length)
                .filter(|t| *t <= i64::MAX.unsigned_abs())
                .ok_or(RamBlockError::Total)?;
        }
        Ok(Self {
            blocks,
            by_name,
            total,
            ignores_shared: false,
        })
    }

    /// The same blocks, of which the [shared](RamBlock::shared) ones are announced, with the
    /// addresses of all, but their pages stay where they are (the capability `x-ignore-shared`,
    /// which both sides have to have).
    #[must_use]
    pub const fn ignoring_shared(mut self) -> Self {
        self.ignores_shared = true;
        self
    }

    /// Whether it is a table [ignoring shared blocks](Self::ignoring_shared).
    #[must_use]
    pub const fn ignores_shared(&self) -> bool {
        self.ignores_shared
    }

    /// Whether the pages of a block stay where they are.
    #[must_use]
    pub fn is_ignored(&self, id: BlockId) -> bool {
        self.ignores_shared && self.get(id).is_some_and(|b| b.is_shared)
    }

    /// The block with this id, `None` for an id of another table.
    #[must_use]
    pub fn get(&self, id: BlockId) -> Option<&RamBlock> {
        self.blocks.get(id.index())
    }

    /// The id of the block called `name`.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<BlockId> {
        let name_of = |id: &BlockId| self.get(*id).map_or(&b""[..], |b| b.name.as_bytes());
        let found = self.by_name.binary_search_by_key(&name, name_of).ok()?;
        self.by_name.get(found).copied()
    }

    /// All blocks with their ids, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockId, &RamBlock)> + '_ {
        // MAX_BLOCKS fits in u32.
        #[allow(clippy::cast_possible_truncation)]
        self.blocks
            .iter()
            .enumerate()
            .map(|(i, b)| (BlockId(i as u32), b))
    }

    /// Sum of the used lengths, bytes.
    #[must_use]
    pub const fn total_bytes(&self) -> u64 {
        self.total
    }

    /// As [`RamBlockTable::total_bytes`], without the blocks whose pages stay where they are.
    #[must_use]
    pub fn migrated_bytes(&self) -> u64 {
        let migrated = self.iter().filter(|(id, _)| !self.is_ignored(*id));
        migrated.map(|(_, b)| b.used_length).sum()
    }

    /// Number of blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Never true: a table has at least one block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// What is wrong with a block or a table of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamBlockError {
    /// The name cannot be put on the wire.
    #[error("ram block name '{name}' is not 1 to 255 bytes without nul", name = crate::Escaped(.name))]
    Name {
        /// The name refused.
        name: String,
    },
    /// The length is not a non-zero multiple of the page size.
    #[error(
        "ram block '{name}': length {used_length:#x} is not a non-zero multiple of the page size", name = crate::Escaped(.name))]
    Length {
        /// The block.
        name: String,
        /// Its length in bytes.
        used_length: u64,
    },
    /// Too few or too many blocks.
    #[error("{count} ram blocks, expected 1 to {max}", max = RamBlockTable::MAX_BLOCKS)]
    Count {
        /// How many there were.
        count: usize,
    },
    /// Two blocks of one name.
    #[error("ram block '{name}' is there twice", name = crate::Escaped(.name))]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The lengths do not add up within 63 bits.
    #[error("the ram blocks together are longer than 63 bits can say")]
    Total,
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}
