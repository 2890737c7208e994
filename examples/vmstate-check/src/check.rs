//! The comparison: what the source saves, beside what the destination's loader makes of it
//! (QEMU 11.1 `migration/vmstate.c`, `vmstate_load_state` and `vmstate_subsection_load`).
//!
//! The outermost description and subsections are loaded at the version in the stream, which is the
//! source's. Structures within them have no version there: each side takes its own.

use std::collections::BTreeMap;

use crate::dump::{Description, Device, Dump, Field};
use crate::fields::{Fields, stream_bytes};
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

    /// Goes past unused bytes on one side and as many bytes of fields on the other. False if they
    /// do not end together.
    fn pass_unused<'f>(
        &self,
        description: &str,
        source: &mut Fields<'f>,
        destination: &mut Fields<'f>,
    ) -> bool {
        let mut s = Passed::new(self.counts_elements.0);
        let mut d = Passed::new(self.counts_elements.1);
        loop {
            let next = if s.bytes > d.bytes {
                d.pass(destination)
            } else {
                s.pass(source)
            };
            if next.is_none() || (s.has_named && d.has_named) {
                return false;
            }
            if s.bytes == d.bytes {
                return true;
            }
            // A field may be an array of more elements than the dump says: the names tell then
            // where the unused bytes end.
            let is_short = (s.bytes < d.bytes && s.may_be_longer())
                || (d.bytes < s.bytes && d.may_be_longer());
            let is_in_step = match (source.peek(), destination.peek()) {
                (Some(s), Some(d)) => renames::is_same_field(description, s.name(), d.name()),
                (None, None) => true,
                _ => false,
            };
            if is_short && is_in_step {
                return true;
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

/// What of one side was passed beside unused bytes.
struct Passed {
    bytes: u64,
    /// Whether it was not only unused bytes.
    has_named: bool,
    counts_elements: bool,
}

impl Passed {
    const fn new(counts_elements: bool) -> Self {
        Self {
            bytes: 0,
            has_named: false,
            counts_elements,
        }
    }

    /// Passes the next field. `None` if there is none, or nobody knows how long it is.
    fn pass(&mut self, fields: &mut Fields<'_>) -> Option<()> {
        let field = fields.peek()?;
        self.bytes = self.bytes.checked_add(stream_bytes(field)?)?;
        self.has_named |= !field.is_unused();
        fields.skip(1);
        Some(())
    }

    const fn may_be_longer(&self) -> bool {
        self.has_named && !self.counts_elements
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::finding::{Severity, is_compatible};

    fn dump(device: Value) -> Dump {
        let dump = json!({"vmschkmachine": {"Name": "board"}, "dev": device});
        Dump::from_json(dump.to_string().as_bytes()).unwrap()
    }

    fn device(description: Value) -> Value {
        let mut device = json!({"Name": "dev", "Description": description});
        for key in ["version_id", "minimum_version_id"] {
            device[key] = device["Description"][key].clone();
        }
        device
    }

    /// A description of versions 1 to `version`.
    fn named(name: &str, version: u32, fields: &[Value]) -> Value {
        json!({"name": name, "version_id": version, "minimum_version_id": 1, "Fields": fields})
    }

    fn of(version: u32, fields: &[Value]) -> Dump {
        dump(device(named("dev", version, fields)))
    }

    fn field(name: &str, size: u32) -> Value {
        json!({"field": name, "version_id": 0, "field_exists": false, "size": size})
    }

    fn with(mut value: Value, key: &str, member: impl Into<Value>) -> Value {
        value[key] = member.into();
        value
    }

    fn since(field: Value, version: u32) -> Value {
        with(field, "version_id", version)
    }

    fn tested(field: Value) -> Value {
        with(field, "field_exists", true)
    }

    fn array(field: Value, elements: u32) -> Value {
        with(field, "num", elements)
    }

    /// A structure; the size is that in the program's memory and means nothing.
    fn structure(name: &str, description: Value) -> Value {
        with(field(name, 999), "Description", description)
    }

    fn found(source: &Dump, destination: &Dump) -> Vec<String> {
        let findings = check(source, destination);
        findings.iter().map(ToString::to_string).collect()
    }

    #[track_caller]
    fn assert_found(source: &Dump, destination: &Dump, expected: &[&str]) {
        assert_eq!(found(source, destination), expected);
    }

    #[test]
    fn a_dump_is_compatible_with_itself() {
        let inner = named("inner", 2, &[since(field("b", 4), 2)]);
        let fields = [
            field("a", 1),
            array(structure("s", inner), 3),
            field("unused", 2),
        ];
        let dump = of(3, &fields);
        assert_found(&dump, &dump, &[]);
    }

    #[test]
    fn another_machine_is_a_warning() {
        let other = Dump::from_json(br#"{"vmschkmachine": {"Name": "other"}}"#).unwrap();
        let source = Dump::from_json(br#"{"vmschkmachine": {"Name": "board"}}"#).unwrap();
        assert_found(
            &source,
            &other,
            &["warning: machine board in the source, other in the destination"],
        );
        assert!(is_compatible(&check(&source, &other)));
        assert_found(&source, &Dump::from_json(b"{}").unwrap(), &[]);
    }

    #[test]
    fn a_device_that_is_missing_or_has_another_name() {
        let a = r#"{"version_id": 1, "Description": {"name": "d", "version_id": 1}}"#;
        let of = |name: &str| Dump::from_json(format!("{{\"{name}\": {a}}}").as_bytes()).unwrap();
        assert_found(
            &of("pit"),
            &of("rtc"),
            &["error: pit: the destination has no such device"],
        );
        assert_found(&of("ICH9 LPC"), &of("ICH9-LPC"), &[]);
        assert_found(&of("e1000"), &of("e1000-82540em"), &[]);
    }

    #[test]
    fn a_device_without_a_description_has_at_least_a_version() {
        let described = of(2, &[field("a", 1)]);
        let bare = |version: u32| dump(json!({"version_id": version, "minimum_version_id": 2}));
        assert_found(
            &described,
            &bare(2),
            &["error: dev: the destination does not describe its state"],
        );
        assert_found(&bare(2), &described, &[]);
        assert_found(
            &bare(1),
            &bare(2),
            &[
                "error: dev: version 1 in the source is older than 2, the oldest that the destination loads",
            ],
        );
    }

    #[test]
    fn the_outermost_description_is_told_by_its_name_and_inner_ones_are_not() {
        let named_so = |name| dump(device(named(name, 1, &[field("a", 1)])));
        assert_found(
            &named_so("vga"),
            &named_so("vga-isa"),
            &["error: dev > vga: the destination's is called vga-isa"],
        );
        let inner = |name| of(1, &[structure("s", named(name, 1, &[field("a", 1)]))]);
        assert_found(&inner("PCIDevice"), &inner("PCIEDevice"), &[]);
    }

    #[test]
    fn versions_are_within_what_the_destination_loads() {
        let dev = |version: u32, minimum: u32| {
            dump(device(with(
                named("dev", version, &[field("a", 1)]),
                "minimum_version_id",
                minimum,
            )))
        };
        assert_found(&dev(2, 1), &dev(3, 2), &[]);
        assert_found(
            &dev(3, 2),
            &dev(2, 1),
            &["error: dev > dev: version 3 in the source is newer than the destination's 2"],
        );
        assert_found(
            &dev(1, 1),
            &dev(3, 2),
            &[
                "error: dev > dev: version 1 in the source is older than 2, the oldest that the destination loads",
            ],
        );
    }

    #[test]
    fn a_version_of_the_device_that_its_description_does_not_have_is_compared_too() {
        let dev = |version: u32| {
            let dev = device(named("dev", 1, &[field("a", 1)]));
            dump(with(dev, "version_id", version))
        };
        assert_found(
            &dev(2),
            &dev(1),
            &["error: dev: version 2 in the source is newer than the destination's 1"],
        );
        assert_found(&dev(1), &dev(2), &[]);
    }

    #[test]
    fn a_field_of_a_new_version_is_not_expected_in_an_old_stream_wherever_it_stands() {
        let old = of(1, &[field("a", 1), field("c", 1)]);
        let new = of(2, &[field("a", 1), since(field("b", 1), 2), field("c", 1)]);
        assert_found(&old, &new, &[]);
        assert_found(
            &new,
            &old,
            &[
                "error: dev > dev: version 2 in the source is newer than the destination's 1",
                "error: dev > dev > field b: the destination reads c here; the rest is not compared",
            ],
        );
    }

    #[test]
    fn a_field_that_the_destination_has_only_of_a_later_version_is_not_read() {
        let old = of(1, &[field("a", 1), field("b", 1)]);
        let new = of(2, &[field("a", 1), since(field("b", 1), 2)]);
        assert_found(
            &old,
            &new,
            &[
                "error: dev > dev > field b: the destination reads nothing more; the rest is not compared",
            ],
        );
        // From a version on that both have: no difference any more.
        let all = of(2, &[field("a", 1), field("b", 1)]);
        assert_found(&new, &all, &[]);
        assert_found(&all, &new, &[]);
    }

    #[test]
    fn a_field_that_was_added_without_a_version_is_in_no_old_stream() {
        let old = of(1, &[field("a", 1)]);
        let new = of(1, &[field("a", 1), field("b", 1)]);
        assert_found(
            &old,
            &new,
            &[
                "error: dev > dev > field b: the destination reads it, the source sends nothing more",
            ],
        );
    }

    #[test]
    fn a_structure_has_no_version_in_the_stream() {
        let old = of(1, &[structure("s", named("inner", 1, &[field("a", 1)]))]);
        let fields = [field("a", 1), since(field("b", 1), 2)];
        let new = of(1, &[structure("s", named("inner", 2, &fields))]);
        assert_found(
            &old,
            &new,
            &[
                "error: dev > dev > field s > inner > field b: the destination reads it, the source sends nothing more",
            ],
        );
        assert_found(
            &new,
            &old,
            &[
                "error: dev > dev > field s > inner > field b: the destination reads nothing more; the rest is not compared",
            ],
        );
        let same = of(1, &[structure("s", named("inner", 2, &[field("a", 1)]))]);
        assert_found(&same, &old, &[]);
    }

    #[test]
    fn the_first_field_that_is_another_ends_the_comparison() {
        let source = of(1, &[field("a", 1), field("b", 1), field("c", 1)]);
        let destination = of(1, &[field("a", 1), field("x", 1), field("y", 1)]);
        assert_found(
            &source,
            &destination,
            &["error: dev > dev > field b: the destination reads x here; the rest is not compared"],
        );
    }

    #[test]
    fn a_renamed_field_is_the_same() {
        let mch = |name| dump(device(named("mch", 1, &[field(name, 1)])));
        assert_found(&mch("d"), &mch("parent_obj"), &[]);
        assert_eq!(found(&mch("d"), &mch("dev")).len(), 1);
    }

    #[test]
    fn fields_may_be_bundled_in_a_structure_or_unbundled() {
        let flat = of(1, &[field("a", 1), field("b", 2), field("c", 4)]);
        let inner = named("inner", 1, &[field("b", 2)]);
        let bundle = structure("x", inner.clone());
        let bundled = of(1, &[field("a", 1), bundle.clone(), field("c", 4)]);
        assert_found(&flat, &bundled, &[]);
        assert_found(&bundled, &flat, &[]);
        let outer = named("outer", 1, &[bundle, field("c", 4)]);
        let twice = of(1, &[field("a", 1), structure("y", outer)]);
        assert_found(&flat, &twice, &[]);
        assert_found(&twice, &flat, &[]);
        let flat = of(1, &[field("a", 1), field("b", 2), array(field("c", 4), 1)]);
        let several = of(
            1,
            &[
                field("a", 1),
                array(structure("x", inner), 2),
                field("c", 4),
            ],
        );
        assert_eq!(found(&flat, &several).len(), 1);
    }

    #[test]
    fn the_bytes_of_a_field_are_compared_with_all_elements() {
        let of_size = |field| of(1, &[field, array(field_of_bytes(), 2)]);
        fn field_of_bytes() -> Value {
            field("other", 1)
        }
        let word = of_size(field("a", 4));
        assert_found(
            &word,
            &of_size(field("a", 2)),
            &["error: dev > dev > field a: 4 bytes in the source, 2 in the destination"],
        );
        assert_found(
            &of_size(array(field("a", 4), 2)),
            &of_size(array(field("a", 4), 3)),
            &["error: dev > dev > field a: 8 bytes in the source, 12 in the destination"],
        );
        assert_found(&word, &of_size(array(field("a", 1), 4)), &[]);
    }

    #[test]
    fn elements_that_one_dump_does_not_count_are_not_compared() {
        let old = of(1, &[field("a", 4)]);
        let new = of(1, &[array(field("a", 4), 8)]);
        let warning = "warning: only one dump says how many elements arrays have: the numbers are not compared";
        assert_found(&old, &new, &[warning]);
        assert_found(&new, &old, &[warning]);
    }

    #[test]
    fn an_array_of_structures_keeps_its_number() {
        let items = |n| {
            let item = structure("items", named("item", 1, &[field("a", 1)]));
            of(1, &[array(field("b", 1), 2), array(item, n)])
        };
        assert_found(
            &items(2),
            &items(3),
            &[
                "error: dev > dev > field items: 2 elements in the source, 3 elements in the destination",
            ],
        );
    }

    #[test]
    fn a_structure_is_no_plain_field() {
        let plain = of(1, &[field("s", 1)]);
        let inner = named("inner", 1, &[field("a", 1)]);
        let structured = of(1, &[structure("s", inner)]);
        assert_found(
            &plain,
            &structured,
            &["error: dev > dev > field s: only in the destination does it consist of fields"],
        );
        assert_found(
            &structured,
            &plain,
            &["error: dev > dev > field s: only in the source does it consist of fields"],
        );
    }

    #[test]
    fn a_conditional_field_that_only_the_destination_has_may_be_read() {
        let without = of(1, &[field("a", 1), field("c", 1)]);
        let conditional = tested(field("b", 1));
        let within = of(1, &[field("a", 1), conditional.clone(), field("c", 1)]);
        let warning = "warning: dev > dev > field b: the destination reads it if its test says so, \
                       the source does not send it";
        assert_found(&without, &within, &[warning]);
        let at_end = of(1, &[field("a", 1), field("c", 1), conditional.clone()]);
        assert_found(&without, &at_end, &[warning]);
        // One that only the source has may be sent, and then nobody reads it.
        assert_found(
            &within,
            &without,
            &["error: dev > dev > field b: the destination reads c here; the rest is not compared"],
        );
        // Its version means nothing.
        let late = of(1, &[field("a", 1), since(conditional, 9), field("c", 1)]);
        assert_found(&within, &late, &[]);
    }

    #[test]
    fn a_condition_on_one_side_only_is_a_warning() {
        let always = of(1, &[field("a", 1)]);
        let sometimes = of(1, &[tested(field("a", 1))]);
        let warning = |side| {
            format!(
                "warning: dev > dev > field a: whether it is there is decided by a test, but only in the {side}"
            )
        };
        assert_found(&always, &sometimes, &[&warning("destination")]);
        assert_found(&sometimes, &always, &[&warning("source")]);
    }

    #[test]
    fn unused_bytes_stand_for_as_many_of_any_fields() {
        let counted = array(field("last", 1), 2);
        let fields = |fields: &[Value]| of(1, &[fields, std::slice::from_ref(&counted)].concat());
        let unused = fields(&[field("unused", 6)]);
        let two = fields(&[field("a", 4), field("b", 2)]);
        let inner = named("inner", 1, &[array(field("a", 1), 4), field("b", 2)]);
        let bundled = fields(&[structure("s", inner)]);
        let split = fields(&[field("unused", 1), field("unused", 5)]);
        for (source, destination) in [
            (&unused, &two),
            (&two, &unused),
            (&bundled, &unused),
            (&unused, &bundled),
            (&split, &unused),
            (&split, &two),
        ] {
            assert_found(source, destination, &[]);
        }
        let longer = fields(&[field("a", 4), field("b", 4)]);
        let error = |field| {
            format!(
                "error: dev > dev > field {field}: unused bytes of the one side end within a field \
                 of the other; the rest is not compared"
            )
        };
        assert_found(&unused, &longer, &[&error("unused")]);
        assert_found(&longer, &unused, &[&error("a")]);
        assert_found(
            &unused,
            &fields(&[field("varying", 0)]),
            &[&error("unused")],
        );
        let shorter = of(1, std::slice::from_ref(&counted));
        assert_eq!(found(&unused, &shorter), [error("unused")]);
    }

    #[test]
    fn unused_bytes_may_stand_for_an_array_that_is_not_counted() {
        // QEMU 7.2's and 10.0's e1000e: five of core.eitr_intr_pending.
        let fields = |first, last| of(1, &[first, field("value", 4), last]);
        let old = fields(field("pending", 1), field("last", 1));
        let new = fields(field("unused", 5), array(field("last", 1), 2));
        let only = "warning: only one dump says how many elements arrays have: \
                    the numbers are not compared";
        assert_found(&old, &new, &[only]);
        assert_found(&new, &old, &[only]);
        let counted = fields(field("pending", 1), array(field("last", 1), 2));
        assert_eq!(found(&counted, &new).len(), 1);
        assert!(!is_compatible(&check(&counted, &new)));
    }

    #[test]
    fn a_subsection_is_known_to_the_destination_by_its_name() {
        let dev = |subsections: &[Value]| {
            let dev = named("dev", 1, &[field("a", 1)]);
            dump(device(with(dev, "Subsections", subsections)))
        };
        let more = |version, fields: &[Value]| named("dev/more", version, fields);
        let (none, one) = (dev(&[]), dev(&[more(1, &[field("b", 1)])]));
        assert_found(&none, &one, &[]);
        assert_found(
            &one,
            &none,
            &["error: dev > dev > subsection dev/more: the destination does not know it"],
        );
        // Its version is in the stream.
        let newer = dev(&[more(2, &[field("b", 1), since(field("c", 1), 2)])]);
        assert_found(&one, &newer, &[]);
        assert_found(
            &newer,
            &one,
            &[
                "error: dev > dev > subsection dev/more: version 2 in the source is newer than the destination's 1",
                "error: dev > dev > subsection dev/more > field c: the destination reads nothing more; the rest is not compared",
            ],
        );
        // The loader takes the first of a name.
        let twice = dev(&[more(1, &[field("b", 1)]), more(1, &[field("x", 1)])]);
        assert_found(&one, &twice, &[]);
        assert_found(
            &twice,
            &twice,
            &[
                "error: dev > dev > subsection dev/more > field x: the destination reads b here; the rest is not compared",
            ],
        );
    }

    #[test]
    fn what_depends_on_tests_of_the_devices_is_a_warning_and_all_else_an_error() {
        let source = of(1, &[field("a", 1)]);
        let findings = check(&source, &of(1, &[tested(field("a", 2))]));
        let severities: Vec<_> = findings.iter().map(Finding::severity).collect();
        assert_eq!(severities, [Severity::Warning, Severity::Error]);
    }
}
