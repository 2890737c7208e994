//! The program; see [`colo_vmm::cli`].

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use colo_vmm::cli::Cli;
use colo_vmm::error_chain::chain;
use colo_vmm::outlet::{Outlet, complain};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(Mutex::new(Outlet::new(std::io::stderr())))
        // It would be said on standard error itself, and waited for.
        .log_internal_errors(false)
        .init();
    Cli::parse().run().unwrap_or_else(|error| {
        complain(format!("colo-vmm: {}", chain(&*error)));
        ExitCode::FAILURE
    })
}
