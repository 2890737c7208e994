//! Where an etcd is.

use std::str::FromStr;

use migration_net::{Address, TcpOptions};

/// The endpoints of an etcd, and a key in it: `HOST:PORT[,HOST:PORT...][/KEY]`. `http://` may stand
/// before an endpoint, and is meant where nothing does; `https://` stands before every one or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdAddress {
    is_https: bool,
    endpoints: Vec<Address>,
    key: Option<String>,
}

/// Why that is no address of an etcd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// An endpoint is not what it has to be.
    #[error("{0:?} is no HOST:PORT of an etcd")]
    Endpoint(String),
    /// There are too many.
    #[error("{0} endpoints of an etcd are too many")]
    Endpoints(usize),
    /// What is said to one of them in secret another would be told in the clear.
    #[error("https:// stands before one endpoint and not before another")]
    Mixed,
    /// The key is empty, or too long.
    #[error("a key of {0} bytes")]
    Key(usize),
}

impl EtcdAddress {
    /// How many endpoints there may be.
    pub(crate) const ENDPOINTS: usize = 9;
    /// How long a key may be, bytes.
    pub(crate) const KEY_LEN: usize = 512;

    /// The key, if one was named.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Are the endpoints asked by TLS?
    #[must_use]
    pub(crate) const fn is_https(&self) -> bool {
        self.is_https
    }

    pub(super) fn urls(&self) -> Vec<String> {
        let scheme = if self.is_https { HTTPS } else { HTTP };
        let url = |address: &Address| {
            let text = address.to_string();
            format!("{scheme}{}", text.strip_prefix("tcp:").unwrap_or(&text))
        };
        self.endpoints.iter().map(url).collect()
    }
}

const HTTP: &str = "http://";
const HTTPS: &str = "https://";

impl FromStr for EtcdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (mut endpoints, mut schemes) = (Vec::new(), Vec::new());
        let mut rest = text;
        let key = loop {
            let (is_https, host) = match (rest.strip_prefix(HTTPS), rest.strip_prefix(HTTP)) {
                (Some(host), _) => (true, host),
                (None, Some(host)) => (false, host),
                (None, None) => (false, rest),
            };
            let end = host.find([',', '/']).unwrap_or(host.len());
            let (endpoint, behind) = host.split_at(end);
            schemes.push(is_https);
            endpoints.push(parse_endpoint(endpoint)?);
            match (behind.strip_prefix(','), behind.strip_prefix('/')) {
                (Some(next), _) => rest = next,
                (None, Some(key)) if (1..=Self::KEY_LEN).contains(&key.len()) => {
                    break Some(key.to_owned());
                }
                (None, Some(key)) => return Err(AddressError::Key(key.len())),
                (None, None) => break None,
            }
        };
        if endpoints.len() > Self::ENDPOINTS {
            return Err(AddressError::Endpoints(endpoints.len()));
        }
        let is_https = schemes.contains(&true);
        if is_https && schemes.contains(&false) {
            return Err(AddressError::Mixed);
        }
        Ok(Self {
            is_https,
            endpoints,
            key,
        })
    }
}

fn parse_endpoint(endpoint: &str) -> Result<Address, AddressError> {
    match format!("tcp:{endpoint}").parse() {
        Ok(address) if is_host(&address) => Ok(address),
        _ => Err(AddressError::Endpoint(endpoint.to_owned())),
    }
}

/// Nothing that means something else in a URL.
fn is_host(address: &Address) -> bool {
    match address {
        Address::Tcp {
            host,
            port,
            options,
        } => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
            let takes_options = *options != TcpOptions::default();
            *port != 0 && !host.is_empty() && host.chars().all(plain) && !takes_options
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_and_key_are_told_apart() {
        let one: EtcdAddress = "a.example:2379".parse().unwrap();
        assert_eq!(
            (one.urls(), one.key()),
            (vec!["http://a.example:2379".into()], None)
        );
        let all: EtcdAddress = "10.0.0.1:2379,[::1]:1,b:3/colo/web".parse().unwrap();
        let urls = ["http://10.0.0.1:2379", "http://[::1]:1", "http://b:3"];
        assert_eq!(
            (all.urls(), all.key()),
            (urls.map(String::from).to_vec(), Some("colo/web"))
        );
    }

    #[test]
    fn an_endpoint_may_say_by_what_it_is_asked() {
        let plain: EtcdAddress = "http://a:1,b:2,http://[::1]:3/k".parse().unwrap();
        assert!(!plain.is_https());
        assert_eq!(plain, "a:1,b:2,[::1]:3/k".parse().unwrap());
        let secret: EtcdAddress = "https://a:1,https://[::1]:2/k,l://m/".parse().unwrap();
        assert!(secret.is_https());
        assert_eq!(
            (secret.urls(), secret.key()),
            (
                vec!["https://a:1".into(), "https://[::1]:2".into()],
                Some("k,l://m/")
            )
        );
        for text in [
            "https://a:1,b:2",
            "http://a:1,https://b:2",
            "a:1,https://b:2/k",
        ] {
            assert_eq!(
                text.parse::<EtcdAddress>(),
                Err(AddressError::Mixed),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "/key",
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:1,",
            ",a:1",
            "::1:1",
            "u@a:1",
            "a b:1",
            "http://",
            "https://",
            "https:a:1",
            "https://u:p@a:1",
            "ftp://a:1",
            "HTTPS://a:1",
            "https://https://a:1",
            "https://a:1,https://",
            "a?:1",
        ] {
            assert!(text.parse::<EtcdAddress>().is_err(), "{text}");
        }
        assert_eq!("a:1/".parse::<EtcdAddress>(), Err(AddressError::Key(0)));
        let long = format!("a:1/{}", "k".repeat(513));
        assert_eq!(long.parse::<EtcdAddress>(), Err(AddressError::Key(513)));
        let many = ["a:1"; 10].join(",");
        assert_eq!(
            many.parse::<EtcdAddress>(),
            Err(AddressError::Endpoints(10))
        );
    }
}
