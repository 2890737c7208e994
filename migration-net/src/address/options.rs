//! The options of a TCP address, as QEMU's `InetSocketAddress` has them.

use std::fmt;
use std::str::FromStr;

use migration_stream::Escaped;

/// What may be used for a TCP address, and how. The default leaves everything to the system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TcpOptions {
    /// Whether IPv4 may be used. See [`TcpOptions::families`].
    pub ipv4: Option<bool>,
    /// Whether IPv6 may be used. See [`TcpOptions::families`].
    pub ipv6: Option<bool>,
    /// The last port that is tried where the ones before it are in use. Only for listening.
    pub to: Option<u16>,
    /// Whether the host has to be a number: no name is looked up.
    pub numeric: bool,
    /// TCP keep-alive, if it is on.
    pub keep_alive: Option<KeepAlive>,
    /// Multipath TCP.
    pub mptcp: bool,
}

/// TCP keep-alive. `None` is the system's own setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeepAlive {
    /// Probes before the connection is given up.
    pub count: Option<u32>,
    /// Before the first probe, s.
    pub idle: Option<u32>,
    /// Between probes, s.
    pub interval: Option<u32>,
}

impl KeepAlive {
    /// Keep-alive with these settings. 0 is the system's own, as in QEMU.
    #[must_use]
    pub fn new(count: Option<u32>, idle: Option<u32>, interval: Option<u32>) -> Self {
        let given = |number: Option<u32>| number.filter(|number| *number != 0);
        Self {
            count: given(count),
            idle: given(idle),
            interval: given(interval),
        }
    }
}

impl TcpOptions {
    /// Which families may be used, IPv4 and IPv6. A family that is asked for alone excludes the
    /// other.
    #[must_use]
    pub fn families(&self) -> (bool, bool) {
        match (self.ipv4, self.ipv6) {
            (Some(true), None) => (true, false),
            (None, Some(true)) => (false, true),
            (ipv4, ipv6) => (ipv4.unwrap_or(true), ipv6.unwrap_or(true)),
        }
    }

    /// Whether the options fit together and `port`.
    ///
    /// # Errors
    /// [`AddressSyntax`].
    pub fn check(&self, port: u16) -> Result<(), AddressSyntax> {
        if let Some(to) = self.to.filter(|to| *to < port) {
            return Err(AddressSyntax::Range { port, to });
        }
        if self.families() == (false, false) {
            return Err(AddressSyntax::NoFamily);
        }
        Ok(())
    }
}

/// What is wrong with the text of an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressSyntax {
    /// The scheme is another.
    #[error("expected tcp:HOST:PORT or unix:PATH")]
    Kind,
    /// Nothing follows `unix:`.
    #[error("unix: lacks the path of the socket")]
    NoPath,
    /// There is no port.
    #[error("':PORT' is missing")]
    NoPort,
    /// A bracket is not closed, or no port follows it.
    #[error("']:PORT' is missing after '['")]
    Bracket,
    /// An IPv6 address without brackets.
    #[error("an IPv6 address wants brackets: [{}]", Escaped(.host))]
    NoBrackets {
        /// The address.
        host: String,
    },
    /// The port is no number, or too large.
    #[error("'{}' is not a port, a number from 0 to 65535", Escaped(.port))]
    Port {
        /// What stands there.
        port: String,
    },
    /// There is no such option.
    #[error("option '{}' is unknown", Escaped(.option))]
    UnknownOption {
        /// Its name.
        option: String,
    },
    /// An option has a value that it cannot have.
    #[error("option '{}' is {expected}, not '{}'", Escaped(.option), Escaped(.value))]
    Value {
        /// Its name.
        option: String,
        /// What it can be.
        expected: &'static str,
        /// What it is.
        value: String,
    },
    /// A setting of keep-alive, which is not on.
    #[error("option '{}' needs keep-alive=on", Escaped(.option))]
    KeepAliveOff {
        /// Its name.
        option: String,
    },
    /// The last port to try is below the first.
    #[error("option 'to' names port {to}, below the first port {port}")]
    Range {
        /// The first port.
        port: u16,
        /// The last.
        to: u16,
    },
    /// No family is left.
    #[error("options 'ipv4' and 'ipv6' cannot both be off")]
    NoFamily,
    /// The name of an abstract socket is empty, or too long.
    #[error("an abstract socket's name has 1 to 107 bytes, not {len}")]
    AbstractName {
        /// Its length.
        len: usize,
    },
}

/// Reads options, each without the comma before it.
pub(super) fn parse_options<'a>(
    options: impl Iterator<Item = &'a str>,
) -> Result<TcpOptions, AddressSyntax> {
    let mut parsed = TcpOptions::default();
    let mut keep_alive = false;
    let mut settings = KeepAlive::default();
    let mut set = None;
    for option in options {
        let (name, value) = option.split_once('=').unwrap_or((option, "on"));
        match name {
            "ipv4" => parsed.ipv4 = Some(switch(name, value)?),
            "ipv6" => parsed.ipv6 = Some(switch(name, value)?),
            "to" => parsed.to = Some(number(name, value, "a number from 0 to 65535")?),
            "numeric" => parsed.numeric = switch(name, value)?,
            "mptcp" => parsed.mptcp = switch(name, value)?,
            "keep-alive" => keep_alive = switch(name, value)?,
            "keep-alive-count" => settings.count = Some(number(name, value, NUMBER)?),
            "keep-alive-idle" => settings.idle = Some(number(name, value, NUMBER)?),
            "keep-alive-interval" => settings.interval = Some(number(name, value, NUMBER)?),
            _ => {
                return Err(AddressSyntax::UnknownOption {
                    option: name.to_owned(),
                });
            }
        }
        if name.starts_with("keep-alive-") {
            set = Some(name);
        }
    }
    if keep_alive {
        parsed.keep_alive = Some(KeepAlive::new(
            settings.count,
            settings.idle,
            settings.interval,
        ));
    } else if let Some(option) = set {
        let option = option.to_owned();
        return Err(AddressSyntax::KeepAliveOff { option });
    }
    Ok(parsed)
}

const NUMBER: &str = "a number from 0 to 4294967295";

fn number<T: FromStr>(
    option: &str,
    value: &str,
    expected: &'static str,
) -> Result<T, AddressSyntax> {
    value.parse().map_err(|_| AddressSyntax::Value {
        option: option.to_owned(),
        expected,
        value: value.to_owned(),
    })
}

fn switch(option: &str, value: &str) -> Result<bool, AddressSyntax> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(AddressSyntax::Value {
            option: option.to_owned(),
            expected: "'on' or 'off'",
            value: value.to_owned(),
        }),
    }
}

/// The options with the comma before each, as they follow a port.
impl fmt::Display for TcpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(to) = self.to {
            write!(f, ",to={to}")?;
        }
        let keep_alive = self.keep_alive.is_some().then_some(true);
        for (name, value) in [
            ("ipv4", self.ipv4),
            ("ipv6", self.ipv6),
            ("numeric", self.numeric.then_some(true)),
            ("mptcp", self.mptcp.then_some(true)),
            ("keep-alive", keep_alive),
        ] {
            if let Some(on) = value {
                write!(f, ",{name}={}", if on { "on" } else { "off" })?;
            }
        }
        let settings = self.keep_alive.unwrap_or_default();
        for (name, value) in [
            ("count", settings.count),
            ("idle", settings.idle),
            ("interval", settings.interval),
        ] {
            if let Some(number) = value {
                write!(f, ",keep-alive-{name}={number}")?;
            }
        }
        Ok(())
    }
}
