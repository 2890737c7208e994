//! What can be wrong with a RAM section's body.

use crate::ram::RamBlockError;
use crate::raw::mapped_ram::LayoutError;

/// What is wrong with a RAM section's body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The flags are no record's.
    #[error("unknown combination of ram flags {flags:#x}")]
    UnknownFlags {
        /// The low bits of the record's first word.
        flags: u64,
    },
    /// An XBZRLE record; that capability is not on.
    #[error("xbzrle record, but xbzrle is not in use")]
    Xbzrle,
    /// An XBZRLE record of an encoding that does not exist.
    #[error("xbzrle record of encoding {encoding}, expected 1")]
    XbzrleEncoding {
        /// What stands there.
        encoding: u8,
    },
    /// An XBZRLE record longer than a page.
    #[error("xbzrle record of {len} bytes, expected at most 4096")]
    XbzrleLength {
        /// What stands there.
        len: u16,
    },
    /// The runs of an XBZRLE record are not sound.
    #[error(transparent)]
    XbzrleRuns(#[from] crate::raw::xbzrle::XbzrleError),
    /// Checkpoints of a stream with XBZRLE, which would land on the wrong pages.
    #[error("xbzrle does not go together with colo checkpoints")]
    XbzrleWithCheckpoints,
    /// A HOOK record, which only RDMA sends.
    #[error("rdma hook record, but rdma is not in use")]
    Hook,
    /// A COMPRESS_PAGE record, which QEMU 9.1 removed.
    #[error("compressed page record, which QEMU 9.1 removed")]
    Compressed,
    /// A record that has no offset has one.
    #[error("offset {offset:#x} in a ram record with flags {flags:#x}, expected 0")]
    UnexpectedOffset {
        /// The record's flags.
        flags: u64,
        /// What stands there.
        offset: u64,
    },
    /// A record of "the same block as before" before any block was named.
    #[error("page record continues a block, but none was named on this channel")]
    NothingToContinue,
    /// A block that this side does not have.
    #[error("unknown ram block '{name}'", name = crate::Escaped(.name))]
    UnknownBlock {
        /// Its name.
        name: String,
    },
    /// A page that does not lie in its block.
    #[error("page at {offset:#x} is outside ram block '{name}' of {used_length:#x} bytes", name = crate::Escaped(.name))]
    OutOfBlock {
        /// The block's name.
        name: String,
        /// Offset of the page in the block, bytes.
        offset: u64,
        /// Length of the block, bytes.
        used_length: u64,
    },
    /// A zero page with a fill byte that is not zero.
    #[error("zero page record with fill byte {value:#04x}, expected 0")]
    FillByte {
        /// The byte.
        value: u8,
    },
    /// A MULTIFD_FLUSH record; multifd is not in use.
    #[error("multifd flush record, but multifd is not in use")]
    UnexpectedFlush,
    /// A block list outside a set-up section, or a second one.
    #[error("ram block list outside of set-up")]
    UnexpectedSetup,
    /// Something else stands where the block list belongs.
    #[error("ram record with flags {flags:#x} before the block list")]
    SetupMissing {
        /// The record's flags.
        flags: u64,
    },
    /// The stream's RAM was not set up and left.
    #[error("a checkpoint before ram was set up")]
    NotSetUp,
    /// The blocks are longer than the total announced before them.
    #[error(
        "ram block '{name}' of {used_length:#x} bytes, but only {remaining:#x} of the announced total are left", name = crate::Escaped(.name))]
    SetupOverrun {
        /// The block.
        name: String,
        /// Its length, bytes.
        used_length: u64,
        /// What is left of the total, bytes.
        remaining: u64,
    },
    /// A block has another length on this side.
    #[error("ram block '{name}' of {received:#x} bytes, expected {local:#x}", name = crate::Escaped(.name))]
    BlockLength {
        /// The block.
        name: String,
        /// Its length at the source, bytes.
        received: u64,
        /// Its length here, bytes.
        local: u64,
    },
    /// A block of this side is not in the list.
    #[error("ram block '{name}' is missing from the block list", name = crate::Escaped(.name))]
    BlockMissing {
        /// The block.
        name: String,
    },
    /// Only one side leaves shared blocks alone (the capability `x-ignore-shared`).
    #[error("the source {}, this side {}", ignoring(*.received), ignoring(!*.received))]
    IgnoreShared {
        /// Whether it is the source.
        received: bool,
    },
    /// A block that both sides share is somewhere else in the guest.
    #[error("shared ram block '{name}' at {received:#x}, expected at {local:#x}", name = crate::Escaped(.name))]
    Address {
        /// The block.
        name: String,
        /// Its guest physical address at the source.
        received: u64,
        /// Its guest physical address here.
        local: u64,
    },
    /// A page of a block that both sides share and none sends.
    #[error("page of the shared ram block '{name}', which is not migrated", name = crate::Escaped(.name))]
    IgnoredBlock {
        /// The block.
        name: String,
    },
    /// A block's place in a mapped-ram file is not sound.
    #[error("ram block '{name}'", name = crate::Escaped(.name))]
    MappedRam {
        /// The block.
        name: String,
        /// What is wrong.
        source: LayoutError,
    },
    /// A page record where pages have their places in the file.
    #[error("ram record with flags {flags:#x} in a stream with mapped-ram")]
    RecordInMappedRam {
        /// The record's flags.
        flags: u64,
    },
    /// A stream with mapped-ram where there is no file to take the pages from.
    #[error("mapped-ram, but not read from a file")]
    NoFile,
    /// The list is no valid block table.
    #[error(transparent)]
    Block(#[from] RamBlockError),
}

fn ignoring(ignores: bool) -> &'static str {
    if ignores {
        "ignores shared ram blocks"
    } else {
        "migrates them all"
    }
}
