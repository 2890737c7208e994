//! Fields one beside the other: their order, names, sizes, structures and conditions.

use serde_json::Value;

use super::{array, assert_found, device, dump, field, found, named, of, since, structure, tested};

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
    let warning =
        "warning: only one dump says how many elements arrays have: the numbers are not compared";
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
