//! The host's end of the guest agent's channel (QEMU's guest agent protocol). What answers is the guest: bounded, timed,
//! and never believed beyond "it says that it is frozen".

use crate::spec::VmmError;
use crate::unix::connect_any_length;
use serde_json::{Value, json};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

const MAX_LINE: u64 = 64 << 10;
/// For a guest that has the agent but is busy.
const DEADLINE: Duration = Duration::from_secs(5);
/// Freezing waits for writes under way.
const FREEZE: Duration = Duration::from_secs(15);

/// A new identity makes keys and restarts services.
const BECOME: Duration = Duration::from_secs(60);

/// The port that the agent listens on where its channel is a vsock device; the guest agent's `channel.rs` has it too.
pub const VSOCK_PORT: u32 = 777;

/// Numbers that no answer of an earlier connection or question can carry.
static NEXT: AtomicU64 = AtomicU64::new(1);

fn fresh() -> u64 {
    u64::from(std::process::id()) << 32 | NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A connection to a guest's agent that has answered.
pub struct Agent {
    stream: BufReader<UnixStream>,
    /// Whether a question was given up whose answer may still come.
    late: bool,
}

impl Agent {
    /// Connects and makes sure that the agent is there and in step.
    pub async fn connect(path: &Path) -> Result<Self, VmmError> {
        let stream = connect_any_length(path).await.map_err(VmmError::io("agent channel"))?;
        Self::through(stream, None).await
    }

    /// The same over a connection to the VMM; with a port where the VMM wants to be told one.
    pub async fn through(stream: StdUnixStream, port: Option<u32>) -> Result<Self, VmmError> {
        stream.set_nonblocking(true).map_err(VmmError::io("agent channel"))?;
        let stream = UnixStream::from_std(stream).map_err(VmmError::io("agent channel"))?;
        let mut agent = Self { stream: BufReader::new(stream), late: false };
        let id = fresh();
        let sync = async {
            if let Some(port) = port {
                agent.send(format!("CONNECT {port}\n").as_bytes()).await?;
                if !agent.text().await?.starts_with(b"OK ") {
                    return Err(VmmError::Control("the VMM finds no agent in the guest".into()));
                }
            }
            agent.sync(id).await?;
            agent.synced(id).await
        };
        timeout(DEADLINE, sync)
            .await
            .map_err(|_| VmmError::Control("no agent answers in the guest".into()))??;
        Ok(agent)
    }

    /// Has the guest write out what it holds in memory, so that holding it takes no longer than it must.
    pub async fn write_out(&mut self) -> Result<u64, VmmError> {
        self.execute("guest-tapgate-sync", FREEZE).await
    }

    /// Holds the guest's file systems still; answers how many.
    pub async fn freeze(&mut self) -> Result<u64, VmmError> {
        self.execute("guest-fsfreeze-freeze", FREEZE).await
    }

    /// Lets them go on; 0 means that they had done so by themselves.
    pub async fn thaw(&mut self) -> Result<u64, VmmError> {
        // A VMM that has begun to copy may pass it on late; the guest waits a little longer than this before it goes on by itself.
        self.execute("guest-fsfreeze-thaw", FREEZE).await
    }

    /// Sets the guest's clock to this host's.
    pub async fn set_time(&mut self) -> Result<(), VmmError> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let question = json!({"execute": "guest-set-time", "arguments": {"time": now}});
        match self.ask(&question, DEADLINE).await? {
            Some(answer) if answer.get("return").is_some() => Ok(()),
            _ => Err(VmmError::Control("the guest's agent does not set the clock".into())),
        }
    }

    /// Makes a copied machine another one, and tells it the time. Its answer is all that says so.
    pub async fn become_another(&mut self, mut identity: Value) -> Result<(), VmmError> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        identity["time"] = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).into();
        let question = json!({"execute": "guest-tapgate-become", "arguments": identity});
        let late = || VmmError::Memory("the clone's agent does not say that it is someone else".into());
        let answer = self.ask(&question, BECOME).await?.ok_or_else(late)?;
        if answer.get("return").is_some() {
            return Ok(());
        }
        let said = answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("no reason");
        let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
        Err(VmmError::Memory(format!("the clone cannot become another machine: {said}")))
    }

    /// Asks the guest to shut down. An agent answers this with nothing: it is on its way.
    pub async fn power_off(&mut self) -> Result<(), VmmError> {
        self.write(&json!({"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}})).await
    }

    async fn execute(&mut self, name: &str, deadline: Duration) -> Result<u64, VmmError> {
        let late = || VmmError::Control(format!("the guest's agent does not answer {name}"));
        let answer = self.ask(&json!({"execute": name}), deadline).await?.ok_or_else(late)?;
        answer.get("return").and_then(Value::as_u64).ok_or_else(|| {
            let said: String = answer.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
            VmmError::Control(format!("the guest's agent refuses {name}: {said}"))
        })
    }

    /// The answer to a question, if it comes in time. One that comes later is not taken for the next question's.
    async fn ask(&mut self, question: &Value, deadline: Duration) -> Result<Option<Value>, VmmError> {
        let late = std::mem::replace(&mut self.late, true);
        let exchange = async {
            if late {
                // The question goes along: what holds the agent up may be for it to end.
                let id = fresh();
                self.sync(id).await?;
                self.write(question).await?;
                self.synced(id).await?;
            } else {
                self.write(question).await?;
            }
            self.line().await
        };
        let Ok(answer) = timeout(deadline, exchange).await else { return Ok(None) };
        self.late = false;
        answer.map(Some)
    }

    /// Asks for a number back. 0xff makes the other side forget half a line of an earlier connection or question.
    async fn sync(&mut self, id: u64) -> Result<(), VmmError> {
        self.send(b"\xff").await?;
        self.write(&json!({"execute": "guest-sync", "arguments": {"id": id}})).await
    }

    /// Comes back when it came.
    async fn synced(&mut self, id: u64) -> Result<(), VmmError> {
        while self.line().await?.get("return").and_then(Value::as_u64) != Some(id) {}
        Ok(())
    }

    async fn write(&mut self, message: &Value) -> Result<(), VmmError> {
        self.send(format!("{message}\n").as_bytes()).await
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), VmmError> {
        self.stream.get_mut().write_all(bytes).await.map_err(VmmError::io("agent channel"))
    }

    async fn line(&mut self) -> Result<Value, VmmError> {
        // What is no JSON is an answer to nobody: the caller waits for the next, until its time is up.
        Ok(serde_json::from_slice(&self.text().await?).unwrap_or(Value::Null))
    }

    async fn text(&mut self) -> Result<Vec<u8>, VmmError> {
        let mut line = Vec::new();
        (&mut self.stream)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await
            .map_err(VmmError::io("agent channel"))?;
        if !line.ends_with(b"\n") {
            return Err(VmmError::Control("the guest's agent was cut off".into()));
        }
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader as StdReader, Write as _};

    /// An agent that answers one line after the other; `held` of them, after the first, only when the next has come.
    fn agent(held: usize) -> (StdUnixStream, std::thread::JoinHandle<Vec<Value>>) {
        let (near, mut far) = StdUnixStream::pair().unwrap();
        let answering = std::thread::spawn(move || {
            let lines = StdReader::new(far.try_clone().unwrap()).split(b'\n').map_while(Result::ok);
            let (mut asked, mut waiting) = (Vec::new(), Vec::new());
            for line in lines {
                let line: Vec<u8> = line.into_iter().filter(|octet| *octet != 0xff).collect();
                let question: Value = serde_json::from_slice(&line).unwrap();
                let number = question.pointer("/arguments/id").cloned().unwrap_or(json!(asked.len()));
                waiting.push(json!({"return": number}));
                asked.push(question);
                if (2..2 + held).contains(&asked.len()) {
                    continue;
                }
                for answer in waiting.drain(..) {
                    if writeln!(far, "{answer}").is_err() {
                        return asked;
                    }
                }
            }
            asked
        });
        (near, answering)
    }

    #[tokio::test]
    async fn an_answer_that_comes_late_is_not_taken_for_the_next() {
        let (stream, answering) = agent(1);
        let mut agent = Agent::through(stream, None).await.unwrap();
        assert!(agent.execute("slow", Duration::from_millis(100)).await.is_err());
        let second = agent.execute("second", DEADLINE).await.unwrap();
        let third = agent.execute("third", DEADLINE).await.unwrap();
        drop(agent);
        let asked = answering.join().unwrap();
        let place =
            |name: &str| asked.iter().position(|question| question["execute"] == name).unwrap() as u64;
        assert_eq!((second, third), (place("second"), place("third")));
    }

    /// An answer to an earlier connection's may still be on its way.
    #[tokio::test]
    async fn each_connection_asks_for_a_number_of_its_own() {
        let mut numbers = Vec::new();
        for _ in 0..2 {
            let (stream, answering) = agent(0);
            drop(Agent::through(stream, None).await.unwrap());
            numbers.push(answering.join().unwrap()[0]["arguments"]["id"].as_u64().unwrap());
        }
        assert_ne!(numbers[0], numbers[1]);
    }
}
