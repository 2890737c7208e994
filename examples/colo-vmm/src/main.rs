//! The program; see [`colo_vmm::cli`].

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Mutex;

use colo_vmm::cli::Cli;
use colo_vmm::error_chain::chain;
use colo_vmm::lossy_writer::{LossyWriter, print_error};
use tool_support::arguments;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    let log = fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(Mutex::new(LossyWriter::new(std::io::stderr())))
        // It would be said on standard error itself, and waited for.
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(log)
        .with(wanted())
        .init();
    arguments::parse::<Cli>().run().unwrap_or_else(|error| {
        print_error(format!("colo-vmm: {}", chain(&*error)));
        ExitCode::FAILURE
    })
}

/// What of the log is wanted: targets and their levels, as in `RUST_LOG=colo_vmm=debug,warn`.
fn wanted() -> Targets {
    (std::env::var("RUST_LOG").ok())
        .and_then(|wanted| wanted.parse().ok())
        .unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN))
}
