//! Figures in Prometheus' text format, as a scraper gets them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::{PATIENCE, Result};

/// One page of figures: checked, and by name with labels as they stand in the text, such as
/// `colo_role{role="primary"}`.
#[derive(Clone, Debug)]
pub struct Metrics {
    samples: BTreeMap<String, f64>,
}

/// Sends `request` to the socket at `path`, and returns all that comes back.
///
/// # Errors
/// Nobody answers within [`PATIENCE`].
pub fn ask(path: &Path, request: &[u8]) -> Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

impl Metrics {
    /// Asks the socket at `path` for them.
    ///
    /// # Errors
    /// It does not answer with figures, or with what is not the format.
    pub fn scrape(path: &Path) -> Result<Self> {
        let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n";
        let answer = ask(path, request)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no head")?;
        let fields: Vec<&str> = head.split("\r\n").collect();
        if fields.first() != Some(&"HTTP/1.1 200 OK") {
            return Err(format!("no figures: {head}").into());
        }
        let length = format!("Content-Length: {}", body.len());
        let kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8";
        for field in [length.as_str(), kind] {
            if !fields.contains(&field) {
                return Err(format!("'{field}' is missing: {head}").into());
            }
        }
        Self::parse(body)
    }

    /// Reads a page, and checks each line of it.
    ///
    /// # Errors
    /// Which line is not of the format, or not of its conventions.
    pub fn parse(text: &str) -> Result<Self> {
        let mut families: BTreeMap<String, String> = BTreeMap::new();
        let mut family = (String::new(), String::new());
        let mut samples = BTreeMap::new();
        if !text.ends_with('\n') {
            return Err("the last line does not end".into());
        }
        for line in text.lines() {
            let wrong = |what: &str| format!("{what}: {line}");
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').ok_or_else(|| wrong("no help"))?;
                if families.contains_key(name) || help.is_empty() || !is_name(name) {
                    return Err(wrong("no new family with help").into());
                }
                family = (name.to_owned(), String::new());
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').ok_or_else(|| wrong("no type"))?;
                let is_total = name.ends_with("_total");
                let fits = match kind {
                    "counter" => is_total,
                    "gauge" | "histogram" => !is_total,
                    _ => false,
                };
                if name != family.0 || !fits {
                    return Err(wrong("the type does not fit").into());
                }
                kind.clone_into(&mut family.1);
                families.insert(name.to_owned(), kind.to_owned());
            } else {
                let (series, value) = line.rsplit_once(' ').ok_or_else(|| wrong("no value"))?;
                let (name, labels) = series
                    .split_once('{')
                    .map_or((series, None), |(n, l)| (n, Some(l)));
                let base = match family.1.as_str() {
                    "histogram" => ["_bucket", "_sum", "_count"]
                        .iter()
                        .find_map(|suffix| name.strip_suffix(suffix))
                        .unwrap_or(name),
                    _ => name,
                };
                if base != family.0 || !is_name(name) || !labels.is_none_or(are_labels) {
                    return Err(wrong("no sample of its family").into());
                }
                let value: f64 = value.parse().map_err(|_| wrong("no value"))?;
                if !value.is_finite() || value < 0.0 {
                    return Err(wrong("a value that cannot be").into());
                }
                if samples.insert(series.to_owned(), value).is_some() {
                    return Err(wrong("twice").into());
                }
            }
        }
        Ok(Self { samples })
    }

    /// A value.
    ///
    /// # Errors
    /// There is none of that name and those labels.
    pub fn get(&self, series: &str) -> Result<f64> {
        let value = self.samples.get(series).copied();
        value.ok_or_else(|| format!("no {series} in {:?}", self.samples.keys()).into())
    }

    /// All series of a name, whatever their labels.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.samples
            .iter()
            .filter(move |(series, _)| {
                let behind = series.strip_prefix(name);
                behind.is_some_and(|labels| labels.is_empty() || labels.starts_with('{'))
            })
            .map(|(series, value)| (series.as_str(), *value))
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// What is between the braces, and the closing one. No value of ours has a quote in it.
fn are_labels(text: &str) -> bool {
    let Some(inner) = text.strip_suffix('}') else {
        return false;
    };
    inner.split(',').all(|pair| {
        let value = pair.split_once('=').filter(|(name, _)| is_name(name));
        let quoted = value.and_then(|(_, value)| value.strip_prefix('"')?.strip_suffix('"'));
        quoted.is_some_and(|value| !value.contains(['"', '\\']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_checked_line_by_line() {
        let page = "# HELP a_total All.\n# TYPE a_total counter\na_total{x=\"1\"} 2\na_total 0.5\n\
                    # HELP h_seconds Times.\n# TYPE h_seconds histogram\n\
                    h_seconds_bucket{le=\"+Inf\"} 1\nh_seconds_sum 0.1\nh_seconds_count 1\n";
        let metrics = Metrics::parse(page).unwrap();
        assert!((metrics.get("a_total").unwrap() - 0.5).abs() < 1e-9);
        assert_eq!(metrics.of("a_total").count(), 2);
        assert!(metrics.get("a").is_err());
        for wrong in [
            "a_total 1\n",
            "# HELP a_total All.\n# TYPE a_total gauge\na_total 1\n",
            "# HELP a All.\n# TYPE a counter\na 1\n",
            "# HELP a All.\n# TYPE a gauge\nb 1\n",
            "# HELP a All.\n# TYPE a gauge\na one\n",
            "# HELP a All.\n# TYPE a gauge\na{x=1} 1\n",
            "# HELP a All.\n# TYPE a gauge\na{x=\"1\" 1\n",
            "# HELP a All.\n# TYPE a gauge\na 1\na 1\n",
            "# HELP a All.\n# TYPE a gauge\na NaN\n",
            "# HELP a All.\n# TYPE a gauge\na 1",
        ] {
            assert!(Metrics::parse(wrong).is_err(), "{wrong}");
        }
    }
}
