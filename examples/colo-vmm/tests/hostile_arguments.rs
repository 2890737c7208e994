//! No text of a command line reaches a terminal with what could do harm there.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::process::{Command, Stdio};

/// Clears a terminal, begins another line, and turns text around.
const HOSTILE: &str = "\x1b[2J\r\u{9b}31m\u{202e}";
const SHOWN: &str = r"\u{1b}[2J\r\u{9b}31m\u{202e}";

#[test]
fn mistakes_repeat_arguments_escaped() {
    let path = format!("/none/such/{HOSTILE}");
    let simulated = ["run", "--sim"];
    let with = |option: &str, value: String| {
        let words = simulated.iter().map(|word| (*word).to_owned());
        words.chain([option.to_owned(), value]).collect::<Vec<_>>()
    };
    for words in [
        vec![HOSTILE.to_owned()],
        vec!["status".to_owned(), format!("unix:{path}")],
        vec!["status".to_owned(), HOSTILE.to_owned()],
        vec!["status".to_owned(), format!("tcp:{HOSTILE}:x")],
        vec!["guest".to_owned(), "--out".to_owned(), path.clone()],
        vec![
            "standby".to_owned(),
            "--guest".to_owned(),
            HOSTILE.to_owned(),
        ],
        vec![
            "standby".to_owned(),
            "--guest".to_owned(),
            format!("{HOSTILE}=x"),
        ],
        with(&format!("--{HOSTILE}"), String::new()),
        with("--memory", HOSTILE.to_owned()),
        with("--qmp", format!("unix:{path}")),
        with("--qmp", format!("unix:q,{HOSTILE}=on")),
        with("--metrics", format!("unix:{path}")),
        with("--incoming", HOSTILE.to_owned()),
        with("--incoming", format!("unix:{path}")),
        with("--heartbeat", format!("tcp:h:1,{HOSTILE}")),
        with("--heartbeat", format!("tcp:{HOSTILE}")),
        with("--arbiter", HOSTILE.to_owned()),
        with("--cpu-mask", HOSTILE.to_owned()),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_colo-vmm"))
            .args(&words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!output.status.success(), "{words:?}");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        let is_hostile = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!said.contains(is_hostile), "{words:?}: {said:?}");
        assert!(said.contains(SHOWN), "{words:?}: {said}");
    }
}
