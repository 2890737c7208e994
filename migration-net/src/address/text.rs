//! Addresses as text, in QEMU's spelling.

use std::fmt;
use std::str::FromStr;

use migration_stream::Escaped;

use super::options::parse_options;
use super::{Address, AddressError, AddressSyntax};

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = match text.split_once(':') {
            Some(("unix", "")) => Err(AddressSyntax::NoPath),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => parse_tcp(rest),
            _ => Err(AddressSyntax::Kind),
        };
        parsed.map_err(|problem| AddressError::Syntax {
            address: text.to_owned(),
            problem,
        })
    }
}

/// Reads what follows `tcp:`.
fn parse_tcp(text: &str) -> Result<Address, AddressSyntax> {
    let (place, options) = match text.split_once(',') {
        Some((place, options)) => (place, Some(options)),
        None => (text, None),
    };
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => rest.rsplit_once("]:").ok_or(AddressSyntax::Bracket)?,
        None => place.rsplit_once(':').ok_or(AddressSyntax::NoPort)?,
    };
    if host.contains(':') && !place.starts_with('[') {
        let host = host.to_owned();
        return Err(AddressSyntax::NoBrackets { host });
    }
    let port = port.parse().map_err(|_| AddressSyntax::Port {
        port: port.to_owned(),
    })?;
    let options = parse_options(options.into_iter().flat_map(|text| text.split(',')))?;
    options.check(port)?;
    Ok(Address::Tcp {
        host: host.to_owned(),
        port,
        options,
    })
}

/// In QEMU's spelling. What could do harm on a terminal or in a log is [escaped](Escaped).
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp {
                host,
                port,
                options,
            } if host.contains(':') => write!(f, "tcp:[{}]:{port}{options}", Escaped(host)),
            Self::Tcp {
                host,
                port,
                options,
            } => write!(f, "tcp:{}:{port}{options}", Escaped(host)),
            Self::Unix(path) => write!(f, "unix:{}", Escaped(&path.to_string_lossy())),
            Self::Abstract(name) => {
                let name = name.trim_ascii_end();
                let end = name
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |at| at + 1);
                write!(f, "abstract unix socket {}", name[..end].escape_ascii())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_spells_them() {
        for text in [
            "tcp:localhost:4444",
            "tcp::0",
            "tcp:[::1]:9",
            "tcp:[fe80::1%eth0]:9",
            "tcp::4444,to=4450,ipv4=on,ipv6=off",
            "tcp:h:1,numeric=on,mptcp=on",
            "tcp:h:1,keep-alive=on,keep-alive-count=3,keep-alive-idle=4,keep-alive-interval=5",
            "unix:/run/a:b",
            "unix:/run/a,b=c",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_named() {
        for (text, problem) in [
            ("", "expected tcp:HOST:PORT or unix:PATH"),
            ("fd:3", "expected tcp:HOST:PORT or unix:PATH"),
            ("unix:", "unix: lacks the path of the socket"),
            ("tcp:4444", "':PORT' is missing"),
            ("tcp:h:", "'' is not a port, a number from 0 to 65535"),
            (
                "tcp:h:70000",
                "'70000' is not a port, a number from 0 to 65535",
            ),
            ("tcp:h:-1", "'-1' is not a port, a number from 0 to 65535"),
            ("tcp:::1:9", "an IPv6 address wants brackets: [::1]"),
            ("tcp:[::1:9", "']:PORT' is missing after '['"),
            ("tcp:[::1]9", "']:PORT' is missing after '['"),
            ("tcp:h:1,tos=4", "option 'tos' is unknown"),
            (
                "tcp:h:1,ipv4=maybe",
                "option 'ipv4' is 'on' or 'off', not 'maybe'",
            ),
            (
                "tcp:h:1,to=x",
                "option 'to' is a number from 0 to 65535, not 'x'",
            ),
            (
                "tcp:h:9,to=8",
                "option 'to' names port 8, below the first port 9",
            ),
            (
                "tcp:h:1,ipv4=off,ipv6=off",
                "options 'ipv4' and 'ipv6' cannot both be off",
            ),
            (
                "tcp:h:1,keep-alive-idle=4",
                "option 'keep-alive-idle' needs keep-alive=on",
            ),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert_eq!(error, format!("'{text}' is no address: {problem}"));
        }
    }

    #[test]
    fn hostile_text_in_an_address_is_escaped() {
        let hostile = "\x1b[2J\r\n\u{202e}";
        let shown = r"\u{1b}[2J\r\n\u{202e}";
        for text in [
            format!("tcp:{hostile}:1"),
            format!("tcp:[::{hostile}]:1"),
            format!("unix:/run/{hostile}"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text.replace(hostile, shown));
        }
        let named = Address::abstract_unix(hostile, true).unwrap().to_string();
        assert!(!named.contains(char::is_control), "{named}");
        for text in [
            format!("{hostile}:1"),
            format!("tcp:h:{hostile}"),
            format!("tcp:{hostile}::1:9"),
            format!("tcp:h:1,{hostile}"),
            format!("tcp:h:1,ipv4={hostile}"),
            format!("tcp:h:1,to={hostile}"),
            format!("tcp:h:1,keep-alive-{hostile}=1"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            let AddressError::Syntax { problem, .. } = &error else {
                panic!("{error}");
            };
            for said in [error.to_string(), problem.to_string()] {
                assert!(
                    !said.contains(|c: char| c.is_control() || c == '\u{202e}'),
                    "{said:?}"
                );
            }
        }
    }
}
