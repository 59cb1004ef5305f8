//! DNS for guests: the only one they get. What no rule allows is answered without being asked of anyone.

pub(crate) mod answer;
pub(crate) mod flood;
pub(crate) mod pins;
pub(crate) mod tcp;
pub(crate) mod udp;
