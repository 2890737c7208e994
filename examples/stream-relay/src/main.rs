//! The program; see [`stream_relay::cli`].

use std::process::ExitCode;

use clap::Parser;
use stream_relay::cli::Cli;
use tool_support::output::end;

fn main() -> ExitCode {
    let done = Cli::parse().run();
    end(
        "stream-relay",
        ExitCode::FAILURE,
        done.map(|()| ExitCode::SUCCESS),
    )
}
