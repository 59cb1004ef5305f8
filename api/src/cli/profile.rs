//! What `tapgate login` keeps: one file, readable by its owner alone.

use super::exit::{Done, Exit, Failure};
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

/// The kept connection.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    pub(super) api_url: Option<String>,
    pub(super) api_key: Option<String>,
}

/// The client's folder: `$XDG_CONFIG_HOME/tapgate` or `~/.config/tapgate`.
pub(super) fn folder() -> Done<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
    let base = base.ok_or_else(|| Failure::new(Exit::Other, "neither HOME nor XDG_CONFIG_HOME is set"))?;
    Ok(base.join("tapgate"))
}

/// Makes the folder, private.
pub(super) fn make_folder() -> Done<PathBuf> {
    let folder = folder()?;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    Ok(folder)
}

impl Profile {
    fn path() -> Done<PathBuf> {
        Ok(folder()?.join("client.toml"))
    }

    /// Reads the file; an absent one is an empty profile.
    pub(super) fn load() -> Done<Self> {
        let Ok(path) = Self::path() else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Failure::new(Exit::Other, format!("{}: {error}", path.display()))),
        };
        if std::fs::metadata(&path)?.mode() & 0o077 != 0 {
            let message = format!("{0} is readable by others; run `chmod 600 {0}`", path.display());
            return Err(Failure::new(Exit::Other, message));
        }
        toml::from_str(&text)
            .map_err(|error| Failure::new(Exit::Other, format!("{}: {}", path.display(), error.message())))
    }

    /// Writes the file anew, whole or not at all.
    pub(super) fn save(&self) -> Done<PathBuf> {
        let path = Self::path()?;
        let beside = make_folder()?.join(format!(".client.{}", std::process::id()));
        let text = toml::to_string(self).map_err(|error| Failure::new(Exit::Other, error.to_string()))?;
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)?;
        Ok(path)
    }
}
