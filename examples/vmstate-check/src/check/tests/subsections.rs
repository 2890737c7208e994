//! Subsections, which are known by their names.

use serde_json::Value;

use super::{assert_found, device, dump, field, named, since, with};

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
