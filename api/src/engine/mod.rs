//! The engine: joins store, datapath, proxy and drivers.

pub mod handle;

pub use handle::{Command, Handle, Notifier, Scope};
