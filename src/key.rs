//! Key files on disk: written for their owner alone, and read only if that is still so.
//!
//! Takes a path; gives the [`ClusterKey`] in it, or writes a new one. A key that others on the machine
//! can read is refused: whoever has it is a member of the cluster. A key that is used before or after its time
//! is named in a warning: nobody will connect, and neither side of a connection says why.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use snn_runtime::key::{ClusterKey, MAX_KEY_BYTES};

/// What all but the owner and the group of a file may do with it.
const OTHERS: u32 = 0o007;
/// What all but the owner of a file may do with it.
const OTHERS_AND_GROUP: u32 = 0o077;
/// Where systemd puts what a unit loads with `LoadCredential=`.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Reads a key file.
pub(crate) fn read(path: &Path) -> Result<ClusterKey> {
    let read = || -> Result<ClusterKey> {
        let file = File::open(path)?;
        let credentials = std::env::var_os(CREDENTIALS);
        check_private(&file, path, refused(path, credentials.as_deref().map(Path::new)))?;
        let mut text = String::new();
        file.take(MAX_KEY_BYTES as u64).read_to_string(&mut text)?;
        let key = ClusterKey::from_pem(&text)?;
        if let Some(reason) = key.untimely(SystemTime::now()) {
            tracing::warn!(key = %path.display(), "{reason}");
        }
        Ok(key)
    };
    read().context("key").with_context(|| path.display().to_string())
}

/// Refuses the private key of a web server where everybody can read it; a group may, as is usual.
pub(crate) fn check_hidden(file: &File, path: &Path) -> Result<()> {
    check_private(file, path, OTHERS)
}

/// Who must not be able to read the key at `path`. A unit's credential is its user's alone, by a list of
/// its own that shows as the group's right to read; nobody else gets into its folder.
fn refused(path: &Path, credentials: Option<&Path>) -> u32 {
    match credentials.is_some_and(|folder| path.starts_with(folder)) {
        true => OTHERS,
        false => OTHERS_AND_GROUP,
    }
}

#[cfg(unix)]
fn check_private(file: &File, path: &Path, who: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = file.metadata()?.permissions().mode() & 0o777;
    let path = path.display();
    ensure!(mode & who == 0, "others can read it (mode {mode:o}); chmod 600 {path}");
    Ok(())
}

#[cfg(not(unix))]
fn check_private(_: &File, _: &Path, _: u32) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_may_read_credentials_and_nothing_else() {
        let of_unit = Some(Path::new("/run/credentials/snn.service"));
        assert_eq!(refused(Path::new("/run/credentials/snn.service/cluster.key"), of_unit), OTHERS);
        assert_eq!(refused(Path::new("/etc/snn/cluster.key"), of_unit), OTHERS_AND_GROUP);
        assert_eq!(refused(Path::new("/etc/snn/cluster.key"), None), OTHERS_AND_GROUP);
    }
}
