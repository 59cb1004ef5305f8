//! `docs/api.md` says what the code does: the error codes, all of them and no other, and the limits.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::fmt::Write as _;
use std::path::Path;
use tapgate::http::Code;

fn document() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md")).unwrap()
}

#[test]
fn the_error_codes_of_the_document_are_those_of_the_code() {
    let mut table = String::new();
    for code in Code::ALL {
        let (status, means, remedy) = (code.status().as_u16(), code.means(), code.remedy());
        writeln!(table, "| `{}` | {status} | {means} | {remedy} |", code.word()).unwrap();
    }
    let document = document();
    let head = "| code | status | meaning | what to do |\n| --- | --- | --- | --- |\n";
    let part = document.split_once(head).unwrap().1;
    let given: String = part
        .lines()
        .take_while(|line| line.starts_with('|'))
        .fold(String::new(), |text, line| text + line + "\n");
    assert!(given == table, "the table of docs/api.md should be\n{table}");
}

/// Source files of the API that answer requests, but for the list itself.
fn sources(folder: &Path, text: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if !path.ends_with("codes.rs") && path.extension().is_some_and(|end| end == "rs") {
            text.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_code_is_answered_somewhere() {
    let mut text = String::new();
    for folder in ["src/http", "src/controllers"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut text);
    }
    for code in Code::ALL {
        let used = text
            .match_indices(&format!("Code::{code:?}"))
            .any(|(at, found)| !text[at + found.len()..].starts_with(|c: char| c.is_alphanumeric()));
        assert!(used, "{} is never answered", code.word());
    }
}

#[test]
fn the_tests_that_the_document_names_are_there() {
    let mut text = String::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for folder in ["api/src", "api/tests", "data/store", "tests/tests"] {
        sources(&root.join(folder), &mut text);
    }
    let document = document();
    let table = document.split_once("## What shows it").unwrap().1;
    let words = table.split('`').skip(1).step_by(2);
    let tests: Vec<&str> = words
        .filter(|word| word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
        .collect();
    assert!(tests.len() > 50, "{}", tests.len());
    for test in tests {
        assert!(text.contains(&format!("fn {test}(")), "there is no test {test}");
    }
}
