//! Egress policy and rules, of the account and of single VMs.

use super::vms::{find, named};
use crate::engine::Scope;
use crate::http::{
    Account, ApiError, AppState, Code, Fields, Id, IfMatch, List, NoFields, Params, Versioned, time,
};
use crate::http::{fields_at_most as at_most, fields_bounded as bounded, params_invalid as invalid};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_ebpf_common::range::denied_whole;
use tapgate_model::{Cidr, HostPattern, Mode, RuleId, RuleTarget, Status, VmId};
use tapgate_store::{NewRule, RuleFilter, RuleRecord, RuleSort, VmEgress};

#[derive(Serialize)]
pub(crate) struct PolicyView {
    mode: Mode,
}

#[derive(Serialize)]
pub(crate) struct VmPolicyView {
    /// In force: the VM's own, else the account's.
    mode: Mode,
    /// Whether that is the account's.
    inherit_mode: bool,
    inherit_rules: bool,
}

impl From<VmEgress> for VmPolicyView {
    fn from(egress: VmEgress) -> Self {
        let VmEgress { mode, own_mode, inherit_rules } = egress;
        Self { mode, inherit_mode: own_mode.is_none(), inherit_rules }
    }
}

#[derive(Serialize)]
pub(crate) struct RuleView {
    id: String,
    name: Option<String>,
    host: Option<String>,
    cidr: Option<String>,
    comment: Option<String>,
    created_at: String,
}

impl From<RuleRecord> for RuleView {
    fn from(rule: RuleRecord) -> Self {
        let (host, cidr) = match rule.target {
            RuleTarget::Host(host) => (Some(host.to_string()), None),
            RuleTarget::Cidr(cidr) => (None, Some(cidr.to_string())),
        };
        let created_at = time(rule.created_at);
        Self { id: rule.id.into(), name: rule.name, host, cidr, comment: rule.comment, created_at }
    }
}

fn parse_mode(text: &str) -> Result<Mode, ApiError> {
    Mode::from_word(text).ok_or_else(|| ApiError::validation("`mode` must be enforce or warn"))
}

pub(crate) async fn policy(
    State(state): State<AppState>,
    account: Account,
    params: Params,
) -> Result<Versioned<Json<PolicyView>>, ApiError> {
    params.finish()?;
    let policy = state.store().policy(&account.user).await?;
    Ok(Versioned(policy.version(), Json(PolicyView { mode: policy.mode })))
}

pub(crate) async fn set_policy(
    State(state): State<AppState>,
    account: Account,
    IfMatch(expected): IfMatch,
    params: Params,
    mut fields: Fields,
) -> Result<Versioned<Json<PolicyView>>, ApiError> {
    params.finish()?;
    let mode = parse_mode(&fields.text("mode")?)?;
    fields.finish()?;
    let policy = state.store().policy_set(&account.user, mode, expected).await?;
    state.engine().policy_changed(Scope::User(account.user)).await?;
    Ok(Versioned(policy.version(), Json(PolicyView { mode: policy.mode })))
}

pub(crate) async fn vm_policy(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
) -> Result<Versioned<Json<VmPolicyView>>, ApiError> {
    params.finish()?;
    let egress = state.store().vm_egress(&account.user, &vm).await;
    let egress = egress.map_err(|error| named(&vm, error.into()))?;
    Ok(Versioned(egress.version(), Json(egress.into())))
}

pub(crate) async fn set_vm_policy(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    IfMatch(expected): IfMatch,
    params: Params,
    mut fields: Fields,
) -> Result<Versioned<Json<VmPolicyView>>, ApiError> {
    params.finish()?;
    let mode = fields.optional_text("mode")?.map(|text| parse_mode(&text)).transpose()?;
    let inherit_rules = fields.optional_bool("inherit_rules")?;
    fields.finish()?;
    if mode.is_none() && inherit_rules.is_none() {
        return Err(ApiError::validation("Give `mode`, `inherit_rules` or both"));
    }
    alive(&state, &account, &vm).await?;
    let set =
        state.store().vm_egress_set(&account.user, &vm, mode, inherit_rules.unwrap_or(true), expected).await;
    let egress = set.map_err(|error| named(&vm, error.into()))?;
    state.engine().policy_changed(Scope::Vm(vm)).await?;
    Ok(Versioned(egress.version(), Json(egress.into())))
}

pub(crate) async fn reset_vm_policy(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    IfMatch(expected): IfMatch,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    let reset = state.store().vm_egress_set(&account.user, &vm, None, true, expected).await;
    reset.map_err(|error| named(&vm, error.into()))?;
    state.engine().policy_changed(Scope::Vm(vm)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A VM that is not destroyed: only such can be given rules.
async fn alive(state: &AppState, account: &Account, vm: &VmId) -> Result<(), ApiError> {
    match find(state, account, vm).await?.detail.status() {
        Status::Destroyed => Err(ApiError::new(Code::VmDestroyed, "VM has been destroyed")),
        _ => Ok(()),
    }
}

fn new_rule(fields: &mut Fields) -> Result<NewRule, ApiError> {
    let name = fields.optional_text("name")?;
    let host = fields.optional_text("host")?;
    let cidr = fields.optional_text("cidr")?;
    let comment = fields.optional_text("comment")?;
    if let Some(name) = &name {
        bounded("name", name, 64, false)?;
    }
    if let Some(comment) = &comment {
        at_most("comment", comment, 1024, true)?;
    }
    let target = match (host, cidr) {
        (Some(host), None) => RuleTarget::Host(
            host.parse()
                .map_err(|error| ApiError::validation(format!("`host` is {error}", error = wrong(error))))?,
        ),
        (None, Some(cidr)) => {
            let cidr: Cidr =
                cidr.parse().map_err(|error| ApiError::validation(format!("`cidr`: {error}")))?;
            // A rule that could never have an effect is a mistake about what tapgate does.
            if let Some(reason) = denied_whole(cidr.network(), cidr.last()) {
                return Err(ApiError::validation(format!(
                    "`cidr`: no rule opens {cidr} for a VM; it is always denied ({})",
                    reason.word()
                )));
            }
            RuleTarget::Cidr(cidr)
        }
        (Some(_), Some(_)) => return Err(ApiError::validation("Provide `host` or `cidr`, not both")),
        (None, None) => return Err(ApiError::validation("Provide `host` or `cidr`")),
    };
    Ok(NewRule { name, target, comment })
}

fn wrong(error: tapgate_model::host::HostError) -> String {
    format!("not a host that can be matched ({error})")
}

fn filter(params: &mut Params) -> Result<(RuleFilter, RuleSort), ApiError> {
    let host = match params.text("host") {
        None => None,
        Some(text) => {
            let host: HostPattern =
                text.parse().map_err(|error| invalid("host", &format!("is {}", wrong(error))))?;
            Some(host.to_string())
        }
    };
    let cidr = match params.text("cidr") {
        None => None,
        Some(text) => {
            let cidr: Cidr = text.parse().map_err(|error| invalid("cidr", &format!("is wrong: {error}")))?;
            Some(cidr.to_string())
        }
    };
    let name = params.text("name");
    let sort = params.parsed("sort", "created_at or host", |text| match text {
        "created_at" => Some(RuleSort::Created),
        "host" => Some(RuleSort::Host),
        _ => None,
    })?;
    Ok((RuleFilter { host, cidr, name }, sort.unwrap_or_default()))
}

async fn list(
    state: AppState,
    account: Account,
    vm: Option<VmId>,
    mut params: Params,
) -> Result<Json<List<RuleView>>, ApiError> {
    let (filter, sort) = filter(&mut params)?;
    let page = params.page(50, 200)?;
    params.finish()?;
    let found = state.store().rules(&account.user, vm.as_ref(), filter, sort, page).await;
    let page = found.map_err(|error| vm.iter().fold(error.into(), |error, vm| named(vm, error)))?;
    Ok(Json(List::of(page, Into::into)))
}

async fn create(
    state: AppState,
    account: Account,
    vm: Option<VmId>,
    mut fields: Fields,
) -> Result<(StatusCode, Json<RuleView>), ApiError> {
    let new = new_rule(&mut fields)?;
    fields.finish()?;
    let limit = state.settings().quotas.rules;
    let rule = state.store().rule_create(&account.user, vm.as_ref(), new, limit).await?;
    state.engine().policy_changed(vm.map_or(Scope::User(account.user), Scope::Vm)).await?;
    Ok((StatusCode::CREATED, Json(rule.into())))
}

async fn remove(
    state: AppState,
    account: Account,
    vm: Option<VmId>,
    rule: RuleId,
) -> Result<StatusCode, ApiError> {
    let removed = state.store().rule_delete(&account.user, vm.as_ref(), &rule).await;
    removed.map_err(|error| vm.iter().fold(error.into(), |error, vm| named(vm, error)))?;
    state.engine().policy_changed(vm.map_or(Scope::User(account.user), Scope::Vm)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(crate) async fn rules(
    State(state): State<AppState>,
    account: Account,
    params: Params,
) -> Result<Json<List<RuleView>>, ApiError> {
    list(state, account, None, params).await
}

pub(crate) async fn create_rule(
    State(state): State<AppState>,
    account: Account,
    params: Params,
    fields: Fields,
) -> Result<(StatusCode, Json<RuleView>), ApiError> {
    params.finish()?;
    create(state, account, None, fields).await
}

pub(crate) async fn delete_rule(
    State(state): State<AppState>,
    account: Account,
    Id(rule): Id<RuleId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    remove(state, account, None, rule).await
}

pub(crate) async fn vm_rules(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
) -> Result<Json<List<RuleView>>, ApiError> {
    list(state, account, Some(vm), params).await
}

pub(crate) async fn create_vm_rule(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    params: Params,
    fields: Fields,
) -> Result<(StatusCode, Json<RuleView>), ApiError> {
    params.finish()?;
    alive(&state, &account, &vm).await?;
    create(state, account, Some(vm), fields).await
}

pub(crate) async fn delete_vm_rule(
    State(state): State<AppState>,
    account: Account,
    Id(vm): Id<VmId>,
    Id(rule): Id<RuleId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    remove(state, account, Some(vm), rule).await
}
