//! Why pages could not cross.

use std::error;

/// Why pages could not cross.
#[derive(Debug, thiserror::Error)]
#[error("{}", .channel.map_or("page transport".into(), |c| format!("multifd channel {c}")))]
pub struct TransportError {
    /// The multifd channel, `None` for the main stream.
    pub channel: Option<u8>,
    /// The cause; a transport's documentation says which type to downcast to.
    pub source: Box<dyn error::Error + Send + Sync>,
}

impl TransportError {
    /// An error of the main stream.
    pub fn main(source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self {
            channel: None,
            source: source.into(),
        }
    }

    /// An error of a multifd channel.
    pub fn channel(channel: u8, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self {
            channel: Some(channel),
            source: source.into(),
        }
    }
}
