//! Programs that come from PyPI: a virtual environment of their own beside the other tools, with their commands linked to
//! where those are looked for. Nothing of the system's Python is touched.

use super::{Machine, SHARED, tool, tool_root};
use crate::run::{program, run, shown};
use anyhow::{Context as _, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

struct Tool {
    /// The command.
    name: &'static str,
    /// What brings it.
    package: &'static str,
    version: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool { name: "aiosmtpd", package: "aiosmtpd", version: "1.4.6" },
    Tool { name: "st", package: "schemathesis", version: "4.32.5" },
];

/// Installs what is missing; what one has to do by hand, if anything.
pub fn install(machine: &Machine, check: bool) -> Result<Option<String>> {
    let missing: Vec<&Tool> = TOOLS.iter().filter(|wanted| tool(wanted.name).is_none()).collect();
    let Some(home) = folder(machine).filter(|_| !missing.is_empty()) else { return Ok(None) };
    let venv = home.join("python");
    let mut make = program("python3");
    make.args(["-m", "venv"]).arg(&venv);
    let mut fill = program(venv.join("bin/python"));
    fill.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
    fill.args(missing.iter().map(|wanted| format!("{}=={}", wanted.package, wanted.version)));
    if check {
        return Ok(Some(format!("{} && {}", shown(&make), shown(&fill))));
    }
    if !venv.join("bin/python").exists() {
        run(&mut make)?;
    }
    run(&mut fill)?;
    let bin = home.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("{} cannot be made", bin.display()))?;
    for wanted in missing {
        link(&venv.join("bin").join(wanted.name), &bin.join(wanted.name))?;
    }
    Ok(None)
}

/// Where the other tools are: root's in the shared folder, anyone else's with cargo's.
fn folder(machine: &Machine) -> Option<PathBuf> {
    match tool_root(machine) {
        Some(_) => Some(PathBuf::from(SHARED)),
        None => super::tool_folders().into_iter().nth(1)?.parent().map(Path::to_path_buf),
    }
}

fn link(from: &Path, to: &Path) -> Result<()> {
    // One that leads nowhere: the environment was removed.
    if to.symlink_metadata().is_ok() {
        fs::remove_file(to).with_context(|| format!("{} cannot be replaced", to.display()))?;
    }
    std::os::unix::fs::symlink(from, to).with_context(|| format!("{} cannot be made", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_leads_nowhere_is_replaced() {
        let folder = std::env::temp_dir().join(format!("tapgate-python-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (old, new, link_at) = (folder.join("old"), folder.join("new"), folder.join("link"));
        fs::write(&new, "new").unwrap();
        link(&old, &link_at).unwrap();
        link(&new, &link_at).unwrap();
        assert_eq!(fs::read_to_string(&link_at).unwrap(), "new");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn each_user_has_a_place() {
        for root in [true, false] {
            let machine = Machine { root, sudo: false, apt: false };
            assert!(folder(&machine).is_some_and(|folder| folder.is_absolute()));
        }
    }
}
