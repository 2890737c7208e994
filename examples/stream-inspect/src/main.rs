//! The program; see [`stream_inspect::cli`].

use std::process::ExitCode;

use clap::Parser;
use stream_inspect::cli::{Cli, chain};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stream-inspect: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}
