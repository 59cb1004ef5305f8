//! The daemon's configuration: one TOML file, each key also a flag and a `TAPGATE_` variable.
//!
//! Owns reading, merging (flag, then variable, then file, then default) and checking. Unknown keys are errors; every
//! message names the key and says what to write instead. Nothing is started here.

use crate::{
    agent::Harnesses,
    capacity::Share,
    http::{Quotas, SignUp},
    mail::Via,
    retention::Retention,
    storage::Place,
};
mod print;
mod settings;

pub use print::run as print;
pub use settings::{AccelChoice, CgroupLimits, DriverKind, OverHttp, Settings};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
};
use tapgate_ebpf_common::maps::MAX_VMS;
use tapgate_model::{Cidr, HostName, policy::SecretsOverHttp};
use tapgate_proxy::{BadResolver, Limits, Resolver};
use tapgate_vmm::{IoLimits, cgroup::Demand};

/// The checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where all state lives.
    pub data_dir: PathBuf,
    /// The API's address.
    pub listen: SocketAddr,
    /// The API's certificate and its key.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Where people reach the API.
    pub public_url: String,
    /// Who may make an account.
    pub sign_up: SignUp,
    /// How mails leave.
    pub mail: Via,
    /// The address that mails come from.
    pub mail_from: String,
    /// How much of the audit log is kept.
    pub retention: Retention,
    /// How many of each an account may have.
    pub quotas: Quotas,
    /// What runs the guests.
    pub driver: DriverKind,
    /// The VMM's program, where it is not in its usual place.
    pub vmm_program: Option<PathBuf>,
    /// What executes guest code.
    pub accel: AccelChoice,
    /// What SSH clients connect to.
    pub public_host: String,
    /// The interface that forwarded traffic may leave by, if one is set.
    pub uplink: Option<String>,
    /// IPv4 addresses for guests.
    pub guest_v4: Cidr,
    /// IPv6 addresses for guests; `None` turns IPv6 off.
    pub guest_v6: Option<Cidr>,
    /// Whether they are routed to this host, and so are not translated.
    pub guest_v6_routed: bool,
    /// Name servers; empty means the system's.
    pub resolvers: Vec<Resolver>,
    /// What each VM may do through the proxy.
    pub vm_limits: Limits,
    /// Host ports for SSH.
    pub ssh_ports: RangeInclusive<u16>,
    /// Names the namespace, the pins and the tables.
    pub instance: String,
    /// The base image's name.
    pub image: String,
    /// Where base images are.
    pub image_dir: PathBuf,
    /// Default virtual CPUs.
    pub vcpus: u32,
    /// Default memory in MiB.
    pub memory_mib: u32,
    /// Default disk size in GiB.
    pub disk_gib: u32,
    /// What each VM may do with the host's disks.
    pub disk_io: IoLimits,
    /// Which limits a VM does not start without.
    pub cgroup_limits: Demand,
    /// Secrets in clear text.
    pub secrets_over_http: SecretsOverHttp,
    /// Where agents' repositories are that are given as owner/repo.
    pub git_host: HostName,
    /// What runs agents' prompts.
    pub harnesses: Harnesses,
    /// How much of the host VMs may have.
    pub share: Share,
    /// Where snapshots are stored.
    pub snapshot_store: Place,
    /// Log filter.
    pub log: String,
}

/// What is wrong with the configuration, and what to write instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}; check the path given to --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key, or a value of the wrong type.
    #[error("{path} is not a valid configuration: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says, with the line.
        message: String,
    },
    /// A value does not make sense.
    #[error("configuration key `{key}`: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong and what to write instead.
        message: String,
    },
}

fn value(key: &'static str, message: impl Into<String>) -> ConfigError {
    ConfigError::Value { key, message: message.into() }
}

impl Settings {
    /// Checks every key and fills in the defaults.
    pub fn check(self) -> Result<Config, ConfigError> {
        let data_dir = self.data_dir.unwrap_or_else(|| "/var/lib/tapgate".into());
        if !data_dir.is_absolute() {
            return Err(value("data_dir", "must be an absolute path"));
        }
        let listen = self.listen.unwrap_or_else(|| "127.0.0.1:7070".into());
        let listen: SocketAddr = listen.parse().map_err(|_| {
            value("listen", format!("`{listen}` is not an address and port such as 127.0.0.1:7070"))
        })?;
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => return Err(value("tls_cert", "must be set together with tls_key")),
        };
        let public_url = match self.public_url {
            None => format!("{}://{listen}", if tls.is_some() { "https" } else { "http" }),
            Some(text) if text.starts_with("http://") || text.starts_with("https://") => {
                text.trim_end_matches('/').to_owned()
            }
            Some(text) => {
                return Err(value(
                    "public_url",
                    format!("`{text}` is not a URL such as https://tapgate.example.com"),
                ));
            }
        };
        let retention = Retention {
            days: self.audit_days.unwrap_or(Retention::default().days),
            events: self.audit_events.unwrap_or(Retention::default().events),
            mib: self.audit_mib.unwrap_or(Retention::default().mib),
        };
        if retention.days == 0 || retention.events == 0 || retention.mib == 0 {
            return Err(value("audit_days", "audit_events and audit_mib must be at least 1"));
        }
        if self.vmm_program.as_deref().is_some_and(|path| !path.is_absolute()) {
            return Err(value("vmm_program", "must be an absolute path"));
        }
        if tls.is_none() && !listen.ip().is_loopback() && self.listen_without_tls != Some(true) {
            return Err(value(
                "listen",
                format!(
                    "{} is not loopback and API keys would cross the network in clear text; set tls_cert and tls_key, listen on 127.0.0.1 behind a TLS proxy, or set listen_without_tls = true",
                    listen.ip()
                ),
            ));
        }
        let guest_v4 = self.guest_v4.unwrap_or_else(|| "10.214.0.0/16".into());
        let guest_v4: Ipv4Net = guest_v4
            .parse()
            .map_err(|_| value("guest_v4", format!("`{guest_v4}` is not a range such as 10.214.0.0/16")))?;
        if !(8..=29).contains(&guest_v4.prefix_len()) || !guest_v4.network().is_private() {
            return Err(value("guest_v4", "must be a private range (RFC 1918) from /8 to /29"));
        }
        let guest_v6 = match self.guest_v6.as_deref().unwrap_or("fd74:6761:7465::/64") {
            "off" => None,
            text => {
                let net: Ipv6Net = text.parse().map_err(|_| {
                    value(
                        "guest_v6",
                        format!("`{text}` is neither a range such as fd74:6761:7465::/64 nor `off`"),
                    )
                })?;
                if net.prefix_len() > 112 {
                    return Err(value("guest_v6", "must be a /112 or larger"));
                }
                Some(net.trunc())
            }
        };
        let resolvers = self.resolvers.unwrap_or_default();
        let resolvers = resolvers
            .iter()
            .map(|text| text.parse().map_err(|error: BadResolver| value("resolvers", error.to_string())))
            .collect::<Result<Vec<Resolver>, _>>()?;
        let ssh_ports = port_range(self.ssh_ports.as_deref().unwrap_or("22000-22999"))?;
        let instance = match self.instance {
            Some(name) => name,
            None => default_instance(&data_dir),
        };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if instance.is_empty() || instance.len() > 8 || !instance.chars().all(plain) {
            return Err(value("instance", "must be 1 to 8 lower-case letters and digits"));
        }
        let public_host = self.public_host.unwrap_or_else(|| "127.0.0.1".into());
        if public_host.parse::<std::net::IpAddr>().is_err()
            && tapgate_model::HostName::parse(&public_host).is_err()
        {
            return Err(value(
                "public_host",
                format!("`{public_host}` is neither an address nor a host name"),
            ));
        }
        let image = self.image.unwrap_or_else(|| "debian-12".into());
        if image.is_empty() || !image.chars().all(|c| plain(c) || "-._".contains(c)) || image.starts_with('.')
        {
            return Err(value("image", "must be a plain name such as debian-12"));
        }
        let bounded = |key, number: Option<u32>, default, range: RangeInclusive<u32>| {
            let number = number.unwrap_or(default);
            if range.contains(&number) {
                Ok(number)
            } else {
                Err(value(key, format!("{number} is not in {}..={}", range.start(), range.end())))
            }
        };
        let most = Quotas::default();
        let quotas = Quotas {
            vms: self.quota_vms.unwrap_or(most.vms),
            rules: self.quota_rules.unwrap_or(most.rules),
            secrets: self.quota_secrets.unwrap_or(most.secrets),
            secret_octets: most.secret_octets,
            snapshots: self.quota_snapshots.unwrap_or(most.snapshots),
            env: self.quota_env.unwrap_or(most.env),
            keys: self.quota_keys.unwrap_or(most.keys),
        };
        let factor = |key, number: Option<f64>, default: f64| match number.unwrap_or(default) {
            number if number.is_finite() && (0.1..=1000.0).contains(&number) => Ok(number),
            number => Err(value(key, format!("{number} is not in 0.1..=1000"))),
        };
        let usual = Limits::default();
        let connections = u32::try_from(usual.connections).unwrap_or(u32::MAX);
        let vm_limits = Limits {
            connections: bounded("vm_connections", self.vm_connections, connections, 1..=65_536)? as usize,
            new_per_second: bounded(
                "vm_new_connections",
                self.vm_new_connections,
                usual.new_per_second,
                1..=1_000_000,
            )?,
            octets_per_second: match self.vm_bytes_per_second {
                Some(0) => {
                    return Err(value(
                        "vm_bytes_per_second",
                        "must be at least 1; leave it out for no bound",
                    ));
                }
                rate => rate,
            },
            ..usual
        };
        let io = IoLimits::default();
        let share = Share {
            memory_reserve_mib: self.memory_reserve_mib.unwrap_or(512),
            memory_overcommit: factor("memory_overcommit", self.memory_overcommit, 1.0)?,
            disk_reserve: self.disk_reserve_gib.unwrap_or(2).saturating_mul(1 << 30),
            disk_overcommit: factor("disk_overcommit", self.disk_overcommit, 10.0)?,
        };
        Ok(Config {
            quotas,
            share,
            listen,
            tls,
            public_url,
            sign_up: self.sign_up.unwrap_or_default(),
            mail: self.smtp_url.map_or_else(|| Via::Spool(data_dir.join("mail")), Via::Smtp),
            mail_from: self.mail_from.unwrap_or_else(|| "tapgate@localhost.localdomain".into()),
            retention,
            driver: self.driver.unwrap_or_default(),
            vmm_program: self.vmm_program,
            accel: self.accel.unwrap_or_default(),
            public_host,
            uplink: self.uplink,
            guest_v4: Cidr::from(IpNet::V4(guest_v4)),
            guest_v6: guest_v6.map(|net| Cidr::from(IpNet::V6(net))),
            guest_v6_routed: self.guest_v6_routed.unwrap_or(false),
            resolvers,
            vm_limits,
            ssh_ports,
            instance,
            image,
            image_dir: self.image_dir.unwrap_or_else(|| crate::images::FOLDER.into()),
            vcpus: bounded("vcpus", self.vcpus, 1, 1..=64)?,
            memory_mib: bounded("memory_mib", self.memory_mib, 512, 128..=262_144)?,
            disk_gib: bounded("disk_gib", self.disk_gib, 8, 1..=4096)?,
            cgroup_limits: match self.cgroup_limits.unwrap_or_default() {
                CgroupLimits::Required => Demand::Required,
                CgroupLimits::Offered => Demand::Offered,
                CgroupLimits::BestEffort => Demand::BestEffort,
            },
            disk_io: IoLimits {
                mib_per_second: bounded(
                    "disk_mib_per_second",
                    self.disk_mib_per_second,
                    io.mib_per_second,
                    0..=1 << 20,
                )?,
                // Fewer than one hundred and a guest's system does not boot in the time that it is given.
                operations_per_second: match self
                    .disk_operations_per_second
                    .unwrap_or(io.operations_per_second)
                {
                    number @ (0 | 100..) => number,
                    number => {
                        return Err(value(
                            "disk_operations_per_second",
                            format!("{number} is neither 0 nor at least 100"),
                        ));
                    }
                },
            },
            secrets_over_http: match self.secrets_over_http {
                Some(OverHttp::Always) => SecretsOverHttp::Always,
                Some(OverHttp::Explicit) | None => SecretsOverHttp::Explicit,
                Some(OverHttp::Never) => SecretsOverHttp::Never,
            },
            snapshot_store: Place::parse(
                self.snapshot_store.as_deref(),
                data_dir.clone(),
                self.s3_endpoint,
                self.s3_region,
                self.s3_credentials.as_deref(),
            )
            .map_err(|error| value(error.key, error.message))?,
            git_host: HostName::parse(self.git_host.as_deref().unwrap_or("github.com"))
                .map_err(|error| value("git_host", error.to_string()))?,
            harnesses: Harnesses::with(self.harness.unwrap_or_default())
                .map_err(|error| value("harness", error.to_string()))?,
            log: self.log.unwrap_or_else(|| "info".into()),
            data_dir,
        })
    }
}

impl Config {
    /// The base that guests' IPv4 addresses count from.
    pub fn v4_base(&self) -> Ipv4Addr {
        match self.guest_v4.network() {
            IpAddr::V4(base) => base,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        }
    }

    /// The base that guests' IPv6 addresses count from.
    pub fn v6_base(&self) -> Option<Ipv6Addr> {
        match self.guest_v6?.network() {
            IpAddr::V6(base) => Some(base),
            IpAddr::V4(_) => None,
        }
    }

    /// How many VMs the address and port ranges hold, and the kernel's tables.
    pub fn slots(&self) -> u32 {
        let addresses = (1u64 << (32 - u32::from(self.guest_v4.prefix_len()))) - 2;
        let ports = self.ssh_ports.clone().count() as u64;
        u32::try_from(addresses.min(ports)).map_or(MAX_VMS, |slots| slots.min(MAX_VMS))
    }
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, ConfigError> {
    let error =
        || value("ssh_ports", format!("`{text}` is not a range of ports above 1023 such as 22000-22999"));
    let (first, last) = text.split_once('-').ok_or_else(error)?;
    let (first, last) =
        (first.trim().parse().map_err(|_| error())?, last.trim().parse().map_err(|_| error())?);
    if first < 1024 || last < first {
        return Err(error());
    }
    Ok(first..=last)
}

/// `main` for the default directory, else eight hexadecimal digits of its path's hash.
fn default_instance(data_dir: &Path) -> String {
    use sha2::{Digest as _, Sha256};
    use std::os::unix::ffi::OsStrExt as _;
    if data_dir == Path::new("/var/lib/tapgate") {
        return "main".into();
    }
    let hash = Sha256::digest(data_dir.as_os_str().as_bytes());
    hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let settings: Settings = toml::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let config = parse("").unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:7070");
        assert_eq!(config.instance, "main");
        assert_eq!(config.driver, DriverKind::Qemu);
        assert_eq!(config.slots(), 1000);
        assert_eq!(parse("quota_vms = 3").unwrap().quotas.vms, 3);
    }

    #[test]
    fn no_range_gives_out_more_places_than_the_kernels_tables_have() {
        let config = parse("ssh_ports = '1024-65535'\nguest_v4 = '10.0.0.0/8'").unwrap();
        assert_eq!(config.slots(), MAX_VMS);
    }

    #[test]
    fn unknown_keys_are_named() {
        assert!(parse("lisen = '127.0.0.1:1'").unwrap_err().contains("lisen"));
    }

    #[test]
    fn bad_values_say_which_key_and_what_to_write() {
        for (text, key) in [
            ("listen = 'localhost'", "listen"),
            ("listen = '0.0.0.0:7070'", "listen"),
            ("guest_v4 = '192.0.2.0/24'", "guest_v4"),
            ("guest_v4 = '10.0.0.0/30'", "guest_v4"),
            ("guest_v6 = 'yes'", "guest_v6"),
            ("ssh_ports = '22'", "ssh_ports"),
            ("ssh_ports = '80-90'", "ssh_ports"),
            ("instance = 'Has-Dash'", "instance"),
            ("data_dir = 'relative'", "data_dir"),
            ("image = '../x'", "image"),
            ("public_host = 'a b'", "public_host"),
            ("memory_mib = 1", "memory_mib"),
            ("vmm_program = 'qemu'", "vmm_program"),
            ("vm_connections = 0", "vm_connections"),
            ("vm_new_connections = 0", "vm_new_connections"),
            ("vm_bytes_per_second = 0", "vm_bytes_per_second"),
            ("resolvers = ['dns']", "resolvers"),
            ("resolvers = ['tls://192.0.2.53']", "resolvers"),
            ("memory_overcommit = 0.0", "memory_overcommit"),
            ("snapshot_store = 'relative'", "snapshot_store"),
            ("git_host = 'https://github.com'", "git_host"),
            ("harness.x.argv = ['run']", "harness"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("`{key}`")), "{text}: {error}");
        }
    }

    #[test]
    fn flags_stand_before_the_file() {
        let flags = Settings { vcpus: Some(2), ..Settings::default() };
        let file = Settings { vcpus: Some(4), memory_mib: Some(1024), ..Settings::default() };
        let config = flags.or(file).check().unwrap();
        assert_eq!((config.vcpus, config.memory_mib), (2, 1024));
    }

    #[test]
    fn two_data_directories_are_two_instances() {
        assert_ne!(default_instance(Path::new("/a")), default_instance(Path::new("/b")));
    }
}
