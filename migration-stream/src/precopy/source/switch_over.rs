//! The switch-over: the guest is paused, the rest of memory and the devices are sent, and the
//! destination's answer is waited for.

use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::{
    Control, HandOver, PING, Source, SourceEvent, SourceObserver, SourceStatus, SwitchedOver,
    Unresolved,
};
use crate::io::deadline_after;
use crate::precopy::error::SourceError;
use crate::precopy::handover::{Offer, Verdict, verdict};
use crate::precopy::return_path::Heard;
use crate::raw::command::Command;
use crate::raw::section;
use crate::{DeviceSections, DeviceState, DirtyLog, PageTransport};

/// How often a source that pauses before the switch-over sends a PING, so that its target does not take
/// it for dead.
const SIGN_OF_LIFE: Duration = Duration::from_millis(100);
/// How often a paused guest's VMM is asked whether to go on.
const PAUSE_POLL: Duration = Duration::from_millis(10);

impl<T: PageTransport, D: DirtyLog> Source<T, D> {
    /// Waits, with the guest stopped, for the VMM.
    fn pause(&mut self, observer: &mut dyn SourceObserver) -> Result<(), SourceError> {
        self.set_status(SourceStatus::PreSwitchover, observer);
        let mut said = Instant::now();
        loop {
            match observer.progress(&self.progress()) {
                Control::Continue => {}
                Control::SwitchOver => return Ok(()),
                Control::Cancel => return Err(SourceError::Cancelled),
            }
            self.check_return_path()?;
            if self.return_path.is_some() && said.elapsed() >= SIGN_OF_LIFE {
                let mut bytes = BytesMut::new();
                Command::Ping(PING).encode(&mut bytes);
                self.watched(observer, |_, out| Ok(out.write_bytes(&bytes)?))?;
                said = Instant::now();
            }
            std::thread::sleep(PAUSE_POLL);
        }
    }

    fn set_status(&mut self, status: SourceStatus, observer: &mut dyn SourceObserver) {
        self.status = status;
        observer.event(SourceEvent::Status(status));
    }

    /// Sends all but the end of the device state, and returns that: the destination cannot run the
    /// guest without it.
    pub(super) fn switch_over<V: DeviceState + SourceObserver>(
        &mut self,
        vm: &mut V,
    ) -> Result<Vec<u8>, SourceError> {
        if self.pauses {
            self.pause(vm)?;
        }
        self.set_status(SourceStatus::Device, vm);
        let mut state = Vec::new();
        let mut sections = DeviceSections::new(&mut state, self.next_section, true);
        vm.save(&mut sections).map_err(|source| SourceError::Vm {
            what: "saving the devices",
            source,
        })?;
        let description = sections.into_description();
        let mut start = BytesMut::new();
        if self.config.switchover_start {
            Command::SwitchoverStart.encode(&mut start);
        }
        self.watched(vm, |ram, out| {
            out.write_bytes(&start)?;
            ram.end(out)?;
            Ok(out.write_bytes(&state)?)
        })?;
        self.check_return_path()?;
        // A receiver waits for the description: one that cannot be sent is replaced, not left out.
        let description = if description.is_empty() {
            "{}"
        } else {
            &description
        };
        let (len, text) =
            u32::try_from(description.len()).map_or((2, "{}"), |len| (len, description));
        let mut last = Vec::new();
        section::encode_eof(&mut last);
        section::encode_vm_description(len, &mut last);
        last.extend_from_slice(text.as_bytes());
        Ok(last)
    }

    /// Sends `last`, with which the destination can run the guest, and waits for its answer.
    pub(super) fn hand_over(
        mut self,
        observer: &mut dyn SourceObserver,
        last: &[u8],
        stopped: Instant,
    ) -> HandOver<T, D> {
        let mut return_path = self.return_path.take();
        let deadline = deadline_after(self.config.confirm_timeout);
        let told = self.beside(observer, |_, out| {
            let before = out.taken();
            let written = out.write_bytes(last).map_err(SourceError::from);
            let offer = match &written {
                Ok(()) => Offer::Made,
                // Nobody runs a guest from a file that was not written to its end.
                Err(_) if out.is_file() => Offer::Withheld,
                Err(_) if before.is_some() && out.taken() == before => Offer::Withheld,
                Err(_) => Offer::Attempted,
            };
            let heard = match &mut return_path {
                Some(return_path) if offer != Offer::Withheld => {
                    return_path.wait_for_answer(deadline)
                }
                _ => Heard::nothing(),
            };
            Ok((offer, written, heard))
        });
        self.return_path = return_path;
        let (offer, written, heard) = match told {
            // The step was not begun.
            Err(error) => return HandOver::Failed(error),
            Ok((Offer::Withheld, Err(error), _)) => {
                return HandOver::Failed(self.first_cause(error));
            }
            Ok(told) => told,
        };
        let cause = written
            .err()
            .or(heard.error)
            .unwrap_or(SourceError::Unconfirmed);
        match verdict(offer, heard.answer, heard.confirms_first) {
            Verdict::Completed => HandOver::Completed(self.into_switched(stopped)),
            Verdict::Failed => HandOver::Failed(cause),
            Verdict::Unknown => HandOver::Unknown(Unresolved {
                cause,
                offer,
                silent: heard.is_over,
                switched: self.into_switched(stopped),
            }),
        }
    }

    fn into_switched(self, stopped: Instant) -> SwitchedOver<T, D> {
        SwitchedOver {
            progress: self.progress(),
            downtime: stopped.elapsed(),
            out: self.out,
            return_path: self.return_path,
            ram: self.ram,
        }
    }
}
