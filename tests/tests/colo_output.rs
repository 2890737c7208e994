//! What a client of the guest has been told, and what becomes of it when the guest's host dies.
//!
//! The guest counts its client's requests and answers each with the count and a digest of all of them
//! (`colo-vmm run --guest answers`). The client talks to it over the serial line, the primary is killed
//! at a random moment, the client turns to the survivor, which gets a new secondary, and so on. The
//! client holds what it hears against its own history:
//!
//! - whatever the mode, the guest's history is a beginning of the client's, never anything else;
//! - with `--output-commit` that has all that the client has heard an answer to;
//! - without, it has all that was answered before the last complete checkpoint began. What was
//!   answered later may be undone, and the client hears other answers with the same count.
//!
//! Six hosts die in each mode, and thirty with `COLO_ALL=1`.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use colo_vmm::guest::{ASK, digest};
use serde_json::json;
use tests::harness::{self, Needs};
use tests::process::Output;
use tests::succession::Succession;
use tests::vmm::{ColoVmm, Connection, Side};
use tests::{PATIENCE, Result, sample};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run([
        kvm(
            "with_output_commit_no_answer_comes_before_its_checkpoint",
            waits,
        ),
        kvm(
            "with_output_commit_nothing_that_was_answered_is_lost_or_contradicted",
            || outlives(Guarantee::Answered, &["--output-commit"]),
        ),
        kvm(
            "without_output_commit_nothing_that_a_checkpoint_contains_is_lost",
            || outlives(Guarantee::Checkpointed, &[]),
        ),
    ])
}

/// Between two checkpoints, ms.
const DELAY: u32 = 30;

fn guest(args: &[&str]) -> ColoVmm {
    ColoVmm::new("colo-vmm")
        .memory(16)
        .interactive()
        .args(["--guest", "answers"])
        .args(args)
}

/// What of the client's history a survivor has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guarantee {
    /// All that was answered.
    Answered,
    /// What was answered before the last complete checkpoint began.
    Checkpointed,
}

/// An answer: how many requests the guest has had, and the digest of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    /// It was asked for, without a request.
    asked: bool,
    count: usize,
    digest: u32,
}

impl Answer {
    fn parse(line: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(line)?;
        let (asked, words) = match text.strip_prefix(char::from(ASK)) {
            Some(words) => (true, words),
            None => (false, text),
        };
        let (count, digest) = words
            .split_once(' ')
            .ok_or_else(|| format!("the guest says {text:?}"))?;
        Ok(Self {
            asked,
            count: usize::from_str_radix(count, 16)?,
            digest: u32::from_str_radix(digest, 16)?,
        })
    }
}

/// One end of the guest's serial line.
struct Line {
    output: Output,
    /// Bytes of it that were read.
    read: usize,
    /// What was read and is no whole answer yet.
    rest: Vec<u8>,
}

impl Line {
    fn of(output: &Output) -> Self {
        Self {
            output: output.clone(),
            read: 0,
            rest: Vec::new(),
        }
    }

    /// The next whole answer; `None` at the deadline, or if no more will come.
    fn next(&mut self, deadline: Instant) -> Result<Option<Answer>> {
        let text = self.next_text(deadline)?;
        text.map(|text| Answer::parse(&text)).transpose()
    }

    /// The next text up to a line feed, likewise.
    fn next_text(&mut self, deadline: Instant) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let mut text: Vec<u8> = self.rest.drain(..=end).collect();
                text.truncate(end);
                return Ok(Some(text));
            }
            let more = self.output.more(self.read, deadline);
            if more.is_empty() {
                return Ok(None);
            }
            self.read += more.len();
            self.rest.extend(more);
        }
    }
}

/// What the client knows.
struct Client {
    guarantee: Guarantee,
    /// The digest after each number of requests, from none on: those that were answered, and the one
    /// that waits for its answer.
    digests: Vec<u32>,
    answered: usize,
    /// What had been answered when so many checkpoints had been heard of.
    marks: VecDeque<(usize, usize)>,
    /// What had certainly been answered when the last complete checkpoint began.
    checkpointed: usize,
    /// Answers that came more than once, with the same content.
    repeated: usize,
    /// Answers that a failover has undone.
    undone: usize,
}

impl Client {
    fn new(guarantee: Guarantee) -> Self {
        Self {
            guarantee,
            digests: vec![0],
            answered: 0,
            marks: VecDeque::new(),
            checkpointed: 0,
            repeated: 0,
            undone: 0,
        }
    }

    fn waits(&self) -> bool {
        self.digests.len() > self.answered + 1
    }

    fn request(&mut self, byte: u8) {
        let before = self.digests[self.answered];
        self.digests.push(digest(before, byte));
    }

    /// An answer has to be that to a beginning of the history.
    fn hear(&mut self, answer: Answer) -> Result<()> {
        let expected = self.digests.get(answer.count);
        if expected != Some(&answer.digest) {
            return Err(format!(
                "{answer:x?} is no answer to {} requests of which {} were answered; expected digest \
                 {expected:x?}",
                self.digests.len() - 1,
                self.answered
            )
            .into());
        }
        if answer.count > self.answered {
            self.answered = answer.count;
        } else {
            self.repeated += 1;
        }
        Ok(())
    }

    /// Whether this is how an answer to a beginning of the history ends, the whole of it not.
    fn is_end_of_answer(&self, text: &[u8]) -> bool {
        let mut answers = (0..).zip(&self.digests);
        answers.any(|(count, digest): (usize, _)| {
            let whole = format!("{count:08x} {digest:08x}");
            text.len() < whole.len() && whole.as_bytes().ends_with(text)
        })
    }

    /// So many checkpoints have been reported before now. The next may have begun already, the one
    /// after it has not.
    fn checkpoints(&mut self, reported: usize) {
        while let Some((answered, at)) = self.marks.front().copied() {
            if at + 2 > reported {
                break;
            }
            self.checkpointed = answered;
            self.marks.pop_front();
        }
        self.marks.push_back((self.answered, reported));
    }

    /// The survivor's answer to the question where it is.
    fn resume(&mut self, answer: Answer) -> Result<()> {
        let least = match self.guarantee {
            Guarantee::Answered => self.answered,
            Guarantee::Checkpointed => self.checkpointed,
        };
        if answer.count < least {
            return Err(format!(
                "the survivor has {} requests, and has to have {least} of {} that were answered \
                 ({:?})",
                answer.count, self.answered, self.guarantee
            )
            .into());
        }
        self.undone += self.answered.saturating_sub(answer.count);
        if self.digests.get(answer.count) != Some(&answer.digest) {
            return Err(format!("the survivor has another history: {answer:x?}").into());
        }
        self.digests.truncate(answer.count + 1);
        self.answered = answer.count;
        self.marks.clear();
        // The precopy that gives the survivor its next secondary contains it.
        self.checkpointed = answer.count;
        Ok(())
    }
}

fn failovers() -> usize {
    if sample::is_everything() { 30 } else { 6 }
}

fn outlives(guarantee: Guarantee, args: &[&str]) -> Result<()> {
    let seed = sample::seed()?;
    let failovers = failovers();
    let mut random = sample::random(&format!("{guarantee:?}"))?;
    let mut client = Client::new(guarantee);
    let mut guest = Succession::begin(guest(args), Connection::default(), DELAY)?;
    let mut line = Line::of(guest.primary.process.stdout());
    let told = |e: tests::Error, n: usize| format!("failover {n}, seed {seed}: {e}");
    let mut requests = 0;
    for number in 1..=failovers {
        let until = Instant::now() + Duration::from_millis(random.u64(100..700));
        requests += talk(&mut client, &mut guest, &mut line, &mut random, until)
            .and_then(|requests| {
                fail_over(&mut client, &mut guest, &mut line)?;
                guest.rejoin()?;
                Ok(requests)
            })
            .map_err(|e| told(e, number))?;
    }
    assert!(requests >= failovers, "the client was hardly answered");
    if guarantee == Guarantee::Answered {
        assert_eq!(client.undone, 0);
    }
    println!(
        "{guarantee:?}: {failovers} failovers, {requests} requests answered, {} undone, {} answers \
         repeated",
        client.undone, client.repeated
    );
    Ok(())
}

/// Asks one request after the other, and returns how many were answered.
fn talk(
    client: &mut Client,
    guest: &mut Succession,
    line: &mut Line,
    random: &mut fastrand::Rng,
    until: Instant,
) -> Result<usize> {
    let mut answered = 0;
    while Instant::now() < until {
        if !client.waits() {
            let byte = random.u8(b'a'..=b'z');
            client.request(byte);
            guest.primary.process.type_in(&[byte])?;
        }
        let Some(answer) = line.next(until)? else {
            continue;
        };
        client.hear(answer)?;
        answered += usize::from(!client.waits());
        client.checkpoints(guest.primary.checkpoints()?.len());
    }
    Ok(answered)
}

/// The primary dies, and the client turns to the survivor.
fn fail_over(client: &mut Client, guest: &mut Succession, line: &mut Line) -> Result<()> {
    let mut dead = guest.kill(Side::Primary)?;
    // What it had let out the world has heard.
    dead.process.stdout().whole()?;
    while let Some(answer) = line.next(Instant::now())? {
        client.hear(answer)?;
    }
    client.checkpoints(dead.checkpoints()?.len());
    guest.go_on_alone()?;
    let survivor = &mut guest.primary.process;
    *line = Line::of(survivor.stdout());
    survivor.type_in(&[ASK])?;
    let deadline = Instant::now() + PATIENCE;
    let mut is_first = true;
    loop {
        let text = line.next_text(deadline)?;
        let text = text.ok_or("the survivor does not answer")?;
        // It is heard from the byte behind the checkpoint on, which may be within an answer.
        if std::mem::take(&mut is_first) && client.is_end_of_answer(&text) {
            continue;
        }
        let answer = Answer::parse(&text)?;
        if answer.asked {
            return client.resume(answer);
        }
        // To a request that the checkpoint had as one that was typed and not read.
        if client.digests.get(answer.count) != Some(&answer.digest) {
            return Err(format!("the survivor contradicts what was said: {answer:x?}").into());
        }
        client.repeated += 1;
    }
}

fn waits() -> Result<()> {
    let commit = guest(&["--output-commit"]);
    let mut guest = Succession::begin(commit, Connection::default(), DELAY)?;
    // From here on a checkpoint comes only when the delay is set, and not by itself.
    let delay = json!({"x-checkpoint-delay": 3_600_000});
    guest.primary.qmp.set_parameters(delay.clone())?;
    let mut settled = guest.primary.checkpoints()?.len();
    loop {
        thread::sleep(Duration::from_millis(500));
        let now = guest.primary.checkpoints()?.len();
        if now == settled {
            break;
        }
        settled = now;
    }
    let mut line = Line::of(guest.primary.process.stdout());
    let mut client = Client::new(Guarantee::Answered);
    for byte in *b"abc" {
        client.request(byte);
        guest.primary.process.type_in(&[byte])?;
        let soon = Instant::now() + Duration::from_millis(300);
        assert_eq!(line.next(soon)?, None);
        let before = guest.primary.checkpoints()?.len();
        guest.primary.qmp.set_parameters(delay.clone())?;
        let answer = line.next(Instant::now() + PATIENCE)?;
        client.hear(answer.ok_or("no answer after a checkpoint")?)?;
        assert_eq!(client.answered, client.digests.len() - 1);
        guest.primary.wait_checkpoints(before + 1)?;
    }
    Ok(())
}
