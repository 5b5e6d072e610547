//! `snnc key`: makes the one file that the devices of a cluster have in common, and shows its public part.
//!
//! Takes the command's arguments. `new` writes the file for its owner alone and says what to do with it;
//! `authority` prints the certificate that clients of the cluster's HTTPS are given.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::args::{Authority, NewKey};
use super::print;

const DAY: Duration = Duration::from_secs(24 * 3600);

pub(super) fn new(args: &NewKey) -> Result<()> {
    let key = crate::key::create(&args.file, DAY * args.days)?;
    let file = args.file.display();
    print(format_args!(
        "wrote {file} (key {}, good for {} days)\n\
         copy it to every device of the cluster, and keep it from everybody else:\n    \
         snn-run shard_0.onnx --key {file}\n",
        key.fingerprint(),
        args.days,
    ))
}

pub(super) fn authority(args: &Authority) -> Result<()> {
    let key = crate::key::read(&args.file)?;
    let authority = key.web_authority().context("key");
    print(authority.with_context(|| args.file.display().to_string())?)
}
