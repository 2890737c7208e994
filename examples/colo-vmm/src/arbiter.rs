//! The arbiter of a pair: its options, and what they make.

use std::error::Error;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::Args;
use colo_heartbeat::arbiter::etcd::{
    AddressError, Credential, EtcdError, EtcdOptions, OptionsError,
};
use colo_heartbeat::arbiter::{
    Arbiter, Etcd, EtcdAddress, Gateway, LockFile, Manual, Owner, Register,
};
use uuid::Uuid;

/// Who says which side goes on, and how it is asked.
#[derive(Clone, Debug, Args)]
pub struct ArbiterArgs {
    /// Who says which side goes on: none (only x-colo-lost-heartbeat does), file:PATH on storage
    /// that both hosts have, or etcd:HOST:PORT[,HOST:PORT...][/KEY], where https:// may stand before
    /// each HOST. KEY is colo/UUID if none is named, and the same on both sides.
    #[arg(
        long,
        default_value = "none",
        value_name = "none|file:PATH|etcd:HOST:PORT,..."
    )]
    arbiter: ArbiterArg,
    /// How long a lease lasts without renewal, ms; the same on both sides.
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    arbiter_term: u64,
    /// The certificates of the authorities that etcd's may come from, in PEM: for https:// endpoints.
    /// This and the four that follow are read again when etcd refuses what was in them.
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// The certificate that this side shows to etcd, in PEM.
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Its key, in PEM and not encrypted.
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
    /// The user that this side is to etcd, where its authentication is enabled.
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    etcd_user: Option<String>,
    /// The file with that user's password, on one line.
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ArbiterArg {
    None,
    File(PathBuf),
    Etcd(EtcdAddress),
}

impl FromStr for ArbiterArg {
    type Err = String;

    fn from_str(arg: &str) -> Result<Self, String> {
        match arg.split_once(':') {
            None if arg == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("etcd", address)) => Ok(Self::Etcd(
                address.parse().map_err(|e: AddressError| e.to_string())?,
            )),
            _ => Err("expected none, file:PATH or etcd:HOST:PORT[,HOST:PORT...][/KEY]".into()),
        }
    }
}

impl ArbiterArgs {
    /// Is there one to ask?
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.arbiter != ArbiterArg::None
    }

    /// The arbiter of the pair `uuid`, as `me` asks it. An etcd is asked once, so that what it will never
    /// be content with is known before the other side is lost.
    ///
    /// # Errors
    /// Options that do not fit, files that cannot be used, an etcd that refuses.
    pub fn arbiter(&self, uuid: Uuid, me: Owner) -> Result<Box<dyn Arbiter>, Box<dyn Error>> {
        let session = uuid.into_bytes();
        let term = Duration::from_millis(self.arbiter_term);
        let for_etcd = [&self.etcd_ca, &self.etcd_cert, &self.etcd_password_file];
        Ok(match &self.arbiter {
            ArbiterArg::Etcd(address) => {
                let key = address.key().map_or(format!("colo/{uuid}"), str::to_owned);
                let mut gateway = Gateway::new(address, &key, self.etcd_options()?)?;
                check(&mut gateway, term)?;
                Box::new(Etcd::new(gateway, session, me, term))
            }
            _ if for_etcd.iter().any(|file| file.is_some()) => {
                return Err("--etcd-... are options of --arbiter etcd:...".into());
            }
            ArbiterArg::None => Box::new(Manual),
            ArbiterArg::File(path) => Box::new(LockFile::new(path, session, me, term)),
        })
    }

    fn etcd_options(&self) -> Result<EtcdOptions, OptionsError> {
        let read = |file: &PathBuf| Credential::file(file);
        let mut options = EtcdOptions::default();
        if let Some(certificates) = &self.etcd_ca {
            options = options.authority(read(certificates)?);
        }
        if let (Some(chain), Some(key)) = (&self.etcd_cert, &self.etcd_key) {
            options = options.client(read(chain)?, read(key)?);
        }
        if let (Some(name), Some(file)) = (&self.etcd_user, &self.etcd_password_file) {
            options = options.user(name, read(file)?);
        }
        Ok(options)
    }
}

/// One that does not answer now may do so later; a pair begins without it, if it has to.
fn check(gateway: &mut Gateway, term: Duration) -> Result<(), Box<dyn Error>> {
    match gateway.read(Instant::now() + term) {
        Ok(_) => Ok(()),
        Err(error) if EtcdError::of(&error).is_some_and(EtcdError::is_lasting) => Err(error.into()),
        Err(error) => {
            tracing::warn!(error = error.chain(), "the arbiter does not answer yet");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        arbiter: ArbiterArgs,
    }

    fn parse(line: &str) -> Result<ArbiterArgs, clap::Error> {
        Line::try_parse_from(["colo-vmm"].into_iter().chain(line.split(' '))).map(|l| l.arbiter)
    }

    #[test]
    fn an_arbiter_is_named_by_its_kind_and_place() {
        assert_eq!("none".parse(), Ok(ArbiterArg::None));
        assert_eq!("file:/a:b".parse(), Ok(ArbiterArg::File("/a:b".into())));
        for address in ["a:2379,[::1]:2379/colo/web", "https://a:1,https://b:2"] {
            let etcd = address.parse().unwrap();
            let arg = format!("etcd:{address}");
            assert_eq!(arg.parse(), Ok(ArbiterArg::Etcd(etcd)));
        }
        for text in ["", "file:", "etcd:", "etcd:a", "etcd:a:1/", "zookeeper:a:1"] {
            assert!(text.parse::<ArbiterArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn certificate_and_key_go_together_and_user_and_password() {
        for line in [
            "--arbiter etcd:https://a:1 --etcd-ca f",
            "--arbiter etcd:https://a:1 --etcd-ca f --etcd-cert f --etcd-key f",
            "--arbiter etcd:a:1 --etcd-user u --etcd-password-file f",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "--arbiter etcd:https://a:1 --etcd-ca f --etcd-cert f",
            "--arbiter etcd:https://a:1 --etcd-ca f --etcd-key f",
            "--arbiter etcd:a:1 --etcd-user u",
            "--arbiter etcd:a:1 --etcd-password-file f",
            "--arbiter etcd:a:1 --etcd-user u --etcd-password secret",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_does_not_fit_the_arbiter_is_refused_by_its_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.path().display();
        for (line, what) in [
            (
                format!("--arbiter file:/f --etcd-ca {file}"),
                "--etcd-... are options of --arbiter etcd:...".to_owned(),
            ),
            (
                "--arbiter etcd:https://a:1 --etcd-ca /none/such".to_owned(),
                "cannot read /none/such".to_owned(),
            ),
            (
                format!("--arbiter etcd:https://a:1 --etcd-ca {file}"),
                format!("{file} has no certificate in pem"),
            ),
            (
                format!("--arbiter etcd:a:1 --etcd-user u --etcd-password-file {file}"),
                format!("{file} has nothing instead of a password"),
            ),
        ] {
            let args = parse(&line).unwrap();
            let refused = args.arbiter(Uuid::nil(), Owner::new(1)).err().unwrap();
            assert_eq!(refused.to_string(), what, "{line}");
        }
    }
}
