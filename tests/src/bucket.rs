//! A real S3 server (moto, from PyPI) on the daemon's host, with one bucket. Asked by curl, as anybody could.

use crate::{World, sh};
use anyhow::{Context as _, Result, bail};
use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

const ADDRESS: &str = "127.0.0.1:9100";
const BUCKET: &str = "snaps";
/// The credentials that the daemon is given; the secret half must be seen nowhere.
pub const SECRET: &str = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY";

/// The running server.
pub struct Bucket<'world> {
    world: &'world World,
    child: Child,
}

/// Where set-up puts it.
const PROGRAM: &str = "/usr/local/tapgate-tools/s3/bin/moto_server";

impl<'world> Bucket<'world> {
    /// Starts it.
    pub fn start(world: &'world World) -> Result<Self> {
        if !Path::new(PROGRAM).is_file() {
            bail!("{PROGRAM} is not installed; `cargo xtask setup` brings it");
        }
        let log = File::create(world.folder().join("moto.log"))?;
        let (host, port) = ADDRESS.split_once(':').context("no port")?;
        let mut command = world.on_host(PROGRAM);
        command.args(["-H", host, "-p", port]).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let bucket = Self { world, child: command.spawn()? };
        for _ in 0..300 {
            if bucket.curl(&["-X", "PUT"], "").is_ok_and(|(status, _)| status == 200) {
                return Ok(bucket);
            }
            thread::sleep(Duration::from_millis(200));
        }
        bail!("the S3 server does not answer; see {}", world.folder().join("moto.log").display())
    }

    /// The lines of configuration that lead to it.
    pub fn lines(&self) -> String {
        format!(
            "snapshot_store = \"s3://{BUCKET}/one/two\"\ns3_endpoint = \"http://{ADDRESS}\"\ns3_region = \"us-east-1\"\n"
        )
    }

    /// The variables that open it.
    pub fn environment() -> [(&'static str, &'static str); 2] {
        [("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", SECRET)]
    }

    fn curl(&self, arguments: &[&str], path: &str) -> Result<(u16, String)> {
        let mut curl = self.world.on_host("curl");
        curl.args(["-sS", "--noproxy", "*", "-m", "60", "-w", "\n%{http_code}"]).args(arguments);
        let done = sh::expect(curl.arg(format!("http://{ADDRESS}/{BUCKET}{path}")), b"")?;
        let (body, status) = done.rsplit_once('\n').context("curl wrote no status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// The keys that are there.
    pub fn keys(&self) -> Result<Vec<String>> {
        Ok(between(&self.curl(&[], "?list-type=2")?.1, "Key"))
    }

    /// Uploads that were begun and neither ended nor taken back.
    pub fn open_uploads(&self) -> Result<Vec<String>> {
        Ok(between(&self.curl(&[], "?uploads")?.1, "UploadId"))
    }

    /// Copies an object into a file.
    pub fn fetch(&self, key: &str, file: &Path) -> Result<()> {
        let name = file.to_str().context("a path that is text")?;
        let (status, said) = self.curl(&["-o", name], &format!("/{key}"))?;
        anyhow::ensure!(status == 200, "{key}: {status} {said}");
        Ok(())
    }

    /// Puts another object in the place of one: the same size, one octet changed.
    pub fn tamper(&self, key: &str) -> Result<()> {
        let file = self.world.folder().join("object");
        let name = file.to_str().context("a path that is text")?;
        self.fetch(key, &file)?;
        let mut octets = std::fs::read(&file)?;
        let middle = octets.len() / 2;
        octets[middle] ^= 1;
        std::fs::write(&file, octets)?;
        let (status, said) = self.curl(&["-T", name], &format!("/{key}"))?;
        anyhow::ensure!(status == 200, "{said}");
        Ok(std::fs::remove_file(Path::new(name))?)
    }
}

fn between(text: &str, tag: &str) -> Vec<String> {
    let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
    text.split(&open).skip(1).filter_map(|rest| rest.split(&close).next()).map(str::to_owned).collect()
}

impl Drop for Bucket<'_> {
    fn drop(&mut self) {
        // nsenter became the server: it is the child itself.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}
