//! The thread that beats: it reads what has come, has decided what is to be done, beats, and waits.

use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::setpriority_process;

use super::Guest;
use super::shared::{Shared, lock};
use crate::arbitration::{News, Question, Reply};
use crate::beat::Phase;
use crate::decision::StopReason;
use crate::decision::{Colo, Decider, View};
use crate::failover::{ColoEnd, ColoState, Failover};
use crate::link::{Link, LinkEvent};
use crate::peer::Peer;

/// What the heartbeat's thread has.
pub(super) struct Beating {
    pub(super) peer: Peer,
    pub(super) decider: Decider,
    pub(super) link: Link,
    pub(super) shared: Arc<Shared>,
    pub(super) failover: Box<dyn Failover>,
    pub(super) guest: Arc<dyn Guest>,
    pub(super) questions: Sender<Question>,
    pub(super) news: Receiver<News>,
    pub(super) woken: PipeReader,
    /// COLO has been seen.
    pub(super) entered: bool,
    /// Who waits for the answer to a claim.
    pub(super) replies: Vec<Reply>,
}

impl Beating {
    pub(super) fn run(mut self) {
        come_first();
        let mut connected = false;
        loop {
            let now = Instant::now();
            // Whatever has kept this thread from looking: what has come meanwhile is taken first.
            let late = self.peer.look(now);
            self.link.excuse(late);
            self.read(now, &mut connected);
            let wake = Arc::clone(&self.shared);
            self.link.attend(
                now,
                move || wake.wake(),
                |event| connected |= matches!(event, LinkEvent::Connected),
            );
            let before = self.decider.phase();
            self.take_requests(now);
            let claimed = self.news(now);
            let quit = self.shared.quit.load(Ordering::Acquire);
            let taken_over = self.decide(quit);
            self.answer_requests(claimed, taken_over);
            let now = Instant::now();
            let phase = if quit {
                Phase::Stopped
            } else {
                self.decider.phase()
            };
            if quit || phase != before || std::mem::take(&mut connected) {
                let beat = self.peer.beat_now(phase, now);
                self.link.send(&beat);
            } else if let Some(beat) = self.peer.beat(phase, now) {
                self.link.send(&beat);
            }
            self.publish(now);
            if quit {
                return;
            }
            self.wait();
        }
    }

    fn read(&mut self, now: Instant, connected: &mut bool) {
        let Self {
            link, peer, shared, ..
        } = self;
        let mut closed = false;
        link.read(
            now,
            |beat| match peer.receive(beat, now) {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(%error, "heartbeat refused");
                    lock(&shared.report).0.refused = Some(error.to_string());
                    false
                }
            },
            |event| match event {
                LinkEvent::Connected => *connected = true,
                LinkEvent::Closed => closed = true,
            },
        );
        if closed {
            self.peer.disconnected();
        }
    }

    pub(super) fn view(&mut self) -> View {
        let state = self.failover.state();
        let ended = *lock(&self.shared.ended);
        self.entered |= state != ColoState::Outside;
        View {
            colo: match (ended, state) {
                (Some(ColoEnd::TookOver), _) => Colo::TookOver,
                (Some(ColoEnd::Stopped), _) => Colo::Ended,
                (None, ColoState::Undecided) => Colo::Broken,
                (None, ColoState::Within) => Colo::Within,
                // COLO has ended, and `colo_ended` was not called yet.
                (None, ColoState::Outside) if self.entered => Colo::Within,
                (None, ColoState::Outside) => Colo::Outside,
            },
            peer: self.peer.state(),
            peer_phase: self.peer.phase(),
            liveness_until: self.peer.liveness_until(),
            peer_liveness_until: self.peer.peer_liveness_until(),
        }
    }

    pub(super) fn publish(&self, now: Instant) {
        let mut shared = lock(&self.shared.report);
        let report = &mut shared.0;
        report.peer = self.peer.state();
        report.peer_age = self.peer.age(now);
        report.peer_phase = self.peer.phase();
        report.connected = self.link.is_connected();
        report.phase = self.decider.phase();
        let suspended = self.decider.is_suspended();
        report.stop =
            (self.decider.stop_reason()).or(suspended.then_some(StopReason::LeaseExpired));
        shared.1 = now;
    }

    /// Until there is something to read, or to do.
    fn wait(&mut self) {
        let now = Instant::now();
        let view = self.view();
        let looked = self.peer.looked();
        let soon = [
            Some(self.peer.due()),
            // Not before another look.
            self.peer.lost_at().filter(|at| *at > looked),
            self.decider.deadline(&view),
            self.link.accepts_from(now),
        ];
        let until = soon.into_iter().flatten().min().unwrap_or(now);
        let left = until.saturating_duration_since(now);
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let wake = std::iter::once(self.woken.as_fd());
        let mut fds: Vec<_> = wake
            .chain(self.link.fds(now))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // Interrupted or failed: the caller looks at everything anyway, a beat later at the latest.
        if poll(&mut fds, Some(&timeout)).is_err() {
            thread::sleep(left.min(Duration::from_millis(1)));
        }
        drop(fds);
        let mut bytes = [0; 64];
        while matches!(self.woken.read(&mut bytes), Ok(64)) {}
    }
}

/// Has this thread scheduled before the host's other work, if its user may ask for that. It runs for
/// some microseconds a beat, and a beat that is late on a busy host is taken for that host's death.
fn come_first() {
    // On Linux this is the calling thread's alone.
    if let Err(error) = setpriority_process(None, -20) {
        tracing::debug!(%error, "the heartbeat has the priority of everything else");
    }
}
