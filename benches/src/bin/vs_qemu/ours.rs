//! A pair of `colo-vmm`. What its steps take is in its events.

use std::time::Duration;

use ::tests::Result;
use ::tests::process::Process;
use ::tests::vmm::{ColoVmm, Side, Vmm};
use benches::case::Case;
use benches::link::Cable;
use qmp_types::ColoCheckpoint;
use serde::Deserialize;
use serde_json::Value;

use crate::sample::{Checkpoint, Pair};
use crate::serial::Line;

/// Two `colo-vmm` in COLO.
#[derive(Debug)]
pub struct OurPair {
    primary: Vmm,
    secondary: Vmm,
    /// Where the secondary listens.
    uri: String,
    checkpoints: Vec<Checkpoint>,
}

/// The event of a complete checkpoint.
const CHECKPOINT: &str = "X_COLO_CHECKPOINT";

impl OurPair {
    /// Starts both with further `options`, and waits until the primary's guest is heard.
    pub fn start(
        case: &Case,
        cable: &Cable,
        options: &str,
        is_simulated: bool,
    ) -> Result<(Self, Line)> {
        let mut vmm = ColoVmm::new("primary")
            .memory(case.memory_mib)
            .dirty_pages(case.dirty_pages)
            .args(["--pass-delay", &case.pass_delay.to_string()])
            .args(options.split_whitespace());
        if case.is_filled {
            vmm = vmm.args(["--fill-ram"]);
        }
        if is_simulated {
            vmm = vmm.simulated();
        }
        let dir = tempfile::Builder::new().prefix("vs-qemu-").tempdir()?;
        // Where it would make a file there is the line.
        let line = Line::listen(&ColoVmm::serial_in(dir.path()))?;
        let mut secondary = vmm
            .clone()
            .incoming()
            .start_as(|command| cable.on(Side::Secondary, command))?;
        let command = cable.on(Side::Primary, vmm.command(dir.path())?);
        let mut primary = Vmm::start("primary", command, dir)?;
        line.wait(Duration::ZERO)?;
        for side in [&mut secondary, &mut primary] {
            case.configure(&mut side.qmp)?;
        }
        let uri = secondary.listen_on(&cable.uri(secondary.dir(), "migration"))?;
        let pair = Self {
            primary,
            secondary,
            uri,
            checkpoints: Vec::new(),
        };
        Ok((pair, line))
    }
}

impl Pair for OurPair {
    fn processes(&self) -> [&Process; 2] {
        [&self.primary.process, &self.secondary.process]
    }

    fn enter(&mut self) -> Result<()> {
        self.primary.migrate(&self.uri)?;
        self.primary.wait_migration("colo").map(drop)
    }

    fn is_vcpu(&self, thread: &str) -> bool {
        thread.starts_with("vcpu") || thread == "sim-cpu"
    }

    fn wait_checkpoint(&mut self) -> Result<()> {
        let event = self.primary.qmp.wait_event(CHECKPOINT).map_err(|e| {
            let what = format!("takes no checkpoint: {e}");
            self.primary.process.failure(&what)
        })?;
        self.checkpoints.push(checkpoint(&event)?);
        Ok(())
    }

    fn checkpoints(&mut self) -> Result<Vec<Checkpoint>> {
        let mut checkpoints = self.checkpoints.clone();
        // A secondary may be a moment behind.
        for _ in 0..checkpoints.len() {
            let event = self.secondary.qmp.wait_event(CHECKPOINT)?;
            let told = ColoCheckpoint::deserialize(&event["data"])?;
            let number = usize::try_from(told.checkpoint)?;
            if let Some(checkpoint) = number.checked_sub(1).and_then(|i| checkpoints.get_mut(i)) {
                checkpoint.steps.extend(steps("secondary", &told));
            }
        }
        Ok(checkpoints)
    }

    fn bytes(&mut self, _: Duration) -> Result<Option<f64>> {
        Ok(None)
    }
}

fn steps(side: &str, told: &ColoCheckpoint) -> Vec<(String, Duration)> {
    let name = |step: &str| format!("{side}: {step}");
    let steps = told.steps.iter();
    steps
        .map(|step| (name(&step.step), Duration::from_micros(step.us)))
        .collect()
}

/// What the primary's event says.
fn checkpoint(event: &Value) -> Result<Checkpoint> {
    let told = ColoCheckpoint::deserialize(&event["data"])?;
    let at = |unit: &str| event["timestamp"][unit].as_u64().ok_or("no timestamp");
    let ended = Duration::from_secs(at("seconds")?) + Duration::from_micros(at("microseconds")?);
    let [transfer, load, resume] = parts(&told);
    Ok(Checkpoint {
        ended,
        pause: Duration::from_micros(told.pause_us),
        transfer,
        load,
        resume,
        dirty_pages: told.dirty_pages,
        bytes: Some(told.ram_bytes + told.device_bytes),
        steps: steps("primary", &told),
    })
}

/// Until the secondary has everything, until it has put it in place, until the guest runs: what the
/// steps from the stop on add up to.
fn parts(told: &ColoCheckpoint) -> [Duration; 3] {
    let begin = told.steps.iter().position(|s| s.step == "stopping the vm");
    let steps = told.steps.get(begin.unwrap_or(0)..).unwrap_or_default();
    let mut parts = [Duration::ZERO; 3];
    let mut is_received = false;
    for step in steps {
        let part = match step.step.as_str() {
            "resuming the vm" => 2,
            _ if is_received => 1,
            _ => 0,
        };
        is_received |= step.step == "waiting for vmstate-received";
        parts[part] += Duration::from_micros(step.us);
    }
    parts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_says_what_the_parts_of_a_pause_took() {
        let step = |step: &str, us: u64| json!({"step": step, "us": us});
        let event = json!({
            "event": CHECKPOINT,
            "timestamp": {"seconds": 100, "microseconds": 7},
            "data": {
                "mode": "primary", "checkpoint": 3, "pause-us": 1500, "ram-bytes": 8000,
                "dirty-pages": 2, "flushed-pages": 0, "device-bytes": 50, "serial-bytes": 9,
                "steps": [
                    step("waiting for checkpoint-reply", 900), step("stopping the vm", 100),
                    step("sending ram", 600), step("waiting for vmstate-received", 200),
                    step("releasing output", 50), step("waiting for vmstate-loaded", 500),
                    step("resuming the vm", 60),
                ],
            },
        });
        let checkpoint = checkpoint(&event).unwrap();
        let us = Duration::from_micros;
        let parts = [checkpoint.transfer, checkpoint.load, checkpoint.resume];
        assert_eq!(parts, [900, 550, 60].map(us));
        assert_eq!(checkpoint.ended, Duration::from_secs(100) + us(7));
        assert_eq!(checkpoint.bytes, Some(8050));
        assert_eq!(checkpoint.steps.len(), 7);
        assert_eq!(
            checkpoint.steps[2],
            ("primary: sending ram".into(), us(600))
        );
    }
}
