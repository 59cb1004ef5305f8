//! The audit log of egress.

use super::audit_stream;
use crate::http::{Account, ApiError, AppState, List, Params, exact_time, params_invalid as invalid};
use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use tapgate_model::{HostName, Mode, Protocol};
use tapgate_store::{AuditFilter, AuditRecord, Order, PageRequest};

#[derive(Serialize)]
pub(crate) struct EventView {
    id: String,
    timestamp: String,
    vm_id: String,
    host: Option<String>,
    cidr: Option<String>,
    protocol: Protocol,
    verdict: &'static str,
    allowed: bool,
    mode: Mode,
    // Beyond the contract.
    address: Option<String>,
    port: Option<u16>,
    rule_id: Option<String>,
    reason: &'static str,
    method: Option<String>,
    path: Option<String>,
    status: Option<u16>,
    secrets: Vec<String>,
    secrets_withheld: Vec<String>,
    bytes_out: u64,
    bytes_in: u64,
    duration_ms: u64,
    count: u32,
}

impl From<AuditRecord> for EventView {
    fn from(event: AuditRecord) -> Self {
        Self {
            cidr: event.cidr().map(|cidr| cidr.to_string()),
            id: event.id.into(),
            timestamp: exact_time(event.timestamp_us),
            vm_id: event.vm.into(),
            host: event.host,
            protocol: event.protocol,
            verdict: if event.rule_allows { "allowed" } else { "denied" },
            allowed: event.passed,
            mode: event.mode,
            address: event.address.map(|address| address.to_string()),
            port: event.port,
            rule_id: event.rule.map(Into::into),
            reason: event.reason.word(),
            method: event.method,
            path: event.path,
            status: event.status,
            secrets: event.secrets,
            secrets_withheld: event.secrets_withheld,
            bytes_out: event.bytes_out,
            bytes_in: event.bytes_in,
            duration_ms: event.duration_ms,
            count: event.count,
        }
    }
}

/// What is asked for, but for the page: it is the first unless the caller reads another.
fn filter(params: &mut Params) -> Result<AuditFilter, ApiError> {
    let vm = params.parsed("vm_id", "the ID of a VM, like vm_k3mf9xvw2p", |text| text.parse().ok())?;
    let rule_allows = params.parsed("verdict", "allowed or denied", |text| match text {
        "allowed" => Some(true),
        "denied" => Some(false),
        _ => None,
    })?;
    let passed = params.boolean("allowed")?;
    let mode = params.parsed("mode", "enforce or warn", Mode::from_word)?;
    let host = params.parsed("host", "a host name", |text| HostName::parse(text).ok())?;
    let cidr = match params.text("cidr") {
        None => None,
        Some(text) => Some(text.parse().map_err(|error| invalid("cidr", &format!("is wrong: {error}")))?),
    };
    let protocol = params.parsed("protocol", "one of http, tls, tcp, udp, icmp, dns", Protocol::from_word)?;
    let since_us = params.time("since")?;
    let until_us = params.time("until")?;
    let page = PageRequest { limit: 50, cursor: None, order: Order::Desc };
    Ok(AuditFilter {
        vm,
        rule_allows,
        passed,
        mode,
        host: host.map(|host| host.as_str().to_owned()),
        cidr,
        protocol,
        since_us,
        until_us,
        page,
    })
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, ApiError> {
    // `?follow` alone is as good as `?follow=true`.
    let follow = params.parsed("follow", "true or false", |text| match text {
        "" | "true" => Some(true),
        "false" => Some(false),
        _ => None,
    })?;
    let filter = AuditFilter { page: params.page(50, 500)?, ..filter(&mut params)? };
    params.finish()?;
    if follow == Some(true) {
        return audit_stream::follow(state, account, filter, &headers).await;
    }
    let page = state.store().audit().list(&account.user, filter).await?;
    Ok(Json(List::of(page, EventView::from)).into_response())
}

/// All events that match, oldest first, one JSON object a line.
pub(crate) async fn export(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Response, ApiError> {
    let filter = filter(&mut params)?;
    params.finish()?;
    audit_stream::export(state, account, filter).await
}
