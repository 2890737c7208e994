//! What was measured: as a table, as JSON, and drawn.

use std::cmp::Ordering;
use std::fmt;
use std::time::Duration;

use benches::chart::{self, Bar, Group, Series};
use benches::connection::Way;
use serde_json::json;

use crate::{PAIRS, Pair};

/// All that was measured of one content by one way.
#[derive(Debug)]
pub struct Row {
    content: &'static str,
    way: Way,
    memory: u32,
    /// By pair, each sorted.
    times: [Vec<Duration>; PAIRS.len()],
}

impl Row {
    /// The times of each pair, in any order.
    pub fn new(
        content: &'static str,
        way: Way,
        memory: u32,
        mut times: [Vec<Duration>; PAIRS.len()],
    ) -> Self {
        times.iter_mut().for_each(|times| times.sort_unstable());
        Self {
            content,
            way,
            memory,
            times,
        }
    }

    /// Seconds: the median of each pair.
    fn medians(&self) -> [f64; PAIRS.len()] {
        self.times.each_ref().map(|times| {
            times
                .get(times.len() / 2)
                .map_or(0.0, Duration::as_secs_f64)
        })
    }

    /// Guest memory in gigabytes a second, and how often as fast as QEMU to QEMU that is.
    fn speeds(&self) -> [(f64, f64); PAIRS.len()] {
        let medians = self.medians();
        let gigabytes = f64::from(self.memory) * f64::from(1 << 20) / 1e9;
        medians.map(|time| (gigabytes / time, medians[0] / time))
    }

    /// How often a run of each pair was quicker than one of QEMU to QEMU, of all that can be compared: one
    /// half says that there is nothing between them. By chance alone two times n runs are
    /// 1 / sqrt(6 n) from it (the standard deviation of Mann and Whitney's U): 0.09 with 20.
    fn quicker(&self) -> [f64; PAIRS.len()] {
        let [qemu, ..] = &self.times;
        self.times.each_ref().map(|times| {
            let wins = times
                .iter()
                .flat_map(|time| qemu.iter().map(move |qemus| time.cmp(qemus)))
                .map(|order| match order {
                    Ordering::Less => 1.0,
                    Ordering::Equal => 0.5,
                    Ordering::Greater => 0.0,
                });
            let (count, wins) = wins.fold((0.0, 0.0), |(n, sum), win| (n + 1.0, sum + win));
            wins / count
        })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| {:6} | {:9} |", self.content, self.way)?;
        let [qemu, ..] = &self.times;
        let figures = self.medians().into_iter().zip(self.speeds());
        let figures = figures.zip(self.quicker());
        for (times, ((time, (speed, ratio)), quicker)) in self.times.iter().zip(figures) {
            if times.is_empty() {
                write!(f, " - |")?;
                continue;
            }
            write!(f, " {time:6.3} s {speed:5.2} GB/s")?;
            if !qemu.is_empty() {
                write!(f, " {ratio:5.2} {quicker:4.2}")?;
            }
            write!(f, " |")?;
        }
        Ok(())
    }
}

/// Prints the table: the median time, guest memory a second, the speed beside QEMU to QEMU, and how often a
/// run was quicker.
pub fn print(rows: &[Row]) {
    println!(
        "\n| content | way | {} |",
        PAIRS.map(|p| p.to_string()).join(" | ")
    );
    println!("|---|---|{}", "---|".repeat(PAIRS.len()));
    for row in rows {
        println!("{row}");
    }
}

/// All times, in seconds.
pub fn json(qemu: &str, rows: &[Row]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let pairs = PAIRS.into_iter().zip(&row.times);
            let pairs = pairs.zip(row.speeds()).zip(row.quicker());
            let pairs: serde_json::Map<_, _> = pairs
                .map(|(((pair, times), (speed, ratio)), quicker)| {
                    let seconds: Vec<_> = times.iter().map(Duration::as_secs_f64).collect();
                    let figures = json!({
                        "seconds": seconds,
                        "median_gigabytes_per_second": speed,
                        "ratio_to_qemu": ratio,
                        "quicker_than_qemu": quicker,
                    });
                    (pair.to_string(), figures)
                })
                .collect();
            json!({"content": row.content, "way": row.way, "memory_mib": row.memory, "pairs": pairs})
        })
        .collect();
    let mut text = format!("{:#}", json!({"qemu": qemu, "rows": rows}));
    text.push('\n');
    text
}

fn colour(pair: Pair) -> &'static str {
    match pair {
        Pair::QemuToQemu => "#9aa0a6",
        Pair::QemuToUs => "#7fb3d5",
        Pair::UsToQemu => "#2e86c1",
        Pair::UsToUs => "#1b4f72",
    }
}

/// Bars of gigabytes a second, one group for each row.
pub fn svg(rows: &[Row]) -> String {
    let names = PAIRS.map(|pair| pair.to_string());
    let series: Vec<_> = names
        .iter()
        .zip(PAIRS)
        .map(|(name, pair)| Series {
            name,
            colour: colour(pair),
        })
        .collect();
    let group = |row: &Row| Group {
        label: format!("{} {}", row.content, row.way),
        bars: row
            .speeds()
            .into_iter()
            .enumerate()
            .map(|(series, (speed, ratio))| Bar {
                series,
                value: speed,
                reaches: None,
                text: format!("{speed:.2} GB/s ({ratio:.2})"),
            })
            .collect(),
    };
    let groups: Vec<_> = rows.iter().map(group).collect();
    chart::bars(&series, &groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        let seconds = |s: [u64; 3]| s.map(Duration::from_secs).to_vec();
        let times = [[9, 2, 4], [4, 4, 4], [8, 8, 8], [1, 2, 3]].map(seconds);
        Row::new("mixed", Way::Plain, 1000, times)
    }

    #[test]
    fn the_median_is_told_and_compared_with_qemus() {
        assert_eq!(row().medians(), [4.0, 4.0, 8.0, 2.0]);
        let ratios = row().speeds().map(|(_, ratio)| ratio);
        assert_eq!(ratios, [1.0, 1.0, 0.5, 2.0]);
    }

    #[test]
    fn runs_are_compared_one_by_one() {
        assert_eq!(row().quicker(), [0.5, 0.5, 1.0 / 3.0, 7.5 / 9.0]);
    }

    #[test]
    fn nothing_is_said_of_what_was_not_measured() {
        let seconds = |s: &[u64]| s.iter().copied().map(Duration::from_secs).collect();
        let row = |qemu: &[u64]| {
            let times = [seconds(qemu), seconds(&[4]), vec![], vec![]];
            Row::new("mixed", Way::Plain, 1000, times).to_string()
        };
        assert!(
            row(&[2]).ends_with("0.52 GB/s  1.00 0.50 |  4.000 s  0.26 GB/s  0.50 0.00 | - | - |")
        );
        assert!(row(&[]).ends_with("| plain     | - |  4.000 s  0.26 GB/s | - | - |"));
    }

    #[test]
    fn json_and_drawing_have_every_pair() {
        let text = json("QEMU", &[row()]);
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        let drawing = svg(&[row()]);
        for pair in PAIRS.map(|p| p.to_string()) {
            assert_eq!(
                parsed["rows"][0]["pairs"][&pair]["seconds"]
                    .as_array()
                    .unwrap()
                    .len(),
                3
            );
            assert!(drawing.contains(&pair));
        }
    }
}
