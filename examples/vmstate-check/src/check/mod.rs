//! The comparison: what the source saves, beside what the destination's loader makes of it
//! (QEMU 11.1 `migration/vmstate.c`, `vmstate_load_state` and `vmstate_subsection_load`).
//!
//! The outermost description and subsections are loaded at the version in the stream, which is the
//! source's. Structures within them have no version there: each side takes its own.

mod unused;

use std::collections::BTreeMap;

use crate::dump::{Description, Device, Dump, Field};
use crate::fields::Fields;
use crate::finding::{Difference, Finding, Step};
use crate::renames;

/// Whether streams of a build that declares `source` load in one that declares `destination`: what
/// stands against it, in the source's order. [`is_compatible`](crate::is_compatible) sums it up.
#[must_use]
pub fn check(source: &Dump, destination: &Dump) -> Vec<Finding> {
    let mut check = Check {
        counts_elements: (source.counts_elements(), destination.counts_elements()),
        device: None,
        path: Vec::new(),
        findings: Vec::new(),
    };
    check.whole(source, destination);
    let others: BTreeMap<&str, &Device> = destination.devices().collect();
    for (name, device) in source.devices() {
        let other = others
            .get(name)
            .or_else(|| others.get(renames::device(name)?));
        check.device = Some(name);
        match other {
            None => check.report(Difference::DeviceMissing),
            Some(other) => check.device(name, device, other),
        }
    }
    check.findings
}

/// A comparison under way.
struct Check<'a> {
    /// Whether the dumps, source's and destination's, say how many elements arrays have.
    counts_elements: (bool, bool),
    device: Option<&'a str>,
    path: Vec<Step>,
    findings: Vec<Finding>,
}

impl Check<'_> {
    fn report(&mut self, difference: Difference) {
        self.findings.push(Finding {
            device: self.device.map(str::to_owned),
            path: self.path.clone(),
            difference,
        });
    }

    fn report_any(&mut self, difference: Option<Difference>) {
        if let Some(difference) = difference {
            self.report(difference);
        }
    }

    fn report_field(&mut self, field: &Field, difference: Difference) {
        self.within(Step::Field(field.name().to_owned()), |check| {
            check.report(difference);
        });
    }

    fn within(&mut self, step: Step, compare: impl FnOnce(&mut Self)) {
        self.path.push(step);
        compare(self);
        self.path.pop();
    }

    fn whole(&mut self, source: &Dump, destination: &Dump) {
        if let (Some(s), Some(d)) = (source.machine(), destination.machine())
            && s != d
        {
            self.report(Difference::Machine {
                source: s.to_owned(),
                destination: d.to_owned(),
            });
        }
        if self.counts_elements.0 != self.counts_elements.1 {
            self.report(Difference::ElementsUnknown);
        }
    }

    fn device(&mut self, name: &str, source: &Device, destination: &Device) {
        let device = version_difference(
            source.version(),
            destination.version(),
            destination.minimum_version(),
        );
        let (Some(s), Some(d)) = (source.description(), destination.description()) else {
            self.report_any(device);
            if source.description().is_some() {
                self.report(Difference::DescriptionMissing);
            }
            return;
        };
        // QEMU says the description's version of the device too: once is enough.
        if device != description_difference(s, d) {
            self.report_any(device);
        }
        self.within(Step::Description(s.name().to_owned()), |check| {
            check.report_any(description_difference(s, d));
            if renames::is_same_description(name, s.name(), d.name()) {
                check.contents(s, d, s.version());
            } else {
                check.report(Difference::DescriptionName {
                    destination: d.name().to_owned(),
                });
            }
        });
    }

    /// Fields and subsections, of which the destination reads those of `version`.
    fn contents(&mut self, source: &Description, destination: &Description, version: i64) {
        self.fields(
            source.name(),
            Fields::of(source, source.version()),
            Fields::of(destination, version),
        );
        // The loader takes the first of a name, wherever the source's stands.
        let mut known = BTreeMap::new();
        for d in destination.subsections() {
            known.entry(d.name()).or_insert(d);
        }
        for s in source.subsections() {
            let d = known.get(s.name());
            self.within(Step::Subsection(s.name().to_owned()), |check| match d {
                None => check.report(Difference::SubsectionMissing),
                Some(d) => {
                    check.report_any(description_difference(s, d));
                    check.contents(s, d, s.version());
                }
            });
        }
    }

    fn fields<'f>(
        &mut self,
        description: &str,
        mut source: Fields<'f>,
        mut destination: Fields<'f>,
    ) {
        loop {
            let (s, d) = match (source.peek(), destination.peek()) {
                (Some(s), Some(d)) => (s, d),
                (Some(s), None) => return self.report_field(s, Difference::FieldNotRead),
                (None, Some(d)) if d.is_conditional() => {
                    self.report_field(d, Difference::FieldMayBeRead);
                    destination.skip(1);
                    continue;
                }
                (None, Some(d)) => return self.report_field(d, Difference::FieldNotSent),
                (None, None) => return,
            };
            let is_s = |d: &Field| renames::is_same_field(description, s.name(), d.name());
            if is_s(d) && !(s.is_unused() && s.bytes() != d.bytes()) {
                self.field(s, d);
                source.skip(1);
                destination.skip(1);
            } else if destination.begins_with(s.name()) {
                destination.enter();
            } else if source.begins_with(d.name()) {
                source.enter();
            } else if s.is_unused() || d.is_unused() {
                if !self.pass_unused(description, &mut source, &mut destination) {
                    return self.report_field(s, Difference::UnusedSize);
                }
            } else if let Some(conditional) = destination.conditional_before(is_s) {
                for field in conditional.iter().rev() {
                    self.report_field(field, Difference::FieldMayBeRead);
                }
                let count = conditional.len();
                destination.skip(count);
            } else {
                let destination = d.name().to_owned();
                return self.report_field(s, Difference::FieldName { destination });
            }
        }
    }

    /// The same field on both sides.
    fn field(&mut self, source: &Field, destination: &Field) {
        let counts_elements = self.counts_elements == (true, true);
        self.within(Step::Field(source.name().to_owned()), |check| {
            if source.is_conditional() != destination.is_conditional() {
                check.report(Difference::FieldCondition {
                    source: source.is_conditional(),
                });
            }
            match (source.structure(), destination.structure()) {
                (Some(s), Some(d)) => {
                    if counts_elements && source.elements() != destination.elements() {
                        check.report(Difference::FieldElements {
                            source: source.elements(),
                            destination: destination.elements(),
                        });
                    }
                    check.within(Step::Description(s.name().to_owned()), |check| {
                        check.contents(s, d, d.version());
                    });
                }
                (None, None) => {
                    let bytes = |field: &Field| {
                        if counts_elements {
                            field.bytes()
                        } else {
                            field.size()
                        }
                    };
                    let (source, destination) = (bytes(source), bytes(destination));
                    if source != destination {
                        check.report(Difference::FieldSize {
                            source,
                            destination,
                        });
                    }
                }
                (s, _) => check.report(Difference::FieldStructure {
                    source: s.is_some(),
                }),
            }
        });
    }
}

/// Why `destination` does not load the version of `source`, if it is in the stream.
fn description_difference(source: &Description, destination: &Description) -> Option<Difference> {
    version_difference(
        source.version(),
        destination.version(),
        destination.minimum_version(),
    )
}

fn version_difference(source: i64, destination: i64, minimum: i64) -> Option<Difference> {
    if source > destination {
        Some(Difference::VersionTooNew {
            source,
            destination,
        })
    } else if source < minimum {
        Some(Difference::VersionTooOld { source, minimum })
    } else {
        None
    }
}

#[cfg(test)]
mod tests;
