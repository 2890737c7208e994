//! A report as Markdown: its tables, and RESULTS.md with the bars.

use std::fmt::Write as _;

use colo_vmm::demo::Spread;

use crate::link::Link;
use crate::report::{
    Checkpoints, Ends, GuestWork, LOCAL_COPY, Migration, OURS, Report, median, ours_with,
};
use crate::way::Way;

/// How long RESULTS.md may be, bytes.
pub const MOST: usize = 12 << 10;

/// How many CPUs others have at most on a quiet machine; the measuring program has 0.1.
const QUIET: f64 = 0.4;

/// RESULTS.md: where it was measured, the bars, a profile of each missed one, and all tables.
#[must_use]
pub fn results(report: &Report) -> String {
    let host = &report.host;
    let others = report.checkpoints.iter().map(|c| c.others_cpus);
    let others = others.fold(0.0, f64::max);
    let warning = if others > QUIET {
        " **The machine was not quiet: these figures say little.**"
    } else {
        ""
    };
    let bars = bars(report);
    let missed = bars.iter().filter(|bar| !bar.is_met()).count();
    let mut text = format!(
        "# Results\n\n\
         One run of `results run` at commit {} ({}): {} CPUs ({}), {} GiB, Linux {}, {}, {}. \
         Others had at most {others:.1} of the CPUs.{warning} The figures of this file are computed from \
         [results/results.json](results/results.json).\n\n\
         ## Bars\n\n{} of {} bars are met.\n\n\
         | bar | wanted | measured | |\n|---|---|---|---|\n",
        host.commit,
        host.version,
        host.cpus,
        host.cpu,
        host.memory_mib.div_ceil(1024),
        host.kernel,
        host.rustc,
        report.qemu.as_deref().unwrap_or("no QEMU"),
        bars.len() - missed,
        bars.len(),
    );
    // Writing to a string cannot fail.
    for bar in &bars {
        let _ = writeln!(text, "{bar}");
    }
    let profiles: String = bars.iter().filter_map(Bar::profile).collect();
    if !profiles.is_empty() {
        let _ = write!(text, "\n## Where a bar is missed\n\n{profiles}");
    }
    text.push('\n');
    text.push_str(&tables(report));
    text
}

/// A bar, and what was measured.
#[derive(Debug)]
struct Bar<'a> {
    name: String,
    /// The figure has to be at least this, or at most.
    bound: Bound,
    figure: f64,
    /// Whose steps tell why it is missed.
    ours: Option<&'a Checkpoints>,
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar<'_> {
    /// A figure that is no number meets nothing.
    fn is_met(&self) -> bool {
        match self.bound {
            Bound::AtLeast(least) => self.figure >= least,
            Bound::AtMost(most) => self.figure <= most,
        }
    }

    /// The longest steps of a pair that misses the bar.
    fn profile(&self) -> Option<String> {
        let ours = self.ours.filter(|_| !self.is_met())?;
        let pause = ours.pause_ms.p50;
        let mut steps: Vec<_> = ours.steps.iter().collect();
        steps.retain(|(_, time)| time.p50 > pause / 20.0);
        steps.sort_by(|a, b| b.1.p50.total_cmp(&a.1.p50));
        let steps: Vec<_> = (steps.iter().take(6))
            .map(|(name, time)| format!("{name} {:.1}", time.p50))
            .collect();
        let steps = steps.join(", ");
        Some(format!("- {}, pause {pause:.1} ms: {steps}.\n", self.name))
    }
}

impl std::fmt::Display for Bar<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wanted = match self.bound {
            Bound::AtLeast(least) => format!("at least {least}"),
            Bound::AtMost(most) => format!("at most {most}"),
        };
        let verdict = if self.is_met() { "met" } else { "**missed**" };
        let Self { name, figure, .. } = self;
        write!(f, "| {name} | {wanted} | {figure:.3} | {verdict} |")
    }
}

/// All bars for which there are figures of both sides.
fn bars(report: &Report) -> Vec<Bar<'_>> {
    let mut bars = Vec::new();
    for (pages, most) in [(256, 0.1), (2560, 0.15), (25_600, 0.3)] {
        let Some([theirs, ours]) = beside(report, pages, OURS) else {
            continue;
        };
        bars.push(Bar {
            name: format!("pause for a thousand pages sent, {pages} dirty pages, over QEMU's"),
            bound: Bound::AtMost(most),
            figure: ours.pause_per_thousand() / theirs.pause_per_thousand(),
            ours: Some(ours),
        });
    }
    let rate = report.rates.iter().find(|rate| rate.link == Link::VETH);
    let rate = rate.map(|rate| median(rate.gb_per_s.iter().copied()));
    if let (Some(rate), Some([_, ours])) = (rate, beside(report, 25_600, OURS)) {
        bars.push(Bar {
            name: "transfer of 25,600 dirty pages over iperf3's rate".to_owned(),
            bound: Bound::AtLeast(0.95),
            figure: ours.transfer_rate().unwrap_or(f64::NAN) / rate,
            ours: Some(ours),
        });
    }
    for pages in [256, 2560, 25_600] {
        let Some([theirs, ours]) = beside(report, pages, &ours_with(LOCAL_COPY)) else {
            continue;
        };
        bars.push(Bar {
            name: format!("pause with local-copy resume, {pages} dirty pages, over QEMU's"),
            bound: Bound::AtMost(0.02),
            figure: ours.pause_ms.p50 / theirs.pause_ms.p50,
            ours: Some(ours),
        });
    }
    for [theirs, ours] in migrations(report) {
        let Migration {
            link, way, content, ..
        } = ours;
        let setting = format!("migration, {link} {way}, {content} memory");
        bars.push(Bar {
            name: format!("{setting}: speed over QEMU's (goal 1.3)"),
            bound: Bound::AtLeast(1.0),
            figure: theirs.time() / ours.time(),
            ours: None,
        });
        bars.push(Bar {
            name: format!("{setting}: CPU time for a GB over QEMU's"),
            bound: Bound::AtMost(0.7),
            figure: ours.cpu_per_gigabyte() / theirs.cpu_per_gigabyte(),
            ours: None,
        });
    }
    for ours in report.guest_work.iter().filter(|work| work.pair == OURS) {
        let theirs =
            (report.guest_work.iter()).find(|work| work.case == ours.case && is_qemu(&work.pair));
        let Some(theirs) = theirs else { continue };
        let interval = ours.case.interval_ms;
        bars.push(Bar {
            name: format!("guest's slowdown, a checkpoint every {interval} ms, over QEMU's"),
            bound: Bound::AtMost(0.4),
            // A guest that was quicker by chance lost nothing.
            figure: ours.slowdown().max(0.0) / theirs.slowdown(),
            ours: None,
        });
    }
    bars
}

fn is_qemu(pair: &str) -> bool {
    pair.starts_with("QEMU") && !pair.ends_with("standby")
}

/// QEMU's checkpoints and those of the pair `ours` over veth by two channels.
fn beside<'a>(report: &'a Report, pages: u32, ours: &str) -> Option<[&'a Checkpoints; 2]> {
    let mut fitting = report.checkpoints.iter().filter(|c| {
        c.case.link == Link::VETH && c.case.way == Way::Multifd2 && c.case.dirty_pages == pages
    });
    let ours = fitting.clone().find(|c| c.pair == ours)?;
    let theirs = fitting.find(|c| c.case == ours.case && is_qemu(&c.pair))?;
    Some([theirs, ours])
}

/// QEMU to QEMU and us to us in each setting that has both.
fn migrations(report: &Report) -> impl Iterator<Item = [&Migration; 2]> {
    let all = report.migrations.iter();
    let ours = all.clone().filter(|m| m.ends == Ends::UsUs);
    ours.filter_map(move |ours| {
        let theirs = all.clone().find(|m| {
            let setting = |m: &Migration| (m.link, m.way, m.content, m.memory_is, m.memory_mib);
            m.ends == Ends::QemuQemu && setting(m) == setting(ours)
        });
        Some([theirs?, ours])
    })
}

/// The tables of what there are figures of.
#[must_use]
pub fn tables(report: &Report) -> String {
    let parts = [
        checkpoints(&report.checkpoints),
        guest_work(&report.guest_work),
        rates(report),
        moved(&report.migrations),
        failovers(report),
    ];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("\n")
}

fn checkpoints(all: &[Checkpoints]) -> String {
    let Some(first) = all.first() else {
        return String::new();
    };
    let mut text = format!(
        "## Checkpoints\n\n\
         {} checkpoints of each pair, every {} ms, 1 vCPU. Times are milliseconds: the pause, and \
         the parts of its median until the secondary has everything, has loaded it, and the guest runs. \
         The stall is the longest silence of the guest around a checkpoint. CPU time is that of both \
         sides without the guests, memory the secondary's peak over guest RAM.\n\n\
         | link | dirty pages | pair | pages sent | pause p50 / p99 | ms / 1,000 pages | transfer | load \
         | resume | stall | MB | CPU | memory |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        first.pauses_ms.len(),
        first.case.interval_ms,
    );
    for row in all {
        let Spread { p50, p99, .. } = row.pause_ms;
        let _ = writeln!(
            text,
            "| {} {} | {} | {} | {:.0} | {p50:.1} / {p99:.1} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} \
             | {} | {:.1} | {:.2} |",
            row.case.link,
            row.case.way,
            row.case.dirty_pages,
            row.pair,
            row.sent_pages.p50,
            row.pause_per_thousand(),
            row.transfer_ms.p50,
            row.load_ms.p50,
            row.resume_ms.p50,
            row.stall_ms.p50,
            (row.bytes).map_or_else(|| "-".to_owned(), |bytes| format!("{:.1}", bytes / 1e6)),
            row.cpu_ms,
            row.memory_over_ram,
        );
    }
    text
}

fn guest_work(all: &[GuestWork]) -> String {
    let Some(first) = all.first() else {
        return String::new();
    };
    let mut text = format!(
        "## The guest's own work\n\n\
         Passes a second of a guest over {} pages, alone and under checkpoints, in the median of {} \
         rounds.\n\n\
         | link | interval | pair | alone | protected | slowdown |\n|---|---|---|---|---|---|\n",
        first.case.dirty_pages,
        first.alone.len(),
    );
    for row in all {
        let _ = writeln!(
            text,
            "| {} {} | {} ms | {} | {:.0} | {:.0} | {:.0} % |",
            row.case.link,
            row.case.way,
            row.case.interval_ms,
            row.pair,
            median(row.alone.iter().copied()),
            median(row.protected.iter().copied()),
            row.slowdown() * 100.0,
        );
    }
    text
}

fn rates(report: &Report) -> String {
    let mut text = String::new();
    for rate in &report.rates {
        match &rate.skipped {
            Some(reason) => {
                let _ = writeln!(text, "- {}: not measured: {reason}.", rate.link);
            }
            None => {
                let runs: Vec<_> = rate.gb_per_s.iter().map(|r| format!("{r:.2}")).collect();
                let _ = writeln!(text, "- {}: {} GB/s.", rate.link, runs.join(", "));
            }
        }
    }
    if text.is_empty() {
        return text;
    }
    format!("## iperf3\n\nOne connection, each run.\n\n{text}")
}

fn moved(all: &[Migration]) -> String {
    let Some(first) = all.first() else {
        return String::new();
    };
    let mut text = format!(
        "## Migration of a stopped guest\n\n\
         {} MiB, {} on both sides, the median of {} runs; CPU time of both sides for 10^9 bytes of \
         guest memory.\n\n\
         | link | memory | ends | s | GB/s | CPU s/GB |\n|---|---|---|---|---|---|\n",
        first.memory_mib,
        first.memory_is,
        first.seconds.len(),
    );
    for row in all {
        let _ = writeln!(
            text,
            "| {} {} | {} | {} | {:.2} | {:.2} | {:.2} |",
            row.link,
            row.way,
            row.content,
            row.ends,
            row.time(),
            row.gigabytes() / row.time(),
            row.cpu_per_gigabyte(),
        );
    }
    text
}

fn failovers(report: &Report) -> String {
    let Some(first) = report.failovers.first() else {
        return String::new();
    };
    let mut text = format!(
        "## Failover\n\n\
         From the SIGKILL of the primary to the first byte of the survivor, ms, {} times each. \
         Heartbeats every {} ms, {} missed, checkpoints every {} ms.\n\n\
         | link | case | mean | p50 | p99 | max |\n|---|---|---|---|---|---|\n",
        first.times_ms.len(),
        first.beat_ms,
        first.missed,
        first.interval_ms,
    );
    for row in &report.failovers {
        let Some(spread) = Spread::of(row.times_ms.iter().copied()) else {
            continue;
        };
        let Spread {
            mean,
            p50,
            p99,
            max,
        } = spread;
        let _ = writeln!(
            text,
            "| {} | {} | {mean:.1} | {p50:.1} | {p99:.1} | {max:.1} |",
            row.link, row.case
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Case;
    use crate::report::{Failover, Kind, Rate, State};

    /// Figures of a whole run, where a pause of QEMU's takes `qemus` ms, one of ours `ours`.
    fn report(qemus: f64, ours: f64) -> Report {
        let spread = |value| Spread::of([value]).unwrap();
        let case = |link, dirty_pages, interval_ms| Case {
            link,
            way: Way::Multifd2,
            dirty_pages,
            memory_mib: 256,
            is_filled: true,
            pass_delay: 0,
            interval_ms,
        };
        let local_copy = ours_with(LOCAL_COPY);
        let pairs = [("QEMU pc", qemus), (OURS, ours), (&local_copy, ours / 10.0)];
        let mut report = Report::new(None);
        for (link, pages) in [Link::VETH, Link::UNIX]
            .into_iter()
            .flat_map(|link| [256, 2560, 25_600].map(|pages| (link, pages)))
        {
            report
                .checkpoints
                .extend(pairs.map(|(pair, pause)| Checkpoints {
                    case: case(link, pages, 200),
                    pair: pair.to_owned(),
                    pauses_ms: vec![pause; 40],
                    pause_ms: spread(pause),
                    transfer_ms: spread(pause),
                    load_ms: spread(0.0),
                    resume_ms: spread(0.0),
                    stall_ms: spread(pause),
                    usual_gap_ms: 1.0,
                    sent_pages: spread(pages.into()),
                    bytes: Some(pause * 1e6),
                    cpu_ms: 1.0,
                    memory_over_ram: 1.0,
                    others_cpus: 0.1,
                    steps: [("sending ram".to_owned(), spread(pause))].into(),
                }));
        }
        for interval in [50, 100, 200, 1000] {
            let pairs = [("QEMU pc", 50.0), (OURS, 90.0)];
            report
                .guest_work
                .extend(pairs.map(|(pair, passes)| GuestWork {
                    case: case(Link::VETH, 256, interval),
                    pair: pair.to_owned(),
                    alone: vec![100.0; 3],
                    protected: vec![0.0, passes, 100.0],
                }));
        }
        report.rates = vec![Rate {
            link: Link::VETH,
            gb_per_s: vec![0.9, 1.0, 1.1],
            skipped: None,
        }];
        for (way, content) in [Way::Plain, Way::Multifd2]
            .into_iter()
            .flat_map(|way| [Kind::Random, Kind::Mixed, Kind::Zero].map(|kind| (way, kind)))
        {
            let ends = [(Ends::QemuQemu, 1.2), (Ends::UsUs, 1.0)];
            report
                .migrations
                .extend(ends.map(|(ends, seconds)| Migration {
                    link: Link::VETH,
                    way,
                    content,
                    memory_is: State::Populated,
                    memory_mib: 2048,
                    ends,
                    seconds: vec![seconds; 5],
                    cpu_seconds: vec![seconds; 5],
                }));
        }
        for case in [
            "heartbeat",
            "lock-file",
            "connection",
            "qemu-waits",
            "qemu-started",
        ] {
            report.failovers.push(Failover {
                case: case.to_owned(),
                link: Link::VETH,
                beat_ms: 50,
                missed: 3,
                interval_ms: 100,
                times_ms: vec![100.0; 30],
            });
        }
        report
    }

    #[test]
    fn bars_are_met_or_missed_by_the_figures() {
        let verdicts = |ours| -> Vec<_> {
            let report = report(100.0, ours);
            let bars = bars(&report);
            bars.iter().map(|bar| (bar.figure, bar.is_met())).collect()
        };
        let met = verdicts(10.0);
        // Three pauses, the rate, three local-copy resumes, six migrations twice, four intervals.
        assert_eq!(met.len(), 3 + 1 + 3 + 12 + 4);
        assert_eq!(met[..3], [(0.1, true); 3]);
        assert_eq!(met[3], (1.0, true));
        assert_eq!(met[4..7], [(0.01, true); 3]);
        assert_eq!(met[7], (1.2, true));
        assert!((met[8].0 - 1.0 / 1.2).abs() < 1e-9 && !met[8].1);
        assert!((met[19].0 - 0.2).abs() < 1e-9 && met[19].1);
        let missed = verdicts(20.0);
        let missed: Vec<_> = missed.iter().map(|(_, is_met)| *is_met).collect();
        assert_eq!(missed[..4], [false, false, true, true]);
    }

    #[test]
    fn a_whole_run_fits_and_tells_of_each_missed_bar_why() {
        let text = results(&report(100.0, 20.0));
        assert!(text.len() <= MOST, "{}", text.len());
        assert!(text.contains("15 of 23 bars are met"), "{text}");
        let missed = "| pause for a thousand pages sent, 256 dirty pages, over QEMU's | at most 0.1 \
                      | 0.200 | **missed** |\n";
        assert!(text.contains(missed), "{text}");
        assert!(
            text.contains(", pause 20.0 ms: sending ram 20.0.\n"),
            "{text}"
        );
        assert!(!text.contains("not quiet"), "{text}");
        let columns = |line: &str| line.matches(" |").count();
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let first = table.lines().next().unwrap();
            for line in table.lines().filter(|line| !line.starts_with("|---")) {
                assert_eq!(columns(line), columns(first), "{line}");
            }
        }
    }

    #[test]
    fn figures_of_a_machine_that_had_other_work_say_so() {
        let mut report = report(100.0, 10.0);
        report.checkpoints[3].others_cpus = 0.5;
        let text = results(&report);
        assert!(text.contains("Others had at most 0.5 of the CPUs. **The machine was not quiet"));
    }

    #[test]
    fn nothing_is_said_of_what_was_not_measured() {
        let mut report = report(100.0, 10.0);
        report.checkpoints.clear();
        report.migrations.retain(|m| m.ends == Ends::UsUs);
        report.guest_work.clear();
        assert_eq!(bars(&report).len(), 0);
        let text = tables(&report);
        assert!(text.starts_with("## iperf3\n"), "{text}");
        assert!(!text.contains("Checkpoints"), "{text}");
    }
}
