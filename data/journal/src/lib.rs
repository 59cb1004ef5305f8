//! The journal of what is under way: a file of slots that is mapped into memory, one slot for each attempt whose audit event is not
//! stored yet, so that a daemon that is killed leaves behind what it was at.
//!
//! Knows audit events and a file, and no database. Must never hold up who writes a note (no system call, no lock, nothing
//! allocated), trust what a file says, nor hold a secret's value or a query string: it is given events, which have none.
#![deny(unsafe_code)]

mod file;
mod free;
mod layout;
mod left;
mod map;
mod slot;

pub use file::FileJournal;
pub use left::{Left, LeftEvent, Lost};
