//! The program; see [`vmstate_check::cli`].

use std::process::ExitCode;

use tool_support::output::{Output, end};
use vmstate_check::cli::{Cli, UNUSABLE};

fn main() -> ExitCode {
    let verdict = tool_support::arguments::parse::<Cli>().run(&mut Output::standard());
    end("vmstate-check", UNUSABLE.into(), verdict)
}
