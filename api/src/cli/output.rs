//! Tables and JSON. What came from a guest is cleaned of control characters before a terminal sees it.

use super::exit::Done;
use comfy_table::{Table, presets};
use serde_json::Value;
use std::io::Write as _;

/// Prints a line; a closed pipe (`| head`) is not an error worth a message.
pub(super) fn line(text: &str) -> Done {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        done => Ok(done?),
    }
}

/// Prints JSON: indented for reading.
pub(super) fn json(value: &Value) -> Done {
    line(&format!("{value:#}"))
}

/// A value as a cell.
pub(super) fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Prints rows as a table with these columns: heading, and field of the row.
pub(super) fn table(columns: &[(&str, &str)], rows: &[Value]) -> Done {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|(heading, _)| *heading));
    for row in rows {
        table.add_row(columns.iter().map(|(_, field)| cell(&row[*field])));
    }
    line(&table.trim_fmt())
}

/// Prints one thing as `field  value` lines.
pub(super) fn record(columns: &[(&str, &str)], row: &Value) -> Done {
    let width = columns.iter().map(|(heading, _)| heading.len()).max().unwrap_or(0);
    for (heading, field) in columns {
        line(&format!("{heading:width$}  {}", cell(&row[*field])))?;
    }
    Ok(())
}

/// Prints rows as JSON or as a table.
pub(super) fn rows(as_json: bool, columns: &[(&str, &str)], rows: Vec<Value>) -> Done {
    if as_json { json(&Value::Array(rows)) } else { table(columns, &rows) }
}

/// Prints one thing as JSON or as lines.
pub(super) fn one(as_json: bool, columns: &[(&str, &str)], row: &Value) -> Done {
    if as_json { json(row) } else { record(columns, row) }
}
