//! Egress policy: rules, how they are looked up, and the verdict with its reason.
//!
//! A [`VmPolicy`] is one VM's effective policy at one generation, compiled for lookup and immutable: readers hold an
//! `Arc` of it and never see half a change. It answers questions about names and addresses; it knows no sockets.

use crate::{Cidr, HostName, HostPattern, Reason, RuleId, SecretBinding, UserId, VmId};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, LazyLock},
};
use tapgate_ebpf_common::range::{Class, classify_v4, classify_v6};

/// What happens to traffic that no rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It is denied.
    #[default]
    Enforce,
    /// It passes, recorded as denied but let through.
    Warn,
}

impl Mode {
    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Warn => "warn",
        }
    }

    /// The mode with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Enforce, Self::Warn].into_iter().find(|mode| mode.word() == word)
    }
}

/// What a rule lets a VM reach.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RuleTarget {
    /// Addresses, forwarded in the kernel.
    Cidr(Cidr),
    /// Names, through the proxy.
    Host(HostPattern),
}

/// An allow rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its id, which audit events name.
    pub id: RuleId,
    /// What it allows.
    pub target: RuleTarget,
}

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A row of the table lets it out; `rule` is the rule that did, where one did.
    Allow {
        /// The rule that matched, if it was a rule.
        rule: Option<RuleId>,
        /// The row.
        reason: Reason,
    },
    /// It may not leave.
    Deny {
        /// The row.
        reason: Reason,
    },
    /// No rule allows it, but the VM's mode is `warn`: it passes and is recorded as denied.
    Tolerate {
        /// Why `enforce` would have denied it.
        reason: Reason,
    },
}

impl Verdict {
    /// Whether the traffic passes.
    pub const fn passes(&self) -> bool {
        !matches!(self, Self::Deny { .. })
    }

    /// Whether a rule allowed it: what secrets are injected on.
    pub const fn is_allowed(&self) -> bool {
        matches!(self, Self::Allow { .. })
    }

    /// The row of the table.
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Allow { reason, .. } | Self::Deny { reason } | Self::Tolerate { reason } => *reason,
        }
    }

    /// The rule that allowed it.
    pub const fn rule(&self) -> Option<&RuleId> {
        match self {
            Self::Allow { rule, .. } => rule.as_ref(),
            _ => None,
        }
    }
}

/// One owner's rules compiled for lookup: exact names and suffixes by hash, ranges by longest prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleLayer {
    exact: HashMap<HostName, RuleId>,
    subdomain: HashMap<HostName, RuleId>,
    any: Option<RuleId>,
    /// Longest prefix first.
    cidrs: Vec<(Cidr, RuleId)>,
    /// The ranges alone: sorted, each once.
    ranges: Vec<Cidr>,
}

impl RuleLayer {
    /// No rules: one layer, shared by all that have none.
    pub fn none() -> Arc<Self> {
        static NONE: LazyLock<Arc<RuleLayer>> = LazyLock::new(Arc::default);
        Arc::clone(&NONE)
    }

    /// Compiles rules; of several for one target the first stands.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let mut layer = Self::default();
        for Rule { id, target } in rules {
            match target {
                RuleTarget::Host(HostPattern::Any) => {
                    layer.any.get_or_insert(id);
                }
                RuleTarget::Host(HostPattern::Exact(name)) => {
                    layer.exact.entry(name).or_insert(id);
                }
                RuleTarget::Host(HostPattern::Subdomain(name)) => {
                    layer.subdomain.entry(name).or_insert(id);
                }
                RuleTarget::Cidr(cidr) => layer.cidrs.push((cidr, id)),
            }
        }
        layer.cidrs.sort_by_key(|(cidr, _)| std::cmp::Reverse(cidr.prefix_len()));
        layer.ranges = layer.cidrs.iter().map(|(cidr, _)| *cidr).collect();
        layer.ranges.sort_unstable();
        layer.ranges.dedup();
        layer
    }

    /// The ranges, sorted, each once: what the kernel's tries are filled with.
    pub fn ranges(&self) -> &[Cidr] {
        &self.ranges
    }

    /// The rule with the longest prefix around the address.
    fn cidr(&self, address: IpAddr) -> Option<&(Cidr, RuleId)> {
        self.cidrs.iter().find(|(cidr, _)| cidr.contains(address))
    }

    fn has_hosts(&self) -> bool {
        self.any.is_some() || !self.exact.is_empty() || !self.subdomain.is_empty()
    }
}

/// The rules in force for one VM: its own and, where it inherits them, its account's. The layers are shared, so that a
/// change of a thousand VMs' account compiles the account's rules once.
#[derive(Clone, Debug, Default)]
pub struct RuleSet {
    own: Arc<RuleLayer>,
    account: Arc<RuleLayer>,
}

impl RuleSet {
    /// Rules of the VM's own alone; of several for one target the first stands.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        Self::layered(Arc::new(RuleLayer::new(rules)), Arc::default())
    }

    /// The VM's own rules over its account's: where both are as specific, the VM's own is named.
    pub fn layered(own: Arc<RuleLayer>, account: Arc<RuleLayer>) -> Self {
        Self { own, account }
    }

    /// The VM's own rules.
    pub fn own(&self) -> &Arc<RuleLayer> {
        &self.own
    }

    /// The account's rules; none where the VM does not inherit them.
    pub fn account(&self) -> &Arc<RuleLayer> {
        &self.account
    }

    /// The rule that covers the name, the most specific first.
    pub fn host(&self, name: &HostName) -> Option<&RuleId> {
        let layers = [&*self.own, &*self.account];
        let exact = layers.iter().find_map(|layer| layer.exact.get(name));
        exact
            .or_else(|| {
                let parent = name.parent()?;
                layers.iter().find_map(|layer| layer.subdomain.get(parent))
            })
            .or_else(|| layers.iter().find_map(|layer| layer.any.as_ref()))
    }

    /// The rule with the longest prefix around the address.
    pub fn cidr(&self, address: IpAddr) -> Option<&RuleId> {
        let found = match (self.own.cidr(address), self.account.cidr(address)) {
            (Some(own), Some(account)) if account.0.prefix_len() > own.0.prefix_len() => Some(account),
            (own, account) => own.or(account),
        };
        found.map(|(_, id)| id)
    }

    /// The ranges with their rules, the VM's own first.
    pub fn cidrs(&self) -> impl Iterator<Item = &(Cidr, RuleId)> {
        self.own.cidrs.iter().chain(&self.account.cidrs)
    }

    /// Whether any rule is about names.
    pub fn has_hosts(&self) -> bool {
        self.own.has_hosts() || self.account.has_hosts()
    }
}

/// Whether secrets go out in clear-text HTTP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretsOverHttp {
    /// Wherever the secret's hosts match.
    Always,
    /// Only to hosts that the secret names, not through `*`.
    #[default]
    Explicit,
    /// Never.
    Never,
}

/// One VM's effective policy at one generation.
#[derive(Clone, Debug)]
pub struct VmPolicy {
    /// The VM.
    pub vm: VmId,
    /// Its owner.
    pub user: UserId,
    /// Rises with every change to this VM's policy; names the whole of it.
    pub generation: u64,
    /// Enforce or warn.
    pub mode: Mode,
    /// The account's and the VM's rules together, or the VM's alone.
    pub rules: RuleSet,
    /// The owner's secrets.
    pub secrets: Arc<[SecretBinding]>,
    /// Secrets in clear text.
    pub secrets_over_http: SecretsOverHttp,
}

impl VmPolicy {
    /// Decides about a name.
    pub fn decide_host(&self, name: &HostName) -> Verdict {
        match self.rules.host(name) {
            Some(rule) => Verdict::Allow { rule: Some(rule.clone()), reason: Reason::Host },
            None => self.unlisted(Reason::NoRule),
        }
    }

    /// Decides about an address that no name stands for. Addresses of the host and of other VMs are the caller's to
    /// refuse before: they are known at run time only.
    pub fn decide_address(&self, address: IpAddr) -> Verdict {
        match classify(address) {
            Class::Denied(reason) => Verdict::Deny { reason },
            class => match self.rules.cidr(address) {
                Some(rule) => Verdict::Allow { rule: Some(rule.clone()), reason: Reason::Cidr },
                None if class == Class::Private => Verdict::Deny { reason: Reason::Private },
                None => self.unlisted(Reason::NoRule),
            },
        }
    }

    /// Whether an address that a name resolved to may be dialled or handed to the guest.
    pub fn admits_resolved(&self, address: IpAddr) -> Result<(), Reason> {
        match classify(address) {
            Class::Denied(reason) => Err(reason),
            Class::Private if self.rules.cidr(address).is_none() => Err(Reason::Private),
            Class::Private | Class::Public => Ok(()),
        }
    }

    /// Whether a secret of the owner could apply to the name, so that its TLS has to be opened.
    pub fn could_inject(&self, name: &HostName) -> bool {
        self.secrets.iter().any(|secret| secret.applies_to(name))
    }

    fn unlisted(&self, reason: Reason) -> Verdict {
        match self.mode {
            Mode::Enforce => Verdict::Deny { reason },
            Mode::Warn => Verdict::Tolerate { reason },
        }
    }
}

/// The class of an address of either family.
pub fn classify(address: IpAddr) -> Class {
    match address {
        IpAddr::V4(v4) => classify_v4(v4.octets()),
        IpAddr::V6(v6) => classify_v6(v6.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: Mode, targets: &[&str]) -> VmPolicy {
        let rules = targets.iter().map(|text| Rule {
            id: RuleId::generate(),
            target: match text.parse::<Cidr>() {
                Ok(cidr) => RuleTarget::Cidr(cidr),
                Err(_) => RuleTarget::Host(text.parse().unwrap()),
            },
        });
        VmPolicy {
            vm: VmId::generate(),
            user: UserId::generate(),
            generation: 1,
            mode,
            rules: RuleSet::new(rules),
            secrets: Arc::new([]),
            secrets_over_http: SecretsOverHttp::default(),
        }
    }

    fn address(policy: &VmPolicy, text: &str) -> Verdict {
        policy.decide_address(text.parse().unwrap())
    }

    #[test]
    fn no_rule_means_nothing_leaves() {
        let policy = policy(Mode::Enforce, &[]);
        assert_eq!(
            policy.decide_host(&"a.example".parse().unwrap()),
            Verdict::Deny { reason: Reason::NoRule }
        );
        assert_eq!(address(&policy, "192.0.2.1"), Verdict::Deny { reason: Reason::NoRule });
    }

    #[test]
    fn warn_tolerates_but_never_allows() {
        let policy = policy(Mode::Warn, &[]);
        let verdict = policy.decide_host(&"a.example".parse().unwrap());
        assert!(verdict.passes() && !verdict.is_allowed());
        assert!(!address(&policy, "10.0.0.1").passes());
        assert!(!address(&policy, "169.254.169.254").passes());
        assert!(!address(&policy, "::ffff:127.0.0.1").passes());
    }

    #[test]
    fn a_cidr_rule_opens_private_ranges_but_never_denied_ones() {
        let policy = policy(Mode::Enforce, &["0.0.0.0/0", "::/0"]);
        assert!(address(&policy, "10.0.0.1").is_allowed());
        assert!(address(&policy, "192.0.2.1").is_allowed());
        assert!(!address(&policy, "127.0.0.1").passes());
        assert!(!address(&policy, "169.254.169.254").passes());
        assert!(!address(&policy, "::1").passes());
    }

    #[test]
    fn the_most_specific_rule_is_named() {
        let policy =
            policy(Mode::Enforce, &["*", "*.example.com", "a.example.com", "192.0.2.0/24", "192.0.2.7/32"]);
        let of = |name: &str| policy.decide_host(&name.parse().unwrap()).rule().cloned().unwrap();
        assert_ne!(of("a.example.com"), of("b.example.com"));
        assert_ne!(of("b.example.com"), of("b.c.example.com"));
        assert_ne!(address(&policy, "192.0.2.7").rule(), address(&policy, "192.0.2.8").rule());
    }

    #[test]
    fn of_two_layers_the_more_specific_rule_is_named_and_the_vms_own_first() {
        let layer = |texts: &[&str]| policy(Mode::Enforce, texts).rules.own;
        let (own, account) = (
            layer(&["*.example.com", "192.0.2.0/24", "198.51.100.0/24"]),
            layer(&["*", "a.example.com", "*.example.com", "192.0.2.7/32", "198.51.100.0/24"]),
        );
        let of = |set: &RuleSet, name: &str| set.host(&name.parse().unwrap()).cloned();
        let at = |set: &RuleSet, text: &str| set.cidr(text.parse().unwrap()).cloned();
        let both = RuleSet::layered(own.clone(), account.clone());
        let (mine, its) = (
            RuleSet::layered(own.clone(), Arc::default()),
            RuleSet::layered(Arc::default(), account.clone()),
        );
        assert_eq!(of(&both, "a.example.com"), of(&its, "a.example.com"));
        assert_eq!(of(&both, "b.example.com"), of(&mine, "b.example.com"));
        assert_eq!(of(&both, "example.net"), of(&its, "example.net"));
        assert_eq!(at(&both, "192.0.2.7"), at(&its, "192.0.2.7"));
        assert_eq!(at(&both, "192.0.2.8"), at(&mine, "192.0.2.8"));
        assert_eq!(at(&both, "198.51.100.1"), at(&mine, "198.51.100.1"));
        assert_eq!(at(&both, "203.0.113.1"), None);
        assert_eq!(both.cidrs().count(), 4);
        let ranges: Vec<String> = account.ranges().iter().map(Cidr::to_string).collect();
        assert_eq!(ranges, ["192.0.2.7/32", "198.51.100.0/24"]);
    }

    #[test]
    fn names_never_open_private_ranges() {
        let open = policy(Mode::Enforce, &["*"]);
        assert_eq!(open.admits_resolved("10.0.0.1".parse().unwrap()), Err(Reason::Private));
        assert!(open.admits_resolved("192.0.2.1".parse().unwrap()).is_ok());
        let with_cidr = policy(Mode::Enforce, &["*", "10.0.0.0/8"]);
        assert!(with_cidr.admits_resolved("10.0.0.1".parse().unwrap()).is_ok());
        assert!(with_cidr.admits_resolved("127.0.0.1".parse().unwrap()).is_err());
    }
}
