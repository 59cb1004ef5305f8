//! QEMU's control protocol: one JSON object a line. A client that sends commands and hands events on.
//!
//! The other side is a VMM that a guest may have taken over, so lines are bounded and every command has a deadline.

use crate::spec::VmmError;
use crate::unix::connect_any_length;
use serde_json::{Value, json};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

const MAX_LINE: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(10);

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `SHUTDOWN`, `RESET`, …
    pub name: String,
    /// Its data.
    pub data: Value,
}

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    partial: Vec<u8>,
    next_id: u64,
    /// Events that came while a reply was awaited.
    pub pending: Vec<Event>,
}

impl Qmp {
    /// Connects to the socket and leaves negotiation mode.
    pub async fn connect(path: &Path) -> Result<Self, VmmError> {
        let stream = connect_any_length(path)
            .await
            .map_err(|e| VmmError::Control(format!("{}: {e}", path.display())))?;
        stream.set_nonblocking(true).map_err(VmmError::io("control socket"))?;
        let (reader, writer) =
            UnixStream::from_std(stream).map_err(VmmError::io("control socket"))?.into_split();
        let mut qmp = Self {
            reader: BufReader::new(reader),
            writer,
            partial: Vec::new(),
            next_id: 0,
            pending: Vec::new(),
        };
        let greeting = timeout(DEADLINE, qmp.line()).await.map_err(|_| late("its greeting"))??;
        if greeting.get("QMP").is_none() {
            return Err(VmmError::Control("what answers is not QEMU".into()));
        }
        qmp.command("qmp_capabilities", Value::Null).await?;
        Ok(qmp)
    }

    /// Sends a command and waits for its answer.
    pub async fn command(&mut self, name: &str, arguments: Value) -> Result<Value, VmmError> {
        self.command_with(name, arguments, None).await
    }

    /// The same, with a descriptor for QEMU.
    pub async fn command_with(
        &mut self,
        name: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, VmmError> {
        self.next_id += 1;
        let id = self.next_id;
        let mut message = json!({"execute": name, "id": id});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut text = message.to_string();
        text.push('\n');
        let exchange = async {
            let sent = match &descriptor {
                Some(descriptor) => send_with(self.writer.as_ref(), text.as_bytes(), descriptor).await,
                None => Ok(0),
            };
            let io = || VmmError::io(format!("sending {name}"));
            let rest = &text.as_bytes()[sent.map_err(io())?..];
            self.writer.write_all(rest).await.map_err(io())?;
            loop {
                let mut answer = self.line().await?;
                if let Some(event) = as_event(&answer) {
                    // A flood of events must not fill memory; the oldest are dropped.
                    if self.pending.len() >= 1024 {
                        self.pending.remove(0);
                    }
                    self.pending.push(event);
                } else if answer.get("id").and_then(Value::as_u64) == Some(id) {
                    if let Some(error) = answer.get("error") {
                        let text =
                            error.get("desc").and_then(Value::as_str).unwrap_or("an error without words");
                        return Err(VmmError::Control(format!("{name}: {text}")));
                    }
                    return Ok(answer["return"].take());
                }
            }
        };
        timeout(DEADLINE, exchange).await.map_err(|_| late(name))?
    }

    /// The next event. Safe to cancel.
    pub async fn event(&mut self) -> Result<Event, VmmError> {
        if !self.pending.is_empty() {
            return Ok(self.pending.remove(0));
        }
        loop {
            if let Some(event) = as_event(&self.line().await?) {
                return Ok(event);
            }
        }
    }

    /// One line; what was read of it is kept if the caller stops waiting.
    async fn line(&mut self) -> Result<Value, VmmError> {
        let room = MAX_LINE.saturating_sub(self.partial.len() as u64);
        let mut limited = (&mut self.reader).take(room);
        let n = limited.read_until(b'\n', &mut self.partial).await.map_err(VmmError::io("control socket"))?;
        if !self.partial.ends_with(b"\n") {
            let why =
                if n == 0 && room > 0 { "it closed its control socket" } else { "it sends an endless line" };
            return Err(VmmError::Control(why.into()));
        }
        let line = std::mem::take(&mut self.partial);
        serde_json::from_slice(&line).map_err(|_| VmmError::Control("it does not speak JSON".into()))
    }
}

/// Sends the first octets together with a descriptor; answers how many went.
async fn send_with(stream: &UnixStream, text: &[u8], descriptor: &OwnedFd) -> std::io::Result<usize> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    stream
        .async_io(Interest::WRITABLE, || {
            let descriptors = [descriptor.as_raw_fd()];
            let along = [ControlMessage::ScmRights(&descriptors)];
            let text = [std::io::IoSlice::new(text)];
            Ok(sendmsg::<()>(stream.as_raw_fd(), &text, &along, MsgFlags::MSG_NOSIGNAL, None)?)
        })
        .await
}

fn late(what: &str) -> VmmError {
    VmmError::Silent(format!("no answer to {what} within {} s", DEADLINE.as_secs()))
}

fn as_event(message: &Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    Some(Event { name, data: message.get("data").cloned().unwrap_or(Value::Null) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader as StdReader, Write as _};
    use std::os::unix::net::UnixListener;

    fn server(answers: Vec<String>) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = StdReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, r#"{{"QMP": {{}}}}"#).unwrap();
            for answer in answers {
                if lines.next().is_none() || stream.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        });
        (dir, path)
    }

    #[tokio::test]
    async fn events_between_command_and_answer_are_kept() {
        let (_dir, path) = server(vec![
            "{\"return\": {}, \"id\": 1}\n".into(),
            "{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n{\"return\": 7, \"id\": 2}\n".into(),
            "{\"error\": {\"desc\": \"no\"}, \"id\": 3}\n".into(),
        ]);
        let mut qmp = Qmp::connect(&path).await.unwrap();
        assert_eq!(qmp.command("x", json!({"a": 1})).await.unwrap(), json!(7));
        assert_eq!(qmp.event().await.unwrap().name, "RESET");
        let error = qmp.command("y", Value::Null).await.unwrap_err().to_string();
        assert!(error.contains("y: no"), "{error}");
        assert!(qmp.event().await.is_err(), "the end of the connection is an error");
    }

    #[tokio::test]
    async fn an_endless_line_is_cut() {
        let (_dir, path) = server(vec!["x".repeat(3 << 20)]);
        let error = Qmp::connect(&path).await.unwrap_err().to_string();
        assert!(error.contains("endless"), "{error}");
    }
}
