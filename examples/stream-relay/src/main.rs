//! The program; see [`stream_relay::cli`].

use std::process::ExitCode;

use clap::Parser;
use stream_relay::cli::{Cli, chain};

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stream-relay: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}
