//! Standard output and standard error.
//!
//! The reader of a pipe may go before a program has written everything (`| head -1`). `println!` panics
//! then. A program whose product is its output ends quietly with the status that a shell gives a program
//! ended by SIGPIPE ([`CLOSED`]); a program that does something else goes on ([`say`]).

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::errors::chain;

/// The exit status of a program whose output is not read: 128 and the number of SIGPIPE.
pub const CLOSED: u8 = 141;

/// Standard output, which tells a reader that has gone from other errors.
#[derive(Debug)]
pub struct Output<W = io::Stdout>(W);

impl Output {
    /// Returns standard output.
    #[must_use]
    pub fn standard() -> Self {
        Self(io::stdout())
    }
}

impl<W: Write> Output<W> {
    /// Returns `out` as the output.
    pub const fn new(out: W) -> Self {
        Self(out)
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(closed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(closed)
    }
}

fn closed(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => io::Error::new(io::ErrorKind::BrokenPipe, Closed),
        _ => error,
    }
}

/// Nobody reads standard output any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the reader of the output has closed it")]
pub struct Closed;

/// Whether the error, or one of its causes, is that nobody reads standard output.
#[must_use]
pub fn is_closed(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        error.is::<Closed>()
            || error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
                .is_some_and(|inner| inner.is::<Closed>())
    })
}

/// Returns the exit status of a program and says what went wrong, if anything did.
pub fn end<T: Into<ExitCode>>(
    program: &str,
    failed: ExitCode,
    result: Result<T, Box<dyn Error>>,
) -> ExitCode {
    match result {
        Ok(done) => done.into(),
        Err(error) if is_closed(&*error) => CLOSED.into(),
        Err(error) => {
            complain(format_args!("{program}: {}", chain(&*error)));
            failed
        }
    }
}

/// Writes a line to standard output, for a program that goes on if nobody reads it.
pub fn say(line: impl fmt::Display) {
    // The program's work is not its output.
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
}

/// Writes a line to standard error.
pub fn complain(line: impl fmt::Display) {
    // There is nobody else to tell.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Escapes what is not printable ASCII in JSON, as Python's `json` does: outside of strings there is
/// nothing else but line breaks.
#[must_use]
pub fn ascii_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if matches!(c, ' '..='~' | '\n') {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_has_gone_is_told_from_other_errors() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let error = Output::new(writer).write_all(b"x").unwrap_err();
        assert!(is_closed(&error));
        assert_eq!(
            end::<ExitCode>("test", ExitCode::FAILURE, Err(error.into())),
            ExitCode::from(CLOSED)
        );
        // A source's connection that broke is no output.
        assert!(!is_closed(&io::Error::from(io::ErrorKind::BrokenPipe)));
    }

    #[test]
    fn json_is_printable_ascii() {
        let json = "{\n  \"a\u{7f}\u{9b}\u{202e}\u{1f600}\": 1\n}";
        assert_eq!(
            ascii_json(json),
            "{\n  \"a\\u007f\\u009b\\u202e\\ud83d\\ude00\": 1\n}"
        );
    }
}
