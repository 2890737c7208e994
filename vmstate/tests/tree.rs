//! A tree loads all of its devices or none, and never one that was not reset.
#![cfg(feature = "derive")]

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vmstate::{
        Device, DeviceError, DeviceTree, LoadError, Priority, SavedSection, StagedSection,
        TreeError, VmState,
    };

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "mock", version = 2)]
    struct MockState {
        value: u32,
        #[vmstate(nested)]
        ports: [Port; 2],
        #[vmstate(nested)]
        lines: [Port; 2],
        buffer: [u8; 4],
        #[vmstate(subsection)]
        rare: Option<Rare>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "port", version = 1)]
    struct Port {
        regs: [u16; 2],
        #[vmstate(subsection)]
        rare: Option<PortRare>,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "port/rare", version = 1)]
    struct PortRare {
        on: bool,
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "mock/rare", version = 1)]
    struct Rare {
        flag: bool,
    }

    type Log = Arc<Mutex<Vec<String>>>;

    struct Mock {
        name: &'static str,
        state: MockState,
        refuses: Option<u32>,
        fails: Option<&'static str>,
        log: Log,
    }

    impl Mock {
        fn new(name: &'static str, value: u32, log: &Log) -> Self {
            Self {
                name,
                state: MockState {
                    value,
                    ..MockState::default()
                },
                refuses: None,
                fails: None,
                log: Arc::clone(log),
            }
        }

        fn note(&self, what: &'static str) -> Result<(), DeviceError> {
            self.log
                .lock()
                .unwrap()
                .push(format!("{what} {}", self.name));
            if self.fails == Some(what) {
                return Err(format!("{what} does not work").into());
            }
            Ok(())
        }
    }

    impl Device for Mock {
        type State = MockState;

        fn save(&mut self) -> Result<MockState, DeviceError> {
            self.note("save")?;
            Ok(self.state.clone())
        }

        fn check(&self, state: &MockState) -> Result<(), DeviceError> {
            self.note("check")?;
            if self.refuses == Some(state.value) {
                return Err("cannot have this value".into());
            }
            Ok(())
        }

        fn reset(&mut self) -> Result<(), DeviceError> {
            self.note("reset")?;
            self.state = MockState::default();
            Ok(())
        }

        fn install(&mut self, state: MockState) -> Result<(), DeviceError> {
            self.note("install")?;
            self.state = state;
            Ok(())
        }
    }

    struct Board {
        tree: DeviceTree,
        disk: Arc<Mutex<Mock>>,
        apic: Arc<Mutex<Mock>>,
        log: Log,
    }

    /// `disk` is registered first, `apic` comes first in a stream.
    fn board(disk: u32, apic: u32) -> Board {
        let log = Log::default();
        let disk = Arc::new(Mutex::new(Mock::new("disk", disk, &log)));
        let apic = Arc::new(Mutex::new(Mock::new("apic", apic, &log)));
        let mut tree = DeviceTree::new();
        tree.register("disk", 0, Priority::Default, Arc::clone(&disk))
            .unwrap();
        tree.register("apic", 1, Priority::Apic, Arc::clone(&apic))
            .unwrap();
        Board {
            tree,
            disk,
            apic,
            log,
        }
    }

    impl Board {
        fn values(&self) -> (u32, u32) {
            (
                self.disk.lock().unwrap().state.value,
                self.apic.lock().unwrap().state.value,
            )
        }

        fn log(&self) -> Vec<String> {
            std::mem::take(&mut self.log.lock().unwrap())
        }

        fn parse(&self, sections: &[SavedSection]) -> Vec<StagedSection> {
            sections
                .iter()
                .map(|s| {
                    let parsed = self
                        .tree
                        .parse_section(&s.idstr, s.instance_id, s.version, &s.body, true)
                        .unwrap();
                    assert_eq!(parsed.consumed, s.body.len());
                    parsed.section
                })
                .collect()
        }
    }

    #[test]
    fn sections_are_saved_by_priority_and_then_as_registered() {
        let log = Log::default();
        let mut tree = DeviceTree::new();
        for (name, priority) in [
            ("low", Priority::Low),
            ("a", Priority::Default),
            ("bus", Priority::PciBus),
            ("b", Priority::Default),
            ("apic", Priority::Apic),
            ("gic", Priority::GicV3),
        ] {
            tree.register(name, 0, priority, Mock::new(name, 0, &log))
                .unwrap();
        }
        let order: Vec<_> = tree
            .save_all()
            .unwrap()
            .into_iter()
            .map(|s| s.idstr)
            .collect();
        assert_eq!(order, ["gic", "apic", "bus", "a", "b", "low"]);
    }

    #[test]
    fn every_device_is_reset_before_any_is_given_state() {
        let mut source = board(1, 2);
        let mut target = board(30, 40);
        let saved = source.tree.save_all().unwrap();
        let staged = target.tree.stage(target.parse(&saved)).unwrap();
        assert_eq!(target.values(), (30, 40));
        assert_eq!(target.log(), ["check disk", "check apic"]);
        target.tree.reset_then_install(staged).unwrap();
        assert_eq!(
            target.log(),
            ["reset apic", "reset disk", "install apic", "install disk"]
        );
        assert_eq!(target.values(), (1, 2));
        assert_eq!(target.tree.save_all().unwrap(), saved);
    }

    #[test]
    fn a_device_that_refuses_its_state_leaves_all_untouched() {
        let mut source = board(1, 2);
        let target = board(30, 40);
        target.apic.lock().unwrap().refuses = Some(2);
        let saved = source.tree.save_all().unwrap();
        let error = target.tree.stage(target.parse(&saved)).unwrap_err();
        assert_eq!(error.to_string(), "device 'apic' 1 cannot take this state");
        let cause = std::error::Error::source(&error).unwrap();
        assert_eq!(cause.to_string(), "cannot have this value");
        assert_eq!(target.values(), (30, 40));
        assert_eq!(target.log(), ["check disk", "check apic"]);
    }

    #[test]
    fn a_missing_or_repeated_section_is_an_error() {
        let mut board = board(1, 2);
        let saved = board.tree.save_all().unwrap();
        let missing = board.tree.stage(board.parse(&saved[..1])).unwrap_err();
        assert_eq!(missing.to_string(), "section 'disk' 0 is missing");
        let twice = [&saved[..], &saved[..1]].concat();
        let repeated = board.tree.stage(board.parse(&twice)).unwrap_err();
        assert_eq!(repeated.to_string(), "section 'apic' 1 is there twice");
        assert_eq!(board.values(), (1, 2));
    }

    #[test]
    fn state_of_another_tree_is_refused_before_anything_is_reset() {
        let mut one = board(1, 2);
        let mut other = board(3, 4);
        let saved = one.tree.save_all().unwrap();
        assert!(matches!(
            other.tree.stage(one.parse(&saved)),
            Err(TreeError::Foreign)
        ));
        let staged = one.tree.stage(one.parse(&saved)).unwrap();
        other.log();
        assert!(matches!(
            other.tree.reset_then_install(staged),
            Err(TreeError::Foreign)
        ));
        assert_eq!(other.log(), [""; 0]);
    }

    #[test]
    fn state_staged_before_a_device_was_added_is_refused() {
        let mut board = board(1, 2);
        let saved = board.tree.save_all().unwrap();
        let staged = board.tree.stage(board.parse(&saved)).unwrap();
        let late = Mock::new("late", 0, &board.log);
        board
            .tree
            .register("late", 0, Priority::Default, late)
            .unwrap();
        assert!(matches!(
            board.tree.reset_then_install(staged),
            Err(TreeError::Foreign)
        ));
        assert_eq!(board.values(), (1, 2));
    }

    #[test]
    fn the_failure_of_a_device_names_it_and_what_it_could_not() {
        for (fails, said) in [
            ("save", "device 'disk' 0 cannot be saved"),
            ("reset", "device 'disk' 0 cannot be reset"),
            ("install", "device 'disk' 0 cannot be given its state"),
        ] {
            let mut source = board(1, 2);
            let saved = source.tree.save_all().unwrap();
            let mut target = board(3, 4);
            target.disk.lock().unwrap().fails = Some(fails);
            let staged = target.tree.stage(target.parse(&saved)).unwrap();
            let error = match fails {
                "save" => target.tree.save_all().unwrap_err(),
                _ => target.tree.reset_then_install(staged).unwrap_err(),
            };
            assert_eq!(error.to_string(), said);
        }
    }

    #[test]
    fn a_poisoned_device_is_an_error_not_a_panic() {
        let mut board = board(1, 2);
        let disk = Arc::clone(&board.disk);
        let panicked = std::thread::spawn(move || {
            let _guard = disk.lock().unwrap();
            panic!("a vCPU thread fails");
        });
        assert!(panicked.join().is_err());
        let error = board.tree.save_all().unwrap_err();
        assert_eq!(error.to_string(), "device 'disk' 0 cannot be saved");
    }

    #[test]
    fn a_section_nobody_knows_is_an_error() {
        let board = board(1, 2);
        for (idstr, instance) in [("disk", 1), ("floppy", 0)] {
            assert_eq!(
                board
                    .tree
                    .parse_section(idstr, instance, 2, &[], true)
                    .unwrap_err()
                    .to_string(),
                format!(
                    "unknown section or instance '{idstr}' {instance}: the two sides' devices \
                     differ"
                )
            );
        }
    }

    #[test]
    fn an_error_in_a_section_names_the_section() {
        let board = board(1, 2);
        let too_new = board
            .tree
            .parse_section("apic", 1, 3, &[], true)
            .unwrap_err();
        assert_eq!(
            too_new.to_string(),
            "apic 1, byte 0: unsupported version 3 for 'mock', the newest known is 2"
        );
        let short = board
            .tree
            .parse_section("apic", 1, 2, &[0; 9], true)
            .unwrap_err();
        assert_eq!(
            short.to_string(),
            "apic 1: ports[1].regs, byte 8: 4 bytes wanted, 1 there"
        );
    }

    #[test]
    fn a_section_is_parsed_from_a_growing_buffer() {
        let mut board = board(1, 2);
        board.disk.lock().unwrap().state.rare = Some(Rare { flag: true });
        let saved = board.tree.save_all().unwrap();
        let disk = &saved[1];
        let stream = [&disk.body[..], &[0x7e, 0, 0, 0, 9]].concat();
        for len in 0..=disk.body.len() {
            let error: LoadError = board
                .tree
                .parse_section("disk", 0, 2, &stream[..len], false)
                .unwrap_err();
            assert!(error.is_truncated(), "{len}: {error}");
        }
        let parsed = board
            .tree
            .parse_section("disk", 0, 2, &stream, false)
            .unwrap();
        assert_eq!(parsed.consumed, disk.body.len());
    }

    #[test]
    fn a_name_that_is_taken_or_does_not_fit_is_refused() {
        let mut board = board(1, 2);
        for (name, instance, said) in [
            ("disk", 0, "section 'disk' 0 is registered already"),
            ("", 0, "section name '' is not 1 to 255 bytes without nul"),
        ] {
            let device = Mock::new("new", 0, &board.log);
            let error = board
                .tree
                .register(name, instance, Priority::Default, device)
                .unwrap_err();
            assert_eq!(error.to_string(), said);
        }
        let long = "x".repeat(256);
        let device = Mock::new("new", 0, &board.log);
        assert!(matches!(
            board.tree.register(long, 0, Priority::Default, device),
            Err(TreeError::Name { .. })
        ));
        assert_eq!(board.tree.len(), 2);
    }

    #[derive(VmState, Debug, Default, Clone, PartialEq)]
    #[vmstate(name = "plain", version = 1)]
    struct PlainState {
        value: u8,
    }

    /// A device that may go without a section.
    struct Plain {
        value: u8,
        needed: bool,
    }

    impl Device for Plain {
        type State = PlainState;
        fn is_needed(&self) -> bool {
            self.needed
        }
        fn save(&mut self) -> Result<PlainState, DeviceError> {
            Ok(PlainState { value: self.value })
        }
        fn reset(&mut self) -> Result<(), DeviceError> {
            self.value = 0;
            Ok(())
        }
        fn install(&mut self, state: PlainState) -> Result<(), DeviceError> {
            self.value = state.value;
            Ok(())
        }
    }

    const fn plain(value: u8) -> Plain {
        Plain {
            value,
            needed: true,
        }
    }

    #[test]
    fn early_devices_are_saved_at_the_set_up_and_described_first() {
        let mut tree = DeviceTree::new();
        tree.register("late", 0, Priority::Apic, plain(1)).unwrap();
        tree.register_early("mem", 0, Priority::VirtioMem, plain(2))
            .unwrap();
        let names = |sections: &[SavedSection]| {
            let names: Vec<_> = sections.iter().map(|s| s.idstr.clone()).collect();
            names.join(" ")
        };
        let (early, early_desc) = tree.save_early_described().unwrap();
        let (late, late_desc) = tree.save_all_described().unwrap();
        assert_eq!((names(&early), names(&late)), ("mem".into(), "late".into()));
        assert_eq!(early, tree.save_early().unwrap());
        let json = late_desc.after(early_desc).to_json(4096);
        assert!(json.find("\"mem\"") < json.find("\"late\""), "{json}");
        // Both are there when the state is staged.
        let parsed = |s: &SavedSection| {
            let parsed = tree.parse_section(&s.idstr, s.instance_id, s.version, &s.body, true);
            parsed.unwrap().section
        };
        assert!(tree.stage(late.iter().map(parsed).collect()).is_err());
        let all = early.iter().chain(&late).map(parsed).collect();
        let staged = tree.stage(all).unwrap();
        tree.reset_then_install(staged).unwrap();
        assert_eq!(tree.save_early().unwrap(), early);
    }

    #[test]
    fn a_device_that_is_not_needed_has_no_section_and_is_only_reset() {
        let rare = Arc::new(Mutex::new(Plain {
            value: 7,
            needed: false,
        }));
        let mut tree = DeviceTree::new();
        tree.register("rare", 0, Priority::Default, Arc::clone(&rare))
            .unwrap();
        assert!(tree.save_all().unwrap().is_empty());
        let staged = tree.stage(Vec::new()).unwrap();
        tree.reset_then_install(staged).unwrap();
        assert_eq!(rare.lock().unwrap().value, 0);
        // A section that comes all the same is taken.
        let parsed = tree.parse_section("rare", 0, 1, &[9], true).unwrap();
        let staged = tree.stage(vec![parsed.section]).unwrap();
        tree.reset_then_install(staged).unwrap();
        assert_eq!(rare.lock().unwrap().value, 9);
        rare.lock().unwrap().needed = true;
        assert!(matches!(
            tree.stage(Vec::new()),
            Err(TreeError::Missing { .. })
        ));
    }

    #[test]
    fn the_description_says_what_was_written() {
        let mut board = board(1, 2);
        {
            let mut disk = board.disk.lock().unwrap();
            disk.state.rare = Some(Rare { flag: true });
            disk.state.ports[1].rare = Some(PortRare { on: true });
        }
        let (sections, vmdesc) = board.tree.save_all_described().unwrap();
        assert_eq!(sections, board.tree.save_all().unwrap());
        let regs = r#"{"name": "regs", "array_len": 2, "type": "uint16", "size": 2}"#;
        let port = format!(r#"{{"vmsd_name": "port", "version": 1, "fields": [{regs}]}}"#);
        let value = r#"{"name": "value", "type": "uint32", "size": 4}"#;
        // Ports may have subsections: QEMU 11.1 describes each, alike or not, and without index.
        let two = |name| {
            let one =
                format!(r#"{{"name": "{name}", "type": "struct", "struct": {port}, "size": 4}}"#);
            format!("{one}, {one}")
        };
        let buffer = r#"{"name": "buffer", "type": "buffer", "size": 4}"#;
        let on = r#"{"name": "on", "type": "bool", "size": 1}"#;
        let port_rare = format!(
            r#"{{"vmsd_name": "port", "version": 1, "fields": [{regs}], "subsections": [{{"vmsd_name": "port/rare", "version": 1, "fields": [{on}]}}]}}"#
        );
        let ports = format!(
            r#"{{"name": "ports", "type": "struct", "struct": {port}, "size": 4}}, {{"name": "ports", "type": "struct", "struct": {port_rare}, "size": 20}}"#
        );
        let flag = r#"{"name": "flag", "type": "bool", "size": 1}"#;
        let apic = format!(
            r#"{{"name": "apic", "instance_id": 1, "vmsd_name": "mock", "version": 2, "fields": [{value}, {}, {}, {buffer}]}}"#,
            two("ports"),
            two("lines"),
        );
        let disk = format!(
            r#"{{"name": "disk", "instance_id": 0, "vmsd_name": "mock", "version": 2, "fields": [{value}, {ports}, {}, {buffer}], "subsections": [{{"vmsd_name": "mock/rare", "version": 1, "fields": [{flag}]}}]}}"#,
            two("lines"),
        );
        assert_eq!(
            vmdesc.to_json(4096),
            format!(r#"{{"page_size": 4096, "devices": [{apic}, {disk}]}}"#)
        );
    }

    #[test]
    fn the_description_can_say_what_the_configuration_section_is() {
        #[derive(VmState)]
        #[vmstate(name = "configuration", version = 1)]
        struct Configuration {
            len: u32,
            #[vmstate(len = "len", max = 255)]
            name: Vec<u8>,
        }
        let configuration = Configuration {
            len: 3,
            name: b"pc1".to_vec(),
        };
        let (bytes, description) = vmstate::to_bytes_described(&configuration).unwrap();
        assert_eq!(bytes, b"\0\0\0\x03pc1");
        let (_, vmdesc) = DeviceTree::new().save_all_described().unwrap();
        assert_eq!(
            vmdesc.with_configuration(description).to_json(4096),
            r#"{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}, {"name": "name", "type": "buffer", "size": 3}]}, "page_size": 4096, "devices": []}"#
        );
    }
}
