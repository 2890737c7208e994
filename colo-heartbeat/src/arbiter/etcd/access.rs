//! The connections to an etcd, and the user that asks by them.

use std::fmt;
use std::time::{Duration, Instant};

use ureq::config::ConfigBuilder;
use ureq::typestate::AgentScope;

use super::codec;
use super::error::EtcdError;
use super::options::{EtcdOptions, OptionsError};
#[cfg(feature = "etcd-tls")]
use super::tls;
#[cfg(not(feature = "etcd-tls"))]
use crate::arbiter::foreign::foreign;
use crate::arbiter::register::ENTRY_LEN;

/// The most that an answer may have, bytes: an entry in base64, and what etcd says beside it.
const ANSWER: u64 = 8 * 1024;
const _: () = assert!((ENTRY_LEN as u64) * 4 < ANSWER);

/// What [`EtcdOptions`] say, ready for use.
#[derive(Debug)]
pub(super) struct Access {
    agent: ureq::Agent,
    login: Option<Login>,
}

/// A user, and whom etcd takes this side for.
#[derive(Debug)]
struct Login {
    name: String,
    password: Secret,
    token: Token,
}

#[derive(Debug)]
enum Token {
    /// The user has to be authenticated, for the first time or again.
    Wanted,
    /// What etcd has given for the password. It forgets it after a while, and may when it starts again.
    Given(Secret),
    /// Its authentication is not enabled.
    Unneeded,
}

struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("secret")
    }
}

impl Access {
    pub(super) fn new(is_https: bool, options: &EtcdOptions) -> Result<Self, OptionsError> {
        let agent = if is_https {
            secured(options)?
        } else if options.ca.is_some() || options.client.is_some() {
            return Err(OptionsError::NotHttps);
        } else {
            config().build().into()
        };
        let login = match &options.user {
            Some(user) if user.name.is_empty() => return Err(OptionsError::NoName),
            Some(user) => Some(Login {
                name: user.name.clone(),
                password: Secret(user.password()?.to_owned()),
                token: Token::Wanted,
            }),
            None => None,
        };
        Ok(Self { agent, login })
    }

    /// Has one endpoint answer a request, and authenticates before if that is needed.
    pub(super) fn request(
        &mut self,
        endpoint: &str,
        path: &str,
        body: &str,
        until: Instant,
    ) -> Result<Vec<u8>, EtcdError> {
        match self.attempt(endpoint, path, body, until) {
            Err(EtcdError::Refused { message, .. })
                if codec::wants_token(&message) && self.forget_token() =>
            {
                self.attempt(endpoint, path, body, until)
            }
            result => result,
        }
    }

    fn attempt(
        &mut self,
        endpoint: &str,
        path: &str,
        body: &str,
        until: Instant,
    ) -> Result<Vec<u8>, EtcdError> {
        if let Some(login) = &mut self.login
            && matches!(login.token, Token::Wanted)
        {
            let name = &login.name;
            login.token = login
                .authenticate(&self.agent, endpoint, until)
                .map_err(|error| EtcdError::Authentication {
                    user: name.clone(),
                    source: Box::new(error),
                })?;
        }
        let proof = match &self.login {
            Some(Login {
                token: Token::Given(token),
                ..
            }) => Proof::Token(token),
            _ => Proof::None,
        };
        post(
            &self.agent,
            &format!("{endpoint}{path}"),
            proof,
            body,
            until,
        )
    }

    /// Was there one, or did it seem that none was needed?
    fn forget_token(&mut self) -> bool {
        self.login.as_mut().is_some_and(|login| {
            let had = std::mem::replace(&mut login.token, Token::Wanted);
            !matches!(had, Token::Wanted)
        })
    }
}

impl Login {
    fn authenticate(
        &self,
        agent: &ureq::Agent,
        endpoint: &str,
        until: Instant,
    ) -> Result<Token, EtcdError> {
        let url = format!("{endpoint}/v3/auth/authenticate");
        let body = codec::authenticate(&self.name, &self.password.0);
        match post(agent, &url, Proof::Password(&self.password), &body, until) {
            Ok(answer) => Ok(Token::Given(Secret(codec::authenticate_answer(&answer)?))),
            Err(EtcdError::Refused { message, .. }) if codec::is_disabled(&message) => {
                Ok(Token::Unneeded)
            }
            Err(error) => Err(error),
        }
    }
}

/// What plain connections and those by TLS have in common.
fn config() -> ConfigBuilder<AgentScope> {
    ureq::Agent::config_builder()
        // Whatever the environment says: these are the addresses.
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .max_response_header_size(4096)
}

#[cfg(feature = "etcd-tls")]
fn secured(options: &EtcdOptions) -> Result<ureq::Agent, OptionsError> {
    let config = config().https_only(true).tls_config(tls::config(options)?);
    Ok(tls::agent(config.build()))
}

#[cfg(not(feature = "etcd-tls"))]
const fn secured(_: &EtcdOptions) -> Result<ureq::Agent, OptionsError> {
    Err(OptionsError::NoTls)
}

/// What a request has that nobody else is to see.
#[derive(Clone, Copy)]
enum Proof<'a> {
    None,
    /// In a header of its own.
    Token(&'a Secret),
    /// In the body.
    Password(&'a Secret),
}

fn post(
    agent: &ureq::Agent,
    url: &str,
    proof: Proof,
    body: &str,
    until: Instant,
) -> Result<Vec<u8>, EtcdError> {
    let limit = until.saturating_duration_since(Instant::now());
    if limit < LEAST {
        return Err(EtcdError::NoTime);
    }
    let request = agent
        .post(url)
        .config()
        .timeout_global(Some(limit))
        .build()
        .content_type("application/json");
    let (request, secret) = match proof {
        Proof::None => (request, None),
        Proof::Token(Secret(token)) => (request.header("Authorization", token), Some(token)),
        Proof::Password(Secret(password)) => (request, Some(password)),
    };
    let mut response = request.send(body).map_err(transport)?;
    let status = response.status().as_u16();
    let answer = response
        .body_mut()
        .with_config()
        .limit(ANSWER)
        .read_to_vec()
        .map_err(transport)?;
    if status == 200 {
        Ok(answer)
    } else {
        let message = codec::refusal(&answer, secret.map(String::as_str));
        Err(EtcdError::Refused { status, message })
    }
}

/// The least time in which something can be asked.
const LEAST: Duration = Duration::from_millis(1);

#[cfg(feature = "etcd-tls")]
fn transport(error: ureq::Error) -> EtcdError {
    tls::refusal(error)
}

#[cfg(not(feature = "etcd-tls"))]
fn transport(error: ureq::Error) -> EtcdError {
    EtcdError::Transport(foreign(&error))
}
