//! An authority of a test's own, and the certificates that it issues, as files in PEM.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;

use crate::Result;

/// Issues certificates. Dropping it removes the files of all of them.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
    issued: Cell<u32>,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Authority {
    /// One that nobody knows yet.
    ///
    /// # Errors
    /// Its files cannot be written.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let dir = tempfile::tempdir()?;
        // Another name for each, as is usual.
        let name = format!("authority in {}", dir.path().display());
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        write_pem(&dir.path().join("ca.pem"), "CERTIFICATE", issuer.der())?;
        Ok(Self {
            issuer,
            dir,
            issued: Cell::new(0),
        })
    }

    /// The file with its own certificate.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Issues a certificate for hosts or addresses, which serves and which is a client's: etcd's gateway
    /// shows its server's to itself.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn issue(&self, names: &[&str]) -> Result<Issued> {
        self.issue_with(names, |_| {})
    }

    /// The same, of the year 2000.
    ///
    /// # Errors
    /// As there.
    pub fn issue_expired(&self, names: &[&str]) -> Result<Issued> {
        self.issue_with(names, |params| {
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(2000, 12, 31);
        })
    }

    fn issue_with(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<Issued> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names)?;
        // Without a common name, which etcd's gateway does not take with a password.
        params.distinguished_name = DistinguishedName::new();
        let subject = DnType::OrganizationName;
        params.distinguished_name.push(subject, "a test");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let number = self.issued.replace(self.issued.get() + 1);
        let file = |what: &str| self.dir.path().join(format!("{number}-{what}.pem"));
        let issued = Issued {
            certificate: file("certificate"),
            key: file("key"),
        };
        write_pem(&issued.certificate, "CERTIFICATE", certificate.der())?;
        write_pem(&issued.key, "PRIVATE KEY", &key.serialize_der())?;
        Ok(issued)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Authority").field(&self.dir.path()).finish()
    }
}

fn write_pem(file: &Path, label: &str, der: &[u8]) -> Result<()> {
    let mut text = format!("-----BEGIN {label}-----\n");
    let encoded = STANDARD.encode(der);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, behind) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = behind;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    Ok(fs::write(file, text)?)
}
