//! Installing Debian packages: what to run, and running it. Backports are added only where the plain package would
//! conflict, from the mirror that the machine itself uses; no host name is written here.

use super::{Machine, services};
use crate::run::{output, program, run};
use anyhow::{Context as _, Result, bail};
use std::{fs, process::Command};

/// What to do about missing packages.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// We may and shall install them.
    Install,
    /// We may with sudo.
    Sudo,
    /// We may not; this is what to run.
    Tell(String),
}

/// Decides from what the machine is.
pub fn decide(machine: &Machine, check: bool, packages: &[&str]) -> Decision {
    let list = packages.join(" ");
    if !machine.apt {
        return Decision::Tell(format!(
            "install with this system's own package manager what Debian calls: {list}"
        ));
    }
    if !check && machine.root {
        return Decision::Install;
    }
    if !check && machine.sudo {
        return Decision::Sudo;
    }
    let sudo = if machine.root { "" } else { "sudo " };
    Decision::Tell(format!("{sudo}apt-get update && {sudo}apt-get install --no-install-recommends {list}"))
}

/// Installs the packages; services that come with them are not started.
pub fn install(packages: &[&str]) -> Result<()> {
    run(apt().arg("update"))?;
    let _guard = services::Guard::hold()?;
    let (held, plain): (Vec<&str>, Vec<&str>) = packages.iter().partition(|package| conflicts(package));
    if !plain.is_empty() {
        run(apt().args(INSTALL).args(&plain))?;
    }
    if !held.is_empty() {
        let suite = backports()?;
        run(apt().args(INSTALL).args(["-t", &suite]).args(&held))?;
    }
    Ok(())
}

/// Nothing that the machine has is taken away from it.
const INSTALL: [&str; 4] = ["install", "--yes", "--no-install-recommends", "--no-remove"];

fn apt() -> Command {
    let mut command = program("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Whether apt cannot install the package next to what is installed: `qemu-utils` from backports, for one, keeps
/// out the `qemu-system-x86` of the release. Without `--no-remove` apt would offer to take the former away.
fn conflicts(package: &str) -> bool {
    output(apt().arg("--simulate").args(INSTALL).arg(package)).is_none()
}

/// The name of the backports suite, made available if it is not yet.
fn backports() -> Result<String> {
    let targets = targets()?;
    let main =
        release(&targets).context("apt's configuration names no Debian release with a `main` component")?;
    let suite = format!("{}-backports", main.suite);
    if !targets.iter().any(|target| target.suite == suite) {
        let file = format!("/etc/apt/sources.list.d/{suite}.sources");
        fs::write(&file, source(&main.mirror, &suite))
            .with_context(|| format!("{file} cannot be written"))?;
        eprintln!("added {file}: {suite} from this machine's own mirror");
        run(apt().arg("update"))?;
    }
    Ok(suite)
}

/// One source of packages that apt is configured with.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    mirror: String,
    suite: String,
    component: String,
    origin: String,
}

fn targets() -> Result<Vec<Target>> {
    let format = "$(REPO_URI)|$(CODENAME)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(LABEL)";
    let text = output(program("apt-get").args(["indextargets", "--format", format, "Identifier: Packages"]));
    let Some(text) = text else { bail!("`apt-get indextargets` failed; is apt's configuration in order?") };
    Ok(parse(&text))
}

fn parse(text: &str) -> Vec<Target> {
    let target = |line: &str| {
        let mut fields = line.split('|').map(str::to_owned);
        let (mirror, _codename, suite) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Target { mirror, suite, component: fields.next()?, origin: fields.next()? })
    };
    text.lines().filter_map(target).collect()
}

/// The Debian release itself: the one whose name no other suite's is a prefix of.
fn release(targets: &[Target]) -> Option<Target> {
    let debian = targets.iter().filter(|target| target.origin == "Debian" && target.component == "main");
    debian.min_by_key(|target| target.suite.len()).cloned()
}

fn source(mirror: &str, suite: &str) -> String {
    let key = "/usr/share/keyrings/debian-archive-keyring.gpg";
    format!("Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {key}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "http://mirror.example/debian/|bookworm-updates|bookworm-updates|main|Debian|Debian\n\
        http://mirror.example/debian/|bookworm|bookworm|main|Debian|Debian\n\
        http://mirror.example/security/|bookworm-security|bookworm-security|main|Debian|Debian-Security\n\
        https://other.example/|x|x|main|Other|Other\n";

    #[test]
    fn the_mirror_is_the_machines_own() {
        let release = release(&parse(TARGETS)).unwrap();
        assert_eq!(
            (release.suite.as_str(), release.mirror.as_str()),
            ("bookworm", "http://mirror.example/debian/")
        );
        let file = source(&release.mirror, "bookworm-backports");
        assert!(file.contains("URIs: http://mirror.example/debian/\nSuites: bookworm-backports\n"), "{file}");
    }

    #[test]
    fn no_release_is_found_where_apt_knows_none() {
        assert_eq!(release(&parse("https://other.example/|x|x|main|Other|Other\nrubbish\n")), None);
    }

    #[test]
    fn only_root_with_apt_installs() {
        let decide = |root, apt, check| {
            decide(&Machine { root, apt, sudo: false }, check, &["qemu-system-x86", "git"])
        };
        assert_eq!(decide(true, true, false), Decision::Install);
        let Decision::Tell(text) = decide(false, true, false) else { panic!("a user must not install") };
        assert!(text.contains("sudo apt-get install --no-install-recommends qemu-system-x86 git"), "{text}");
        let Decision::Tell(text) = decide(true, true, true) else { panic!("--check must not install") };
        assert!(text.contains("apt-get install") && !text.contains("sudo"), "{text}");
        let Decision::Tell(text) = decide(true, false, false) else {
            panic!("without apt nothing is installed")
        };
        assert!(text.contains("qemu-system-x86 git"), "{text}");
    }

    #[test]
    fn sudo_is_used_where_it_can_be() {
        let machine = Machine { root: false, sudo: true, apt: true };
        assert_eq!(decide(&machine, false, &["git"]), Decision::Sudo);
        assert!(matches!(decide(&machine, true, &["git"]), Decision::Tell(_)));
        assert!(matches!(decide(&Machine { apt: false, ..machine }, false, &["git"]), Decision::Tell(_)));
    }
}
