//! The guides in `docs/`, which are written around this example: all of their chapters are listed, what they
//! include and link to is there, their Rust is compiled, and the messages that they explain exist.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn book() -> PathBuf {
    workspace().join("docs/src")
}

/// Returns the files below `dir` whose names end in `extension`, without those that builds make.
fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                found.append(&mut files(&path, extension));
            }
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Returns the chapters with their text.
fn chapters() -> Vec<(PathBuf, String)> {
    let files = files(&book(), "md").into_iter();
    files.map(|path| (path.clone(), read(&path))).collect()
}

/// Returns the targets of the links in `text`, those in code left out.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        in_block ^= line.starts_with("```");
        if !in_block {
            for rest in line.split("](").skip(1) {
                found.push(rest.split(')').next().unwrap().to_owned());
            }
        }
    }
    found
}

/// Returns what a heading is called in a link.
fn fragment(heading: &str) -> String {
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>()
        .trim()
        .to_lowercase()
        .replace(' ', "-")
}

#[test]
fn every_chapter_is_listed_once() {
    let summary = read(&book().join("SUMMARY.md"));
    let listed: Vec<_> = links(&summary).iter().map(|l| book().join(l)).collect();
    let unique: BTreeSet<_> = listed.iter().cloned().collect();
    assert_eq!(listed.len(), unique.len());
    let mut there: BTreeSet<_> = files(&book(), "md").into_iter().collect();
    there.remove(&book().join("SUMMARY.md"));
    assert_eq!(unique, there);
}

#[test]
fn every_link_leads_somewhere() {
    let mut checked = 0;
    for (chapter, text) in chapters() {
        for link in links(&text) {
            if link.starts_with("https://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let path = match file {
                "" => chapter.clone(),
                _ => chapter.parent().unwrap().join(file),
            };
            let headings: Vec<_> = read(&path)
                .lines()
                .filter_map(|line| Some(fragment(line.trim_start_matches('#').strip_prefix(' ')?)))
                .collect();
            let found = heading.is_empty() || headings.iter().any(|h| h == heading);
            assert!(found, "{}: {link}", chapter.display());
            checked += 1;
        }
    }
    assert!(checked > 10);
}

#[test]
fn every_include_resolves_and_is_all_the_rust_there_is() {
    let mut checked = 0;
    for (chapter, text) in chapters() {
        let mut in_rust = false;
        for line in text.lines() {
            if line.starts_with("```") {
                in_rust = line.starts_with("```rust");
                continue;
            }
            let include = line
                .strip_prefix("{{#include ")
                .and_then(|l| l.strip_suffix("}}"));
            let place = chapter.display();
            assert!(
                !in_rust || include.is_some(),
                "{place}: Rust that is not compiled: {line}"
            );
            let Some(include) = include else {
                continue;
            };
            let (file, anchor) = include.split_once(':').unwrap();
            let source = read(&chapter.parent().unwrap().join(file));
            for mark in ["ANCHOR: ", "ANCHOR_END: "] {
                let mark = format!("// {mark}{anchor}");
                let times = source.lines().filter(|l| l.trim() == mark).count();
                assert_eq!(times, 1, "{place}: {include}");
            }
            checked += 1;
        }
    }
    assert!(checked > 10);
}

/// A message's placeholders are words in capitals, and `...`.
#[test]
fn every_message_that_is_explained_exists() {
    let sources: String = files(&workspace(), "rs")
        .iter()
        .map(|path| read(path))
        .collect();
    // Messages that are broken over lines.
    let lines: Vec<_> = sources
        .lines()
        .map(|l| l.trim_start().trim_end_matches('\\'))
        .collect();
    let sources = lines.concat();
    let chapter = read(&book().join("operating/troubleshooting.md"));
    let mut checked = 0;
    for row in chapter.lines().filter(|l| l.starts_with("| `")) {
        let message = row.split('`').nth(1).unwrap();
        let is_placeholder = |word: &str| {
            let word = word.trim_matches(['"', ',', ':']);
            word.chars().all(|c| c.is_uppercase() || c == '.')
        };
        for piece in message
            .split(' ')
            .collect::<Vec<_>>()
            .split(|word| is_placeholder(word))
        {
            let piece = piece.join(" ");
            let piece = piece.trim_matches(['"', '\'']);
            if piece.len() > 7 {
                assert!(sources.contains(piece), "no message says '{piece}'");
                checked += 1;
            }
        }
    }
    assert!(checked > 20);
}
