//! `snnc key new`: makes the one file that the devices of a cluster have in common.
//!
//! Takes the command's arguments; writes the file for its owner alone and says what to do with it.

use std::time::Duration;

use anyhow::Result;

use super::args::NewKey;
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
