//! Two hosts on one machine, or three: network namespaces that cables join, which can be cut in each
//! direction, for everything or for a part. What is cut is lost on its way in, so that the sender learns
//! nothing: no reset, no error, as when a host or a switch in between is gone.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;

/// One of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// One of two.
    A,
    /// The other.
    B,
    /// Where there are three, the one that only looks on.
    C,
}

impl Host {
    /// Its address (of TEST-NET-1, RFC 5737), on all of its cables. It is the same in each network.
    #[must_use]
    pub const fn address(self) -> &'static str {
        match self {
            Self::A => "192.0.2.1",
            Self::B => "192.0.2.2",
            Self::C => "192.0.2.3",
        }
    }

    /// The end of a cable to it, in the other namespace, and the chain that filters what comes out.
    const fn device(self) -> &'static str {
        match self {
            Self::A => "to_a",
            Self::B => "to_b",
            Self::C => "to_c",
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

/// Namespaces, and a cable between each two of them. Dropping it removes them.
#[derive(Debug)]
pub struct Network {
    name: String,
    hosts: &'static [Host],
}

impl Network {
    /// Two hosts, with nothing cut.
    ///
    /// # Errors
    /// See [`missing`].
    pub fn new() -> Result<Self> {
        Self::of(&[Host::A, Host::B])
    }

    /// Three hosts, with nothing cut.
    ///
    /// # Errors
    /// See [`missing`].
    pub fn of_three() -> Result<Self> {
        Self::of(&[Host::A, Host::B, Host::C])
    }

    /// Two hosts whose ends of the cable are devices of this process's namespace, A's and B's.
    ///
    /// # Errors
    /// See [`missing`], or there are no such devices.
    pub fn over([a, b]: [&str; 2]) -> Result<Self> {
        let network = Self::unwired(&[Host::A, Host::B]);
        let cable = |device, at, to: Host| {
            let namespace = network.namespace(at);
            format!("link set {device} netns {namespace} name {}\n", to.device())
        };
        let cables = cable(a, Host::A, Host::B) + &cable(b, Host::B, Host::A);
        network.wired(&cables)
    }

    fn of(hosts: &'static [Host]) -> Result<Self> {
        let network = Self::unwired(hosts);
        let mut cables = String::new();
        for (place, a) in hosts.iter().enumerate() {
            for b in &hosts[place + 1..] {
                cables += &format!(
                    "link add {} netns {} type veth peer name {} netns {}\n",
                    b.device(),
                    network.namespace(*a),
                    a.device(),
                    network.namespace(*b)
                );
            }
        }
        network.wired(&cables)
    }

    fn unwired(hosts: &'static [Host]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!("colo-{}-{count}", std::process::id()),
            hosts,
        }
    }

    /// Makes the namespaces, and lays the cables by commands of `ip`.
    fn wired(self, cables: &str) -> Result<Self> {
        let hosts = self.hosts.iter();
        let namespaces: String = hosts
            .map(|host| format!("netns add {}\n", self.namespace(*host)))
            .collect();
        run(
            Command::new("ip").args(["-batch", "-"]),
            &(namespaces + cables),
        )?;
        for host in self.hosts {
            self.connect(*host)?;
        }
        Ok(self)
    }

    fn connect(&self, host: Host) -> Result<()> {
        // What a host says to itself goes by its loopback device.
        let mut batch = "link set lo up\n".to_owned();
        let mut filter = "table netdev cut {\n".to_owned();
        for other in self.others(host) {
            let device = other.device();
            batch += &format!(
                "addr add {} peer {} dev {device}\nlink set {device} up\n",
                host.address(),
                other.address()
            );
            filter += &format!(
                "chain {device} {{ \
                 type filter hook ingress device \"{device}\" priority 0; }}\n"
            );
        }
        let mut ip = Command::new("ip");
        let namespace = self.namespace(host);
        run(ip.args(["-netns", &namespace, "-batch", "-"]), &batch)?;
        self.filter(host, &(filter + "}\n"))
    }

    fn others(&self, host: Host) -> impl Iterator<Item = Host> {
        self.hosts.iter().copied().filter(move |h| *h != host)
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

    /// Cuts, besides what is cut already, what `from` sends to `to`.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn cut(&self, from: Host, to: Host, traffic: Traffic) -> Result<()> {
        let rules = traffic.rules().into_iter();
        let rules: String = rules
            .map(|rule| format!("add rule netdev cut {} {rule}\n", from.device()))
            .collect();
        self.filter(to, &rules)
    }

    /// Cuts both directions between `a` and `b`, one a few milliseconds after the other.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn cut_apart(&self, a: Host, b: Host, traffic: Traffic) -> Result<()> {
        self.cut(a, b, traffic)?;
        self.cut(b, a, traffic)
    }

    /// Heals what was cut between `a` and `b`.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn heal(&self, a: Host, b: Host) -> Result<()> {
        for (from, to) in [(a, b), (b, a)] {
            self.filter(to, &format!("flush chain netdev cut {}", from.device()))?;
        }
        Ok(())
    }

    /// Limits what `from` sends to `to` to `mbit` 10^6 bits a second.
    ///
    /// # Errors
    /// The traffic control's.
    pub fn limit(&self, from: Host, to: Host, mbit: u32) -> Result<()> {
        // A burst is a segment of 64 KiB at least, and what goes out in a tick of 4 ms.
        let burst = (u64::from(mbit) * 500).max(1 << 17).to_string();
        let rate = format!("{mbit}mbit");
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "replace", "dev", to.device(), "root", "tbf"]);
        tc.args(["rate", &rate, "burst", &burst, "latency", "20ms"]);
        run(&mut self.on(from, &tc), "")
    }

    fn filter(&self, host: Host, commands: &str) -> Result<()> {
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        run(&mut self.on(host, &nft), commands)
    }

    fn namespace(&self, host: Host) -> String {
        format!("{}-{host:?}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in self.hosts {
            // The cables go with either end. What still runs there keeps its own end of them.
            let mut ip = Command::new("ip");
            let _ = run(ip.args(["netns", "del", &self.namespace(*host)]), "");
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
