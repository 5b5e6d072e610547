//! The JSON Schemas beside this crate are those of its types. `UPDATE=1` writes them.

use std::path::Path;
use std::{env, fs};

use schemars::Schema;
use snn_schemas::Manifest;
use snn_schemas::policy::PolicyFile;

fn check(file: &str, schema: &Schema) {
    let text = serde_json::to_string_pretty(schema).expect("a schema is JSON") + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if env::var_os("UPDATE").is_some() {
        fs::write(&path, &text).expect("the schema can be written");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(written == text, "{file} is not what the types say: run with UPDATE=1");
}

#[test]
fn policy_schema_is_current() {
    check("policy.schema.json", &schemars::schema_for!(PolicyFile));
}

#[test]
fn manifest_schema_is_current() {
    check("manifest.schema.json", &schemars::schema_for!(Manifest));
}
