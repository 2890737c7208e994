//! etcd: a cluster of one member, started by a test on the loopback with data of its own.
//!
//! The program is the one that the environment variable `COLO_ETCD` names, or `etcd` on `PATH`.

use std::env;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::certificates::Issued;
use crate::netns::{Host, Network};
use crate::process::Process;
use crate::{PATIENCE, Result};

/// Where etcd is looked for first.
pub const VARIABLE: &str = "COLO_ETCD";

/// The program, or why there is none.
///
/// # Errors
/// What was looked for.
pub fn find() -> std::result::Result<PathBuf, String> {
    let named = env::var_os(VARIABLE).filter(|path| !path.is_empty());
    let program = PathBuf::from(named.unwrap_or_else(|| "etcd".into()));
    match Command::new(&program).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(program),
        Ok(output) => Err(format!("needs etcd, which ends with {}", output.status)),
        Err(e) => Err(format!("needs etcd in {VARIABLE} or on PATH: {e}")),
    }
}

/// Where an etcd with a host of its own listens, for clients, for other members, and without TLS.
const PORTS: [u16; 3] = [2379, 2380, 2381];

/// What an etcd shows its clients, and wants of them. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guard<'a> {
    /// It speaks TLS, and shows this certificate.
    pub tls: Option<&'a Issued>,
    /// It wants to see a certificate of this authority's.
    pub client_authority: Option<&'a Path>,
    /// How long it remembers a token that is not used, seconds.
    pub token_ttl: Option<u32>,
}

impl<'a> Guard<'a> {
    /// TLS alone.
    #[must_use]
    pub fn by_tls(certificate: &'a Issued) -> Self {
        Self {
            tls: Some(certificate),
            ..Self::default()
        }
    }
}

/// A running etcd. Dropping it kills it and removes its data.
#[derive(Debug)]
pub struct Etcd {
    process: Process,
    command: Command,
    endpoint: String,
    /// Where it is administered, without TLS.
    open: String,
    _data: TempDir,
}

impl Etcd {
    /// Starts it without data.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(program: &Path) -> Result<Self> {
        Self::start_guarded(program, Guard::default())
    }

    /// Starts it without data, and guarded.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_guarded(program: &Path, guard: Guard) -> Result<Self> {
        // A port that was free may be somebody else's a moment later.
        let mut attempts = 5;
        loop {
            attempts -= 1;
            match Self::listening(program, "127.0.0.1", free_ports()?, guard, |command| {
                command
            }) {
                Err(_) if attempts > 0 => {}
                result => return result,
            }
        }
    }

    /// Starts it without data on a host of `network`, which has none yet.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start_on(program: &Path, network: &Network, host: Host) -> Result<Self> {
        let on_host = |command| network.on(host, &command);
        Self::listening(program, host.address(), PORTS, Guard::default(), on_host)
    }

    fn listening(
        program: &Path,
        host: &str,
        [clients, members, open]: [u16; 3],
        guard: Guard,
        placed: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let address = format!("{host}:{clients}");
        let members = format!("http://{host}:{members}");
        let (endpoint, open, urls) = match guard.tls {
            None => (
                address.clone(),
                address.clone(),
                format!("http://{address}"),
            ),
            Some(_) => {
                let (endpoint, open) = (format!("https://{address}"), format!("{host}:{open}"));
                let urls = format!("{endpoint},http://{open}");
                (endpoint, open, urls)
            }
        };
        let mut command = Command::new(program);
        command
            .arg("--data-dir")
            .arg(data.path().join("etcd"))
            .args(["--listen-client-urls", &urls])
            .args(["--advertise-client-urls", &urls])
            .args(["--listen-peer-urls", &members])
            .args(["--initial-advertise-peer-urls", &members])
            .args(["--initial-cluster", &format!("default={members}")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            // Passwords are checked often in the tests.
            .args(["--bcrypt-cost", "4"]);
        if let Some(Issued { certificate, key }) = guard.tls {
            command.arg("--cert-file").arg(certificate);
            command.arg("--key-file").arg(key);
        }
        if let Some(authority) = guard.client_authority {
            command.arg("--client-cert-auth");
            command.arg("--trusted-ca-file").arg(authority);
        }
        if let Some(ttl) = guard.token_ttl {
            command.args(["--auth-token-ttl", &ttl.to_string()]);
        }
        let mut command = placed(command);
        Ok(Self {
            process: run(&mut command)?,
            command,
            endpoint,
            open,
            _data: data,
        })
    }

    /// `HOST:PORT` for clients, or `https://HOST:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// It takes requests and answers none.
    ///
    /// # Errors
    /// There is no such process.
    pub fn freeze(&self) -> Result<()> {
        self.process.freeze()
    }

    /// It goes on after [`Etcd::freeze`], with the requests that have come meanwhile.
    ///
    /// # Errors
    /// There is no such process.
    pub fn thaw(&self) -> Result<()> {
        self.process.thaw()
    }

    /// Kills it; its data stay.
    ///
    /// # Errors
    /// The system call's.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Starts it again where it was, after [`Etcd::kill`].
    ///
    /// # Errors
    /// It does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.process = run(&mut self.command)?;
        Ok(())
    }
}

impl Etcd {
    /// The name of the user that [`Etcd::enable_authentication`] adds.
    pub const USER: &str = "colo";
    /// What keys begin with that this user may read and write.
    pub const KEYS: &str = "colo/";
    const ROOT: (&str, &str) = ("root", "the root's");

    /// Has it answer nobody any more but [`Etcd::USER`], and root.
    ///
    /// # Errors
    /// It refuses.
    pub fn enable_authentication(&self, password: &str) -> Result<()> {
        let add = |(name, password)| json!({"name": name, "password": password});
        let keys = Self::KEYS.as_bytes();
        let mut end = keys.to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let permission = json!({
            "permType": "READWRITE",
            "key": STANDARD.encode(keys),
            "range_end": STANDARD.encode(end),
        });
        let (root, user, role) = (Self::ROOT.0, Self::USER, "keys");
        for (what, request) in [
            ("user/add", add(Self::ROOT)),
            ("user/grant", json!({"user": root, "role": root})),
            ("role/add", json!({"name": role})),
            ("role/grant", json!({"name": role, "perm": permission})),
            ("user/add", add((user, password))),
            ("user/grant", json!({"user": user, "role": role})),
            ("enable", json!({})),
        ] {
            self.post(&format!("auth/{what}"), None, &request)?;
        }
        Ok(())
    }

    /// Gives [`Etcd::USER`] a password, another or the same: its tokens are forgotten.
    ///
    /// # Errors
    /// It refuses.
    pub fn change_password(&self, password: &str) -> Result<()> {
        let (root, its) = Self::ROOT;
        let token = self.token(root, its)?;
        let request = json!({"name": Self::USER, "password": password});
        self.post("auth/user/changepw", Some(&token), &request)?;
        Ok(())
    }

    /// A token for a password.
    ///
    /// # Errors
    /// It refuses.
    pub fn token(&self, user: &str, password: &str) -> Result<String> {
        let request = json!({"name": user, "password": password});
        let answer = self.post("auth/authenticate", None, &request)?;
        Ok(answer["token"].as_str().ok_or("no token")?.to_owned())
    }

    /// Reads a key with a token.
    ///
    /// # Errors
    /// It refuses.
    pub fn read(&self, token: &str, key: &str) -> Result<Value> {
        self.post(
            "kv/range",
            Some(token),
            &json!({"key": STANDARD.encode(key)}),
        )
    }

    fn post(&self, path: &str, token: Option<&str>, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let token = token.map_or_else(String::new, |t| format!("Authorization: {t}\r\n"));
        let mut stream = TcpStream::connect(&self.open)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (host, length) = (&self.open, body.len());
        write!(
            stream,
            "POST /v3/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\
             {token}Connection: close\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(format!("{path}: {head}: {body}").into());
        }
        Ok(serde_json::from_str(body)?)
    }
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All are held until all are known.
    let mut listeners = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

/// Starts it, and waits until it serves.
fn run(command: &mut Command) -> Result<Process> {
    let by_tls = command.get_args().any(|arg| arg == "--cert-file");
    let process = Process::spawn("etcd", command)?;
    // Said once it is known who leads: 3.4 and earlier, and 3.5 on.
    let said = |log: &[u8], either: [&str; 2]| {
        let log = String::from_utf8_lossy(log);
        either.iter().any(|line| log.contains(line))
    };
    let serves = |log: &[u8]| {
        let openly = said(
            log,
            [
                "serving insecure client requests",
                "serving client traffic insecurely",
            ],
        );
        let in_tls = said(
            log,
            [
                "serving client requests on",
                "serving client traffic securely",
            ],
        );
        (openly && (in_tls || !by_tls)).then_some(())
    };
    process.stderr().wait_for("service", serves)?;
    Ok(process)
}
