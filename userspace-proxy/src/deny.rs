//! Refusals that people and language models can read: what was refused, why, and how to ask for it. The same event id is
//! in the audit.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use std::fmt::Write as _;
use tapgate_model::{EventId, HostName, Reason};

/// TLS alerts (RFC 8446 §6.2), each as a whole record, for connections that are not opened.
pub(crate) mod alert {
    /// No rule allows it.
    pub(crate) const ACCESS_DENIED: &[u8] = &[21, 3, 3, 0, 2, 2, 49];
    /// The hello does not parse.
    pub(crate) const DECODE_ERROR: &[u8] = &[21, 3, 3, 0, 2, 2, 50];
    /// The upstream could not be reached.
    pub(crate) const INTERNAL_ERROR: &[u8] = &[21, 3, 3, 0, 2, 2, 80];
    /// The upstream speaks none of the protocols that were offered.
    pub(crate) const NO_APPLICATION_PROTOCOL: &[u8] = &[21, 3, 3, 0, 2, 2, 120];
    /// The name does not resolve.
    pub(crate) const UNRECOGNIZED_NAME: &[u8] = &[21, 3, 3, 0, 2, 2, 112];
}

/// The alert for a reason.
pub(crate) fn alert_for(reason: Reason) -> &'static [u8] {
    match reason {
        Reason::BadHello => alert::DECODE_ERROR,
        Reason::Unresolved => alert::UNRECOGNIZED_NAME,
        Reason::Unreachable | Reason::Unverified | Reason::Fault => alert::INTERNAL_ERROR,
        _ => alert::ACCESS_DENIED,
    }
}

/// The HTTP status for a reason.
pub(crate) fn status_for(reason: Reason) -> StatusCode {
    match reason {
        Reason::BadRequest | Reason::BadName => StatusCode::BAD_REQUEST,
        Reason::NameMismatch => StatusCode::MISDIRECTED_REQUEST,
        Reason::Limit => StatusCode::TOO_MANY_REQUESTS,
        Reason::Unresolved | Reason::Unreachable | Reason::Unverified | Reason::Fault => {
            StatusCode::BAD_GATEWAY
        }
        _ => StatusCode::FORBIDDEN,
    }
}

fn code_for(reason: Reason) -> &'static str {
    match status_for(reason) {
        StatusCode::BAD_REQUEST => "bad_request",
        StatusCode::BAD_GATEWAY => "upstream_failed",
        StatusCode::MISDIRECTED_REQUEST => "misdirected_request",
        StatusCode::TOO_MANY_REQUESTS => "egress_limit",
        _ => "egress_denied",
    }
}

/// One refusal.
pub(crate) struct Denial<'a> {
    pub(crate) reason: Reason,
    pub(crate) host: Option<&'a HostName>,
    pub(crate) event: EventId,
    /// More than the reason says by itself.
    pub(crate) detail: Option<&'a str>,
}

impl Denial<'_> {
    fn target(&self) -> String {
        self.host.map_or_else(|| "this destination".to_owned(), |host| format!("`{host}`"))
    }

    fn message(&self) -> String {
        let target = self.target();
        let sentence = match self.reason {
            Reason::NoRule => format!("No egress rule allows {target}."),
            Reason::NoName => "The request names no host, and no rule allows its address.".to_owned(),
            Reason::AddressLiteral => {
                "The request names an address, not a host, and no rule allows it.".to_owned()
            }
            Reason::NameMismatch => {
                "The request is for another host than the connection it came on.".to_owned()
            }
            Reason::Rebinding => format!("{target} resolves only to addresses that no VM may reach."),
            Reason::Private => "The address is in a private range, which only a cidr rule opens.".to_owned(),
            Reason::Unresolved => format!("The name {target} does not resolve."),
            Reason::Unreachable => format!("The upstream {target} could not be reached."),
            Reason::Unverified => format!("The certificate of {target} could not be verified for this name."),
            Reason::Limit => "This VM has reached a limit; try again later.".to_owned(),
            Reason::Tunnel => "The gate lets no tunnel through.".to_owned(),
            Reason::BadName => "The Host of the request is not a valid host name.".to_owned(),
            Reason::BadRequest => "The request is malformed or ambiguous.".to_owned(),
            Reason::Revoked => format!("The rules no longer allow {target}."),
            other => format!("Egress to {target} is denied: {}.", other.word()),
        };
        match self.detail {
            Some(detail) => format!("{sentence} ({detail})"),
            None => sentence,
        }
    }

    fn hint(&self) -> String {
        match (self.reason, self.host) {
            (Reason::NoRule | Reason::Revoked, Some(host)) => {
                format!("Ask the owner of this VM to add an egress rule for the host {host}.")
            }
            (Reason::NoName | Reason::AddressLiteral | Reason::Private | Reason::NoRule, _) => {
                "Ask the owner of this VM for a cidr rule, or connect by a host name that a rule allows."
                    .to_owned()
            }
            _ => format!("The owner of this VM finds more in the audit log under {}.", self.event),
        }
    }

    /// The response, in the form that the client asks for.
    pub(crate) fn response(&self, accept: &HeaderMap) -> Response<Bytes> {
        let (kind, body) = match form(accept) {
            Form::Json => ("application/json", self.json()),
            Form::Text => {
                let text = format!("{}\n{}\nevent: {}\n", self.message(), self.hint(), self.event);
                ("text/plain; charset=utf-8", text)
            }
            Form::Html => ("text/html; charset=utf-8", self.html()),
        };
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = status_for(self.reason);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(event) = HeaderValue::from_str(self.event.as_str()) {
            headers.insert("x-tapgate-event", event);
        }
        headers.insert("x-tapgate-reason", HeaderValue::from_static(self.reason.word()));
        response
    }

    fn json(&self) -> String {
        let value = serde_json::json!({ "error": {
            "code": code_for(self.reason),
            "message": self.message(),
            "host": self.host.map(HostName::as_str),
            "reason": self.reason.word(),
            "event_id": self.event.as_str(),
            "hint": self.hint(),
        }});
        format!("{value}\n")
    }

    fn html(&self) -> String {
        let mut page = String::from("<!doctype html><meta charset=utf-8><title>Egress refused</title>");
        for (tag, text) in [
            ("h1", "Egress refused"),
            ("p", &self.message()),
            ("p", &self.hint()),
            ("small", self.event.as_str()),
        ] {
            let _ = write!(page, "<{tag}>{}</{tag}>", escape(text));
        }
        page.push('\n');
        page
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Of a request's fields, those that a refusal's form depends on: what is kept until it is known whether there will be one.
pub(crate) fn accept(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    if let Some(accept) = headers.get(header::ACCEPT) {
        kept.insert(header::ACCEPT, accept.clone());
    }
    kept
}

enum Form {
    Json,
    Text,
    Html,
}

fn form(headers: &HeaderMap) -> Form {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accept
        .split(',')
        .find_map(|kind| match kind.split(';').next().unwrap_or_default().trim() {
            "application/json" | "*/*" | "application/*" => Some(Form::Json),
            "text/html" | "application/xhtml+xml" => Some(Form::Html),
            "text/plain" | "text/*" => Some(Form::Text),
            _ => None,
        })
        .unwrap_or(Form::Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_why_and_how_to_ask() {
        let host = "a.example".parse().unwrap();
        let denial =
            Denial { reason: Reason::NoRule, host: Some(&host), event: EventId::generate(), detail: None };
        let mut headers = HeaderMap::new();
        let response = denial.response(&headers);
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        let json: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(json["error"]["code"], "egress_denied");
        assert_eq!(json["error"]["reason"], "no_rule");
        assert_eq!(json["error"]["event_id"], denial.event.as_str());
        assert!(json["error"]["hint"].as_str().unwrap().contains("a.example"));
        for (accept, kind) in
            [("text/html,*/*", "text/html"), ("text/plain", "text/plain"), ("*/*", "application/json")]
        {
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            let kind_sent = denial.response(&headers).headers()[header::CONTENT_TYPE].clone();
            assert!(kind_sent.to_str().unwrap().starts_with(kind));
        }
    }
}
