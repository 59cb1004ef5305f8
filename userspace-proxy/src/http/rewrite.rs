//! A guest's request made the daemon's own: what is the guest's connection's goes out, the name that was decided on and the
//! secrets' values go in.
//!
//! Must never put a value in on the way to where the name does not lead, and never ask for an answer that could not be searched.

use super::{headers::strip_hop_by_hop, request::HttpConn, upgrade};
use crate::{
    decide::{Decision, Route},
    secret::{
        decode,
        known::Scope,
        substitute::{Channel, Outcome, TooLarge, substitute_headers},
    },
};
use http::{HeaderValue, header, request::Parts};
use tapgate_model::{HostName, Reason, VmPolicy, policy::SecretsOverHttp};

impl HttpConn {
    /// How values may go to the name, and which it can have been sent at any time: what is looked for in its answer.
    pub(super) async fn channel(
        &self,
        policy: &VmPolicy,
        decision: &Decision,
        name: &HostName,
    ) -> (Channel, Option<Scope>) {
        let way = self.way(policy, decision, name).await;
        let allowed = decision.verdict.is_allowed();
        let scope = match (way, policy.secrets_over_http) {
            (Channel::Nowhere, _) => None,
            (Channel::Verified, _) | (Channel::Clear, SecretsOverHttp::Always) if allowed => {
                Some(Scope::Applying)
            }
            // No rule leads there now, or not in clear text: what it knows was sent before.
            _ => Some(Scope::Naming),
        };
        (if allowed { way } else { Channel::Nowhere }, scope)
    }

    /// How sure it is that the name's own server is spoken to.
    async fn way(&self, policy: &VmPolicy, decision: &Decision, name: &HostName) -> Channel {
        match (&self.tls, &decision.route) {
            (Some(_), _) => Channel::Verified,
            (None, Route::Name(_)) => Channel::Clear,
            (None, Route::Address)
                if decision.verdict.reason() == Reason::Pin || !policy.could_inject(name) =>
            {
                Channel::Nowhere
            }
            // The guest chose this address and wrote this name: a secret goes there only if they belong together.
            (None, Route::Address) => {
                let dialer = &self.shared.connector.dialer;
                match Box::pin(dialer.leads_to(&self.entry, name, self.to.ip())).await {
                    true => Channel::Clear,
                    false => Channel::Nowhere,
                }
            }
        }
    }

    /// Makes the guest's request the daemon's own. `searched` if there is something to look for in the answer.
    pub(super) fn rewrite(
        &self,
        policy: &VmPolicy,
        name: Option<&HostName>,
        parts: &mut Parts,
        channel: Channel,
        searched: bool,
        upgrade: bool,
    ) -> Result<Outcome, TooLarge> {
        let headers = &mut parts.headers;
        strip_hop_by_hop(headers);
        headers.remove(header::EXPECT);
        headers.remove(header::PROXY_AUTHORIZATION);
        if upgrade {
            upgrade::ask(headers);
        }
        let Some(name) = name else { return Ok(Outcome::default()) };
        let default_port = if self.tls.is_some() { 443 } else { 80 };
        let host = match self.to.port() {
            port if port == default_port => name.to_string(),
            port => format!("{name}:{port}"),
        };
        if let Ok(host) = HeaderValue::from_str(&host) {
            headers.insert(header::HOST, host);
        }
        let outcome = substitute_headers(headers, policy, name, channel)?;
        if searched || !outcome.injected.is_empty() {
            decode::restrict(headers);
            // In pieces, a value that comes back could not be told.
            headers.remove(header::RANGE);
            headers.remove(header::IF_RANGE);
            // Nor in what an extension makes of a message.
            headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
        }
        Ok(outcome)
    }
}
