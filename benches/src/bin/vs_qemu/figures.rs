//! The figures of some runs of one pair.

use std::collections::BTreeMap;
use std::time::Duration;

use benches::case::Case;
use benches::report::{self, Checkpoints};
use colo_vmm::demo::Spread;

use crate::sample::{Checkpoint, Sample};

const fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Those of several runs; `None` without a checkpoint.
pub fn of(case: &Case, pair: &str, samples: &[Sample]) -> Option<Checkpoints> {
    let checkpoints = || samples.iter().flat_map(|s| &s.checkpoints);
    let spread = |part: fn(&Checkpoint) -> Duration| Spread::of(checkpoints().map(|c| ms(part(c))));
    let mut steps = BTreeMap::<_, Vec<f64>>::new();
    for (name, time) in checkpoints().flat_map(|c| &c.steps) {
        steps.entry(name.clone()).or_default().push(ms(*time));
    }
    let steps = steps
        .into_iter()
        .filter_map(|(name, times)| Some((name, Spread::of(times)?)));
    let bytes: Option<f64> = samples.iter().map(|s| s.bytes).sum();
    let cpu: Duration = (samples.iter().flat_map(|s| s.cpu))
        .map(|cpu| cpu.total.saturating_sub(cpu.vcpus))
        .sum();
    let peak = samples.iter().map(|s| s.memory.peak).max()?;
    let ram = f64::from(case.memory_mib) * f64::from(1 << 20);
    Some(Checkpoints {
        case: case.clone(),
        pair: pair.to_owned(),
        pauses_ms: checkpoints().map(|c| ms(c.pause)).collect(),
        pause_ms: spread(|c| c.pause)?,
        transfer_ms: spread(|c| c.transfer)?,
        load_ms: spread(|c| c.load)?,
        resume_ms: spread(|c| c.resume)?,
        stall_ms: Spread::of(samples.iter().flat_map(|s| &s.stalls).copied().map(ms))?,
        usual_gap_ms: report::median(samples.iter().map(|s| ms(s.usual_gap))),
        sent_pages: Spread::of_counts(checkpoints().map(|c| c.dirty_pages))?,
        bytes: bytes.map(|bytes| bytes / samples.len() as f64),
        cpu_ms: ms(cpu) / checkpoints().count() as f64,
        memory_over_ram: peak as f64 / ram,
        others_cpus: samples.iter().map(|s| s.others).fold(0.0, f64::max),
        steps: steps.collect(),
    })
}

#[cfg(test)]
mod tests {
    use benches::link::Link;
    use benches::usage::{CpuTime, Resident};
    use benches::way::Way;

    use super::*;

    #[test]
    fn cpu_time_and_memory_are_put_beside_what_was_done() {
        let case = Case {
            link: Link::UNIX,
            way: Way::Multifd2,
            dirty_pages: 256,
            memory_mib: 256,
            is_filled: true,
            pass_delay: 0,
            interval_ms: 200,
        };
        let checkpoint = |pause| Checkpoint {
            pause: Duration::from_millis(pause),
            transfer: Duration::from_millis(1),
            dirty_pages: 500,
            steps: vec![("flush".to_owned(), Duration::from_millis(1))],
            ..Checkpoint::default()
        };
        let sample = Sample {
            checkpoints: [1, 2, 9].map(checkpoint).to_vec(),
            stalls: vec![Duration::from_millis(3)],
            bytes: Some(2e6),
            cpu: [CpuTime {
                total: Duration::from_millis(90),
                vcpus: Duration::from_millis(60),
            }; 2],
            memory: Resident {
                peak: 512 << 20,
                proportional: 0,
            },
            ..Sample::default()
        };
        let figures = of(&case, "a pair", &[sample]).unwrap();
        // Without the 60 ms of each side's guest, for each of three checkpoints.
        assert_eq!(figures.cpu_ms, 20.0);
        assert_eq!(figures.memory_over_ram, 2.0);
        assert_eq!(figures.pause_per_thousand(), 4.0);
        assert_eq!(figures.transfer_rate(), Some(2.0));
        assert_eq!(figures.steps["flush"].p50, 1.0);
        assert_eq!(of(&case, "a pair", &[]), None);
    }
}
