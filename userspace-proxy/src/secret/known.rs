//! Patterns, made once for each set of secrets, however many requests and VMs of an account ask for them.

use super::patterns::{Patterns, Unsearchable};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
};
use tapgate_model::{SecretBinding, UserId};

/// Patterns, if there is something to look for.
pub(crate) type Made = Result<Option<Arc<Patterns>>, Unsearchable>;

/// A set of secrets, and what was made of it when it was first asked for.
pub(crate) struct Known {
    secrets: Arc<[SecretBinding]>,
    made: OnceLock<Made>,
    /// Held by the one request that has it made, so that the others wait without a thread.
    making: tokio::sync::Mutex<()>,
}

impl Known {
    /// Whether it is of this set.
    pub(crate) fn is_of(&self, secrets: &Arc<[SecretBinding]>) -> bool {
        Arc::ptr_eq(&self.secrets, secrets)
    }

    /// What to look for. Made apart from the threads that serve: that takes half a second where an account has the most.
    pub(crate) async fn patterns(self: Arc<Self>) -> Made {
        if let Some(made) = self.made.get() {
            return made.clone();
        }
        let _making = self.making.lock().await;
        let known = self.clone();
        let make = move || known.made.get_or_init(|| Patterns::new(&known.secrets)).clone();
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
            made: OnceLock::new(),
            making: tokio::sync::Mutex::default(),
        });
        shelf.insert(user.clone(), Arc::downgrade(&known));
        known
    }
}

#[cfg(test)]
mod tests {
    use super::super::substitute::tests::policy;
    use crate::{intercept::ca::VmCa, table::PolicyTable};
    use std::{net::Ipv4Addr, sync::Arc};
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
        let first = of_one.patterns(&one, basic("ZmlyczpyZWFs")).await.unwrap().unwrap();
        let second = of_one.patterns(&one, basic("c2Vjb25kOnJlYWw=")).await.unwrap().unwrap();
        let third = of_two.patterns(&two, Vec::new()).await.unwrap().unwrap();
        assert!(first.shares_with(&second) && first.shares_with(&third));
        assert_eq!(first.clean_whole(b"ZmlyczpyZWFs a-real-value").unwrap(), b"sent IRONSH_PROXY_s");
        assert!(second.clean_whole(b"ZmlyczpyZWFs").is_none(), "another request's are not looked for");
        // Other secrets, another set.
        let other = Arc::new(VmPolicy {
            secrets: policy(&[("s", "another-value", &["*"])]).secrets,
            ..VmPolicy::clone(&one)
        });
        let other = of_one.patterns(&other, Vec::new()).await.unwrap().unwrap();
        assert!(!first.shares_with(&other) && other.clean_whole(b"a-real-value").is_none());
    }
}
