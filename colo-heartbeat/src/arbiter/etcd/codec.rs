//! What is said to etcd's JSON gateway, and what it answers: the JSON mapping of etcd's protocol
//! buffers (`etcdserverpb/rpc.proto`). Bytes are base64, 64-bit integers are decimal strings, and a
//! field with the value zero or false is left out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::arbiter::register::{Content, ENTRY_LEN};

/// Why an answer cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum CodecError {
    /// It is not the JSON that was to be expected.
    #[error("not the json of an answer")]
    Json(#[source] serde_json::Error),
    /// What it says cannot be.
    #[error("an answer with {0}")]
    Content(&'static str),
}

/// What every answer begins with (`ResponseHeader`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Header {
    /// The cluster that answers.
    #[serde(rename = "cluster_id", deserialize_with = "unsigned")]
    pub(super) cluster: u64,
    /// The revision of its whole store.
    #[serde(deserialize_with = "revision")]
    pub(super) revision: u64,
}

#[derive(Deserialize)]
struct RangeResponse {
    header: Header,
    #[serde(default)]
    kvs: Vec<KeyValue>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(deserialize_with = "bytes")]
    key: Vec<u8>,
    #[serde(deserialize_with = "revision")]
    mod_revision: u64,
    #[serde(default, deserialize_with = "bytes")]
    value: Vec<u8>,
}

#[derive(Deserialize)]
struct TxnResponse {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<ResponseOp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ResponseOp {
    ResponsePut(serde::de::IgnoredAny),
    ResponseRange(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct AuthenticateResponse {
    token: String,
}

#[derive(Deserialize)]
struct Refusal {
    /// Of later versions, which have no `error`.
    #[serde(default)]
    message: String,
    #[serde(default)]
    error: String,
}

/// What asks for a key (`RangeRequest`).
pub(super) fn range(key: &[u8]) -> String {
    json!({ "key": STANDARD.encode(key) }).to_string()
}

/// What replaces the value of a key that was last changed at `revision`, and otherwise reads it
/// (`TxnRequest`).
pub(super) fn replace(key: &[u8], revision: u64, value: &[u8]) -> String {
    let key = STANDARD.encode(key);
    json!({
        "compare": [{
            "key": key,
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": revision.to_string(),
        }],
        "success": [{ "request_put": { "key": key, "value": STANDARD.encode(value) } }],
        "failure": [{ "request_range": { "key": key } }],
    })
    .to_string()
}

pub(super) fn range_answer(answer: &[u8], key: &[u8]) -> Result<(Header, Content), CodecError> {
    let RangeResponse { header, kvs, more } =
        serde_json::from_slice(answer).map_err(CodecError::Json)?;
    match kvs.as_slice() {
        _ if more || kvs.len() > 1 => Err(CodecError::Content("several keys")),
        [] => Ok((header, Content::default())),
        [kv] if kv.key != key => Err(CodecError::Content("another key")),
        [kv] if kv.mod_revision > header.revision => {
            Err(CodecError::Content("a key that is changed in the future"))
        }
        [kv] if kv.value.len() > ENTRY_LEN => Err(CodecError::Content("too long a value")),
        [kv, ..] => Ok((
            header,
            Content {
                version: kv.mod_revision,
                value: Some(kv.value.clone()),
            },
        )),
    }
}

pub(super) fn replace_answer(answer: &[u8], revision: u64) -> Result<(Header, bool), CodecError> {
    let TxnResponse {
        header,
        succeeded,
        responses,
    } = serde_json::from_slice(answer).map_err(CodecError::Json)?;
    // Each way it may go has left something other than a flag whose absence is false.
    match (succeeded, responses.as_slice()) {
        (true, [ResponseOp::ResponsePut(_)]) if header.revision > revision => Ok((header, true)),
        (true, [ResponseOp::ResponsePut(_)]) => Err(CodecError::Content("a change in the past")),
        (false, [ResponseOp::ResponseRange(_)]) => Ok((header, false)),
        _ => Err(CodecError::Content("results that do not fit")),
    }
}

/// What asks for a token (`AuthenticateRequest`).
pub(super) fn authenticate(name: &str, password: &str) -> String {
    json!({ "name": name, "password": password }).to_string()
}

/// A token, fit to be sent as it is.
pub(super) fn authenticate_answer(answer: &[u8]) -> Result<String, CodecError> {
    // What it has instead is told to nobody.
    let token = serde_json::from_slice(answer).map(|AuthenticateResponse { token }| token);
    token
        .ok()
        .filter(|token| (1..=TOKEN_LEN).contains(&token.len()))
        .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or(CodecError::Content("a token that is none"))
}

/// The most that a token may have, bytes. A simple one has 20 to 40, a signed one some hundreds.
const TOKEN_LEN: usize = 4096;

/// Is that the refusal of a request without a token that etcd knows? (As of
/// `api/v3rpc/rpctypes/error.go`, and of `auth/store.go` for versions that do not have the last there.)
pub(super) fn wants_token(message: &str) -> bool {
    [
        "etcdserver: invalid auth token",
        "etcdserver: user name is empty",
        "etcdserver: revision of auth store is old",
        "auth: revision in header is old",
    ]
    .contains(&message)
}

/// Is that what is said of a password where none is wanted?
pub(super) fn is_disabled(message: &str) -> bool {
    message == "etcdserver: authentication is not enabled"
}

/// The beginning of what etcd says of a request that it refuses. What is no etcd may repeat what it was
/// told, `secret` included, which is then not passed on.
pub(super) fn refusal(answer: &[u8], secret: Option<&str>) -> String {
    let text = match serde_json::from_slice::<Refusal>(answer) {
        Ok(refusal) if refusal.error.is_empty() => refusal.message,
        Ok(refusal) => refusal.error,
        Err(_) => String::from_utf8_lossy(answer).into_owned(),
    };
    if secret.is_some_and(|secret| mentions(&text, secret)) {
        return "what it says has a secret in it".to_owned();
    }
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

/// As it is, or as a request has it.
fn mentions(text: &str, secret: &str) -> bool {
    let quoted = json!(secret).to_string();
    let escaped = quoted.trim_matches('"');
    text.contains(secret) || (!escaped.is_empty() && text.contains(escaped))
}

fn unsigned<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(serde::de::Error::custom)
}

/// An `int64` that is at least 1.
fn revision<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let number: i64 = text.parse().map_err(serde::de::Error::custom)?;
    u64::try_from(number)
        .ok()
        .filter(|number| *number > 0)
        .ok_or_else(|| serde::de::Error::custom("a revision that is not positive"))
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"colo/a";

    #[test]
    fn requests_are_these() {
        assert_eq!(range(KEY), r#"{"key":"Y29sby9h"}"#);
        let txn: serde_json::Value = serde_json::from_str(&replace(KEY, 7, b"text\n")).unwrap();
        assert_eq!(
            txn,
            json!({
                "compare": [{"key": "Y29sby9h", "target": "MOD", "result": "EQUAL", "mod_revision": "7"}],
                "success": [{"request_put": {"key": "Y29sby9h", "value": "dGV4dAo="}}],
                "failure": [{"request_range": {"key": "Y29sby9h"}}],
            })
        );
    }

    /// As etcd 3.4.23 gave them.
    #[test]
    fn answers_of_a_real_etcd_are_understood() {
        let header = Header {
            cluster: 10_144_879_847_569_953_045,
            revision: 2,
        };
        let absent = br#"{"header":{"cluster_id":"10144879847569953045","member_id":"12428976124636271536","revision":"2","raft_term":"2"}}"#;
        let (found, content) = range_answer(absent, KEY).unwrap();
        assert_eq!((found, content.version, content.value), (header, 0, None));
        let there = br#"{"header":{"cluster_id":"10144879847569953045","member_id":"12428976124636271536","revision":"2","raft_term":"2"},"kvs":[{"key":"Y29sby9h","create_revision":"2","mod_revision":"2","version":"1","value":"dGV4dAo="}],"count":"1"}"#;
        let (found, content) = range_answer(there, KEY).unwrap();
        assert_eq!(
            (found, content.version, content.value.as_deref()),
            (header, 2, Some(b"text\n".as_slice()))
        );
        let put = br#"{"header":{"cluster_id":"10144879847569953045","member_id":"12428976124636271536","revision":"2","raft_term":"2"},"succeeded":true,"responses":[{"response_put":{"header":{"revision":"2"}}}]}"#;
        assert_eq!(replace_answer(put, 0).unwrap(), (header, true));
        let other = br#"{"header":{"cluster_id":"10144879847569953045","member_id":"12428976124636271536","revision":"2","raft_term":"2"},"responses":[{"response_range":{"header":{"revision":"2"},"kvs":[{"key":"Y29sby9h","create_revision":"2","mod_revision":"2","version":"1","value":"dGV4dAo="}],"count":"1"}}]}"#;
        assert_eq!(replace_answer(other, 0).unwrap(), (header, false));
        let refused = br#"{"error":"etcdserver: request timed out","message":"etcdserver: request timed out","code":14}"#;
        assert_eq!(refusal(refused, None), "etcdserver: request timed out");
        let later = br#"{"code":14,"message":"no leader","details":[]}"#;
        assert_eq!(refusal(later, None), "no leader");
        assert_eq!(refusal(b"404 page not found\n", None), "404 page not found");
        assert_eq!(refusal(&[b'x'; 5000], None).len(), 200);
    }

    #[test]
    fn a_secret_that_is_repeated_is_not_passed_on() {
        for (secret, answer) in [
            ("hush", r#"{"error":"no hush"}"#.to_owned()),
            ("hush", format!("{}hush", "x".repeat(198))),
            (r#"h"u\sh"#, authenticate("a", r#"h"u\sh"#) + "?"),
        ] {
            let said = refusal(answer.as_bytes(), Some(secret));
            assert_eq!(said, "what it says has a secret in it", "{answer}");
        }
        assert_eq!(refusal(b"no", Some("hush")), "no");
    }

    #[test]
    fn a_token_is_text_that_a_header_can_have() {
        let request: serde_json::Value =
            serde_json::from_str(&authenticate("colo", r#"a"\b"#)).unwrap();
        assert_eq!(request, json!({"name": "colo", "password": r#"a"\b"#}));
        // As etcd 3.4.23 gave it.
        let answer = br#"{"header":{"cluster_id":"14841639068965178418","member_id":"10276657743932975437","revision":"1","raft_term":"2"},"token":"sssvIpwfnLAcWAQH.9"}"#;
        assert_eq!(authenticate_answer(answer).unwrap(), "sssvIpwfnLAcWAQH.9");
        let long = "t".repeat(TOKEN_LEN + 1);
        for token in ["", "a b", "a\nb", "ä", &long] {
            let answer = json!({ "token": token }).to_string();
            let error = authenticate_answer(answer.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), "an answer with a token that is none");
        }
        for answer in ["", "{}", r#"{"token":5}"#, "\"password\""] {
            assert!(authenticate_answer(answer.as_bytes()).is_err(), "{answer}");
        }
    }

    #[test]
    fn a_range_answer_that_cannot_be_is_refused() {
        let header = r#""header":{"cluster_id":"5","revision":"9"}"#;
        let refused = |answer: &str| {
            let answer = range_answer(answer.as_bytes(), KEY);
            answer.expect_err("an answer that cannot be").to_string()
        };
        let kv = |fields: &str| format!(r#"{{{header},"kvs":[{{{fields}}}]}}"#);
        let good = kv(r#""key":"Y29sby9h","mod_revision":"9","value":"eA==""#);
        assert!(range_answer(good.as_bytes(), KEY).is_ok());
        for json in [
            "",
            "null",
            "{}",
            "[]",
            "<html>",
            r#"{"header":{}}"#,
            r#"{"header":{"cluster_id":"5"}}"#,
            r#"{"header":{"revision":"9"}}"#,
            r#"{"header":{"cluster_id":"5","revision":"0"}}"#,
            r#"{"header":{"cluster_id":"5","revision":"-9"}}"#,
            r#"{"header":{"cluster_id":"-5","revision":"9"}}"#,
            r#"{"header":{"cluster_id":"18446744073709551616","revision":"9"}}"#,
            r#"{"header":{"cluster_id":"5","revision":"9223372036854775808"}}"#,
            r#"{"header":{"cluster_id":"5","revision":9}}"#,
            r#"{"header":{"cluster_id":"5","revision":"9x"}}"#,
            &format!("{{{header}"),
            &format!("{{{header}}}{{}}"),
            &format!(r#"{{{header},"kvs":5}}"#),
            &kv(""),
            &kv(r#""key":"Y29sby9h""#),
            &kv(r#""mod_revision":"9""#),
            &kv(r#""key":"Y29sby9h","mod_revision":"0""#),
            &kv(r#""key":"Y29sby9h","mod_revision":"-1""#),
            &kv(r#""key":"Y29sby9h","mod_revision":"99999999999999999999""#),
            &kv(r#""key":"!","mod_revision":"9""#),
            &kv(r#""key":"Y29sby9h","mod_revision":"9","value":"A""#),
        ] {
            assert_eq!(refused(json), "not the json of an answer", "{json}");
        }
        let two = r#"{"key":"Y29sby9h","mod_revision":"9"}"#;
        let long = STANDARD.encode([b'x'; ENTRY_LEN + 1]);
        for (json, what) in [
            (
                format!(r#"{{{header},"kvs":[{two},{two}]}}"#),
                "several keys",
            ),
            (
                format!(r#"{{{header},"kvs":[{two}],"more":true}}"#),
                "several keys",
            ),
            (kv(r#""key":"Y29sby9i","mod_revision":"9""#), "another key"),
            (kv(r#""key":"","mod_revision":"9""#), "another key"),
            (
                kv(r#""key":"Y29sby9h","mod_revision":"10""#),
                "a key that is changed in the future",
            ),
            (
                kv(&format!(
                    r#""key":"Y29sby9h","mod_revision":"9","value":"{long}""#
                )),
                "too long a value",
            ),
        ] {
            assert_eq!(refused(&json), format!("an answer with {what}"));
        }
    }

    #[test]
    fn a_transaction_s_answer_says_which_way_it_went_or_is_none() {
        let header = r#""header":{"cluster_id":"5","revision":"9"}"#;
        let put = r#""responses":[{"response_put":{}}]"#;
        let range = r#""responses":[{"response_range":{}}]"#;
        let answer = |rest: &str, revision| {
            replace_answer(format!("{{{header}{rest}}}").as_bytes(), revision)
                .map(|(_, replaced)| replaced)
        };
        assert!(answer(&format!(r#","succeeded":true,{put}"#), 8).unwrap());
        assert!(!answer(&format!(",{range}"), 8).unwrap());
        assert!(!answer(&format!(r#","succeeded":false,{range}"#), 8).unwrap());
        for (rest, revision) in [
            (String::new(), 8),
            (r#","succeeded":true"#.into(), 8),
            (r#","succeeded":"true""#.into(), 8),
            (r#","responses":[]"#.into(), 8),
            (format!(",{put}"), 8),
            (format!(r#","succeeded":true,{range}"#), 8),
            (format!(r#","succeeded":true,{put}"#), 9),
            (r#","responses":[{"response_delete_range":{}}]"#.into(), 8),
            (
                r#","responses":[{"response_range":{}},{"response_range":{}}]"#.into(),
                8,
            ),
            (r#","responses":[{}]"#.into(), 8),
        ] {
            assert!(answer(&rest, revision).is_err(), "{rest}");
        }
        assert!(replace_answer(b"{}", 8).is_err());
    }
}
