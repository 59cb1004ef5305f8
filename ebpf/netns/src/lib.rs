//! Network namespaces, links, routes, taps and nftables: the only crate that calls `setns`, netlink and `ioctl`.
//!
//! Owns the mechanics and no policy: which addresses, marks and tables there are is its callers' to say. Must never
//! move the calling thread into another namespace; every entry happens on a thread of its own.
#![deny(unsafe_code)]

mod error;
mod namespace;
pub mod nft;
mod rtnl;
pub mod tap;
mod watch;

pub use error::NetnsError;
pub use namespace::Netns;
pub use rtnl::{Route, RouteKind, Rtnl, Rule, Veth};
pub use tap::Tap;
pub use watch::AddressWatch;
