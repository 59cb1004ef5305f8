//! What the world's servers saw: one JSON object a line, written by the servers, read by whoever wants to know whether
//! a secret, a placeholder or anything at all came out there.

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// The writing side, in the servers' process.
#[derive(Clone)]
pub struct Writer(Arc<Mutex<File>>);

impl Writer {
    /// Opens the journal for appending.
    pub fn open(file: &Path) -> Result<Self> {
        let open = OpenOptions::new().create(true).append(true).open(file);
        Ok(Self(Arc::new(Mutex::new(open.context("the journal cannot be opened")?))))
    }

    /// Adds an entry.
    pub fn note(&self, entry: &Value) {
        let mut line = entry.to_string();
        line.push('\n');
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // One write call a line, so that a reader never sees half of one.
        if let Err(error) = file.write_all(line.as_bytes()) {
            eprintln!("the journal cannot be written: {error}");
        }
    }
}

/// The reading side.
#[derive(Clone, Debug)]
pub struct Journal {
    file: PathBuf,
    from: u64,
}

impl Journal {
    /// The journal in this file, from its beginning.
    pub fn new(file: PathBuf) -> Self {
        Self { file, from: 0 }
    }

    /// The journal from now on.
    pub fn mark(&self) -> Self {
        let from = self.file.metadata().map_or(0, |meta| meta.len());
        Self { file: self.file.clone(), from }
    }

    /// Every entry.
    pub fn entries(&self) -> Result<Vec<Value>> {
        let mut file = File::open(&self.file).context("the journal cannot be read")?;
        file.seek(SeekFrom::Start(self.from))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        text.lines()
            .map(|line| serde_json::from_str(line).context("a line of the journal is no JSON"))
            .collect()
    }

    /// Entries of this kind (`dns`, `http`, `tcp`, `tls`, `udp`).
    pub fn of(&self, kind: &str) -> Result<Vec<Value>> {
        Ok(self.entries()?.into_iter().filter(|entry| entry["kind"] == kind).collect())
    }

    /// Entries of HTTP requests that the site with this name received.
    pub fn http(&self, site: &str) -> Result<Vec<Value>> {
        Ok(self.of("http")?.into_iter().filter(|entry| entry["site"] == site).collect())
    }

    /// Entries in which the text stands anywhere, decoded credentials included.
    pub fn mentioning(&self, text: &str) -> Result<Vec<Value>> {
        Ok(self.entries()?.into_iter().filter(|entry| entry.to_string().contains(text)).collect())
    }
}
