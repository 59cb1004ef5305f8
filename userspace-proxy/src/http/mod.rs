//! HTTP on a guest's connection, in clear text or out of opened TLS: each request decided anew, sent on, cleaned, audited.

pub(crate) mod authority;
pub(crate) mod body;
pub(crate) mod burden;
mod frames;
pub(crate) mod guard;
pub(crate) mod headers;
mod http2;
mod interim;
pub(crate) mod pool;
mod received;
pub(crate) mod request;
pub(crate) mod response;
mod rewrite;
mod sending;
pub(crate) mod serve;
mod talk;
pub(crate) mod target;
pub(crate) mod under_way;
mod upgrade;
pub(crate) mod upstream;
