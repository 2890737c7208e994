//! Numbers on a command line: decimal, or hexadecimal behind `0x`.
//!
//! A size may have a unit, in either case: `k`, `M`, `G`, `T`, alone or as `KiB` and so on, are powers of
//! 1,024, as everywhere in QEMU; `kB`, `MB` and so on are not taken, because tools do not agree on them.

/// Reads a number.
///
/// # Errors
/// It is none, or does not fit in 64 bits.
pub fn number(s: &str) -> Result<u64, NumberError> {
    let parsed = match s.strip_prefix("0x").or_else(|| s.strip_prefix("0X")) {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u64::from_str_radix(digits, 16).ok()
        }
        None if s.bytes().all(|b| b.is_ascii_digit()) => s.parse().ok(),
        _ => None,
    };
    parsed.ok_or_else(|| NumberError { text: s.to_owned() })
}

/// Reads a size in bytes; a number without a unit is in bytes.
///
/// # Errors
/// As for [`number`].
pub fn bytes(s: &str) -> Result<u64, NumberError> {
    size(s, 0)
}

/// Reads a size in bytes; a number without a unit is in MiB.
///
/// # Errors
/// As for [`number`].
pub fn mebibytes(s: &str) -> Result<u64, NumberError> {
    size(s, 20)
}

fn size(s: &str, plain: u32) -> Result<u64, NumberError> {
    let error = || NumberError { text: s.to_owned() };
    // `B` is a hexadecimal digit.
    let is_hex = s.starts_with("0x") || s.starts_with("0X");
    let suffixes = [
        ("kib", 10),
        ("mib", 20),
        ("gib", 30),
        ("tib", 40),
        ("k", 10),
        ("m", 20),
        ("g", 30),
        ("t", 40),
        ("b", 0),
    ];
    let lower = s.to_ascii_lowercase();
    let (digits, shift) = suffixes
        .into_iter()
        .filter(|(suffix, _)| !(is_hex && *suffix == "b"))
        .find_map(|(suffix, shift)| Some((lower.strip_suffix(suffix)?, shift)))
        .unwrap_or((&lower, plain));
    let count = number(digits).map_err(|_| error())?;
    count.checked_mul(1 << shift).ok_or_else(error)
}

/// A text is no number, or not one that fits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{}' is no number: expected digits, or 0x and hexadecimal digits, and for a size k, M, G or T behind them",
    migration_stream::Escaped(.text)
)]
pub struct NumberError {
    /// The text.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_read_in_the_usual_notations() {
        assert_eq!(number("0x1000"), Ok(4096));
        assert_eq!(number("12"), Ok(12));
        for (text, expected) in [
            ("0x1000", 0x1000),
            ("4096", 4096),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("0x10M", 16 << 20),
            ("0x1B", 27),
            ("512B", 512),
            ("2g", 2 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        assert_eq!(mebibytes("64"), Ok(64 << 20));
        assert_eq!(mebibytes("1G"), Ok(1 << 30));
        for wrong in [
            "",
            "k",
            "-1",
            "+1",
            "1.5k",
            "4kb",
            "4 k",
            "0x",
            "0x+1",
            "1e3",
            "18446744073709551616",
            "16777216T",
            "0x1x",
            "x\x1b[2J",
        ] {
            assert!(bytes(wrong).is_err(), "{wrong:?}");
        }
        let error = bytes("x\x1b[2J").unwrap_err().to_string();
        assert!(error.starts_with(r"'x\u{1b}[2J' is no number"), "{error}");
    }
}
