//! Snapshots: the records. Single ones are wrapped in `data`, as the contract has it.

use super::vms::{find, keeps_memory, named};
use crate::http::{
    Account, ApiError, AppState, Fields, Id, List, NoFields, Params, fields_at_most as at_most, time,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{SnapshotKind, SnapshotRecord};

#[derive(Serialize)]
pub(crate) struct SnapshotView {
    id: String,
    source_virtual_machine_id: String,
    source_base_image: Option<String>,
    source_snapshot_id: Option<String>,
    label: Option<String>,
    /// Not of the contract, so said only of what the contract does not have.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_reason: Option<String>,
    r2_key: Option<String>,
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_size_bytes: Option<u64>,
    created_at: String,
}

impl From<SnapshotRecord> for SnapshotView {
    fn from(snapshot: SnapshotRecord) -> Self {
        Self {
            id: snapshot.id.into(),
            source_virtual_machine_id: snapshot.vm.into(),
            source_base_image: snapshot.base_image,
            source_snapshot_id: snapshot.source_snapshot.map(Into::into),
            label: snapshot.label,
            kind: (snapshot.kind != SnapshotKind::Disk).then_some(snapshot.kind.word()),
            status: snapshot.status.word(),
            failure_reason: snapshot.failure,
            r2_key: snapshot.r2_key,
            size_bytes: snapshot.size_bytes,
            memory_size_bytes: snapshot.memory.map(|memory| memory.stored_bytes),
            created_at: time(snapshot.created_at),
        }
    }
}

/// The wrapping.
#[derive(Serialize)]
pub(crate) struct Data<T> {
    pub(super) data: T,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<Data<SnapshotView>>), ApiError> {
    params.finish()?;
    let label = fields.optional_text("label")?;
    let kind = match fields.optional_text("kind")? {
        None => SnapshotKind::Disk,
        Some(word) => SnapshotKind::from_word(&word)
            .ok_or_else(|| ApiError::validation("`kind` must be one of disk, memory"))?,
    };
    fields.finish()?;
    if let Some(label) = &label {
        at_most("label", label, 128, false)?;
    }
    let settings = state.settings();
    // Whose it is first: nobody learns of another's VM.
    let record = find(&state, &account, &vm).await?;
    let memory_mib = match kind {
        SnapshotKind::Disk => None,
        SnapshotKind::Memory => {
            keeps_memory(&state)?;
            Some(record.resources.memory_mib)
        }
    };
    let (room, of) = (settings.room.clone(), vm.clone());
    let needs = tokio::task::spawn_blocking(move || room.snapshot_of(&of, memory_mib)).await;
    // A disk that cannot be looked at now is looked at again before it is copied.
    settings.room.check_snapshot(needs.ok().and_then(Result::ok).unwrap_or(0))?;
    let made = state
        .store()
        .snapshot_create(&account.user, &vm, kind, label, &settings.base_image, settings.quotas.snapshots)
        .await
        .map_err(|error| named(&vm, error.into()))?;
    state.engine().wake(vm);
    Ok((StatusCode::CREATED, Json(Data { data: made.into() })))
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Json<List<SnapshotView>>, ApiError> {
    let (limit, cursor) = (params.limit(50, 200)?, params.cursor());
    params.finish()?;
    let page = state.store().snapshots(&account.user, None, limit, cursor).await?;
    Ok(Json(List::of(page, Into::into)))
}

pub(crate) async fn list_of_vm(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    mut params: Params,
) -> Result<Json<List<SnapshotView>>, ApiError> {
    let (limit, cursor) = (params.limit(50, 200)?, params.cursor());
    params.finish()?;
    let page = state.store().snapshots(&account.user, Some(&vm), limit, cursor).await;
    Ok(Json(List::of(page.map_err(|error| named(&vm, error.into()))?, Into::into)))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Id(snapshot): Id<SnapshotId>,
    params: Params,
) -> Result<Json<Data<SnapshotView>>, ApiError> {
    params.finish()?;
    Ok(Json(Data { data: state.store().snapshot(&account.user, &snapshot).await?.into() }))
}

pub(crate) async fn remove(
    State(state): State<AppState>,
    account: Account,
    Id(snapshot): Id<SnapshotId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    state.store().snapshot_delete(&account.user, &snapshot).await?;
    state.engine().snapshots_deleted();
    Ok(StatusCode::NO_CONTENT)
}
