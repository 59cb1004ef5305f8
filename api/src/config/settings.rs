//! The keys as written: one list for the file, the flags and the variables. Owns reading and merging; judges nothing.

use super::ConfigError;
use crate::agent::Harness;
use crate::http::SignUp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which program runs the guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DriverKind {
    /// Cloud Hypervisor, with KVM.
    CloudHypervisor,
    /// Firecracker, with KVM.
    Firecracker,
    /// A network namespace instead of a VM: for tests and trying it out. Isolates nothing but the network.
    Netns,
    /// QEMU's microvm machine, with KVM or TCG.
    #[default]
    Qemu,
}

/// What executes guest code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AccelChoice {
    /// KVM where a probe shows that it runs guests, else TCG.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Emulation.
    Tcg,
}

/// When a VM may start without a limit of its CPU, memory or processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CgroupLimits {
    /// Never.
    Required,
    /// Where the host's control groups do not offer it.
    #[default]
    Offered,
    /// Always.
    BestEffort,
}

/// When secrets may go out in clear-text HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OverHttp {
    /// Wherever the secret's hosts match.
    Always,
    /// Only to hosts that the secret names, not through `*`.
    Explicit,
    /// Never.
    Never,
}

/// The keys as written, before they are checked. One list for the file, the flags and the variables.
#[derive(Clone, Debug, Default, Deserialize, Serialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where all state lives [default: /var/lib/tapgate]
    #[arg(long, env = "TAPGATE_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address of the REST API [default: 127.0.0.1:7070]
    #[arg(long, env = "TAPGATE_LISTEN", value_name = "IP:PORT")]
    pub listen: Option<String>,
    /// Listen on an address that is not loopback without TLS (a proxy in front has to add it)
    #[arg(long, env = "TAPGATE_LISTEN_WITHOUT_TLS", num_args = 0..=1, default_missing_value = "true")]
    pub listen_without_tls: Option<bool>,
    /// Certificate chain of the REST API, in PEM; read again when it changes. With `tls_key`
    #[arg(long, env = "TAPGATE_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its key, in PEM
    #[arg(long, env = "TAPGATE_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Where people reach the REST API, for links [default: from `listen`]
    #[arg(long, env = "TAPGATE_PUBLIC_URL", value_name = "URL")]
    pub public_url: Option<String>,
    /// Who may make an account [default: open]
    #[arg(long, env = "TAPGATE_SIGN_UP")]
    pub sign_up: Option<SignUp>,
    /// Mail server, like smtps://user:password@mail.example.com [default: mails are files in DATA_DIR/mail]
    #[arg(long, env = "TAPGATE_SMTP_URL", value_name = "URL", hide_env_values = true)]
    pub smtp_url: Option<String>,
    /// Address that mails come from [default: tapgate@localhost.localdomain]
    #[arg(long, env = "TAPGATE_MAIL_FROM", value_name = "ADDRESS")]
    pub mail_from: Option<String>,
    /// Days that audit events are kept [default: 90]
    #[arg(long, env = "TAPGATE_AUDIT_DAYS")]
    pub audit_days: Option<u32>,
    /// Audit events that are kept at most [default: 50000000]
    #[arg(long, env = "TAPGATE_AUDIT_EVENTS")]
    pub audit_events: Option<u64>,
    /// MiB that the audit log's file may take [default: 16384]
    #[arg(long, env = "TAPGATE_AUDIT_MIB")]
    pub audit_mib: Option<u64>,
    /// What runs the guests [default: qemu]
    #[arg(long, env = "TAPGATE_DRIVER")]
    pub driver: Option<DriverKind>,
    /// The VMM's program [default: /usr/bin/qemu-system-x86_64, /usr/local/bin/firecracker or /usr/local/bin/cloud-hypervisor]
    #[arg(long, env = "TAPGATE_VMM_PROGRAM", value_name = "FILE")]
    pub vmm_program: Option<PathBuf>,
    /// What executes guest code [default: auto]
    #[arg(long, env = "TAPGATE_ACCEL")]
    pub accel: Option<AccelChoice>,
    /// Name or address that clients reach this host by, for SSH [default: 127.0.0.1]
    #[arg(long, env = "TAPGATE_PUBLIC_HOST", value_name = "HOST")]
    pub public_host: Option<String>,
    /// Host interface that traffic allowed by cidr rules may leave by; any, as the host routes, if not set
    #[arg(long, env = "TAPGATE_UPLINK", value_name = "INTERFACE")]
    pub uplink: Option<String>,
    /// Addresses for guests [default: 10.214.0.0/16]
    #[arg(long, env = "TAPGATE_GUEST_V4", value_name = "CIDR")]
    pub guest_v4: Option<String>,
    /// Addresses for guests, or `off` [default: fd74:6761:7465::/64]
    #[arg(long, env = "TAPGATE_GUEST_V6", value_name = "CIDR")]
    pub guest_v6: Option<String>,
    /// Forwarded IPv6 traffic keeps the guest's own address instead of the host's: for a `guest_v6` that is routed to this host
    #[arg(long, env = "TAPGATE_GUEST_V6_ROUTED", num_args = 0..=1, default_missing_value = "true")]
    pub guest_v6_routed: Option<bool>,
    /// Name servers that guests' questions go to: 192.0.2.53, tls://192.0.2.53#NAME or https://192.0.2.53/PATH#NAME; the system's
    /// if not set
    #[arg(long, env = "TAPGATE_RESOLVERS", value_name = "SERVER", value_delimiter = ',')]
    pub resolvers: Option<Vec<String>>,
    /// Connections that one VM may have open through the proxy at one time [default: 2048]
    #[arg(long, env = "TAPGATE_VM_CONNECTIONS")]
    pub vm_connections: Option<u32>,
    /// New connections of one VM a second, sustained: through the proxy, and as many flows in the kernel [default: 1000]
    #[arg(long, env = "TAPGATE_VM_NEW_CONNECTIONS")]
    pub vm_new_connections: Option<u32>,
    /// Bytes that one VM may move through the proxy a second, both ways together; no bound if not set
    #[arg(long, env = "TAPGATE_VM_BYTES_PER_SECOND")]
    pub vm_bytes_per_second: Option<u64>,
    /// Host ports forwarded to guests' SSH [default: 22000-22999]
    #[arg(long, env = "TAPGATE_SSH_PORTS", value_name = "FIRST-LAST")]
    pub ssh_ports: Option<String>,
    /// Name of this daemon among several on the host: its namespace, pins and tables [default: from data_dir]
    #[arg(long, env = "TAPGATE_INSTANCE", value_name = "NAME")]
    pub instance: Option<String>,
    /// Base image [default: debian-12]
    #[arg(long, env = "TAPGATE_IMAGE", value_name = "NAME")]
    pub image: Option<String>,
    /// Where base images are kept [default: /var/cache/tapgate/images]
    #[arg(long, env = "TAPGATE_IMAGE_DIR", value_name = "DIR")]
    pub image_dir: Option<PathBuf>,
    /// Virtual CPUs of a VM [default: 1]
    #[arg(long, env = "TAPGATE_VCPUS")]
    pub vcpus: Option<u32>,
    /// Memory of a VM in MiB [default: 512]
    #[arg(long, env = "TAPGATE_MEMORY_MIB")]
    pub memory_mib: Option<u32>,
    /// Disk of a VM in GiB [default: 8]
    #[arg(long, env = "TAPGATE_DISK_GIB")]
    pub disk_gib: Option<u32>,
    /// What a VM may read from, and write to, a disk of the host, in MiB a second; 0 for no limit [default: 512]
    #[arg(long, env = "TAPGATE_DISK_MIB_PER_SECOND")]
    pub disk_mib_per_second: Option<u32>,
    /// How often a VM may read from, and write to, a disk of the host each second; 0 for no limit [default: 20000]
    #[arg(long, env = "TAPGATE_DISK_OPERATIONS_PER_SECOND")]
    pub disk_operations_per_second: Option<u32>,
    /// Which limits of CPU, memory and processes a VM does not start without: all, those that the host's control groups offer, none [default: offered]
    #[arg(long, env = "TAPGATE_CGROUP_LIMITS")]
    pub cgroup_limits: Option<CgroupLimits>,
    /// When secrets go out in clear-text HTTP [default: explicit]
    #[arg(long, env = "TAPGATE_SECRETS_OVER_HTTP")]
    pub secrets_over_http: Option<OverHttp>,
    /// VMs of an account that are not destroyed, at most [default: 100]
    #[arg(long, env = "TAPGATE_QUOTA_VMS")]
    pub quota_vms: Option<u32>,
    /// Egress rules of an account and its VMs together, at most [default: 10000]
    #[arg(long, env = "TAPGATE_QUOTA_RULES")]
    pub quota_rules: Option<u32>,
    /// Secrets of an account, at most [default: 500]
    #[arg(long, env = "TAPGATE_QUOTA_SECRETS")]
    pub quota_secrets: Option<u32>,
    /// Snapshots of an account, at most [default: 500]
    #[arg(long, env = "TAPGATE_QUOTA_SNAPSHOTS")]
    pub quota_snapshots: Option<u32>,
    /// Environment variables of an account, at most [default: 500]
    #[arg(long, env = "TAPGATE_QUOTA_ENV")]
    pub quota_env: Option<u32>,
    /// API keys of an account, at most [default: 1000]
    #[arg(long, env = "TAPGATE_QUOTA_KEYS")]
    pub quota_keys: Option<u32>,
    /// Memory that VMs may not have, in MiB [default: 512]
    #[arg(long, env = "TAPGATE_MEMORY_RESERVE_MIB")]
    pub memory_reserve_mib: Option<u64>,
    /// How often the rest is given to VMs [default: 1.0]
    #[arg(long, env = "TAPGATE_MEMORY_OVERCOMMIT", value_name = "FACTOR")]
    pub memory_overcommit: Option<f64>,
    /// Free disk below which no VM is made, in GiB [default: 2]
    #[arg(long, env = "TAPGATE_DISK_RESERVE_GIB")]
    pub disk_reserve_gib: Option<u64>,
    /// How often the disk is given to VMs, whose disks are sparse [default: 10.0]
    #[arg(long, env = "TAPGATE_DISK_OVERCOMMIT", value_name = "FACTOR")]
    pub disk_overcommit: Option<f64>,
    /// Where snapshots are stored: a folder, or s3://BUCKET/PREFIX [default: DATA_DIR]
    #[arg(long, env = "TAPGATE_SNAPSHOT_STORE", value_name = "PLACE")]
    pub snapshot_store: Option<String>,
    /// URL of an S3-compatible service, if it is not AWS
    #[arg(long, env = "TAPGATE_S3_ENDPOINT", value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket [default: auto]
    #[arg(long, env = "TAPGATE_S3_REGION", value_name = "REGION")]
    pub s3_region: Option<String>,
    /// TOML file, private to root, with access_key_id and secret_access_key [default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY]
    #[arg(long, env = "TAPGATE_S3_CREDENTIALS", value_name = "FILE")]
    pub s3_credentials: Option<PathBuf>,
    /// Host of agents' repositories that are given as owner/repo [default: github.com]
    #[arg(long, env = "TAPGATE_GIT_HOST", value_name = "HOST")]
    pub git_host: Option<String>,
    /// How agents' harnesses are started, by name. A table, so in the file alone.
    #[arg(skip)]
    pub harness: Option<BTreeMap<String, Harness>>,
    /// What to log, as in RUST_LOG [default: info]
    #[arg(long, env = "TAPGATE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
}

impl Settings {
    /// Reads the file's keys.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().replace('\n', "; "),
        })
    }

    /// These keys, and where one is not set the other's.
    pub fn or(self, other: Self) -> Self {
        macro_rules! merge { ($($key:ident),+) => { Self { $($key: self.$key.or(other.$key)),+ } } }
        merge!(
            quota_vms,
            quota_rules,
            quota_secrets,
            quota_snapshots,
            quota_env,
            quota_keys,
            data_dir,
            listen,
            listen_without_tls,
            tls_cert,
            tls_key,
            public_url,
            sign_up,
            smtp_url,
            mail_from,
            audit_days,
            audit_events,
            audit_mib,
            driver,
            vmm_program,
            accel,
            public_host,
            uplink,
            guest_v4,
            guest_v6,
            guest_v6_routed,
            resolvers,
            vm_connections,
            vm_new_connections,
            vm_bytes_per_second,
            ssh_ports,
            instance,
            image,
            image_dir,
            vcpus,
            memory_mib,
            disk_gib,
            disk_mib_per_second,
            disk_operations_per_second,
            cgroup_limits,
            secrets_over_http,
            memory_reserve_mib,
            memory_overcommit,
            disk_reserve_gib,
            disk_overcommit,
            snapshot_store,
            s3_endpoint,
            s3_region,
            s3_credentials,
            git_host,
            harness,
            log
        )
    }
}
