//! The static network of `network-config` version 2: the one interface with that MAC, its addresses, its gateway.
//!
//! Every value is parsed into its own type before it is handed to `ip -batch`; text from the seed goes nowhere.

use crate::files;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

/// Configures the first (and only) interface of the document.
pub fn apply(network: &Value) -> Result<(), String> {
    let ethernets =
        network.get("ethernets").and_then(Value::as_object).ok_or("network-config has no ethernets")?;
    let nic = ethernets.values().next().ok_or("network-config has no interface")?;
    let mac =
        nic.pointer("/match/macaddress").and_then(Value::as_str).ok_or("the interface has no MAC address")?;
    let link = link_with(mac).ok_or_else(|| format!("there is no interface with MAC address {mac}"))?;
    let mut child = Command::new("/sbin/ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .map_err(|e| format!("ip: {e}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(batch(&link, nic)?.as_bytes()).map_err(|e| format!("ip: {e}"))?;
    }
    let status = child.wait().map_err(|e| format!("ip: {e}"))?;
    resolv_conf(nic)?;
    if status.success() { Ok(()) } else { Err(format!("ip: {status}")) }
}

/// Takes the one network device off its old addresses, and gives it the MAC address that the next ones are for.
pub fn forget(mac: &str) -> Result<(), String> {
    let digits = mac.split(':').filter(|pair| pair.len() == 2 && u8::from_str_radix(pair, 16).is_ok());
    if digits.count() != 6 || mac.len() != 17 {
        return Err(format!("{mac:?} is not a MAC address"));
    }
    let devices = fs::read_dir("/sys/class/net").map_err(|e| format!("/sys/class/net: {e}"))?;
    // What has a device behind it; bridges and tunnels of the guest's own are not the way out.
    let real = devices.flatten().find(|entry| entry.path().join("device").exists());
    let link =
        real.and_then(|entry| entry.file_name().into_string().ok()).ok_or("there is no network device")?;
    if !link.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
        return Err("the network device has an unusable name".into());
    }
    for words in [
        &["link", "set", "dev", &link, "down"][..],
        &["address", "flush", "dev", &link],
        &["neighbour", "flush", "dev", &link],
        &["link", "set", "dev", &link, "address", mac],
    ] {
        let mut command = Command::new("/sbin/ip");
        let status = command.args(words).stdin(Stdio::null()).status().map_err(|e| format!("ip: {e}"))?;
        if !status.success() {
            return Err(format!("ip {}: {status}", words.join(" ")));
        }
    }
    Ok(())
}

/// The commands for `ip -batch`. `replace` so that a second run changes nothing.
fn batch(link: &str, nic: &Value) -> Result<String, String> {
    let mut text = String::from("link set dev lo up\n");
    let mtu = nic.get("mtu").and_then(Value::as_u64).unwrap_or(1500).clamp(576, 9000);
    let mut line = |args: std::fmt::Arguments<'_>| {
        let _ = writeln!(text, "{args}");
    };
    line(format_args!("link set dev {link} mtu {mtu} up"));
    for address in nic.get("addresses").and_then(Value::as_array).into_iter().flatten() {
        let (ip, prefix) = address
            .as_str()
            .and_then(|text| text.split_once('/'))
            .and_then(|(ip, prefix)| Some((ip.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?)))
            .ok_or_else(|| format!("{address} is not an address with a prefix length"))?;
        let nodad = if ip.is_ipv6() { " nodad" } else { "" };
        line(format_args!("address replace {ip}/{prefix} dev {link}{nodad}"));
    }
    for route in nic.get("routes").and_then(Value::as_array).into_iter().flatten() {
        let via: IpAddr = route
            .get("via")
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| format!("{route} is not a route"))?;
        // A batch takes no `-6`: the destination says which family it is.
        let everywhere = if via.is_ipv6() { "::/0" } else { "0.0.0.0/0" };
        line(format_args!("route replace {everywhere} via {via} dev {link} onlink"));
    }
    Ok(text)
}

fn resolv_conf(nic: &Value) -> Result<(), String> {
    let mut text = String::new();
    for server in nic.pointer("/nameservers/addresses").and_then(Value::as_array).into_iter().flatten() {
        if let Some(ip) = server.as_str().and_then(|text| text.parse::<IpAddr>().ok()) {
            let _ = writeln!(text, "nameserver {ip}");
        }
    }
    text.push_str("options timeout:2 attempts:2\n");
    // A stub resolver's symlink leads nowhere here.
    let path = Path::new("/etc/resolv.conf");
    if path.is_symlink() {
        let _ = fs::remove_file(path);
    }
    files::write(path, text.as_bytes(), 0o644)
}

fn link_with(mac: &str) -> Option<String> {
    fs::read_dir("/sys/class/net").ok()?.flatten().find_map(|entry| {
        let address = fs::read_to_string(entry.path().join("address")).ok()?;
        address.trim().eq_ignore_ascii_case(mac).then(|| entry.file_name().into_string().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_mac_address_is_set() {
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:0g", "02:00:00:00:00:001", "02:00:00:00:00:01 up"] {
            assert!(forget(bad).unwrap_err().contains("MAC"), "{bad:?}");
        }
    }

    #[test]
    fn only_addresses_reach_the_command() {
        let nic = json!({"addresses": ["192.0.2.7/32", "2001:db8::7/128"], "mtu": 1400,
            "routes": [{"to": "0.0.0.0/0", "via": "169.254.77.1", "on-link": true}, {"to": "::/0", "via": "fe80::1"}]});
        let text = batch("eth0", &nic).unwrap();
        assert!(text.contains("link set dev eth0 mtu 1400 up\n"));
        assert!(text.contains("address replace 192.0.2.7/32 dev eth0\n"));
        assert!(text.contains("address replace 2001:db8::7/128 dev eth0 nodad\n"));
        assert!(text.contains("\nroute replace ::/0 via fe80::1 dev eth0 onlink\n"));
        for bad in ["192.0.2.7", "192.0.2.7/32 dev lo", "x/1", "192.0.2.7/32\nlink set lo down"] {
            assert!(batch("eth0", &json!({"addresses": [bad]})).is_err(), "{bad:?}");
        }
        assert!(batch("eth0", &json!({"routes": [{"via": "gateway"}]})).is_err());
    }
}
