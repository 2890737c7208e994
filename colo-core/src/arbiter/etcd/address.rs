//! Where an etcd is.

use std::str::FromStr;

use multifd::Address;

/// The endpoints of an etcd, and a key in it: `HOST:PORT[,HOST:PORT...][/KEY]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdAddress {
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
    /// There are more than [`EtcdAddress::ENDPOINTS`].
    #[error("{0} endpoints of an etcd are too many")]
    Endpoints(usize),
    /// The key is empty, or too long.
    #[error("a key of {0} bytes")]
    Key(usize),
}

impl EtcdAddress {
    /// How many endpoints there may be.
    pub const ENDPOINTS: usize = 9;
    /// How long a key may be, bytes.
    pub const KEY_LEN: usize = 512;

    /// The key, if one was named.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    pub(super) fn urls(&self) -> Vec<String> {
        let url = |address: &Address| {
            let text = address.to_string();
            format!("http://{}", text.strip_prefix("tcp:").unwrap_or(&text))
        };
        self.endpoints.iter().map(url).collect()
    }
}

impl FromStr for EtcdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (endpoints, key) = match text.split_once('/') {
            None => (text, None),
            Some((endpoints, key)) if (1..=Self::KEY_LEN).contains(&key.len()) => {
                (endpoints, Some(key.to_owned()))
            }
            Some((_, key)) => return Err(AddressError::Key(key.len())),
        };
        let endpoints: Vec<_> = endpoints
            .split(',')
            .map(|endpoint| {
                let refuse = || AddressError::Endpoint(endpoint.to_owned());
                match format!("tcp:{endpoint}").parse() {
                    Ok(address) if is_host(&address) => Ok(address),
                    _ => Err(refuse()),
                }
            })
            .collect::<Result<_, _>>()?;
        match endpoints.len() {
            1..=Self::ENDPOINTS => Ok(Self { endpoints, key }),
            many => Err(AddressError::Endpoints(many)),
        }
    }
}

/// Nothing that means something else in a URL.
fn is_host(address: &Address) -> bool {
    match address {
        Address::Tcp { host, port } => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
            *port != 0 && !host.is_empty() && host.chars().all(plain)
        }
        Address::Unix(_) => false,
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
            "http://a:1",
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
