//! The byte vectors that QEMU tests its own `vmstate` with (`tests/unit/test-vmstate.c`).
#![cfg(feature = "derive")]

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Debug;

    use vmstate::{VmState, from_bytes, to_bytes, to_bytes_described};

    /// Both ways, and no beginning is a whole state.
    fn check<T: VmState + PartialEq + Debug>(value: &T, wire: &[u8]) {
        assert_eq!(to_bytes(value).unwrap(), wire);
        assert_eq!(&from_bytes::<T>(wire, T::VERSION).unwrap(), value);
        for part in [&wire[..0], &wire[..wire.len() - 1], &wire[..wire.len() / 2]] {
            from_bytes::<T>(part, T::VERSION).unwrap_err();
        }
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "simple/primitive", version = 1)]
    struct Simple {
        b_1: bool,
        b_2: bool,
        u8_1: u8,
        u16_1: u16,
        u32_1: u32,
        u64_1: u64,
        i8_1: i8,
        i8_2: i8,
        i16_1: i16,
        i16_2: i16,
        i32_1: i32,
        i32_2: i32,
        i64_1: i64,
        i64_2: i64,
    }

    #[test]
    fn primitive_fields() {
        let value = Simple {
            b_1: true,
            b_2: false,
            u8_1: 130,
            u16_1: 512,
            u32_1: 70_000,
            u64_1: 12_121_212,
            i8_1: 65,
            i8_2: -65,
            i16_1: 512,
            i16_2: -512,
            i32_1: 70_000,
            i32_2: -70_000,
            i64_1: 12_121_212,
            i64_2: -12_121_212,
        };
        check(
            &value,
            b"\x01\x00\x82\x02\x00\x00\x01\x11\x70\x00\x00\x00\x00\x00\xb8\xf4\x7c\
              \x41\xbf\x02\x00\xfe\x00\x00\x01\x11\x70\xff\xfe\xee\x90\
              \x00\x00\x00\x00\x00\xb8\xf4\x7c\xff\xff\xff\xff\xff\x47\x0b\x84",
        );
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "simple/array", version = 1)]
    struct Array {
        u16_1: [u16; 3],
    }

    #[test]
    fn an_array() {
        let u16_1 = [0x42, 0x43, 0x44];
        check(&Array { u16_1 }, b"\x00\x42\x00\x43\x00\x44");
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/versioned", version = 2, minimum_version = 1)]
    struct Versioned {
        a: u32,
        #[vmstate(since = 2, default = "200")]
        b: u32,
        c: u32,
        d: u64,
        #[vmstate(since = 2, default = "500")]
        e: u32,
        #[vmstate(since = 2, default = "600")]
        f: u64,
    }

    #[test]
    fn versions() {
        let old = b"\0\0\0\x0a\0\0\0\x1e\0\0\0\0\0\0\0\x28";
        let loaded = from_bytes::<Versioned>(old, 1).unwrap();
        let value = |(b, e, f)| Versioned {
            a: 10,
            b,
            c: 30,
            d: 40,
            e,
            f,
        };
        assert_eq!(loaded, value((200, 500, 600)));
        check(
            &value((20, 50, 60)),
            b"\0\0\0\x0a\0\0\0\x14\0\0\0\x1e\0\0\0\0\0\0\0\x28\0\0\0\x32\0\0\0\0\0\0\0\x3c",
        );
    }

    /// `DEFAULT` is what the state has at the side that loads, before it does.
    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/skip", version = 2, minimum_version = 1)]
    struct Skipping<const DEFAULT: bool> {
        a: u32,
        b: u32,
        #[vmstate(skip, default = DEFAULT)]
        skip_c_e: bool,
        #[vmstate(exists = !*skip_c_e, default = "300")]
        c: u32,
        d: u64,
        #[vmstate(exists = !*skip_c_e, default = "500")]
        e: u32,
        #[vmstate(since = 2)]
        f: u64,
    }

    #[test]
    fn a_test_of_a_field_that_is_not_sent() {
        let all = Skipping::<false> {
            a: 1,
            b: 2,
            skip_c_e: false,
            c: 3,
            d: 4,
            e: 5,
            f: 6,
        };
        check(
            &all,
            b"\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\x05\0\0\0\0\0\0\0\x06",
        );
        let less = Skipping::<true> {
            a: 1,
            b: 2,
            skip_c_e: true,
            c: 300,
            d: 4,
            e: 500,
            f: 6,
        };
        let wire = b"\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x06";
        check(&less, wire);
        // Saving looks at the state, not at the default.
        let skip_c_e = true;
        assert_eq!(to_bytes(&Skipping { skip_c_e, ..all }).unwrap(), wire);
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/tst", version = 1)]
    struct Element {
        i: i32,
    }

    /// Which pointers are there the side that loads knows, as QEMU's does.
    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/arps", version = 1)]
    struct PointersToStructures<const LACKS: usize> {
        #[vmstate(skip, default = LACKS)]
        lacks: usize,
        #[vmstate(pointers = |i: usize| i != *lacks)]
        ar: [Option<Element>; 4],
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/arps", version = 1)]
    struct PointersToNumbers<const LACKS: usize> {
        #[vmstate(skip, default = LACKS)]
        lacks: usize,
        #[vmstate(pointers = |i: usize| i != *lacks)]
        ar: [Option<i32>; 4],
    }

    const NO_NULL: &[u8] = b"\0\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\x03";
    const ONE_NULL: &[u8] = b"\0\0\0\0\x30\0\0\0\x02\0\0\0\x03";

    #[test]
    fn pointers_to_structures() {
        let element = |i| Some(Element { i });
        let ar = [element(0), element(1), element(2), element(3)];
        check(&PointersToStructures::<4> { lacks: 4, ar }, NO_NULL);
        let ar = [element(0), None, element(2), element(3)];
        check(&PointersToStructures::<1> { lacks: 1, ar }, ONE_NULL);
    }

    #[test]
    fn pointers_to_numbers() {
        let ar = [Some(0), Some(1), Some(2), Some(3)];
        check(&PointersToNumbers::<4> { lacks: 4, ar }, NO_NULL);
        let ar = [Some(0), None, Some(2), Some(3)];
        let value = PointersToNumbers::<1> { lacks: 1, ar };
        check(&value, ONE_NULL);
        let (_, described) = to_bytes_described(&value).unwrap();
        let text = format!("{described:?}");
        assert!(text.contains("\"int32\"") && text.contains("\"ptr-marker\""));
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/marked", version = 1)]
    struct MarkedNumbers {
        #[vmstate(pointers)]
        fixed: [Option<i32>; 2],
        count: u8,
        #[vmstate(pointers, len = count, max = 2)]
        counted: Vec<Option<u16>>,
    }

    #[test]
    fn pointers_to_numbers_with_a_marker_each() {
        let value = MarkedNumbers {
            fixed: [Some(-1), None],
            count: 2,
            counted: vec![None, Some(7)],
        };
        check(&value, b"\x31\xff\xff\xff\xff\x30\x02\x30\x31\0\x07");
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/queue-element", version = 1)]
    struct QueueElement {
        b: bool,
        u8: u8,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/queue", version = 1)]
    struct Queue {
        i16: i16,
        #[vmstate(queue, max = 2)]
        q: Vec<QueueElement>,
        i32: i32,
    }

    #[test]
    fn a_tail_queue() {
        let value = Queue {
            i16: -512,
            q: vec![
                QueueElement { b: true, u8: 130 },
                QueueElement { b: false, u8: 65 },
            ],
            i32: 70_000,
        };
        check(
            &value,
            b"\xfe\x00\x01\x01\x82\x01\x00\x41\x00\x00\x01\x11\x70",
        );
    }

    #[derive(VmState, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
    #[vmstate(name = "interval", version = 1)]
    struct Interval {
        low: u64,
        high: u64,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "mapping", version = 1)]
    struct Mapping {
        phys_addr: u64,
        flags: u32,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "domain", version = 1)]
    struct Domain {
        id: i32,
        #[vmstate(tree, max = 2)]
        mappings: BTreeMap<Interval, Mapping>,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "iommu", version = 1)]
    struct Iommu {
        id: i32,
        #[vmstate(tree, max = 2)]
        domains: BTreeMap<u64, Domain>,
    }

    const SIXTH: &[u8] = b"\0\0\0\x06\0\0\0\x02\
        \x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x1f\xff\0\0\0\0\0\0\xa0\0\0\0\0\x01\
        \x01\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x4f\xff\0\0\0\0\0\x0e\0\0\0\0\0\x02\0";

    fn mapping(low: u64, high: u64, phys_addr: u64, flags: u32) -> (Interval, Mapping) {
        (Interval { low, high }, Mapping { phys_addr, flags })
    }

    fn sixth() -> Domain {
        Domain {
            id: 6,
            mappings: [
                mapping(0x1000, 0x1fff, 0xa000, 1),
                mapping(0x4000, 0x4fff, 0xe_0000, 2),
            ]
            .into(),
        }
    }

    #[test]
    fn a_tree_with_keys_that_are_structures() {
        check(&sixth(), SIXTH);
    }

    #[test]
    fn a_tree_of_trees_with_direct_keys() {
        let fifth = Domain {
            id: 5,
            mappings: [mapping(0x100_0000, 0x1ff_ffff, 0xf00_0000, 3)].into(),
        };
        let value = Iommu {
            id: 7,
            domains: [(5, fifth), (6, sixth())].into(),
        };
        let wire = [
            &b"\0\0\0\x07\0\0\0\x02\x01\0\0\0\0\0\0\0\x05\0\0\0\x05\0\0\0\x01"[..],
            b"\x01\0\0\0\0\x01\0\0\0\0\0\0\0\x01\xff\xff\xff\0\0\0\0\x0f\0\0\0\0\0\0\x03\0",
            b"\x01\0\0\0\0\0\0\0\x06",
            SIXTH,
            b"\0",
        ];
        check(&value, &wire.concat());
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/queue list", version = 1)]
    struct ListElement {
        id: u32,
    }

    #[derive(VmState, Debug, PartialEq)]
    #[vmstate(name = "test/container/qlist", version = 1)]
    struct List {
        id: u32,
        #[vmstate(queue, max = 4, info = "qlist")]
        list: Vec<ListElement>,
    }

    #[test]
    fn a_list() {
        let ids = [0x0a, 0x0b00, 0x0c_0000, 0x0d00_0000];
        let value = List {
            id: 1,
            list: ids.map(|id| ListElement { id }).into(),
        };
        check(
            &value,
            b"\0\0\0\x01\x01\0\0\0\x0a\x01\0\0\x0b\0\x01\0\x0c\0\0\x01\x0d\0\0\0\0",
        );
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "test/tmp_child", version = 0)]
    struct Difference {
        diff: i64,
        f: u64,
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "test/with_tmp", version = 1, minimum_version = 0)]
    #[vmstate(pre_save = WithTmp::subtract, post_load = WithTmp::add)]
    struct WithTmp {
        a: u32,
        d: u64,
        #[vmstate(nested, tmp)]
        tmp: Difference,
        #[vmstate(skip)]
        b: u32,
    }

    impl WithTmp {
        fn subtract(&self) -> Result<Self, String> {
            let mut prepared = self.clone();
            prepared.tmp.diff = i64::from(self.b) - i64::from(self.a);
            Ok(prepared)
        }

        fn add(&mut self, _version: u32) -> Result<(), String> {
            let sum = i64::from(self.a) + self.tmp.diff;
            self.b = u32::try_from(sum).map_err(|e| e.to_string())?;
            Ok(())
        }
    }

    #[test]
    fn a_temporary_structure() {
        let value = WithTmp {
            a: 2,
            d: 1,
            tmp: Difference { diff: 2, f: 8 },
            b: 4,
        };
        check(
            &value,
            b"\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x08",
        );
    }
}
