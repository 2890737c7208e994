//! Internet addresses with their options.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::QmpError;
use crate::text::escaped;

/// An internet address, not resolved yet (`InetSocketAddress`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InetSocketAddress {
    /// Name or number of the host; empty: any.
    pub host: String,
    /// Number or name of the port.
    pub port: String,
    /// Whether `host` and `port` are numbers for sure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numeric: Option<bool>,
    /// The last port to try, when listening.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u16>,
    /// Whether IPv4 may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<bool>,
    /// Whether IPv6 may be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<bool>,
    /// TCP keep-alive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<bool>,
    /// Probes before the connection is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_count: Option<u32>,
    /// Before the first probe, s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_idle: Option<u32>,
    /// Between probes, s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_interval: Option<u32>,
    /// Multipath TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mptcp: Option<bool>,
}

from_qapi_struct!(InetSocketAddress {
    host = "host",
    port = "port",
    numeric = "numeric",
    to = "to",
    ipv4 = "ipv4",
    ipv6 = "ipv6",
    keep_alive = "keep-alive",
    keep_alive_count = "keep-alive-count",
    keep_alive_idle = "keep-alive-idle",
    keep_alive_interval = "keep-alive-interval",
    mptcp = "mptcp",
});

/// The longest host name and port that QEMU reads from a URI.
const HOST_MAX: usize = 64;
const PORT_MAX: usize = 32;

impl InetSocketAddress {
    /// An address without options.
    #[must_use]
    pub fn new(host: impl Into<String>, port: impl Into<String>) -> Self {
        Self {
            host: host.into(),
            port: port.into(),
            ..Self::default()
        }
    }

    /// Host and port as [`std::net::ToSocketAddrs`] takes them: `host:port`, `[::1]:port`.
    #[must_use]
    pub fn authority(&self) -> String {
        // A host that begins with a bracket is read as one in brackets.
        if self.host.contains(':') || self.host.starts_with('[') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// The address after `tcp:` or `rdma:`.
    pub(super) fn parse(text: &str) -> Result<Self, QmpError> {
        let malformed = || QmpError::generic(format!("error parsing address '{text}'"));
        let (host, after) = if let Some(rest) = text.strip_prefix('[') {
            rest.split_once("]:")
                .filter(|(host, _)| !host.is_empty())
                .ok_or_else(|| QmpError::generic(format!("error parsing IPv6 address '{text}'")))?
        } else {
            text.split_once(':').ok_or_else(malformed)?
        };
        let (port, options) = match after.split_once(',') {
            Some((port, options)) => (port, Some(options)),
            None => (after, None),
        };
        if port.is_empty() || port.len() > PORT_MAX || host.len() > HOST_MAX {
            return Err(malformed());
        }
        let mut address = Self::new(host, port);
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            address.option(option)?;
        }
        Ok(address)
    }

    fn option(&mut self, option: &str) -> Result<(), QmpError> {
        let (name, value) = option.split_once('=').unwrap_or((option, "on"));
        match name {
            "numeric" => self.numeric = Some(switch(name, value)?),
            "to" => self.to = Some(number(name, value)?),
            "ipv4" => self.ipv4 = Some(switch(name, value)?),
            "ipv6" => self.ipv6 = Some(switch(name, value)?),
            "keep-alive" => self.keep_alive = Some(switch(name, value)?),
            "keep-alive-count" => self.keep_alive_count = Some(number(name, value)?),
            "keep-alive-idle" => self.keep_alive_idle = Some(number(name, value)?),
            "keep-alive-interval" => self.keep_alive_interval = Some(number(name, value)?),
            "mptcp" => self.mptcp = Some(switch(name, value)?),
            _ => return Err(QmpError::generic(format!("Invalid parameter '{name}'"))),
        }
        Ok(())
    }
}

fn switch(name: &str, value: &str) -> Result<bool, QmpError> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(QmpError::expects(name, "'on' or 'off'")),
    }
}

fn number<T: FromStr>(name: &str, value: &str) -> Result<T, QmpError> {
    value
        .parse()
        .map_err(|_| QmpError::expects(name, "a number"))
}

impl InetSocketAddress {
    /// Returns the address as it is written to a server.
    pub(super) fn spelled(&self) -> String {
        let mut text = self.authority();
        for (name, value) in [
            ("numeric", self.numeric),
            ("ipv4", self.ipv4),
            ("ipv6", self.ipv6),
            ("keep-alive", self.keep_alive),
            ("mptcp", self.mptcp),
        ] {
            if let Some(on) = value {
                text.push_str(&format!(",{name}={}", if on { "on" } else { "off" }));
            }
        }
        for (name, value) in [
            ("to", self.to.map(u32::from)),
            ("keep-alive-count", self.keep_alive_count),
            ("keep-alive-idle", self.keep_alive_idle),
            ("keep-alive-interval", self.keep_alive_interval),
        ] {
            if let Some(number) = value {
                text.push_str(&format!(",{name}={number}"));
            }
        }
        text
    }
}

/// As it is written. What could do harm on a terminal is escaped.
impl fmt::Display for InetSocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escaped(&self.spelled()))
    }
}
