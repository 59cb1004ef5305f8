//! `tapgate serve`: opens the parts, joins them, serves, and ends in order.
//!
//! Guests outlive it: on SIGTERM the API and the proxy end, the VMs run on behind their gates, and the next daemon adopts
//! them. Must never start serving with a part missing.

use crate::{
    config::{AccelChoice, Config, DriverKind},
    engine::{self, Engine},
    http::{AppState, router},
};
use anyhow::{Context as _, bail};
use std::{net::IpAddr, sync::Arc};
use tapgate_datapath::{Datapath, DatapathConfig};
use tapgate_proxy::{Limits, Listeners, PolicyTable, Proxy, ProxyConfig};
use tapgate_store::{SealKey, Store};
use tapgate_vmm::{Driver, accel};
use tokio_util::sync::CancellationToken;

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// A part cannot be opened; the message says which and what to do.
pub fn run(config: Config) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("tapgate serve needs root for namespaces, taps and BPF; run it with sudo or as a systemd service");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
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
    let key = SealKey::load_or_create(&config.data_dir.join("seal.key")).context("cannot open the sealing key")?;
    let data_dir = config.data_dir.clone();
    let store = tokio::task::spawn_blocking(move || Store::open(&data_dir, key)).await?.context("cannot open the store")?;
    let driver = open_driver(&config).await?;

    let datapath = Datapath::open(DatapathConfig {
        instance: config.instance.clone(),
        guest_v4: config.guest_v4,
        guest_v6: config.guest_v6,
        uplink: config.uplink.clone(),
        ..DatapathConfig::default()
    })
    .await
    .context("cannot open the datapath")?;
    let listeners = datapath.egress().run(Listeners::bind)?.context("cannot bind the proxy's listeners")?;
    datapath.set_listeners(&listeners).context("cannot hand the listeners to the datapath")?;

    let table = Arc::new(PolicyTable::new(Limits::default()));
    let own = host_addresses();
    datapath.set_host_addresses(&own).context("cannot hand the host's addresses to the datapath")?;
    table.set_host_addresses(&own);
    let ranges = [Some(config.guest_v4.to_string()), config.guest_v6.map(|net| net.to_string())];
    let ranges: Vec<_> = ranges.iter().flatten().filter_map(|text| text.parse().ok()).collect();
    table.set_guest_range(&ranges);

    let stop = CancellationToken::new();
    let proxy = Proxy::new(
        ProxyConfig { resolvers: config.resolvers.clone(), ..ProxyConfig::default() },
        table.clone(),
        Arc::new(store.audit().clone()),
    )
    .context("cannot set up the proxy")?;
    let (handle, notifier, commands) = engine::Handle::new();
    let state = AppState::new(store.clone(), handle, &config);
    let engine = Engine::new(config.clone(), store, datapath, table, driver, notifier, stop.clone());

    let proxy = tokio::spawn(proxy.serve(listeners, stop.clone()));
    let engine = tokio::spawn(engine.run(commands));
    tracing::info!(listen = %config.listen, instance = config.instance, "serve.ready");
    let server = axum::serve(api, router(state).into_make_service_with_connect_info::<std::net::SocketAddr>());
    let signal = stop.clone();
    let server = tokio::spawn(server.with_graceful_shutdown(async move { signal.cancelled().await }).into_future());

    let ended = tokio::select! {
        name = signalled() => { tracing::info!(signal = name, "serve.stopping"); Ok(()) }
        () = stop.cancelled() => Ok(()),
    };
    stop.cancel();
    let drain = async {
        let _ = engine.await;
        let _ = proxy.await;
        let _ = server.await;
    };
    if tokio::time::timeout(std::time::Duration::from_secs(10), drain).await.is_err() {
        tracing::warn!("serve.drain_timed_out");
    }
    ended
}

/// One daemon for one data directory.
fn lock(config: &Config) -> anyhow::Result<nix::fcntl::Flock<std::fs::File>> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    let dir = &config.data_dir;
    // Unprivileged VMMs pass through to their own folders below; nothing else here is readable to them.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .with_context(|| format!("cannot make {}; set data_dir to a folder that root may write", dir.display()))?;
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

async fn open_driver(config: &Config) -> anyhow::Result<Driver> {
    if config.driver == DriverKind::Netns {
        tracing::warn!("driver `netns` runs workloads on the host itself: it isolates nothing but the network");
        return Ok(Driver::netns());
    }
    let dir = config.image_dir.join(&config.image);
    let image = tapgate_vmm::image::open(&dir)
        .with_context(|| format!("no usable image `{}`; build it with `tapgate image build`", config.image))?;
    let accel = match config.accel {
        AccelChoice::Tcg => accel::Accel::Tcg,
        choice => {
            let probe = accel::probe(&image, &config.data_dir).await.context("cannot try out KVM")?;
            match (choice, probe.accel) {
                (AccelChoice::Kvm, accel::Accel::Tcg) => {
                    bail!("accel = \"kvm\", but KVM runs no guest here ({}); set accel = \"auto\" or \"tcg\"", probe.reason)
                }
                (_, accel::Accel::Tcg) => tracing::warn!(reason = probe.reason, "guests are emulated (TCG)"),
                _ => tracing::info!("guests run under KVM"),
            }
            probe.accel
        }
    };
    Driver::qemu(image, accel).context("cannot set up QEMU")
}

/// Every address of the host, of any interface and family.
fn host_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    interfaces
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            if let Some(v4) = address.as_sockaddr_in() {
                Some(IpAddr::V4(v4.ip()))
            } else {
                address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
            }
        })
        .collect()
}

async fn signalled() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
}
