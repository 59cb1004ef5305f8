//! `tapgate serve`: opens the parts, joins them, serves, and ends in order.
//!
//! Guests outlive it: on SIGTERM the API and the proxy end, the VMs run on behind their gates, and the next daemon adopts
//! them. Must never start serving with a part missing, nor go on when one has ended.

use crate::{
    capacity::{Copying, Room},
    config::{self, AccelChoice, Config, DriverKind},
    engine::{self, Engine, Parts},
    guest_service,
    http::{AppState, Settings, metrics::Token, router, server, tls::Tls},
    images,
    parts::{RunningParts, never_fails},
    storage::{Place, Storage},
};
use anyhow::{Context as _, bail};
use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tapgate_datapath::{Datapath, DatapathConfig};
use tapgate_model::VmId;
use tapgate_proxy::{Listeners, PolicyTable, Proxy, ProxyConfig, VmCa};
use tapgate_store::{AuditLog, CaPem, Resources, SealKey, Store};
use tapgate_vmm::{
    ApiDriver, ApiKind, NetnsDriver, QemuDriver, Vmm,
    accel::{self, Accel},
    confine::uids,
    image::Image,
};
use tokio_util::sync::CancellationToken;

/// Where the programs and maps of this host's instances are, and what user ids they have.
const PINS: &str = "/sys/fs/bpf/tapgate";

/// How long the API waits for the engine to have looked at each VM that ran; one that hangs holds up no other.
const FIRST_LOOK: std::time::Duration = std::time::Duration::from_secs(5);

/// How long parts may take to end, once no guest is held: what holds one has a limit of its own.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(10);

/// Options of `tapgate serve`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The configuration file (TOML)
    #[arg(long, env = "TAPGATE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Keys that stand before those of the file.
    #[command(flatten)]
    pub settings: config::Settings,
}

impl Args {
    /// The checked configuration: flags and variables, then the file, then the defaults.
    ///
    /// # Errors
    /// The file cannot be read, or a key is unknown or makes no sense.
    pub fn config(self) -> Result<Config, config::ConfigError> {
        self.settings()?.check()
    }

    /// The keys that are set: flags and variables, then the file.
    ///
    /// # Errors
    /// The file cannot be read, or a key is unknown.
    pub fn settings(self) -> Result<config::Settings, config::ConfigError> {
        let file = match &self.config {
            Some(path) => config::Settings::read(path)?,
            None => config::Settings::default(),
        };
        Ok(self.settings.or(file))
    }
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// A part cannot be opened; the message says which and what to do.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = args.config()?;
    crate::log::start(&config.log)?;
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "tapgate serve needs root for namespaces, taps and BPF; run it with sudo or as a systemd service"
        );
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config));
    // What still blocks (a resolver's lookup) is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let _lock = lock(&config)?;
    let api = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}; free the port or set `listen`", config.listen))?;
    let tls = match config.tls.clone() {
        Some((cert, key)) => Some(Arc::new(Tls::load(cert, key).context("cannot serve TLS")?)),
        None => None,
    };
    let key =
        SealKey::load_or_create(&config.data_dir.join("seal.key")).context("cannot open the sealing key")?;
    let data_dir = config.data_dir.clone();
    let store = tokio::task::spawn_blocking(move || Store::open(&data_dir, key))
        .await?
        .context("cannot open the store")?;
    tokio::spawn(cut_off(store.clone(), jiff::Timestamp::now()));
    keep_journal(&config, store.audit()).await.context("cannot store what the last daemon was at")?;
    let (image, driver) = open_driver(&config).await?;

    let storage = Storage::open(&config.snapshot_store).context("cannot open the snapshot store")?;
    let datapath = Datapath::open(DatapathConfig {
        instance: config.instance.clone(),
        pin_root: PINS.into(),
        guest_v4: config.guest_v4,
        guest_v6: config.guest_v6,
        guest_v6_routed: config.guest_v6_routed,
        uplink: config.uplink.clone(),
        flows_per_second: NonZeroU32::new(config.vm_limits.new_per_second)
            .context("vm_new_connections must be at least 1")?,
    })
    .await
    .context("cannot open the datapath")?;
    uids::claim(Path::new(PINS), &config.instance).context("cannot claim user ids for VMMs")?;
    let mut listeners =
        datapath.egress().run(Listeners::bind)?.context("cannot bind the proxy's listeners")?;
    hand_over(&datapath, &listeners).context("cannot hand the listeners to the datapath")?;
    let service = listeners.take_service().context("the guest service has no listener")?;

    let table = Arc::new(PolicyTable::new(config.vm_limits));
    table
        .set_guest_range(&[Some(config.guest_v4), config.guest_v6].into_iter().flatten().collect::<Vec<_>>());

    let stop = CancellationToken::new();
    let proxy = Proxy::new(
        ProxyConfig { resolvers: config.resolvers.clone(), ..ProxyConfig::default() },
        table.clone(),
        Arc::new(store.audit().clone()),
    );
    let room = room(&config, image.as_ref())?;
    let (handle, commands) = engine::Handle::new();
    let notifier = handle.notifier();
    let mut engine = Engine::new(Parts {
        config: config.clone(),
        store: store.clone(),
        datapath,
        table,
        driver,
        image,
        storage,
        room: room.clone(),
        notifier,
        stop: stop.clone(),
    });
    engine.watch_host_addresses().await.context("cannot hand the host's addresses to the datapath")?;
    let guests = guest_service::router(engine.guests());
    let state = AppState::try_new(store.clone(), handle, Arc::new(make_ca), api_settings(&config, room)?)
        .context("cannot set up the API")?;

    let (looked, held) = (engine.looked(), engine.held());
    let audit = store.audit().clone();
    let mut parts = RunningParts::new(stop.clone());
    parts.spawn("proxy", proxy.serve(listeners, stop.clone()));
    parts.spawn("guest service", guest_service::serve(service, guests, stop.clone()));
    parts.spawn("engine", engine.run(commands));
    parts.spawn("audit log's writer", written(audit.clone(), stop.clone()));
    let trimming = crate::retention::run(store, config.retention, stop.clone());
    parts.spawn("audit log's retention", never_fails(trimming));
    // Until each VM was looked at, the records say what was; callers wait in the listener's queue meanwhile.
    if tokio::time::timeout(FIRST_LOOK, looked).await.is_err() {
        tracing::warn!("serve.first_look_goes_on");
    }
    parts.spawn("API server", never_fails(server::serve(api, router(state), tls, stop.clone())));
    // Tells systemd (Type=notify), where there is one.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(listen = %config.listen, instance = config.instance, "serve.ready");

    let ended = tokio::select! {
        name = signalled() => {
            tracing::info!(signal = name, "serve.stopping");
            Ok(())
        }
        why = parts.ended() => {
            tracing::error!(why, "serve.part_ended");
            Err(anyhow::anyhow!(
                "{why}; the daemon ends so that it can be started anew; VMs run on, closed but for cidr rules"
            ))
        }
    };
    let drained = parts.end(DRAIN, || held.any()).await;
    if !drained || tokio::time::timeout(DRAIN, audit.flush()).await.is_err() {
        tracing::warn!("serve.drain_timed_out");
    }
    ended
}

/// Tells what the last daemon was at when it was killed, if it was, and notes what this one is at. Without the latter guests are served
/// all the same: what stands in the audit log is whole then too, as long as nobody kills this daemon.
async fn keep_journal(config: &Config, audit: &AuditLog) -> anyhow::Result<()> {
    let found = audit.keep_journal(&config.data_dir.join("audit.journal")).await?;
    if let Some(why) = found.fault {
        tracing::error!(why, lost = found.lost, "audit.journal_unreadable");
    }
    if found.events > 0 || found.lost > 0 {
        tracing::warn!(events = found.events, lost = found.lost, "audit.recovered");
    }
    if let Some(why) = found.without {
        tracing::error!(
            why,
            "audit.no_journal: what is under way would be lost uncounted if the daemon were killed"
        );
    }
    Ok(())
}

/// Notes what requests the last daemon cut off. Nobody waits for records that cannot be written now: until then their keys stand
/// for requests that run.
async fn cut_off(store: Store, begun: jiff::Timestamp) {
    while let Err(error) = store.idempotency_cut_off(begun).await {
        tracing::error!(%error, "idempotency.cut_off_not_noted");
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

/// Ends when the thread that writes audit events has.
async fn written(audit: AuditLog, stop: CancellationToken) -> Result<(), &'static str> {
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        () = audit.writer_ended() => Err("its thread is gone"),
    }
}

/// One daemon for one data directory.
fn lock(config: &Config) -> anyhow::Result<nix::fcntl::Flock<std::fs::File>> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let dir = &config.data_dir;
    // Unprivileged VMMs pass through to their own folders below; nothing else here is readable to them.
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).with_context(|| {
        format!("cannot make {}; set data_dir to a folder that root may write", dir.display())
    })?;
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow::anyhow!("another daemon uses {}; stop it, or give this one its own data_dir", dir.display())
    })
}

async fn open_driver(config: &Config) -> anyhow::Result<(Option<Image>, Arc<dyn Vmm>)> {
    if config.driver == DriverKind::Netns {
        tracing::warn!(
            "driver `netns` runs workloads on the host itself: it isolates nothing but the network"
        );
        return Ok((None, Arc::new(NetnsDriver::new())));
    }
    let image = images::find(&config.image_dir, &config.image)?;
    let driver: Arc<dyn Vmm> = match config.driver {
        DriverKind::Firecracker => {
            Arc::new(api_driver(config, ApiKind::Firecracker, "/usr/local/bin/firecracker")?)
        }
        DriverKind::CloudHypervisor => {
            Arc::new(api_driver(config, ApiKind::CloudHypervisor, "/usr/local/bin/cloud-hypervisor")?)
        }
        DriverKind::Netns | DriverKind::Qemu => Arc::new(qemu_driver(config, &image).await?),
    };
    tracing::info!(image = %image.dir().display(), driver = driver.name(), "serve.driver");
    Ok((Some(image), driver))
}

/// A driver that needs KVM and a program that no package brings: both are looked at before a VM is.
fn api_driver(config: &Config, kind: ApiKind, usual: &str) -> anyhow::Result<ApiDriver> {
    if config.accel == AccelChoice::Tcg {
        bail!("this driver has no emulation; set accel = \"auto\" or driver = \"qemu\"");
    }
    accel::open_kvm()
        .context("this driver needs /dev/kvm; load kvm_intel or kvm_amd, or set driver = \"qemu\"")?;
    let program = config.vmm_program.clone().unwrap_or_else(|| usual.into());
    if !program.is_file() {
        bail!(
            "there is no {}; take the program from its project's releases and set vmm_program",
            program.display()
        );
    }
    Ok(ApiDriver { io: config.disk_io, demand: config.cgroup_limits, ..ApiDriver::new(kind, program) })
}

async fn qemu_driver(config: &Config, image: &Image) -> anyhow::Result<QemuDriver> {
    let program = config.vmm_program.clone().unwrap_or_else(tapgate_vmm::default_program);
    let accel = match config.accel {
        AccelChoice::Tcg => Accel::Tcg,
        choice => {
            let (tried, data_dir, program) = (image.clone(), config.data_dir.clone(), program.clone());
            let probe =
                tokio::task::spawn_blocking(move || accel::probe(&tried, &program, &data_dir)).await?;
            if choice == AccelChoice::Kvm && probe.accel == Accel::Tcg {
                bail!(
                    "accel = \"kvm\", but KVM runs no guest here ({}); set accel = \"auto\" or \"tcg\"",
                    probe.reason
                );
            }
            probe.accel
        }
    };
    tracing::info!(?accel, program = %program.display(), "serve.qemu");
    let (io, demand) = (config.disk_io, config.cgroup_limits);
    Ok(QemuDriver { program, io, demand, ..QemuDriver::new(accel) })
}

/// Hands the listeners of both families to the programs.
fn hand_over(datapath: &Datapath, listeners: &Listeners) -> anyhow::Result<()> {
    for (v6, fds) in [(false, Some(listeners.fds())), (true, listeners.fds_v6())] {
        if let Some(fds) = fds {
            let service = fds.service.context("the guest service's listener is gone")?;
            datapath.set_listeners(v6, fds.tcp, fds.dns_udp, fds.dns_tcp, service)?;
        }
    }
    Ok(())
}

fn make_ca(vm: &VmId) -> anyhow::Result<CaPem> {
    let ca = VmCa::generate(vm)?;
    Ok(CaPem { cert: ca.cert_pem().to_owned(), key: ca.key_pem() })
}

/// How much of the host VMs and snapshots may have: the API and the engine count together.
fn room(config: &Config, image: Option<&Image>) -> anyhow::Result<Room> {
    let raw = matches!(config.driver, DriverKind::Firecracker | DriverKind::CloudHypervisor);
    let image = match image.filter(|_| raw) {
        Some(image) => tapgate_vmm::octets::of_image(image).context("cannot look at the image's disk")?,
        None => 0,
    };
    let stored_here = matches!(config.snapshot_store, Place::Folder(_));
    let guests_take_memory = config.driver != DriverKind::Netns;
    Ok(Room::of_host(config.share.clone(), config.data_dir.clone(), guests_take_memory)
        .with_copying(Copying { raw, image, stored_here }))
}

fn api_settings(config: &Config, room: Room) -> anyhow::Result<Settings> {
    let token = config.data_dir.join("metrics.token");
    let token = Token::load_or_create(&token).with_context(|| format!("cannot use {}", token.display()))?;
    Ok(Settings {
        metrics_token: Some(token),
        public_host: config.public_host.clone(),
        public_url: config.public_url.clone(),
        sign_up: config.sign_up,
        mail: config.mail.clone(),
        mail_from: config.mail_from.clone(),
        ssh_ports: config.ssh_ports.clone(),
        is_free: crate::engine::ssh::is_free,
        slots: config.slots(),
        resources: Resources {
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            disk_bytes: u64::from(config.disk_gib) << 30,
        },
        base_image: config.image.clone(),
        quotas: config.quotas,
        git_host: config.git_host.to_string(),
        room,
        keeps_memory: config.driver == DriverKind::Qemu,
        harnesses: config.harnesses.clone(),
        vms: config.data_dir.join("vms"),
        ..Settings::default()
    })
}

async fn signalled() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
}
