//! Real values for placeholders, in the header values of one request: one pass, whole placeholders only, and only where
//! the secret may go.
//!
//! Must never scan its own output again, and never grow a header without bound.

use super::basic;
use http::{HeaderMap, HeaderValue, header};
use std::collections::BTreeSet;
use tapgate_model::{HostName, SecretBinding, VmPolicy, policy::SecretsOverHttp, secret::PLACEHOLDER_PREFIX};
use zeroize::Zeroizing;

/// Most octets that values may add to one request.
const MAX_GROWTH: usize = 128 * 1024;

/// How the request goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Over TLS whose certificate was verified for the name.
    Verified,
    /// In clear text, to an address that the name resolved to.
    Clear,
    /// To where no rule leads by this name: nothing is put in.
    Nowhere,
}

/// What was done to one request.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Names of secrets that were put in.
    pub injected: BTreeSet<String>,
    /// Names of secrets whose placeholder was left.
    pub withheld: BTreeSet<String>,
    /// Encoded credentials that hold a value, and what the guest sent in their stead: cleaned from the answer too.
    pub credentials: Vec<(Zeroizing<Vec<u8>>, Vec<u8>)>,
}

/// The request would grow beyond every server's bound.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request names so many placeholders that its headers would exceed 128 KiB")]
pub struct TooLarge;

/// Puts values in. `host` is the name that was decided on, dialled and verified.
pub fn substitute_headers(
    headers: &mut HeaderMap,
    policy: &VmPolicy,
    host: &HostName,
    channel: Channel,
) -> Result<Outcome, TooLarge> {
    let mut work = Work { policy, host, channel, outcome: Outcome::default(), room: MAX_GROWTH };
    for (name, value) in headers.iter_mut() {
        if matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING) {
            continue;
        }
        let new = match work.replace(value.as_bytes())? {
            Some(new) => Some(new),
            None if *name == header::AUTHORIZATION => work.replace_basic(value.as_bytes())?,
            None => None,
        };
        // A stored value holds no control character, so this cannot fail; if it did, the placeholder stays.
        if let Some(mut new) = new.and_then(|new| HeaderValue::from_bytes(&new).ok()) {
            new.set_sensitive(true);
            *value = new;
        }
    }
    Ok(work.outcome)
}

struct Work<'a> {
    policy: &'a VmPolicy,
    host: &'a HostName,
    channel: Channel,
    outcome: Outcome,
    room: usize,
}

impl Work<'_> {
    fn may_go(&self, secret: &SecretBinding) -> bool {
        match (self.channel, self.policy.secrets_over_http) {
            (Channel::Nowhere, _) | (Channel::Clear, SecretsOverHttp::Never) => false,
            (Channel::Verified, _) | (Channel::Clear, SecretsOverHttp::Always) => {
                secret.applies_to(self.host)
            }
            (Channel::Clear, SecretsOverHttp::Explicit) => secret.names(self.host),
        }
    }

    /// The text with values in it, or `None` if nothing was put in.
    fn replace(&mut self, text: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, TooLarge> {
        let mut out = Zeroizing::new(Vec::new());
        let mut copied = 0;
        let mut at = 0;
        while let Some(found) = find(&text[at..], PLACEHOLDER_PREFIX.as_bytes()) {
            let start = at + found;
            let name = start + PLACEHOLDER_PREFIX.len();
            let end = name + text[name..].iter().take_while(|b| in_name(**b)).count();
            at = end;
            let policy = self.policy;
            let Some(secret) =
                policy.secrets.iter().find(|secret| secret.name.as_bytes() == &text[name..end])
            else {
                continue;
            };
            if !self.may_go(secret) {
                self.outcome.withheld.insert(secret.name.clone());
                continue;
            }
            let value = secret.value.expose();
            self.room = self.room.checked_sub(value.len()).ok_or(TooLarge)?;
            // Reserved whole, so that no outgrown copy of a value is left in freed memory.
            if out.is_empty() {
                out.reserve(text.len() + MAX_GROWTH.min(4 * value.len()));
            }
            out.extend_from_slice(&text[copied..start]);
            out.extend_from_slice(value);
            copied = end;
            self.outcome.injected.insert(secret.name.clone());
        }
        if copied == 0 {
            return Ok(None);
        }
        out.extend_from_slice(&text[copied..]);
        Ok(Some(out))
    }

    fn replace_basic(&mut self, value: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, TooLarge> {
        let Some((sent, credentials)) = basic::decode(value) else { return Ok(None) };
        let Some(replaced) = self.replace(&credentials)? else { return Ok(None) };
        let encoded = basic::encode(&replaced);
        let mut value = Zeroizing::new(b"Basic ".to_vec());
        value.extend_from_slice(&encoded);
        self.outcome.credentials.push((encoded, sent.to_vec()));
        Ok(Some(value))
    }
}

/// What a secret's name is made of; the placeholder ends before anything else.
fn in_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Arc;
    use tapgate_model::{Mode, RuleSet, SecretValue, UserId, VmId};

    /// A policy with these secrets: name, value, hosts.
    pub(crate) fn policy(secrets: &[(&str, &str, &[&str])]) -> VmPolicy {
        let secrets = secrets.iter().map(|(name, value, hosts)| SecretBinding {
            name: (*name).to_owned(),
            env_var: "X".into(),
            hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            value: SecretValue::new(value.as_bytes().to_vec()).unwrap(),
        });
        VmPolicy {
            vm: VmId::generate(),
            user: UserId::generate(),
            generation: 1,
            mode: Mode::Enforce,
            rules: RuleSet::default(),
            secrets: secrets.collect::<Vec<_>>().into(),
            secrets_over_http: SecretsOverHttp::default(),
        }
    }

    fn sent(policy: &VmPolicy, value: &str, channel: Channel) -> (String, Outcome) {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        let outcome =
            substitute_headers(&mut headers, policy, &"a.example".parse().unwrap(), channel).unwrap();
        (headers[header::AUTHORIZATION].to_str().unwrap().to_owned(), outcome)
    }

    #[test]
    fn a_placeholder_is_replaced_whole_or_not_at_all() {
        let policy = policy(&[("a", "ONE", &["*"]), ("a-b", "TWO", &["*"]), ("ab", "THREE", &["*"])]);
        for (text, expected) in [
            ("Bearer IRONSH_PROXY_a", "Bearer ONE"),
            ("IRONSH_PROXY_a-b", "TWO"),
            ("IRONSH_PROXY_ab", "THREE"),
            ("IRONSH_PROXY_a-c", "IRONSH_PROXY_a-c"),
            ("IRONSH_PROXY_a_", "IRONSH_PROXY_a_"),
            ("IRONSH_PROXY_", "IRONSH_PROXY_"),
            ("IRONSH_PROXY_a, IRONSH_PROXY_a;IRONSH_PROXY_ab.", "ONE, ONE;THREE."),
            ("xIRONSH_PROXY_a:y", "xONE:y"),
            ("IRONSH_PROXY_IRONSH_PROXY_a", "IRONSH_PROXY_IRONSH_PROXY_a"),
            ("ironsh_proxy_a", "ironsh_proxy_a"),
        ] {
            assert_eq!(sent(&policy, text, Channel::Verified).0, expected, "{text}");
        }
    }

    #[test]
    fn basic_is_opened_and_closed_again() {
        let policy = policy(&[("token", "s3cr3t", &["a.example"])]);
        // "git:IRONSH_PROXY_token" and "git:s3cr3t".
        let (value, outcome) = sent(&policy, "Basic Z2l0OklST05TSF9QUk9YWV90b2tlbg==", Channel::Verified);
        assert_eq!(value, "Basic Z2l0OnMzY3IzdA==");
        assert_eq!(outcome.credentials[0].0.as_slice(), b"Z2l0OnMzY3IzdA==");
        assert_eq!(outcome.credentials[0].1, b"Z2l0OklST05TSF9QUk9YWV90b2tlbg==");
        assert_eq!(sent(&policy, "Basic Z2l0OmZvbw==", Channel::Verified).0, "Basic Z2l0OmZvbw==");
    }

    #[test]
    fn a_secret_goes_only_where_it_may() {
        let text = "IRONSH_PROXY_s";
        let of = |hosts: &[&str], channel| sent(&policy(&[("s", "VALUE", hosts)]), text, channel);
        for (hosts, channel, goes) in [
            (["a.example"], Channel::Verified, true),
            (["*"], Channel::Verified, true),
            (["b.example"], Channel::Verified, false),
            (["*.a.example"], Channel::Verified, false),
            (["a.example"], Channel::Clear, true),
            (["*"], Channel::Clear, false),
            (["a.example"], Channel::Nowhere, false),
        ] {
            let (value, outcome) = of(&hosts, channel);
            assert_eq!(value == "VALUE", goes, "{hosts:?} {channel:?}");
            assert_eq!(outcome.withheld.contains("s"), !goes);
            assert_eq!(outcome.injected.contains("s"), goes);
        }
        let mut always = policy(&[("s", "VALUE", &["*"])]);
        always.secrets_over_http = SecretsOverHttp::Always;
        assert_eq!(sent(&always, text, Channel::Clear).0, "VALUE");
        let mut never = policy(&[("s", "VALUE", &["a.example"])]);
        never.secrets_over_http = SecretsOverHttp::Never;
        assert_eq!(sent(&never, text, Channel::Clear).0, text);
    }

    #[test]
    fn growth_is_bounded() {
        let policy = policy(&[("s", &"v".repeat(16 * 1024), &["*"])]);
        let mut headers = HeaderMap::new();
        headers.insert("x", "IRONSH_PROXY_s ".repeat(9).parse().unwrap());
        let host = "a.example".parse().unwrap();
        assert!(substitute_headers(&mut headers, &policy, &host, Channel::Verified).is_err());
    }

    #[test]
    fn values_are_never_printed() {
        let policy = Arc::new(policy(&[("s", "hunter2hunter2", &["*"])]));
        let mut headers = HeaderMap::new();
        headers.insert("x", "IRONSH_PROXY_s".parse().unwrap());
        substitute_headers(&mut headers, &policy, &"a.example".parse().unwrap(), Channel::Verified).unwrap();
        assert!(!format!("{headers:?}").contains("hunter2"));
    }
}
