//! A policy with two secrets, one a prefix of the other.

use std::sync::Arc;
use tapgate_model::{
    Mode, RuleSet, SecretBinding, SecretValue, UserId, VmId, VmPolicy, policy::SecretsOverHttp,
};

pub const VALUES: [(&str, &str); 2] = [("a", "value-one"), ("a-b", "value-one-two")];

pub fn secrets() -> Arc<[SecretBinding]> {
    VALUES
        .map(|(name, value)| SecretBinding {
            name: name.to_owned(),
            env_var: "X".to_owned(),
            hosts: vec!["*".parse().expect("a pattern")],
            value: SecretValue::new(value.as_bytes().to_vec()).expect("a value"),
        })
        .into()
}

pub fn policy() -> VmPolicy {
    VmPolicy {
        vm: VmId::generate(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: RuleSet::default(),
        secrets: secrets(),
        secrets_over_http: SecretsOverHttp::default(),
    }
}
