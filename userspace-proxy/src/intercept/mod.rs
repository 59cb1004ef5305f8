//! What makes opening a VM's TLS possible: its CA, and the certificates that the CA mints. Must never serve one VM with
//! another's.

pub(crate) mod ca;
pub(crate) mod leaf;
mod offered;
pub(crate) mod open;
mod other;
mod relay;
