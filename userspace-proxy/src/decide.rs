//! From a name or an address to a verdict and the one place that may be dialled for it.
//!
//! Must never turn a name that the guest wrote into leave to dial the address that the guest chose.

use crate::{
    registry::Subject,
    table::{PolicyTable, VmEntry},
};
use std::{net::SocketAddr, time::Instant};
use tapgate_model::{HostName, Mode, Reason, Verdict, VmPolicy};

/// Where to dial.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Route {
    /// The name, resolved by us.
    Name(HostName),
    /// The address that the guest chose, because the decision was about this address.
    Address,
}

/// What was decided, and on what.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    /// The row of the table.
    pub verdict: Verdict,
    /// Where to dial if it passes.
    pub route: Route,
    /// What it is registered and judged again as.
    pub subject: Subject,
    /// The name that it goes by, written or pinned.
    pub name: Option<HostName>,
}

/// Decides about a connection or request that names a host.
pub(crate) fn named(table: &PolicyTable, policy: &VmPolicy, name: &HostName, to: SocketAddr) -> Decision {
    let by_name = |verdict| Decision {
        verdict,
        route: Route::Name(name.clone()),
        subject: Subject::Opened(name.clone()),
        name: Some(name.clone()),
    };
    let verdict = policy.decide_host(name);
    if verdict.is_allowed() {
        return by_name(verdict);
    }
    let local = table.refuse_local(to.ip());
    let address = policy.decide_address(to.ip());
    if local.is_ok() && address.is_allowed() {
        return Decision {
            verdict: address,
            route: Route::Address,
            subject: Subject::Address(to.ip()),
            name: Some(name.clone()),
        };
    }
    by_name(verdict)
}

/// Decides about one that does not; `reason` says why it has no name.
pub(crate) fn unnamed(
    table: &PolicyTable,
    entry: &VmEntry,
    policy: &VmPolicy,
    to: SocketAddr,
    reason: Reason,
) -> Decision {
    let by_address =
        |verdict| Decision { verdict, route: Route::Address, subject: Subject::Address(to.ip()), name: None };
    if let Err(reason) = table.refuse_local(to.ip()) {
        return by_address(Verdict::Deny { reason });
    }
    let verdict = policy.decide_address(to.ip());
    if verdict.is_allowed() || verdict.reason() != Reason::NoRule {
        return by_address(verdict);
    }
    if reason == Reason::NoName && !matches!(to.port(), 80 | 443) {
        for name in entry.pins.names(to.ip(), Instant::now()) {
            if let Verdict::Allow { rule, .. } = policy.decide_host(&name) {
                return Decision {
                    verdict: Verdict::Allow { rule, reason: Reason::Pin },
                    route: Route::Address,
                    subject: Subject::Pinned(name.clone(), to.ip()),
                    name: Some(name),
                };
            }
        }
    }
    by_address(without(policy, reason))
}

/// The same for TLS. A pin does not do for an address of a host that a secret is for: TLS to it has to be opened, and for that to
/// name it, or a value that the host was sent before would come back unread.
pub(crate) fn unnamed_tls(
    table: &PolicyTable,
    entry: &VmEntry,
    policy: &VmPolicy,
    to: SocketAddr,
) -> Decision {
    let decision = unnamed(table, entry, policy, to, Reason::NoName);
    let Subject::Pinned(name, address) = decision.subject else { return decision };
    let opened = |name: &HostName| policy.decide_host(name).is_allowed() && policy.could_inject(name);
    if entry.pins.names(address, Instant::now()).iter().any(opened) {
        let (verdict, subject) = (without(policy, Reason::NoName), Subject::Address(address));
        return Decision { verdict, subject, ..decision };
    }
    Decision { subject: Subject::PinnedTls(name, address), ..decision }
}

fn without(policy: &VmPolicy, reason: Reason) -> Verdict {
    match policy.mode {
        Mode::Enforce => Verdict::Deny { reason },
        Mode::Warn => Verdict::Tolerate { reason },
    }
}
