//! Query parameters, taken one by one: each error names its parameter, and one that nobody asked for is an error too.

use super::{ApiError, Code};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use std::collections::BTreeMap;
use tapgate_store::{Order, PageRequest};

/// The parameters that are not taken yet.
#[derive(Debug)]
pub struct Params(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let mut out = BTreeMap::new();
        for (name, value) in url::form_urlencoded::parse(parts.uri.query().unwrap_or("").as_bytes()) {
            let shown = printable(&name);
            if out.insert(name.into_owned(), value.into_owned()).is_some() {
                return Err(invalid(&shown, "is given more than once"));
            }
        }
        Ok(Self(out))
    }
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// 400 for a parameter.
pub(crate) fn invalid(name: &str, what: &str) -> ApiError {
    ApiError::new(Code::InvalidParameter, format!("The query parameter `{name}` {what}"))
}

impl Params {
    /// A parameter as it is.
    pub fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// A parameter that `read` understands; `expected` says what it should have been.
    pub fn parsed<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(text) => read(&text).map(Some).ok_or_else(|| invalid(name, &format!("must be {expected}"))),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.parsed(name, "true or false", |text| text.parse().ok())
    }

    /// A point in time, in microseconds since the epoch.
    pub fn time(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        self.parsed(name, "a time in ISO 8601 with its offset, like 2026-02-28T12:00:00Z", |text| {
            Some(text.parse::<jiff::Timestamp>().ok()?.as_microsecond())
        })
    }

    /// `limit`.
    pub fn limit(&mut self, default: u32, max: u32) -> Result<u32, ApiError> {
        let expected = format!("a whole number from 1 to {max}");
        let limit = self.parsed("limit", &expected, |text| {
            let plain = text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|n| plain && (1..=max).contains(n))
        })?;
        Ok(limit.unwrap_or(default))
    }

    /// `cursor`; an empty one is the first page.
    pub fn cursor(&mut self) -> Option<String> {
        self.text("cursor").filter(|cursor| !cursor.is_empty())
    }

    /// `cursor`, `limit` and `order`.
    pub fn page(&mut self, default: u32, max: u32) -> Result<PageRequest, ApiError> {
        let order = self.parsed("order", "asc or desc", |text| match text {
            "asc" => Some(Order::Asc),
            "desc" => Some(Order::Desc),
            _ => None,
        })?;
        Ok(PageRequest {
            limit: self.limit(default, max)?,
            cursor: self.cursor(),
            order: order.unwrap_or_default(),
        })
    }

    /// Refuses what is left.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                let message = format!("Unknown query parameter `{}`", printable(name));
                Err(ApiError::new(Code::UnknownParameter, message))
            }
        }
    }
}
