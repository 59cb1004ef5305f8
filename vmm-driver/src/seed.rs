//! The NoCloud seed: what a guest is told at boot, as a small vfat disk labelled `CIDATA`.
//!
//! The same three files serve cloud-init on stock images and the agent of our own: JSON, which is YAML too. The same
//! seed makes the same bytes. Holds placeholders, never a secret's value.

use crate::quote::{self, EnvError};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use tapgate_ebpf_common::net::{GATEWAY_V4, GATEWAY_V6};
use tapgate_model::GuestNet;

/// Where Debian's and Ubuntu's programs look for trusted certificates.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
/// The VM's own CA alone.
const OWN_CA: &str = "/usr/local/share/ca-certificates/tapgate.crt";
/// What a guest's link takes.
const MTU: u32 = 1500;
const SMALLEST_DISK: u64 = 1 << 20;
const LARGEST_DISK: u64 = 16 << 20;
/// Of the disk, written where it holds anything.
const BLOCK: usize = 4096;
/// Octets of all variables together, whoever let them through: the text of a seed is several times as long.
const MOST_ENV: usize = 1 << 20;
const VOLUME_ID: u32 = 0x7467_0001;

/// Variables by which programs with trust stores of their own are told of the system's. The user's own values win.
const TRUST: [(&str, &str); 12] = [
    ("AWS_CA_BUNDLE", BUNDLE),
    ("CARGO_HTTP_CAINFO", BUNDLE),
    ("CURL_CA_BUNDLE", BUNDLE),
    ("DENO_CERT", OWN_CA),
    ("GIT_SSL_CAINFO", BUNDLE),
    ("NODE_EXTRA_CA_CERTS", OWN_CA),
    ("PIP_CERT", BUNDLE),
    ("REQUESTS_CA_BUNDLE", BUNDLE),
    ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", BUNDLE),
    ("SSL_CERT_DIR", "/etc/ssl/certs"),
    ("SSL_CERT_FILE", BUNDLE),
    ("UV_NATIVE_TLS", "true"),
];

/// Why a seed cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeedError {
    /// A variable that no guest can be given.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// A host name that is none.
    #[error("`{0}` is not a host name; use up to 63 letters, digits and `-`")]
    Hostname(String),
    /// A key that would be more than one line.
    #[error("an SSH public key must be one line")]
    SshKey,
    /// More than fits.
    #[error(
        "the seed has {0} octets; the variables together may have 1 MiB, and with keys, certificate and all quoting 8 MiB"
    )]
    TooLarge(usize),
    /// The disk could not be written.
    #[error("the seed disk cannot be written")]
    Io(#[from] io::Error),
}

/// What a guest is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Names the machine's identity; a new one makes the guest forget its host keys and machine id.
    pub instance_id: String,
    /// Its name.
    pub hostname: String,
    /// Public keys that may log in as root.
    pub ssh_keys: Vec<String>,
    /// Its place in the network.
    pub net: GuestNet,
    /// The VM's own CA.
    pub ca_pem: String,
    /// Variables and secrets' placeholders.
    pub env: Vec<(String, String)>,
}

impl Seed {
    /// `meta-data`.
    pub fn meta_data(&self) -> String {
        json!({"instance-id": self.instance_id, "local-hostname": self.hostname}).to_string()
    }

    /// `network-config`, version 2: static, the gateway on-link outside of the address's prefix.
    pub fn network_config(&self) -> String {
        let gateway = Ipv4Addr::from(GATEWAY_V4);
        let mac = self.net.mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut addresses = vec![format!("{}/32", self.net.v4)];
        let mut routes = vec![json!({"to": "0.0.0.0/0", "via": gateway, "on-link": true})];
        if let Some(v6) = self.net.v6 {
            addresses.push(format!("{v6}/128"));
            routes.push(json!({"to": "::/0", "via": Ipv6Addr::from(GATEWAY_V6), "on-link": true}));
        }
        json!({"version": 2, "ethernets": {"eth0": {
            "match": {"macaddress": mac},
            "set-name": "eth0",
            "dhcp4": false, "dhcp6": false, "accept-ra": false,
            "mtu": MTU,
            "addresses": addresses,
            "routes": routes,
            "nameservers": {"addresses": [gateway]},
        }}})
        .to_string()
    }

    /// `user-data`: cloud-config that does on a stock image what the agent does on ours. Also what the guest service
    /// hands to a running guest after a change.
    pub fn user_data(&self) -> Result<String, SeedError> {
        self.check()?;
        let env = self.environment();
        let file = |path: &str, mode: &str, content: String| json!({"path": path, "permissions": mode, "owner": "root:root", "content": content});
        let mut config = json!({
            "hostname": self.hostname,
            "preserve_hostname": false,
            "disable_root": false,
            // The image's own stays: cloud-init would make another, which takes longer than the boot, or fail at it.
            "locale": "false",
            "ssh_pwauth": false,
            "ssh_authorized_keys": self.ssh_keys,
            "write_files": [
                file("/etc/profile.d/tapgate.sh", "0644", quote::profile(&env)),
                file("/root/.ssh/environment", "0600", quote::ssh_environment(&env)),
                file(quote::SESSION, "0644", quote::session(&env)),
                file("/etc/systemd/system.conf.d/50-tapgate.conf", "0644", quote::systemd(&env)),
                file("/etc/ssh/sshd_config.d/10-tapgate.conf", "0644", "PermitUserEnvironment yes\n".into()),
            ],
            // systemd read its settings before cloud-init wrote them.
            "runcmd": [["systemctl", "daemon-reload"]],
        });
        if !self.ca_pem.is_empty() {
            config["ca_certs"] = json!({"trusted": [self.ca_pem]});
            // cloud-init names its copy otherwise; the variables mean this one.
            if let Some(files) = config["write_files"].as_array_mut() {
                files.push(file(OWN_CA, "0644", self.ca_pem.clone()));
            }
        }
        Ok(format!("#cloud-config\n{}", Value::to_string(&config)))
    }

    /// The trust variables and then the VM's own, a later one of the same name in an earlier one's stead.
    pub fn environment(&self) -> Vec<(String, String)> {
        self.environment_with(BUNDLE, OWN_CA)
    }

    /// The same, for a place where the trusted certificates lie elsewhere.
    pub(crate) fn environment_with(&self, bundle: &str, own_ca: &str) -> Vec<(String, String)> {
        let place = |value: &str| match value {
            BUNDLE => bundle.to_owned(),
            OWN_CA => own_ca.to_owned(),
            other => other.to_owned(),
        };
        let trust =
            TRUST.iter().filter(|_| !self.ca_pem.is_empty()).map(|(n, v)| ((*n).to_owned(), place(v)));
        let mut all: Vec<(String, String)> = Vec::new();
        for (name, value) in trust.chain(self.env.iter().cloned()) {
            match all.iter_mut().find(|(known, _)| *known == name) {
                Some(entry) => entry.1 = value,
                None => all.push((name, value)),
            }
        }
        all
    }

    /// Writes the disk to a new file, readable by its owner alone.
    pub fn write(&self, path: &Path) -> Result<(), SeedError> {
        let _ = std::fs::remove_file(path);
        let disk = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        self.write_to(disk)
    }

    fn write_to(&self, disk: File) -> Result<(), SeedError> {
        let files = [
            ("meta-data", self.meta_data()),
            ("user-data", self.user_data()?),
            ("network-config", self.network_config()),
        ];
        let content: usize = files.iter().map(|(_, text)| text.len()).sum();
        let size = (content as u64 * 2 + SMALLEST_DISK).next_power_of_two();
        if size > LARGEST_DISK {
            return Err(SeedError::TooLarge(content));
        }
        // In memory first: the library writes a few octets at a time.
        let mut whole = io::Cursor::new(vec![0; usize::try_from(size).unwrap_or(usize::MAX)]);
        let options = fatfs::FormatVolumeOptions::new().volume_id(VOLUME_ID).volume_label(*b"CIDATA     ");
        fatfs::format_volume(&mut whole, options)?;
        {
            let fs = fatfs::FileSystem::new(&mut whole, fatfs::FsOptions::new())?;
            for (name, text) in &files {
                let root = fs.root_dir();
                let mut file = root.create_file(name)?;
                file.write_all(text.as_bytes())?;
                file.flush()?;
            }
        }
        // Not waited for until it is on the medium: it is made anew at each start.
        disk.set_len(size)?;
        for (number, block) in whole.get_ref().chunks(BLOCK).enumerate() {
            if block.iter().any(|octet| *octet != 0) {
                disk.write_all_at(block, (number * BLOCK) as u64)?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), SeedError> {
        let name = &self.hostname;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        if !(1..=63).contains(&name.len())
            || !name.bytes().all(plain)
            || name.starts_with('-')
            || name.ends_with('-')
        {
            return Err(SeedError::Hostname(name.chars().filter(|c| !c.is_control()).take(64).collect()));
        }
        if self.ssh_keys.iter().any(|key| key.contains(['\n', '\r', '\0'])) {
            return Err(SeedError::SshKey);
        }
        let variables: usize = self.env.iter().map(|(name, value)| name.len() + value.len()).sum();
        if variables > MOST_ENV {
            return Err(SeedError::TooLarge(variables));
        }
        for (name, value) in &self.env {
            quote::check(name, value)?;
        }
        Ok(())
    }
}

/// Reads one file of a seed disk that this crate wrote. Never used on a disk that a guest could write.
pub fn read_back(disk: &Path, name: &str) -> io::Result<String> {
    let mut file = File::open(disk)?;
    file.seek(SeekFrom::Start(0))?;
    let fs = fatfs::FileSystem::new(ReadOnly(file), fatfs::FsOptions::new())?;
    let mut text = String::new();
    fs.root_dir().open_file(name)?.read_to_string(&mut text)?;
    Ok(text)
}

/// fatfs marks a volume dirty and clean again; a reader has nothing to write.
struct ReadOnly(File);

impl io::Read for ReadOnly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl io::Seek for ReadOnly {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.0.seek(position)
    }
}

impl Write for ReadOnly {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn seed() -> Seed {
        Seed {
            instance_id: "vm_abc-1".into(),
            hostname: "vm-abc".into(),
            ssh_keys: vec!["ssh-ed25519 AAAA test".into()],
            net: GuestNet::new(6, Ipv4Addr::new(192, 0, 2, 0), Some("2001:db8::".parse().unwrap())),
            ca_pem: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into(),
            env: vec![("TOKEN".into(), "IRONSH_PROXY_token".into()), ("PIP_CERT".into(), "/mine".into())],
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        seed().write(&a).unwrap();
        seed().write(&b).unwrap();
        let bytes = std::fs::read(&a).unwrap();
        assert_eq!(bytes, std::fs::read(&b).unwrap());
        assert_eq!(&bytes[43..54], b"CIDATA     ", "the label where the agent and blkid look for it");
        assert_eq!(read_back(&a, "meta-data").unwrap(), seed().meta_data());
        assert_eq!(read_back(&a, "user-data").unwrap(), seed().user_data().unwrap());
    }

    #[test]
    fn blkid_and_fsck_take_it_for_a_seed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("seed");
        seed().write(&disk).unwrap();
        let output = Command::new("blkid").args(["-p", "-o", "export"]).arg(&disk).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("LABEL=CIDATA") && text.contains("TYPE=vfat"), "{text}");
        if let Ok(output) = Command::new("fsck.vfat").arg("-n").arg(&disk).output() {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
    }

    #[test]
    fn user_data_is_one_comment_and_json() {
        let text = seed().user_data().unwrap();
        let value: Value = serde_json::from_str(text.strip_prefix("#cloud-config\n").unwrap()).unwrap();
        assert_eq!(value["ssh_authorized_keys"][0], "ssh-ed25519 AAAA test");
        let profile = value["write_files"][0]["content"].as_str().unwrap();
        assert!(profile.contains("export TOKEN='IRONSH_PROXY_token'\n"));
        assert!(profile.contains("export PIP_CERT='/mine'\n"), "the user's own value wins");
        assert!(profile.contains("export SSL_CERT_FILE='/etc/ssl/certs/ca-certificates.crt'\n"));
    }

    #[test]
    fn the_network_is_static_with_the_gateway_on_link() {
        let value: Value = serde_json::from_str(&seed().network_config()).unwrap();
        let nic = &value["ethernets"]["eth0"];
        assert_eq!(nic["match"]["macaddress"], "06:74:00:00:00:06");
        assert_eq!(nic["addresses"], json!(["192.0.2.7/32", "2001:db8::7/128"]));
        assert_eq!(nic["routes"][0]["via"], "169.254.77.1");
        assert_eq!(nic["routes"][1]["via"], "fe80::1");
    }

    #[test]
    fn what_would_break_out_is_refused() {
        let broken = [
            Seed { hostname: "a b".into(), ..seed() },
            Seed { hostname: "-a".into(), ..seed() },
            Seed { hostname: String::new(), ..seed() },
            Seed { ssh_keys: vec!["a\nb".into()], ..seed() },
            Seed { env: vec![("A\nB".into(), "x".into())], ..seed() },
            Seed { env: vec![("A".into(), "x\0y".into())], ..seed() },
        ];
        for seed in broken {
            assert!(seed.user_data().is_err(), "{seed:?}");
        }
        let huge = (0..200).map(|i| (format!("V{i}"), "x".repeat(90_000))).collect();
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Seed { env: huge, ..seed() }.write(&dir.path().join("s")),
            Err(SeedError::TooLarge(_))
        ));
    }
}
