//! What joins the two sides: a cable between two network namespaces, or a unix socket.

use std::env;
use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ::tests::Result;
use ::tests::hosts::host;
use ::tests::netns::{Host, Network};
use ::tests::vmm::Side;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::delay::{self, Tun};
use crate::way::name;

/// How the two sides are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP between two network namespaces.
    Veth,
    /// A unix socket of this host, on which both sides run.
    Unix,
}

/// A connection of two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its kind.
    pub transport: Transport,
    /// Limit in each direction, 10^6 bits a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_mbit: Option<u32>,
    /// How long what is sent is under way, in each direction, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_us: Option<u32>,
}

impl Link {
    /// A cable without a limit or delay.
    pub const VETH: Self = Self {
        transport: Transport::Veth,
        rate_mbit: None,
        delay_us: None,
    };
    /// A unix socket.
    pub const UNIX: Self = Self {
        transport: Transport::Unix,
        rate_mbit: None,
        delay_us: None,
    };
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self.transport))?;
        if let Some(rate) = self.rate_mbit {
            write!(f, " {rate} Mbit/s")?;
        }
        if let Some(delay) = self.delay_us {
            write!(f, " {delay} us")?;
        }
        Ok(())
    }
}

/// The options that choose links.
#[derive(Clone, Debug, Args)]
pub struct LinkArgs {
    /// What joins the two sides.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Transport::Veth])]
    pub transport: Vec<Transport>,
    /// Limit of a veth link in each direction, Mbit/s.
    #[arg(long, value_name = "MBIT")]
    pub rate: Option<u32>,
    /// Delay of a veth link in each direction, microseconds. A relay of this process makes it.
    #[arg(long, value_name = "US")]
    pub delay: Option<u32>,
}

impl LinkArgs {
    /// Lays all links. Outside of CI a smoke run says which it leaves out for want of network
    /// namespaces.
    ///
    /// # Errors
    /// As for [`Cable::lay`].
    pub fn lay(&self, is_smoke: bool) -> Result<Vec<Cable>> {
        let is_ci = env::var_os("CI").is_some_and(|ci| ci == "true");
        let mut cables = Vec::new();
        for link in self.links() {
            match Cable::lay(link) {
                Err(e) if is_smoke && !is_ci => eprintln!("{link} is left out: {e}"),
                cable => cables.push(cable?),
            }
        }
        Ok(cables)
    }

    /// The links, in the order of the command line.
    fn links(&self) -> Vec<Link> {
        let link = |&transport| match transport {
            Transport::Veth => Link {
                rate_mbit: self.rate,
                delay_us: self.delay,
                ..Link::VETH
            },
            Transport::Unix => Link::UNIX,
        };
        self.transport.iter().map(link).collect()
    }
}

/// A [`Link`] that exists. Dropping it removes its namespaces.
#[derive(Debug)]
pub struct Cable {
    link: Link,
    network: Option<Network>,
}

impl Cable {
    /// Lays the link.
    ///
    /// # Errors
    /// There are no network namespaces here; see `tests::netns::missing`.
    pub fn lay(link: Link) -> Result<Self> {
        let network = match link.transport {
            Transport::Unix => None,
            Transport::Veth => Some(match link.delay_us {
                None => Network::new()?,
                Some(delay) => {
                    let ends = [Tun::new()?, Tun::new()?];
                    let network = Network::over(ends.each_ref().map(Tun::name))?;
                    delay::join(ends, Duration::from_micros(delay.into()));
                    network
                }
            }),
        };
        if let (Some(network), Some(rate)) = (&network, link.rate_mbit) {
            network.limit(Host::A, Host::B, rate)?;
            network.limit(Host::B, Host::A, rate)?;
        }
        Ok(Self { link, network })
    }

    /// What was laid.
    #[must_use]
    pub const fn link(&self) -> Link {
        self.link
    }

    /// The command, to be run where `side` is. The primary is the source of a migration.
    #[must_use]
    pub fn on(&self, side: Side, command: Command) -> Command {
        match &self.network {
            None => command,
            Some(network) => network.on(host(side), &command),
        }
    }

    /// Where the secondary listens. `name` tells several sockets in `dir` apart.
    #[must_use]
    pub fn uri(&self, dir: &Path, name: &str) -> String {
        match self.network {
            None => format!("unix:{}", dir.join(name).display()),
            Some(_) => format!("tcp:{}:0", self.address()),
        }
    }

    /// The secondary's address, if there is a network.
    #[must_use]
    pub const fn address(&self) -> &'static str {
        host(Side::Secondary).address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_delay_are_those_of_the_veth_link_alone() {
        let arguments = LinkArgs {
            transport: vec![Transport::Veth, Transport::Unix],
            rate: Some(1000),
            delay: Some(50),
        };
        let links: Vec<_> = arguments.links().iter().map(Link::to_string).collect();
        assert_eq!(links, ["veth 1000 Mbit/s 50 us", "unix"]);
    }

    #[test]
    fn commands_of_one_host_stay_as_they_are() {
        let cable = Cable::lay(Link::UNIX).unwrap();
        let command = cable.on(Side::Primary, Command::new("true"));
        assert_eq!(command.get_program(), "true");
        assert_eq!(cable.uri(Path::new("/x"), "y"), "unix:/x/y");
    }
}
