//! Files that come in pieces, change on disk, and have to go.

use super::*;
use crate::agent::wire::sha256;

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("snn-store-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

#[test]
fn a_file_arrives_in_pieces_goes_on_where_it_ended_and_must_have_its_hash() {
    let folder = folder("pieces");
    let bytes = b"{\"not\": \"a manifest, but as good as any here\"}";
    let version = Version::of(bytes);
    let store = Store::open(&folder).unwrap();
    let put = |offset: usize, end: usize, last| {
        let piece = (offset as u64, &bytes[offset..end]);
        store.put(&version, File::Manifest, piece, last)
    };
    assert_eq!(store.have(&version, File::Manifest).unwrap(), (0, false));
    assert_eq!(put(0, 10, false).unwrap(), (10, false));
    // A gap is not written: the sender is told where to go on.
    assert_eq!(put(20, 30, false).unwrap(), (10, false));
    drop(store);
    let store = Store::open(&folder).unwrap();
    assert_eq!(store.have(&version, File::Manifest).unwrap(), (10, false));
    let put = |offset: usize, end: usize, last| {
        let piece = (offset as u64, &bytes[offset..end]);
        store.put(&version, File::Manifest, piece, last)
    };
    // The same piece twice does no harm.
    assert_eq!(put(5, 30, false).unwrap(), (30, false));
    assert_eq!(put(5, 30, false).unwrap(), (30, false));
    assert_eq!(put(29, bytes.len(), true).unwrap(), (bytes.len() as u64, true));
    assert!(matches!(
        store.put(&Version::of(b"other"), File::Manifest, (0, bytes), true),
        Err(StoreError::Hash { .. })
    ));
    assert_eq!(store.have(&Version::of(b"other"), File::Manifest).unwrap(), (0, false));
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_folder_is_used_by_one_and_remembers_what_is_current() {
    let folder = folder("one");
    let store = Store::open(&folder).unwrap();
    assert!(matches!(Store::open(&folder), Err(StoreError::Taken { .. })));
    assert_eq!(store.current(), None);
    let version = Version::of(b"x");
    store.set_current(Some(&version)).unwrap();
    assert_eq!(store.current(), Some(version.clone()));
    assert!(matches!(store.shard(&version, 0), Err(StoreError::Io { .. })));
    store.set_current(None).unwrap();
    store.set_current(None).unwrap();
    assert_eq!(store.current(), None);
    for number in 0..MAX_VERSIONS {
        let bytes = number.to_string();
        let of = Version::of(bytes.as_bytes());
        store.put(&of, File::Manifest, (0, bytes.as_bytes()), true).unwrap();
    }
    let more = store.put(&version, File::Manifest, (0, b"x"), true);
    assert!(matches!(more, Err(StoreError::Full)));
    store.forget(&store.versions()[0]).unwrap();
    store.put(&version, File::Manifest, (0, b"x"), true).unwrap();
    fs::remove_dir_all(folder).unwrap();
}

/// A version of one shard; gives its manifest's bytes.
fn manifest(shard: &[u8]) -> Vec<u8> {
    let wire = serde_json::json!({
        "exchange_bytes": 0, "other_bytes": 0, "planned_bytes": 0, "ring_bytes": 0, "fraction": 0.0,
    });
    let manifest = serde_json::json!({
        "version": 1, "tool": "test", "split": "ab", "source_sha256": "cd", "groups": 1,
        "placement": [0], "entry": 0, "inputs": [], "outputs": [], "transfers": [],
        "nodes": [{ "rank": 0, "shard": "shard_0.onnx", "sha256": sha256(shard) }],
        "cost": { "paper": { "blocks": 0, "fraction": 0.0 }, "wire": wire },
    });
    manifest.to_string().into_bytes()
}

#[test]
fn what_has_changed_on_disk_is_removed_and_comes_again() {
    let folder = folder("changed");
    let shard = b"as good as any shard here";
    let manifest = manifest(shard);
    let version = Version::of(&manifest);
    let store = Store::open(&folder).unwrap();
    let file = folder.canonicalize().unwrap().join(version.as_str()).join("shard_0.onnx");
    store.put(&version, File::Manifest, (0, &manifest), true).unwrap();
    let put = || store.put(&version, File::Shard(0), (0, shard), true).unwrap();
    let have = || store.have(&version, File::Shard(0)).unwrap();
    let whole = (shard.len() as u64, true);
    assert_eq!((put(), store.shard(&version, 0).unwrap()), (whole, file.clone()));

    // Of the same length, and noticed when it is asked for.
    fs::write(&file, b"as good as any shard HERE").unwrap();
    assert_eq!((have(), file.exists()), ((0, false), false));
    assert_eq!((put(), have()), (whole, whole));
    // Shorter, though it was right a moment ago.
    fs::write(&file, b"as good").unwrap();
    assert_eq!((have(), put()), ((0, false), whole));
    // Noticed when it is to be run.
    fs::write(&file, b"as good as any shard HERE").unwrap();
    assert!(matches!(store.shard(&version, 0), Err(StoreError::Hash { .. })));
    assert_eq!((have(), put(), have()), ((0, false), whole, whole));
    assert_eq!(store.shard(&version, 0).unwrap(), file);
    drop(store);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_oldest_of_those_that_nobody_needs_make_room() {
    let folder = folder("room");
    let store = Store::open(&folder).unwrap();
    let version = |number: usize| Version::of(number.to_string().as_bytes());
    let put = |number: usize| {
        let bytes = number.to_string();
        store.put(&version(number), File::Manifest, (0, bytes.as_bytes()), false)
    };
    for number in 0..MAX_VERSIONS {
        assert!(store.make_room(&version(number), |_| false).unwrap().is_empty());
        put(number).unwrap();
        // The first has come first.
        let when = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000 + number as u64);
        let of = fs::File::open(folder.join(version(number).as_str())).unwrap();
        of.set_modified(when).unwrap();
    }
    store.set_current(Some(&version(0))).unwrap();
    store.set_current(Some(&version(1))).unwrap();
    assert_eq!(store.previous(), Some(version(0)));
    let new = version(MAX_VERSIONS);
    assert!(matches!(put(MAX_VERSIONS), Err(StoreError::Full)));
    // One that is there already needs no place.
    assert!(store.make_room(&version(5), |_| false).unwrap().is_empty());
    let runs = |other: &Version| *other == version(2);
    assert_eq!(store.make_room(&new, runs).unwrap(), [version(3)]);
    put(MAX_VERSIONS).unwrap();
    // Where all are needed none goes.
    assert!(store.make_room(&version(99), |_| true).unwrap().is_empty());
    assert!(matches!(put(99), Err(StoreError::Full)));
    for kept in [0, 1, 2, 4, MAX_VERSIONS] {
        assert!(store.versions().contains(&version(kept)), "{kept}");
    }
    // One that nothing follows stays the one before.
    store.set_current(None).unwrap();
    assert_eq!((store.current(), store.previous()), (None, Some(version(1))));
    fs::remove_dir_all(folder).unwrap();
}
