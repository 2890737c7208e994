//! Why the demo could not be played to its end.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use qmp_types::{ClientError, ColoExitReason, QmpError};

use super::side::Role;
use crate::machine::MachineError;

/// Why the demo could not be played to its end. A guest that lost something is not an error but a
/// result; see [`run`](super::run).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DemoError {
    /// There is no KVM; `--sim` does without.
    #[error(transparent)]
    Kvm(MachineError),
    /// Only multifd channels compress.
    #[error("--compression needs channels to compress: give --multifd 1 or more")]
    CompressionWithoutMultifd,
    /// The host refused something.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A process has ended that should not have.
    #[error("the {role} ended ({status}) before its {waiting_for}{stderr}")]
    Ended {
        /// Which side.
        role: Role,
        /// How it ended.
        status: ExitStatus,
        /// What was waited for.
        waiting_for: String,
        /// What it said last.
        stderr: LastWords,
    },
    /// A deadline has passed.
    #[error("no {waiting_for} of the {role} within {} s{stderr}", .limit.as_secs())]
    Deadline {
        /// Which side.
        role: Role,
        /// What was waited for.
        waiting_for: String,
        /// How long.
        limit: Duration,
        /// What it said last.
        stderr: LastWords,
    },
    /// A side's QMP connection has ended although its process has not.
    #[error("the {role} closed its QMP connection before its {waiting_for}{stderr}")]
    Closed {
        /// Which side.
        role: Role,
        /// What was waited for.
        waiting_for: String,
        /// What it said last.
        stderr: LastWords,
    },
    /// What a side said is not QMP.
    #[error("the {role} does not speak QMP")]
    Protocol {
        /// Which side.
        role: Role,
        /// What is wrong.
        #[source]
        source: ClientError,
    },
    /// An answer or event is not of the form that it should have.
    #[error("the {role}'s {what} is not as documented")]
    Answer {
        /// Which side.
        role: Role,
        /// Which answer or event.
        what: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A command was refused.
    #[error("the {role} refused {command}: {error}{stderr}")]
    Refused {
        /// Which side.
        role: Role,
        /// Which command.
        command: &'static str,
        /// Why.
        error: QmpError,
        /// What it said last.
        stderr: LastWords,
    },
    /// The migration has failed.
    #[error("the migration failed on the {role}: {cause}{stderr}")]
    Migration {
        /// Which side says so.
        role: Role,
        /// Why, as far as `query-migrate` says.
        cause: String,
        /// What it said last.
        stderr: LastWords,
    },
    /// COLO has ended before anybody was killed.
    #[error("the {role} left COLO by itself (reason {reason}){stderr}")]
    ColoEnded {
        /// Which side.
        role: Role,
        /// The reason it gives.
        reason: ColoExitReason,
        /// What it said last.
        stderr: LastWords,
    },
    /// The user wants it to end.
    #[error("interrupted")]
    Interrupted,
}

impl DemoError {
    /// For `map_err`: the host refused to do `what`.
    pub(super) fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host {
            what: what.into(),
            source,
        }
    }
}

/// The end of what a process wrote to its standard error.
#[derive(Debug)]
pub struct LastWords {
    role: Role,
    text: String,
}

/// How much of it is shown, lines.
const LINES: usize = 12;

impl LastWords {
    /// Reads them from the file that the process writes to.
    pub(super) fn of(role: Role, file: &Path) -> Self {
        // Errors are told with or without them.
        let text = std::fs::read(file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.trim_end().lines().collect();
        let tail = lines.get(lines.len().saturating_sub(LINES)..);
        Self {
            role,
            text: tail.unwrap_or_default().join("\n"),
        }
    }
}

impl fmt::Display for LastWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            return write!(f, " (the {} wrote nothing to stderr)", self.role);
        }
        write!(f, "; the {} wrote:\n{}\n", self.role, self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_the_end_of_what_the_process_wrote() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let empty = LastWords::of(Role::Primary, file.path());
        assert_eq!(empty.to_string(), " (the primary wrote nothing to stderr)");
        let text: String = (1..=30).map(|n| format!("line {n}\n")).collect();
        std::fs::write(file.path(), text).unwrap();
        let error = DemoError::Deadline {
            role: Role::Secondary,
            waiting_for: "COLO_EXIT".to_owned(),
            limit: Duration::from_secs(30),
            stderr: LastWords::of(Role::Secondary, file.path()),
        };
        let text = error.to_string();
        assert!(text.starts_with(
            "no COLO_EXIT of the secondary within 30 s; the secondary wrote:\nline 19\n"
        ));
        assert!(text.ends_with("line 30\n"));
    }
}
