//! Files of JSON lines, appended to as things happen.
//!
//! [`Jsonl::open`] keeps those lines that are asked for and drops the others, and with them a last one
//! that a kill cut short: what is appended next never runs into it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::write_whole;
use crate::error::TrainError;

/// A file while lines are appended to it.
pub(crate) struct Jsonl {
    path: PathBuf,
    file: File,
}

impl Jsonl {
    /// Opens the file for appending after the lines that `keep` wants; it is asked in order, with each
    /// line's number from 0.
    pub(crate) fn open(
        path: &Path,
        mut keep: impl FnMut(usize, &str) -> bool,
    ) -> Result<Jsonl, TrainError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(TrainError::io(path)(error)),
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut kept = String::with_capacity(text.len());
        for (number, line) in text.split_inclusive('\n').enumerate() {
            if line.ends_with('\n') && keep(number, line) {
                kept.push_str(line);
            }
        }
        write_whole(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::io(path))?;
        Ok(Jsonl { path: path.to_owned(), file })
    }

    /// Appends a line.
    pub(crate) fn append(&mut self, line: &impl Serialize) -> Result<(), TrainError> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(TrainError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_never_runs_into_a_line_cut_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.jsonl");
        fs::write(&path, "1\n2\n3\n4").unwrap();
        let mut lines = Jsonl::open(&path, |number, _| number != 1).unwrap();
        lines.append(&5).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n3\n5\n");
        fs::write(&path, b"1\n\xff\xfe\n").unwrap();
        Jsonl::open(&path, |_, line| line == "1\n").unwrap().append(&2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n2\n");
    }
}
