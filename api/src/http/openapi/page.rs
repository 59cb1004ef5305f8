//! The document as a page for people: plain HTML, no script, nothing from elsewhere.

use serde_json::Value;
use std::fmt::Write as _;

/// Text that cannot become markup.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A type in few words.
fn kind(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        return reference.rsplit('/').next().unwrap_or_default().to_owned();
    }
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().map(|word| word.as_str().unwrap_or("null")).collect::<Vec<_>>().join(" | ");
    }
    match &schema["type"] {
        Value::String(kind) if kind == "integer" && schema["maximum"].is_u64() => {
            format!("integer, {} to {}", schema["minimum"].as_u64().unwrap_or(0), schema["maximum"])
        }
        Value::String(kind) if kind == "array" => format!("array of {}", self::kind(&schema["items"])),
        Value::String(kind) => kind.clone(),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" | "),
        _ => "any".to_owned(),
    }
}

fn fields(out: &mut String, schema: &Value) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let required: Vec<_> = schema["required"].as_array().into_iter().flatten().collect();
    out.push_str("<table><tr><th>Field<th>Type<th>Required</tr>");
    for (name, property) in properties {
        let needed = if required.iter().any(|given| *given == name) { "yes" } else { "no" };
        let _ = write!(
            out,
            "<tr><td><code>{}</code><td>{}<td>{needed}</tr>",
            escape(name),
            escape(&kind(property))
        );
    }
    out.push_str("</table>");
}

fn operation(out: &mut String, document: &Value, path: &str, method: &str, operation: &Value) {
    let text = |name: &str| escape(operation[name].as_str().unwrap_or_default());
    let _ = write!(
        out,
        "<section id=\"{0}\"><h3>{1}</h3><p><code>{2} {3}</code></p>",
        text("operationId"),
        text("summary"),
        method.to_uppercase(),
        escape(path)
    );
    let query: Vec<_> = operation["parameters"].as_array().into_iter().flatten().collect();
    if query.iter().any(|parameter| parameter["in"] == "query") {
        out.push_str("<table><tr><th>Query parameter<th>Type<th>Default</tr>");
        for parameter in query.iter().filter(|parameter| parameter["in"] == "query") {
            let schema = &parameter["schema"];
            let default = match &schema["default"] {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let name = parameter["name"].as_str().unwrap_or_default();
            let _ = write!(
                out,
                "<tr><td><code>{}</code><td>{}<td>{default}</tr>",
                escape(name),
                escape(&kind(schema))
            );
        }
        out.push_str("</table>");
    }
    let schema = |name: &str| &document["components"]["schemas"][name];
    let body = kind(&operation["requestBody"]["content"]["application/json"]["schema"]);
    if operation["requestBody"].is_object() {
        out.push_str("<h4>Body</h4>");
        fields(out, schema(&body));
    }
    for (status, answer) in operation["responses"].as_object().into_iter().flatten() {
        if !status.starts_with('2') {
            continue;
        }
        let of = kind(&answer["content"]["application/json"]["schema"]);
        let _ = write!(out, "<h4>{status}</h4>");
        fields(out, schema(&of));
    }
    let failures =
        operation["responses"].as_object().into_iter().flatten().map(|(status, _)| status.as_str());
    let failures: Vec<_> = failures.filter(|status| !status.starts_with('2')).collect();
    let _ = write!(out, "<p>Errors: {}</p></section>", failures.join(", "));
}

pub(super) fn render(document: &Value) -> String {
    let mut out = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><title>tapgate API</title>\
         <meta name=viewport content=\"width=device-width\"><style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:52rem;\
         margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{border:1px solid #8886;\
         padding:.2rem .5rem;text-align:left}section{border-top:1px solid #8886}</style><h1>tapgate API</h1>\
         <p>For programs: <a href=\"/openapi.json\">openapi.json</a>. Send your API key as \
         <code>Authorization: Bearer &lt;api_key&gt;</code>. Errors are \
         <code>{\"error\": {\"code\", \"message\"}}</code>.</p>",
    );
    out.push_str("<nav>");
    for (name, operations) in tags(document) {
        let _ = write!(out, "<p><b>{name}:</b> ");
        for (at, (_, _, described)) in operations.iter().enumerate() {
            let text = |name: &str| escape(described[name].as_str().unwrap_or_default());
            let glue = if at == 0 { "" } else { " · " };
            let _ = write!(out, "{glue}<a href=\"#{}\">{}</a>", text("operationId"), text("summary"));
        }
    }
    out.push_str("</nav>");
    for (name, operations) in tags(document) {
        let _ = write!(out, "<h2>{name}</h2>");
        for (path, method, described) in operations {
            operation(&mut out, document, path, method, described);
        }
    }
    out
}

/// Each tag with its operations: path, method, description.
fn tags(document: &Value) -> impl Iterator<Item = (String, Vec<(&str, &str, &Value)>)> {
    let tags = document["tags"].as_array().into_iter().flatten();
    tags.map(|tag| {
        let paths = document["paths"].as_object().into_iter().flatten();
        let all = paths.flat_map(|(path, methods)| {
            let methods = methods.as_object().into_iter().flatten();
            methods.map(move |(method, described)| (path.as_str(), method.as_str(), described))
        });
        let ours = all.filter(|(_, _, described)| described["tags"][0] == tag["name"]).collect();
        (escape(tag["name"].as_str().unwrap_or_default()), ours)
    })
}
