//! `cargo bench --bench vs_qemu` runs the program `vs_qemu` with the arguments behind `--`. With
//! `--test` it is the program's smoke run, and with a filter for another benchmark nothing.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vs_qemu"));
    match arguments.first() {
        Some(filter) if !filter.starts_with('-') && !"vs_qemu".contains(filter.as_str()) => {
            return ExitCode::SUCCESS;
        }
        Some(filter) if !filter.starts_with('-') => command.args(&arguments[1..]),
        _ => command.args(&arguments),
    };
    let is_test = arguments.iter().any(|a| a == "--test");
    if is_test {
        // Figures of a smoke run are worth nothing.
        command = Command::new(env!("CARGO_BIN_EXE_vs_qemu"));
        command.arg("--smoke");
    }
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            if let Some(signal) = status.signal() {
                eprintln!("vs_qemu ended by signal {signal}");
            }
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("vs_qemu does not start: {e}");
            ExitCode::FAILURE
        }
    }
}
