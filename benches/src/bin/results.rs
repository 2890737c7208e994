//! One run of all comparisons with QEMU, and RESULTS.md from its figures.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ::tests::Result;
use benches::render;
use benches::report::{LOCAL_COPY, Report};
use clap::{Parser, Subcommand};

/// Takes the figures of RESULTS.md.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// Where the figures of the run are.
    #[arg(long, global = true, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/results/results.json"))]
    json: PathBuf,
    /// Where they are told.
    #[arg(long, global = true, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/RESULTS.md"))]
    markdown: PathBuf,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum What {
    /// Measure all, and render.
    Run {
        /// A check that everything runs, in seconds; its figures say nothing and are kept nowhere.
        #[arg(long)]
        smoke: bool,
    },
    /// Render the figures of the last run.
    Render,
}

/// The programs of a run, with their arguments.
fn plan() -> Vec<(&'static str, Vec<&'static str>)> {
    let words = |text: &'static str| text.split(' ').collect::<Vec<_>>();
    let both = ["--colo-options", "", "--colo-options", LOCAL_COPY];
    let with = |text, more: &[&'static str]| [words(text).as_slice(), more].concat();
    vec![
        ("vs_qemu", with("--transport veth,unix", &both)),
        ("throughput", words("--ends qemu-qemu,us-us")),
        (
            "vs_qemu",
            with("--guest-work --dirty-pages 256 --rounds 3", &both),
        ),
        ("failover", words("--runs 30")),
    ]
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.what {
        What::Run { smoke: true } => smoke(),
        What::Run { smoke: false } => {
            run(&[], Some(&arguments.json)).and_then(|_| render(&arguments))
        }
        What::Render => render(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("results: {e}");
            ExitCode::FAILURE
        }
    }
}

fn smoke() -> Result<()> {
    let report = run(&["--smoke"], None)?;
    let text = render::results(&report);
    println!("{} bytes of Markdown", text.len());
    Ok(())
}

fn render(arguments: &Arguments) -> Result<()> {
    let text = render::results(&Report::read(&arguments.json)?);
    if text.len() > render::MOST {
        let (length, most) = (text.len(), render::MOST);
        return Err(format!("{length} bytes are more than the {most} that may be").into());
    }
    fs::write(&arguments.markdown, text)?;
    println!("{} written", arguments.markdown.display());
    Ok(())
}

/// Runs each program of the plan, with `more` arguments, and keeps the figures so far in `file`.
fn run(more: &[&str], file: Option<&Path>) -> Result<Report> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "--locked",
        "--package",
        "benches",
        "--bins",
    ]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    succeed(build.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    let this = env::current_exe()?;
    let programs = this.parent().unwrap_or(Path::new("."));
    let dir = tempfile::tempdir()?;
    let mut report = Report::new(None);
    for (number, (program, arguments)) in plan().into_iter().enumerate() {
        let part = dir.path().join(number.to_string());
        let mut command = Command::new(programs.join(program));
        command.args(arguments).args(more).arg("--json").arg(&part);
        eprintln!("{command:?}");
        succeed(&mut command)?;
        let mut part = Report::read(&part)?;
        // The programs were built at the beginning: what has changed since, `file` for one, is not in them.
        part.host.commit.clone_from(&report.host.commit);
        report.merge(part)?;
        if let Some(file) = file {
            fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
            report.write(file)?;
        }
    }
    Ok(report)
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{:?}: {status}", command.get_program()).into())
    }
}
