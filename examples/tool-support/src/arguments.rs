//! The command line, whose mistakes are told in plain text.

use std::env;
use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{Error, Parser};

use crate::Escaped;

/// Returns what the command line says. As [`Parser::parse`], but for the message about a mistake, in which what
/// could do harm on a terminal is escaped.
#[must_use]
pub fn parse<C: Parser>() -> C {
    let words: Vec<_> = env::args_os().collect();
    parse_from(&words).unwrap_or_else(|mistake| mistake.exit())
}

fn parse_from<C: Parser>(words: &[OsString]) -> Result<C, Error> {
    C::try_parse_from(words).map_err(|mistake| {
        let escaped: Vec<_> = (words.iter())
            .map(|word| OsString::from(Escaped(&word.to_string_lossy()).to_string()))
            .collect();
        // This message repeats no argument.
        if escaped == words || mistake.kind() == ErrorKind::InvalidUtf8 {
            return mistake;
        }
        // The same mistake in other characters.
        match C::try_parse_from(escaped) {
            Err(mistake) => mistake,
            Ok(_) => Error::raw(
                mistake.kind(),
                "an argument has control characters where none can be\n",
            ),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "tool")]
    struct Cli {
        #[arg(long)]
        number: Option<u8>,
        #[arg(long, value_parser = |text: &str| {
            (!text.contains('\x1b')).then(|| text.to_owned()).ok_or("no")
        })]
        name: Option<String>,
    }

    fn refused(words: &[&str]) -> String {
        let words: Vec<_> = ["tool"].iter().chain(words).map(OsString::from).collect();
        let mistake = parse_from::<Cli>(&words).unwrap_err();
        mistake.render().to_string()
    }

    #[test]
    fn a_mistake_repeats_no_control_characters() {
        let hostile = "x\x1b[2J\rfine\u{202e}";
        for words in [
            &["--number", hostile][..],
            &[hostile],
            &["--name", hostile],
            &[&format!("--{hostile}")],
        ] {
            let told = refused(words);
            let is_hostile = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
            assert!(!told.contains(is_hostile), "{told:?}");
            assert!(told.contains("error: "), "{told}");
        }
        assert!(refused(&["--number", hostile]).contains(r"x\u{1b}[2J\rfine\u{202e}"));
    }

    #[test]
    fn other_mistakes_are_told_as_they_are() {
        let told = refused(&["--number", "300"]);
        let same = Cli::try_parse_from(["tool", "--number", "300"]).unwrap_err();
        assert_eq!(told, same.render().to_string());
        let words = [
            "tool".into(),
            "--number".into(),
            OsString::from_vec(vec![0xff]),
        ];
        let mistake = parse_from::<Cli>(&words).unwrap_err();
        assert_eq!(mistake.kind(), ErrorKind::InvalidUtf8);
        assert_eq!(
            parse_from::<Cli>(&["tool".into(), "--number".into(), "7".into()])
                .unwrap()
                .number,
            Some(7)
        );
    }
}
