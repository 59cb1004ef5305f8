//! The folder backend with real files; the bucket is tested with a real server in `tests/`.

use super::*;

fn scene() -> (tempfile::TempDir, Storage, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(&Place::Folder(folder.path().join("store"))).unwrap();
    let file = folder.path().join("disk.qcow2");
    (folder, storage, file)
}

/// Half of it holes, half of it what does not compress, and larger than a part.
fn disk(path: &Path) -> Vec<u8> {
    let mut octets = vec![0u8; 24 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for octet in &mut octets[10 << 20..22 << 20] {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *octet = (state >> 56) as u8;
    }
    fs::write(path, &octets).unwrap();
    octets
}

#[tokio::test]
async fn a_file_comes_back_as_it_was_and_sparse() {
    let (folder, storage, file) = scene();
    let octets = disk(&file);
    let stored = storage.put("snapshots/a.zst", &file, &folder.path().join("note")).await.unwrap();
    assert_eq!(stored.file_bytes, octets.len() as u64);
    assert!(stored.stored_bytes > 12 << 20 && stored.stored_bytes < 13 << 20, "{stored:?}");
    let back = folder.path().join("back");
    storage.fetch("snapshots/a.zst", &stored, &back).await.unwrap();
    assert!(fs::read(&back).unwrap() == octets);
    use std::os::unix::fs::MetadataExt as _;
    let meta = fs::metadata(&back).unwrap();
    assert!(meta.blocks() * 512 < 14 << 20, "zeros are holes again: {}", meta.blocks());
    assert_eq!(meta.mode() & 0o777, 0o600);
    storage.remove("snapshots/a.zst").await.unwrap();
    storage.remove("snapshots/a.zst").await.unwrap();
    assert!(storage.fetch("snapshots/a.zst", &stored, &back).await.is_err());
}

#[tokio::test]
async fn what_was_stored_is_there_after_a_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let host = tapgate_e2e::power::Disk::new(folder.path(), 256).unwrap();
    let storage = Storage::open(&Place::Folder(host.path().join("store"))).unwrap();
    let file = folder.path().join("disk.qcow2");
    let octets = disk(&file);
    let stored = storage.put("snapshots/a.zst", &file, &folder.path().join("note")).await.unwrap();
    drop(storage);
    host.cut().unwrap();
    let storage = Storage::open(&Place::Folder(host.path().join("store"))).unwrap();
    let back = folder.path().join("back");
    storage.fetch("snapshots/a.zst", &stored, &back).await.unwrap();
    assert!(fs::read(&back).unwrap() == octets);
}

#[tokio::test]
async fn a_changed_object_is_refused_and_leaves_nothing() {
    let (folder, storage, file) = scene();
    fs::write(&file, b"the disk").unwrap();
    let stored = storage.put("a", &file, &folder.path().join("note")).await.unwrap();
    let object = folder.path().join("store/a");
    let mut octets = fs::read(&object).unwrap();
    let last = octets.len() - 1;
    octets[last] ^= 1;
    fs::write(&object, &octets).unwrap();
    let back = folder.path().join("back");
    assert!(matches!(storage.fetch("a", &stored, &back).await, Err(StorageError::Changed(_))));
    fs::write(&object, &octets[..last]).unwrap();
    assert!(matches!(storage.fetch("a", &stored, &back).await, Err(StorageError::Changed(_))));
    // One that unpacks to more than was packed is cut, whatever its hash.
    let large =
        Stored { file_bytes: 3, ..storage.put("b", &file, &folder.path().join("note")).await.unwrap() };
    assert!(storage.fetch("b", &large, &back).await.is_err());
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[tokio::test]
async fn a_fetch_that_is_given_up_ends_and_leaves_nothing() {
    let (folder, storage, file) = scene();
    // Packed it is small; unpacking it takes a while.
    const BYTES: u64 = 8 << 30;
    fs::File::create(&file).unwrap().set_len(BYTES).unwrap();
    let small = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
    let packed = small.repeat(usize::try_from(BYTES >> 20).unwrap());
    fs::write(folder.path().join("store/a"), &packed).unwrap();
    let mut hasher = Hasher::default();
    hasher.update(&packed);
    let stored = Stored { sha256: hasher.end(), stored_bytes: packed.len() as u64, file_bytes: BYTES };
    let there = folder.path().join("vm");
    fs::create_dir(&there).unwrap();
    let names = || fs::read_dir(&there).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let unpacking = async {
        while !there.join("back.unpacked").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let to = there.join("back.qcow2");
    tokio::select! {
        _ = storage.fetch("a", &stored, &to) => panic!("it was not given up"),
        () = unpacking => {}
    }
    turn::rest(&there).await;
    assert!(names().is_empty(), "{:?}", names());
}

#[tokio::test]
async fn what_an_upload_that_was_cut_off_left_goes_with_the_next() {
    let (folder, storage, file) = scene();
    fs::write(&file, b"the disk").unwrap();
    fs::write(folder.path().join("store/a#1"), b"half").unwrap();
    fs::write(folder.path().join("store/ab#1"), b"another's").unwrap();
    storage.put("a", &file, &folder.path().join("note")).await.unwrap();
    assert!(!folder.path().join("store/a#1").exists() && folder.path().join("store/ab#1").exists());
}

#[test]
fn places_are_checked_and_credentials_are_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("credentials");
    fs::write(&file, "access_key_id = 'AKIDEXAMPLE'\nsecret_access_key = 'wJalrXUt'\n").unwrap();
    let parse = |store: &str, endpoint: Option<&str>| {
        Place::parse(Some(store), "/d".into(), endpoint.map(str::to_owned), None, Some(&file))
    };
    let open = parse("s3://bucket/prefix/", None).unwrap_err();
    assert_eq!(open.key, "s3_credentials");
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let place = parse("s3://bucket/prefix/", Some("https://s3.example.com")).unwrap();
    assert_eq!(format!("{place:?}"), "Bucket(s3://bucket/prefix)");
    let storage = format!("{:?}", Storage::open(&place).unwrap());
    assert!(!storage.contains("wJalrXUt"), "{storage}");
    for (store, endpoint, key) in [
        ("relative", None, "snapshot_store"),
        ("s3://B_", None, "snapshot_store"),
        ("s3://bucket", Some("ftp://x"), "s3_endpoint"),
    ] {
        assert_eq!(parse(store, endpoint).unwrap_err().key, key, "{store}");
    }
    fs::write(&file, "access_key_id = 'AKIDEXAMPLE'\nsecret = 'wJalrXUt'\n").unwrap();
    assert!(!parse("s3://bucket", None).unwrap_err().to_string().contains("wJalrXUt"));
    assert_eq!(Place::parse(None, "/d".into(), None, None, None).unwrap(), Place::Folder("/d".into()));
}
