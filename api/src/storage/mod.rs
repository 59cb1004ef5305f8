//! Where snapshots' bytes are: a local folder or an S3-compatible bucket. Puts, fetches and removes single objects by key.
//!
//! An object has its name only once it is whole, and is used only after its hash was found to be the recorded one. A caller that
//! gives up leaves no half of one. Never holds more of an object in memory than a few parts, and never writes a credential anywhere.

mod pack;
mod place;

pub use place::Place;

use object_store::{
    MultipartUpload as _, ObjectStore, ObjectStoreExt as _, PutPayload,
    aws::AmazonS3,
    local::LocalFileSystem,
    multipart::{MultipartStore as _, PartId},
    path::Path as Key,
};
use pack::{Hasher, Parts};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tapgate_vmm::turn;
use tokio::io::AsyncWriteExt as _;

/// What the names of snapshots begin with; in a folder, a folder that nobody else may enter.
pub const FOLDER: &str = "snapshots";

/// What one read of an object asks for.
const RANGE: u64 = 8 << 20;

/// Why an object could not be stored or had again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The store does not do what it is asked.
    #[error("the snapshot store failed: {0}")]
    Store(#[from] object_store::Error),
    /// A local file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The object is not what was stored.
    #[error("the stored snapshot was changed or damaged ({0}); it is not used")]
    Changed(String),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> StorageError {
    move |source| StorageError::Io { what, source }
}

/// What is known of a stored object: what it is checked against when it comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of its octets as they are stored, in hexadecimal.
    pub sha256: String,
    /// How many those are.
    pub stored_bytes: u64,
    /// How many the file has that it was made from.
    pub file_bytes: u64,
}

#[derive(Clone, Debug)]
enum Backend {
    Folder(Arc<LocalFileSystem>, PathBuf),
    Bucket(Arc<AmazonS3>, String),
}

/// The store.
#[derive(Clone, Debug)]
pub struct Storage(Backend);

impl Storage {
    /// Opens the place; a bucket is not asked yet.
    ///
    /// # Errors
    /// A folder that cannot be made, or settings that make no sense.
    pub fn open(place: &Place) -> Result<Self, StorageError> {
        match place {
            Place::Folder(folder) => {
                use std::os::unix::fs::DirBuilderExt as _;
                let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder.join(FOLDER));
                made.map_err(failed("cannot make the snapshots' folder"))?;
                // As with a bucket, what was stored stays: the copy that it was made from goes next.
                let store =
                    LocalFileSystem::new_with_prefix(folder)?.with_automatic_cleanup(false).with_fsync(true);
                Ok(Self(Backend::Folder(Arc::new(store), folder.clone())))
            }
            Place::Bucket(bucket) => {
                Ok(Self(Backend::Bucket(Arc::new(bucket.open()?), bucket.prefix.clone())))
            }
        }
    }

    fn key(&self, name: &str) -> Key {
        match &self.0 {
            Backend::Folder(..) => Key::from(name),
            Backend::Bucket(_, prefix) if prefix.is_empty() => Key::from(name),
            Backend::Bucket(_, prefix) => Key::from(format!("{prefix}/{name}")),
        }
    }

    fn store(&self) -> &dyn ObjectStore {
        match &self.0 {
            Backend::Folder(store, _) => store.as_ref(),
            Backend::Bucket(store, _) => store.as_ref(),
        }
    }

    /// Compresses a file and stores it under the name. `note` is a file that remembers an upload to a bucket while it is
    /// under way, so that one that was cut off is taken back by the next.
    pub async fn put(&self, name: &str, file: &Path, note: &Path) -> Result<Stored, StorageError> {
        let mut parts = Parts::of(file).map_err(failed("cannot read the snapshot"))?;
        let key = self.key(name);
        match &self.0 {
            Backend::Folder(store, folder) => {
                sweep_parts(folder, name);
                let mut upload = store.put_multipart(&key).await?;
                while let Some(part) = parts.next().await {
                    let sent = match part {
                        Ok(part) => upload.put_part(PutPayload::from(part)).await.map_err(StorageError::from),
                        Err(error) => Err(failed("cannot read the snapshot")(error)),
                    };
                    if let Err(error) = sent {
                        let _ = upload.abort().await;
                        return Err(error);
                    }
                }
                upload.complete().await?;
            }
            Backend::Bucket(store, _) => {
                take_back(store, &key, note).await;
                let id = store.create_multipart(&key).await?;
                tokio::fs::write(note, &id).await.map_err(failed("cannot note the upload"))?;
                if let Err(error) = send(store, &key, &id, &mut parts).await {
                    take_back(store, &key, note).await;
                    return Err(error);
                }
                let _ = tokio::fs::remove_file(note).await;
            }
        }
        parts.end().await.map_err(failed("cannot compress the snapshot"))
    }

    /// Brings an object back as the file it was made from. Octets that do not have the recorded hash are not unpacked,
    /// and the file has its name only once it is whole. Unpacking is work in the file's folder (see [`turn`]): one whose caller
    /// gave up ends by itself, and has ended when the folder is at rest.
    pub async fn fetch(&self, name: &str, expected: &Stored, to: &Path) -> Result<(), StorageError> {
        let packed = Half(to.with_extension("packed"));
        let result = self.bring(name, expected, &packed.0, to).await;
        // Where nobody gave up there is time for it: a large one takes a while.
        let _ = tokio::fs::remove_file(&packed.0).await;
        result
    }

    async fn bring(
        &self,
        name: &str,
        expected: &Stored,
        packed: &Path,
        to: &Path,
    ) -> Result<(), StorageError> {
        let key = self.key(name);
        let size = self.store().head(&key).await?.size;
        if size != expected.stored_bytes {
            return Err(StorageError::Changed(format!("{size} octets instead of {}", expected.stored_bytes)));
        }
        let write = failed("cannot write the snapshot");
        let mut file = private(packed).await.map_err(write)?;
        let mut hasher = Hasher::default();
        let mut at = 0;
        while at < size {
            let range = at..size.min(at + RANGE);
            let octets = self.store().get_range(&key, range.clone()).await?;
            if octets.len() as u64 != range.end - range.start {
                return Err(StorageError::Changed("it ended early".into()));
            }
            hasher.update(&octets);
            file.write_all(&octets).await.map_err(failed("cannot write the snapshot"))?;
            at = range.end;
        }
        file.flush().await.map_err(failed("cannot write the snapshot"))?;
        drop(file);
        if hasher.end() != expected.sha256 {
            return Err(StorageError::Changed("its hash is another".into()));
        }
        let folder = to.parent().unwrap_or(to);
        let (packed, to, bytes) = (packed.to_owned(), to.to_owned(), expected.file_bytes);
        let unpacked = turn::run(folder, move |wanted| Ok(pack::unpack(&packed, &to, bytes, wanted))).await;
        unpacked
            .unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(failed("cannot unpack the snapshot"))
    }

    /// Removes an object; one that is not there is no error.
    pub async fn remove(&self, name: &str) -> Result<(), StorageError> {
        if let Backend::Folder(_, folder) = &self.0 {
            sweep_parts(folder, name);
        }
        match self.store().delete(&self.key(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes back an upload that was cut off; none noted is no error.
    pub async fn forget_upload(&self, name: &str, note: &Path) {
        match &self.0 {
            Backend::Folder(_, folder) => sweep_parts(folder, name),
            Backend::Bucket(store, _) => take_back(store, &self.key(name), note).await,
        }
    }
}

async fn send(store: &AmazonS3, key: &Key, id: &String, parts: &mut Parts) -> Result<(), StorageError> {
    let mut sent: Vec<PartId> = Vec::new();
    while let Some(part) = parts.next().await {
        let part = part.map_err(failed("cannot read the snapshot"))?;
        sent.push(store.put_part(key, id, sent.len(), PutPayload::from(part)).await?);
    }
    store.complete_multipart(key, id, sent).await?;
    Ok(())
}

async fn take_back(store: &AmazonS3, key: &Key, note: &Path) {
    let Ok(id) = tokio::fs::read_to_string(note).await else { return };
    match store.abort_multipart(key, &id).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => {
            let _ = tokio::fs::remove_file(note).await;
        }
        // It stays noted, for the next attempt.
        Err(error) => tracing::warn!(%error, "storage.upload_not_taken_back"),
    }
}

/// Removes what uploads that were cut off left of this object in a folder: the name with `#` and a number.
fn sweep_parts(folder: &Path, name: &str) {
    let path = folder.join(name);
    let (Some(parent), Some(file)) = (path.parent(), path.file_name().and_then(|file| file.to_str())) else {
        return;
    };
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry
            .file_name()
            .to_str()
            .and_then(|other| other.strip_prefix(file))
            .is_some_and(|rest| rest.starts_with('#'))
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A file that nobody needs any more when this goes, also where whoever made it gave up.
struct Half(PathBuf);

impl Drop for Half {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

async fn private(path: &Path) -> io::Result<tokio::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let _ = tokio::fs::remove_file(path).await;
    // At once: on another thread it might be made after whoever wanted it gave up.
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(tokio::fs::File::from_std(file))
}

#[cfg(test)]
mod tests;
