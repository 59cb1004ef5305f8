//! Packet counters at the door of the world's internet: the proof that something arrived there, or that nothing did.

use crate::{
    net::{Names, UPLINK, inside},
    sh::expect,
    sites::{self, ROUTER_V4, ROUTER_V6, Site},
};
use anyhow::{Context as _, Result};
use std::{collections::BTreeMap, fmt::Write as _};

/// How many packets had arrived from the host, by site; `any` counts those to any address but the router's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Puts the counters in place.
    pub fn install(names: &Names) -> Result<()> {
        let mut rules = String::new();
        let mut declared = String::from("counter any { }\n");
        for site in sites::ALL {
            let counter = site.counter();
            writeln!(declared, "counter {counter} {{ }}")?;
            writeln!(rules, "ip daddr {} counter name {counter}", site.v4)?;
            writeln!(rules, "ip6 daddr {} counter name {counter}", site.v6)?;
        }
        let table = format!(
            "table inet watch {{\n{declared}chain arrivals {{\n\
             type filter hook prerouting priority -400;\n\
             iifname != \"{UPLINK}\" return\n\
             ip daddr {{ {ROUTER_V4}, 224.0.0.0/4 }} return\n\
             ip6 daddr {{ {ROUTER_V6}, fe80::/10, ff00::/8 }} return\n\
             counter name any\n{rules}}}\n}}\n"
        );
        expect(inside(&names.internet(), "nft").args(["-f", "-"]), table.as_bytes())?;
        Ok(())
    }

    /// Reads them.
    pub fn read(names: &Names) -> Result<Self> {
        let text = expect(inside(&names.internet(), "nft").args(["-j", "list", "counters"]), b"")?;
        let json: serde_json::Value = serde_json::from_str(&text).context("nft's counters are no JSON")?;
        let list = json["nftables"].as_array().context("nft's counters are no list")?;
        let counter = |item: &serde_json::Value| {
            let counter = item.get("counter")?;
            Some((counter["name"].as_str()?.to_owned(), counter["packets"].as_u64()?))
        };
        Ok(Self(list.iter().filter_map(counter).collect()))
    }

    /// Packets that arrived for the site.
    pub fn of(&self, site: Site) -> u64 {
        self.0.get(&site.counter()).copied().unwrap_or(0)
    }

    /// Packets that arrived for any address.
    pub fn any(&self) -> u64 {
        self.0.get("any").copied().unwrap_or(0)
    }

    /// What arrived since the earlier reading.
    pub fn since(&self, earlier: &Self) -> Self {
        let less = |(name, count): (&String, &u64)| {
            (name.clone(), count.saturating_sub(earlier.0.get(name).copied().unwrap_or(0)))
        };
        Self(self.0.iter().map(less).collect())
    }
}
