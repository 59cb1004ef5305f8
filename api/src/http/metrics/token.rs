//! The token that `/metrics` asks for: a file that root alone may read, made at the first start. Whoever may read it may read
//! everything else here too.

use sha2::{Digest as _, Sha256};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The token's hash: what is compared, so that neither time nor memory tells the token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token([u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// The token with this text.
    pub fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    /// Reads the file, or makes it (mode 0600) if there is none.
    ///
    /// # Errors
    /// The file cannot be read or made, is readable by others, or holds too little to be a token.
    pub fn load_or_create(path: &Path) -> io::Result<Self> {
        match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                file.write_all(format!("{}\n", fresh()).as_bytes())?;
                file.sync_all()?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        if std::fs::metadata(path)?.mode() & 0o077 != 0 {
            return Err(io::Error::other("it is readable by others; run `chmod 600` on it"));
        }
        let text = std::fs::read_to_string(path)?;
        if text.trim().len() < 32 {
            return Err(io::Error::other("it holds no token; remove it, and the next start makes another"));
        }
        Ok(Self::of(text.trim()))
    }
}

/// 256 random bits as hexadecimal digits.
fn fresh() -> String {
    format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_token_is_made_once_and_kept_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.token");
        let first = Token::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Token::load_or_create(&path).unwrap(), first);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(Token::of(text.trim()), first);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Token::load_or_create(&path).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "\n").unwrap();
        assert!(Token::load_or_create(&path).is_err(), "an empty file is no token");
    }
}
