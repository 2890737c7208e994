//! Unused bytes in the place of fields.

use serde_json::Value;

use super::{array, assert_found, field, found, named, of, structure};
use crate::check::check;
use crate::finding::is_compatible;

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
