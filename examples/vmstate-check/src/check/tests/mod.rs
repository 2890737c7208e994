//! Comparisons of dumps that are made up here; what they are to find is said by its text.

mod devices;
mod fields;
mod subsections;
mod unused;
mod versions;

use serde_json::{Value, json};

use super::check;
use crate::dump::Dump;
use crate::finding::{Finding, Severity};

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
fn what_depends_on_tests_of_the_devices_is_a_warning_and_all_else_an_error() {
    let source = of(1, &[field("a", 1)]);
    let findings = check(&source, &of(1, &[tested(field("a", 2))]));
    let severities: Vec<_> = findings.iter().map(Finding::severity).collect();
    assert_eq!(severities, [Severity::Warning, Severity::Error]);
}
