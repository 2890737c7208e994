//! The program; see [`stream_relay::cli`].

use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use stream_relay::cli::Cli;
use stream_relay::relay::RelayError;
use tool_support::output::{complain, end};

/// How often a source that waits for an answer nobody has is looked at.
const POLL: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let done = tool_support::arguments::parse::<Cli>().run();
    if let Err(error) = &done {
        wait_with_the_source(&**error);
    }
    end(
        "stream-relay",
        ExitCode::FAILURE,
        done.map(|()| ExitCode::SUCCESS),
    )
}

/// Keeps a source waiting whose guest the destination may run: only an operator can know, by a signal
/// to the relay or by ending the source.
fn wait_with_the_source(error: &(dyn Error + 'static)) {
    if let Some(error @ RelayError::Uncertain { waiting, .. }) = error.downcast_ref() {
        complain(format_args!("stream-relay: {error}"));
        while waiting.is_waiting() {
            thread::sleep(POLL);
        }
    }
}
