//! Nothing in an ONNX file is lost, and no bytes make the reader panic.

#![allow(clippy::unwrap_used, reason = "tests")]

use bytes::Bytes;
use proptest::prelude::*;
use snn_schemas::onnx::attribute_proto::AttributeType;
use snn_schemas::onnx::tensor_proto::{DataLocation, DataType, Segment};
use snn_schemas::onnx::tensor_shape_proto::{Dimension, dimension};
use snn_schemas::onnx::{self, *};

/// Written by the standard's Python package (`data/everything.py`): every field of every message.
const EVERYTHING: &[u8] = include_bytes!("data/everything.onnx");

// ---- A model in which everything is set. No struct is completed with `..default()`, so that a new
// ---- field of the standard cannot be forgotten here.

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn props(key: &str) -> Vec<StringStringEntryProto> {
    vec![
        StringStringEntryProto { key: text(key), value: text("ä value") },
        StringStringEntryProto { key: text("no value"), value: None },
        StringStringEntryProto { key: None, value: text("") },
    ]
}

fn shape() -> TensorShapeProto {
    let dimension = |value| Dimension { value, denotation: text("DATA_BATCH") };
    TensorShapeProto {
        dim: vec![
            dimension(Some(dimension::Value::DimValue(0))),
            dimension(Some(dimension::Value::DimParam("N".to_owned()))),
            dimension(None),
        ],
    }
}

fn types() -> Vec<TypeProto> {
    use type_proto::{Map, Opaque, Optional, Sequence, SparseTensor, Tensor, Value};

    let of = |value| TypeProto { value: Some(value), denotation: text("IMAGE") };
    let tensor = of(Value::TensorType(Tensor { elem_type: Some(1), shape: Some(shape()) }));
    let inner = || Some(Box::new(tensor.clone()));
    vec![
        of(Value::SequenceType(Box::new(Sequence { elem_type: inner() }))),
        of(Value::MapType(Box::new(Map { key_type: Some(7), value_type: inner() }))),
        of(Value::OptionalType(Box::new(Optional { elem_type: inner() }))),
        of(Value::SparseTensorType(SparseTensor { elem_type: Some(1), shape: Some(shape()) })),
        of(Value::OpaqueType(Opaque { domain: text("org.example"), name: text("thing") })),
        TypeProto { value: None, denotation: None },
        tensor,
    ]
}

fn tensor() -> TensorProto {
    TensorProto {
        dims: vec![-1, 0, i64::MAX],
        data_type: Some(DataType::Float6e3m2 as i32),
        segment: Some(Segment { begin: Some(0), end: Some(i64::MIN) }),
        float_data: vec![0.0, -0.0, f32::INFINITY],
        int32_data: vec![i32::MIN, 0, i32::MAX],
        string_data: vec![Bytes::new().to_vec(), b"\xff".to_vec()],
        int64_data: vec![i64::MIN, 0, i64::MAX],
        name: text("w"),
        raw_data: Some(Bytes::from_static(b"\0\x01\x02\xff")),
        double_data: vec![f64::MIN, 0.0],
        uint64_data: vec![0, u64::MAX],
        doc_string: text("a tensor"),
        external_data: props("location"),
        data_location: Some(DataLocation::External as i32),
        metadata_props: props("tensor"),
    }
}

fn sparse() -> SparseTensorProto {
    SparseTensorProto { values: Some(tensor()), indices: Some(tensor()), dims: vec![3, 0] }
}

fn value() -> ValueInfoProto {
    ValueInfoProto {
        name: text("x"),
        r#type: types().pop(),
        doc_string: text("a value"),
        metadata_props: props("value"),
    }
}

/// An attribute in which every value field is set, with `graph` in its graph fields.
fn attribute(graph: Option<&GraphProto>) -> AttributeProto {
    AttributeProto {
        name: text("a"),
        f: Some(0.0),
        i: Some(0),
        s: Some(Vec::new()),
        t: Some(tensor()),
        g: graph.cloned(),
        floats: vec![0.0, f32::MIN],
        ints: vec![0, -1],
        strings: vec![b"".to_vec(), b"\xfe".to_vec()],
        tensors: vec![tensor()],
        graphs: graph.into_iter().cloned().collect(),
        doc_string: text("an attribute"),
        tp: types().pop(),
        type_protos: types(),
        r#type: Some(AttributeType::Undefined as i32),
        ref_attr_name: text("outer"),
        sparse_tensor: Some(sparse()),
        sparse_tensors: vec![sparse()],
    }
}

fn node(op_type: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    use simple_sharded_dim_proto::Dim;

    let part = |dim| SimpleShardedDimProto { dim, num_shards: Some(2) };
    let sharding = ShardingSpecProto {
        tensor_name: text("x"),
        device: vec![0, 1],
        index_to_device_group_map: vec![IntIntListEntryProto { key: Some(0), value: vec![0, -1] }],
        sharded_dim: vec![ShardedDimProto {
            axis: Some(-1),
            simple_sharding: vec![
                part(Some(Dim::DimValue(0))),
                part(Some(Dim::DimParam("N".to_owned()))),
                part(None),
            ],
        }],
    };
    NodeProto {
        input: vec!["x".to_owned(), String::new()],
        output: vec!["y".to_owned(), String::new()],
        name: text(""),
        op_type: text(op_type),
        attribute: attributes,
        doc_string: text("an op"),
        domain: text("org.example"),
        overload: text("second"),
        metadata_props: props("node"),
        device_configurations: vec![NodeDeviceConfigurationProto {
            configuration_id: text("two"),
            sharding_spec: vec![sharding],
            pipeline_stage: Some(0),
        }],
    }
}

fn graph(node: Vec<NodeProto>) -> GraphProto {
    GraphProto {
        node,
        name: text("graph"),
        initializer: vec![tensor()],
        doc_string: text("a graph"),
        input: vec![value()],
        output: vec![value()],
        value_info: vec![value()],
        quantization_annotation: vec![TensorAnnotation {
            tensor_name: text("x"),
            quant_parameter_tensor_names: props("SCALE_TENSOR"),
        }],
        sparse_initializer: vec![sparse()],
        metadata_props: props("graph"),
    }
}

fn everything() -> ModelProto {
    let body = graph(vec![node("Add", vec![attribute(None)])]);
    let inner = graph(vec![node("Loop", vec![attribute(Some(&body))])]);
    let outer = graph(vec![node("If", vec![attribute(Some(&inner)), attr_int("b", 1)])]);
    let opset = OperatorSetIdProto { domain: text(""), version: Some(26) };
    ModelProto {
        ir_version: Some(onnx::IR_VERSION),
        producer_name: text("snn"),
        producer_version: text(""),
        domain: text("org.example"),
        model_version: Some(0),
        doc_string: text("a model"),
        graph: Some(outer),
        opset_import: vec![opset.clone(), OperatorSetIdProto { domain: None, version: None }],
        metadata_props: props("model"),
        training_info: vec![TrainingInfoProto {
            initialization: Some(body.clone()),
            algorithm: Some(body),
            initialization_binding: props("w"),
            update_binding: props("w"),
        }],
        functions: vec![FunctionProto {
            name: text("F"),
            input: vec!["x".to_owned()],
            output: vec!["y".to_owned()],
            attribute: vec!["given".to_owned()],
            node: vec![node("Relu", vec![attribute(None)])],
            doc_string: text("a function"),
            opset_import: vec![opset],
            domain: text("org.example"),
            attribute_proto: vec![attribute(None)],
            value_info: vec![value()],
            overload: text("second"),
            metadata_props: props("function"),
        }],
        configuration: vec![DeviceConfigurationProto {
            name: text("two"),
            num_devices: Some(0),
            device: vec!["cpu".to_owned(), String::new()],
        }],
    }
}

/// The smallest model: one op.
fn tiny() -> ModelProto {
    ModelProto {
        ir_version: Some(8),
        graph: Some(GraphProto {
            node: vec![NodeProto::new("Relu", "r", &["x"], &["y"])],
            input: vec![ValueInfoProto::tensor("x", DataType::Float, &[1, -1])],
            ..GraphProto::default()
        }),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(18) }],
        ..ModelProto::default()
    }
}

fn read(bytes: &[u8]) -> Result<ModelProto, OnnxError> {
    onnx::decode(Bytes::copy_from_slice(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

// ---- Nothing is lost.

#[test]
fn every_field_survives() {
    let model = everything();
    let bytes = onnx::encode(&model);
    let again = read(&bytes).unwrap();
    assert_eq!(again, model);
    assert_eq!(onnx::encode(&again), bytes);
    assert_eq!(onnx::unknown_field(&bytes), None);
}

#[test]
fn a_file_by_the_standards_own_writer_is_rewritten_byte_for_byte() {
    let model = read(EVERYTHING).unwrap();
    assert_eq!(hex(&onnx::encode(&model)), hex(EVERYTHING));
    assert_eq!(onnx::unknown_field(EVERYTHING), None);
}

#[test]
fn absent_and_zero_stay_different() {
    let absent = AttributeProto { i: None, ..attr_int("a", 0) };
    for attribute in [attr_int("a", 0), absent] {
        let mut model = tiny();
        model.graph.as_mut().unwrap().node[0].attribute.push(attribute);
        assert_eq!(read(&onnx::encode(&model)).unwrap(), model);
    }
}

#[test]
fn unknown_enum_values_and_types_are_kept() {
    let mut model = tiny();
    let graph = model.graph.as_mut().unwrap();
    let attribute = AttributeProto { r#type: Some(99), ..attr_int("a", 1) };
    graph.node[0].attribute.push(attribute);
    graph.initializer.push(TensorProto { data_type: Some(99), ..TensorProto::default() });
    assert_eq!(read(&onnx::encode(&model)).unwrap(), model);
}

#[test]
fn unknown_fields_are_noticed_however_deep() {
    let mut bytes = onnx::encode(&tiny());
    bytes.extend(unhex("f8 07 01")); // field 127, varint
    read(&bytes).unwrap();
    let found = onnx::unknown_field(&bytes).unwrap();
    assert_eq!(found, UnknownField { message: "ModelProto", number: 127 });
    assert_eq!(found.to_string(), "field 127 of ModelProto");

    // graph { node { attribute { t { 17: "" } } } }, and the retired field 2 of a function.
    let cases = [
        ("0801 3a0b 0a09 2a07 2a05 08018a0100", "TensorProto", 17),
        ("0801 3a00 ca0102 1001", "FunctionProto", 2),
    ];
    for (bytes, message, number) in cases {
        let bytes = unhex(bytes);
        read(&bytes).unwrap();
        assert_eq!(onnx::unknown_field(&bytes), Some(UnknownField { message, number }));
    }
}

#[test]
fn lists_in_the_other_encoding_are_read_and_not_taken_for_a_loss() {
    // An initializer with packed dims [2, 3] (as proto3 writers have it) and unpacked int64_data.
    let bytes = unhex("0801 3a10 2a0e 0a020203 1007 3801 3802 3803 3804");
    let model = read(&bytes).unwrap();
    let tensor = &model.graph.as_ref().unwrap().initializer[0];
    assert_eq!(tensor.dims, [2, 3]);
    assert_eq!(tensor.int64_data, [1, 2, 3, 4]);
    assert_eq!(onnx::unknown_field(&bytes), None);
}

#[test]
fn weights_are_slices_of_the_file() {
    let mut model = tiny();
    let weights = TensorProto::f32("w", &[2], &[1.0, 2.0]);
    model.graph.as_mut().unwrap().initializer.push(weights);
    let file = Bytes::from(onnx::encode(&model));
    let model = onnx::decode(file.clone()).unwrap();
    let raw = model.graph.as_ref().unwrap().initializer[0].raw_data.as_ref().unwrap();
    assert!(file.as_ptr_range().contains(&raw.as_ptr()));
}

// ---- The field numbers are the standard's.

#[test]
fn bytes_of_a_small_model_are_pinned() {
    let mut model = tiny();
    model.producer_name = text("p");
    model.set_metadata("k", "v");
    let graph = model.graph.as_mut().unwrap();
    graph.name = text("g");
    graph.initializer.push(TensorProto::f32("w", &[1], &[1.0]));
    graph.output.push(ValueInfoProto { name: text("y"), ..ValueInfoProto::default() });
    graph.node[0].domain = text("d");
    graph.node[0].attribute = vec![
        attr_int("i", 1),
        attr_ints("n", &[1, 2]),
        attr_float("f", 1.0),
        attr_string("s", "t"),
    ];

    let pinned = [
        "0808",                                           // ir_version 8
        "120170",                                         // producer_name "p"
        "3a6c",                                           // graph
        "0a40",                                           //   node
        "0a0178 120179 1a0172 220452656c75", //     input x, output y, name r, op_type Relu
        "2a08 0a0169 1801 a00102",           //     attribute i: INT 1
        "2a0a 0a016e 4001 4002 a00107",      //     attribute n: INTS 1, 2 (unpacked)
        "2a0b 0a0166 150000803f a00101",     //     attribute f: FLOAT 1.0
        "2a09 0a0173 220174 a00103",         //     attribute s: STRING "t"
        "3a0164",                            //     domain d
        "120167",                            //   name g
        "2a0d 0801 1001 420177 4a040000803f", //   initializer: dims 1, FLOAT, name w, raw_data
        "5a11 0a0178 120c 0a0a 0801 1206 0a02 0801 0a00", // input x: type.tensor_type FLOAT (1, ?)
        "6203 0a0179",                       //   output y
        "4202 1012",                         // opset_import: version 18
        "7206 0a016b 120176",                // metadata_props: k = v
    ];
    assert_eq!(hex(&onnx::encode(&model)), pinned.concat().replace(' ', ""));
    assert_eq!(read(&unhex(&pinned.concat())).unwrap(), model);
}

// ---- What is no model is refused, in one sentence.

#[test]
fn what_is_no_model_is_refused() {
    let refused = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    assert_eq!(refused(b""), "not an ONNX model: it is empty");
    assert_eq!(refused(b"\x10\x01"), {
        "not an ONNX model: ModelProto.producer_name: invalid wire type: Varint (expected LengthDelimited)"
    });
    assert_eq!(refused(b"\x12\x01p"), "not an ONNX model: it states no IR version");
    assert_eq!(refused(b"\x08\x08"), "not a complete ONNX model: it has no graph");
    assert_eq!(refused(b"\x08\x08\x3a\x00"), "not a complete ONNX model: it has no operator sets");
    let others: [&[u8]; 6] = [
        b"{\"version\": 1}\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"<!DOCTYPE html>\n",
        b"PK\x03\x04\x14\0\0\0\x08\0",
        b"\x89PNG\r\n\x1a\n",
        &[0; 64],
    ];
    for bytes in others {
        let message = refused(bytes);
        assert!(message.starts_with("not an ONNX model: "), "{message}");
        assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    }
}

#[test]
fn a_truncated_model_is_never_taken_for_a_whole_one() {
    let bytes = onnx::encode(&tiny());
    assert_eq!(
        read(&bytes[..20]).unwrap_err().to_string(),
        format!(
            "ONNX model is cut short: at least {} more bytes are expected at its end",
            bytes.len() - 4 - 20 // all that is missing of the graph
        )
    );
    for length in 1..bytes.len() {
        let error = read(&bytes[..length]).unwrap_err();
        let is_named = matches!(error, OnnxError::CutShort { .. } | OnnxError::Incomplete { .. });
        assert!(is_named, "{length} of {} bytes: {error}", bytes.len());
    }
}

#[test]
fn deep_nesting_is_refused_and_ordinary_nesting_is_not() {
    let nested = |depth: usize| {
        let mut model = tiny();
        for _ in 0..depth {
            let inner = AttributeProto { g: model.graph.take(), ..AttributeProto::default() };
            let node = NodeProto { attribute: vec![inner], ..NodeProto::default() };
            model.graph = Some(GraphProto { node: vec![node], ..GraphProto::default() });
        }
        model
    };
    let model = nested(31);
    assert_eq!(read(&onnx::encode(&model)), Ok(model));
    assert_eq!(read(&onnx::encode(&nested(40))), Err(OnnxError::TooDeep));

    // A bomb: types in types, a few bytes each, in an input of the graph.
    let wrap = |key: u8, content: &[u8]| {
        let mut message = vec![key];
        prost::encode_length_delimiter(content.len(), &mut message).unwrap();
        message.extend(content);
        message
    };
    let types = (0..2000).fold(Vec::new(), |inner, _| wrap(0x22, &wrap(0x0a, &inner)));
    let graph = wrap(0x3a, &wrap(0x5a, &wrap(0x12, &types)));
    let bytes = [&b"\x08\x08"[..], &graph].concat();
    assert_eq!(read(&bytes), Err(OnnxError::TooDeep));
    assert_eq!(onnx::unknown_field(&bytes), None);
}

// ---- Tensors.

fn typed(data_type: DataType, dims: &[i64]) -> TensorProto {
    let name = text("w");
    TensorProto {
        name,
        data_type: Some(data_type as i32),
        dims: dims.to_vec(),
        ..Default::default()
    }
}

fn raw(data_type: DataType, bytes: &'static [u8]) -> TensorProto {
    let width = if data_type == DataType::Double { 8 } else { 2 };
    TensorProto::raw("w", data_type, &[bytes.len() as i64 / width], Bytes::from_static(bytes))
}

#[test]
fn floats_are_read_from_every_storage() {
    let data = [0.0, -1.5, f32::MAX, f32::MIN_POSITIVE, 3.25, f32::INFINITY];
    assert_eq!(TensorProto::f32("w", &[2, 3], &data).to_f32(), Ok(data.to_vec()));
    let tensor = TensorProto { float_data: data.to_vec(), ..typed(DataType::Float, &[3, 2]) };
    assert_eq!(tensor.to_f32(), Ok(data.to_vec()));

    let tensor = TensorProto { double_data: vec![0.1, -2.0], ..typed(DataType::Double, &[2]) };
    assert_eq!(tensor.to_f32(), Ok(vec![0.1, -2.0]));
    let tensor = raw(DataType::Double, b"\0\0\0\0\0\0\0\xc0");
    assert_eq!(tensor.to_f32(), Ok(vec![-2.0]));

    let halves = TensorProto { int32_data: vec![0x3c00, 0xc000], ..typed(DataType::Float16, &[2]) };
    assert_eq!(halves.to_f32(), Ok(vec![1.0, -2.0]));
    assert_eq!(raw(DataType::Float16, b"\0\x3c\0\xc0").to_f32(), Ok(vec![1.0, -2.0]));
    let brain = TensorProto { int32_data: vec![0x3f80, 0xc000], ..typed(DataType::Bfloat16, &[2]) };
    assert_eq!(brain.to_f32(), Ok(vec![1.0, -2.0]));
    assert_eq!(raw(DataType::Bfloat16, b"\x80\x3f\0\xc0").to_f32(), Ok(vec![1.0, -2.0]));
}

#[test]
fn integers_are_read_from_every_storage() {
    let data = [i64::MIN, -1, 0, i64::MAX];
    assert_eq!(TensorProto::i64("w", &[4], &data).to_i64(), Ok(data.to_vec()));
    let tensor = TensorProto { int64_data: data.to_vec(), ..typed(DataType::Int64, &[2, 2]) };
    assert_eq!(tensor.to_i64(), Ok(data.to_vec()));

    let raw_cases: [(DataType, &'static [u8], i64); 7] = [
        (DataType::Int32, b"\xfe\xff\xff\xff", -2),
        (DataType::Int16, b"\xfe\xff", -2),
        (DataType::Int8, b"\xfe", -2),
        (DataType::Uint32, b"\xfe\xff\xff\xff", 0xffff_fffe),
        (DataType::Uint16, b"\xfe\xff", 0xfffe),
        (DataType::Uint8, b"\xfe", 0xfe),
        (DataType::Bool, b"\x01", 1),
    ];
    for (data_type, bytes, expected) in raw_cases {
        let tensor = TensorProto::raw("w", data_type, &[], Bytes::from_static(bytes));
        assert_eq!(tensor.to_i64(), Ok(vec![expected]), "{data_type:?}, raw");
        let tensor = TensorProto {
            int32_data: if data_type == DataType::Uint32 { vec![] } else { vec![expected as i32] },
            uint64_data: if data_type == DataType::Uint32 { vec![0xffff_fffe] } else { vec![] },
            ..typed(data_type, &[])
        };
        assert_eq!(tensor.to_i64(), Ok(vec![expected]), "{data_type:?}, typed");
    }
}

#[test]
fn tensors_that_cannot_be_read_say_why() {
    let external = TensorProto {
        data_location: Some(DataLocation::External as i32),
        external_data: vec![StringStringEntryProto {
            key: text("location"),
            value: text("weights.bin"),
        }],
        ..typed(DataType::Float, &[2])
    };
    let unnamed = TensorProto { data_type: Some(99), ..TensorProto::default() };
    let cases = [
        (external.to_f32().unwrap_err(), {
            r#"tensor "w" keeps its data in another file, "weights.bin""#
        }),
        (typed(DataType::String, &[]).to_f32().unwrap_err(), {
            r#"tensor "w" has element type STRING, which cannot be read as f32"#
        }),
        (unnamed.to_i64().unwrap_err(), {
            r#"tensor "" has element type number 99, which cannot be read as i64"#
        }),
        (TensorProto::f32("w", &[2, 3], &[0.0]).to_f32().unwrap_err(), {
            r#"tensor "w" of shape [2, 3] needs 6 elements, its data has 4 bytes"#
        }),
        (typed(DataType::Int64, &[2]).to_i64().unwrap_err(), {
            r#"tensor "w" of shape [2] needs 2 elements, its data has 0 values"#
        }),
    ];
    for (error, expected) in cases {
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn hostile_shapes_neither_overflow_nor_allocate() {
    let impossible: [&[i64]; 5] =
        [&[-1], &[i64::MIN, 0], &[i64::MAX, i64::MAX], &[1 << 32, 1 << 32], &[i64::MAX, 2, 2]];
    for dims in impossible {
        let float = TensorProto::f32("w", dims, &[1.0]);
        let expected = OnnxError::Shape { tensor: "w".to_owned(), dims: dims.to_vec() };
        assert_eq!(float.elements(), Err(expected.clone()));
        assert_eq!(float.to_f32(), Err(expected.clone()));
        assert_eq!(typed(DataType::Int64, dims).to_i64(), Err(expected));
    }
    // Possible, but far more than there is; the last has more bytes than an address can count.
    for dims in [vec![1 << 40], vec![i64::MAX], vec![2; 62]] {
        for tensor in [TensorProto::f32("w", &dims, &[1.0]), typed(DataType::Float, &dims)] {
            assert!(matches!(tensor.to_f32(), Err(OnnxError::DataSize { .. })), "{dims:?}");
        }
    }
    // An extent of zero makes the tensor empty whatever the others are.
    assert_eq!(typed(DataType::Float, &[i64::MAX, i64::MAX, 0]).to_f32(), Ok(vec![]));
    assert_eq!(TensorProto::f32("w", &[0, 3], &[]).to_f32(), Ok(vec![]));
}

// ---- Accessors.

#[test]
fn attributes_are_found_by_name_and_kind() {
    let mut node = NodeProto::new("Conv", "c", &["x", "w"], &["y"]);
    node.attribute = vec![
        attr_int("group", 4),
        attr_ints("pads", &[1, 1, 1, 1]),
        attr_ints("none", &[]),
        attr_float("alpha", 0.5),
        attr_string("auto_pad", "NOTSET"),
        AttributeProto { i: None, ..attr_int("dropped_zero", 0) },
        AttributeProto { r#type: None, ..attr_int("kind_not_stated", 7) },
        AttributeProto { ref_attr_name: text("outer"), i: None, ..attr_int("reference", 0) },
        AttributeProto { s: Some(b"\xff".to_vec()), ..attr_string("not_utf8", "") },
    ];
    assert_eq!(node.int("group"), Some(4));
    assert_eq!(node.ints("pads"), Some(&[1, 1, 1, 1][..]));
    assert_eq!(node.ints("none"), Some(&[][..]));
    assert_eq!(node.float("alpha"), Some(0.5));
    assert_eq!(node.text("auto_pad"), Some("NOTSET"));
    assert_eq!(node.int("dropped_zero"), Some(0));
    assert_eq!(node.int("kind_not_stated"), Some(7));
    assert_eq!(node.text("kind_not_stated"), None);
    assert_eq!(node.int("reference"), None);
    assert_eq!(node.text("not_utf8"), None);
    assert_eq!(node.int("pads"), None);
    assert_eq!(node.int("missing"), None);
    assert_eq!(node.attribute("group").unwrap().i, Some(4));
}

#[test]
fn values_operator_sets_and_metadata_are_found() {
    let value = ValueInfoProto::tensor("x", DataType::Float, &[1, -1]);
    assert_eq!(value.element_type(), Some(DataType::Float));
    assert_eq!(value.shape(), Some(vec![Some(1), None]));
    assert_eq!(ValueInfoProto::default().shape(), None);

    let mut model = tiny();
    assert_eq!((model.opset(""), model.opset("ai.onnx")), (Some(18), Some(18)));
    assert_eq!(model.opset("org.snn"), None);
    assert_eq!(model.metadata("k"), None);
    model.set_metadata("k", "1");
    model.set_metadata("l", "2");
    model.set_metadata("k", "3");
    assert_eq!((model.metadata("k"), model.metadata("l")), (Some("3"), Some("2")));
    assert_eq!(model.metadata_props.len(), 2);
}

// ---- No bytes make the reader panic.

/// Reads everything there is to read.
fn exercise(bytes: &[u8]) {
    let _ = onnx::unknown_field(bytes);
    let Ok(model) = read(bytes) else { return };
    let graph = model.graph.as_ref().unwrap();
    let attributes = graph.node.iter().flat_map(|node| &node.attribute);
    let tensors = attributes.filter_map(|attribute| attribute.t.as_ref());
    for tensor in tensors.chain(&graph.initializer) {
        let _ = (tensor.elements(), tensor.to_f32(), tensor.to_i64());
    }
    for value in graph.input.iter().chain(&graph.output) {
        let _ = (value.shape(), value.element_type());
    }
    // Whatever was read is written in one way only.
    let written = onnx::encode(&model);
    assert_eq!(onnx::encode(&read(&written).unwrap()), written);
    assert_eq!(onnx::unknown_field(&written), None);
}

/// Models small enough that most mutations hit structure, with tensors that can be read.
fn seeds() -> Vec<Vec<u8>> {
    let mut model = tiny();
    let graph = model.graph.as_mut().unwrap();
    graph.initializer = vec![
        TensorProto::f32("w", &[2, 2], &[1.0, 2.0, 3.0, 4.0]),
        TensorProto::i64("axes", &[2], &[0, -1]),
        TensorProto { float_data: vec![1.0, 2.0], ..typed(DataType::Float, &[2]) },
        TensorProto { int32_data: vec![1, 2], ..typed(DataType::Float16, &[2]) },
        TensorProto { uint64_data: vec![1, 2], ..typed(DataType::Uint32, &[2]) },
    ];
    vec![onnx::encode(&model), EVERYTHING.to_vec(), onnx::encode(&everything())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_models_never_panic(
        seed in 0..3_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = seeds().swap_remove(seed);
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(end.map_or(bytes.len(), |end| end.index(bytes.len())));
        exercise(&bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(&bytes);
        // The same as the inside of a model.
        let mut model = b"\x08\x02\x3a".to_vec();
        model.extend([bytes.len() as u8 | 0x80, (bytes.len() >> 7) as u8]);
        model.extend(&bytes);
        exercise(&model);
    }
}
