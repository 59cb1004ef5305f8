//! The user-space half of the gate: peek, decide, splice, intercept, secrets, DNS.
//!
//! Is handed bound listeners, a policy table to read and a sink for audit events. Must never know namespaces, SQLite
//! or BPF, and never dial an address that a guest chose on the strength of a name that the guest wrote.
#![forbid(unsafe_code)]

mod audit;
mod config;
mod confine;
mod conn;
mod decide;
mod deny;
mod dial;
mod dns;
mod http;
mod intercept;
mod io;
mod listener;
mod peek;
mod place;
mod proxy;
mod rate;
mod registry;
mod resolve;
mod resolver;
mod secret;
mod socket;
mod splice;
mod table;
mod throttle;
mod trust;
mod unread;
mod window;

pub use config::{Limits, ProxyConfig, Timeouts};
pub use conn::Accepted;
pub use intercept::ca::{CaError, VmCa};
pub use listener::{ListenError, ListenerFds, Listeners, ServiceListeners};
pub use proxy::{Proxy, ProxyError};
pub use resolver::{BadResolver, Resolver, Transport};
pub use table::{HostPrefix, PolicyTable};

/// What the fuzz targets and property tests reach of the parsers; no part of the interface.
#[doc(hidden)]
pub mod internal {
    pub use crate::dns::answer::refuse_question;
    pub use crate::http::authority::{Authority, Named};
    pub use crate::http::guard::GuardedIo;
    pub use crate::peek::http1::{Framing, Head, check_head};
    pub use crate::peek::tls::{Hello, HelloReader};
    pub use crate::secret::clean::Cleaner;
    pub use crate::secret::patterns::{Patterns, Unsearchable};
    pub use crate::secret::substitute::{Channel, Outcome, substitute_headers};
}
