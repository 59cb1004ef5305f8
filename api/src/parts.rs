//! The running parts of the daemon: each has a name, and none may end before it is told to. One that does ends the daemon, so
//! that whoever started it (systemd) starts it again; an API without an engine, or taps without a proxy, would look alive.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::future::Future;
use std::time::Duration;
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

/// Parts that run until the token is cancelled.
pub struct RunningParts {
    tasks: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
    stop: CancellationToken,
}

impl RunningParts {
    /// None yet. Cancelling the token tells all of them to end.
    pub fn new(stop: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), names: HashMap::new(), stop }
    }

    /// Starts a part.
    pub fn spawn<E: Display>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(async { part.await.map_err(|error| format!("{error}")) });
        self.names.insert(task.id(), name);
    }

    /// Comes back when a part has ended that was not told to, and says which and why.
    pub async fn ended(&mut self) -> String {
        loop {
            let Some(ended) = self.tasks.join_next_with_id().await else {
                return "no part of the daemon runs".to_owned();
            };
            if !self.stop.is_cancelled() {
                return self.why(ended);
            }
        }
    }

    fn why(&self, ended: Result<(Id, Result<(), String>), JoinError>) -> String {
        let (id, why) = match ended {
            Ok((id, Ok(()))) => (id, "ended by itself".to_owned()),
            Ok((id, Err(error))) => (id, format!("ended: {error}")),
            // What it panicked with is in the log, by the panic hook.
            Err(error) => (error.id(), "panicked; the lines above say where".to_owned()),
        };
        format!("the {} {why}", self.names.get(&id).copied().unwrap_or("unknown part"))
    }

    /// Tells all parts to end and waits for them, but no longer than so after there is nothing more that has to be finished.
    /// Answers whether all did.
    pub async fn end(mut self, within: Duration, has_to_finish: impl Fn() -> bool) -> bool {
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        tokio::pin!(all);
        loop {
            let busy = has_to_finish();
            match tokio::time::timeout(within, &mut all).await {
                Ok(()) => return true,
                Err(_) if busy || has_to_finish() => {}
                Err(_) => return false,
            }
        }
    }
}

/// A part that can only end.
pub(crate) async fn never_fails(part: impl Future<Output = ()>) -> Result<(), Infallible> {
    part.await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(parts: &mut RunningParts, name: &'static str) {
        let stop = parts.stop.clone();
        parts.spawn(name, async move {
            stop.cancelled().await;
            Ok::<_, String>(())
        });
    }

    #[tokio::test]
    async fn a_part_that_ends_is_named_whatever_way_it_ended() {
        let fails = async { Err::<(), _>("the records cannot be read") };
        let goes = async { Ok::<(), &str>(()) };
        #[allow(clippy::panic, reason = "what the test is about")]
        let panics = async { panic!("gone") };
        type Part = std::pin::Pin<Box<dyn Future<Output = Result<(), &'static str>> + Send>>;
        let cases: [(Part, &str); 3] = [
            (Box::pin(fails), "the engine ended: the records cannot be read"),
            (Box::pin(goes), "the engine ended by itself"),
            (Box::pin(panics), "the engine panicked"),
        ];
        for (part, says) in cases {
            let mut parts = RunningParts::new(CancellationToken::new());
            steady(&mut parts, "proxy");
            parts.spawn("engine", part);
            let why = parts.ended().await;
            assert!(why.starts_with(says), "{why}");
            assert!(parts.end(Duration::from_secs(60), || false).await);
        }
    }

    #[tokio::test]
    async fn parts_that_were_told_to_end_are_no_news() {
        let stop = CancellationToken::new();
        let mut parts = RunningParts::new(stop.clone());
        steady(&mut parts, "proxy");
        stop.cancel();
        assert_eq!(parts.ended().await, "no part of the daemon runs");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_to_be_finished_is_waited_for_and_nothing_else() {
        for (takes, busy_for, all) in [(5, 0, true), (15, 0, false), (45, 40, true), (90, 40, false)] {
            let mut parts = RunningParts::new(CancellationToken::new());
            let stop = parts.stop.clone();
            parts.spawn("engine", async move {
                stop.cancelled().await;
                tokio::time::sleep(Duration::from_secs(takes)).await;
                Ok::<_, String>(())
            });
            let began = tokio::time::Instant::now();
            let busy = || began.elapsed() < Duration::from_secs(busy_for);
            assert_eq!(parts.end(Duration::from_secs(10), busy).await, all, "{takes} {busy_for}");
        }
    }
}
