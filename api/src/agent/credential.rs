//! Which secret stands for git's password at a host. The guest gets its placeholder; the proxy does the rest.

use tapgate_model::{HostName, secret::PLACEHOLDER_PREFIX};
use tapgate_store::SecretRecord;

/// Variables that are git's wherever they may go.
const GIT_VARIABLES: [&str; 4] = ["GIT_TOKEN", "GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN"];

/// The placeholder for this host: of the secret that names the host. Several: one whose variable is git's before others,
/// then the oldest. A secret for every host counts only where its variable is git's.
pub(crate) fn pick(secrets: &[SecretRecord], host: &HostName) -> Option<String> {
    let rank = |secret: &SecretRecord| {
        let of_git = GIT_VARIABLES.contains(&secret.env_var.as_str());
        let matching = || secret.hosts.iter().filter(|pattern| pattern.matches(host));
        match (matching().any(|pattern| pattern.is_explicit()), of_git, matching().next().is_some()) {
            (true, true, _) => Some(0),
            (true, false, _) => Some(1),
            (false, true, true) => Some(2),
            _ => None,
        }
    };
    let ranked = secrets.iter().filter_map(|secret| Some((rank(secret)?, secret.created_at, secret)));
    let (_, _, secret) = ranked.min_by_key(|(rank, created, _)| (*rank, *created))?;
    Some(format!("{PLACEHOLDER_PREFIX}{}", secret.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::SecretId;

    fn secret(name: &str, variable: &str, hosts: &[&str], created_at: i64) -> SecretRecord {
        SecretRecord {
            id: SecretId::generate(),
            name: name.into(),
            env_var: variable.into(),
            hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            comment: None,
            created_at,
            updated_at: created_at,
        }
    }

    #[test]
    fn the_secret_that_names_the_host_is_gits_password() {
        let all = [
            secret("llm", "LLM_KEY", &["*"], 1),
            secret("any", "GITHUB_TOKEN", &["*"], 2),
            secret("forge", "FORGE", &["git.example.com", "*.example.net"], 3),
            secret("git", "GIT_TOKEN", &["git.example.com"], 4),
        ];
        let pick = |host: &str| pick(&all, &HostName::parse(host).unwrap());
        assert_eq!(pick("git.example.com").as_deref(), Some("IRONSH_PROXY_git"));
        assert_eq!(pick("a.example.net").as_deref(), Some("IRONSH_PROXY_forge"));
        assert_eq!(pick("elsewhere.example.org").as_deref(), Some("IRONSH_PROXY_any"));
        assert_eq!(super::pick(&all[..1], &HostName::parse("git.example.com").unwrap()), None);
    }
}
