//! What was found, for people.

use std::fmt::{self, Write as _};
use std::time::Duration;

use migration_stream::raw::dirty_bitmap::MigratedBitmap;
use migration_stream::{Escaped, SectionHeader};
use serde_json::Value;

use crate::inspection::{Extent, Inspection, Part};
use crate::state::{Layouts, StateError};

/// How far into a structure its fields are shown; QEMU's own are not nearly as deep.
const DEPTH: usize = 32;

/// A table of everything that was found.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    inspection: &'a Inspection,
}

impl<'a> Report<'a> {
    /// Of what was found.
    #[must_use]
    pub const fn new(inspection: &'a Inspection) -> Self {
        Self { inspection }
    }

    /// The table, and behind it every device's fields if `fields` is set.
    ///
    /// # Errors
    /// A device is not as the description has it.
    pub fn text(&self, fields: bool) -> Result<String, StateError> {
        let mut out = String::new();
        let layouts = match self.inspection.description.is_empty() {
            true if fields => return Err(StateError::NoDescription),
            true => None,
            false => Some(Layouts::of(self.inspection)?),
        };
        // Writing to a string does not fail.
        let _ = self.configuration(&mut out);
        let _ = self.parts(&mut out);
        let _ = self.blocks(&mut out);
        let _ = self.bitmaps(&mut out);
        if let Some(layouts) = &layouts {
            self.devices(&mut out, layouts)?;
        } else {
            out.push_str("\nno description: the device sections cannot be told apart\n");
        }
        if let (Some(layouts), true) = (&layouts, fields) {
            for device in self.inspection.devices() {
                let _ = writeln!(out, "\n{}", title(&device.header));
                tree(&mut out, &layouts.fields(device)?.state, 1);
            }
        }
        Ok(out)
    }

    fn configuration(&self, out: &mut String) -> fmt::Result {
        let Some(configuration) = &self.inspection.configuration else {
            return writeln!(out, "no configuration section");
        };
        writeln!(out, "machine type  {}", configuration.machine)?;
        if let Some(bits) = configuration.page_bits {
            writeln!(
                out,
                "page size     {} bytes",
                1u64.checked_shl(bits).unwrap_or(0)
            )?;
        }
        if let Some(uuid) = configuration.uuid {
            let digits: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
            writeln!(out, "uuid          {digits}")?;
        }
        if !configuration.capabilities.is_empty() {
            let names: Vec<String> = configuration
                .capabilities
                .iter()
                .map(ToString::to_string)
                .collect();
            writeln!(out, "capabilities  {}", names.join(", "))?;
        }
        let commands = &self.inspection.commands;
        if !commands.is_empty() {
            let said = commands.iter().map(|c| match c.count {
                1 => format!("{:?}", c.number),
                count => format!("{count} {:?}", c.number),
            });
            writeln!(out, "commands      {}", said.collect::<Vec<_>>().join(", "))?;
        }
        Ok(())
    }

    fn parts(&self, out: &mut String) -> fmt::Result {
        let total = self.inspection.total();
        let rows = Part::ALL.map(|part| (part.name(), self.inspection.part(part)));
        writeln!(
            out,
            "\n{:<16} {:>14} {:>7} {:>10} {:>7}",
            "part", "bytes", "share", "ms", "share"
        )?;
        for (name, extent) in rows.into_iter().chain([("total", total)]) {
            writeln!(out, "{name:<16} {}", Cells { extent, total })?;
        }
        Ok(())
    }

    fn blocks(&self, out: &mut String) -> fmt::Result {
        let blocks = &self.inspection.blocks;
        let names: Vec<String> = blocks
            .iter()
            .map(|b| Escaped(b.block.name()).to_string())
            .collect();
        let width = names.iter().map(String::len).max();
        let width = width.unwrap_or(0).max("ram block".len());
        writeln!(
            out,
            "\n{:<width$} {:>14} {:>10} {:>10} {:>10} {:>10}",
            "ram block", "bytes", "pages", "zero", "xbzrle", "unique"
        )?;
        for (b, name) in blocks.iter().zip(&names) {
            let length = b.block.used_length();
            if b.is_ignored {
                writeln!(out, "{name:<width$} {length:>14} shared, not in the stream")?;
                continue;
            }
            writeln!(
                out,
                "{name:<width$} {length:>14} {:>10} {:>10} {:>10} {:>10}",
                b.normal, b.zero, b.xbzrle, b.unique
            )?;
        }
        writeln!(out, "in {} sections", self.inspection.ram_sections)
    }

    fn bitmaps(&self, out: &mut String) -> fmt::Result {
        let bitmaps = &self.inspection.bitmaps;
        if bitmaps.is_empty() {
            return Ok(());
        }
        let title = |b: &MigratedBitmap| format!("{} of {}", b.name, b.node);
        let width = bitmaps.iter().map(|b| title(b).len()).max().unwrap_or(0);
        let width = width.max("dirty bitmap".len());
        writeln!(out, "\n{:<width$} {:>12}", "dirty bitmap", "granularity")?;
        for b in bitmaps {
            let flags = [
                (b.flags.enabled, "enabled"),
                (b.flags.persistent, "persistent"),
                (b.flags.autoload, "autoload"),
                (!b.is_complete, "not complete"),
            ];
            let flags: Vec<&str> = flags.iter().filter(|f| f.0).map(|f| f.1).collect();
            let title = title(b);
            writeln!(
                out,
                "{title:<width$} {:>12} {}",
                b.granularity,
                flags.join(", ")
            )?;
        }
        Ok(())
    }

    fn devices(&self, out: &mut String, layouts: &Layouts) -> Result<(), StateError> {
        let total = self.inspection.total();
        let titles = || self.inspection.devices().map(|d| title(&d.header));
        let width = titles().map(|t| t.len()).max().unwrap_or(0).max(6);
        let _ = writeln!(
            out,
            "\n{:<width$} {:>7} {:>7} {:>14} {:>7} {:>10} {:>7}",
            "device", "version", "fields", "bytes", "share", "ms", "share"
        );
        for (device, title) in self.inspection.devices().zip(titles()) {
            let cells = Cells {
                extent: device.extent,
                total,
            };
            let count = layouts.fields(device)?.count;
            let version = device.header.version;
            let _ = writeln!(out, "{title:<width$} {version:>7} {count:>7} {cells}");
        }
        Ok(())
    }
}

/// A device's name, and which one of that name it is.
fn title(header: &SectionHeader) -> String {
    match header.instance.0 {
        0 => header.idstr.to_string(),
        instance => format!("{} #{instance}", header.idstr),
    }
}

fn tree(out: &mut String, value: &Value, depth: usize) {
    let Value::Object(fields) = value else {
        return;
    };
    for (name, value) in fields {
        match value {
            Value::Array(list) => {
                for (i, value) in list.iter().enumerate() {
                    leaf(out, &format!("{name}[{i}]"), value, depth);
                }
            }
            value => leaf(out, name, value, depth),
        }
    }
}

fn leaf(out: &mut String, name: &str, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    let name = Escaped(name);
    let _ = match value {
        Value::Object(_) if depth >= DEPTH => writeln!(out, "{indent}{name} = …"),
        Value::Object(_) => {
            let written = writeln!(out, "{indent}{name}");
            tree(out, value, depth + 1);
            written
        }
        Value::String(text) => writeln!(out, "{indent}{name} = {}", Escaped(text)),
        other => writeln!(out, "{indent}{name} = {}", Escaped(&other.to_string())),
    };
}

/// Bytes and time with their shares.
struct Cells {
    extent: Extent,
    total: Extent,
}

impl fmt::Display for Cells {
    #[allow(clippy::cast_precision_loss)] // for people
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (extent, total) = (self.extent, self.total);
        let bytes = 100.0 * extent.bytes as f64 / total.bytes.max(1) as f64;
        let seconds = |time: Duration| time.as_secs_f64();
        let time = 100.0 * seconds(extent.time) / seconds(total.time).max(1e-9);
        write!(
            f,
            "{:>14} {bytes:>6.1}% {:>10.3} {time:>6.1}%",
            extent.bytes,
            1e3 * seconds(extent.time)
        )
    }
}
