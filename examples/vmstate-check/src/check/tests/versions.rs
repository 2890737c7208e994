//! Which versions load, and which fields are in a stream of a version.

use super::{assert_found, device, dump, field, named, of, since, structure, with};

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
        &["error: dev > dev > field b: the destination reads it, the source sends nothing more"],
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
