//! What was counted for one VM: its traffic by reason, and what the audit log had no room for.

use super::vms::find;
use crate::http::{Account, ApiError, AppState, Id, Params};
use crate::traffic::VmTraffic;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use std::collections::BTreeMap;
use tapgate_model::{Reason, VmId};

#[derive(Serialize)]
pub(crate) struct CountersView {
    vm_id: String,
    packets_out: u64,
    bytes_out: u64,
    packets_in: u64,
    bytes_in: u64,
    passed: BTreeMap<&'static str, u64>,
    dropped: BTreeMap<&'static str, u64>,
    /// Attempts that are in no audit event: the kernel reported too many, or the log's queue was full.
    events_lost: u64,
    events_dropped: u64,
    /// Flows that the kernel forwards just now.
    flows: u64,
}

fn by_reason(counted: Vec<(Reason, u64)>) -> BTreeMap<&'static str, u64> {
    counted.into_iter().map(|(reason, count)| (reason.word(), count)).collect()
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
) -> Result<Json<CountersView>, ApiError> {
    params.finish()?;
    let vm = find(&state, &account, &vm).await?.id;
    let events_dropped = state.store().audit().dropped(&vm).await?;
    let counted = state.engine().counters(&vm).await.map_err(|error| {
        tracing::error!(%vm, %error, "counters.unreadable");
        ApiError::internal()
    })?;
    // One without a gate has had no traffic since.
    let traffic = counted.map(VmTraffic::from).unwrap_or_default();
    let VmTraffic { packets_out, bytes_out, packets_in, bytes_in, passed, dropped, events_lost, flows } =
        traffic;
    Ok(Json(CountersView {
        vm_id: vm.into(),
        packets_out,
        bytes_out,
        packets_in,
        bytes_in,
        passed: by_reason(passed),
        dropped: by_reason(dropped),
        events_lost,
        events_dropped,
        flows,
    }))
}
