//! The rest of QEMU's vocabulary: what each form is in bytes, in the self-description, and what is
//! refused.
#![cfg(feature = "derive")]

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use vmstate::{
        Bits, ByteArray, Capability, CpuDouble, Device, DeviceError, DeviceTree, Dump, LoadError,
        Priority, Reader, SaveError, Unused, VmState, Writer, from_bytes, to_bytes,
    };

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "item", version = 1)]
    struct Item {
        value: u16,
    }

    const fn item(value: u16) -> Item {
        Item { value }
    }

    /// What a device tree says of a value, from its fields on.
    fn described<T: VmState + Clone + Send + 'static>(value: &T) -> String {
        struct Only<T>(T);
        impl<T: VmState + Clone + Send + 'static> Device for Only<T> {
            type State = T;
            fn save(&mut self) -> Result<T, DeviceError> {
                Ok(self.0.clone())
            }
            fn reset(&mut self) -> Result<(), DeviceError> {
                Ok(())
            }
            fn install(&mut self, state: T) -> Result<(), DeviceError> {
                self.0 = state;
                Ok(())
            }
        }
        let mut tree = DeviceTree::new();
        tree.register("d", 0, Priority::Default, Only(value.clone()))
            .unwrap();
        let json = tree.save_all_described().unwrap().1.to_json(4096);
        let (_, fields) = json.split_once(r#""fields": "#).unwrap();
        fields.strip_suffix("}]}").unwrap().to_owned()
    }

    /// `bytes` are `value`, nothing shorter is, and no damage does more than an error.
    fn check<T: VmState + PartialEq + std::fmt::Debug>(value: &T, bytes: &[u8]) {
        assert_eq!(to_bytes(value).unwrap(), bytes);
        assert_eq!(&from_bytes::<T>(bytes, T::VERSION).unwrap(), value);
        for end in 0..bytes.len() {
            let error = from_bytes::<T>(&bytes[..end], T::VERSION).unwrap_err();
            assert!(error.is_truncated(), "{end}: {error}");
        }
        for i in 0..bytes.len() {
            for damage in [0, 1, 0x30, 0x31, 0x7f, 0xff] {
                let mut damaged = bytes.to_vec();
                damaged[i] = damage;
                let _ = from_bytes::<T>(&damaged, T::VERSION);
            }
        }
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "ptrs", version = 1)]
    struct Marked {
        #[vmstate(pointers)]
        fixed: [Option<Item>; 3],
        count: u8,
        #[vmstate(pointers, len = count, max = 4)]
        counted: Vec<Option<Item>>,
    }

    #[test]
    fn every_pointer_has_a_marker() {
        let value = Marked {
            fixed: [Some(item(1)), None, Some(item(2))],
            count: 2,
            counted: vec![None, Some(item(3))],
        };
        check(&value, b"1\0\x01\x301\0\x02\x02\x301\0\x03");
        let ptr = |name| format!(r#"{{"name": "{name}", "type": "ptr-marker", "size": 1}}"#);
        let element = |name| {
            let fields = r#"[{"name": "value", "type": "uint16", "size": 2}]"#;
            format!(
                r#"{{"name": "{name}", "type": "struct", "struct": {{"vmsd_name": "item", "version": 1, "fields": {fields}}}, "size": 2}}"#
            )
        };
        assert_eq!(
            described(&value),
            format!(
                r#"[{}, {}, {}, {}, {}, {{"name": "count", "type": "uint8", "size": 1}}, {}, {}, {}]"#,
                ptr("fixed"),
                element("fixed"),
                ptr("fixed"),
                ptr("fixed"),
                element("fixed"),
                ptr("counted"),
                ptr("counted"),
                element("counted"),
            )
        );
    }

    #[test]
    fn another_marker_is_an_error_that_names_it() {
        let error = from_bytes::<Marked>(b"2\0\x01\x30\x30\0", 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "fixed[0], byte 0: unexpected ptr marker: 50"
        );
    }

    #[test]
    fn more_pointers_than_the_bound_are_refused() {
        let error = from_bytes::<Marked>(b"\x30\x30\x30\x05", 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "counted, byte 4: 5 elements, expected 0 to 4"
        );
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "old", version = 1)]
    struct NullsMarked {
        present: u8,
        #[vmstate(pointers = |i: usize| *present & (1 << i) != 0)]
        items: [Option<Item>; 4],
    }

    #[test]
    fn only_null_pointers_have_a_marker_in_the_older_form() {
        let value = NullsMarked {
            present: 0b0011,
            items: [Some(item(1)), Some(item(2)), None, None],
        };
        check(&value, b"\x03\0\x01\0\x02\x30\x30");
        let text = described(&value);
        assert!(
            text.contains(r#"{"name": "items", "array_len": 2, "type": "struct""#),
            "{text}"
        );
        assert!(
            text.contains(r#"{"name": "items", "array_len": 2, "type": "ptr-marker", "size": 1}"#),
            "{text}"
        );
        // '1' is no marker in this form.
        let error = from_bytes::<NullsMarked>(b"\x00\x30\x31\0\x01", 1).unwrap_err();
        assert!(
            matches!(error, LoadError::PointerMarker { marker: 0x31, .. }),
            "{error}"
        );
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "counts", version = 1)]
    struct Counts {
        bytes: u8,
        words: u16,
        wide: u32,
        signed: i32,
        #[vmstate(len = bytes, max = 4)]
        a: Vec<u8>,
        #[vmstate(len = words, max = 4)]
        b: Vec<u16>,
        #[vmstate(nested, len = wide, max = 4)]
        c: Vec<Item>,
        #[vmstate(len = signed, max = 4)]
        d: Vec<Unused<2>>,
        #[vmstate(len = usize::from(*bytes) * 2, max = 8)]
        multiplied: Vec<u8>,
        #[vmstate(len = 2, array)]
        constant: Vec<u8>,
    }

    #[test]
    fn lists_are_counted_by_every_width_and_by_expressions() {
        let value = Counts {
            bytes: 1,
            words: 1,
            wide: 2,
            signed: 1,
            a: vec![7],
            b: vec![8],
            c: vec![item(9), item(10)],
            d: vec![Unused],
            multiplied: vec![1, 2],
            constant: vec![3, 4],
        };
        check(
            &value,
            b"\x01\0\x01\0\0\0\x02\0\0\0\x01\x07\0\x08\0\x09\0\x0a\0\0\x01\x02\x03\x04",
        );
        let text = described(&value);
        for part in [
            r#"{"name": "a", "type": "buffer", "size": 1}"#,
            r#"{"name": "b", "type": "uint16", "size": 2}"#,
            r#"{"name": "c", "array_len": 2, "type": "struct""#,
            r#"{"name": "constant", "array_len": 2, "type": "uint8", "size": 1}"#,
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn counts_from_the_wire_are_checked_before_anything_is_taken() {
        for (bytes, said) in [
            (
                &b"\xff\0\0\0\0\0\0\0\0\0\0"[..],
                "a, byte 11: 255 elements, expected 0 to 4",
            ),
            (
                b"\0\xff\xff\0\0\0\0\0\0\0\0",
                "b, byte 11: 65535 elements, expected 0 to 4",
            ),
            (
                b"\0\0\0\xff\xff\xff\xff\0\0\0\0",
                "c, byte 11: 4294967295 elements, expected 0 to 4",
            ),
            (
                b"\0\0\0\0\0\0\0\xff\xff\xff\xff",
                "d, byte 11: -1 elements, expected 0 to 4",
            ),
        ] {
            assert_eq!(
                from_bytes::<Counts>(bytes, 1).unwrap_err().to_string(),
                said
            );
        }
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "bits", version = 1)]
    struct Map {
        size: i32,
        #[vmstate(bits = size, max = 100)]
        map: Bits,
    }

    #[test]
    fn bitmaps_are_as_long_as_their_count_says() {
        let mut value = Map {
            size: 65,
            map: Bits::new(65),
        };
        value.map.bits_mut().set(0, true);
        value.map.bits_mut().set(64, true);
        check(
            &value,
            &[0, 0, 0, 65, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
        );
        let error = from_bytes::<Map>(&[0, 0, 0, 101], 1).unwrap_err();
        assert!(
            matches!(error, LoadError::Count { count: 101, .. }),
            "{error}"
        );
        value.size = 64;
        assert!(matches!(
            to_bytes(&value),
            Err(SaveError::Count { field: "map", .. })
        ));
        // What stands beyond the end is ignored.
        let mut bytes = vec![0, 0, 0, 1];
        bytes.extend_from_slice(&[0xff; 8]);
        let loaded = from_bytes::<Map>(&bytes, 1).unwrap();
        assert_eq!(loaded.map.bits().count_ones(), 1);
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "queues", version = 1)]
    struct Queues {
        #[vmstate(queue, max = 2)]
        tail: Vec<Item>,
        #[vmstate(queue, max = 2, info = "qlist")]
        list: Vec<Item>,
    }

    #[test]
    fn queues_have_a_byte_before_each_element_and_one_behind_the_last() {
        let value = Queues {
            tail: vec![item(1), item(2)],
            list: vec![],
        };
        check(&value, &[1, 0, 1, 1, 0, 2, 0, 0]);
        assert_eq!(
            described(&value),
            r#"[{"name": "tail", "type": "qtailq", "vmsd_name": "item", "version": 1, "fields": [{"name": "value", "type": "uint16", "size": 2}], "size": 7}, {"name": "list", "type": "qlist", "size": 1}]"#
        );
    }

    #[test]
    fn a_queue_without_end_is_cut_at_its_bound() {
        let error = from_bytes::<Queues>(&[1; 64], 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tail, byte 7: 3 elements, expected 0 to 2"
        );
        let error = from_bytes::<Queues>(&[2, 0], 1).unwrap_err();
        assert!(matches!(error, LoadError::Invalid { .. }), "{error}");
        let long = Queues {
            tail: vec![item(1); 3],
            list: vec![],
        };
        assert!(matches!(
            to_bytes(&long),
            Err(SaveError::TooMany { len: 3, .. })
        ));
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord)]
    #[vmstate(name = "key", version = 1)]
    struct Key {
        low: u8,
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "trees", version = 1)]
    struct Trees {
        #[vmstate(tree, max = 3)]
        direct: BTreeMap<u64, Item>,
        #[vmstate(tree, max = 3)]
        nested: BTreeMap<Key, Item>,
    }

    #[test]
    fn trees_are_counted_and_have_direct_or_nested_keys() {
        let value = Trees {
            direct: [(7, item(1))].into(),
            nested: [(Key { low: 1 }, item(2)), (Key { low: 2 }, item(3))].into(),
        };
        let bytes = [
            0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 1, 0, 0, 0, 0, 2, 1, 1, 0, 2, 1, 2, 0, 3, 0,
        ];
        check(&value, &bytes);
        assert!(described(&value).contains(r#"{"name": "direct", "type": "gtree", "vmsd_name""#));
    }

    #[test]
    fn a_tree_must_have_the_nodes_it_says_and_each_key_once() {
        for (bytes, said) in [
            (
                &[0, 0, 0, 4][..],
                "direct, byte 4: 4 elements, expected 0 to 3",
            ),
            (
                &[0, 0, 0, 1, 0],
                "direct, byte 5: the tree has not the 1 nodes it should have",
            ),
            (
                &[0, 0, 0, 0, 1],
                "direct, byte 5: the tree has not the 0 nodes it should have",
            ),
            (
                &[0, 0, 0, 0, 0, 0, 0, 0, 2, 1, 5, 0, 1, 1, 5],
                "nested[1], byte 15: a key that was there before",
            ),
        ] {
            assert_eq!(from_bytes::<Trees>(bytes, 1).unwrap_err().to_string(), said);
        }
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "parts", version = 1)]
    struct Parts {
        #[vmstate(part = 1..3)]
        middle: [u8; 4],
        #[vmstate(part = 0..1)]
        first: [u16; 2],
        #[vmstate(array)]
        bytes: [u8; 2],
        #[vmstate(nested)]
        grid: [[Item; 2]; 2],
    }

    #[test]
    fn parts_of_arrays_travel_alone() {
        let value = Parts {
            middle: [0, 1, 2, 0],
            first: [3, 0],
            bytes: [4, 5],
            grid: [[item(6), item(7)], [item(8), item(9)]],
        };
        check(&value, b"\x01\x02\0\x03\x04\x05\0\x06\0\x07\0\x08\0\x09");
        let text = described(&value);
        for part in [
            r#"{"name": "middle", "type": "buffer", "size": 2}"#,
            r#"{"name": "first", "type": "uint16", "size": 2}"#,
            r#"{"name": "bytes", "array_len": 2, "type": "uint8", "size": 1}"#,
            r#"{"name": "grid", "array_len": 4, "type": "struct""#,
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "grown", version = 3, minimum_version = 1)]
    struct Grown {
        a: u8,
        #[vmstate(since = 2)]
        b: u8,
        #[vmstate(since = 3)]
        c: u8,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "holder", version = 1)]
    struct Holder {
        #[vmstate(nested, version = 2)]
        old: Grown,
        #[vmstate(nested, tmp)]
        tmp: Item,
    }

    #[test]
    fn a_struct_may_be_written_at_a_version_of_its_own() {
        let value = Holder {
            old: Grown { a: 1, b: 2, c: 0 },
            tmp: item(3),
        };
        check(&value, &[1, 2, 0, 3]);
        assert_eq!(
            described(&value),
            r#"[{"name": "old", "type": "vstruct", "vmsd_name": "grown", "version": 2, "fields": [{"name": "a", "type": "uint8", "size": 1}, {"name": "b", "type": "uint8", "size": 1}], "size": 2}, {"name": "tmp", "type": "tmp", "vmsd_name": "item", "version": 1, "fields": [{"name": "value", "type": "uint16", "size": 2}], "size": 2}]"#
        );
    }

    #[test]
    fn a_hand_written_state_has_its_current_version_only() {
        #[derive(Debug)]
        struct Hand;
        impl VmState for Hand {
            const NAME: &'static str = "hand";
            const VERSION: u32 = 2;
            const MINIMUM_VERSION: u32 = 1;
            fn save(&self, out: &mut Writer) {
                out.put(&[1]);
            }
            fn load(input: &mut Reader<'_>, _version: u32) -> Result<Self, LoadError> {
                input.take(1).map(|_| Self)
            }
        }
        let mut out = Writer::new();
        out.nested_at("hand", &Hand, 1);
        assert_eq!(
            out.finish().unwrap_err().to_string(),
            "'hand' cannot be written at version 1"
        );
    }

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "types", version = 1)]
    struct Types {
        double: CpuDouble,
        float: f64,
        bytes: ByteArray<4>,
        capability: Capability,
        #[vmstate(equal = 3u16)]
        local: u16,
        #[vmstate(info = "int32 le")]
        version_id: i32,
        #[vmstate(name = "unused")]
        gap: Unused<2>,
        #[vmstate(name = "unused")]
        other_gap: Unused<1>,
    }

    fn types() -> (Types, Vec<u8>) {
        let value = Types {
            double: CpuDouble(0x0102_0304_0506_0708),
            float: 1.0,
            bytes: ByteArray::new(vec![9, 8]).unwrap(),
            capability: Capability::new("events").unwrap(),
            local: 3,
            version_id: 2,
            gap: Unused,
            other_gap: Unused,
        };
        let mut bytes = vec![1, 2, 3, 4, 5, 6, 7, 8, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0];
        bytes.extend_from_slice(b"\0\0\0\x02\x09\x08\x06events\0\x03\0\0\0\x02\0\0\0");
        (value, bytes)
    }

    #[test]
    fn the_rest_of_the_types() {
        let (value, bytes) = types();
        check(&value, &bytes);
        let text = described(&value);
        for part in [
            r#""type": "CPU_Double_U", "size": 8"#,
            r#""type": "float64", "size": 8"#,
            r#""type": "GByteArray", "size": 6"#,
            r#""type": "capability", "size": 7"#,
            r#""type": "uint16 equal", "size": 2"#,
            r#""type": "int32 le", "size": 4"#,
            r#"{"name": "unused[0]", "type": "unused_buffer", "size": 2}"#,
            r#"{"name": "unused[1]", "type": "unused_buffer", "size": 1}"#,
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(ByteArray::<1>::new(vec![0; 2]), None);
        assert_eq!(Capability::new(&"c".repeat(256)), None);
    }

    #[test]
    fn a_value_that_must_be_the_receivers_is_refused_if_it_is_not() {
        let (_, mut bytes) = types();
        let at = 16 + 6 + 7;
        bytes[at + 1] = 4;
        assert_eq!(
            from_bytes::<Types>(&bytes, 1).unwrap_err().to_string(),
            format!("local, byte {}: 4 received, 3 expected", at + 2)
        );
        bytes[19] = 5;
        assert_eq!(
            from_bytes::<Types>(&bytes, 1).unwrap_err().to_string(),
            "bytes, byte 20: 5 elements, expected 0 to 4"
        );
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "hooks", version = 2, minimum_version = 1,
        pre_save = Hooks::normalised, pre_load = Hooks::accept, post_load = Hooks::complete)]
    struct Hooks {
        value: u8,
        #[vmstate(skip)]
        derived: u32,
    }

    impl Hooks {
        fn normalised(&self) -> Result<Self, &'static str> {
            if self.value == 0xff {
                return Err("busy");
            }
            Ok(Self {
                value: self.value & 0x0f,
                ..self.clone()
            })
        }

        fn accept(version: u32) -> Result<(), &'static str> {
            if version == 1 {
                Err("not any more")
            } else {
                Ok(())
            }
        }

        fn complete(&mut self, version: u32) -> Result<(), &'static str> {
            self.derived = u32::from(self.value) * version;
            if self.value == 9 { Err("nine") } else { Ok(()) }
        }
    }

    #[test]
    fn hooks_run_before_saving_and_around_loading() {
        let value = Hooks {
            value: 0x35,
            derived: 0,
        };
        assert_eq!(to_bytes(&value).unwrap(), [5]);
        let loaded = from_bytes::<Hooks>(&[5], 2).unwrap();
        assert_eq!((loaded.value, loaded.derived), (5, 10));
        let busy = Hooks {
            value: 0xff,
            derived: 0,
        };
        assert_eq!(
            to_bytes(&busy).unwrap_err().to_string(),
            "pre-save of 'hooks' failed: busy"
        );
        let error = from_bytes::<Hooks>(&[5], 1).unwrap_err();
        assert_eq!(error.to_string(), "byte 0: not any more");
        let error = from_bytes::<Hooks>(&[9], 2).unwrap_err();
        assert_eq!(error.to_string(), "byte 1: nine");
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "sparse", version = 1)]
    struct Sparse {
        mode: u8,
        #[vmstate(exists = *mode == 1)]
        words: [u16; 2],
        #[vmstate(nested)]
        items: [WithExtra; 2],
        #[vmstate(name = "env.regs")]
        regs: [u32; 1],
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "extra", version = 1)]
    struct WithExtra {
        a: u8,
        #[vmstate(subsection)]
        more: Option<More>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "extra/more", version = 1)]
    struct More {
        b: u8,
    }

    #[test]
    fn elements_that_may_differ_are_described_each() {
        let value = Sparse {
            mode: 1,
            ..Sparse::default()
        };
        let word = r#"{"name": "words", "type": "uint16", "size": 2}"#;
        let element = r#"{"name": "items", "type": "struct", "struct": {"vmsd_name": "extra", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}]}, "size": 1}"#;
        assert_eq!(
            described(&value),
            format!(
                r#"[{{"name": "mode", "type": "uint8", "size": 1}}, {word}, {word}, {element}, {element}, {{"name": "env.regs", "type": "uint32", "size": 4}}]"#
            )
        );
    }

    /// A description that contains itself.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "rec", version = 1)]
    struct Recursive {
        count: u8,
        #[vmstate(nested, len = count, max = 2)]
        inner: Vec<Recursive>,
    }

    #[test]
    fn a_dump_has_qemus_shape() {
        assert_eq!(
            Dump::new("m")
                .section::<Grown>("dev")
                .section::<Sparse>("sparse")
                .to_json(),
            concat!(
                r#"{"vmschkmachine": {"Name": "m"}, "#,
                r#""dev": {"Name": "dev", "version_id": 3, "minimum_version_id": 1, "Description": "#,
                r#"{"name": "grown", "version_id": 3, "minimum_version_id": 1, "Fields": ["#,
                r#"{"field": "a", "version_id": 0, "field_exists": false, "size": 1}, "#,
                r#"{"field": "b", "version_id": 2, "field_exists": false, "size": 1}, "#,
                r#"{"field": "c", "version_id": 3, "field_exists": false, "size": 1}]}}, "#,
                r#""sparse": {"Name": "sparse", "version_id": 1, "minimum_version_id": 1, "Description": "#,
                r#"{"name": "sparse", "version_id": 1, "minimum_version_id": 1, "Fields": ["#,
                r#"{"field": "mode", "version_id": 0, "field_exists": false, "size": 1}, "#,
                r#"{"field": "words", "version_id": 0, "field_exists": true, "num": 2, "size": 2}, "#,
                r#"{"field": "items", "version_id": 0, "field_exists": false, "num": 2, "size": 1, "#,
                r#""Description": {"name": "extra", "version_id": 1, "minimum_version_id": 1, "#,
                r#""Fields": [{"field": "a", "version_id": 0, "field_exists": false, "size": 1}], "#,
                r#""Subsections": [{"name": "extra/more", "version_id": 1, "minimum_version_id": 1, "#,
                r#""Fields": [{"field": "b", "version_id": 0, "field_exists": false, "size": 1}]}]}}, "#,
                r#"{"field": "env.regs", "version_id": 0, "field_exists": false, "num": 1, "size": 4}]}}}"#,
            )
        );
        let recursive = Dump::new("m").section::<Recursive>("r").to_json();
        assert_eq!(recursive.matches("\"rec\"").count(), 1, "{recursive}");
    }
}
