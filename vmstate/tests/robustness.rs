//! Bytes from a hostile peer give a value or an error, and take no memory that they do not fill.
#![cfg(feature = "derive")]

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmstate::{Bitmap, LoadError, Reader, Timer, VmState, from_bytes, to_bytes};

    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(
        name = "all",
        version = 5,
        minimum_version = 3,
        validate = "All::check"
    )]
    struct All {
        flag: bool,
        small: i8,
        wide: i64,
        buffer: [u8; 5],
        words: [i32; 3],
        timer: Timer,
        bitmap: Bitmap<70>,
        count: u16,
        #[vmstate(len = "count", max = 20)]
        bytes: Vec<u8>,
        #[vmstate(nested, len = "count", max = 20)]
        parts: Vec<Part>,
        #[vmstate(nested, since = 4)]
        pair: [Part; 2],
        #[vmstate(since = 5, exists = "*flag", default = "u32::from(*count)")]
        late: u32,
        #[vmstate(subsection)]
        extra: Option<Extra>,
    }

    impl All {
        fn check(&self) -> Result<(), &'static str> {
            match self.small {
                -128 => Err("small is too small"),
                _ => Ok(()),
            }
        }
    }

    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "part", version = 1)]
    struct Part {
        value: u16,
        #[vmstate(subsection)]
        more: Option<More>,
    }

    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "part/more", version = 1)]
    struct More {
        value: u8,
    }

    #[derive(VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "all/extra", version = 1)]
    struct Extra {
        words: [u64; 4],
        #[vmstate(nested)]
        part: Part,
    }

    fn part() -> impl Strategy<Value = Part> {
        // 5 is the byte that announces a subsection.
        let value = prop_oneof![Just(0x0505), any::<u16>()];
        (value, any::<Option<u8>>()).prop_map(|(value, more)| Part {
            value,
            more: more.map(|value| More { value }),
        })
    }

    prop_compose! {
        fn all()(
            flag: bool,
            small in -127i8..,
            wide: i64,
            buffer: [u8; 5],
            words: [i32; 3],
            timer: u64,
            bits: [u64; 2],
            list in prop::collection::vec((any::<u8>(), part()), 0..=20),
            pair in [part(), part()],
            late: u32,
            extra in prop::option::of((any::<[u64; 4]>(), part())),
        ) -> All {
            let mut bitmap = Bitmap::new();
            for (i, mut bit) in bitmap.bits_mut().iter_mut().enumerate() {
                *bit = bits[i / 64] >> (i % 64) & 1 == 1;
            }
            let (bytes, parts): (Vec<_>, Vec<_>) = list.into_iter().unzip();
            let count = u16::try_from(parts.len()).unwrap();
            All {
                flag,
                small,
                wide,
                buffer,
                words,
                timer: Timer::at(timer),
                bitmap,
                count,
                bytes,
                parts,
                pair,
                late: if flag { late } else { count.into() },
                extra: extra.map(|(words, part)| Extra { words, part }),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_saved_loads_as_itself(state in all()) {
            let bytes = to_bytes(&state).unwrap();
            prop_assert_eq!(from_bytes::<All>(&bytes, 5).unwrap(), state);
        }

        #[test]
        fn no_part_of_a_stream_is_taken_for_the_whole(state in all()) {
            let mut bytes = to_bytes(&state).unwrap();
            bytes.push(0x7e);
            for len in 0..bytes.len() {
                let error = Reader::partial(&bytes[..len]).description::<All>(5).unwrap_err();
                prop_assert!(error.is_truncated(), "{}: {}", len, error);
            }
            prop_assert_eq!(Reader::partial(&bytes).description::<All>(5).unwrap(), state);
        }

        #[test]
        fn damaged_bytes_give_a_value_that_can_be_saved_or_an_error(
            state in all(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            end in any::<prop::sample::Index>(),
            cut: bool,
            version in 3u32..=5,
        ) {
            let mut bytes = to_bytes(&state).unwrap();
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cut {
                bytes.truncate(end.index(bytes.len()));
            }
            for mut input in [Reader::complete(&bytes), Reader::partial(&bytes)] {
                if let Ok(state) = input.description::<All>(version) {
                    let again = to_bytes(&state).unwrap();
                    prop_assert_eq!(from_bytes::<All>(&again, 5).unwrap(), state);
                }
            }
        }

        #[test]
        fn noise_gives_a_value_or_an_error(
            bytes in prop::collection::vec(prop_oneof![3 => 0u8..8, 1 => any::<u8>()], 0..300),
        ) {
            if let Ok(state) = from_bytes::<All>(&bytes, 5) {
                to_bytes(&state).unwrap();
            }
        }
    }

    /// Lists that claim more than any memory.
    #[derive(VmState, Debug)]
    #[vmstate(name = "huge", version = 1)]
    struct Huge {
        signed: i32,
        #[vmstate(len = signed, max = 10)]
        few: Vec<u8>,
        count: u64,
        #[vmstate(len = "count", max = usize::MAX)]
        words: Vec<u64>,
    }

    #[derive(VmState, Debug)]
    #[vmstate(name = "huge", version = 1)]
    struct HugeStructs {
        count: u64,
        #[vmstate(nested, len = "count", max = usize::MAX)]
        parts: Vec<Part>,
    }

    #[test]
    fn a_count_alone_takes_no_memory() {
        for count in [1 << 40, u64::MAX >> 1, u64::MAX] {
            let bytes = [&[0; 4][..], &count.to_be_bytes(), &[0; 100]].concat();
            let error = from_bytes::<Huge>(&bytes, 1).unwrap_err();
            assert!(error.is_truncated(), "{error}");
            let error = from_bytes::<HugeStructs>(&bytes[4..], 1).unwrap_err();
            assert!(error.is_truncated(), "{error}");
        }
    }

    #[test]
    fn a_negative_count_is_refused() {
        let error = from_bytes::<Huge>(&[0xff; 64], 1).unwrap_err();
        assert!(matches!(
            error,
            LoadError::Count {
                count: -1,
                max: 10,
                ..
            }
        ));
    }

    #[test]
    fn a_bitmap_is_words_with_bit_0_first_and_nothing_beyond_its_end() {
        #[derive(VmState, Debug, PartialEq)]
        #[vmstate(name = "bits", version = 1)]
        struct Bits {
            bits: Bitmap<70>,
        }
        let mut bits = Bitmap::new();
        bits.bits_mut().set(0, true);
        bits.bits_mut().set(63, true);
        bits.bits_mut().set(69, true);
        let state = Bits { bits };
        let mut bytes = to_bytes(&state).unwrap();
        assert_eq!(
            bytes,
            [0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x20]
        );
        bytes[8] = 0xff;
        let loaded = from_bytes::<Bits>(&bytes, 1).unwrap();
        assert_eq!(loaded, state);
        bytes[8] = 0;
        assert_eq!(to_bytes(&loaded).unwrap(), bytes);
    }

    #[test]
    fn a_timer_that_is_not_armed_is_all_ones() {
        #[derive(VmState, Debug)]
        #[vmstate(name = "t", version = 1)]
        struct Timers {
            timers: [Timer; 2],
        }
        let timers = [Timer::NOT_ARMED, Timer::at(3)];
        let bytes = to_bytes(&Timers { timers }).unwrap();
        assert_eq!(bytes[..8], [0xff; 8]);
        assert_eq!(bytes[8..], [0, 0, 0, 0, 0, 0, 0, 3]);
        let loaded = from_bytes::<Timers>(&bytes, 1).unwrap();
        assert_eq!(loaded.timers.map(Timer::expiry), [None, Some(3)]);
    }
}
