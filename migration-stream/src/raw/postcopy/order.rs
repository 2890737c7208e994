//! Which command of postcopy may come when.

use super::error::OrderError;
use super::state::PostcopyState;
use crate::raw::command::{Command, CommandNumber, PostcopyAdvice};

/// What the end of the main stream's section loop means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOfStream {
    /// The migration ended without going over to postcopy. The description follows.
    Precopy,
    /// All pages have come. Nothing follows.
    Postcopy,
}

/// Checks the order of commands of an incoming stream as QEMU's destination does.
///
/// | command | accepted in | goes to |
/// |---|---|---|
/// | ADVISE | none | advised |
/// | RAM_DISCARD | advised, discarding | discarding |
/// | PACKAGED | advised, discarding | |
/// | LISTEN, in a package | advised, discarding | listening |
/// | RUN, in a package | listening | running |
/// | RECV_BITMAP | recovering | |
/// | RESUME | recovering | running |
/// | OPEN_RETURN_PATH, PING, SWITCHOVER_START | all but paused and ended | |
///
/// Where QEMU 11.1 goes on with a stream that no source sends, or stops making sense of it, this
/// refuses it: PACKAGED, RECV_BITMAP and RESUME in any other state (QEMU takes the first two at any
/// time, and only reports the third), LISTEN and RUN outside of a package (two threads would read
/// the same stream), RAM_DISCARD after an ADVISE of dirty bitmaps alone, EOF between RAM_DISCARD and
/// RUN; and in a package the commands whose payload QEMU looks for in the main stream behind it,
/// a package among them.
///
/// After an error the machine stays as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostcopyOrder {
    state: PostcopyState,
    expects: Expects,
    /// Postcopy is advised for RAM, not only for dirty bitmaps.
    ram: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Anything,
    This(Option<PostcopyAdvice>),
}

impl PostcopyOrder {
    /// For the stream to a VM with this RAM, `None` if its pages do not come by postcopy (the
    /// capability `postcopy-ram` is off; dirty bitmaps may).
    #[must_use]
    pub const fn new(ram: Option<PostcopyAdvice>) -> Self {
        Self {
            state: PostcopyState::None,
            expects: Expects::This(ram),
            ram: false,
        }
    }

    /// For tools: whatever the source advises is right.
    #[must_use]
    pub const fn of_any_source() -> Self {
        Self {
            state: PostcopyState::None,
            expects: Expects::Anything,
            ram: false,
        }
    }

    /// How far it is.
    #[must_use]
    pub const fn state(&self) -> PostcopyState {
        self.state
    }

    /// A command of the main stream.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn command(&mut self, command: &Command) -> Result<(), OrderError> {
        use PostcopyState::{Advised, Discarding, None, Recovering, Running};
        let number = command.number();
        self.state = match command {
            Command::OpenReturnPath | Command::Ping(_) | Command::SwitchoverStart => {
                self.is_connected(number)?;
                self.state
            }
            Command::PostcopyAdvise(advice) => {
                self.allow(number, &[None])?;
                self.check(*advice)?;
                self.ram = advice.is_some();
                Advised
            }
            Command::PostcopyRamDiscard(_) => {
                self.allow(number, &[Advised, Discarding])?;
                if !self.ram {
                    return Err(OrderError::DiscardWithoutRam);
                }
                Discarding
            }
            Command::Packaged { .. } => {
                self.allow(number, &[Advised, Discarding])?;
                self.state
            }
            Command::PostcopyListen | Command::PostcopyRun => {
                return Err(OrderError::NotPackaged { command: number });
            }
            Command::RecvBitmap(_) => {
                self.allow(number, &[Recovering])?;
                self.state
            }
            Command::PostcopyResume => {
                self.allow(number, &[Recovering])?;
                Running
            }
        };
        Ok(())
    }

    /// A command inside a package. [`PackageDecoder`](super::PackageDecoder) calls this.
    ///
    /// # Errors
    /// [`OrderError`].
    pub fn packaged(&mut self, command: &Command) -> Result<(), OrderError> {
        use PostcopyState::{Advised, Discarding, Listening, Running};
        let number = command.number();
        self.state = match command {
            Command::Ping(_) => {
                self.is_connected(number)?;
                self.state
            }
            Command::PostcopyListen => {
                self.allow(number, &[Advised, Discarding])?;
                Listening
            }
            Command::PostcopyRun => {
                self.allow(number, &[Listening])?;
                Running
            }
            _ => return Err(OrderError::InPackage { command: number }),
        };
        Ok(())
    }

    /// The main stream's section loop ends.
    ///
    /// # Errors
    /// [`OrderError::EndOfStream`]: in the middle of the switch, or of a recovery.
    pub fn end_of_stream(&mut self) -> Result<EndOfStream, OrderError> {
        let end = match self.state {
            PostcopyState::None | PostcopyState::Advised => EndOfStream::Precopy,
            PostcopyState::Running => EndOfStream::Postcopy,
            state => return Err(OrderError::EndOfStream { state }),
        };
        self.state = PostcopyState::Ended;
        Ok(end)
    }

    /// The connection broke. Once the guest runs here it waits for another one.
    ///
    /// # Errors
    /// [`OrderError::NotRecoverable`]: the guest does not run here, or nothing is missing any more.
    pub fn interrupted(&mut self) -> Result<(), OrderError> {
        match self.state {
            PostcopyState::Running | PostcopyState::Recovering => {
                self.state = PostcopyState::Paused;
                Ok(())
            }
            state => Err(OrderError::NotRecoverable { state }),
        }
    }

    /// There is a new connection. It begins without a header.
    ///
    /// # Errors
    /// [`OrderError::NotRecoverable`]: none was waited for.
    pub fn reconnected(&mut self) -> Result<(), OrderError> {
        match self.state {
            PostcopyState::Paused => {
                self.state = PostcopyState::Recovering;
                Ok(())
            }
            state => Err(OrderError::NotRecoverable { state }),
        }
    }

    fn allow(&self, command: CommandNumber, states: &[PostcopyState]) -> Result<(), OrderError> {
        if states.contains(&self.state) {
            Ok(())
        } else {
            let state = self.state;
            Err(OrderError::State { command, state })
        }
    }

    fn is_connected(&self, command: CommandNumber) -> Result<(), OrderError> {
        match self.state {
            state @ (PostcopyState::Paused | PostcopyState::Ended) => {
                Err(OrderError::State { command, state })
            }
            _ => Ok(()),
        }
    }

    fn check(&self, received: Option<PostcopyAdvice>) -> Result<(), OrderError> {
        match (self.expects, received) {
            (Expects::Anything, _) | (Expects::This(None), None) => Ok(()),
            (Expects::This(Some(_)), None) => Err(OrderError::RamNotAdvised),
            (Expects::This(None), Some(_)) => Err(OrderError::RamAdvised),
            (Expects::This(Some(local)), Some(received)) => {
                if received.ram_page_sizes != local.ram_page_sizes {
                    return Err(OrderError::RamPageSizes {
                        received: received.ram_page_sizes,
                        local: local.ram_page_sizes,
                    });
                }
                if received.target_page_size != local.target_page_size {
                    return Err(OrderError::TargetPageSize {
                        received: received.target_page_size,
                        local: local.target_page_size,
                    });
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::IdStr;
    use crate::raw::command::{DiscardRange, RamDiscard};

    const ADVICE: PostcopyAdvice = PostcopyAdvice {
        ram_page_sizes: 4096,
        target_page_size: 4096,
    };

    fn discard() -> Command {
        let range = DiscardRange {
            start: 0,
            length: 4096,
        };
        Command::PostcopyRamDiscard(
            RamDiscard::new(IdStr::new("pc.ram").unwrap(), vec![range]).unwrap(),
        )
    }

    fn commands() -> Vec<Command> {
        vec![
            Command::OpenReturnPath,
            Command::Ping(1),
            Command::PostcopyAdvise(Some(ADVICE)),
            Command::PostcopyListen,
            Command::PostcopyRun,
            discard(),
            Command::Packaged { size: 10 },
            Command::PostcopyResume,
            Command::RecvBitmap(IdStr::new("pc.ram").unwrap()),
            Command::SwitchoverStart,
        ]
    }

    /// A machine in this state, by the way that leads there.
    fn at(state: PostcopyState) -> PostcopyOrder {
        use PostcopyState::{Advised, Discarding, Ended, Listening, None, Paused, Recovering};
        let mut order = PostcopyOrder::new(Some(ADVICE));
        if state == None {
            return order;
        }
        order
            .command(&Command::PostcopyAdvise(Some(ADVICE)))
            .unwrap();
        if state == Advised {
            return order;
        }
        order.command(&discard()).unwrap();
        order.command(&discard()).unwrap();
        if state == Discarding {
            return order;
        }
        order.command(&Command::Packaged { size: 10 }).unwrap();
        order.packaged(&Command::PostcopyListen).unwrap();
        if state == Listening {
            return order;
        }
        order.packaged(&Command::Ping(3)).unwrap();
        order.packaged(&Command::PostcopyRun).unwrap();
        if state == Ended {
            assert_eq!(order.end_of_stream(), Ok(EndOfStream::Postcopy));
        }
        if state == Paused || state == Recovering {
            order.interrupted().unwrap();
        }
        if state == Recovering {
            order.reconnected().unwrap();
        }
        assert_eq!(order.state(), state);
        order
    }

    const STATES: [PostcopyState; 8] = [
        PostcopyState::None,
        PostcopyState::Advised,
        PostcopyState::Discarding,
        PostcopyState::Listening,
        PostcopyState::Running,
        PostcopyState::Paused,
        PostcopyState::Recovering,
        PostcopyState::Ended,
    ];

    /// Each command in each state, against the table at the type.
    #[test]
    fn each_state_accepts_its_commands_and_no_others() {
        use PostcopyState as S;
        for state in STATES {
            for command in commands() {
                let number = command.number();
                let accepted = match number {
                    CommandNumber::OpenReturnPath
                    | CommandNumber::Ping
                    | CommandNumber::SwitchoverStart => {
                        (!matches!(state, S::Paused | S::Ended)).then_some(state)
                    }
                    CommandNumber::PostcopyAdvise => (state == S::None).then_some(S::Advised),
                    CommandNumber::PostcopyRamDiscard => {
                        matches!(state, S::Advised | S::Discarding).then_some(S::Discarding)
                    }
                    CommandNumber::Packaged => {
                        matches!(state, S::Advised | S::Discarding).then_some(state)
                    }
                    CommandNumber::RecvBitmap => (state == S::Recovering).then_some(state),
                    CommandNumber::PostcopyResume => (state == S::Recovering).then_some(S::Running),
                    _ => None,
                };
                let before = at(state);
                let mut order = before.clone();
                match (order.command(&command), accepted) {
                    (Ok(()), Some(next)) => assert_eq!(order.state(), next),
                    (Err(OrderError::State { command, state: s }), None) => {
                        assert_eq!((command, s), (number, state));
                        assert_eq!(order, before);
                    }
                    (Err(OrderError::NotPackaged { command }), None) => {
                        assert!(matches!(
                            command,
                            CommandNumber::PostcopyListen | CommandNumber::PostcopyRun
                        ));
                    }
                    (result, _) => panic!("{number:?} in {state}: {result:?}"),
                }
            }
        }
    }

    #[test]
    fn a_package_holds_listen_pings_and_run_and_no_package() {
        use PostcopyState as S;
        for state in STATES {
            for command in commands() {
                let number = command.number();
                let accepted = match number {
                    CommandNumber::Ping => {
                        (!matches!(state, S::Paused | S::Ended)).then_some(state)
                    }
                    CommandNumber::PostcopyListen => {
                        matches!(state, S::Advised | S::Discarding).then_some(S::Listening)
                    }
                    CommandNumber::PostcopyRun => (state == S::Listening).then_some(S::Running),
                    _ => None,
                };
                let before = at(state);
                let mut order = before.clone();
                match (order.packaged(&command), accepted) {
                    (Ok(()), Some(next)) => assert_eq!(order.state(), next),
                    (Err(OrderError::State { .. } | OrderError::InPackage { .. }), None) => {
                        assert_eq!(order, before);
                    }
                    (result, _) => panic!("{number:?} in {state}: {result:?}"),
                }
            }
        }
        assert_eq!(
            at(S::Listening).packaged(&Command::Packaged { size: 4 }),
            Err(OrderError::InPackage {
                command: CommandNumber::Packaged
            })
        );
    }

    #[test]
    fn a_stream_ends_before_the_switch_or_when_all_pages_are_there() {
        use PostcopyState as S;
        for state in STATES {
            let mut order = at(state);
            let end = match state {
                S::None | S::Advised => Ok(EndOfStream::Precopy),
                S::Running => Ok(EndOfStream::Postcopy),
                state => Err(OrderError::EndOfStream { state }),
            };
            assert_eq!(order.end_of_stream(), end);
        }
    }

    #[test]
    fn only_a_guest_that_runs_here_waits_for_another_connection() {
        use PostcopyState as S;
        for state in STATES {
            let refused = Err(OrderError::NotRecoverable { state });
            let broken = matches!(state, S::Running | S::Recovering);
            let expected = if broken { Ok(()) } else { refused };
            assert_eq!(at(state).interrupted(), expected);
            let expected = if state == S::Paused { Ok(()) } else { refused };
            assert_eq!(at(state).reconnected(), expected);
        }
    }

    #[test]
    fn both_sides_agree_on_what_comes_by_postcopy() {
        let advise =
            |local, received| PostcopyOrder::new(local).command(&Command::PostcopyAdvise(received));
        let huge = PostcopyAdvice {
            ram_page_sizes: 0x20_1000,
            ..ADVICE
        };
        let other = PostcopyAdvice {
            target_page_size: 1024,
            ..ADVICE
        };
        assert_eq!(advise(Some(ADVICE), Some(ADVICE)), Ok(()));
        assert_eq!(advise(None, None), Ok(()));
        assert_eq!(advise(Some(ADVICE), None), Err(OrderError::RamNotAdvised));
        assert_eq!(advise(None, Some(ADVICE)), Err(OrderError::RamAdvised));
        assert_eq!(
            advise(Some(ADVICE), Some(huge)),
            Err(OrderError::RamPageSizes {
                received: 0x20_1000,
                local: 0x1000
            })
        );
        assert_eq!(
            advise(Some(ADVICE), Some(other)),
            Err(OrderError::TargetPageSize {
                received: 1024,
                local: 4096
            })
        );
        for any in [None, Some(huge), Some(other)] {
            let mut order = PostcopyOrder::of_any_source();
            assert_eq!(order.command(&Command::PostcopyAdvise(any)), Ok(()));
        }
    }

    #[test]
    fn no_ram_is_dropped_where_only_dirty_bitmaps_come_by_postcopy() {
        let mut order = PostcopyOrder::new(None);
        order.command(&Command::PostcopyAdvise(None)).unwrap();
        assert_eq!(
            order.command(&discard()),
            Err(OrderError::DiscardWithoutRam)
        );
        order.command(&Command::Packaged { size: 10 }).unwrap();
        order.packaged(&Command::PostcopyListen).unwrap();
        order.packaged(&Command::PostcopyRun).unwrap();
        assert_eq!(order.end_of_stream(), Ok(EndOfStream::Postcopy));
    }

    proptest! {
        /// Whatever comes: the guest runs only after LISTEN and RUN, and an end is an end.
        #[test]
        fn no_order_of_events_leads_past_a_step(
            events in proptest::collection::vec((0_u8..4, 0_usize..10), 0..60),
        ) {
            let mut order = PostcopyOrder::new(Some(ADVICE));
            for (kind, index) in events {
                let before = order.state();
                let result = match kind {
                    0 => order.command(&commands()[index]),
                    1 => order.packaged(&commands()[index]),
                    2 if index == 0 => order.end_of_stream().map(drop),
                    2 => order.interrupted(),
                    _ => order.reconnected(),
                };
                let after = order.state();
                prop_assert!(result.is_ok() || before == after);
                if after == PostcopyState::Running && before != after {
                    prop_assert!(matches!(
                        before,
                        PostcopyState::Listening | PostcopyState::Recovering
                    ));
                }
                if before == PostcopyState::Ended {
                    prop_assert!(result.is_err());
                }
            }
        }
    }
}
