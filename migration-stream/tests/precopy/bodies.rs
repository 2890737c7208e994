//! Bodies of device sections that arrive bit by bit.

use std::sync::mpsc;
use std::thread;

use migration_stream::io::{ByteSink, ByteSource, Chunk};
use migration_stream::precopy::{Target, TargetConfig, TargetError};
use migration_stream::{
    BoxError, ConfigurationRule, GuestRamMmap, Parsed, SectionHeader, StreamReader,
};

use crate::common::guest::memory;
use crate::common::loads::{Loads, load as load_by};
use crate::rig::{LIMIT, channels};
use crate::script::{Pieces, Script};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 4)];

/// Knows that every body is `len` bytes long, and counts what it was shown.
struct Fixed {
    len: usize,
    shown: usize,
    looks: usize,
    /// Hears after every look whether the body was whole.
    seen: Option<mpsc::Sender<bool>>,
}

impl Fixed {
    const fn new(len: usize) -> Self {
        Self {
            len,
            shown: 0,
            looks: 0,
            seen: None,
        }
    }
}

impl Loads for Fixed {
    fn load_device(&mut self, _: &SectionHeader, body: &[u8]) -> Result<Parsed<()>, BoxError> {
        self.shown += body.len().min(self.len);
        self.looks += 1;
        let is_whole = body.len() >= self.len;
        if let (Some(seen), false) = (&self.seen, body.is_empty()) {
            seen.send(is_whole)?;
        }
        Ok(if is_whole {
            Parsed::Section((), self.len)
        } else {
            Parsed::NeedMore
        })
    }
}

fn load(
    source: impl ByteSource + 'static,
    max_devices: usize,
    ram: &GuestRamMmap,
    vm: &mut Fixed,
) -> Result<(), TargetError> {
    let config = TargetConfig::new(ConfigurationRule::Any).max_devices(max_devices);
    let reader = StreamReader::new(source, b"");
    load_by(Target::new(config, reader, None, ram), ram, vm).map(drop)
}

#[test]
fn parsing_a_device_is_linear_in_its_length_however_it_arrives() {
    const LEN: usize = 1 << 20;
    let ram = memory(BLOCKS);
    let script = Script::begin()
        .ram(BLOCKS)
        .ram_end()
        .section(2, "thing", &vec![7; LEN])
        .end(&[("thing", LEN)]);
    for piece in [100, 1400, 64 << 10] {
        let mut vm = Fixed::new(LEN);
        load(
            Pieces::new(script.clone(), piece),
            LEN + 1000,
            &ram,
            &mut vm,
        )
        .unwrap();
        // Once, and before that half, a quarter and so on.
        assert!(vm.shown <= 3 * LEN, "{} bytes shown by {piece}", vm.shown);
        assert!(vm.looks <= 24, "{} looks by {piece}", vm.looks);
    }
}

#[test]
fn a_body_whose_source_says_nothing_behind_it_is_seen_all_the_same() {
    const LEN: usize = 3000;
    let ram = memory(BLOCKS);
    let whole = Script::begin().ram(BLOCKS).ram_end().device(2, "thing", 0);
    // Of the second half too little comes for twice as much as before.
    let (first, second) = ([7; 2000], [8; 1000]);
    let (mut a, b) = channels();
    let (seen, is_whole) = mpsc::channel();
    thread::scope(|scope| {
        let target = scope.spawn(|| {
            let mut vm = Fixed {
                seen: Some(seen),
                ..Fixed::new(LEN)
            };
            load(b, 1 << 20, &ram, &mut vm).map(|()| vm.looks)
        });
        let mut send = |script: Script| a.write_all(&[Chunk::Bytes(&script.0)]).unwrap();
        send(whole.bytes(&first));
        assert_eq!(is_whole.recv_timeout(LIMIT), Ok(false));
        send(Script(second.to_vec()));
        // The source goes on when the target has the device, and not before.
        while !is_whole.recv_timeout(LIMIT).unwrap() {}
        send(Script(Vec::new()).footer(2).end(&[("thing", LEN)]));
        let looks = target.join().unwrap().unwrap();
        assert!(looks >= 2, "{looks}");
    });
}

#[test]
fn the_rest_of_a_stream_that_is_over_is_looked_at_before_it_is_refused() {
    let ram = memory(BLOCKS);
    let script = Script::begin()
        .ram(BLOCKS)
        .ram_end()
        .section(2, "thing", &[7; 1100])
        .end(&[("thing", 1100)]);
    let mut vm = Fixed::new(1100);
    load(Pieces::new(script, 1000), 1 << 20, &ram, &mut vm).unwrap();
}

#[test]
fn a_device_that_is_too_long_is_named_with_the_limit() {
    let ram = memory(BLOCKS);
    let script = Script::begin()
        .ram(BLOCKS)
        .ram_end()
        .section(2, "thing", &vec![7; 200_000]);
    let mut vm = Fixed::new(200_000);
    let error = load(Pieces::new(script, 1000), 100_000, &ram, &mut vm).unwrap_err();
    assert!(
        matches!(&error, TargetError::DeviceTooLong { idstr, max: 100_000, .. } if idstr == "thing"),
        "{error}"
    );
}
