//! What one instance of the datapath is told, and the names that follow from it.

use crate::DatapathError;
use std::{net::IpAddr, num::NonZeroU32, path::PathBuf};
use tapgate_model::Cidr;

const MAX_INSTANCE: usize = 11;

/// Most of [`DatapathConfig::flows_per_second`].
pub const MAX_FLOW_RATE: u32 = 1_000_000;

/// A range that guests' addresses come from.
pub type Range = Cidr;

/// Configuration of the datapath.
#[derive(Clone, Debug)]
pub struct DatapathConfig {
    /// Tells instances on one host apart: 1 to 11 lower-case letters, digits and `-`.
    pub instance: String,
    /// Where programs and maps are pinned, usually `/sys/fs/bpf/tapgate`. Mounted if it is not.
    pub pin_root: PathBuf,
    /// The guests' IPv4 range.
    pub guest_v4: Range,
    /// The guests' IPv6 range; `None` where guests have no IPv6.
    pub guest_v6: Option<Range>,
    /// Whether that range is routed to this host, so that its addresses are seen outside; else they are translated (NAT66).
    pub guest_v6_routed: bool,
    /// The host's interface that forwarded traffic may leave by; `None` leaves it to the host's routes.
    pub uplink: Option<String>,
    /// Flows a second that one VM may open in the long run (8,192 in one go); at most [`MAX_FLOW_RATE`].
    pub flows_per_second: NonZeroU32,
}

impl DatapathConfig {
    pub(crate) fn check(&self) -> Result<(), DatapathError> {
        let name = &self.instance;
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=MAX_INSTANCE).contains(&name.len()) || !name.bytes().all(plain) {
            return Err(DatapathError::Config(format!(
                "`{name}` cannot be the name of an instance; use 1 to {MAX_INSTANCE} lower-case letters, digits and `-`"
            )));
        }
        if self.flows_per_second.get() > MAX_FLOW_RATE {
            return Err(DatapathError::Config(format!(
                "{} new flows a second are too many; use at most {MAX_FLOW_RATE}",
                self.flows_per_second
            )));
        }
        // It becomes part of a table's text.
        let link = |b: u8| b.is_ascii_alphanumeric() || b"-_.@".contains(&b);
        if let Some(uplink) =
            self.uplink.as_deref().filter(|u| u.is_empty() || u.len() > 15 || !u.bytes().all(link))
        {
            return Err(DatapathError::Config(format!(
                "`{uplink}` cannot be the name of an interface; use one like eth0"
            )));
        }
        if !self.guest_v4.network().is_ipv4() || self.guest_v4.prefix_len() > 30 {
            return Err(DatapathError::Config(format!(
                "`{}` cannot be the guests' IPv4 range; use one like 10.214.0.0/16",
                self.guest_v4
            )));
        }
        if let Some(range) =
            self.guest_v6.filter(|range| range.network().is_ipv4() || range.prefix_len() > 126)
        {
            return Err(DatapathError::Config(format!(
                "`{range}` cannot be the guests' IPv6 range; use one like fd74:6761:7465::/64"
            )));
        }
        Ok(())
    }

    /// The egress namespace's name.
    pub(crate) fn namespace(&self) -> String {
        format!("tapgate-{}", self.instance)
    }

    /// The uplink's end in the host's namespace.
    pub(crate) fn host_link(&self) -> String {
        format!("tgu-{}", self.instance)
    }

    /// The nftables table in the host's namespace.
    pub(crate) fn host_table(&self) -> String {
        format!("tapgate_{}", self.instance)
    }

    /// The guests' ranges.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (IpAddr, u8)> {
        [Some(self.guest_v4), self.guest_v6]
            .into_iter()
            .flatten()
            .map(|range| (range.network(), range.prefix_len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ranges_are_checked_before_anything_is_made() {
        let config = |instance: &str, v4: &str, v6: Option<&str>| DatapathConfig {
            instance: instance.into(),
            pin_root: "/sys/fs/bpf/tapgate".into(),
            guest_v4: v4.parse().unwrap(),
            guest_v6: v6.map(|text| text.parse().unwrap()),
            guest_v6_routed: false,
            uplink: None,
            flows_per_second: NonZeroU32::MIN,
        };
        let named = |uplink: &str| DatapathConfig {
            uplink: Some(uplink.into()),
            ..config("main", "10.214.0.0/16", None)
        };
        let rate = NonZeroU32::new(MAX_FLOW_RATE + 1).unwrap();
        let hasty = DatapathConfig { flows_per_second: rate, ..named("eth0") };
        assert!(hasty.check().unwrap_err().to_string().contains("1000000"));
        assert!(named("eth0.7").check().is_ok());
        assert!(named("eth0\" accept").check().is_err());
        assert!(config("main", "10.214.0.0/16", None).check().is_ok());
        assert!(config("main", "10.214.0.0/16", Some("fd74:6761:7465::/64")).check().is_ok());
        for (instance, v4, v6) in [
            ("", "10.214.0.0/16", None),
            ("../x", "10.214.0.0/16", None),
            ("a-very-long-name", "10.214.0.0/16", None),
            ("main", "fd00::/64", None),
            ("main", "10.0.0.1/32", None),
            ("main", "10.214.0.0/16", Some("10.0.0.0/8")),
        ] {
            assert!(config(instance, v4, v6).check().is_err(), "{instance} {v4}");
        }
    }
}
