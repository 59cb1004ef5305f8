//! VMs: create, list, show, start, stop, destroy, and how to reach them by SSH.

use crate::http::{
    Account, ApiError, AppState, Code, Fields, Id, List, NoFields, Params, fields_bounded as bounded,
    refused, time,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use std::sync::Arc;
use tapgate_model::lifecycle::{Call, Refusal, decide};
use tapgate_model::{SnapshotId, Status, StatusDetail, UserId, VmId};
use tapgate_store::{
    NewVm, Resources, SnapshotKind, SnapshotRecord, SshPorts, Suspension, VmFilter, VmRecord, VmSort,
};
use tokio::time::Instant;

#[derive(Serialize)]
pub(crate) struct VmView {
    id: String,
    name: String,
    status: Status,
    status_detail: StatusDetail,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_reason: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    suspended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspend_failure: Option<String>,
    created_at: String,
    updated_at: String,
}

impl From<VmRecord> for VmView {
    fn from(vm: VmRecord) -> Self {
        Self {
            id: vm.id.into(),
            name: vm.name,
            status: vm.detail.status(),
            status_detail: vm.detail,
            failure_reason: vm.failure,
            suspended: vm.suspension == Suspension::Kept,
            suspend_failure: vm.suspend_failure,
            created_at: time(vm.created_at),
            updated_at: time(vm.updated_at),
        }
    }
}

#[derive(Serialize)]
pub(crate) struct SshView {
    host: String,
    port: u16,
    username: &'static str,
    command: String,
}

pub(crate) async fn create(
    State(state): State<AppState>,
    account: Account,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<VmView>), ApiError> {
    params.finish()?;
    let name = fields.text("name")?;
    let public_key = fields.text("public_key")?;
    let snapshot = fields.optional_text("snapshot_id")?;
    let asked = asked(&state, &mut fields)?;
    fields.finish()?;
    bounded("name", &name, 64, false)?;
    let public_key = check_public_key(&public_key)?;
    let snapshot = snapshot.map(|text| parse_snapshot(&text)).transpose()?;
    let resources = match &snapshot {
        Some(snapshot) => {
            let snapshot = state.store().snapshot(&account.user, snapshot).await?;
            of_snapshot(&state, &snapshot, asked).await?
        }
        None => asked.or_default(&state),
    };
    let new = new_vm(&state, account.user, name, public_key, snapshot, resources).await?;
    let vm = state.store().vm_create(new).await?;
    state.engine().wake(vm.id.clone());
    Ok((StatusCode::CREATED, Json(vm.into())))
}

/// A VM's share of the host, as far as the body says.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    vcpus: Option<u32>,
    memory_mib: Option<u32>,
    disk_bytes: Option<u64>,
}

impl Asked {
    /// What is not said is as the settings have it.
    pub(super) fn or_default(self, state: &AppState) -> Resources {
        self.or(state.settings().resources)
    }

    fn or(self, other: Resources) -> Resources {
        Resources {
            vcpus: self.vcpus.unwrap_or(other.vcpus),
            memory_mib: self.memory_mib.unwrap_or(other.memory_mib),
            disk_bytes: self.disk_bytes.unwrap_or(other.disk_bytes),
        }
    }
}

pub(super) fn asked(state: &AppState, fields: &mut Fields) -> Result<Asked, ApiError> {
    let max = state.settings().max_resources;
    let vcpus = fields.optional_number("vcpus", 1, max.vcpus.into())?;
    let memory_mib = fields.optional_number("memory_mib", 128, max.memory_mib.into())?;
    let disk_gib = fields.optional_number("disk_gib", 1, max.disk_bytes >> 30)?;
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Ok(Asked {
        vcpus: vcpus.map(small),
        memory_mib: memory_mib.map(small),
        disk_bytes: disk_gib.map(|gib| gib << 30),
    })
}

/// A VM from a snapshot has a disk as large as that one's at least: it never shrinks, so this is what the host has to have room
/// for. A memory goes on in a machine like its own and in no other.
pub(super) async fn of_snapshot(
    state: &AppState,
    snapshot: &SnapshotRecord,
    asked: Asked,
) -> Result<Resources, ApiError> {
    if snapshot.kind == SnapshotKind::Disk {
        let least = state.store().snapshot_disk_bytes(&snapshot.id).await?;
        return of_disk(state, least, asked);
    }
    keeps_memory(state)?;
    let parent = state.store().vm_any(&snapshot.vm).await?.resources;
    if asked.or(parent) != parent {
        return Err(ApiError::validation(format!(
            "A VM from a snapshot of kind `memory` has the `vcpus`, `memory_mib` and `disk_gib` of the VM that it was taken \
             from: {}, {} and {}; leave them out",
            parent.vcpus,
            parent.memory_mib,
            parent.disk_bytes >> 30
        )));
    }
    Ok(parent)
}

fn of_disk(state: &AppState, least: u64, asked: Asked) -> Result<Resources, ApiError> {
    let (gib, max) = (least.div_ceil(1 << 30), state.settings().max_resources.disk_bytes);
    if asked.disk_bytes.is_some_and(|bytes| bytes < least) {
        return Err(ApiError::validation(format!(
            "`disk_gib` must be at least {gib}, the size of the snapshot's disk; leave it out, or ask for more"
        )));
    }
    if least > max {
        return Err(ApiError::validation(format!(
            "The snapshot's disk has {gib} GiB, and this host's VMs have at most {}",
            max >> 30
        )));
    }
    let resources = asked.or_default(state);
    Ok(Resources { disk_bytes: resources.disk_bytes.max(least), ..resources })
}

pub(super) async fn new_vm(
    state: &AppState,
    user: UserId,
    name: String,
    public_key: String,
    snapshot: Option<SnapshotId>,
    resources: Resources,
) -> Result<NewVm, ApiError> {
    let id = VmId::generate();
    let (maker, vm) = (state.clone(), id.clone());
    let ca = tokio::task::spawn_blocking(move || maker.make_ca(&vm)).await;
    let ca = ca.map_err(anyhow::Error::from).and_then(|made| made).map_err(|error| {
        tracing::error!(%error, "a VM's certificate authority could not be made");
        ApiError::internal()
    })?;
    let settings = state.settings();
    let made_from = match &snapshot {
        Some(id) => Some(state.store().snapshot(&user, id).await?),
        None => None,
    };
    settings.room.check(resources, Some(settings.room.new_disk(made_from.as_ref())))?;
    let (host, is_free) = (settings.public_host.clone(), settings.is_free);
    Ok(NewVm {
        id,
        user,
        name,
        public_key,
        snapshot,
        resources,
        ca,
        ssh_ports: SshPorts {
            range: settings.ssh_ports.clone(),
            is_free: Arc::new(move |port| is_free(&host, port)),
        },
        slots: settings.slots,
        quota: settings.quotas.vms,
        capacity: settings.room.capacity(),
    })
}

pub(super) fn parse_snapshot(text: &str) -> Result<SnapshotId, ApiError> {
    text.parse().map_err(|_| {
        let shown: String = text.chars().filter(|c| !c.is_control()).take(64).collect();
        ApiError::new(Code::SnapshotNotFound, format!("No snapshot with ID {shown}"))
    })
}

/// How many keys may be given at once.
const MAX_KEYS: usize = 32;

/// Reads OpenSSH public keys, one a line, and writes them again: nothing but type, key and comment.
pub(super) fn check_public_key(text: &str) -> Result<String, ApiError> {
    let text = text.trim();
    if text.contains("PRIVATE KEY") {
        return Err(ApiError::validation(
            "`public_key` holds a private key; send the content of the .pub file, and replace that key",
        ));
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() || lines.len() > MAX_KEYS {
        return Err(ApiError::validation(format!("`public_key` must hold 1 to {MAX_KEYS} keys, one a line")));
    }
    let keys = lines.into_iter().map(check_one_key).collect::<Result<Vec<_>, _>>()?;
    Ok(keys.join("\n"))
}

fn check_one_key(text: &str) -> Result<String, ApiError> {
    let wrong = "`public_key` must be an OpenSSH public key, like the content of ~/.ssh/id_ed25519.pub";
    if text.len() > 16 * 1024 || text.chars().any(char::is_control) {
        return Err(ApiError::validation(wrong));
    }
    let key = ssh_key::PublicKey::from_openssh(text).map_err(|_| ApiError::validation(wrong))?;
    key.to_openssh().map_err(|_| ApiError::validation(wrong))
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Json<List<VmView>>, ApiError> {
    let status =
        params.parsed("status", "one of pending, running, stopped, destroyed, failed", Status::from_word)?;
    let detail = params.parsed(
        "status_detail",
        "one of queued, creating, starting, running, ready, stopping, stopped, destroying, destroyed, failed",
        StatusDetail::from_word,
    )?;
    let name = params.text("name");
    let sort = params.parsed("sort", "one of created_at, updated_at, name", |text| match text {
        "created_at" => Some(VmSort::Created),
        "updated_at" => Some(VmSort::Updated),
        "name" => Some(VmSort::Name),
        _ => None,
    })?;
    let page = params.page(20, 100)?;
    params.finish()?;
    let filter = VmFilter { status, detail, name };
    let page = state.store().vms(&account.user, filter, sort.unwrap_or_default(), page).await?;
    Ok(Json(List::of(page, Into::into)))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
) -> Result<Json<VmView>, ApiError> {
    params.finish()?;
    Ok(Json(find(&state, &account, &vm).await?.into()))
}

/// The VM, with the contract's message where there is none.
pub(super) async fn find(state: &AppState, account: &Account, vm: &VmId) -> Result<VmRecord, ApiError> {
    state.store().vm(&account.user, vm).await.map_err(|error| named(vm, error.into()))
}

pub(super) fn named(vm: &VmId, error: ApiError) -> ApiError {
    match error.code {
        Code::VmNotFound => ApiError::new(Code::VmNotFound, format!("No VM with ID {vm}")),
        _ => error,
    }
}

pub(crate) async fn start(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    _: NoFields,
) -> Result<Json<VmView>, ApiError> {
    params.finish()?;
    let deadline = Instant::now() + state.settings().start_wait;
    let mut watch = state.engine().watch(&vm);
    let room = &state.settings().room;
    let stopped = find(&state, &account, &vm).await?;
    if decide(Call::Start, stopped.detail).is_ok() {
        room.check(stopped.resources, None)?;
    }
    let (mut record, _) = state
        .store()
        .vm_call_within(&account.user, &vm, Call::Start, room.capacity())
        .await
        .map_err(|error| named(&vm, error.into()))?;
    state.engine().wake(vm.clone());
    while record.detail.status() == Status::Pending && watch.changed(deadline).await {
        record = find(&state, &account, &vm).await?;
    }
    Ok(Json(record.into()))
}

/// Enters the call into the records and tells the engine, also where it was called before: whoever calls again misses something.
async fn called(state: &AppState, account: &Account, vm: VmId, call: Call) -> Result<VmView, ApiError> {
    let called = state.store().vm_call(&account.user, &vm, call).await;
    let (record, _) = called.map_err(|error| named(&vm, error.into()))?;
    state.engine().wake(vm);
    Ok(record.into())
}

pub(crate) async fn stop(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    _: NoFields,
) -> Result<Json<VmView>, ApiError> {
    params.finish()?;
    called(&state, &account, vm, Call::Stop).await.map(Json)
}

pub(crate) async fn suspend(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    _: NoFields,
) -> Result<Json<VmView>, ApiError> {
    params.finish()?;
    // Whose it is first: nobody learns of another's VM.
    let record = find(&state, &account, &vm).await?;
    keeps_memory(&state)?;
    state.settings().room.check_memory_file(record.resources.memory_mib)?;
    called(&state, &account, vm, Call::Suspend).await.map(Json)
}

/// Refuses what needs a driver that can keep a guest's memory.
pub(super) fn keeps_memory(state: &AppState) -> Result<(), ApiError> {
    if state.settings().keeps_memory {
        return Ok(());
    }
    Err(ApiError::new(
        Code::DriverCannot,
        "This host's driver cannot keep a VM's memory; the operator may choose driver = \"qemu\"",
    ))
}

pub(crate) async fn destroy(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    called(&state, &account, vm, Call::Destroy).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn ssh(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
) -> Result<Json<SshView>, ApiError> {
    params.finish()?;
    let vm = find(&state, &account, &vm).await?;
    if vm.detail.status() == Status::Destroyed {
        return Err(ApiError::new(refused(Refusal::Destroyed), Refusal::Destroyed.to_string()));
    }
    let host = state.settings().public_host.clone();
    let command = format!("ssh -p {} root@{host}", vm.ssh_port);
    Ok(Json(SshView { host, port: vm.ssh_port, username: "root", command }))
}
