//! A VM that runs, as the engine holds it: what it is asked for, and how it ends. Starts no process.

use super::client::Request;
use super::{ApiDriver, END, Live, hold, snapshot, supervise};
use crate::driver::{BoxFuture, Running};
use crate::spec::{Exit, Handle, Observed, SnapshotInfo, VmSpec, VmmError};
use serde_json::Value;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tapgate_datapath::Gate;
use tokio::sync::watch;
use tokio::time::timeout;

/// A VM that one of them runs.
pub struct ApiRunning {
    pub(super) driver: ApiDriver,
    pub(super) spec: VmSpec,
    handle: Handle,
    gate: Gate,
    observed: watch::Receiver<Observed>,
    live: Arc<Mutex<Arc<Live>>>,
    intent: watch::Sender<supervise::Intent>,
    /// One snapshot at a time: it holds and releases the guest.
    pub(super) snapshots: Arc<tokio::sync::Mutex<()>>,
}

impl ApiRunning {
    pub(super) fn follow(driver: &ApiDriver, spec: &VmSpec, handle: Handle, live: Live, gate: Gate) -> Self {
        let live = Arc::new(Mutex::new(Arc::new(live)));
        let (observe, observed) = watch::channel(Observed::default());
        let (intent, intended) = watch::channel(supervise::Intent::Run);
        let snapshots = Arc::<tokio::sync::Mutex<()>>::default();
        let supervisor = supervise::Supervisor {
            driver: driver.clone(),
            spec: spec.clone(),
            live: live.clone(),
            observed: observe,
            intent: intended,
            snapshots: snapshots.clone(),
        };
        tokio::spawn(supervisor.run());
        Self { driver: driver.clone(), spec: spec.clone(), handle, gate, observed, live, intent, snapshots }
    }

    pub(super) fn live(&self) -> Arc<Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn ask(&self, request: &Request) -> Result<Value, VmmError> {
        self.driver.ask(&self.spec, &self.live(), request).await
    }

    async fn end(&self) -> Result<Exit, VmmError> {
        self.intent.send_replace(supervise::Intent::Kill);
        self.live().process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
        timeout(END, self.wait())
            .await
            .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))
    }

    async fn shut_down(&self, grace: Duration) -> Result<Exit, VmmError> {
        self.intent.send_replace(supervise::Intent::ShutDown);
        let asked = match snapshot::agent(&self.live()).await {
            Ok(mut agent) => agent.power_off().await.is_ok(),
            Err(_) => false,
        };
        let asked = asked || self.ask(&self.driver.kind.end()).await.is_ok();
        if asked && let Ok(exit) = timeout(grace, self.wait()).await {
            return Ok(exit);
        }
        self.end().await
    }
}

impl Running for ApiRunning {
    fn handle(&self) -> &Handle {
        &self.handle
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn observed(&self) -> watch::Receiver<Observed> {
        self.observed.clone()
    }

    fn shutdown(&self, grace: Duration) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.shut_down(grace))
    }

    fn snapshot<'a>(&'a self, to: &'a Path) -> BoxFuture<'a, Result<SnapshotInfo, VmmError>> {
        Box::pin(snapshot::take(self, to))
    }

    fn holds_for_snapshots(&self) -> bool {
        true
    }

    fn check(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async {
            let live = self.live();
            if live.process.identity().is_stopped() {
                return Err(VmmError::Control("its process was stopped by a signal".into()));
            }
            hold::look(&self.driver, &self.spec, &live, &self.snapshots).await
        })
    }

    fn kill(&self) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.end())
    }
}
