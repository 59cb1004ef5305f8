//! A JSON body, taken apart field by field: each error names its field, and a field that nobody asked for is one too.

use super::{Account, ApiError, Code};
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::header;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::time::Duration;

/// Longest body. A secret's value is 16 KiB at most, a prompt 64 KiB.
const MAX_BODY: usize = 256 * 1024;
/// Of who has shown no key: many at once hold little of the host's memory.
const MAX_STRANGERS_BODY: usize = 32 * 1024;
/// Longest wait for a body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(15);

/// The fields of a JSON object that are not taken yet, and whether there was a body at all.
#[derive(Debug)]
pub struct Fields(Map<String, Value>, bool);

impl<S: Send + Sync> FromRequest<S> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let json = request.headers().get(header::CONTENT_TYPE).map(|value| {
            let essence = value.to_str().unwrap_or("").split(';').next().unwrap_or("").trim();
            essence.eq_ignore_ascii_case("application/json")
        });
        // Who has one was asked for it before.
        let known = request.extensions().get::<Account>().is_some();
        let most = if known { MAX_BODY } else { MAX_STRANGERS_BODY };
        let bytes = read(request.into_body(), most).await?;
        if bytes.is_empty() {
            return Ok(Self(Map::new(), false));
        }
        if json != Some(true) {
            let message = "Send the body as JSON, with the header `Content-Type: application/json`";
            return Err(ApiError::new(Code::UnsupportedMediaType, message));
        }
        match serde_json::from_slice(&bytes) {
            Ok(Object(fields)) => Ok(Self(fields, true)),
            Err(error) if error.is_data() => {
                Err(ApiError::new(Code::InvalidJson, format!("The body must be a JSON object: {error}")))
            }
            Err(error) => {
                Err(ApiError::new(Code::InvalidJson, format!("The body is not valid JSON: {error}")))
            }
        }
    }
}

/// Nothing, or an empty object: what a route takes that has nothing to be told.
#[derive(Debug)]
pub struct NoFields;

impl<S: Send + Sync> FromRequest<S> for NoFields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Fields::from_request(request, state).await?.finish().map(|()| Self)
    }
}

/// An object without a name that comes twice: what looked at the request before may have taken the other (RFC 8259, section 4).
struct Object(Map<String, Value>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut all: A) -> Result<Object, A::Error> {
                let mut fields = Map::new();
                while let Some((name, value)) = all.next_entry::<String, Value>()? {
                    if fields.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("{name:?} is given twice")));
                    }
                    fields.insert(name, value);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// The body of who has a key, or why it cannot be had.
pub(super) async fn whole_body(body: Body) -> Result<Bytes, ApiError> {
    read(body, MAX_BODY).await
}

async fn read(body: Body, most: usize) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(unreadable(&error, most)),
        Err(_) => Err(ApiError::new(Code::RequestTimeout, "The request body did not arrive in time")),
    }
}

fn unreadable(error: &axum::Error, most: usize) -> ApiError {
    use std::error::Error as _;
    let mut source = error.source();
    while let Some(inner) = source {
        if inner.is::<http_body_util::LengthLimitError>() {
            let message = format!("The request body is larger than {} KiB", most / 1024);
            return ApiError::new(Code::PayloadTooLarge, message);
        }
        source = inner.source();
    }
    ApiError::new(Code::InvalidBody, "The request body could not be read")
}

impl Fields {
    /// Refuses an absent body, where no field is required that would.
    pub fn given(&self) -> Result<(), ApiError> {
        match self.1 {
            true => Ok(()),
            false => {
                Err(ApiError::new(Code::InvalidJson, "Send a JSON object as the body; it may be empty: {}"))
            }
        }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// A string that must be there.
    pub fn text(&mut self, name: &str) -> Result<String, ApiError> {
        self.optional_text(name)?.ok_or_else(|| ApiError::validation(format!("`{name}` is required")))
    }

    /// A string that may be absent or null.
    pub fn optional_text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::validation(format!("`{name}` must be a string"))),
        }
    }

    /// A string of a PATCH: absent, null, or given.
    pub fn patch_text(&mut self, name: &str) -> Result<Option<Option<String>>, ApiError> {
        if !self.0.contains_key(name) {
            return Ok(None);
        }
        self.optional_text(name).map(Some)
    }

    /// A string of a PATCH that cannot be removed.
    pub fn patch_required(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.patch_text(name)? {
            Some(None) => Err(ApiError::validation(format!("`{name}` must not be null"))),
            given => Ok(given.flatten()),
        }
    }

    /// A boolean that may be absent or null.
    pub fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(ApiError::validation(format!("`{name}` must be true or false"))),
        }
    }

    /// A whole number within bounds that may be absent or null.
    pub fn optional_number(&mut self, name: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
        match self.take(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match whole(&value) {
                Some(number) if (low..=high).contains(&number) => Ok(Some(number)),
                _ => {
                    Err(ApiError::validation(format!("`{name}` must be a whole number from {low} to {high}")))
                }
            },
        }
    }

    /// A list of strings that may be absent; `null` is refused where `nullable` is false.
    pub fn optional_texts(&mut self, name: &str, nullable: bool) -> Result<Option<Vec<String>>, ApiError> {
        let wrong = || ApiError::validation(format!("`{name}` must be an array of strings"));
        match self.take(name) {
            None => Ok(None),
            Some(Value::Null) if nullable => Ok(None),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| if let Value::String(text) = item { Ok(text) } else { Err(wrong()) })
                .collect::<Result<_, _>>()
                .map(Some),
            Some(_) => Err(wrong()),
        }
    }

    /// Refuses what is left.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
                Err(ApiError::validation(format!("Unknown field `{shown}`")))
            }
        }
    }
}

/// A whole number, also one written like `2.0`: JSON does not tell them apart.
fn whole(value: &Value) -> Option<u64> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_u64().or_else(|| {
        let number = value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..=EXACT).contains(n))?;
        format!("{number:.0}").parse().ok()
    })
}

/// Checks that a text is not empty, not too long, and holds no control characters besides those allowed.
pub(crate) fn bounded(name: &str, text: &str, max: usize, multiline: bool) -> Result<(), ApiError> {
    if text.trim().is_empty() {
        return Err(ApiError::validation(format!("`{name}` must not be empty")));
    }
    at_most(name, text, max, multiline)
}

/// As [`bounded`], but may be empty.
pub(crate) fn at_most(name: &str, text: &str, max: usize, multiline: bool) -> Result<(), ApiError> {
    if text.chars().count() > max {
        return Err(ApiError::validation(format!("`{name}` must be at most {max} characters long")));
    }
    if text.chars().any(|c| c.is_control() && !(multiline && matches!(c, '\n' | '\r' | '\t'))) {
        return Err(ApiError::validation(format!("`{name}` must not contain control characters")));
    }
    Ok(())
}
