//! Two hosts on one machine: network namespaces that a cable joins, which can be cut in each direction,
//! for everything or for a part. What is cut is lost on its way in, so that the sender learns nothing:
//! no reset, no error, as when a host or a switch in between is gone.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;

/// Name of each end of the cable, in its namespace.
const DEVICE: &str = "cable";

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// One.
    A,
    /// The other.
    B,
}

impl Host {
    const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its address on the cable (of TEST-NET-1, RFC 5737). Each network has the same two.
    #[must_use]
    pub const fn address(self) -> &'static str {
        match self {
            Self::A => "192.0.2.1",
            Self::B => "192.0.2.2",
        }
    }
}

/// What of the traffic is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// All.
    All,
    /// TCP connections to this port.
    Only(u16),
    /// All TCP connections but those to this port.
    AllBut(u16),
}

impl Traffic {
    /// What the packet filter is told, one after the other.
    fn rules(self) -> Vec<String> {
        // Whichever end of the connection has sent it. (As two comparisons in one rule nft makes one of
        // them, which is another rule where they are negated.)
        let of =
            |port, verdict| ["sport", "dport"].map(|end| format!("tcp {end} {port} {verdict}"));
        match self {
            Self::All => vec!["drop".to_owned()],
            Self::Only(port) => of(port, "drop").to_vec(),
            Self::AllBut(port) => {
                let mut rules = of(port, "accept").to_vec();
                rules.push("meta l4proto tcp drop".to_owned());
                rules
            }
        }
    }
}

/// Two namespaces and the cable between them. Dropping it removes them.
#[derive(Debug)]
pub struct Network {
    name: String,
}

impl Network {
    /// A network of its own, with nothing cut.
    ///
    /// # Errors
    /// See [`missing`].
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let network = Self {
            name: format!("colo-{}-{count}", std::process::id()),
        };
        let [a, b] = Host::BOTH.map(|host| network.namespace(host));
        let mut batch = format!(
            "netns add {a}\nnetns add {b}\n\
             link add {DEVICE} netns {a} type veth peer name {DEVICE} netns {b}\n"
        );
        run(Command::new("ip").args(["-batch", "-"]), &batch)?;
        for host in Host::BOTH {
            batch = format!(
                "addr add {}/30 dev {DEVICE}\nlink set {DEVICE} up\n",
                host.address()
            );
            let namespace = network.namespace(host);
            let mut ip = Command::new("ip");
            run(ip.args(["-netns", &namespace, "-batch", "-"]), &batch)?;
            network.filter(
                host,
                &format!(
                    "table netdev cut {{ chain in {{ \
                     type filter hook ingress device \"{DEVICE}\" priority 0; }}; }}"
                ),
            )?;
        }
        Ok(network)
    }

    /// The command, to be run on `host`: with the same process, arguments and environment.
    #[must_use]
    pub fn on(&self, host: Host, command: &Command) -> Command {
        let mut entered = Command::new("nsenter");
        entered.arg(format!("--net=/run/netns/{}", self.namespace(host)));
        entered.arg("--").arg(command.get_program());
        entered.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => entered.env(name, value),
                None => entered.env_remove(name),
            };
        }
        entered
    }

    /// Cuts, besides what is cut already, what `from` sends to the other host.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn cut(&self, from: Host, traffic: Traffic) -> Result<()> {
        let rules = traffic.rules().into_iter();
        let rules: String = rules
            .map(|rule| format!("add rule netdev cut in {rule}\n"))
            .collect();
        self.filter(from.other(), &rules)
    }

    /// Cuts both directions, one a few milliseconds after the other.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn cut_apart(&self, traffic: Traffic) -> Result<()> {
        self.cut(Host::A, traffic)?;
        self.cut(Host::B, traffic)
    }

    /// Heals what was cut.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn heal(&self) -> Result<()> {
        for host in Host::BOTH {
            self.filter(host, "flush chain netdev cut in")?;
        }
        Ok(())
    }

    fn filter(&self, host: Host, commands: &str) -> Result<()> {
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        run(&mut self.on(host, &nft), commands)
    }

    fn namespace(&self, host: Host) -> String {
        let end = match host {
            Host::A => "a",
            Host::B => "b",
        };
        format!("{}-{end}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in Host::BOTH {
            // The cable goes with either. What still runs there keeps its own end of it.
            let mut ip = Command::new("ip");
            let _ = run(ip.args(["netns", "del", &self.namespace(host)]), "");
        }
    }
}

/// Why there are no such networks here, `None` if there are.
#[must_use]
pub fn missing() -> Option<&'static str> {
    static TRIED: OnceLock<Option<String>> = OnceLock::new();
    let tried = TRIED.get_or_init(|| {
        let error = Network::new().err()?;
        Some(format!(
            "needs network namespaces (root, iproute2, nftables, util-linux): {error}"
        ))
    });
    tried.as_deref()
}

fn run(command: &mut Command, input: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{program} does not start: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that refuses its arguments does not read: it says so itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}: {}", output.status, said.trim()).into())
}
