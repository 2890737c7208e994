//! The program; see [`stream_inspect::cli`].

use std::process::ExitCode;

use stream_inspect::cli::Cli;
use tool_support::output::{Output, end};

fn main() -> ExitCode {
    let done = tool_support::arguments::parse::<Cli>().run(&mut Output::standard());
    end(
        "stream-inspect",
        ExitCode::FAILURE,
        done.map(|()| ExitCode::SUCCESS),
    )
}
