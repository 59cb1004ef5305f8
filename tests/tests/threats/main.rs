//! Every line of the list of threats under name and address, HTTP, secrets and DNS, tried from a guest's namespace through tap
//! and BPF against the running daemon. An attacker's server keeps every octet that it gets; at the end of each test no real
//! value is in what it kept, in what the guest received, or in what the daemon wrote, and each attempt has its event.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod dns;
mod field;
mod frames;
mod hello;
mod http1;
mod http2;
mod inside;
mod names;
mod secrets;
mod wire;
