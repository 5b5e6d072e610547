//! Turns `onnx.proto` into Rust: the messages, and a table of which fields each message has.
//!
//! Everything happens in Rust; no protobuf compiler need be installed. The table
//! (`onnx_fields.rs`) lets the reader notice fields these messages do not know.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::{env, fs, path::Path};

use protox::prost_reflect::{DescriptorPool, MessageDescriptor};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=onnx.proto");
    let descriptors = protox::compile(["onnx.proto"], ["."])?;
    let out = env::var("OUT_DIR")?;

    let pool = DescriptorPool::from_file_descriptor_set(descriptors.clone())?;
    fs::write(Path::new(&out).join("onnx_fields.rs"), field_table(&pool)?)?;

    prost_build::Config::new()
        // Weights are slices of the file that was read, never copies of it.
        .bytes([".onnx.TensorProto.raw_data"])
        .compile_fds(descriptors)?;
    Ok(())
}

/// Rust source of an array: for each message its name and fields, each field with its number and,
/// where it holds a message, that message's position in the array.
fn field_table(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let messages: Vec<MessageDescriptor> = pool.all_messages().collect();
    let positions: BTreeMap<&str, usize> =
        messages.iter().enumerate().map(|(at, message)| (message.full_name(), at)).collect();
    let mut table = String::from("&[\n");
    for message in &messages {
        let name = message.full_name().trim_start_matches("onnx.");
        write!(table, "    ({name:?}, &[")?;
        for field in message.fields() {
            let inner = field.kind().as_message().map(|inner| positions[inner.full_name()]);
            write!(table, "({}, {inner:?}), ", field.number())?;
        }
        table.push_str("]),\n");
    }
    table.push(']');
    Ok(table)
}
