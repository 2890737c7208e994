//! Connections beside the main channel: silent ones, ones that nobody waits for, and broken ones.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::json;
use tests::Result;

use crate::wire::{OURS, RAM, RAM_END, hello, preamble, ram_setup};
use crate::{AT_ONCE, connect, is_closed, listening, migrates_to, says, source, target};

pub fn silent_connection() -> Result<()> {
    let (mut target, uri) = listening()?;
    let mut silent = connect(&uri)?;
    let mut half = connect(&uri)?;
    half.write_all(b"QE")?;
    let asked = Instant::now();
    for _ in 0..100 {
        target.status()?;
    }
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert_eq!(target.migration()?["status"], "setup");
    let _source = migrates_to(&mut target, &uri)?;
    // It was closed when the migration had all its connections.
    silent.set_read_timeout(Some(AT_ONCE))?;
    assert_eq!(silent.read(&mut [0])?, 0);
    Ok(())
}

pub fn left_early() -> Result<()> {
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "multifd"])?;
    let uri = target.listen()?;
    let mut main = connect(&uri)?;
    main.write_all(&preamble(OURS))?;
    let mut channel = connect(&uri)?;
    channel.write_all(&hello(0))?;
    drop((main, channel));
    let mut source = source().start()?;
    source.qmp.enable(&["return-path", "multifd"])?;
    source.migrate(&uri)?;
    source.wait_migration("completed")?;
    target.wait_migration("completed")?;
    target.wait_status("running")?;
    target.wait_lines(20)
}

pub fn unexpected_channel() -> Result<()> {
    let (mut target, uri) = listening()?;
    let mut channel = connect(&uri)?;
    channel.write_all(&hello(0))?;
    assert!(is_closed(&mut channel)?, "turned away");
    migrates_to(&mut target, &uri)?;
    Ok(())
}

pub fn broken_channel() -> Result<()> {
    let mut target = target().start()?;
    target.qmp.enable(&["return-path", "x-colo", "multifd"])?;
    target.qmp.set_parameters(json!({"multifd-channels": 1}))?;
    let uri = target.listen()?;
    let mut main = connect(&uri)?;
    let mut channel = connect(&uri)?;
    channel.write_all(&hello(0))?;
    main.write_all(&[preamble(OURS), ram_setup("pc.ram", RAM), RAM_END.to_vec()].concat())?;
    target.wait_migration("active")?;
    // No packet begins like this. The main channel stays open, and says nothing.
    channel.write_all(&[0xff; 4096])?;
    let since = Instant::now();
    let error = target.wait_failure()?;
    assert!(since.elapsed() < AT_ONCE);
    says(&error, &["channel 0", "packet"]);
    assert_eq!(target.status()?, "inmigrate");
    Ok(())
}
