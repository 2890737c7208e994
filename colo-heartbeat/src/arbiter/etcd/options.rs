//! How an etcd is spoken to: in TLS or in the clear, and as whom.

use std::error::Error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use migration_stream::Escaped;

/// How an etcd is spoken to. The default is in the clear, as nobody.
#[derive(Clone, Debug, Default)]
pub struct EtcdOptions {
    pub(super) ca: Option<Credential>,
    pub(super) client: Option<ClientCertificate>,
    pub(super) user: Option<User>,
}

impl EtcdOptions {
    /// Accepts certificates of etcd's that the authorities in `certificates` (PEM) have issued. `https://`
    /// endpoints need them, and no others may have them.
    #[must_use]
    pub fn authority(mut self, certificates: Credential) -> Self {
        self.ca = Some(certificates);
        self
    }

    /// Shows a certificate to an etcd that wants to see one (`--client-cert-auth`). `chain` is the certificate in
    /// PEM, and behind it those between it and its authority's; `key` is its key in PEM, not encrypted.
    #[must_use]
    pub fn client(mut self, chain: Credential, key: Credential) -> Self {
        self.client = Some(ClientCertificate { chain, key });
        self
    }

    /// Authenticates as a user of etcd's. `password` is one line of text, with or without an end. Without
    /// TLS the password is sent in the clear, which the log warns of.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>, password: Credential) -> Self {
        let name = name.into();
        self.user = Some(User { name, password });
        self
    }
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub(super) struct ClientCertificate {
    pub(super) chain: Credential,
    pub(super) key: Credential,
}

/// A user of etcd's.
#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) password: Credential,
}

/// What one side proves by who it, or the other, is: certificates, a key, a password. `Debug` says
/// where it is from, and nothing of what it is.
#[derive(Clone)]
pub struct Credential {
    origin: Origin,
    bytes: Vec<u8>,
}

#[derive(Clone)]
enum Origin {
    File(PathBuf),
    Memory(String),
}

/// A path in a message.
fn shown(path: &Path) -> String {
    Escaped(&path.display().to_string()).to_string()
}

/// Why an etcd cannot be spoken to like that.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// A file cannot be read.
    #[error("cannot read {}", shown(file))]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is too long to be what it is taken for.
    #[error("{} has more than {limit} bytes", shown(file))]
    TooLong {
        /// The file.
        file: PathBuf,
        /// The most that is read, bytes.
        limit: u64,
    },
    /// There is no certificate in it.
    #[error("{origin} has no certificate in pem", origin = Escaped(.origin))]
    NoCertificate {
        /// Where it was looked for.
        origin: String,
    },
    /// There is no key in it, or one that a passphrase is needed for.
    #[error("{origin} has no key in pem, or an encrypted one", origin = Escaped(.origin))]
    NoKey {
        /// Where it was looked for.
        origin: String,
    },
    /// What is in it cannot be read.
    #[error("{origin} is damaged", origin = Escaped(.origin))]
    Damaged {
        /// What was read.
        origin: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A key that cannot be used, or is another certificate's.
    #[error("the key in {key} is of no use with the certificate in {chain}", key = Escaped(.key), chain = Escaped(.chain))]
    Key {
        /// Where the key is from.
        key: String,
        /// Where the certificate is from.
        chain: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A password cannot be one.
    #[error("{origin} has {what} instead of a password", origin = Escaped(.origin))]
    Password {
        /// Where it is from.
        origin: String,
        /// What there is.
        what: &'static str,
    },
    /// A user without a name.
    #[error("a user of etcd's without a name")]
    NoName,
    /// There is nothing to check the certificate of an `https://` endpoint by.
    #[error("https:// endpoints need the certificates of their authority")]
    NoAuthority,
    /// Certificates are of no use with endpoints that are not `https://`.
    #[error("certificates are given, and the endpoints are not https://")]
    NotHttps,
    /// The feature `etcd-tls` is off.
    #[error("https:// endpoints need the feature etcd-tls, which was not built")]
    NoTls,
}

impl Credential {
    /// The most that a file may have, bytes: a system's whole bundle of authorities is smaller.
    const LIMIT: u64 = 1 << 20;

    /// What is in a file. If that is a regular one it is read again when etcd refuses what was in it,
    /// because certificates and passwords are replaced while VMs run.
    ///
    /// # Errors
    /// It cannot be read, or is too long.
    pub fn file(path: impl AsRef<Path>) -> Result<Self, OptionsError> {
        let file = path.as_ref().to_owned();
        let mut bytes = Vec::new();
        let read =
            File::open(&file).and_then(|open| open.take(Self::LIMIT + 1).read_to_end(&mut bytes));
        match read {
            Err(source) => Err(OptionsError::Read { file, source }),
            Ok(_) if bytes.len() as u64 > Self::LIMIT => Err(OptionsError::TooLong {
                file,
                limit: Self::LIMIT,
            }),
            Ok(_) => Ok(Self {
                origin: Origin::File(file),
                bytes,
            }),
        }
    }

    /// What comes from elsewhere. `origin` is what errors call it.
    pub fn new(origin: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            origin: Origin::Memory(origin.into()),
            bytes: bytes.into(),
        }
    }

    #[cfg(feature = "etcd-tls")]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn origin(&self) -> String {
        match &self.origin {
            Origin::File(file) => file.display().to_string(),
            Origin::Memory(name) => name.clone(),
        }
    }

    /// As it is now, if that is something else.
    fn changed(&self) -> Result<Option<Self>, OptionsError> {
        match &self.origin {
            // Others may have nothing more, and are waited for.
            Origin::File(file) if fs::metadata(file).is_ok_and(|m| m.is_file()) => {
                let now = Self::file(file)?;
                Ok((now.bytes != self.bytes).then_some(now))
            }
            _ => Ok(None),
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credential").field(&self.origin()).finish()
    }
}

impl User {
    /// The password as text.
    pub(super) fn password(&self) -> Result<&str, OptionsError> {
        let refuse = |what| OptionsError::Password {
            origin: self.password.origin(),
            what,
        };
        let text =
            std::str::from_utf8(&self.password.bytes).map_err(|_| refuse("no utf-8 text"))?;
        let line = text.strip_suffix('\n').unwrap_or(text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() {
            return Err(refuse("nothing"));
        }
        if line.contains(['\r', '\n']) {
            return Err(refuse("several lines"));
        }
        Ok(line)
    }
}

impl EtcdOptions {
    /// Has all files read again; `None` if nothing has changed in them.
    pub(super) fn changed(&self) -> Result<Option<Self>, OptionsError> {
        let mut now = self.clone();
        let client = now.client.as_mut().map(|c| [&mut c.chain, &mut c.key]);
        let credentials = now
            .ca
            .as_mut()
            .into_iter()
            .chain(client.into_iter().flatten())
            .chain(now.user.as_mut().map(|user| &mut user.password));
        let mut is_other = false;
        for credential in credentials {
            if let Some(other) = credential.changed()? {
                *credential = other;
                is_other = true;
            }
        }
        Ok(is_other.then_some(now))
    }
}
