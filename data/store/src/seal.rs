//! Sealing at rest: AES-256-GCM with random nonces, each blob bound to its table and row.
//!
//! The keys are in a file of their own, never in the database: lines of `seal` and 64 hexadecimal digits (the first
//! seals, all open, so that a key can be changed without a moment in which nothing opens), and one of `mac`, which
//! authenticates cursors, tickets and the audit log. A blob moved to another row does not open.

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::{digest, hmac};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

const VERSION: u8 = 1;
const KEY_ID: usize = 4;
const NONCE: usize = 12;
const KEY: usize = 32;
/// How much longer a sealed value is than the value: what is in front of it, and the tag (16).
pub(crate) const OVERHEAD: i64 = 1 + KEY_ID as i64 + NONCE as i64 + 16;

/// Why a key file or a sealed value cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The file cannot be read or made.
    #[error("cannot use the key file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others than its owner may read it.
    #[error("the key file {0} is readable by others; run `chmod 600` on it")]
    Exposed(PathBuf),
    /// It holds no keys.
    #[error(
        "the key file {0} does not hold lines of `seal` or `mac` and 64 hexadecimal digits; restore it from a backup"
    )]
    Malformed(PathBuf),
    /// The database was sealed by another key.
    #[error("the key file does not fit this database; restore the key file that was made with it")]
    WrongKey,
    /// The value was changed or belongs to another row.
    #[error("a sealed value of the database does not open: it was changed outside of tapgate")]
    Broken,
    /// The cryptographic library refused.
    #[error("the cryptographic library failed")]
    Crypto,
}

struct One {
    id: [u8; KEY_ID],
    aead: RandomizedNonceKey,
    raw: Zeroizing<[u8; KEY]>,
}

struct Keys {
    seal: Vec<One>,
    mac: Zeroizing<[u8; KEY]>,
}

/// The keys that seal and open. Cheap to clone; shows nothing in `Debug`.
#[derive(Clone)]
pub struct SealKey(Arc<Keys>);

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey(..)")
    }
}

impl SealKey {
    /// Reads the key file, or makes it (mode 0600, a fresh random key) if there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, SealError> {
        match fs::metadata(path) {
            Ok(_) => Self::load(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write(path, &[fresh()?], &fresh()?, false)
                    .map_err(|source| SealError::File { path: path.into(), source })?;
                Self::load(path)
            }
            Err(source) => Err(SealError::File { path: path.into(), source }),
        }
    }

    /// Reads the key file.
    pub fn load(path: &Path) -> Result<Self, SealError> {
        let file = |source| SealError::File { path: path.into(), source };
        if fs::metadata(path).map_err(file)?.mode() & 0o077 != 0 {
            return Err(SealError::Exposed(path.into()));
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(file)?);
        let malformed = || SealError::Malformed(path.into());
        let (mut seal, mut mac) = (Vec::new(), None);
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let (kind, digits) = line.split_once(' ').ok_or_else(malformed)?;
            let key = parse_hex(digits).ok_or_else(malformed)?;
            match kind {
                "seal" => seal.push(One::new(key)?),
                "mac" if mac.is_none() => mac = Some(key),
                _ => return Err(malformed()),
            }
        }
        match mac {
            Some(mac) if !seal.is_empty() => Ok(Self(Arc::new(Keys { seal, mac }))),
            _ => Err(malformed()),
        }
    }

    /// Puts a fresh key before the others in the file, and reads the file again.
    pub(crate) fn add_fresh(path: &Path) -> Result<Self, SealError> {
        let old = Self::load(path)?;
        let mut keys = vec![fresh()?];
        keys.extend(old.0.seal.iter().map(|key| key.raw.clone()));
        write(path, &keys, &old.0.mac, true)
            .map_err(|source| SealError::File { path: path.into(), source })?;
        Self::load(path)
    }

    /// Takes all keys but the first out of the file.
    pub(crate) fn drop_old(path: &Path) -> Result<Self, SealError> {
        let old = Self::load(path)?;
        let first: Vec<_> = old.0.seal.iter().take(1).map(|key| key.raw.clone()).collect();
        write(path, &first, &old.0.mac, true)
            .map_err(|source| SealError::File { path: path.into(), source })?;
        Self::load(path)
    }

    /// Seals a value for one row of one table.
    pub(crate) fn seal(&self, table: &str, row: &str, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let key = self.0.seal.first().ok_or(SealError::Crypto)?;
        let mut text = plain.to_vec();
        let nonce = key
            .aead
            .seal_in_place_append_tag(Aad::from(aad(table, row)), &mut text)
            .map_err(|_| SealError::Crypto)?;
        let mut blob = Vec::with_capacity(1 + KEY_ID + NONCE + text.len());
        blob.push(VERSION);
        blob.extend_from_slice(&key.id);
        blob.extend_from_slice(nonce.as_ref());
        blob.append(&mut text);
        Ok(blob)
    }

    /// Opens what [`Self::seal`] made for the same row.
    pub(crate) fn open(&self, table: &str, row: &str, blob: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (head, text) = blob.split_at_checked(1 + KEY_ID + NONCE).ok_or(SealError::Broken)?;
        if head[0] != VERSION {
            return Err(SealError::Broken);
        }
        let key = self.0.seal.iter().find(|key| key.id == head[1..=KEY_ID]).ok_or(SealError::WrongKey)?;
        let nonce = Nonce::try_assume_unique_for_key(&head[1 + KEY_ID..]).map_err(|_| SealError::Broken)?;
        let mut text = Zeroizing::new(text.to_vec());
        let length = key
            .aead
            .open_in_place(nonce, Aad::from(aad(table, row)), &mut text)
            .map_err(|_| SealError::Broken)?
            .len();
        text.truncate(length);
        Ok(text)
    }

    /// A key for authenticating something else than sealed values; it stays the same when the sealing key changes.
    pub(crate) fn derive(&self, purpose: &str) -> hmac::Key {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &self.0.mac[..]), purpose.as_bytes());
        hmac::Key::new(hmac::HMAC_SHA256, tag.as_ref())
    }
}

impl One {
    fn new(raw: Zeroizing<[u8; KEY]>) -> Result<Self, SealError> {
        let hash = digest::digest(&digest::SHA256, &raw[..]);
        let mut id = [0; KEY_ID];
        id.copy_from_slice(&hash.as_ref()[..KEY_ID]);
        let aead = RandomizedNonceKey::new(&AES_256_GCM, &raw[..]).map_err(|_| SealError::Crypto)?;
        Ok(Self { id, aead, raw })
    }
}

fn fresh() -> Result<Zeroizing<[u8; KEY]>, SealError> {
    let mut key = Zeroizing::new([0u8; KEY]);
    random(&mut key[..])?;
    Ok(key)
}

/// Bytes from the system's generator.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), SealError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| SealError::Crypto)
}

fn aad(table: &str, row: &str) -> Vec<u8> {
    [table.as_bytes(), b"\0", row.as_bytes()].concat()
}

fn parse_hex(line: &str) -> Option<Zeroizing<[u8; KEY]>> {
    let line = line.trim().as_bytes();
    let mut key = Zeroizing::new([0u8; KEY]);
    if line.len() != 2 * KEY {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(line.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(key)
}

/// Writes beside, syncs, then moves into place: a crash leaves a whole file or the one before. Unless told to replace,
/// it never does.
fn write(
    path: &Path,
    seal: &[Zeroizing<[u8; KEY]>],
    mac: &Zeroizing<[u8; KEY]>,
    replace: bool,
) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = folder.join(format!(".{}.new", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    let mut text = Zeroizing::new(String::with_capacity((seal.len() + 1) * (2 * KEY + 8)));
    for (kind, key) in seal.iter().map(|key| ("seal", key)).chain([("mac", mac)]) {
        text.push_str(kind);
        text.push(' ');
        for byte in key.iter() {
            text.extend(
                [byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0')),
            );
        }
        text.push('\n');
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    if replace {
        fs::rename(&beside, path)?;
    } else {
        let linked = fs::hard_link(&beside, path);
        fs::remove_file(&beside)?;
        match linked {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_blob_opens_in_its_row_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        let key = SealKey::load_or_create(&path).unwrap();
        let blob = key.seal("secrets", "sec_a", b"hunter2").unwrap();
        assert!(!blob.windows(7).any(|w| w == b"hunter2"));
        let again = SealKey::load_or_create(&path).unwrap();
        assert_eq!(&again.open("secrets", "sec_a", &blob).unwrap()[..], b"hunter2");
        assert!(matches!(key.open("secrets", "sec_b", &blob), Err(SealError::Broken)));
        assert!(matches!(key.open("env", "sec_a", &blob), Err(SealError::Broken)));
        for i in 0..blob.len() {
            let mut changed = blob.clone();
            changed[i] ^= 1;
            assert!(key.open("secrets", "sec_a", &changed).is_err(), "byte {i}");
        }
        assert!(key.open("secrets", "sec_a", &blob[..10]).is_err());
    }

    #[test]
    fn a_readable_or_broken_key_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        SealKey::load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(SealKey::load(&path), Err(SealError::Exposed(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "abc").unwrap();
        assert!(matches!(SealKey::load_or_create(&path), Err(SealError::Malformed(_))));
    }
}
