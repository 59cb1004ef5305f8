//! Keeps services that Debian packages bring from being started while we install, and from starting at the next
//! boot. Takes back what it put in place; a policy that the machine has already is left alone.

use crate::run::{find, output, program};
use anyhow::{Context as _, Result};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// What `invoke-rc.d` asks before it starts anything.
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// 101: the action is forbidden.
const FORBID: &str =
    "#!/bin/sh\n# While `cargo xtask setup` installs packages, none of their services starts.\nexit 101\n";
/// Services that the packages of the table bring and enable.
const SERVICES: &[&str] = &["ssh.service", "ssh.socket", "haproxy.service", "squid.service", "nginx.service"];

/// While it lives no package starts a service.
pub struct Guard {
    ours: Option<PathBuf>,
    fresh: Vec<&'static str>,
}

impl Guard {
    /// Forbids starting services, unless a policy is there already.
    pub fn hold() -> Result<Self> {
        let fresh = SERVICES.iter().copied().filter(|service| !is_known(service)).collect();
        Ok(Self { ours: forbid(Path::new(POLICY))?, fresh })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        for service in self.fresh.iter().filter(|service| is_known(service)) {
            if output(program("systemctl").args(["disable", service])).is_none() {
                eprintln!("could not disable {service}; if it is not wanted: systemctl disable {service}");
            }
        }
        if let Some(file) = &self.ours {
            let _ = fs::remove_file(file);
        }
    }
}

/// Puts the policy in place; `None` if there is one, which is not ours to change.
fn forbid(file: &Path) -> Result<Option<PathBuf>> {
    if file.exists() {
        return Ok(None);
    }
    let unwritable = || format!("{} cannot be written", file.display());
    fs::write(file, FORBID).with_context(unwritable)?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).with_context(unwritable)?;
    Ok(Some(file.to_path_buf()))
}

fn is_known(service: &str) -> bool {
    find("systemctl").is_some()
        && output(program("systemctl").args(["list-unit-files", "--no-legend", service]))
            .is_some_and(|text| text.contains(service))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_the_machine_is_left_alone_and_ours_is_taken_back() {
        let folder = std::env::temp_dir().join(format!("tapgate-policy-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("policy-rc.d");
        let guard = Guard { ours: forbid(&file).unwrap(), fresh: Vec::new() };
        assert!(crate::run::is_executable(&file));
        assert_eq!(forbid(&file).unwrap(), None);
        drop(guard);
        assert!(!file.exists());
        fs::write(&file, "theirs").unwrap();
        drop(Guard { ours: forbid(&file).unwrap(), fresh: Vec::new() });
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
        fs::remove_dir_all(&folder).unwrap();
    }
}
