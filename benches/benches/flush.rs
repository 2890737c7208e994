//! The commit of a checkpoint into a 256 MiB guest with each cache, beside a copy of as many bytes in one
//! piece.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use ram_cache::{
    CacheBlockSpec, CacheKind, DiscardControl, FlushPool, GuestStopped, PAGE_SIZE, RamCache,
};
use vm_memory::{MmapRegion, VolatileMemory};

const GUEST_BYTES: usize = 256 << 20;
const PAGE: usize = 4096;

/// Dirty pages of a checkpoint, and how far apart they lie, in pages.
const CHECKPOINTS: [(u64, u64); 5] = [(256, 1), (2560, 1), (25_600, 1), (2560, 16), (25_600, 2)];

/// A cache, and who has dirtied the pages of a checkpoint.
#[derive(Clone, Copy, Debug)]
enum Case {
    Mirror,
    /// The primary only.
    CowOne,
    /// Both sides, the same pages each time, as two runs of one guest do.
    CowBoth,
}

impl Case {
    const ALL: [Self; 3] = [Self::Mirror, Self::CowOne, Self::CowBoth];

    const fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::CowOne => "cow, dirtied by one side",
            Self::CowBoth => "cow, dirtied by both sides",
        }
    }

    const fn kind(self) -> CacheKind {
        match self {
            Self::Mirror => CacheKind::Mirror,
            Self::CowOne | Self::CowBoth => CacheKind::Cow,
        }
    }
}

struct Secondary {
    guest: Arc<MmapRegion>,
    cache: Box<dyn RamCache>,
    case: Case,
}

impl Secondary {
    fn new(case: Case) -> Self {
        let guest = Arc::new(benches::memory(GUEST_BYTES, |_, page| page.fill(1)));
        let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
        let discard = DiscardControl::new()
            .disable()
            .expect("no discard required");
        let cache = case.kind().make(vec![block], discard);
        let cache = cache.expect("memory for the cache");
        // Written once, so that no page fault is measured.
        for offset in (0..GUEST_BYTES as u64).step_by(PAGE) {
            let page = cache.prepare(0, offset, PAGE).expect("a page of the block");
            page.copy_from(&[1u8; PAGE]);
            cache.landed(0, offset, PAGE).expect("a page of the block");
        }
        cache.enter_colo().expect("no memory is locked");
        let secondary = Self { guest, cache, case };
        // Read once, for the same reason.
        let mut copy = vec![0u8; GUEST_BYTES];
        secondary.guest.as_volatile_slice().copy_to(&mut copy[..]);
        secondary
    }

    /// How long the commit takes.
    fn checkpoint(&self, pages: u64, stride: u64, pool: &FlushPool, fill: bool) -> Duration {
        let stopped = GuestStopped::witnessed_by(&self.guest);
        let offsets = || (0..pages).map(|index| index * stride * PAGE_SIZE);
        if matches!(self.case, Case::CowBoth) {
            for offset in offsets() {
                let at = usize::try_from(offset).expect("fits in memory");
                let page = self.guest.get_slice(at, 1).expect("a page of the guest");
                page.copy_from(&[2u8]);
                let page = offset / PAGE_SIZE;
                let dirtied = self
                    .cache
                    .or_dirty_word(0, page / 64 * 64, 1 << (page % 64));
                dirtied.expect("a page of the block");
            }
            self.cache.guest_stopped(stopped).expect("the page map");
        }
        for offset in offsets() {
            let page = self.cache.prepare(0, offset, PAGE);
            let page = page.expect("a page of the block");
            if fill {
                page.copy_from(&[3u8; PAGE]);
            }
        }
        let begin = Instant::now();
        let report = self.cache.commit(stopped, pool).expect("the commit");
        let spent = begin.elapsed();
        assert_eq!(report.pages, pages);
        self.cache.reclaim(stopped).expect("no memory is locked");
        spent
    }
}

/// One piece of memory copied to another, both there.
struct Copy {
    from: MmapRegion,
    to: MmapRegion,
}

impl Copy {
    fn new() -> Self {
        let memory = || benches::memory(GUEST_BYTES, |_, page| page.fill(1));
        Self {
            from: memory(),
            to: memory(),
        }
    }

    fn copy(&self, len: usize) -> Duration {
        let from = self.from.get_slice(0, len).expect("the memory");
        let to = self.to.as_volatile_slice();
        let begin = Instant::now();
        from.copy_to_volatile_slice(to);
        begin.elapsed()
    }
}

fn flush(c: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = c.benchmark_group("flush");
    let copy = Copy::new();
    let secondaries = Case::ALL.map(Secondary::new);
    for (pages, stride) in CHECKPOINTS {
        let parameter = format!("{pages} pages, stride {stride}");
        group.throughput(Throughput::Bytes(pages * PAGE_SIZE));
        for secondary in &secondaries {
            for threads in [1, cores] {
                let pool = FlushPool::new(threads).expect("threads");
                let name = format!("{}, {threads} threads", secondary.case.name());
                group.bench_function(BenchmarkId::new(name, &parameter), |b| {
                    secondary.checkpoint(pages, stride, &pool, true);
                    b.iter_custom(|n| {
                        (0..n)
                            .map(|_| secondary.checkpoint(pages, stride, &pool, false))
                            .sum()
                    });
                });
            }
        }
        if stride == 1 {
            let len = usize::try_from(pages * PAGE_SIZE).expect("fits in memory");
            group.bench_function(BenchmarkId::new("memcpy", &parameter), |b| {
                b.iter_custom(|n| (0..n).map(|_| copy.copy(len)).sum());
            });
        }
    }
    group.finish();
}

/// How long each takes on one core when all take turns, and what part of memcpy's speed that is: a machine
/// whose memory is faster now than in a minute tells nothing by one after the other.
fn in_turns() {
    let is_given = |option: &str| std::env::args().any(|arg| arg == option);
    // As criterion takes its arguments: what is no option is a part of the name.
    let mut names = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    if is_given("--list") || names.any(|name| !"flush/in turns".contains(&name)) {
        return;
    }
    let smoke = is_given("--test");
    let copy = Copy::new();
    let secondaries = Case::ALL.map(Secondary::new);
    let pool = FlushPool::new(1).expect("threads");
    for (pages, rounds) in [(256, 2000), (2560, 300), (25_600, 40)] {
        let len = usize::try_from(pages * PAGE_SIZE).expect("fits in memory");
        for secondary in &secondaries {
            secondary.checkpoint(pages, 1, &pool, true);
        }
        let mut copies = Vec::new();
        let mut commits = Case::ALL.map(|_| Vec::new());
        for _ in 0..if smoke { 1 } else { rounds } {
            copies.push(copy.copy(len));
            for (secondary, spent) in secondaries.iter().zip(&mut commits) {
                spent.push(secondary.checkpoint(pages, 1, &pool, false));
            }
        }
        let copied = median(copies);
        println!("{pages} pages in turns: memcpy {copied:.1?}");
        for (case, spent) in Case::ALL.iter().zip(commits) {
            let spent = median(spent);
            let part = copied.as_secs_f64() / spent.as_secs_f64();
            println!("    {} {spent:.1?}, {part:.2} of memcpy", case.name());
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = flush
}

fn main() {
    in_turns();
    benches();
    Criterion::default().configure_from_args().final_summary();
}
