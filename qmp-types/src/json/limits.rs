//! What a value of JSON may take.

/// What one value may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all its tokens, white space not counted.
    pub bytes: usize,
    /// Tokens. Each may cost some tens of bytes of memory in addition to its text.
    pub tokens: usize,
    /// Objects and lists inside each other.
    pub depth: usize,
}

impl Limits {
    /// What a server takes from a client: 1 MiB, 65536 tokens, 128 levels. (QEMU: 64 MiB, 2 Mi
    /// tokens, 1024 levels.)
    pub const REQUEST: Self = Self {
        bytes: 1 << 20,
        tokens: 1 << 16,
        depth: 128,
    };

    /// What a client takes from a server: 16 MiB, as a schema is large.
    pub const REPLY: Self = Self {
        bytes: 16 << 20,
        tokens: 1 << 20,
        depth: 128,
    };
}
