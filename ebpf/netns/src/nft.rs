//! Loads a generated nftables table by `nft -f -`: one transaction, so never half a table.

use crate::{Netns, NetnsError};
use std::{
    io::{self, Write as _},
    process::{Command, Output, Stdio},
};

/// Most of `nft`'s complaint that is kept for the error.
const MAX_COMPLAINT: usize = 600;

/// Runs the script inside the namespace. All of it takes effect or nothing.
pub fn load(netns: &Netns, script: &str) -> Result<(), NetnsError> {
    let output = netns.run(|| run(&["-f", "-"], script))?.map_err(NetnsError::NoNft)?;
    check(&output).map(drop)
}

/// The output of `nft` with these arguments inside the namespace.
pub fn query(netns: &Netns, arguments: &[&str]) -> Result<String, NetnsError> {
    let output = netns.run(|| run(arguments, ""))?.map_err(NetnsError::NoNft)?;
    check(&output)
}

/// Removes a table, if it is there. `table` is family and name: `inet tapgate_main`.
pub fn delete_table(netns: &Netns, table: &str) -> Result<(), NetnsError> {
    // Declaring it first makes the deletion succeed whether it was there or not.
    load(netns, &format!("table {table} {{\n}}\ndelete table {table}\n"))
}

fn run(arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that died early shows in its status; a broken pipe says nothing more.
        match stdin.write_all(input.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    child.wait_with_output()
}

fn check(output: &Output) -> Result<String, NetnsError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint: String = String::from_utf8_lossy(&output.stderr).chars().take(MAX_COMPLAINT).collect();
    Err(NetnsError::Nft(complaint.trim().to_owned()))
}
