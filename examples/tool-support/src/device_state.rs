//! The limit of device state, `--max-device-state`.

use std::fmt;

/// Says that a guest has more device state than is taken, and which option takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Excess {
    /// How much the guest has, bytes; `None` where it is not known.
    pub len: Option<u64>,
    /// The limit, bytes.
    pub max: u64,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.len {
            Some(len) => write!(
                f,
                "the guest has {len} bytes of device state, more than the {} that are taken",
                self.max
            ),
            None => write!(
                f,
                "the guest has more device state than the {} bytes that are taken",
                self.max
            ),
        }?;
        f.write_str(": a larger --max-device-state takes it")
    }
}
