//! What iperf3 moves over a link: the rate that a checkpoint's transfer is held against.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ::tests::process::Process;
use ::tests::vmm::Side;
use ::tests::{PATIENCE, Result};
use serde_json::Value;

use crate::link::{Cable, Transport};
use crate::report::Rate;

const RUNS: usize = 3;

/// Measures one connection, `seconds` three times. A machine without iperf3 gives the reason instead
/// of a rate.
///
/// # Errors
/// iperf3 fails.
pub fn measure(cable: &Cable, seconds: u32) -> Result<Rate> {
    let skipped = |reason: &str| Rate {
        link: cable.link(),
        gb_per_s: Vec::new(),
        skipped: Some(reason.to_owned()),
    };
    if cable.link().transport == Transport::Unix {
        return Ok(skipped("iperf3 knows no unix sockets"));
    }
    if Command::new("iperf3").arg("--version").output().is_err() {
        return Ok(skipped("iperf3 is not installed"));
    }
    let mut server = Command::new("iperf3");
    server.args(["--server", "--bind", cable.address()]);
    let mut server = Process::spawn("iperf3's server", &mut cable.on(Side::Secondary, server))?;
    let mut gb_per_s = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while gb_per_s.len() < RUNS {
        let mut client = Command::new("iperf3");
        client.args(["--client", cable.address(), "--json"]);
        client.args(["--time", &seconds.to_string()]);
        let output = cable.on(Side::Primary, client).output()?;
        let told: Value = serde_json::from_slice(&output.stdout)?;
        match told["end"]["sum_received"]["bits_per_second"].as_f64() {
            Some(bits) => gb_per_s.push(bits / 8e9),
            // It may not listen yet.
            None if server.is_running()? && gb_per_s.is_empty() && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(100));
            }
            None => return Err(format!("iperf3 says {}", told["error"]).into()),
        }
    }
    Ok(Rate {
        link: cable.link(),
        gb_per_s,
        skipped: None,
    })
}
