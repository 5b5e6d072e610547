//! Files that come in pieces, change on disk, and have to go.

use super::*;

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
