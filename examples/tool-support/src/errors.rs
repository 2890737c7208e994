//! Errors for people.

use std::error::Error;

use migration_stream::Escaped;

/// Returns an error and its causes on one line. A cause that repeats the error above it is left out.
/// Characters that would move the cursor, change colours or turn text around are escaped: names in an
/// error may come out of a stream.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut said: Vec<String> = Vec::new();
    for cause in causes.map(ToString::to_string) {
        if said.last() != Some(&cause) {
            said.push(cause);
        }
    }
    Escaped(&said.join(": ")).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(String, #[source] Option<Box<Said>>);

    #[test]
    fn causes_stand_on_one_line_of_plain_text() {
        let cause = Said("block 'a\x1b[2J\n\u{202e}b'".to_owned(), None);
        let error = Said("loading".to_owned(), Some(Box::new(cause)));
        assert_eq!(chain(&error), r"loading: block 'a\u{1b}[2J\n\u{202e}b'");
        let same = Said("x".to_owned(), Some(Box::new(Said("x".to_owned(), None))));
        assert_eq!(chain(&same), "x");
    }
}
