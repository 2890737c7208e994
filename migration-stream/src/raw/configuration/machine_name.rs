//! The name of a machine type.

use std::fmt;

use super::error::{ConfigurationError, MACHINE_NAME_MAX};

/// A machine type, such as `pc-q35-11.1`: 1 to [`MachineName::MAX_LEN`] bytes of UTF-8 without NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineName(Box<str>);

impl MachineName {
    /// The longest name, bytes. QEMU takes up to 4 GiB; its own names have some twenty bytes.
    pub const MAX_LEN: usize = MACHINE_NAME_MAX;

    /// `name` as a machine type.
    ///
    /// # Errors
    /// The name is empty, longer than [`MachineName::MAX_LEN`] bytes, or contains NUL.
    pub fn new(name: impl Into<Box<str>>) -> Result<Self, ConfigurationError> {
        let name = name.into();
        if name.is_empty() || name.len() > Self::MAX_LEN {
            return Err(ConfigurationError::MachineNameLength {
                len: u32::try_from(name.len()).unwrap_or(u32::MAX),
            });
        }
        if name.bytes().any(|b| b == 0) {
            return Err(ConfigurationError::MachineNameText);
        }
        Ok(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MachineName {
    /// Writes the name as [`Escaped`](crate::Escaped) does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::Escaped(&self.0).fmt(f)
    }
}
