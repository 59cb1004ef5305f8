//! tapgate: the daemon's REST API, its engine, and the command line that talks to it.
//!
//! The API owns requests and answers; the engine owns what happens to VMs; the store is between them. A controller
//! writes down what is wanted, wakes the engine, and answers. It never touches a tap, a process or a socket of a guest.
#![forbid(unsafe_code)]

pub mod admin;
mod agent;
pub mod capacity;
pub mod cli;
pub mod config;
mod controllers;
pub mod doctor;
pub mod engine;
mod guest_service;
pub mod http;
pub mod images;
mod log;
pub mod mail;
pub mod parts;
pub mod promised;
pub mod retention;
pub mod serve;
mod storage;
pub mod traffic;
pub mod unit;

pub use agent::{Harness, HarnessError, Harnesses};
pub use http::{AppState, Settings, router};
pub use storage::{Place, Storage};
