//! The order of a checkpoint, and what becomes of one that does not go well.

#[cfg(test)]
mod tests {
    use colo_core::raw::{Action, Event, Machine, Primary, Script, Secondary, encode_message};
    use colo_core::{
        Cause, ColoExit, ExitReason, Message, OnPeerLoss, Outcome, PeerLoss, Resume, Role, Step,
        Wait,
    };

    const CLOSED: Event = Event::PeerLost(PeerLoss::Closed);

    /// How an action ends when all goes well. Nobody ever decides anything.
    fn well(action: Action) -> Option<Event> {
        match action {
            Action::Perform(Step::Await(Wait::Message(message))) => Some(Event::Message(message)),
            Action::Perform(Step::Await(Wait::CheckpointDue)) => Some(Event::CheckpointDue),
            Action::Perform(Step::Await(Wait::Decision)) | Action::Finish(_) => None,
            Action::Perform(_) | Action::EmitExit(_) => Some(Event::Done),
        }
    }

    /// Lets all go well until `stop` is to be done.
    fn run_to<S: Script>(machine: &mut Machine<S>, stop: Step) {
        while machine.action() != Action::Perform(stop) {
            let event = well(machine.action()).expect("the step comes");
            machine.handle(event).unwrap();
        }
    }

    /// Lets all go well to the end, or to a decision, and lists what was done.
    fn run_out<S: Script>(machine: &mut Machine<S>) -> Vec<Action> {
        let mut actions = vec![machine.action()];
        while let Some(event) = well(machine.action()) {
            machine.handle(event).unwrap();
            actions.push(machine.action());
        }
        actions
    }

    /// One round of a script from `first`, the steps between two visits of it.
    fn round<S: Script>(mut machine: Machine<S>, first: Step) -> Vec<Step> {
        run_to(&mut machine, first);
        let mut steps = vec![];
        loop {
            let Action::Perform(step) = machine.action() else {
                panic!("{}", machine.action());
            };
            if step == first && !steps.is_empty() {
                return steps;
            }
            steps.push(step);
            machine.handle(well(machine.action()).unwrap()).unwrap();
        }
    }

    const fn message(message: Message) -> Step {
        Step::Await(Wait::Message(message))
    }

    fn exit_of(actions: &[Action]) -> ColoExit {
        let exits: Vec<_> = actions
            .iter()
            .filter_map(|action| match action {
                Action::EmitExit(exit) => Some(*exit),
                _ => None,
            })
            .collect();
        assert_eq!(exits.len(), 1, "{actions:?}");
        exits[0]
    }

    fn replaces_the_guest(action: &Action) -> bool {
        matches!(
            action,
            Action::Perform(Step::Reset | Step::Flush | Step::InstallDevices)
        )
    }

    /// A checkpoint of a primary that does not resume early, until output has been released.
    const UNTIL_RELEASED: [Step; 13] = [
        Step::Await(Wait::CheckpointDue),
        Step::Send(Message::CheckpointRequest),
        message(Message::CheckpointReply),
        Step::PauseVm,
        Step::CutOutput,
        Step::CheckReplication,
        Step::CheckpointReplication,
        Step::SaveDevices,
        Step::Send(Message::VmstateSend),
        Step::SendRam,
        Step::SendDevices,
        message(Message::VmstateReceived),
        Step::ReleaseOutput,
    ];

    #[test]
    fn a_checkpoint_on_the_primary_stops_the_vm_after_the_reply_and_not_before() {
        let loaded = message(Message::VmstateLoaded);
        for (resume, then) in [
            (Resume::OnLoaded, [loaded, Step::ResumeVm]),
            (Resume::OnReceived, [Step::ResumeVm, loaded]),
        ] {
            assert_eq!(
                round(
                    Primary::resuming(resume, OnPeerLoss::Wait),
                    Step::Await(Wait::CheckpointDue)
                ),
                [&UNTIL_RELEASED[..], &then, &[Step::ReportCheckpoint]].concat(),
                "{resume:?}"
            );
        }
    }

    #[test]
    fn a_primary_that_resumes_early_has_copied_all_before_and_sends_it_after() {
        assert_eq!(
            round(
                Primary::resuming(Resume::OnLocalCopy, OnPeerLoss::Wait),
                Step::Await(Wait::CheckpointDue)
            ),
            [
                Step::Await(Wait::CheckpointDue),
                Step::Send(Message::CheckpointRequest),
                message(Message::CheckpointReply),
                Step::CopyRam,
                Step::PauseVm,
                Step::CutOutput,
                Step::CheckReplication,
                Step::CheckpointReplication,
                Step::SaveDevices,
                Step::FreezeRam,
                Step::ResumeVm,
                Step::Send(Message::VmstateSend),
                Step::SendRam,
                Step::SendDevices,
                message(Message::VmstateReceived),
                Step::ReleaseOutput,
                message(Message::VmstateLoaded),
                Step::ReportCheckpoint,
            ]
        );
    }

    #[test]
    fn a_checkpoint_on_the_secondary_changes_nothing_until_all_of_it_was_checked() {
        assert_eq!(
            round(
                Secondary::new(OnPeerLoss::Wait),
                message(Message::CheckpointRequest)
            ),
            [
                message(Message::CheckpointRequest),
                Step::Send(Message::CheckpointReply),
                Step::PauseVm,
                message(Message::VmstateSend),
                Step::ReceiveRam,
                message(Message::VmstateSize),
                Step::ReceiveDevices,
                Step::StageDevices,
                Step::CheckReplication,
                Step::Send(Message::VmstateReceived),
                Step::Reset,
                Step::Flush,
                Step::InstallDevices,
                Step::CheckpointReplication,
                Step::DiscardOutput,
                Step::Send(Message::VmstateLoaded),
                Step::ResumeVm,
                Step::ReportCheckpoint,
            ]
        );
    }

    #[test]
    fn the_return_path_carries_what_qemu_sends_in_two_checkpoints() {
        let mut machine = Secondary::new(OnPeerLoss::Wait);
        let mut wire = vec![];
        let mut checkpoints = 0;
        while checkpoints < 2 {
            match machine.action() {
                Action::Perform(Step::Send(message)) => wire.extend(encode_message(message)),
                Action::Perform(Step::ReportCheckpoint) => checkpoints += 1,
                _ => {}
            }
            machine.handle(well(machine.action()).unwrap()).unwrap();
        }
        let numbers: Vec<u8> = wire.chunks(4).map(|message| message[3]).collect();
        assert_eq!(numbers, [0, 2, 5, 6, 2, 5, 6]);
    }

    #[test]
    fn a_failover_in_the_middle_of_a_checkpoint_keeps_the_last_one() {
        for middle in [
            message(Message::VmstateSend),
            Step::ReceiveRam,
            Step::ReceiveDevices,
            Step::StageDevices,
        ] {
            let mut machine = Secondary::new(OnPeerLoss::Wait);
            run_to(&mut machine, middle);
            if machine.handle(Event::FailoverRequested).unwrap().is_none() {
                machine.handle(Event::Done).unwrap();
            }
            let actions = run_out(&mut machine);
            assert!(!actions.iter().any(replaces_the_guest), "{actions:?}");
            assert_eq!(exit_of(&actions).reason(), ExitReason::Request);
            assert_eq!(
                actions[actions.len() - 2..],
                [
                    Action::Perform(Step::ResumeVm),
                    Action::Finish(Outcome::TookOver)
                ]
            );
        }
    }

    #[test]
    fn a_failover_in_the_commit_comes_after_it() {
        let mut machine = Secondary::new(OnPeerLoss::Wait);
        run_to(&mut machine, Step::Flush);
        assert_eq!(machine.handle(Event::FailoverRequested), Ok(None));
        let actions = run_out(&mut machine);
        assert_eq!(
            actions,
            [
                Action::Perform(Step::Flush),
                Action::Perform(Step::InstallDevices),
                Action::Perform(Step::CheckpointReplication),
                Action::Perform(Step::DiscardOutput),
                Action::Perform(Step::Disconnect),
                Action::EmitExit(ColoExit {
                    role: Role::Secondary,
                    cause: Cause::FailoverRequested
                }),
                Action::Perform(Step::StopReplication { failover: true }),
                Action::Perform(Step::OpenOutput),
                Action::Perform(Step::ResumeVm),
                Action::Finish(Outcome::TookOver),
            ]
        );
    }

    #[test]
    fn a_checkpoint_whose_receipt_may_have_been_read_is_carried_on() {
        let mut machine = Secondary::new(OnPeerLoss::TakeOver);
        run_to(&mut machine, Step::Send(Message::VmstateReceived));
        machine.handle(CLOSED).unwrap();
        let actions = run_out(&mut machine);
        assert_eq!(actions.iter().filter(|a| replaces_the_guest(a)).count(), 3);
        assert_eq!(
            exit_of(&actions).cause,
            Cause::PeerLost {
                during: Step::Send(Message::VmstateReceived),
                loss: PeerLoss::Closed
            }
        );
        assert_eq!(actions.last(), Some(&Action::Finish(Outcome::TookOver)));
    }

    #[test]
    fn a_commit_that_breaks_off_leaves_a_vm_that_never_runs() {
        for step in [Step::Reset, Step::Flush, Step::InstallDevices] {
            let mut machine = Secondary::new(OnPeerLoss::TakeOver);
            run_to(&mut machine, step);
            machine.handle(Event::FailoverRequested).unwrap();
            machine.handle(Event::Failed).unwrap();
            let actions = run_out(&mut machine);
            assert!(!actions.contains(&Action::Perform(Step::ResumeVm)));
            let cause = Cause::StepFailed(step);
            assert_eq!(exit_of(&actions).cause, cause);
            assert_eq!(
                actions.last(),
                Some(&Action::Finish(Outcome::Broken(cause)))
            );
        }
    }

    #[test]
    fn a_connection_that_a_request_has_shut_is_not_the_reason_of_the_end() {
        let mut machine = Primary::new(OnPeerLoss::Wait);
        run_to(&mut machine, Step::SendRam);
        assert_eq!(machine.handle(Event::FailoverRequested), Ok(None));
        machine.handle(CLOSED).unwrap();
        assert_eq!(
            exit_of(&run_out(&mut machine)).reason(),
            ExitReason::Request
        );
    }

    #[test]
    fn a_silent_peer_is_given_up_at_the_deadline_and_named() {
        let mut machine = Primary::new(OnPeerLoss::Wait);
        run_to(&mut machine, message(Message::VmstateLoaded));
        machine.handle(Event::DeadlineExpired).unwrap();
        let actions = run_out(&mut machine);
        let exit = exit_of(&actions);
        assert_eq!(exit.reason(), ExitReason::Error);
        assert_eq!(
            exit.to_string(),
            "colo ended on the primary: deadline passed while waiting for vmstate-loaded"
        );
        assert_eq!(
            actions.last(),
            Some(&Action::Perform(Step::Await(Wait::Decision)))
        );
    }

    #[test]
    fn a_message_out_of_turn_ends_colo_and_both_are_named() {
        let mut machine = Secondary::new(OnPeerLoss::Wait);
        run_to(&mut machine, message(Message::CheckpointRequest));
        machine
            .handle(Event::Message(Message::VmstateSend))
            .unwrap();
        assert_eq!(
            exit_of(&run_out(&mut machine)).cause.to_string(),
            "unexpected colo message vmstate-send, expected checkpoint-request"
        );
    }

    /// Ends a script at each of its steps with `event`, where it belongs there.
    fn every_end_has_one_exit<S: Script>(
        mut machine: Machine<S>,
        event: Event,
        on_loss: OnPeerLoss,
    ) {
        for _ in 0..64 {
            let mut ended = machine.clone();
            if let Ok(next) = ended.handle(event) {
                if next.is_none() {
                    ended.handle(Event::Done).unwrap();
                }
                let actions = run_out(&mut ended);
                exit_of(&actions);
                let end = actions.last();
                let decided = matches!(event, Event::FailoverRequested | Event::Quit);
                if decided || on_loss == OnPeerLoss::TakeOver {
                    assert!(matches!(end, Some(Action::Finish(_))), "{actions:?}");
                }
            }
            machine.handle(well(machine.action()).unwrap()).unwrap();
        }
    }

    #[test]
    fn whatever_ends_colo_wherever_it_is_is_reported_once() {
        for event in [
            Event::Failed,
            CLOSED,
            Event::DeadlineExpired,
            Event::UnknownMessage(7),
            Event::FailoverRequested,
            Event::Quit,
        ] {
            for on_loss in [OnPeerLoss::Wait, OnPeerLoss::TakeOver] {
                for resume in [Resume::OnLoaded, Resume::OnReceived, Resume::OnLocalCopy] {
                    every_end_has_one_exit(Primary::resuming(resume, on_loss), event, on_loss);
                }
                every_end_has_one_exit(Secondary::new(on_loss), event, on_loss);
            }
        }
    }

    #[test]
    fn an_event_that_does_not_belong_to_the_action_changes_nothing() {
        let mut machine = Primary::new(OnPeerLoss::Wait);
        let before = machine.clone();
        let error = machine.handle(Event::Done).unwrap_err();
        assert_eq!(
            error.to_string(),
            "event Done does not belong to waiting for checkpoint-ready"
        );
        assert_eq!(machine, before);
    }
}
