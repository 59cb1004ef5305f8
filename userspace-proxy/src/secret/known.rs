//! Patterns, made once for each set of secrets, however many requests and VMs of an account ask for them.
//!
//! Only what a host can know is looked for in its answers. Were all of an account's secrets looked for everywhere, a guest
//! and a server of its own could find out by what is replaced what those are that neither of them may have.

use super::patterns::{self, Patterns, Unsearchable};
use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};
use tapgate_model::{HostName, SecretBinding, UserId};

/// Most hosts that are remembered of a set of secrets; guests choose their names.
const HOSTS: usize = 1024;

/// Patterns, if there is something to look for.
pub(crate) type Made = Result<Option<Arc<Patterns>>, Unsearchable>;

/// Which secrets a host can have been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// All that apply to it.
    Applying,
    /// Those that name it, otherwise than through `*`.
    Naming,
}

impl Scope {
    fn has(self, secret: &SecretBinding, host: &HostName) -> bool {
        match self {
            Self::Applying => secret.applies_to(host),
            Self::Naming => secret.names(host),
        }
    }
}

/// Some of the secrets, and what was made of them when they were first asked for.
struct Part {
    /// Which of the set, in order.
    of: Box<[usize]>,
    made: OnceLock<Made>,
}

#[derive(Default)]
struct Parts {
    /// What was found of a host, for each scope.
    hosts: HashMap<HostName, [Option<Arc<Part>>; 2]>,
    /// Oldest first.
    all: VecDeque<Arc<Part>>,
}

impl Parts {
    fn of(&mut self, secrets: &[SecretBinding], host: &HostName, scope: Scope) -> Arc<Part> {
        if let Some(part) = self.hosts.get(host).and_then(|parts| parts[scope as usize].as_ref()) {
            return part.clone();
        }
        let of = (0..secrets.len()).filter(|at| scope.has(&secrets[*at], host)).collect();
        let part = self.all.iter().find(|part| part.of == of).cloned().unwrap_or_else(|| {
            self.make_room();
            let part = Arc::new(Part { of, made: OnceLock::new() });
            self.all.push_back(part.clone());
            part
        });
        if self.hosts.len() >= HOSTS {
            self.hosts.clear();
        }
        self.hosts.entry(host.clone()).or_default()[scope as usize] = Some(part.clone());
        part
    }

    /// How much is looked for by all of them, in octets.
    fn held(&self) -> usize {
        let made = self.all.iter().filter_map(|part| part.made.get()?.as_ref().ok()?.as_ref());
        made.map(|made| made.octets()).sum()
    }

    /// Keeps what overlapping lists of hosts make of the same secrets within the bound of them all together.
    fn make_room(&mut self) {
        while self.held() > patterns::MOST || self.all.len() >= HOSTS {
            self.all.pop_front();
            // What is not made yet goes too; whoever waits for it has it.
            self.hosts.clear();
        }
    }
}

/// A set of secrets.
pub(crate) struct Known {
    secrets: Arc<[SecretBinding]>,
    parts: Mutex<Parts>,
    /// Held by the one request that has something made: the others wait without a thread, and no more is made than there is room for.
    making: tokio::sync::Mutex<()>,
}

impl Known {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is of this set.
    pub(crate) fn is_of(&self, secrets: &Arc<[SecretBinding]>) -> bool {
        Arc::ptr_eq(&self.secrets, secrets)
    }

    /// What to look for in a host's answers. Made apart from the threads that serve: that takes half a second where an account
    /// has the most.
    pub(crate) async fn patterns(self: Arc<Self>, host: &HostName, scope: Scope) -> Made {
        let part = self.parts().of(&self.secrets, host, scope);
        if part.of.is_empty() {
            return Ok(None);
        }
        if let Some(made) = part.made.get() {
            return made.clone();
        }
        let _making = self.making.lock().await;
        if part.made.get().is_none() {
            self.parts().make_room();
        }
        let (known, making) = (self.clone(), part.clone());
        let make = move || {
            let secrets = making.of.iter().map(|at| &known.secrets[*at]);
            making.made.get_or_init(|| Patterns::new(secrets)).clone()
        };
        tokio::task::spawn_blocking(make).await.unwrap_or(Err(Unsearchable))
    }
}

/// The latest set of each account, kept for as long as a VM holds it.
#[derive(Default)]
pub(crate) struct Shelf(Mutex<HashMap<UserId, Weak<Known>>>);

impl Shelf {
    /// The account's set.
    pub(crate) fn of(&self, user: &UserId, secrets: &Arc<[SecretBinding]>) -> Arc<Known> {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = shelf.get(user).and_then(Weak::upgrade).filter(|known| known.is_of(secrets)) {
            return known;
        }
        shelf.retain(|_, known| known.strong_count() > 0);
        let known = Arc::new(Known {
            secrets: secrets.clone(),
            parts: Mutex::default(),
            making: tokio::sync::Mutex::default(),
        });
        shelf.insert(user.clone(), Arc::downgrade(&known));
        known
    }
}

#[cfg(test)]
mod tests {
    use super::{super::substitute::tests::policy, *};
    use crate::{intercept::ca::VmCa, table::PolicyTable};
    use std::net::Ipv4Addr;
    use tapgate_model::{GuestNet, VmId, VmPolicy};
    use zeroize::Zeroizing;

    #[tokio::test]
    async fn requests_and_vms_of_an_account_share_what_was_made_of_its_secrets() {
        let table = PolicyTable::default();
        let one = Arc::new(policy(&[("s", "a-real-value", &["*"])]));
        let two = Arc::new(VmPolicy { vm: VmId::generate(), ..VmPolicy::clone(&one) });
        let entry = |slot: u32, policy: &Arc<VmPolicy>| {
            let net = GuestNet::new(slot, Ipv4Addr::new(10, 214, 0, 0), None);
            table.insert(net, Arc::new(VmCa::generate(&policy.vm).unwrap()), policy.clone());
            table.by_address(net.v4.into()).unwrap()
        };
        let (of_one, of_two) = (entry(0, &one), entry(1, &two));
        let basic = |encoded: &str| vec![(Zeroizing::new(encoded.as_bytes().to_vec()), b"sent".to_vec())];
        let with = |base, credentials| Patterns::with(base, credentials).unwrap().unwrap();
        let host = "a.example".parse().unwrap();
        let sought = Some((&host, Scope::Applying));
        let first = with(of_one.patterns(&one, sought).await.unwrap(), basic("ZmlyczpyZWFs"));
        let second = with(of_one.patterns(&one, sought).await.unwrap(), basic("c2Vjb25kOnJlYWw="));
        let third = of_two.patterns(&two, sought).await.unwrap().unwrap();
        assert!(first.shares_with(&second) && first.shares_with(&third));
        assert_eq!(first.clean_whole(b"ZmlyczpyZWFs a-real-value").unwrap(), b"sent IRONSH_PROXY_s");
        assert!(second.clean_whole(b"ZmlyczpyZWFs").is_none(), "another request's are not looked for");
        // Other secrets, another set.
        let other = Arc::new(VmPolicy {
            secrets: policy(&[("s", "another-value", &["*"])]).secrets,
            ..VmPolicy::clone(&one)
        });
        let other = of_one.patterns(&other, sought).await.unwrap().unwrap();
        assert!(!first.shares_with(&other) && other.clean_whole(b"a-real-value").is_none());
    }

    #[tokio::test]
    async fn only_what_a_host_can_have_been_sent_is_looked_for() {
        let policy = policy(&[
            ("a", "value-of-a", &["a.example"]),
            ("wide", "value-of-wide", &["*.example"]),
            ("any", "value-of-any", &["*"]),
        ]);
        let known = Shelf::default().of(&policy.user, &policy.secrets);
        let all = b"value-of-a value-of-wide value-of-any";
        for (host, scope, clean) in [
            ("a.example", Scope::Applying, "IRONSH_PROXY_a IRONSH_PROXY_wide IRONSH_PROXY_any"),
            ("b.example", Scope::Applying, "value-of-a IRONSH_PROXY_wide IRONSH_PROXY_any"),
            ("b.example", Scope::Naming, "value-of-a IRONSH_PROXY_wide value-of-any"),
            ("c.invalid", Scope::Applying, "value-of-a value-of-wide IRONSH_PROXY_any"),
        ] {
            let patterns = known.clone().patterns(&host.parse().unwrap(), scope).await.unwrap().unwrap();
            let cleaned = patterns.clean_whole(all).unwrap();
            assert_eq!(String::from_utf8(cleaned).unwrap(), clean, "{host} {scope:?}");
        }
        assert!(known.patterns(&"c.invalid".parse().unwrap(), Scope::Naming).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn names_that_a_guest_invents_make_nothing_new() {
        let policy = policy(&[("wide", "value-of-wide", &["*.example"])]);
        let known = Shelf::default().of(&policy.user, &policy.secrets);
        let mut first: Option<Arc<Patterns>> = None;
        for n in 0..3 * HOSTS {
            let host = format!("n{n}.example").parse().unwrap();
            let made = known.clone().patterns(&host, Scope::Applying).await.unwrap().unwrap();
            assert!(Arc::ptr_eq(first.get_or_insert_with(|| made.clone()), &made));
        }
        let parts = known.parts.lock().unwrap();
        assert!(parts.hosts.len() <= HOSTS && parts.all.len() == 1);
    }

    #[tokio::test]
    async fn lists_of_hosts_that_overlap_hold_no_more_than_all_secrets_may() {
        let value = "\"".repeat(4096);
        let hosts: Vec<Vec<String>> =
            (0..64).map(|n| (n..64).map(|of| format!("h{of}.example")).collect()).collect();
        let names: Vec<String> = (0..64).map(|n| format!("s{n}")).collect();
        let values: Vec<String> = (0..64).map(|n| format!("{n}{}", &value[2..])).collect();
        let lists: Vec<Vec<&str>> =
            hosts.iter().map(|list| list.iter().map(String::as_str).collect()).collect();
        let all: Vec<(&str, &str, &[&str])> =
            (0..64).map(|n| (names[n].as_str(), values[n].as_str(), lists[n].as_slice())).collect();
        let policy = policy(&all);
        let known = Shelf::default().of(&policy.user, &policy.secrets);
        // All at once: what is not made yet counts for nothing.
        let hosts: Vec<HostName> = (57..64).map(|n| format!("h{n}.example").parse().unwrap()).collect();
        let asked = hosts.iter().map(|host| known.clone().patterns(host, Scope::Applying));
        for made in futures_util::future::join_all(asked).await {
            assert!(made.unwrap().is_some());
        }
        let parts = known.parts.lock().unwrap();
        assert!(parts.held() <= 2 * patterns::MOST, "{}", parts.held());
    }
}
