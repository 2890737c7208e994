//! The program; see [`colo_vmm::cli`].

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use colo_vmm::cli::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    Cli::parse().run().unwrap_or_else(|error| {
        eprintln!("colo-vmm: {}", chain(&*error));
        ExitCode::FAILURE
    })
}

/// An error and its causes, on one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
