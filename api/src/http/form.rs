//! Pages for people: forms without script, and the guard against forms that other sites send.
//!
//! Each form carries a ticket over the visitor's own cookie. A page elsewhere can make a browser send the cookie, never
//! the ticket that belongs to it.

use super::fields::BODY_TIMEOUT;
use super::openapi::escape;
use super::{ApiError, AppState, Params};
use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse as _, Response};
use std::collections::HashMap;
use std::convert::Infallible;

const COOKIE: &str = "tapgate_form";
const MAX_FORM: usize = 16 * 1024;
/// How long a page may lie open (microseconds).
const OPEN_FOR: i64 = 3_600_000_000;

/// The fields of a form.
pub(crate) struct Form(HashMap<String, String>);

impl<S: Send + Sync> FromRequest<S> for Form {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        let wrong = || message(StatusCode::BAD_REQUEST, "That did not work", "The form could not be read.");
        let read = tokio::time::timeout(BODY_TIMEOUT, to_bytes(request.into_body(), MAX_FORM)).await;
        let late =
            || message(StatusCode::REQUEST_TIMEOUT, "That took too long", "Go back, and send it again.");
        let bytes = read.map_err(|_| late())?.map_err(|_| wrong())?;
        Ok(Self(url::form_urlencoded::parse(&bytes).into_owned().collect()))
    }
}

impl Form {
    pub(crate) fn field(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }
}

/// The ticket of a page's address, which has nothing else; empty if it has none.
pub(crate) struct Ticket(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Ticket {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let read = Params::from_request_parts(parts, state).await.and_then(|mut params| {
            let ticket = params.text("ticket").unwrap_or_default();
            params.finish().map(|()| Self(ticket))
        });
        read.map_err(|error| failed(&error, parts.uri.path()))
    }
}

/// The address of a page that has no parameters.
pub(crate) struct NoParams;

impl<S: Send + Sync> FromRequestParts<S> for NoParams {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let read = Params::from_request_parts(parts, state).await.and_then(Params::finish);
        read.map(|()| Self).map_err(|error| failed(&error, parts.uri.path()))
    }
}

/// The visitor, as far as the cookie tells one from another.
pub(crate) struct Visitor(Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for Visitor {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(cookie(&parts.headers)))
    }
}

fn cookie(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let value = pairs.find(|(name, _)| *name == COOKIE)?.1;
    (value.len() == 32 && value.bytes().all(|b| b.is_ascii_hexdigit())).then(|| value.to_owned())
}

impl Visitor {
    /// A page with a form that this visitor alone can send. `fields` is markup.
    pub(crate) fn form(
        self,
        state: &AppState,
        title: &str,
        action: &str,
        fields: &str,
        button: &str,
    ) -> Response {
        let fresh = self.0.is_none();
        let visitor = self.0.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
        let ticket = state.store().ticket("form", &visitor, tapgate_store::now_us() + OPEN_FOR);
        let body = format!(
            "<form method=post action=\"{action}\"><input type=hidden name=form value=\"{ticket}\">{fields}\
             <p><button>{}</button></form>",
            escape(button)
        );
        let mut response = page(StatusCode::OK, title, &body);
        if fresh {
            let secure = if state.settings().public_url.starts_with("https:") { "; Secure" } else { "" };
            let value = format!("{COOKIE}={visitor}; Path=/; HttpOnly; SameSite=Strict{secure}");
            if let Ok(value) = value.parse() {
                response.headers_mut().insert(header::SET_COOKIE, value);
            }
        }
        response
    }

    /// The refusal of a form that did not come from our page.
    pub(crate) fn refusal(&self, state: &AppState, form: &Form) -> Option<Response> {
        let ours = state.store().redeem("form", form.field("form"));
        if ours.is_some() && ours == self.0 {
            return None;
        }
        let what = "The page was open for too long, or your browser keeps no cookies. Go back, load it again, and retry.";
        Some(message(StatusCode::FORBIDDEN, "That did not work", what))
    }
}

/// An input with its label.
pub(crate) fn input(name: &str, kind: &str, label: &str, more: &str) -> String {
    format!(
        "<p><label>{}<br><input name=\"{name}\" type=\"{kind}\" required {more}></label></p>",
        escape(label)
    )
}

/// A page of markup.
pub(crate) fn page(status: StatusCode, title: &str, body: &str) -> Response {
    let title = escape(title);
    let html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><title>{title} - tapgate</title>\
         <meta name=viewport content=\"width=device-width\"><style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui;max-width:28rem;\
         margin:3rem auto;padding:0 1rem}}input{{font:inherit;width:100%;box-sizing:border-box;padding:.4rem}}\
         button{{font:inherit;padding:.4rem 1rem}}</style><h1>{title}</h1>{body}</html>"
    );
    (status, Html(html)).into_response()
}

/// A page that says one thing.
pub(crate) fn message(status: StatusCode, title: &str, text: &str) -> Response {
    page(status, title, &format!("<p>{}</p>", escape(text)))
}

/// An API error as a page, with a way back to the form at `again`.
pub(crate) fn failed(error: &ApiError, again: &str) -> Response {
    let body = format!("<p>{}</p><p><a href=\"{}\">Try again</a></p>", escape(&error.message), escape(again));
    let mut response = page(error.status(), "That did not work", &body);
    if let Some(seconds) = error.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}
