//! As much of HTTP/1 as it takes to be scraped: the head of a request in, a whole answer out, without
//! I/O. A connection carries one request.

/// The most that the head of a request may have, bytes. Prometheus' has some 300.
pub(super) const MAX_HEAD: usize = 8 << 10;

/// The content type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It wants the figures.
    Ok,
    /// It is no request.
    BadRequest,
    /// It wants something else.
    NotFound,
    /// It wants something done.
    MethodNotAllowed,
    /// Its head does not end.
    HeadTooLarge,
}

impl Status {
    const fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadTooLarge => "431 Request Header Fields Too Large",
        }
    }
}

/// How the request is answered that begins with `bytes`; `None`: that depends on what comes yet.
pub(super) fn judge(bytes: &[u8]) -> Option<Status> {
    let mut status = None;
    let mut rest = bytes;
    while let Some(end) = rest.iter().position(|b| *b == b'\n') {
        let (line, behind) = rest.split_at(end);
        rest = behind.get(1..).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match status {
            None => status = Some(request_line(line)?),
            Some(status) if line.is_empty() => return Some(status),
            Some(_) if !is_field(line) => return Some(Status::BadRequest),
            Some(_) => {}
        }
        if status == Some(Status::BadRequest) {
            return status;
        }
    }
    (bytes.len() >= MAX_HEAD).then_some(Status::HeadTooLarge)
}

/// `GET /metrics HTTP/1.1`. Always some.
fn request_line(line: &[u8]) -> Option<Status> {
    let mut words = std::str::from_utf8(line).unwrap_or_default().split(' ');
    let (method, target) = (words.next()?, words.next());
    let version = words.next();
    let is_method = !method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase());
    let (Some(target), Some("HTTP/1.0" | "HTTP/1.1"), None) = (target, version, words.next())
    else {
        return Some(Status::BadRequest);
    };
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    Some(match (method, path) {
        _ if !is_method || !path.starts_with('/') => Status::BadRequest,
        ("GET", "/metrics") => Status::Ok,
        (_, "/metrics") => Status::MethodNotAllowed,
        _ => Status::NotFound,
    })
}

fn is_field(line: &[u8]) -> bool {
    let name = line.split(|b| *b == b':').next().unwrap_or_default();
    name.len() < line.len() && !name.is_empty() && name.iter().all(u8::is_ascii_graphic)
}

/// The answer, with `figures` where they are wanted.
pub(super) fn answer(status: Status, figures: impl FnOnce() -> String) -> Vec<u8> {
    let body = match status {
        Status::Ok => figures(),
        other => format!("{}\n", other.line()),
    };
    let allow = match status {
        Status::MethodNotAllowed => "Allow: GET\r\n",
        _ => "",
    };
    let (line, length) = (status.line(), body.len());
    format!(
        "HTTP/1.1 {line}\r\nContent-Type: {TEXT_FORMAT}\r\nContent-Length: {length}\r\n{allow}\
         Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_judged_when_its_head_is_there_and_not_before() {
        let whole = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for length in 0..whole.len() {
            assert_eq!(judge(&whole[..length]), None, "{length}");
        }
        assert_eq!(judge(whole), Some(Status::Ok));
        assert_eq!(judge(b"GET /metrics HTTP/1.0\n\n"), Some(Status::Ok));
        assert_eq!(judge(b"GET / HTTP/1.1\r\n\r\n"), Some(Status::NotFound));
        assert_eq!(
            judge(b"POST /metrics HTTP/1.1\r\n\r\n"),
            Some(Status::MethodNotAllowed)
        );
    }

    #[test]
    fn what_is_no_request_is_refused_at_once() {
        for bytes in [
            &b"\n"[..],
            b"\0\xff\xfe\n",
            b"GET /metrics\r\n",
            b"GET /metrics HTTP/2\r\n",
            b"GET  /metrics HTTP/1.1\r\n",
            b"GET /metrics HTTP/1.1 \r\n",
            b"get /metrics HTTP/1.1\r\n",
            b"GET metrics HTTP/1.1\r\n",
            b"GET /metrics HTTP/1.1\r\nno field\r\n",
            b"GET /metrics HTTP/1.1\r\n: nameless\r\n",
            b"{\"execute\": \"qmp_capabilities\"}\r\n",
        ] {
            assert_eq!(judge(bytes), Some(Status::BadRequest), "{bytes:?}");
        }
        assert_eq!(judge(&[b'G'; MAX_HEAD]), Some(Status::HeadTooLarge));
    }

    #[test]
    fn an_answer_says_how_long_it_is() {
        let answer = String::from_utf8(answer(Status::Ok, || "x 1\n".into())).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(head.contains("\r\nContent-Length: 4\r\n"));
        assert_eq!(body, "x 1\n");
    }
}
