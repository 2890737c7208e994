//! What a COLO pair has printed, and whether it proves that the guest lost nothing.
//!
//! The guest counts: its n-th line is n, as eight hexadecimal digits, and it checks its own memory
//! on the way. So what a pair may print is known to the byte:
//!
//! - the primary prints 1, 2, 3, … without a gap;
//! - the secondary prints nothing while it is one: its output is held back, and thrown away at each
//!   checkpoint;
//! - when the secondary takes over, it goes on exactly where the primary was at the last checkpoint
//!   that the secondary has. What the primary printed after that, the survivor prints again.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use qmp_types::ColoCheckpoint;
use serde::Serialize;

use super::side::Role;

/// Bytes of a line: eight digits and a line feed.
pub const LINE: usize = 9;

/// How much of an unexpected text is repeated, bytes.
const EXCERPT: usize = 40;

/// What is left of a pair.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// Who was killed, if anybody.
    pub killed: Option<Role>,
    /// All the primary has printed.
    pub primary: &'a [u8],
    /// All the secondary has printed.
    pub secondary: &'a [u8],
    /// How much of that while it was the secondary, bytes.
    pub leaked: u64,
    /// The primary's checkpoints.
    pub primary_checkpoints: &'a [ColoCheckpoint],
    /// The secondary's checkpoints.
    pub secondary_checkpoints: &'a [ColoCheckpoint],
    /// Whether both sides were asked for hashes.
    pub verify: bool,
}

/// What the evidence shows.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// Lines that the primary has printed.
    pub primary_lines: u64,
    /// Lines that the secondary has printed.
    pub secondary_lines: u64,
    /// Lines of the guest as its user sees it: the primary's up to the checkpoint, then the
    /// survivor's.
    pub guest_lines: u64,
    /// Bytes of the primary's output at the last checkpoint that the secondary has, where it went
    /// on; only if it took over.
    pub cut_bytes: Option<u64>,
    /// Lines that the primary printed after that checkpoint and the survivor printed again.
    pub repeated_lines: u64,
    /// Checkpoints of which both sides gave the hashes of RAM and devices, and gave the same.
    pub equal_hashes: u64,
    /// What should not be. The guest lost nothing if this is empty.
    pub violations: Vec<Violation>,
}

impl Proof {
    /// Whether the guest lost nothing.
    pub fn holds(&self) -> bool {
        self.violations.is_empty()
    }
}

/// Whose output a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// One side's.
    Of(Role),
    /// The guest's, across the failover.
    Guest,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Of(role) => write!(f, "the {role}'s output"),
            Self::Guest => f.write_str("the guest's output across the failover"),
        }
    }
}

/// Something that contradicts the claim that the guest lost nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The guest has found a page that is not as it left it.
    #[error("{output}, line {line}: the guest found its memory damaged: {text:?}")]
    SelfCheck {
        output: Output,
        line: u64,
        text: String,
    },
    /// A line is missing, out of order, or damaged.
    #[error("{output}, line {line}: expected {expected:?}, found {found:?}")]
    NotConsecutive {
        output: Output,
        line: u64,
        expected: String,
        found: String,
    },
    /// Somebody else could have seen it, and it may never have happened.
    #[error("the secondary printed {bytes} bytes while it was the secondary")]
    Leaked { bytes: u64 },
    /// The secondary has taken over, but from what?
    #[error("the secondary took over without a checkpoint")]
    NoCheckpoint,
    /// The secondary went on where there was no checkpoint.
    #[error(
        "the secondary went on after {cut} bytes of output: the checkpoint before its last is at \
         {earliest}, and the primary printed {printed}"
    )]
    Cut {
        cut: u64,
        earliest: u64,
        printed: u64,
    },
    /// The survivor does not go on.
    #[error("the {0} printed nothing after the failover")]
    Silent(Role),
    /// The sides of a checkpoint differ.
    #[error(
        "checkpoint {checkpoint}: hash of {what}: {primary} on the primary, {secondary} on the secondary"
    )]
    Hash {
        checkpoint: u64,
        what: &'static str,
        primary: String,
        secondary: String,
    },
    /// Nothing to compare.
    #[error("no checkpoint was verified, although both sides were asked for hashes")]
    NothingVerified,
}

impl Serialize for Violation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Judges the evidence.
pub fn prove(evidence: &Evidence<'_>) -> Proof {
    let mut violations = Vec::new();
    let primary = Output::Of(Role::Primary);
    violations.extend(counts_from_one(primary, evidence.primary).err());
    if evidence.leaked > 0 {
        violations.push(Violation::Leaked {
            bytes: evidence.leaked,
        });
    }

    let primary_lines = lines(evidence.primary);
    let mut proof = Proof {
        primary_lines,
        secondary_lines: lines(evidence.secondary),
        guest_lines: primary_lines,
        cut_bytes: None,
        repeated_lines: 0,
        equal_hashes: 0,
        violations,
    };
    if evidence.killed == Some(Role::Primary) {
        proof.take_over(evidence);
    }
    proof.hashes(evidence);
    proof
}

impl Proof {
    /// The secondary has taken over.
    fn take_over(&mut self, evidence: &Evidence<'_>) {
        if evidence.secondary.is_empty() {
            self.violations.push(Violation::Silent(Role::Secondary));
        }
        let Some(last) = evidence.secondary_checkpoints.last() else {
            self.violations.push(Violation::NoCheckpoint);
            return;
        };
        // The newest that the primary lived to tell of. It may be the one before.
        let known = evidence
            .primary_checkpoints
            .iter()
            .rfind(|checkpoint| checkpoint.checkpoint <= last.checkpoint);
        let earliest = known.map_or(0, |known| known.serial_bytes);
        let cut = if known.is_some_and(|known| known.checkpoint == last.checkpoint) {
            earliest
        } else {
            resumed_at(evidence.secondary).unwrap_or(earliest)
        };
        self.cut_bytes = Some(cut);
        let before = usize::try_from(cut)
            .ok()
            .filter(|_| cut >= earliest)
            .and_then(|cut| evidence.primary.get(..cut));
        let Some(before) = before else {
            self.violations.push(Violation::Cut {
                cut,
                earliest,
                printed: evidence.primary.len() as u64,
            });
            return;
        };
        let guest = [before, evidence.secondary].concat();
        // If the primary's output is wrong before the cut, that has been said.
        if let Err(violation) = counts_from_one(Output::Guest, &guest)
            && counts_from_one(Output::Guest, before).is_ok()
        {
            self.violations.push(violation);
        }
        self.guest_lines = lines(&guest);
        self.repeated_lines = self
            .primary_lines
            .min(self.guest_lines)
            .saturating_sub(lines(before));
    }

    fn hashes(&mut self, evidence: &Evidence<'_>) {
        let secondary: BTreeMap<u64, &ColoCheckpoint> = evidence
            .secondary_checkpoints
            .iter()
            .map(|checkpoint| (checkpoint.checkpoint, checkpoint))
            .collect();
        for ours in evidence.primary_checkpoints {
            let Some(theirs) = secondary.get(&ours.checkpoint) else {
                continue;
            };
            let mut equal = true;
            for (what, ours_hash, theirs_hash) in [
                ("ram", &ours.ram_hash, &theirs.ram_hash),
                ("devices", &ours.device_hash, &theirs.device_hash),
            ] {
                if ours_hash.is_none() || ours_hash != theirs_hash {
                    equal = false;
                }
                // One of them alone is as wrong as two that differ.
                if ours_hash != theirs_hash {
                    let text = |hash: &Option<_>| {
                        hash.as_ref()
                            .map_or_else(|| "none".to_owned(), ToString::to_string)
                    };
                    self.violations.push(Violation::Hash {
                        checkpoint: ours.checkpoint,
                        what,
                        primary: text(ours_hash),
                        secondary: text(theirs_hash),
                    });
                }
            }
            self.equal_hashes += u64::from(equal);
        }
        if evidence.verify && self.equal_hashes == 0 {
            self.violations.push(Violation::NothingVerified);
        }
    }
}

/// Complete lines.
fn lines(text: &[u8]) -> u64 {
    text.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// How much a guest had printed before it printed `text`, judging by the first line that is
/// certainly whole.
fn resumed_at(text: &[u8]) -> Option<u64> {
    let begins = text.iter().position(|&byte| byte == b'\n')? + 1;
    let digits = text.get(begins..begins + LINE - 1)?;
    let number = u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?;
    (number.checked_sub(1)? * LINE as u64).checked_sub(begins as u64)
}

/// Whether a text is what a guest prints from its start on. It may end within a line.
fn counts_from_one(output: Output, text: &[u8]) -> Result<(), Violation> {
    for (number, found) in (1u64..).zip(text.chunks(LINE)) {
        let expected = format!("{number:08x}\n");
        if expected.as_bytes().starts_with(found) {
            continue;
        }
        // A guest that finds its memory damaged says so on a line of its own, and ends.
        let from = (number - 1) * LINE as u64;
        let excerpt = excerpt(text, from);
        return Err(if excerpt.starts_with('E') {
            Violation::SelfCheck {
                output,
                line: number,
                text: excerpt,
            }
        } else {
            Violation::NotConsecutive {
                output,
                line: number,
                expected,
                found: excerpt,
            }
        });
    }
    Ok(())
}

/// The text from an offset to the end of its line.
fn excerpt(text: &[u8], from: u64) -> String {
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(text.len());
    let rest = text.get(from..).unwrap_or_default();
    let end = rest
        .iter()
        .position(|&byte| byte == b'\n')
        .map_or(rest.len(), |end| end + 1)
        .min(EXCERPT);
    let line: Range<usize> = 0..end;
    String::from_utf8_lossy(rest.get(line).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use qmp_types::ColoMode;

    use super::*;

    fn counted(from: u64, to: u64) -> Vec<u8> {
        (from..=to)
            .flat_map(|n| format!("{n:08x}\n").into_bytes())
            .collect()
    }

    fn checkpoint(number: u64, serial_bytes: u64, ram_hash: Option<&str>) -> ColoCheckpoint {
        ColoCheckpoint {
            checkpoint: number,
            serial_bytes,
            ram_hash: ram_hash.map(str::to_owned),
            device_hash: ram_hash.map(|_| "d".to_owned()),
            mode: ColoMode::Primary,
            pause_us: 0,
            transfer_us: 0,
            loaded_us: 0,
            ahead_pages: 0,
            compared_pages: 0,
            unchanged_pages: 0,
            ram_bytes: 0,
            dirty_pages: 0,
            flushed_pages: 0,
            device_bytes: 0,
            steps: vec![],
        }
    }

    /// A failover of the primary after 20 lines, at a cut in the middle of line 12.
    struct Case {
        primary: Vec<u8>,
        secondary: Vec<u8>,
        leaked: u64,
        checkpoints: Vec<ColoCheckpoint>,
        other_checkpoints: Vec<ColoCheckpoint>,
        verify: bool,
        killed: Option<Role>,
    }

    const CUT: usize = 11 * LINE + 4;

    impl Case {
        fn primary_lost() -> Self {
            let checkpoints = vec![
                checkpoint(1, 40, Some("a")),
                checkpoint(2, CUT as u64, Some("b")),
            ];
            Self {
                primary: counted(1, 20),
                secondary: counted(1, 42)[CUT..].to_vec(),
                leaked: 0,
                other_checkpoints: checkpoints.clone(),
                checkpoints,
                verify: true,
                killed: Some(Role::Primary),
            }
        }

        fn prove(&self) -> Proof {
            prove(&Evidence {
                killed: self.killed,
                primary: &self.primary,
                secondary: &self.secondary,
                leaked: self.leaked,
                primary_checkpoints: &self.checkpoints,
                secondary_checkpoints: &self.other_checkpoints,
                verify: self.verify,
            })
        }

        fn violations(&self) -> Vec<String> {
            self.prove()
                .violations
                .iter()
                .map(ToString::to_string)
                .collect()
        }
    }

    #[test]
    fn a_survivor_that_goes_on_in_the_middle_of_a_line_has_lost_nothing() {
        let proof = Case::primary_lost().prove();
        assert_eq!(
            proof,
            Proof {
                primary_lines: 20,
                secondary_lines: 31,
                guest_lines: 42,
                cut_bytes: Some(CUT as u64),
                repeated_lines: 9,
                equal_hashes: 2,
                violations: vec![],
            }
        );
        assert!(proof.holds());
    }

    #[test]
    fn a_primary_that_was_killed_within_a_line_has_lost_nothing() {
        let mut case = Case::primary_lost();
        case.primary.truncate(19 * LINE + 7);
        assert_eq!(case.violations(), [""; 0]);
        assert_eq!(case.prove().repeated_lines, 8);
    }

    #[test]
    fn a_survivor_one_byte_behind_or_ahead_of_the_checkpoint_is_found() {
        for cut in [CUT - 1, CUT + 1] {
            let mut case = Case::primary_lost();
            case.secondary = counted(1, 42)[cut..].to_vec();
            let violations = case.violations();
            assert_eq!(violations.len(), 1, "{violations:?}");
            assert!(violations[0].starts_with(
                "the guest's output across the failover, line 12: expected \"0000000c\\n\""
            ));
        }
    }

    #[test]
    fn a_survivor_behind_the_checkpoint_by_whole_lines_is_found() {
        let mut case = Case::primary_lost();
        case.secondary = counted(1, 42)[CUT - 2 * LINE..].to_vec();
        assert_eq!(
            case.violations(),
            [
                "the guest's output across the failover, line 12: expected \"0000000c\\n\", \
                 found \"0000000a\\n\""
            ]
        );
    }

    #[test]
    fn a_gap_in_either_output_is_found_once() {
        let mut case = Case::primary_lost();
        case.primary = [counted(1, 15), counted(17, 21)].concat();
        assert_eq!(
            case.violations(),
            ["the primary's output, line 16: expected \"00000010\\n\", found \"00000011\\n\""]
        );
        let mut case = Case::primary_lost();
        case.primary.drain(9..18);
        assert_eq!(case.violations().len(), 1);
        let mut case = Case::primary_lost();
        case.secondary.drain(90..99);
        assert_eq!(case.violations().len(), 1);
    }

    #[test]
    fn a_guest_that_found_its_memory_damaged_is_heard() {
        let mut case = Case::primary_lost();
        case.secondary.truncate(5);
        case.secondary.extend(b"E00200000 00200001 00200002\n");
        assert_eq!(
            case.violations(),
            [
                "the guest's output across the failover, line 13: the guest found its memory \
                 damaged: \"E00200000 00200001 00200002\\n\""
            ]
        );
        case = Case::primary_lost();
        case.killed = None;
        case.secondary.clear();
        case.primary.extend(b"E00200");
        assert_eq!(
            case.violations(),
            ["the primary's output, line 21: the guest found its memory damaged: \"E00200\""]
        );
    }

    #[test]
    fn a_survivor_that_says_nothing_has_not_gone_on() {
        let mut case = Case::primary_lost();
        case.secondary.clear();
        assert_eq!(
            case.violations(),
            ["the secondary printed nothing after the failover"]
        );
    }

    #[test]
    fn a_failover_without_a_checkpoint_proves_nothing() {
        let mut case = Case::primary_lost();
        case.other_checkpoints.clear();
        case.verify = false;
        assert_eq!(
            case.violations(),
            ["the secondary took over without a checkpoint"]
        );
    }

    #[test]
    fn a_checkpoint_of_what_was_never_printed_is_found() {
        let mut case = Case::primary_lost();
        case.primary.truncate(50);
        assert_eq!(
            case.violations(),
            [
                "the secondary went on after 103 bytes of output: the checkpoint before its last \
                 is at 103, and the primary printed 50"
            ]
        );
    }

    #[test]
    fn a_primary_killed_before_it_told_of_the_last_checkpoint_is_met_where_the_survivor_goes_on() {
        let mut case = Case::primary_lost();
        case.checkpoints.pop();
        let proof = case.prove();
        assert_eq!(proof.violations, []);
        assert_eq!((proof.cut_bytes, proof.guest_lines), (Some(CUT as u64), 42));

        // Behind the checkpoint before, or beyond all output.
        for from in [30, 200] {
            case.secondary = counted(1, 42)[from..].to_vec();
            assert_eq!(
                case.violations(),
                [format!(
                    "the secondary went on after {from} bytes of output: the checkpoint before its \
                     last is at 40, and the primary printed 180"
                )]
            );
        }
        // Not anywhere.
        case.secondary = b"xyz\n12345678\n".to_vec();
        assert_eq!(case.violations().len(), 1);
    }

    #[test]
    fn a_secondary_that_prints_before_the_failover_is_found() {
        let mut case = Case::primary_lost();
        case.leaked = 9;
        assert_eq!(
            case.violations(),
            ["the secondary printed 9 bytes while it was the secondary"]
        );
    }

    #[test]
    fn after_the_loss_of_the_secondary_the_primary_goes_on_without_a_gap() {
        let mut case = Case::primary_lost();
        case.killed = Some(Role::Secondary);
        case.secondary.clear();
        assert_eq!(case.violations(), [""; 0]);
        let proof = case.prove();
        assert_eq!((proof.guest_lines, proof.repeated_lines), (20, 0));
        case.primary.extend(counted(20, 22));
        assert_eq!(
            case.violations(),
            ["the primary's output, line 21: expected \"00000015\\n\", found \"00000014\\n\""]
        );
    }

    #[test]
    fn hashes_that_differ_are_found_by_the_checkpoints_number() {
        let mut case = Case::primary_lost();
        case.other_checkpoints[1].ram_hash = Some("c".to_owned());
        case.other_checkpoints[0].device_hash = None;
        assert_eq!(
            case.violations(),
            [
                "checkpoint 1: hash of devices: d on the primary, none on the secondary",
                "checkpoint 2: hash of ram: b on the primary, c on the secondary",
                "no checkpoint was verified, although both sides were asked for hashes",
            ]
        );
    }

    #[test]
    fn only_checkpoints_that_both_sides_reported_are_compared() {
        let mut case = Case::primary_lost();
        case.checkpoints.remove(0);
        assert_eq!(case.prove().equal_hashes, 1);
        assert!(case.prove().holds());
        case.checkpoints.clear();
        assert_eq!(
            case.violations(),
            ["no checkpoint was verified, although both sides were asked for hashes"]
        );
    }
}
