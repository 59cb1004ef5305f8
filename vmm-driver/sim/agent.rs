//! The vsock device with a guest's agent behind it: `CONNECT port`, then QEMU's guest agent protocol.

use crate::Machine;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixListener;

pub fn listen(path: &str, machine: Arc<Machine>) {
    let listener = UnixListener::bind(path).unwrap_or_else(|e| crate::refuse(&format!("{path}: {e}")));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let machine = machine.clone();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = Vec::new();
                stream.read_until(b'\n', &mut line).await.unwrap();
                if line != b"CONNECT 777\n" {
                    return;
                }
                stream.write_all(b"OK 1073741824\n").await.unwrap();
                let mut frozen = 0;
                loop {
                    let mut line = Vec::new();
                    if stream.read_until(b'\n', &mut line).await.unwrap_or(0) == 0 {
                        return;
                    }
                    let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at + 1);
                    let request: Value = serde_json::from_slice(&line[start..]).unwrap();
                    let answer = match request["execute"].as_str().unwrap() {
                        "guest-sync" => request["arguments"]["id"].clone(),
                        "guest-tapgate-sync" => json!(1),
                        "guest-fsfreeze-freeze" if !crate::wishes::freezes() => json!(0),
                        "guest-fsfreeze-freeze" => {
                            frozen = 1;
                            json!(1)
                        }
                        "guest-fsfreeze-thaw" => json!(std::mem::take(&mut frozen)),
                        "guest-shutdown" => {
                            machine.power_off();
                            continue;
                        }
                        other => panic!("{other}"),
                    };
                    stream.write_all(format!("{}\n", json!({"return": answer})).as_bytes()).await.unwrap();
                }
            });
        }
    });
}
