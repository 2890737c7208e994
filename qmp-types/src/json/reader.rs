//! The reader: a lexer that takes a byte at a time, and a parser that takes a token at a time.

use serde_json::{Map, Value};

use super::error::{JsonError, JsonErrorKind};
use super::limits::Limits;
use super::text;

/// How many characters of a stray piece of input an error repeats.
const STRAY_MAX: usize = 40;

#[derive(Clone, Copy, Debug, Default)]
struct Position {
    line: u64,
    column: u64,
}

/// Where the lexer is inside a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lexer {
    Between,
    String {
        quote: u8,
        escaped: bool,
    },
    Keyword,
    Number(NumberPart),
    /// After a stray byte, until something a value could begin or end with.
    Recovery,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberPart {
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

impl NumberPart {
    /// The part after one more byte. `Err(true)`: the number has ended before it; `Err(false)`: it
    /// cannot go on like this.
    fn next(self, byte: u8) -> Result<Self, bool> {
        Ok(match (self, byte) {
            (Self::Sign, b'0') => Self::Zero,
            (Self::Sign, b'1'..=b'9') | (Self::Digits, b'0'..=b'9') => Self::Digits,
            (Self::Zero | Self::Digits, b'.') => Self::Point,
            (Self::Point | Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Zero | Self::Digits | Self::Fraction, b'e' | b'E') => Self::Exponent,
            (Self::Exponent, b'+' | b'-') => Self::ExponentSign,
            (Self::Exponent | Self::ExponentSign | Self::ExponentDigits, b'0'..=b'9') => {
                Self::ExponentDigits
            }
            (Self::Zero, b'0'..=b'9') => return Err(false),
            (Self::Zero | Self::Digits | Self::Fraction | Self::ExponentDigits, _) => {
                return Err(true);
            }
            (Self::Sign | Self::Point | Self::Exponent | Self::ExponentSign, _) => {
                return Err(false);
            }
        })
    }
}

/// An object or list that has not ended yet.
#[derive(Debug)]
enum Frame {
    Object {
        members: Map<String, Value>,
        key: String,
    },
    List(Vec<Value>),
}

/// What the parser can take next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    KeyOrEnd,
    Key,
    Colon,
    MemberOrEnd,
    ElementOrEnd,
    ValueOrEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Punctuation(u8),
    String,
    Keyword,
    Number,
}

/// JSON values out of bytes that come in pieces.
#[derive(Debug)]
pub struct JsonReader {
    limits: Limits,
    /// Of the byte that comes next.
    position: Position,
    lexer: Lexer,
    /// The token being read; strings without their quotes.
    token: Vec<u8>,
    token_at: Position,
    frames: Vec<Frame>,
    expect: Expect,
    bytes: usize,
    tokens: usize,
    /// Open brackets of each kind, also while what they contain is being skipped.
    braces: i64,
    brackets: i64,
    /// A value had a mistake, which was reported. What is left of it is skipped.
    skips: bool,
}

impl JsonReader {
    /// A reader at the start of line 1.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            position: Position { line: 1, column: 1 },
            lexer: Lexer::Between,
            token: Vec::new(),
            token_at: Position::default(),
            frames: Vec::new(),
            expect: Expect::Value,
            bytes: 0,
            tokens: 0,
            braces: 0,
            brackets: 0,
            skips: false,
        }
    }

    /// Takes bytes off the front of `input` until a value has ended, or has a mistake; `None` when all
    /// bytes have been taken and neither has happened.
    ///
    /// A mistake is reported at the byte that makes it one, as by QEMU: a client that opens brackets
    /// for ever is answered at the first that is too many. The rest of the value is skipped without
    /// another report.
    ///
    /// A number or word outside brackets ends with the byte that follows it.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, JsonError>> {
        while let Some((&byte, rest)) = input.split_first() {
            let (taken, result) = self.byte(byte);
            if taken {
                *input = rest;
                if byte == b'\n' {
                    self.position.line += 1;
                    self.position.column = 1;
                } else {
                    self.position.column += 1;
                }
            }
            if result.is_some() {
                return result;
            }
        }
        None
    }

    /// One byte: whether it was taken (the end of a number or word is only seen at the next byte),
    /// and what ended with it.
    fn byte(&mut self, byte: u8) -> (bool, Option<Result<Value, JsonError>>) {
        match self.lexer {
            Lexer::Between => (true, self.begin(byte)),
            Lexer::String { quote, escaped } => (true, self.in_string(byte, quote, escaped)),
            Lexer::Keyword => {
                if byte.is_ascii_lowercase() {
                    (true, self.keep(byte))
                } else {
                    (false, self.end(Token::Keyword))
                }
            }
            Lexer::Number(part) => match part.next(byte) {
                Ok(part) => {
                    self.lexer = Lexer::Number(part);
                    (true, self.keep(byte))
                }
                Err(true) => (false, self.end(Token::Number)),
                Err(false) => (true, self.stray(byte, "")),
            },
            Lexer::Recovery => {
                if matches!(byte, b'\n' | b'{' | b'}' | b'[' | b']' | b',' | b':') {
                    self.lexer = Lexer::Between;
                    (false, None)
                } else {
                    (true, None)
                }
            }
        }
    }

    fn begin(&mut self, byte: u8) -> Option<Result<Value, JsonError>> {
        self.token_at = self.position;
        self.token.clear();
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => return None,
            b'{' | b'}' | b'[' | b']' | b',' | b':' => {
                return self.end(Token::Punctuation(byte));
            }
            b'"' | b'\'' => {
                self.lexer = Lexer::String {
                    quote: byte,
                    escaped: false,
                };
                return None;
            }
            b'-' => self.lexer = Lexer::Number(NumberPart::Sign),
            b'0' => self.lexer = Lexer::Number(NumberPart::Zero),
            b'1'..=b'9' => self.lexer = Lexer::Number(NumberPart::Digits),
            b'a'..=b'z' => self.lexer = Lexer::Keyword,
            _ => return self.stray(byte, ""),
        }
        self.keep(byte)
    }

    fn in_string(
        &mut self,
        byte: u8,
        quote: u8,
        escaped: bool,
    ) -> Option<Result<Value, JsonError>> {
        match byte {
            0..0x20 | 0xfe.. => {
                let quote = if quote == b'"' { "\"" } else { "'" };
                return self.stray(byte, quote);
            }
            _ if !escaped && byte == quote => return self.end(Token::String),
            _ => {}
        }
        self.lexer = Lexer::String {
            quote,
            escaped: !escaped && byte == b'\\',
        };
        self.keep(byte)
    }

    /// Keeps a byte of a token, unless the value has been given up.
    fn keep(&mut self, byte: u8) -> Option<Result<Value, JsonError>> {
        if self.skips {
            return None;
        }
        if self.bytes + self.token.len() >= self.limits.bytes {
            return Some(Err(self.fail(self.token_at, JsonErrorKind::TooLarge)));
        }
        self.token.push(byte);
        None
    }

    /// A byte that begins or continues no token: the value is lost, and nothing of it is waited for.
    fn stray(&mut self, byte: u8, quote: &str) -> Option<Result<Value, JsonError>> {
        self.lexer = Lexer::Recovery;
        if self.skips {
            self.reset();
            return None;
        }
        let mut text = quote.to_owned();
        self.token.push(byte);
        text.push_str(&String::from_utf8_lossy(&self.token));
        if let Some((cut, _)) = text.char_indices().nth(STRAY_MAX) {
            text.truncate(cut);
            text.push_str("...");
        }
        let error = self.fail(self.token_at, JsonErrorKind::Stray(text));
        self.reset();
        Some(Err(error))
    }

    /// A token has ended.
    fn end(&mut self, token: Token) -> Option<Result<Value, JsonError>> {
        self.lexer = Lexer::Between;
        match token {
            Token::Punctuation(b'{') => self.braces += 1,
            Token::Punctuation(b'}') => self.braces -= 1,
            Token::Punctuation(b'[') => self.brackets += 1,
            Token::Punctuation(b']') => self.brackets -= 1,
            _ => {}
        }
        let mut result = None;
        if !self.skips {
            self.bytes += self.token.len().max(1);
            self.tokens += 1;
            let parsed = if self.tokens > self.limits.tokens {
                Err((self.token_at, JsonErrorKind::TooManyTokens))
            } else {
                self.parse(token)
            };
            match parsed {
                Ok(Some(value)) => {
                    self.reset();
                    return Some(Ok(value));
                }
                Ok(None) => {}
                Err((at, kind)) => result = Some(Err(self.fail(at, kind))),
            }
        }
        let ended =
            self.braces < 0 || self.brackets < 0 || (self.braces == 0 && self.brackets == 0);
        if ended {
            self.reset();
        }
        result
    }

    /// Takes one token; the value when it was the last of it.
    fn parse(&mut self, token: Token) -> Result<Option<Value>, (Position, JsonErrorKind)> {
        let at = self.token_at;
        let here = |kind| (at, kind);
        match (self.expect, token) {
            (Expect::KeyOrEnd, Token::Punctuation(b'}'))
            | (Expect::MemberOrEnd, Token::Punctuation(b'}'))
            | (Expect::ValueOrEnd, Token::Punctuation(b']'))
            | (Expect::ElementOrEnd, Token::Punctuation(b']')) => match self.frames.pop() {
                Some(Frame::Object { members, .. }) => self.place(Value::Object(members)),
                Some(Frame::List(elements)) => self.place(Value::Array(elements)),
                None => Err(here(JsonErrorKind::ExpectingValue)),
            },
            (Expect::KeyOrEnd | Expect::Key, Token::String) => {
                let text = text::string(&self.token).map_err(here)?;
                if let Some(Frame::Object { key, .. }) = self.frames.last_mut() {
                    *key = text;
                }
                self.expect = Expect::Colon;
                Ok(None)
            }
            (Expect::KeyOrEnd | Expect::Key, _) => Err(here(JsonErrorKind::ExpectingKey)),
            (Expect::Colon, Token::Punctuation(b':')) => {
                self.expect = Expect::Value;
                Ok(None)
            }
            (Expect::Colon, _) => Err(here(JsonErrorKind::ExpectingColon)),
            (Expect::MemberOrEnd, Token::Punctuation(b',')) => {
                self.expect = Expect::Key;
                Ok(None)
            }
            (Expect::MemberOrEnd, _) => Err(here(JsonErrorKind::ExpectingMemberOrEnd)),
            (Expect::ElementOrEnd, Token::Punctuation(b',')) => {
                self.expect = Expect::Value;
                Ok(None)
            }
            (Expect::ElementOrEnd, _) => Err(here(JsonErrorKind::ExpectingElementOrEnd)),
            (Expect::Value | Expect::ValueOrEnd, token) => self.value(token, at),
        }
    }

    /// Takes the first token of a value.
    fn value(
        &mut self,
        token: Token,
        at: Position,
    ) -> Result<Option<Value>, (Position, JsonErrorKind)> {
        let here = |kind| (at, kind);
        let scalar = match token {
            Token::Punctuation(open @ (b'{' | b'[')) => {
                if self.frames.len() >= self.limits.depth {
                    return Err(here(JsonErrorKind::TooDeep));
                }
                let (frame, expect) = if open == b'{' {
                    let object = Frame::Object {
                        members: Map::new(),
                        key: String::new(),
                    };
                    (object, Expect::KeyOrEnd)
                } else {
                    (Frame::List(Vec::new()), Expect::ValueOrEnd)
                };
                self.frames.push(frame);
                self.expect = expect;
                return Ok(None);
            }
            Token::Punctuation(_) => return Err(here(JsonErrorKind::ExpectingValue)),
            Token::String => Value::String(text::string(&self.token).map_err(here)?),
            Token::Number => text::number(&self.token).map_err(here)?,
            Token::Keyword => match self.token.as_slice() {
                b"true" => Value::Bool(true),
                b"false" => Value::Bool(false),
                b"null" => Value::Null,
                word => {
                    let mut word = String::from_utf8_lossy(word).into_owned();
                    word.truncate(STRAY_MAX);
                    return Err(here(JsonErrorKind::InvalidKeyword(word)));
                }
            },
        };
        self.place(scalar)
    }

    /// Puts a whole value where it belongs; gives it back when it belongs nowhere but outside.
    fn place(&mut self, value: Value) -> Result<Option<Value>, (Position, JsonErrorKind)> {
        match self.frames.last_mut() {
            None => return Ok(Some(value)),
            Some(Frame::List(elements)) => {
                elements.push(value);
                self.expect = Expect::ElementOrEnd;
            }
            Some(Frame::Object { members, key }) => {
                if members.insert(std::mem::take(key), value).is_some() {
                    return Err((self.token_at, JsonErrorKind::DuplicateKey));
                }
                self.expect = Expect::MemberOrEnd;
            }
        }
        Ok(None)
    }

    /// Gives the value up, and frees what there is of it.
    fn fail(&mut self, at: Position, kind: JsonErrorKind) -> JsonError {
        self.skips = true;
        self.frames = Vec::new();
        self.token = Vec::new();
        JsonError {
            line: at.line,
            column: at.column,
            kind,
        }
    }

    fn reset(&mut self) {
        self.frames = Vec::new();
        self.token = Vec::new();
        self.expect = Expect::Value;
        self.bytes = 0;
        self.tokens = 0;
        self.braces = 0;
        self.brackets = 0;
        self.skips = false;
    }
}
