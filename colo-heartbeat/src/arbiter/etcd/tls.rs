//! TLS for the gateway: by rustls, with the cryptography of ring.

use std::error::Error;
use std::io;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ALL_VERSIONS, ClientConfig, RootCertStore};
use ureq::config::Config;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, NextTimeout, RustlsConnector, TcpConnector, Transport,
};

use super::error::EtcdError;
use super::options::{ClientCertificate, Credential, EtcdOptions, OptionsError};
use crate::arbiter::foreign::foreign;

/// The TLS of `https://` endpoints.
pub(super) fn config(options: &EtcdOptions) -> Result<TlsConfig, OptionsError> {
    let provider = Arc::new(ring::default_provider());
    let ca = options.ca.as_ref().ok_or(OptionsError::NoAuthority)?;
    let roots = certificates(ca)?;
    let store = authorities(ca, &roots)?;
    let client = match &options.client {
        Some(client) => Some(client_certificate(client, store, &provider)?),
        None => None,
    };
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

/// The certificate that this side shows. It is tried first: ureq would panic about a key that does not
/// fit, when it connects.
fn client_certificate(
    client: &ClientCertificate,
    store: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientCert, OptionsError> {
    let chain = certificates(&client.chain)?;
    let ders = chain.iter().map(|c| CertificateDer::from(c.der().to_vec()));
    let key = private_key(&client.key)?;
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(ALL_VERSIONS)
        .and_then(|builder| {
            let builder = builder.with_root_certificates(store);
            builder.with_client_auth_cert(ders.collect(), key)
        })
        .map_err(|error| OptionsError::Key {
            key: client.key.origin(),
            chain: client.chain.origin(),
            source: foreign(&error),
        })?;
    let key = PrivateKey::from_pem(client.key.bytes()).map_err(|e| damaged(&client.key, e))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

/// Those that can be used: a system's bundle may have some that cannot.
fn authorities(
    ca: &Credential,
    certificates: &[Certificate<'_>],
) -> Result<RootCertStore, OptionsError> {
    let mut store = RootCertStore::empty();
    let mut refused = None;
    for certificate in certificates {
        if let Err(error) = store.add(CertificateDer::from(certificate.der())) {
            refused = Some(error);
        }
    }
    match refused {
        Some(error) if store.is_empty() => Err(damaged(ca, error)),
        _ => Ok(store),
    }
}

fn private_key(pem: &Credential) -> Result<PrivateKeyDer<'static>, OptionsError> {
    PrivateKeyDer::from_pem_slice(pem.bytes()).map_err(|error| match error {
        pem::Error::NoItemsFound => OptionsError::NoKey {
            origin: pem.origin(),
        },
        error => damaged(pem, error),
    })
}

fn certificates(pem: &Credential) -> Result<Vec<Certificate<'static>>, OptionsError> {
    let mut certificates = Vec::new();
    for item in parse_pem(pem.bytes()) {
        if let PemItem::Certificate(certificate) = item.map_err(|e| damaged(pem, e))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        let origin = pem.origin();
        return Err(OptionsError::NoCertificate { origin });
    }
    Ok(certificates)
}

/// What makes connections with such a TLS.
pub(super) fn agent(config: Config) -> ureq::Agent {
    let connector =
        ().chain(TcpConnector::default())
            .chain(ToTheEnd)
            .chain(RustlsConnector::default());
    ureq::Agent::with_parts(config, connector, DefaultResolver::default())
}

/// Has what a server says at last be heard. One that refuses a certificate says so (in TLS 1.3 when the
/// request is on its way already) and closes the connection; an error of the request's would hide it.
#[derive(Debug)]
struct ToTheEnd;

#[derive(Debug)]
struct PeerAlive<T>(T);

impl<In: Transport> Connector<In> for ToTheEnd {
    type Out = PeerAlive<In>;

    fn connect(
        &self,
        _: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(PeerAlive))
    }
}

impl<T: Transport> Transport for PeerAlive<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        const CLOSED: [io::ErrorKind; 2] =
            [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        match self.0.transmit_output(amount, timeout) {
            // Who waits for the answer finds the end, if there is nothing before it.
            Err(ureq::Error::Io(error)) if CLOSED.contains(&error.kind()) => Ok(()),
            result => result,
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.0.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }
}

fn damaged(what: &Credential, error: impl Error + Send + Sync + 'static) -> OptionsError {
    OptionsError::Damaged {
        origin: what.origin(),
        source: foreign(&error),
    }
}

/// Tells a refusal by certificate from a connection that fails.
pub(super) fn refusal(error: ureq::Error) -> EtcdError {
    let cause = match &error {
        ureq::Error::Rustls(cause) => Some(cause),
        ureq::Error::Io(io) => io.get_ref().and_then(|inner| inner.downcast_ref()),
        _ => None,
    };
    match cause.cloned() {
        Some(cause @ rustls::Error::InvalidCertificate(_)) => {
            EtcdError::ServerCertificate(foreign(&cause))
        }
        Some(cause @ rustls::Error::AlertReceived(_)) => EtcdError::Alert(foreign(&cause)),
        _ => EtcdError::Transport(foreign(&error)),
    }
}
