//! Every operation: what it takes, what it answers, what can go wrong.

use super::schemas::{DETAIL, host, host_name, id};
use serde_json::{Map, Value, json};

/// One operation, as the table below writes it.
struct Operation {
    path: &'static str,
    method: &'static str,
    id: &'static str,
    tag: &'static str,
    summary: &'static str,
    query: Vec<Value>,
    body: Option<&'static str>,
    /// Status and schema of success; no schema is no content.
    answer: (u16, Option<&'static str>),
    /// What can go wrong besides what always can.
    errors: &'static [u16],
}

/// Needs no API key.
const OPEN: &[&str] = &["createUser", "login", "requestDeviceCode", "pollDeviceCode", "getHealth"];

/// Have a version that changes can insist on.
const VERSIONED: &[&str] = &[
    "getSecret",
    "updateSecret",
    "deleteSecret",
    "getEnv",
    "setEnv",
    "deleteEnv",
    "getPolicy",
    "setPolicy",
    "getVmPolicy",
    "setVmPolicy",
    "resetVmPolicy",
];

fn header(name: &str, what: &str, schema: Value) -> Value {
    json!({ "name": name, "in": "header", "required": false, "description": what, "schema": schema })
}

fn parameter(name: &str, schema: Value) -> Value {
    json!({ "name": name, "in": "query", "required": false, "schema": schema })
}

fn text(name: &str) -> Value {
    parameter(name, json!({ "type": "string" }))
}

fn words(name: &str, words: &[&str]) -> Value {
    parameter(name, json!({ "type": "string", "enum": words }))
}

fn moment(name: &str) -> Value {
    parameter(name, json!({ "type": "string", "format": "date-time" }))
}

/// `cursor` and `limit`, and `order` with the fields to sort by where there is a choice.
fn paging(default: u32, max: u32, sort: &[&str]) -> Vec<Value> {
    let limit = json!({ "type": "integer", "minimum": 1, "maximum": max, "default": default });
    let cursor = json!({ "type": "string", "format": "page-cursor" });
    let mut all = vec![parameter("cursor", cursor), parameter("limit", limit)];
    if !sort.is_empty() {
        all.push(parameter("sort", json!({ "type": "string", "enum": sort, "default": sort[0] })));
        all.push(order());
    }
    all
}

fn order() -> Value {
    parameter("order", json!({ "type": "string", "enum": ["asc", "desc"], "default": "desc" }))
}

fn with(mut filters: Vec<Value>, paging: Vec<Value>) -> Vec<Value> {
    filters.extend(paging);
    filters
}

fn rules() -> Vec<Value> {
    let cidr = parameter("cidr", json!({ "type": "string", "format": "cidr" }));
    with(vec![parameter("host", host()), cidr, text("name")], paging(50, 200, &["created_at", "host"]))
}

fn events() -> Vec<Value> {
    vec![
        parameter("vm_id", id("vm_")),
        words("verdict", &["allowed", "denied"]),
        parameter("allowed", json!({ "type": "boolean" })),
        words("mode", &["enforce", "warn"]),
        parameter("host", host_name()),
        parameter("cidr", json!({ "type": "string", "format": "cidr" })),
        words("protocol", &["http", "tls", "tcp", "udp", "icmp", "dns"]),
        moment("since"),
        moment("until"),
    ]
}

macro_rules! table {
    ($($method:ident $path:literal $id:ident $tag:literal $summary:literal, $query:expr, $body:expr => $status:literal $answer:expr, $errors:expr;)+) => {
        vec![$(Operation {
            path: $path, method: stringify!($method), id: stringify!($id), tag: $tag, summary: $summary,
            query: $query, body: $body, answer: ($status, $answer), errors: &$errors,
        },)+]
    };
}

#[rustfmt::skip]
fn operations() -> Vec<Operation> {
    let none = Vec::new;
    let vms = with(
        vec![words("status", &["pending", "running", "stopped", "destroyed", "failed"]), words("status_detail", DETAIL), text("name")],
        paging(20, 100, &["created_at", "updated_at", "name"]),
    );
    let agents = with(vec![words("status", &["provisioning", "running", "idle"]), text("name")], paging(20, 100, &[]));
    let follow = parameter("follow", json!({ "type": "boolean", "description": "Answer with server-sent events, as they are written" }));
    let listed = with(events(), with(vec![follow], with(paging(50, 500, &[]), vec![order()])));
    let exported = events();
    let lines = vec![parameter("tail", json!({ "type": "integer", "minimum": 1, "maximum": 10000, "default": 200 }))];
    let code = json!({ "name": "code", "in": "query", "required": true, "schema": { "type": "string" } });
    table! {
        get "/v1/vms" listVms "VMs" "List VMs", vms, None => 200 Some("VmList"), [];
        post "/v1/vms" createVm "VMs" "Create a VM", none(), Some("NewVm") => 201 Some("Vm"), [404, 409];
        get "/v1/vms/{vm_id}" getVm "VMs" "Get a VM", none(), None => 200 Some("Vm"), [404];
        delete "/v1/vms/{vm_id}" destroyVm "VMs" "Destroy a stopped VM", none(), None => 204 None, [404, 409];
        post "/v1/vms/{vm_id}/start" startVm "VMs" "Start a VM", none(), None => 200 Some("Vm"), [404, 409];
        post "/v1/vms/{vm_id}/stop" stopVm "VMs" "Stop a VM", none(), None => 200 Some("Vm"), [404, 409];
        post "/v1/vms/{vm_id}/suspend" suspendVm "VMs" "Keep a VM's memory and end it; start goes on from there", none(), None => 200 Some("Vm"), [404, 409, 422];
        get "/v1/vms/{vm_id}/ssh" getVmSsh "VMs" "Get SSH connection info", none(), None => 200 Some("Ssh"), [404, 409];
        get "/v1/vms/{vm_id}/egress/counters" getVmCounters "Egress" "Get what was counted for a VM", none(), None => 200 Some("Counters"), [404];
        get "/v1/vms/{vm_id}/egress/policy" getVmPolicy "Egress" "Get a VM's policy", none(), None => 200 Some("VmPolicy"), [404];
        put "/v1/vms/{vm_id}/egress/policy" setVmPolicy "Egress" "Replace a VM's policy", none(), Some("VmPolicyChange") => 200 Some("VmPolicy"), [404, 409];
        delete "/v1/vms/{vm_id}/egress/policy" resetVmPolicy "Egress" "Go back to the account's policy", none(), None => 204 None, [404];
        get "/v1/vms/{vm_id}/egress/rules" listVmRules "Egress" "List a VM's own rules", rules(), None => 200 Some("RuleList"), [404];
        post "/v1/vms/{vm_id}/egress/rules" createVmRule "Egress" "Create a rule for one VM", none(), Some("NewRule") => 201 Some("Rule"), [404, 409];
        delete "/v1/vms/{vm_id}/egress/rules/{rule_id}" deleteVmRule "Egress" "Delete a VM's rule", none(), None => 204 None, [404];
        get "/v1/egress/policy" getPolicy "Egress" "Get the account's policy", none(), None => 200 Some("Policy"), [];
        put "/v1/egress/policy" setPolicy "Egress" "Replace the account's policy", none(), Some("Policy") => 200 Some("Policy"), [];
        get "/v1/egress/rules" listRules "Egress" "List the account's rules", rules(), None => 200 Some("RuleList"), [];
        post "/v1/egress/rules" createRule "Egress" "Create a rule for all VMs", none(), Some("NewRule") => 201 Some("Rule"), [409];
        delete "/v1/egress/rules/{rule_id}" deleteRule "Egress" "Delete a rule", none(), None => 204 None, [404];
        get "/v1/audit/egress" listAuditEvents "Audit" "List what VMs tried to reach", listed, None => 200 Some("AuditEventList"), [];
        get "/v1/audit/egress/export" exportAuditEvents "Audit" "Export everything that matches as NDJSON", with(exported, vec![]), None => 200 Some("AuditEvent"), [];
        get "/v1/secrets" listSecrets "Secrets" "List secrets, without their values", with(vec![text("name")], paging(50, 200, &["created_at", "name"])), None => 200 Some("SecretList"), [];
        post "/v1/secrets" createSecret "Secrets" "Create a secret", none(), Some("NewSecret") => 201 Some("Secret"), [409];
        get "/v1/secrets/{secret_id}" getSecret "Secrets" "Get a secret, without its value", none(), None => 200 Some("Secret"), [404];
        patch "/v1/secrets/{secret_id}" updateSecret "Secrets" "Update a secret", none(), Some("SecretChange") => 200 Some("Secret"), [404, 409];
        delete "/v1/secrets/{secret_id}" deleteSecret "Secrets" "Delete a secret", none(), None => 204 None, [404];
        post "/v1/vms/{vm_id}/snapshots" createSnapshot "Snapshots" "Create a snapshot of a running VM", none(), Some("NewSnapshot") => 201 Some("SnapshotData"), [404, 409];
        get "/v1/vms/{vm_id}/snapshots" listVmSnapshots "Snapshots" "List a VM's snapshots", paging(50, 200, &[]), None => 200 Some("SnapshotList"), [404];
        get "/v1/snapshots" listSnapshots "Snapshots" "List snapshots", paging(50, 200, &[]), None => 200 Some("SnapshotList"), [];
        get "/v1/snapshots/{snapshot_id}" getSnapshot "Snapshots" "Get a snapshot", none(), None => 200 Some("SnapshotData"), [404];
        delete "/v1/snapshots/{snapshot_id}" deleteSnapshot "Snapshots" "Delete a snapshot", none(), None => 204 None, [404];
        get "/v1/env" listEnv "Environment" "List environment variables", paging(50, 200, &[]), None => 200 Some("EnvList"), [];
        get "/v1/env/{key}" getEnv "Environment" "Get an environment variable", none(), None => 200 Some("Env"), [404];
        put "/v1/env/{key}" setEnv "Environment" "Set an environment variable", none(), Some("EnvValue") => 200 Some("Env"), [409];
        delete "/v1/env/{key}" deleteEnv "Environment" "Delete an environment variable", none(), None => 204 None, [404];
        get "/v1/agents" listAgents "Agents" "List active agents", agents, None => 200 Some("AgentList"), [];
        post "/v1/agents" createAgent "Agents" "Create an agent and its VM", none(), Some("NewAgent") => 201 Some("Agent"), [404, 409];
        get "/v1/agents/{agent_id}" getAgent "Agents" "Get an agent", none(), None => 200 Some("Agent"), [404];
        get "/v1/agents/{agent_id}/log" getAgentLog "Agents" "Get the end of what an agent's harness shows", lines, None => 200 Some("AgentLog"), [404];
        delete "/v1/agents/{agent_id}" destroyAgent "Agents" "Destroy an agent and its VM", none(), None => 204 None, [404];
        post "/v1/users" createUser "Accounts" "Create an account", none(), Some("NewUser") => 201 Some("SignedUp"), [403, 409];
        post "/v1/auth/login" login "Accounts" "Get an API key by password", none(), Some("Login") => 201 Some("SignedUp"), [401];
        put "/v1/auth/password" changePassword "Accounts" "Change the password", none(), Some("PasswordChange") => 204 None, [403];
        post "/v1/auth/device/code" requestDeviceCode "Accounts" "Request a device code", none(), None => 200 Some("DeviceCodeData"), [];
        get "/v1/auth/device/poll" pollDeviceCode "Accounts" "Poll a device code", vec![code], None => 200 Some("DevicePollData"), [];
        get "/v1/keys" listKeys "Accounts" "List API keys", none(), None => 200 Some("ApiKeyList"), [];
        post "/v1/keys" createKey "Accounts" "Create an API key", none(), Some("NewKey") => 201 Some("IssuedKey"), [];
        delete "/v1/keys/{key_id}" revokeKey "Accounts" "Revoke an API key", none(), None => 204 None, [404];
        get "/healthz" getHealth "Service" "Whether the daemon can do its work", none(), None => 200 Some("Health"), [];
    }
}

fn error(status: u16) -> Value {
    let what = match status {
        400 => "The request is malformed",
        401 => "The API key is missing or not valid",
        403 => "It is not allowed here",
        404 => "There is no such resource",
        408 => "The body did not arrive in time",
        409 => "It conflicts with what is there",
        412 => "It was changed since it was read",
        413 => "The body is too large",
        415 => "The body is not JSON",
        422 => "A field has a value that cannot be",
        429 => "Too many requests",
        503 => "The database cannot be used now",
        _ => "Something went wrong",
    };
    let schema = json!({ "$ref": "#/components/schemas/Error" });
    let mut answer = json!({ "description": what, "content": { "application/json": { "schema": schema } } });
    if matches!(status, 429 | 503) {
        let schema = json!({ "type": "integer", "minimum": 0 });
        answer["headers"] = json!({ "Retry-After": { "description": "Seconds", "schema": schema } });
    }
    answer
}

/// What an id in the path may be.
fn in_path(name: &str) -> Value {
    let schema = match name {
        "key" => {
            json!({ "type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "minLength": 1, "maxLength": 255 })
        }
        _ => {
            let prefix = match name {
                "vm_id" => "vm_",
                "rule_id" => "egr_",
                "secret_id" => "sec_",
                "snapshot_id" => "snap_",
                "agent_id" => "agt_",
                _ => "key_",
            };
            json!({ "type": "string", "pattern": format!("^{prefix}[a-z0-9]+$"), "maxLength": 64 })
        }
    };
    json!({ "name": name, "in": "path", "required": true, "schema": schema })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn describe(operation: Operation) -> Value {
    let Operation { path, id, tag, summary, query, body, answer: (status, schema), errors, .. } = operation;
    let method = operation.method;
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let mut parameters: Vec<Value> = names.map(in_path).chain(query).collect();
    let mut headers = Map::new();
    if VERSIONED.contains(&id) {
        let schema = json!({ "type": "string" });
        if method == "get" {
            headers.insert("ETag".to_owned(), json!({ "description": "The version", "schema": schema }));
        } else {
            let what = "Refuse with 412 unless this is the version still, as ETag said";
            parameters.push(header("If-Match", what, json!({ "type": "string", "format": "entity-tags" })));
        }
    }
    if method == "post" && !OPEN.contains(&id) {
        let what = "Sent again with the same key, a request is answered as before";
        let schema =
            json!({ "type": "string", "format": "idempotency-key", "minLength": 1, "maxLength": 255 });
        parameters.push(header("Idempotency-Key", what, schema));
    }
    let mut described =
        json!({ "operationId": id, "tags": [tag], "summary": summary, "parameters": parameters });
    let mut responses = Map::new();
    let mut success = json!({ "description": "Done" });
    if !headers.is_empty() {
        success["headers"] = Value::Object(headers);
    }
    if let Some(schema) = schema {
        let kind = if id == "exportAuditEvents" { "application/x-ndjson" } else { "application/json" };
        success["content"] = json!({ kind: { "schema": reference(schema) } });
        if id == "exportAuditEvents" {
            success["content"][kind]["schema"] = json!({ "type": "string" });
        }
        if id == "listAuditEvents" {
            success["content"]["text/event-stream"] = json!({ "schema": { "type": "string" } });
        }
    }
    responses.insert(status.to_string(), success);
    let mut all = vec![400, 429, 500, 503];
    if OPEN.contains(&id) {
        described["security"] = json!([]);
    } else {
        all.push(401);
    }
    if let Some(body) = body {
        let required = body != "NewSnapshot";
        let content = json!({ "application/json": { "schema": reference(body) } });
        described["requestBody"] = json!({ "required": required, "content": content });
    }
    if method != "get" {
        // Also where it takes no body: one with fields is refused.
        all.extend([408, 413, 415, 422]);
    }
    all.extend(errors);
    if method == "post" && !OPEN.contains(&id) {
        all.push(409);
    }
    if VERSIONED.contains(&id) && method != "get" {
        all.push(412);
    }
    for status in all {
        responses.insert(status.to_string(), error(status));
    }
    let links = links(id);
    if !links.is_empty() {
        responses[&status.to_string()]["links"] = Value::Object(links);
    }
    described["responses"] = Value::Object(responses);
    described
}

/// What can be done with what an operation made: everything whose path takes the new id.
fn links(id: &str) -> Map<String, Value> {
    let (made, at) = match id {
        "createVm" => ("{vm_id}", "$response.body#/id"),
        "createSecret" => ("{secret_id}", "$response.body#/id"),
        "createRule" | "createVmRule" => ("{rule_id}", "$response.body#/id"),
        "createSnapshot" => ("{snapshot_id}", "$response.body#/data/id"),
        "createAgent" => ("{agent_id}", "$response.body#/id"),
        "setEnv" => ("{key}", "$response.body#/key"),
        _ => return Map::new(),
    };
    let mut all = Map::new();
    for operation in operations().iter().filter(|operation| operation.path.contains(made)) {
        let of_vm = made != "{vm_id}" && operation.path.contains("{vm_id}");
        if of_vm != (id == "createVmRule") && made == "{rule_id}" {
            continue;
        }
        let mut parameters = json!({ made.trim_matches(['{', '}']): at });
        if of_vm {
            parameters["vm_id"] = "$request.path.vm_id".into();
        }
        all.insert(operation.id.to_owned(), json!({ "operationId": operation.id, "parameters": parameters }));
    }
    all
}

pub(super) fn paths() -> Value {
    let mut all = Map::new();
    for operation in operations() {
        let (path, method) = (operation.path, operation.method);
        let entry = all.entry(path).or_insert_with(|| json!({}));
        entry[method] = describe(operation);
    }
    Value::Object(all)
}
