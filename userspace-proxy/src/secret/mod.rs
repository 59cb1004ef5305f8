//! Real values in, and never out: substitution in what a guest sends, cleaning of what comes back.

pub(crate) mod basic;
pub(crate) mod clean;
pub(crate) mod decode;
pub(crate) mod known;
pub(crate) mod patterns;
pub(crate) mod room;
pub(crate) mod substitute;
