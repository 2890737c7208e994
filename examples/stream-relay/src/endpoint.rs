//! Where a guest comes from or goes to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use migration_net::{Address, AddressError};
use tool_support::input::STANDARD_INPUT;
use tool_support::number::{self, NumberError};

/// A socket or a file, in QEMU's spelling of migration addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `tcp:HOST:PORT` or `unix:PATH`.
    Socket(Address),
    /// `file:PATH[,offset=BYTES]`, a FIFO too; `fd:N`, a descriptor that the program inherits; or `-`,
    /// standard input.
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
        if s == STANDARD_INPUT {
            return Ok(Self::File {
                path: "/dev/stdin".into(),
                offset: 0,
            });
        }
        if let Some(fd) = s.strip_prefix("fd:") {
            let fd = number::number(fd).map_err(EndpointError::Descriptor)?;
            return Ok(Self::File {
                path: format!("/dev/fd/{fd}").into(),
                offset: 0,
            });
        }
        let Some(rest) = s.strip_prefix("file:") else {
            return Ok(Self::Socket(s.parse()?));
        };
        let (path, offset) = match rest.split_once(",offset=") {
            Some((path, offset)) => (path, number::bytes(offset).map_err(EndpointError::Offset)?),
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
    /// The descriptor is no number.
    #[error("the descriptor behind fd:")]
    Descriptor(#[source] NumberError),
    /// The offset is no number.
    #[error("the offset in a file")]
    Offset(#[source] NumberError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_spells_them_and_written_so() {
        for text in [
            "file:/dev/stdin",
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
        for (text, written) in [
            ("-", "file:/dev/stdin"),
            ("fd:3", "file:/dev/fd/3"),
            ("file:x,offset=4KiB", "file:x,offset=0x1000"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), written);
        }
        for text in [
            "fd:x",
            "file:",
            "file:,offset=1",
            "file:x,offset=1kb",
            "exec:cat",
            "",
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
    }
}
