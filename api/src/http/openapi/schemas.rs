//! The shapes of bodies.

use crate::http::{Code, MAX_RESOURCES};
use serde_json::{Map, Value, json};

fn text() -> Value {
    json!({ "type": "string" })
}

fn time() -> Value {
    json!({ "type": "string", "format": "date-time" })
}

fn or_null(mut schema: Value) -> Value {
    let kind = schema["type"].take();
    schema["type"] = json!([kind, "null"]);
    if let Value::Array(words) = &mut schema["enum"] {
        words.push(Value::Null);
    }
    if schema["enum"].is_null()
        && let Value::Object(fields) = &mut schema
    {
        fields.remove("enum");
    }
    schema
}

fn words(words: &[&str]) -> Value {
    json!({ "type": "string", "enum": words })
}

/// An id with this prefix.
pub(super) fn id(prefix: &str) -> Value {
    json!({ "type": "string", "pattern": format!("^{prefix}[a-z0-9]+$") })
}

/// An object that holds exactly these fields, apart from optional ones.
fn object(required: Value, optional: Value) -> Value {
    let mut names: Vec<String> = Vec::new();
    let mut all = Map::new();
    if let Value::Object(fields) = required {
        names.extend(fields.keys().cloned());
        all.extend(fields);
    }
    if let Value::Object(fields) = optional {
        all.extend(fields);
    }
    json!({ "type": "object", "properties": all, "required": names, "additionalProperties": false })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn list(of: &str) -> Value {
    object(
        json!({
            "data": { "type": "array", "items": reference(of) },
            "has_more": { "type": "boolean" },
            "cursor": or_null(text()),
        }),
        json!({}),
    )
}

fn data(of: &str) -> Value {
    object(json!({ "data": reference(of) }), json!({}))
}

const STATUS: &[&str] = &["pending", "running", "stopped", "destroyed", "failed"];
/// Every internal state of a VM.
pub(super) const DETAIL: &[&str] = &[
    "queued",
    "creating",
    "starting",
    "running",
    "ready",
    "stopping",
    "stopped",
    "destroying",
    "destroyed",
    "failed",
];
const PROTOCOLS: &[&str] = &["dns", "http", "icmp", "tcp", "tls", "udp"];
/// A text with a character that is not white space, and no control characters.
const VISIBLE: &str =
    r"^[^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*$";

/// The same, but with line breaks and tabs.
const PROMPT: &str = r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$";

/// An address in ASCII; a domain in Unicode is taken too.
const EMAIL: &str = r"^[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$";

/// A host pattern in ASCII; Unicode is taken too, and mapped.
const HOST: &str = r"^(\*|(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?)$";

/// An exact name, without patterns.
pub(super) fn host_name() -> Value {
    let pattern = HOST.replacen(r"\*|(\*\.)?", "", 1);
    json!({ "type": "string", "pattern": pattern, "maxLength": 250 })
}

/// A host pattern.
pub(super) fn host() -> Value {
    json!({ "type": "string", "pattern": HOST, "maxLength": 250 })
}

/// Text without control characters, or with line breaks and tabs alone.
fn plain(max: u32, multiline: bool) -> Value {
    let pattern = match multiline {
        true => r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$",
        false => r"^[^\u0000-\u001f\u007f-\u009f]*$",
    };
    json!({ "type": "string", "pattern": pattern, "maxLength": max })
}

fn public_key() -> Value {
    json!({ "type": "string", "format": "ssh-public-key", "description": "As in ~/.ssh/id_ed25519.pub" })
}

fn value() -> Value {
    json!({
        "type": "string", "pattern": r"^[^\u0000-\u001f\u007f]+$", "minLength": 1, "maxLength": 16384,
        "not": { "pattern": "IRONSH_PROXY_" }, "writeOnly": true,
    })
}

fn password(min: u32) -> Value {
    let mut schema = plain(1024, true);
    schema["minLength"] = min.into();
    schema["writeOnly"] = true.into();
    schema
}

fn visible(max: u32) -> Value {
    json!({ "type": "string", "minLength": 1, "maxLength": max, "pattern": VISIBLE })
}

pub(super) fn schemas() -> Value {
    let mut all = Map::new();
    let mut put = |name: &str, schema: Value| all.insert(name.to_owned(), schema);
    let codes: Vec<&str> = Code::ALL.iter().map(|code| code.word()).collect();
    put(
        "Error",
        object(
            json!({ "error": object(json!({ "code": words(&codes), "message": text() }), json!({})) }),
            json!({}),
        ),
    );

    let resources = json!({
        "vcpus": or_null(json!({ "type": "integer", "minimum": 1, "maximum": MAX_RESOURCES.vcpus })),
        "memory_mib":
            or_null(json!({ "type": "integer", "minimum": 128, "maximum": MAX_RESOURCES.memory_mib })),
        "disk_gib":
            or_null(json!({ "type": "integer", "minimum": 1, "maximum": MAX_RESOURCES.disk_bytes >> 30 })),
    });
    put(
        "Vm",
        object(
            json!({
                "id": id("vm_"), "name": text(), "status": words(STATUS), "status_detail": words(DETAIL),
                "created_at": time(), "updated_at": time(),
            }),
            json!({
                "failure_reason": text(), "suspended": { "type": "boolean" }, "suspend_failure": text(),
            }),
        ),
    );
    put("VmList", list("Vm"));
    let mut optional = resources.clone();
    optional["snapshot_id"] = or_null(text());
    put("NewVm", object(json!({ "name": visible(64), "public_key": public_key() }), optional));
    put(
        "Ssh",
        object(
            json!({
                "host": text(), "port": { "type": "integer", "minimum": 1, "maximum": 65535 },
                "username": { "const": "root" }, "command": text(),
            }),
            json!({}),
        ),
    );

    let mode = words(&["enforce", "warn"]);
    put("Policy", object(json!({ "mode": mode }), json!({})));
    let flags = json!({ "mode": mode, "inherit_mode": { "type": "boolean" }, "inherit_rules": { "type": "boolean" } });
    put("VmPolicy", object(flags, json!({})));
    let mut change = object(
        json!({}),
        json!({ "mode": or_null(mode.clone()), "inherit_rules": or_null(json!({ "type": "boolean" })) }),
    );
    change["anyOf"] = json!([
        { "required": ["mode"], "properties": { "mode": { "type": "string" } } },
        { "required": ["inherit_rules"], "properties": { "inherit_rules": { "type": "boolean" } } },
    ]);
    put("VmPolicyChange", change);
    put(
        "Rule",
        object(
            json!({
                "id": id("egr_"), "name": or_null(text()), "host": or_null(text()), "cidr": or_null(text()),
                "comment": or_null(text()), "created_at": time(),
            }),
            json!({}),
        ),
    );
    put("RuleList", list("Rule"));
    let mut rule = object(
        json!({}),
        json!({
            "name": or_null(visible(64)), "host": or_null(host()),
            "cidr": or_null(json!({
                "type": "string", "format": "cidr",
                "description": "A range of either family, not one that no rule opens: loopback, link-local, multicast, reserved",
            })),
            "comment": or_null(plain(1024, true)),
        }),
    );
    rule["oneOf"] = json!([
        { "required": ["host"], "properties": { "host": { "type": "string" }, "cidr": { "type": "null" } } },
        { "required": ["cidr"], "properties": { "cidr": { "type": "string" }, "host": { "type": "null" } } },
    ]);
    put("NewRule", rule);

    let count = json!({ "type": "integer", "minimum": 0 });
    let names = json!({ "type": "array", "items": text() });
    put(
        "AuditEvent",
        object(
            json!({
                "id": id("ee_"), "timestamp": time(), "vm_id": id("vm_"), "host": or_null(text()),
                "cidr": or_null(text()), "protocol": words(PROTOCOLS), "verdict": words(&["allowed", "denied"]),
                "allowed": { "type": "boolean" }, "mode": mode, "address": or_null(text()),
                "port": or_null(count.clone()), "rule_id": or_null(text()), "reason": text(),
                "method": or_null(text()), "path": or_null(text()), "status": or_null(count.clone()),
                "secrets": names, "secrets_withheld": names, "bytes_out": count, "bytes_in": count,
                "duration_ms": count, "count": count,
            }),
            json!({}),
        ),
    );
    put("AuditEventList", list("AuditEvent"));

    let by_reason = json!({ "type": "object", "additionalProperties": count });
    put(
        "Counters",
        object(
            json!({
                "vm_id": id("vm_"), "packets_out": count, "bytes_out": count, "packets_in": count,
                "bytes_in": count, "passed": by_reason, "dropped": by_reason, "events_lost": count,
                "events_dropped": count, "flows": count,
            }),
            json!({}),
        ),
    );

    let hosts = json!({ "type": "array", "items": host(), "minItems": 1, "maxItems": 100 });
    let env_var = json!({ "type": "string", "pattern": "^[A-Z][A-Z0-9_]*$", "maxLength": 255 });
    put(
        "Secret",
        object(
            json!({
                "id": id("sec_"), "name": text(), "env_var": env_var, "hosts": hosts, "proxy_value": text(),
                "comment": or_null(text()), "created_at": time(), "updated_at": time(),
            }),
            json!({}),
        ),
    );
    put("SecretList", list("Secret"));
    put(
        "NewSecret",
        object(
            json!({
                "name": { "type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$" },
                "secret": value(),
                "env_var": env_var,
            }),
            json!({ "hosts": or_null(hosts.clone()), "comment": or_null(plain(1024, true)) }),
        ),
    );
    put(
        "SecretChange",
        object(
            json!({}),
            json!({
                "secret": value(),
                "env_var": env_var, "hosts": hosts, "comment": or_null(plain(1024, true)),
            }),
        ),
    );

    put(
        "Snapshot",
        object(
            json!({
                "id": id("snap_"), "source_virtual_machine_id": id("vm_"), "source_base_image": or_null(text()),
                "source_snapshot_id": or_null(text()), "label": or_null(text()),
                "status": words(&["pending", "uploading", "ready", "failed"]), "r2_key": or_null(text()),
                "size_bytes": or_null(count.clone()), "created_at": time(),
            }),
            json!({ "failure_reason": text(), "kind": words(&["disk", "memory"]), "memory_size_bytes": count.clone() }),
        ),
    );
    put("SnapshotList", list("Snapshot"));
    put("SnapshotData", data("Snapshot"));
    let kind = or_null(words(&["disk", "memory"]));
    put("NewSnapshot", object(json!({}), json!({ "label": or_null(plain(128, false)), "kind": kind })));

    put(
        "Env",
        object(
            json!({
                "id": id("env_"), "key": text(), "value": text(), "created_at": time(), "updated_at": time(),
            }),
            json!({}),
        ),
    );
    put("EnvList", list("Env"));
    let value = json!({ "type": "string", "pattern": r"^[^\u0000]*$", "maxLength": 32000 });
    put("EnvValue", object(json!({ "value": value }), json!({})));

    let agent_status = words(&["provisioning", "running", "idle"]);
    put(
        "Agent",
        object(
            json!({
                "id": id("agt_"), "name": text(), "repo": text(), "branch": or_null(text()), "harness": text(),
                "prompt": text(), "agent_args": or_null(text()), "status": agent_status, "vm_id": id("vm_"),
                "created_at": time(), "updated_at": time(),
            }),
            json!({ "failure_reason": text() }),
        ),
    );
    put("AgentList", list("Agent"));
    put("AgentLog", object(json!({ "log": text(), "truncated": { "type": "boolean" } }), json!({})));
    let repo = r"^([A-Za-z0-9][A-Za-z0-9_-]{0,38}/[A-Za-z0-9_-]{1,60}|(https://)?[a-z][a-z0-9]{0,30}\.[a-z]{2,10}(/[A-Za-z0-9_-]{1,60}){1,4})$";
    let repo = json!({ "type": "string", "pattern": repo, "maxLength": 2048 });
    let word = |max: u32| json!({ "type": "string", "pattern": r"^[^\s\u0000-\u001f\u007f-\u009f-][^\s\u0000-\u001f\u007f-\u009f]*$", "maxLength": max });
    let mut optional = resources;
    optional["branch"] = or_null(word(255));
    // The operator's configuration may have others.
    optional["harness"] = or_null(words(&["claude", "codex"]));
    // Words and quotes as in a shell are taken too.
    let plain_words =
        json!({ "type": "string", "pattern": r#"^[^\u0000-\u001f\u007f-\u009f'"\\#]*$"#, "maxLength": 4096 });
    optional["agent_args"] = or_null(plain_words);
    optional["public_key"] = or_null(public_key());
    optional["snapshot_id"] = or_null(text());
    let mut prompt = plain(65_536, true);
    prompt["pattern"] = PROMPT.into();
    put("NewAgent", object(json!({ "name": visible(64), "repo": repo, "prompt": prompt }), optional));

    put(
        "User",
        object(
            json!({
                "id": id("usr_"), "first_name": text(), "last_name": text(), "email": text(),
                "email_verified": { "type": "boolean" }, "created_at": time(),
            }),
            json!({}),
        ),
    );
    put(
        "NewUser",
        object(
            json!({
                "first_name": visible(100), "last_name": visible(100),
                "email": { "type": "string", "pattern": EMAIL, "maxLength": 254 },
                "password": password(8),
            }),
            json!({ "invitation": or_null(text()) }),
        ),
    );
    put(
        "Login",
        object(json!({ "email": text(), "password": password(0) }), json!({ "name": or_null(visible(64)) })),
    );
    put(
        "PasswordChange",
        object(json!({ "current_password": password(0), "new_password": password(8) }), json!({})),
    );
    let issued = json!({ "id": id("key_"), "name": text(), "token": text(), "created_at": time() });
    put("IssuedKey", object(issued, json!({})));
    put(
        "SignedUp",
        object(json!({ "api_key": reference("IssuedKey"), "user": reference("User") }), json!({})),
    );
    let summary =
        json!({ "id": id("key_"), "name": text(), "created_at": time(), "last_used_at": or_null(time()) });
    put("ApiKey", object(summary, json!({})));
    put("ApiKeyList", list("ApiKey"));
    put("NewKey", object(json!({ "name": visible(64) }), json!({})));
    put(
        "DeviceCode",
        object(json!({ "code": text(), "verification_uri": text(), "expires_at": time() }), json!({})),
    );
    put("DeviceCodeData", data("DeviceCode"));
    let polled = json!({ "status": words(&["pending", "authorized", "expired"]) });
    put("DevicePoll", object(polled, json!({ "token": text() })));
    put("DevicePollData", data("DevicePoll"));
    put("Health", object(json!({ "status": { "const": "ok" } }), json!({})));
    Value::Object(all)
}
