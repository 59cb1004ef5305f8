//! Writes the files of `write_files`: whole, atomically, with their permissions from the first byte on.

use serde_json::Value;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Writes every entry; says all that failed.
pub fn apply(user: &Value) -> Result<(), String> {
    let entries = user.get("write_files").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let failures: Vec<String> = entries.iter().filter_map(|entry| write_entry(entry).err()).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

fn write_entry(entry: &Value) -> Result<(), String> {
    let path = entry.get("path").and_then(Value::as_str).ok_or("a file without path")?;
    let content =
        entry.get("content").and_then(Value::as_str).ok_or_else(|| format!("{path}: no content"))?;
    if !path.starts_with('/') || entry.get("encoding").is_some() {
        return Err(format!("{path}: only absolute paths and plain text are understood"));
    }
    let mode = match entry.get("permissions").and_then(Value::as_str) {
        Some(text) => {
            u32::from_str_radix(text, 8).map_err(|_| format!("{path}: permissions {text} are not octal"))?
        }
        None => 0o644,
    };
    write(Path::new(path), content.as_bytes(), mode & 0o7777)
}

/// Replaces the file by a rename, so that a reader sees the old or the new one. Unchanged content is left alone.
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), String> {
    let error = |e: std::io::Error| format!("{}: {e}", path.display());
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        fs::create_dir_all(parent).map_err(error)?;
        if mode & 0o077 == 0 {
            fs::set_permissions(parent, fs::Permissions::from_mode(0o700)).map_err(error)?;
        }
    }
    if fs::read(path).is_ok_and(|old| old == content) {
        return fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(error);
    }
    let mut name = path.file_name().ok_or_else(|| format!("{}: not a file", path.display()))?.to_owned();
    name.push(".tapgate-new");
    let temporary = path.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(error)?;
    file.write_all(content).map_err(error)?;
    // The umask may have taken bits away.
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(error)?;
    fs::rename(&temporary, path).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn files_arrive_whole_with_their_mode() {
        let dir = std::env::temp_dir().join(format!("tapgate-agent-files-{}", std::process::id()));
        let path = dir.join("deep/er/file");
        let text = "a'\"$(reboot)`x`\n\u{e9}";
        let user = json!({"write_files": [{"path": path, "content": text, "permissions": "0600"}]});
        apply(&user).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(apply(&json!({"write_files": [{"path": "relative", "content": ""}]})).is_err());
        assert!(
            apply(&json!({"write_files": [{"path": path, "content": "", "permissions": "rw"}]})).is_err()
        );
        fs::remove_dir_all(dir).unwrap();
    }
}
