//! Why there is no incoming migration.

use std::io;

use super::classifier::{Refusal, Role};
use crate::channels::{ChannelCount, ChannelId, index};

/// Why there is no incoming migration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// It was cancelled.
    #[error("waiting for a migration was cancelled")]
    Cancelled,
    /// Some connections came, and the others did not in time.
    #[error("connections are missing: {}{}", describe_missing(*.main, .missing),
        describe_counts(.opened, .missing))]
    Incomplete {
        /// Whether the main channel was there.
        main: bool,
        /// The multifd channels that were.
        opened: Vec<ChannelId>,
        /// The multifd channels that were not.
        missing: Vec<ChannelId>,
        /// Why the last connection that was closed was closed: probably the reason.
        #[source]
        last_refusal: Option<Refusal>,
    },
    /// The source closed a connection before all were there. The rest describes the moment before.
    #[error("the source closed the {} while connections were missing: {}{}", role.name(),
        describe_missing(*.main, .missing), describe_counts(.opened, .missing))]
    Left {
        /// What the connection was.
        role: Role,
        /// Whether the main channel was there.
        main: bool,
        /// The multifd channels that were.
        opened: Vec<ChannelId>,
        /// The multifd channels that were not.
        missing: Vec<ChannelId>,
        /// Why the last connection before it was closed: probably the reason.
        #[source]
        last_refusal: Option<Refusal>,
    },
    /// The source has more channels.
    #[error("the source has at least {} multifd channels, this side wants {channels}",
        index(*.channel) + 1)]
    ChannelCount {
        /// A channel that introduced itself.
        channel: ChannelId,
        /// How many are wanted here.
        channels: ChannelCount,
    },
    /// The listening socket could not be set up.
    #[error("setting up the listening socket")]
    Listen(#[source] io::Error),
    /// A connection could not be accepted.
    #[error("accepting a connection")]
    Accept(#[source] io::Error),
    /// The connections could not be waited for.
    #[error("waiting for connections")]
    Poll(#[source] io::Error),
}

impl IncomingError {
    /// Whether a source has failed, and not this side: another one can be waited for.
    #[must_use]
    pub const fn is_of_the_source(&self) -> bool {
        matches!(
            self,
            Self::Incomplete { .. } | Self::Left { .. } | Self::ChannelCount { .. }
        )
    }
}

fn describe_missing(main: bool, missing: &[ChannelId]) -> String {
    let main = (!main).then(|| "the main channel".to_owned());
    let channels = missing.iter().map(ToString::to_string);
    main.into_iter()
        .chain(channels)
        .collect::<Vec<_>>()
        .join(", ")
}

/// What both sides have, where this side wants any channels.
fn describe_counts(opened: &[ChannelId], missing: &[ChannelId]) -> String {
    let wanted = opened.len() + missing.len();
    if missing.is_empty() {
        return String::new();
    }
    let channels = |n: usize| if n == 1 { "channel" } else { "channels" };
    format!(
        " (the source opened {} multifd {}, this side wants {wanted})",
        opened.len(),
        channels(opened.len()),
    )
}
