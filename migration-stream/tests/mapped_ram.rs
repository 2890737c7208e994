//! Files with mapped-ram: what a running guest wrote last is what is read, however many threads write
//! and read it.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU8;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::guest::{Guest, Log, Pages, configuration, memory};
use migration_stream::io::{PositionedFile, open_direct};
use migration_stream::mapped_ram::{FileReader, FileWriter, MappedRamError};
use migration_stream::precopy::{
    Limits, RamSetup, Source, SourceConfig, SourceError, Target, TargetConfig, TargetError,
};
use migration_stream::ram::ZeroPageDetection;
use migration_stream::{
    ConfigurationRule, GuestRam, GuestRamMmap, PAGE_SIZE, StreamReader, StreamWriter, TailLimits,
    TransportCounters, TransportError,
};
use vm_memory::VolatileSlice;

const BLOCKS: [(&str, u64); 2] = [("pc.ram", 700), ("pc.rom", 3)];

fn threads(count: u8) -> NonZeroU8 {
    NonZeroU8::new(count).unwrap()
}

fn ram() -> Arc<GuestRamMmap> {
    let ram = memory(&BLOCKS);
    for page in (0..700).filter(|page| page % 5 < 2) {
        ram.write(0, page, 0xabcd + page);
    }
    ram.write(1, 2, 7);
    ram
}

/// Migrates a guest that goes on writing into a file.
fn write(
    ram: &Arc<GuestRamMmap>,
    file: Arc<dyn PositionedFile>,
    offset: u64,
    writer: FileWriter,
) -> Result<TransportCounters, SourceError> {
    let log = Log::default();
    let mut guest = Guest::new(ram, &log);
    let source = Source::start(
        SourceConfig::new(configuration("test")).confirm_timeout(Duration::from_secs(1)),
        Arc::new(Limits::new(0, Duration::ZERO)),
        StreamWriter::to_file(file, offset),
        None,
        RamSetup {
            log,
            transport: writer,
        },
        &mut guest,
    )?;
    let switched = source.run(&mut guest).completed()?;
    assert!(guest.passes > 3, "the guest went on");
    Ok(switched.ram.counters())
}

fn read(
    file: &Arc<dyn PositionedFile>,
    offset: u64,
    mut reader: FileReader,
) -> Result<Arc<GuestRamMmap>, TargetError> {
    let ram = memory(&BLOCKS);
    // What is zero in the file must not stay as it is here.
    (0..700).for_each(|page| ram.write(0, page, 1));
    let config = TargetConfig::new(ConfigurationRule::Any).max_devices(1 << 20);
    let stream = StreamReader::from_file(Arc::clone(file), offset);
    let target = Target::new(config, stream, None, &*ram);
    let (loaded, tail) = target.load_opaque(&*ram, &mut reader, TailLimits::default())?;
    assert_eq!(tail.sections().len(), 1);
    assert!(loaded.configuration().unwrap().has("mapped-ram"));
    Ok(ram)
}

fn create(path: &Path) -> Arc<dyn PositionedFile> {
    let mut options = File::options();
    options.read(true).write(true).create(true);
    Arc::new(options.open(path).unwrap())
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn the_last_of_every_page_is_read_whoever_writes_and_reads_it() {
    let dir = dir();
    for (writers, readers, offset) in [(1, 1, 0), (1, 4, 0x5000), (4, 1, 0), (7, 3, 0x5123)] {
        let ram = ram();
        let file = create(&dir.path().join(format!("{writers}-{readers}")));
        let out = FileWriter::new(
            Arc::clone(&ram) as _,
            Arc::clone(&file),
            ZeroPageDetection::Multifd,
        );
        let counters = write(
            &ram,
            Arc::clone(&file),
            offset,
            out.with_threads(threads(writers)),
        )
        .unwrap();
        // Pages that were written again are counted again.
        assert!(
            counters.normal_pages > 281 && counters.zero_pages >= 420,
            "{counters:?}"
        );
        let reader = FileReader::new(Arc::clone(&file)).with_threads(threads(readers));
        read(&file, offset, reader).unwrap().assert_equals(&ram);
    }
}

#[test]
fn a_page_that_was_there_and_became_zero_is_zero() {
    let (dir, ram) = (dir(), ram());
    let file = create(&dir.path().join("file"));
    let out = FileWriter::new(
        Arc::clone(&ram) as _,
        Arc::clone(&file),
        ZeroPageDetection::Multifd,
    );
    // The guest clears pages among those that it writes again.
    write(&ram, Arc::clone(&file), 0, out).unwrap();
    read(&file, 0, FileReader::new(Arc::clone(&file)))
        .unwrap()
        .assert_equals(&ram);
}

#[test]
fn the_file_is_as_sparse_as_memory_and_its_pages_are_at_mebibytes() {
    let (dir, ram) = (dir(), ram());
    let path = dir.path().join("file");
    let file = create(&path);
    let out = FileWriter::new(
        Arc::clone(&ram) as _,
        Arc::clone(&file),
        ZeroPageDetection::Multifd,
    );
    write(&ram, file, 0, out).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let name = bytes.windows(6).position(|w| w == b"pc.ram").unwrap();
    let number = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    // Version, size of a page, bitmap directly behind, pages.
    let header = name + 6 + 8;
    assert_eq!(bytes[header..header + 4], [0, 0, 0, 1]);
    assert_eq!(number(header + 4), PAGE_SIZE);
    assert_eq!(number(header + 12), (header + 28) as u64);
    assert_eq!(number(header + 20), 1 << 20);
    let next = (1 << 20) + 700 * 4096;
    assert_eq!(&bytes[next..next + 7], b"\x06pc.rom");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    assert!(
        blocks * 512 < 400 * PAGE_SIZE,
        "{blocks} blocks of 512 bytes"
    );
}

#[test]
fn pages_go_past_the_page_cache_where_the_file_system_lets_them() {
    // Not where memory is the file system.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (path, ram) = (dir.path().join("file"), ram());
    let file = create(&path);
    let direct = |options: &mut OpenOptions| open_direct(&path, options);
    let pages = match direct(File::options().write(true)) {
        Ok(pages) => pages,
        Err(e) => {
            assert_eq!(e.kind(), io::ErrorKind::Unsupported, "{e}");
            return;
        }
    };
    let out = FileWriter::new(
        Arc::clone(&ram) as _,
        Arc::clone(&file),
        ZeroPageDetection::Multifd,
    );
    let out = out.with_pages_to(Arc::new(pages)).with_threads(threads(2));
    write(&ram, Arc::clone(&file), 0x333, out).unwrap();
    let pages = direct(File::options().read(true)).unwrap();
    let reader = FileReader::new(Arc::clone(&file))
        .with_pages_from(Arc::new(pages))
        .with_threads(threads(2));
    read(&file, 0x333, reader).unwrap().assert_equals(&ram);
}

/// A disk that is full beyond a byte.
struct Full(File, u64);

impl PositionedFile for Full {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        PositionedFile::read_at(&self.0, offset, buf)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, bytes)
    }
    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        self.0.read_guest(offset, guest)
    }
    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        if offset >= self.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write_guest(offset, guest)
    }
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
}

#[test]
fn a_full_disk_is_an_error_that_says_where() {
    for count in [1, 3] {
        let (dir, ram) = (dir(), ram());
        let path = dir.path().join("file");
        drop(create(&path));
        let full = |_| Full(File::options().write(true).open(&path).unwrap(), 0x18_0000);
        let file: Arc<dyn PositionedFile> = Arc::new(full(()));
        let ram_again: Arc<dyn GuestRam> = Arc::clone(&ram) as _;
        let out = FileWriter::new(ram_again, Arc::clone(&file), ZeroPageDetection::Multifd);
        let error = write(&ram, file, 0, out.with_threads(threads(count))).unwrap_err();
        let SourceError::Transport(TransportError { source, .. }) = error else {
            panic!("{error:?}");
        };
        assert!(
            matches!(
                source.downcast_ref::<MappedRamError>(),
                Some(MappedRamError::File { offset: 0x18_0000.., source })
                    if source.kind() == io::ErrorKind::StorageFull
            ),
            "{source:?}"
        );
    }
}

#[test]
fn a_file_that_is_cut_is_refused_by_any_number_of_threads() {
    let (dir, ram) = (dir(), ram());
    let path = dir.path().join("file");
    let file = create(&path);
    let out = FileWriter::new(
        Arc::clone(&ram) as _,
        Arc::clone(&file),
        ZeroPageDetection::Multifd,
    );
    write(&ram, Arc::clone(&file), 0, out).unwrap();
    // A bit for a page that the block does not have.
    let bytes = std::fs::read(&path).unwrap();
    let name = bytes.windows(6).position(|w| w == b"pc.ram").unwrap();
    let last = (name + 6 + 8 + 28 + 87) as u64;
    file.write_at(last, &[0xff]).unwrap();
    for count in [1, 3] {
        let reader = FileReader::new(Arc::clone(&file)).with_threads(threads(count));
        let Err(TargetError::Transport(error)) = read(&file, 0, reader) else {
            panic!("loaded");
        };
        assert!(matches!(
            error.source.downcast_ref::<MappedRamError>(),
            Some(MappedRamError::BeyondBlock {
                page: 700,
                pages: 700
            })
        ));
    }
}

/// A file that notes when how many bytes are written.
struct Noting {
    file: File,
    writes: Mutex<Vec<(Instant, u64)>>,
}

impl Noting {
    fn note(&self, len: usize) {
        self.writes
            .lock()
            .unwrap()
            .push((Instant::now(), len as u64));
    }
}

impl PositionedFile for Noting {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        PositionedFile::read_at(&self.file, offset, buf)
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.note(bytes.len());
        PositionedFile::write_at(&self.file, offset, bytes)
    }
    fn read_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        self.file.read_guest(offset, guest)
    }
    fn write_guest(&self, offset: u64, guest: &VolatileSlice<'_>) -> io::Result<()> {
        self.note(guest.len());
        self.file.write_guest(offset, guest)
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
}

const LIMIT: u64 = 16 << 20;

/// No second writes more than the limit, a tenth and a run, and the limit is used.
fn the_limit_holds(count: u8) {
    // A second and a half.
    const PAGES: u64 = LIMIT / PAGE_SIZE * 3 / 2;
    let ram = memory(&[("pc.ram", PAGES)]);
    (0..PAGES).for_each(|page| ram.write(0, page, page + 1));
    let file = Arc::new(Noting {
        file: tempfile::tempfile().unwrap(),
        writes: Mutex::default(),
    });
    let shared: Arc<dyn PositionedFile> = Arc::clone(&file) as _;
    let transport = FileWriter::new(
        Arc::clone(&ram) as _,
        Arc::clone(&shared),
        ZeroPageDetection::Legacy,
    )
    .with_threads(threads(count));
    let log = Log::default();
    let mut guest = Guest::new(&ram, &log);
    guest.writes_left = 0;
    let config = SourceConfig::new(configuration("test")).confirm_timeout(Duration::from_secs(1));
    let limits = Arc::new(Limits::new(LIMIT, Duration::from_millis(300)));
    let out = StreamWriter::to_file(shared, 0);
    let setup = RamSetup { log, transport };
    let source = Source::start(config, limits, out, None, setup, &mut guest).unwrap();
    source.run(&mut guest).completed().unwrap();

    let mut writes = std::mem::take(&mut *file.writes.lock().unwrap());
    writes.sort();
    let total: u64 = writes.iter().map(|w| w.1).sum();
    assert!(total >= PAGES * PAGE_SIZE, "{total} bytes");
    for (at, (from, _)) in writes.iter().enumerate() {
        let second = writes[at..]
            .iter()
            .take_while(|w| w.0 < *from + Duration::from_secs(1));
        let sum: u64 = second.map(|w| w.1).sum();
        assert!(sum <= LIMIT + LIMIT / 10 + (1 << 20), "{sum} in a second");
    }
    let took = writes.last().unwrap().0 - writes[0].0;
    let ideal = Duration::from_millis(total * 1000 / LIMIT);
    // Loaded machines are slow; half the limit is no limit that nobody reaches.
    assert!(took < 2 * ideal, "{took:?} instead of {ideal:?}");
}

#[test]
fn the_limit_holds_for_one_thread() {
    the_limit_holds(1);
}

#[test]
fn the_limit_holds_for_many_threads() {
    the_limit_holds(7);
}
