//! The derive writes and reads QEMU's bytes.
#![cfg(feature = "derive")]

#[cfg(test)]
mod tests {
    use vmstate::{
        Field, FieldType, LoadError, Reader, SaveError, Timer, Unused, VmState, Writer, from_bytes,
        to_bytes,
    };

    /// QEMU's `timer` section.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "timer", version = 2)]
    struct CpuTimers {
        cpu_ticks_offset: i64,
        unused: Unused<8>,
        cpu_clock_offset: i64,
    }

    #[test]
    fn the_timer_section_is_24_bytes() {
        let timers = CpuTimers {
            cpu_ticks_offset: -2,
            unused: Unused,
            cpu_clock_offset: 0x0102_0304_0506_0708,
        };
        let bytes = to_bytes(&timers).unwrap();
        assert_eq!(
            bytes,
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
                5, 6, 7, 8
            ]
        );
        assert_eq!(from_bytes::<CpuTimers>(&bytes, 2).unwrap(), timers);
    }

    #[test]
    fn what_stands_in_an_unused_gap_does_not_matter() {
        let mut bytes = to_bytes(&CpuTimers::default()).unwrap();
        bytes[8..16].fill(0xaa);
        assert_eq!(
            from_bytes::<CpuTimers>(&bytes, 2).unwrap(),
            CpuTimers::default()
        );
    }

    /// QEMU's `globalstate` section.
    #[derive(VmState, Debug, Clone, PartialEq)]
    #[vmstate(name = "globalstate", version = 1, validate = GlobalState::check)]
    struct GlobalState {
        size: u32,
        runstate: [u8; 32],
        has_vm_was_suspended: u8,
        vm_was_suspended: u8,
        unused: Unused<66>,
    }

    impl GlobalState {
        fn check(&self) -> Result<(), String> {
            match self.runstate.get(self.size as usize - 1) {
                Some(0) => Ok(()),
                _ => Err(format!("the run state is not {} bytes long", self.size)),
            }
        }
    }

    fn running() -> GlobalState {
        let mut runstate = [0; 32];
        runstate[..7].copy_from_slice(b"running");
        GlobalState {
            size: 8,
            runstate,
            has_vm_was_suspended: 1,
            vm_was_suspended: 0,
            unused: Unused,
        }
    }

    #[test]
    fn the_globalstate_section_is_104_bytes() {
        let bytes = to_bytes(&running()).unwrap();
        assert_eq!(bytes.len(), 104);
        assert_eq!(&bytes[..11], b"\0\0\0\x08running");
        assert_eq!(&bytes[36..39], [1, 0, 0]);
        assert_eq!(from_bytes::<GlobalState>(&bytes, 1).unwrap(), running());
    }

    #[test]
    fn a_state_that_its_description_refuses_is_not_loaded() {
        let mut bytes = to_bytes(&running()).unwrap();
        bytes[3] = 3;
        let error = from_bytes::<GlobalState>(&bytes, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "byte 104: the run state is not 3 bytes long"
        );
    }

    /// The shape of an 8250: old streams lack fields, rare state is in subsections.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "serial", version = 3, minimum_version = 2)]
    struct Serial {
        divider: u16,
        rbr: u8,
        #[vmstate(since = 3, default = "0x41")]
        fcr: u8,
        #[vmstate(skip)]
        runtime: Option<String>,
        #[vmstate(subsection)]
        timeout: Option<Timeout>,
        #[vmstate(subsection)]
        poll: Option<Poll>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "serial/timeout_ipending", version = 1)]
    struct Timeout {
        pending: i32,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "serial/poll", version = 2, minimum_version = 2)]
    struct Poll {
        poll_msl: i32,
        timer: Timer,
        #[vmstate(subsection)]
        deep: Option<Deep>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "serial/poll/deep", version = 1)]
    struct Deep {
        on: bool,
    }

    fn serial() -> Serial {
        Serial {
            divider: 12,
            rbr: b'x',
            fcr: 0xc1,
            ..Serial::default()
        }
    }

    const POLL: &[u8] = b"\x05\x0bserial/poll\0\0\0\x02\0\0\0\x07\0\0\0\0\0\0\0\x09";
    const DEEP: &[u8] = b"\x05\x10serial/poll/deep\0\0\0\x01\x01";
    const TIMEOUT: &[u8] = b"\x05\x17serial/timeout_ipending\0\0\0\x01\0\0\0\x01";

    fn full() -> Serial {
        Serial {
            timeout: Some(Timeout { pending: 1 }),
            poll: Some(Poll {
                poll_msl: 7,
                timer: Timer::at(9),
                deep: Some(Deep { on: true }),
            }),
            ..serial()
        }
    }

    #[test]
    fn needed_subsections_follow_the_fields_in_declaration_order() {
        assert_eq!(to_bytes(&serial()).unwrap(), [0, 12, b'x', 0xc1]);
        let bytes = to_bytes(&full()).unwrap();
        assert_eq!(bytes, [&[0, 12, b'x', 0xc1], TIMEOUT, POLL, DEEP].concat());
        assert_eq!(from_bytes::<Serial>(&bytes, 3).unwrap(), full());
    }

    #[test]
    fn subsections_may_come_in_any_order_and_again() {
        let bytes = [&[0, 12, b'x', 0xc1], POLL, TIMEOUT, POLL, DEEP].concat();
        assert_eq!(from_bytes::<Serial>(&bytes, 3).unwrap(), full());
    }

    #[test]
    fn an_older_stream_gets_the_default_of_newer_fields() {
        let old = from_bytes::<Serial>(&[0, 12, b'x'], 2).unwrap();
        assert_eq!(old.fcr, 0x41);
        assert_eq!(old.divider, 12);
    }

    #[test]
    fn versions_out_of_range_are_refused_with_both_numbers() {
        let too_new = from_bytes::<Serial>(&[0; 4], 4).unwrap_err();
        assert_eq!(
            too_new.to_string(),
            "byte 0: unsupported version 4 for 'serial', the newest known is 3"
        );
        let too_old = from_bytes::<Serial>(&[0; 4], 1).unwrap_err();
        assert_eq!(
            too_old.to_string(),
            "byte 0: version 1 of 'serial' is too old, the oldest readable is 2"
        );
        let mut bytes = [&[0, 12, b'x', 0xc1], POLL].concat();
        bytes[4 + 2 + 11 + 3] = 1;
        assert!(matches!(
            from_bytes::<Serial>(&bytes, 3),
            Err(LoadError::VersionTooOld {
                name: "serial/poll",
                version: 1,
                oldest: 2,
                ..
            })
        ));
    }

    #[test]
    fn an_unknown_subsection_of_ours_is_an_error() {
        let bytes = [&[0, 12, b'x', 0xc1][..], b"\x05\x0aserial/new\0\0\0\x01"].concat();
        let error = from_bytes::<Serial>(&bytes, 3).unwrap_err();
        assert_eq!(
            error.to_string(),
            "byte 20: subsection 'serial/new' of 'serial' does not exist"
        );
    }

    #[test]
    fn a_subsection_of_somebody_else_is_left_alone() {
        for follower in [
            &b"\x05\x09parent/it\0\0\0\x01"[..],
            b"\x05\x06serial\0\0\0\x01",
        ] {
            let bytes = [&[0, 12, b'x', 0xc1][..], follower].concat();
            for mut input in [Reader::complete(&bytes), Reader::partial(&bytes)] {
                assert_eq!(input.description::<Serial>(3).unwrap(), serial());
                assert_eq!(input.remaining(), follower.len());
            }
        }
    }

    #[test]
    fn a_subsection_that_is_cut_off_is_truncated_once_its_name_is_ours() {
        let bytes = [&[0, 12, b'x', 0xc1], TIMEOUT].concat();
        for end in 4 + 2 + "serial".len()..bytes.len() {
            let error = from_bytes::<Serial>(&bytes[..end], 3).unwrap_err();
            assert!(error.is_truncated(), "{end}: {error}");
        }
    }

    #[test]
    fn a_stream_that_goes_on_is_truncated_until_the_byte_after_the_body() {
        let mut bytes = to_bytes(&full()).unwrap();
        let body = bytes.len();
        bytes.extend_from_slice(&[0x7e, 0, 0, 0, 1]);
        for end in 0..=body {
            let error = Reader::partial(&bytes[..end])
                .description::<Serial>(3)
                .unwrap_err();
            assert!(error.is_truncated(), "{end}: {error}");
        }
        let mut input = Reader::partial(&bytes[..=body]);
        assert_eq!(input.description::<Serial>(3).unwrap(), full());
        assert_eq!(input.offset(), body);
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "vcpu", version = 1)]
    struct Vcpu {
        regs: [u32; 2],
        #[vmstate(subsection)]
        msr: Option<Msr>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "vcpu/msr", version = 1)]
    struct Msr {
        value: u64,
    }

    /// A counted list of structures after arrays of both kinds.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "board", version = 1)]
    struct Board {
        flags: [bool; 3],
        grid: [[u16; 2]; 2],
        #[vmstate(nested)]
        first: Vcpu,
        #[vmstate(nested)]
        vcpus: [Vcpu; 2],
        count: u8,
        #[vmstate(len = "count", max = 4)]
        levels: Vec<i16>,
        #[vmstate(nested, len = count, max = 4)]
        entries: Vec<Vcpu>,
        mode: u8,
        #[vmstate(exists = "*mode == 1 && version >= 1")]
        extra: u32,
    }

    fn board() -> Board {
        let vcpu = |n| Vcpu {
            regs: [n, n + 1],
            msr: None,
        };
        Board {
            flags: [true, false, true],
            grid: [[1, 2], [3, 4]],
            first: Vcpu {
                msr: Some(Msr { value: 0xabcd }),
                ..vcpu(16)
            },
            vcpus: [vcpu(32), vcpu(48)],
            count: 1,
            levels: vec![-1],
            entries: vec![vcpu(64)],
            mode: 1,
            extra: 0xffff_0000,
        }
    }

    const BOARD: &[u8] = b"\x01\0\x01\
        \0\x01\0\x02\0\x03\0\x04\
        \0\0\0\x10\0\0\0\x11\
        \x05\x08vcpu/msr\0\0\0\x01\0\0\0\0\0\0\xab\xcd\
        \0\0\0\x20\0\0\0\x21\
        \0\0\0\x30\0\0\0\x31\
        \x01\
        \xff\xff\
        \0\0\0\x40\0\0\0\x41\
        \x01\
        \xff\xff\0\0";

    #[test]
    fn structures_and_lists_stand_in_place_with_their_subsections_behind_them() {
        assert_eq!(to_bytes(&board()).unwrap(), BOARD);
        assert_eq!(from_bytes::<Board>(BOARD, 1).unwrap(), board());
    }

    #[test]
    fn a_field_that_does_not_exist_has_no_bytes() {
        let without = Board {
            mode: 0,
            extra: 0,
            ..board()
        };
        let bytes = to_bytes(&without).unwrap();
        assert_eq!(bytes.len(), BOARD.len() - 4);
        assert_eq!(from_bytes::<Board>(&bytes, 1).unwrap(), without);
    }

    #[test]
    fn a_list_longer_than_its_bound_is_refused_by_both_sides() {
        let mut bytes = BOARD.to_vec();
        let count = bytes.len() - (1 + 2 + 8 + 1 + 4);
        assert_eq!(bytes[count], 1);
        bytes[count] = 5;
        assert_eq!(
            from_bytes::<Board>(&bytes, 1).unwrap_err().to_string(),
            format!("levels, byte {}: 5 elements, expected 0 to 4", count + 1)
        );
        let long = Board {
            count: 5,
            levels: vec![0; 5],
            ..board()
        };
        assert_eq!(
            to_bytes(&long).unwrap_err(),
            SaveError::TooMany {
                field: "levels",
                len: 5,
                max: 4
            }
        );
    }

    #[test]
    fn a_list_that_is_not_as_long_as_its_count_is_never_written() {
        let wrong = Board {
            count: 2,
            ..board()
        };
        assert_eq!(
            to_bytes(&wrong).unwrap_err(),
            SaveError::Count {
                field: "levels",
                len: 1,
                count: 2
            }
        );
    }

    #[test]
    fn an_error_names_the_way_to_the_field_and_the_offset() {
        let at = 3 + 8 + 8 + 22 + 8 + 4;
        let error = from_bytes::<Board>(&BOARD[..at], 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "vcpus[1].regs, byte 49: 8 bytes wanted, 4 there"
        );
        assert!(error.is_truncated());
    }

    #[test]
    fn bytes_after_the_body_are_an_error_when_there_must_be_none() {
        let bytes = [BOARD, &[0]].concat();
        assert_eq!(
            from_bytes::<Board>(&bytes, 1).unwrap_err().to_string(),
            format!("byte {}: 1 bytes too many", BOARD.len())
        );
    }

    /// Names that the generated code uses itself, and one that needs `r#`.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "names", version = 2, minimum_version = 1)]
    struct Names {
        version: u8,
        input: u8,
        out: u8,
        state: u8,
        r#type: u8,
        #[vmstate(since = 2, exists = *version == 9 && *r#type == 3, default = *out)]
        late: u8,
        #[vmstate(skip, default = *input)]
        copy: u8,
    }

    #[test]
    fn a_field_may_have_any_name_and_expressions_see_the_fields_before() {
        let names = from_bytes::<Names>(&[9, 2, 4, 5, 3, 6], 2).unwrap();
        assert_eq!((names.late, names.copy), (6, 2));
        assert_eq!(to_bytes(&names).unwrap(), [9, 2, 4, 5, 3, 6]);
        let names = from_bytes::<Names>(&[9, 2, 4, 5, 3], 1).unwrap();
        assert_eq!(names.late, 4);
        let names = from_bytes::<Names>(&[8, 2, 4, 5, 3], 2).unwrap();
        assert_eq!(names.late, 4);
        let short = from_bytes::<Names>(&[9, 2, 4, 5], 2).unwrap_err();
        assert_eq!(short.to_string(), "type, byte 4: 1 bytes wanted, 0 there");
    }

    /// An enumeration of a device is a field of its own.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Mode {
        Off,
        On,
    }

    impl Field for Mode {
        fn field_type() -> FieldType {
            u8::field_type()
        }

        fn save(&self, out: &mut Writer) {
            out.put(&[match self {
                Self::Off => 0,
                Self::On => 1,
            }]);
        }

        fn load(input: &mut Reader<'_>) -> Result<Self, LoadError> {
            match input.take_array()? {
                [0] => Ok(Self::Off),
                [1] => Ok(Self::On),
                [other] => Err(input.invalid(format_args!("mode {other}, expected 0 or 1"))),
            }
        }
    }

    #[test]
    fn a_field_of_the_users_own_may_refuse_a_value() {
        #[derive(VmState, Debug, PartialEq)]
        #[vmstate(name = "modes", version = 1)]
        struct Modes {
            modes: [Mode; 3],
        }
        let modes = Modes {
            modes: [Mode::On, Mode::Off, Mode::On],
        };
        assert_eq!(to_bytes(&modes).unwrap(), [1, 0, 1]);
        assert_eq!(from_bytes::<Modes>(&[1, 0, 1], 1).unwrap(), modes);
        assert_eq!(
            from_bytes::<Modes>(&[1, 7, 1], 1).unwrap_err().to_string(),
            "modes[1], byte 2: mode 7, expected 0 or 1"
        );
    }

    /// A description may contain itself; the other side cannot use that against the stack.
    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "tree", version = 1)]
    struct Tree {
        count: u8,
        #[vmstate(nested, len = "count", max = 255)]
        children: Vec<Tree>,
    }

    #[test]
    fn descriptions_inside_descriptions_have_a_limit() {
        let error = from_bytes::<Tree>(&[1; 4096], 1).unwrap_err();
        assert!(
            matches!(error, LoadError::TooDeep { limit: 64, .. }),
            "{error}"
        );
    }
}
