//! Strings and numbers of JSON text.

use serde_json::{Number, Value};

use super::error::JsonErrorKind;

/// The text of a string token, given without its quotes.
pub(super) fn string(raw: &[u8]) -> Result<String, JsonErrorKind> {
    let raw = std::str::from_utf8(raw).map_err(|_| JsonErrorKind::InvalidUtf8)?;
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let mut characters = escape.chars();
        let character = match characters.next() {
            Some(c @ ('"' | '\'' | '\\' | '/')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => {
                let (character, after) = unicode(characters.as_str())?;
                characters = after.chars();
                character
            }
            _ => return Err(JsonErrorKind::InvalidEscape),
        };
        text.push(character);
        rest = characters.as_str();
    }
    text.push_str(rest);
    Ok(text)
}

/// The character of a `\u` escape, which may be two for a surrogate pair, and the text after it.
fn unicode(digits: &str) -> Result<(char, &str), JsonErrorKind> {
    let invalid = |length| {
        let text: String = digits.chars().take(length).collect();
        Err(JsonErrorKind::NotUnicode(format!("\\u{text}")))
    };
    let Some((first, rest)) = hex(digits) else {
        return invalid(4);
    };
    if let Some(character) = char::from_u32(u32::from(first)) {
        return Ok((character, rest));
    }
    let Some((second, rest)) = rest.strip_prefix("\\u").and_then(hex) else {
        return invalid(4);
    };
    match char::decode_utf16([first, second]).next() {
        Some(Ok(character)) => Ok((character, rest)),
        _ => invalid(10),
    }
}

/// Four hexadecimal digits, and the text after them.
fn hex(digits: &str) -> Option<(u16, &str)> {
    let (four, rest) = digits.split_at_checked(4)?;
    if !four.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    Some((u16::from_str_radix(four, 16).ok()?, rest))
}

/// The number of a token whose form has been checked: an integer if it is written as one and fits
/// 64 bits, otherwise floating point.
pub(super) fn number(raw: &[u8]) -> Result<Value, JsonErrorKind> {
    let text = std::str::from_utf8(raw).map_err(|_| JsonErrorKind::NumberOutOfRange)?;
    if let Ok(integer) = text.parse::<i64>() {
        return Ok(integer.into());
    }
    if let Ok(integer) = text.parse::<u64>() {
        return Ok(integer.into());
    }
    text.parse::<f64>()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or(JsonErrorKind::NumberOutOfRange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_resolved_and_surrogates_paired() {
        assert_eq!(
            string(br#"a\u00e9\"\'\\\/\b\f\n\r\t\uD83D\ude00z"#).unwrap(),
            "aé\"'\\/\u{8}\u{c}\n\r\t😀z"
        );
    }

    #[test]
    fn what_is_no_text_is_refused() {
        for (raw, kind) in [
            (&br"\x"[..], JsonErrorKind::InvalidEscape),
            (br"\", JsonErrorKind::InvalidEscape),
            (br"\u12", JsonErrorKind::NotUnicode("\\u12".into())),
            (br"\u+1234", JsonErrorKind::NotUnicode("\\u+123".into())),
            (br"\ud800", JsonErrorKind::NotUnicode("\\ud800".into())),
            (
                br"\ud800\u0041",
                JsonErrorKind::NotUnicode("\\ud800\\u0041".into()),
            ),
            (br"\udc00", JsonErrorKind::NotUnicode("\\udc00".into())),
            (b"\xc3(", JsonErrorKind::InvalidUtf8),
        ] {
            assert_eq!(string(raw), Err(kind));
        }
    }

    #[test]
    fn integers_stay_integers_as_long_as_they_fit_64_bits() {
        assert_eq!(number(b"-0").unwrap().as_i64(), Some(0));
        assert_eq!(
            number(b"18446744073709551615").unwrap().as_u64(),
            Some(u64::MAX)
        );
        assert_eq!(
            number(b"18446744073709551616").unwrap().as_f64(),
            Some(1.844_674_407_370_955_2e19)
        );
        assert_eq!(number(b"1e999"), Err(JsonErrorKind::NumberOutOfRange));
    }
}
