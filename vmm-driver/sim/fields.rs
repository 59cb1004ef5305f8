//! Bodies against the fields that a specification defines: no unknown one, none missing, each of its type.

use serde_json::Value;

/// What a field may hold.
#[derive(Clone, Copy)]
pub enum Kind {
    Bool,
    Integer(u64, u64),
    Text,
    OneOf(&'static [&'static str]),
}

/// Name, whether it is required, what it holds.
pub type Field = (&'static str, bool, Kind);

pub fn check(body: &Value, fields: &[Field]) -> Result<(), String> {
    let object = body.as_object().ok_or("the body is not an object")?;
    for name in object.keys() {
        if !fields.iter().any(|(known, ..)| known == name) {
            return Err(format!("unknown field `{name}`"));
        }
    }
    for (name, required, kind) in fields {
        match (object.get(*name), kind) {
            (None, _) if *required => return Err(format!("missing field `{name}`")),
            (None, _) | (Some(Value::Bool(_)), Kind::Bool) | (Some(Value::String(_)), Kind::Text) => {}
            (Some(Value::Number(n)), Kind::Integer(least, most))
                if n.as_u64().is_some_and(|n| (*least..=*most).contains(&n)) => {}
            (Some(Value::String(text)), Kind::OneOf(words)) if words.contains(&text.as_str()) => {}
            (Some(value), _) => return Err(format!("field `{name}` cannot be {value}")),
        }
    }
    Ok(())
}
