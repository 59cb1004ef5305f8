//! What every request needs: the store, the engine, and the settings.

use super::health::Health;
use super::limits::{Limits, Rates};
use super::metrics::{Metrics, Token};
use crate::agent::Harnesses;
use crate::capacity::Room;
use crate::engine::Handle;
use crate::mail::{Mailer, Via};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tapgate_model::VmId;
use tapgate_store::{CaPem, Resources, SecretQuota, Store};

/// Makes a VM's certificate authority.
pub type CaMaker = Arc<dyn Fn(&VmId) -> anyhow::Result<CaPem> + Send + Sync>;

/// Who may make an account.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum SignUp {
    /// Nobody but the operator, by `tapgate admin user create`.
    Closed,
    /// Who shows what `tapgate admin invite` printed.
    Invitation,
    /// Everybody who reaches the API.
    #[default]
    Open,
}

/// What a VM may ask for, unless the settings say less.
pub const MAX_RESOURCES: Resources = Resources { vcpus: 16, memory_mib: 64 * 1024, disk_bytes: 512 << 30 };

/// Octets of an account's secrets together: the proxy looks for all of them, in several spellings, in every answer.
const MAX_SECRET_OCTETS: u32 = 256 * 1024;

/// How many of each an account may have.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    /// VMs that are not destroyed.
    pub vms: u32,
    /// Egress rules, of the account and its VMs together.
    pub rules: u32,
    /// Secrets.
    pub secrets: u32,
    /// Octets of the secrets' values together.
    pub secret_octets: u32,
    /// Snapshots.
    pub snapshots: u32,
    /// Environment variables.
    pub env: u32,
    /// API keys that are not revoked.
    pub keys: u32,
}

impl Quotas {
    /// What an account may have of secrets.
    pub(crate) const fn of_secrets(&self) -> SecretQuota {
        SecretQuota { count: self.secrets, octets: self.secret_octets }
    }
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            vms: 100,
            rules: 10_000,
            secrets: 500,
            secret_octets: MAX_SECRET_OCTETS,
            snapshots: 500,
            env: 500,
            keys: 1000,
        }
    }
}

/// What the operator decides about the API.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where VMs' SSH ports are reached.
    pub public_host: String,
    /// Where people reach the API, for links; without a trailing slash.
    pub public_url: String,
    /// The host's ports for SSH, one a VM.
    pub ssh_ports: RangeInclusive<u16>,
    /// Whether nobody listens on a port of the host, at the address where SSH ports are opened.
    pub is_free: fn(&str, u16) -> bool,
    /// How many guest addresses there are.
    pub slots: u32,
    /// What a VM is given unless it asks otherwise.
    pub resources: Resources,
    /// What a VM may ask for.
    pub max_resources: Resources,
    /// The name of the base image, which snapshots mention.
    pub base_image: String,
    /// How many of each an account may have.
    pub quotas: Quotas,
    /// Who may make an account.
    pub sign_up: SignUp,
    /// How mails leave.
    pub mail: Via,
    /// The address that mails come from.
    pub mail_from: String,
    /// How often who may ask.
    pub rates: Rates,
    /// How long `start` waits for the VM.
    pub start_wait: Duration,
    /// What `/metrics` asks for; without one nobody may read it.
    pub metrics_token: Option<Token>,
    /// How long one answer follows the audit log; then the client comes back and goes on where it was.
    pub follow_for: Duration,
    /// Where agents' repositories are that are given as owner/repo.
    pub git_host: String,
    /// How much of the host VMs may have.
    pub room: Room,
    /// Whether the driver can keep a guest's memory.
    pub keeps_memory: bool,
    /// What runs agents' prompts.
    pub harnesses: Harnesses,
    /// The folder of VMs' folders, for their agents' logs.
    pub vms: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            public_host: "127.0.0.1".into(),
            public_url: "http://127.0.0.1:7070".into(),
            ssh_ports: 2200..=9999,
            is_free: |_, _| true,
            slots: 4096,
            resources: Resources { vcpus: 1, memory_mib: 1024, disk_bytes: 8 << 30 },
            max_resources: MAX_RESOURCES,
            base_image: "debian-12".into(),
            quotas: Quotas::default(),
            sign_up: SignUp::Open,
            mail: Via::Nowhere,
            mail_from: "tapgate@localhost.localdomain".into(),
            rates: Rates::default(),
            start_wait: Duration::from_secs(30),
            metrics_token: None,
            follow_for: Duration::from_secs(3600),
            git_host: "github.com".into(),
            room: Room::default(),
            keeps_memory: true,
            harnesses: Harnesses::default(),
            vms: "/var/lib/tapgate/vms".into(),
        }
    }
}

struct Inner {
    store: Store,
    engine: Handle,
    ca: CaMaker,
    settings: Settings,
    limits: Limits,
    mailer: Mailer,
    metrics: Metrics,
    health: Health,
}

/// Shared by every request.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

impl AppState {
    /// Puts the parts together.
    ///
    /// # Errors
    /// The settings for mail make no sense.
    pub fn try_new(
        store: Store,
        engine: Handle,
        ca: CaMaker,
        settings: Settings,
    ) -> Result<Self, crate::mail::MailError> {
        let limits = Limits::new(settings.rates);
        let mailer = Mailer::new(&settings.mail_from, settings.mail.clone())?;
        let (metrics, health) = (Metrics::new(), Health::default());
        Ok(Self(Arc::new(Inner { store, engine, ca, settings, limits, mailer, metrics, health })))
    }

    /// What was counted while requests were served.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// What is known of the store's health.
    pub(crate) fn health(&self) -> &Health {
        &self.0.health
    }

    /// The way for mails.
    pub(crate) fn mailer(&self) -> &Mailer {
        &self.0.mailer
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// The engine.
    pub fn engine(&self) -> &Handle {
        &self.0.engine
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Who asked how often.
    pub(crate) fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Makes a VM's certificate authority.
    pub fn make_ca(&self, vm: &VmId) -> anyhow::Result<CaPem> {
        (self.0.ca)(vm)
    }
}
