//! Machines, devices, and their outermost descriptions.

use serde_json::json;

use super::{assert_found, device, dump, field, named, of, structure};
use crate::check::check;
use crate::dump::Dump;
use crate::finding::is_compatible;

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
