//! The program; see [`stream_inspect::cli`].

use std::process::ExitCode;

use clap::Parser;
use stream_inspect::cli::Cli;
use tool_support::output::{Output, end};

fn main() -> ExitCode {
    let done = Cli::parse().run(&mut Output::standard());
    end(
        "stream-inspect",
        ExitCode::FAILURE,
        done.map(|()| ExitCode::SUCCESS),
    )
}
