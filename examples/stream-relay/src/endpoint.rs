//! Where a guest comes from or goes to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use multifd::{Address, AddressError};

/// A socket or a file, in QEMU's spelling of migration addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    Socket(Address),
    /// `file:PATH[,offset=BYTES]`.
    File {
        /// Its path.
        path: PathBuf,
        /// Where in it the stream begins, bytes.
        offset: u64,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(s: &str) -> Result<Self, EndpointError> {
        let Some(rest) = s.strip_prefix("file:") else {
            return Ok(Self::Socket(s.parse()?));
        };
        let (path, offset) = match rest.split_once(",offset=") {
            Some((path, offset)) => {
                let parsed = match offset.strip_prefix("0x") {
                    Some(digits) => u64::from_str_radix(digits, 16).ok(),
                    None => offset.parse().ok(),
                };
                let offset = parsed.ok_or_else(|| EndpointError::Offset {
                    offset: offset.to_owned(),
                })?;
                (path, offset)
            }
            None => (rest, 0),
        };
        if path.is_empty() {
            return Err(EndpointError::NoPath);
        }
        Ok(Self::File {
            path: path.into(),
            offset,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::File { path, offset: 0 } => write!(f, "file:{}", path.display()),
            Self::File { path, offset } => {
                write!(f, "file:{},offset={offset:#x}", path.display())
            }
        }
    }
}

/// Why a text is no address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// Neither `tcp:` nor `unix:` nor `file:`.
    #[error(transparent)]
    Socket(#[from] AddressError),
    /// `file:` without a path.
    #[error("file: without a path")]
    NoPath,
    /// The offset is no number.
    #[error("offset '{offset}' is no number of bytes")]
    Offset {
        /// What stands there.
        offset: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_spells_them_and_written_so() {
        for text in [
            "tcp:127.0.0.1:4444",
            "unix:/run/relay",
            "file:/var/guest",
            "file:/var/guest,offset=0x5000",
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!(
            "file:guest,offset=4096".parse::<Endpoint>().unwrap(),
            Endpoint::File {
                path: "guest".into(),
                offset: 4096
            }
        );
        for text in [
            "file:",
            "file:,offset=1",
            "file:x,offset=1k",
            "exec:cat",
            "",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
