//! QEMU's trace of a COLO side, line by line: what happened when.

use std::time::Duration;

use ::tests::Result;

use crate::sample::Checkpoint;

/// What QEMU is to trace, for its option `-d`.
pub const EVENTS: &str = "trace:colo_vm_state_change,trace:colo_send_message,\
    trace:colo_receive_message,trace:colo_flush_ram_cache*,trace:migration_bitmap_sync*,\
    trace:migration_transferred_bytes,trace:ram_save_complete";

/// Something that was traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Since the epoch.
    at: Duration,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Stopped,
    Runs,
    Sent(String),
    Received(String),
    SyncBegins,
    SyncEnds,
    /// Pages that are about to be sent.
    Dirty(u64),
    FlushBegins,
    FlushEnds,
    /// On all channels since the beginning.
    Bytes(u64),
}

/// All of a trace, whose last line may be half written. Of an event that is not known nothing is
/// kept.
pub fn parse(trace: &str) -> Result<Vec<Entry>> {
    let whole = trace.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let mut entries = Vec::new();
    for line in whole {
        let Some(what) = what(line.trim_end()) else {
            continue;
        };
        let at = time(line).ok_or_else(|| format!("a trace line without time: {line}"))?;
        entries.push(Entry { at, what });
    }
    Ok(entries)
}

fn what(line: &str) -> Option<What> {
    let (_, event) = line.split_once(' ')?;
    let (name, arguments) = event.split_once(' ').unwrap_or((event, ""));
    let quoted = || arguments.split('\'').nth(1).unwrap_or_default().to_owned();
    let number = |text: &str| text.trim_end_matches(',').parse::<u64>().ok();
    Some(match name {
        "colo_vm_state_change" if arguments.contains("'run' => 'stop'") => What::Stopped,
        "colo_vm_state_change" if arguments.contains("'stop' => 'run'") => What::Runs,
        "colo_send_message" => What::Sent(quoted()),
        "colo_receive_message" => What::Received(quoted()),
        "migration_bitmap_sync_start" => What::SyncBegins,
        "migration_bitmap_sync_end" => What::SyncEnds,
        // dirty=2562, done=0
        "ram_save_complete" if arguments.ends_with("done=0") => What::Dirty(number(
            arguments.strip_prefix("dirty=")?.split(' ').next()?,
        )?),
        "colo_flush_ram_cache_begin" => What::FlushBegins,
        "colo_flush_ram_cache_end" => What::FlushEnds,
        // qemu_file 327253 multifd 106563520 RDMA 0
        "migration_transferred_bytes" => {
            let mut words = arguments.split(' ').skip(1).step_by(2);
            What::Bytes(words.next().and_then(number)? + words.next().and_then(number)?)
        }
        _ => return None,
    })
}

/// Since the epoch, of a line such as `2026-11-23T05:11:30.917970Z colo_vm_state_change …`.
fn time(line: &str) -> Option<Duration> {
    let (date, time) = line.split_once('T')?;
    let mut date = date.split('-').map(|n| n.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let time = time.split_once('Z')?.0;
    let mut time = time.split([':', '.']).map(|n| n.parse::<u64>().ok());
    let (h, m, s, micros) = (time.next()??, time.next()??, time.next()??, time.next()??);
    // Of years that begin in March a month's first day is a linear function of the month.
    let (years, months) = if month < 3 {
        (year.checked_sub(1970 + 1)?, month + 9)
    } else {
        (year.checked_sub(1970)?, month - 3)
    };
    let leap_days = (years + 1970) / 4 - (years + 1970) / 100 + (years + 1970) / 400;
    // 1 March 1970 is day 59, and 477 leap days lie before it.
    let days = years * 365 + leap_days - 477 + (153 * months + 2) / 5 + day - 1 + 59;
    let seconds = ((days * 24 + h) * 60 + m) * 60 + s;
    Some(Duration::from_secs(seconds) + Duration::from_micros(micros))
}

/// The checkpoints of a primary.
pub fn checkpoints(primary: &[Entry], secondary: &[Entry]) -> Vec<Checkpoint> {
    let mut checkpoints = Vec::new();
    for (at, entry) in primary.iter().enumerate() {
        let is_stop = entry.what == What::Stopped;
        let checkpoint = is_stop.then(|| one(&primary[at..])).flatten();
        checkpoints.extend(checkpoint);
    }
    for pair in checkpoints.iter_mut() {
        let steps = secondary_steps(secondary, pair);
        pair.steps.extend(steps);
    }
    checkpoints
}

/// The one that begins with the first entry, if it is complete.
fn one(entries: &[Entry]) -> Option<Checkpoint> {
    let end = entries.iter().position(|e| e.what == What::Runs)?;
    let entries = &entries[..=end];
    let at = |wanted: &What| Some(entries.iter().find(|e| e.what == *wanted)?.at);
    let stopped = entries.first()?.at;
    let received = at(&What::Received("vmstate-received".into()))?;
    let loaded = at(&What::Received("vmstate-loaded".into()))?;
    let ended = entries.last()?.at;
    let dirty_pages = entries.iter().find_map(|e| match e.what {
        What::Dirty(pages) => Some(pages),
        _ => None,
    })?;
    let marks = [
        ("primary: saving devices", at(&What::SyncBegins)),
        ("primary: dirty log", at(&What::SyncEnds)),
        (
            "primary: sending ram",
            at(&What::Sent("vmstate-size".into())),
        ),
        (
            "primary: sending devices, waiting for vmstate-received",
            Some(received),
        ),
        ("primary: waiting for vmstate-loaded", Some(loaded)),
        ("primary: resuming", Some(ended)),
    ];
    let mut last = stopped;
    let steps = marks.into_iter().filter_map(|(name, at)| {
        let time = at?.saturating_sub(last);
        last = at?;
        Some((name.to_owned(), time))
    });
    Some(Checkpoint {
        steps: steps.collect(),
        ended,
        pause: ended - stopped,
        transfer: received.saturating_sub(stopped),
        load: loaded.saturating_sub(received),
        resume: ended.saturating_sub(loaded),
        dirty_pages,
        bytes: None,
    })
}

/// What the secondary did in a checkpoint of the primary.
fn secondary_steps(entries: &[Entry], checkpoint: &Checkpoint) -> Vec<(String, Duration)> {
    let stopped = checkpoint.ended.saturating_sub(checkpoint.pause);
    let within = |e: &&Entry| (stopped..checkpoint.ended).contains(&e.at);
    let at = |wanted: &What| entries.iter().filter(within).find(|e| e.what == *wanted);
    let marks = [
        ("secondary: reset", What::FlushBegins),
        ("secondary: flushing the ram cache", What::FlushEnds),
        ("secondary: installing devices, resuming", What::Runs),
    ];
    let Some(received) = at(&What::Sent("vmstate-received".into())) else {
        return Vec::new();
    };
    let mut last = received.at;
    let steps = marks.into_iter().filter_map(|(name, mark)| {
        let at = at(&mark)?.at;
        let time = at.saturating_sub(last);
        last = at;
        Some((name.to_owned(), time))
    });
    steps.collect()
}

/// On the wire for one checkpoint in the mean, from `from` on. QEMU says now and then, at most once a
/// second and before it sends anything of a checkpoint, what it has sent.
pub fn bytes(primary: &[Entry], from: Duration) -> Option<f64> {
    let mut known = Vec::new();
    let mut checkpoints = 0u32;
    for entry in primary.iter().filter(|e| e.at >= from) {
        match entry.what {
            What::Stopped => checkpoints += 1,
            What::Bytes(bytes) => known.push((checkpoints, bytes)),
            _ => {}
        }
    }
    let (first, last) = (known.first()?, known.last()?);
    let checkpoints = last.0.checked_sub(first.0).filter(|n| *n > 0)?;
    Some(last.1.checked_sub(first.1)? as f64 / f64::from(checkpoints))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "\
2026-11-26T23:59:59.900000Z colo_vm_state_change Change 'stop' => 'run'
2026-11-26T23:59:59.964668Z colo_receive_message Receive 'checkpoint-reply' message
2026-11-26T23:59:59.964775Z colo_vm_state_change Change 'run' => 'stop'
2026-11-26T23:59:59.964781Z colo_send_message Send 'vmstate-send' message
2026-11-26T23:59:59.965480Z migration_bitmap_sync_start 
2026-11-26T23:59:59.965504Z migration_bitmap_sync_end dirty_pages 2562
2026-11-26T23:59:59.965506Z migration_transferred_bytes qemu_file 100 multifd 1000 RDMA 0
2026-11-26T23:59:59.965508Z ram_save_complete dirty=2562, done=0
2026-11-26T23:59:59.968254Z ram_save_complete dirty=0, done=1
2026-11-26T23:59:59.968269Z colo_send_message Send 'vmstate-size' message
2026-11-26T23:59:59.969624Z colo_receive_message Receive 'vmstate-received' message
2026-11-26T23:59:59.979076Z colo_receive_message Receive 'vmstate-loaded' message
2026-11-27T00:00:00.000001Z colo_vm_state_change Change 'stop' => 'run'
2026-11-27T00:00:00.200000Z colo_vm_state_change Change 'run' => 'stop'
2026-11-27T00:00:00.200001Z migration_transferred_bytes qemu_file 120 multifd 5000 RDMA 0
2026-11-27T00:00:00.3";

    const SECONDARY: &str = "\
2026-11-26T23:59:59.964657Z colo_vm_state_change Change 'run' => 'stop'
2026-11-26T23:59:59.968306Z colo_send_message Send 'vmstate-received' message
2026-11-26T23:59:59.969114Z colo_flush_ram_cache_begin dirty_pages 2793
2026-11-26T23:59:59.969600Z colo_flush_ram_cache_end 
2026-11-26T23:59:59.979044Z colo_vm_state_change Change 'stop' => 'run'
";

    #[test]
    fn the_parts_of_a_checkpoint_make_up_its_pause() {
        let primary = parse(PRIMARY).unwrap();
        let checkpoints = checkpoints(&primary, &parse(SECONDARY).unwrap());
        let [checkpoint] = checkpoints.as_slice() else {
            panic!("{checkpoints:?}");
        };
        assert_eq!(checkpoint.pause, Duration::from_micros(35_226));
        assert_eq!(checkpoint.transfer, Duration::from_micros(4849));
        assert_eq!(checkpoint.dirty_pages, 2562);
        assert_eq!(
            checkpoint.transfer + checkpoint.load + checkpoint.resume,
            checkpoint.pause
        );
        let sum = |side: &str| -> Duration {
            let of_side = checkpoint.steps.iter().filter(|s| s.0.starts_with(side));
            of_side.map(|step| step.1).sum()
        };
        assert_eq!(sum("primary"), checkpoint.pause);
        assert_eq!(sum("secondary"), Duration::from_micros(10_738));
        let bytes = bytes(&primary, Duration::ZERO);
        assert_eq!(bytes, Some(4020.0));
    }

    #[test]
    fn times_count_from_the_epoch() {
        for (text, seconds) in [
            ("1971-01-01T00:00:00.000000Z", 365 * 86400),
            ("2000-02-29T12:00:00.000000Z", 951_825_600),
            ("2026-11-23T05:11:30.000000Z", 1_795_410_690),
        ] {
            assert_eq!(time(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        let error = parse("x colo_flush_ram_cache_end\n").unwrap_err();
        assert!(error.to_string().contains("without time"), "{error}");
    }
}
