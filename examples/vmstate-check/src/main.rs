//! The program; see [`vmstate_check::cli`].

use std::process::ExitCode;

use clap::Parser;
use vmstate_check::cli::{Cli, UNUSABLE, chain};

fn main() -> ExitCode {
    match Cli::parse().run(&mut std::io::stdout().lock()) {
        Ok(verdict) => verdict.into(),
        Err(error) => {
            eprintln!("vmstate-check: {}", chain(&*error));
            UNUSABLE.into()
        }
    }
}
