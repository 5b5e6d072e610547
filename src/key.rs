//! Key files on disk: written for their owner alone, and read only if that is still so.
//!
//! Takes a path; gives the [`ClusterKey`] in it, or writes a new one. A key that others on the machine
//! can read is refused: whoever has it is a member of the cluster.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use snn_runtime::key::{ClusterKey, MAX_KEY_BYTES};

/// Reads a key file.
pub(crate) fn read(path: &Path) -> Result<ClusterKey> {
    let read = || -> Result<ClusterKey> {
        let file = File::open(path)?;
        check_private(&file, path)?;
        let mut text = String::new();
        file.take(MAX_KEY_BYTES as u64).read_to_string(&mut text)?;
        Ok(ClusterKey::from_pem(&text)?)
    };
    read().context("key").with_context(|| path.display().to_string())
}

#[cfg(unix)]
fn check_private(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    let path = path.display();
    ensure!(mode & 0o077 == 0, "others can read it (mode {mode:o}); chmod 600 {path}");
    Ok(())
}

#[cfg(not(unix))]
fn check_private(_: &File, _: &Path) -> Result<()> {
    Ok(())
}

/// Writes a new key, good for `lifetime`; never over a file that is there.
pub(crate) fn create(path: &Path, lifetime: Duration) -> Result<ClusterKey> {
    let create = || -> Result<ClusterKey> {
        let key = ClusterKey::new(lifetime)?;
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        options.open(path)?.write_all(key.to_pem().as_bytes())?;
        Ok(key)
    };
    create().context("key").with_context(|| path.display().to_string())
}
