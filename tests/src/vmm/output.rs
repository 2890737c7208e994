//! What the built-in guest prints, which is known to the byte.

use crate::Result;

/// What a run of the guest prints is known to the byte: its n-th line is n, as eight hexadecimal
/// digits and a line feed.
pub const LINE: u64 = 9;

/// Checks that `text` is what the guest prints from its `from`-th byte on, and returns the complete
/// lines in it. A guest that finds its memory damaged prints something else.
///
/// # Errors
/// Where the text first differs, and how.
pub fn check_count(from: u64, text: &[u8]) -> Result<usize> {
    let wrong = (from..).zip(text).position(|(at, byte)| {
        let line = format!("{:08x}\n", at / LINE + 1);
        let place = usize::try_from(at % LINE).unwrap_or(usize::MAX);
        line.as_bytes().get(place) != Some(byte)
    });
    match wrong {
        None => Ok(text.iter().filter(|b| **b == b'\n').count()),
        Some(at) => {
            let around = &text[at.saturating_sub(20)..text.len().min(at + 40)];
            let around = String::from_utf8_lossy(around);
            let line = (from + at as u64) / LINE + 1;
            Err(
                format!("line {line} of the guest's output is not its number, around {around:?}")
                    .into(),
            )
        }
    }
}

/// Where the guest's output begins of which `text` is all but what came before, and the number of its
/// first whole line: a survivor is heard from some byte on.
///
/// # Errors
/// There are no two line ends in it, or no number between them.
pub fn first_line(text: &[u8]) -> Result<(u64, u64)> {
    let end = text.iter().position(|b| *b == b'\n').ok_or("no line")? + 1;
    let digits = text.get(end..end + 8).ok_or("no second line")?;
    let number = u64::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    let lines = number.checked_sub(1).ok_or("line 0")?;
    let begin = (lines * LINE).checked_sub(end as u64);
    Ok((begin.ok_or("a line that is too long")?, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_prints_is_known_from_any_byte_on() {
        let text = b"00000001\n00000002\n00000003\n0000";
        assert_eq!(check_count(0, text).unwrap(), 3);
        assert_eq!(check_count(13, &text[13..]).unwrap(), 2);
        assert_eq!(check_count(5, b"").unwrap(), 0);
        let e = check_count(9, &text[18..]).unwrap_err();
        assert!(
            e.to_string().starts_with("line 2 of the guest's output"),
            "{e}"
        );
        assert!(check_count(0, b"00000001\nE0000").is_err());
        assert_eq!(first_line(b"0002\n00000003\n").unwrap(), (13, 3));
        assert!(first_line(b"\n00000001\n").is_err());
    }
}
