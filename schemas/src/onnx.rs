//! ONNX models: the messages of `onnx.proto`, and what one needs around them.
//!
//! Takes the bytes of an `.onnx` file ([`decode`]) and gives a [`ModelProto`], or takes a model and
//! gives bytes ([`encode`]). All fields up to IR version 14 survive the way through unchanged, and
//! [`unknown_field`] tells when a file has one that does not. Weights in `raw_data` are slices of
//! the bytes that were read, never copies. Equal models give equal bytes.
//!
//! Any bytes at all give a model or an error of one sentence: no panic, no allocation that the size
//! of the file does not justify, no trust in shapes. Beyond the rules of [`decode`] a model is not
//! checked; names may be missing, edges may dangle.

use bytes::Bytes;
use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint};

use attribute_proto::AttributeType;
pub use messages::*;
use tensor_proto::{DataLocation, DataType};

#[allow(missing_docs, clippy::all, rustdoc::all, reason = "generated from onnx.proto")]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

/// Version of the IR that these messages cover.
pub const IR_VERSION: i64 = Version::IrVersion as i64;

/// How deep messages may lie inside one another: prost's own limit, 33 subgraphs one in the other.
const MAX_DEPTH: usize = 100;

/// A message's name and fields: each field's number, and which message it holds, if any.
type MessageFields = (&'static str, &'static [(u32, Option<usize>)]);

/// The fields of every message; a message is meant by its place here.
const FIELDS: &[MessageFields] = include!(concat!(env!("OUT_DIR"), "/onnx_fields.rs"));

/// Reads an `.onnx` file. The model shares the memory of `bytes`.
///
/// # Errors
/// The bytes are no protobuf of a model, end too early, or nest too deep; or the model lacks its IR
/// version, its graph, or (from IR 3 on) its operator sets.
pub fn decode(bytes: Bytes) -> Result<ModelProto, OnnxError> {
    let not_onnx = |reason: &str| OnnxError::NotOnnx { reason: reason.to_owned() };
    if bytes.is_empty() {
        return Err(not_onnx("it is empty"));
    }
    let model = ModelProto::decode(bytes.clone()).map_err(|error| explain(&bytes, &error))?;
    if model.ir_version() < 1 {
        return Err(not_onnx("it states no IR version"));
    }
    if model.graph.is_none() {
        return Err(OnnxError::Incomplete { missing: "graph" });
    }
    if model.opset_import.is_empty() && model.ir_version() >= Version::IrVersion2017113 as i64 {
        return Err(OnnxError::Incomplete { missing: "operator sets" });
    }
    Ok(model)
}

/// Writes an `.onnx` file: fields in the order of their numbers, as the standard's own writers do,
/// except that a type's denotation comes last.
pub fn encode(model: &ModelProto) -> Vec<u8> {
    model.encode_to_vec()
}

/// A field of the file that [`decode`] dropped, because the messages do not know it: the file is of
/// a newer IR, or carries somebody's extension. `None` if nothing was lost.
///
/// `bytes` are those given to `decode`. (Comparing lengths would not do: some writers encode lists
/// in another way, which is as good and differs in length.)
pub fn unknown_field(bytes: &[u8]) -> Option<UnknownField> {
    let model = FIELDS.iter().position(|(name, _)| *name == "ModelProto")?;
    unknown_field_of(model, bytes, 0)
}

fn unknown_field_of(message: usize, mut rest: &[u8], depth: usize) -> Option<UnknownField> {
    let (name, fields) = FIELDS[message];
    while !rest.is_empty() {
        let field = next_field(&mut rest)?;
        let Some((_, holds)) = fields.iter().find(|(number, _)| *number == field.number) else {
            return Some(UnknownField { message: name, number: field.number });
        };
        if let Some(inner) = holds.filter(|_| depth < MAX_DEPTH) {
            let found = unknown_field_of(inner, field.content, depth + 1);
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

/// A field as it stands in the file.
struct Field<'a> {
    number: u32,
    /// Its bytes; empty for a number of variable length.
    content: &'a [u8],
    /// How many more bytes it should have.
    missing: usize,
}

/// Splits the next field off; `None` if there is no whole beginning of one.
fn next_field<'a>(rest: &mut &'a [u8]) -> Option<Field<'a>> {
    let (number, wire_type) = decode_key(rest).ok()?;
    let length = match wire_type {
        WireType::Varint => decode_varint(rest).ok().map(|_| 0)?,
        WireType::SixtyFourBit => 8,
        WireType::ThirtyTwoBit => 4,
        WireType::LengthDelimited => usize::try_from(decode_varint(rest).ok()?).ok()?,
        // No message here has groups: whoever asks stops at the unknown number.
        WireType::StartGroup | WireType::EndGroup => 0,
    };
    let (content, after) = rest.split_at(length.min(rest.len()));
    *rest = after;
    Some(Field { number, content, missing: length - content.len() })
}

/// The error for bytes that prost refuses.
fn explain(bytes: &[u8], error: &prost::DecodeError) -> OnnxError {
    if let Some(missing) = missing_bytes(bytes) {
        return OnnxError::CutShort { missing };
    }
    let text = error.to_string();
    if text.ends_with("recursion limit reached") {
        return OnnxError::TooDeep;
    }
    let reason = text.strip_prefix("failed to decode Protobuf message: ").unwrap_or(&text);
    OnnxError::NotOnnx { reason: reason.to_owned() }
}

/// How many bytes at least are missing, if these are the first bytes of a model: they begin with an
/// IR version, and go on with nothing but fields of a model, until the last runs past the end.
fn missing_bytes(bytes: &[u8]) -> Option<usize> {
    /// Most bytes of a number of variable length; with as many left it was wrong, not cut.
    const LONGEST_VARINT: usize = 10;
    const IR_VERSION_KEY: u8 = 1 << 3;

    if bytes.first() != Some(&IR_VERSION_KEY) {
        return None;
    }
    let (_, fields) = FIELDS.iter().find(|(name, _)| *name == "ModelProto")?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let before = rest.len();
        let Some(field) = next_field(&mut rest) else {
            return (before < LONGEST_VARINT).then_some(1);
        };
        if !fields.iter().any(|(number, _)| *number == field.number) {
            return None;
        }
        if field.missing > 0 {
            return Some(field.missing);
        }
    }
    None
}

impl ModelProto {
    /// Value of a metadata entry.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata_props.iter().find(|entry| entry.key() == key).map(|entry| entry.value())
    }

    /// Sets a metadata entry, in its place if there is one, else at the end.
    pub fn set_metadata(&mut self, key: &str, value: &str) {
        let entry =
            StringStringEntryProto { key: Some(key.to_owned()), value: Some(value.to_owned()) };
        match self.metadata_props.iter_mut().find(|entry| entry.key() == key) {
            Some(place) => *place = entry,
            None => self.metadata_props.push(entry),
        }
    }

    /// Imported version of an operator set; `""` and `"ai.onnx"` both mean the standard's own.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let short = |domain: &str| if domain == "ai.onnx" { "" } else { domain }.to_owned();
        let set = self.opset_import.iter().find(|set| short(set.domain()) == short(domain));
        set.map(|set| set.version())
    }
}

impl NodeProto {
    /// An op of the standard's own operator set, without attributes.
    pub fn new(op_type: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        NodeProto {
            op_type: Some(op_type.to_owned()),
            name: Some(name.to_owned()),
            input: owned(inputs),
            output: owned(outputs),
            ..NodeProto::default()
        }
    }

    /// The attribute of that name.
    pub fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|attribute| attribute.name() == name)
    }

    /// An attribute that is an integer; `None` if there is none of that name and kind.
    pub fn int(&self, name: &str) -> Option<i64> {
        let attribute = self.attribute(name)?;
        attribute.holds(AttributeType::Int, attribute.i.is_some()).then(|| attribute.i())
    }

    /// An attribute that is a list of integers; `None` if there is none of that name and kind.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        let attribute = self.attribute(name)?;
        let present = !attribute.ints.is_empty();
        attribute.holds(AttributeType::Ints, present).then_some(&attribute.ints)
    }

    /// An attribute that is a float; `None` if there is none of that name and kind.
    pub fn float(&self, name: &str) -> Option<f32> {
        let attribute = self.attribute(name)?;
        attribute.holds(AttributeType::Float, attribute.f.is_some()).then(|| attribute.f())
    }

    /// An attribute that is UTF-8 text; `None` if there is none of that name and kind.
    pub fn text(&self, name: &str) -> Option<&str> {
        let attribute = self.attribute(name)?;
        let text = std::str::from_utf8(attribute.s()).ok()?;
        attribute.holds(AttributeType::String, attribute.s.is_some()).then_some(text)
    }
}

impl AttributeProto {
    /// Whether the attribute is of this kind. Some writers leave a value of zero out, IR 1 the kind.
    fn holds(&self, kind: AttributeType, present: bool) -> bool {
        let stated = self.r#type();
        let is_reference = !self.ref_attr_name().is_empty();
        !is_reference && (stated == kind || (stated == AttributeType::Undefined && present))
    }

    fn of(kind: AttributeType, name: &str) -> AttributeProto {
        AttributeProto {
            name: Some(name.to_owned()),
            r#type: Some(kind as i32),
            ..AttributeProto::default()
        }
    }
}

/// An attribute that is an integer.
pub fn attr_int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..AttributeProto::of(AttributeType::Int, name) }
}

/// An attribute that is a list of integers.
pub fn attr_ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { ints: values.to_vec(), ..AttributeProto::of(AttributeType::Ints, name) }
}

/// An attribute that is a float.
pub fn attr_float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..AttributeProto::of(AttributeType::Float, name) }
}

/// An attribute that is text.
pub fn attr_string(name: &str, value: &str) -> AttributeProto {
    let value = value.as_bytes().to_vec();
    AttributeProto { s: Some(value), ..AttributeProto::of(AttributeType::String, name) }
}

impl ValueInfoProto {
    /// A tensor. A negative extent in `shape` says that the axis' extent is unknown.
    pub fn tensor(name: &str, elem_type: DataType, shape: &[i64]) -> ValueInfoProto {
        use tensor_shape_proto::{Dimension, dimension};

        let dimension = |&extent: &i64| Dimension {
            value: (extent >= 0).then_some(dimension::Value::DimValue(extent)),
            denotation: None,
        };
        let tensor = type_proto::Tensor {
            elem_type: Some(elem_type as i32),
            shape: Some(TensorShapeProto { dim: shape.iter().map(dimension).collect() }),
        };
        let value = Some(type_proto::Value::TensorType(tensor));
        ValueInfoProto {
            name: Some(name.to_owned()),
            r#type: Some(TypeProto { value, denotation: None }),
            ..ValueInfoProto::default()
        }
    }

    /// Element type, if this is a dense tensor of a known one.
    pub fn element_type(&self) -> Option<DataType> {
        DataType::try_from(self.tensor_type()?.elem_type()).ok()
    }

    /// Shape, if this is a dense tensor of known rank; `None` for an axis of unknown extent.
    pub fn shape(&self) -> Option<Vec<Option<i64>>> {
        let shape = self.tensor_type()?.shape.as_ref()?;
        let extent = |dimension: &tensor_shape_proto::Dimension| match dimension.value {
            Some(tensor_shape_proto::dimension::Value::DimValue(extent)) => Some(extent),
            _ => None,
        };
        Some(shape.dim.iter().map(extent).collect())
    }

    fn tensor_type(&self) -> Option<&type_proto::Tensor> {
        match self.r#type.as_ref()?.value.as_ref()? {
            type_proto::Value::TensorType(tensor) => Some(tensor),
            _ => None,
        }
    }
}

impl TensorProto {
    /// A FLOAT tensor, data in `raw_data`. `shape` must fit the number of elements.
    pub fn f32(name: &str, shape: &[i64], data: &[f32]) -> TensorProto {
        let raw = data.iter().flat_map(|value| value.to_le_bytes()).collect();
        TensorProto::raw(name, DataType::Float, shape, raw)
    }

    /// An INT64 tensor, data in `raw_data`. `shape` must fit the number of elements.
    pub fn i64(name: &str, shape: &[i64], data: &[i64]) -> TensorProto {
        let raw = data.iter().flat_map(|value| value.to_le_bytes()).collect();
        TensorProto::raw(name, DataType::Int64, shape, raw)
    }

    /// A tensor of any fixed-width type, from its little-endian bytes.
    pub fn raw(name: &str, data_type: DataType, shape: &[i64], raw_data: Bytes) -> TensorProto {
        TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(data_type as i32),
            dims: shape.to_vec(),
            raw_data: Some(raw_data),
            ..TensorProto::default()
        }
    }

    /// Element type, if it is a known one.
    pub fn element_type(&self) -> Option<DataType> {
        DataType::try_from(self.data_type()).ok()
    }

    /// Number of elements the shape has. Says nothing about how many are stored.
    ///
    /// # Errors
    /// An extent is negative, or the number has no place in memory.
    pub fn elements(&self) -> Result<usize, OnnxError> {
        let extents: Option<Vec<usize>> =
            self.dims.iter().map(|&extent| usize::try_from(extent).ok()).collect();
        extents
            .and_then(|extents| {
                let product = extents.iter().try_fold(1, |n: usize, &extent| n.checked_mul(extent));
                if extents.contains(&0) { Some(0) } else { product }
            })
            .ok_or_else(|| OnnxError::Shape { tensor: self.label(), dims: self.dims.clone() })
    }

    /// The data, row-major, of a FLOAT, FLOAT16, BFLOAT16 or DOUBLE (rounded) tensor.
    ///
    /// # Errors
    /// The element type is another one, the data stands in another file, or does not fill the shape.
    pub fn to_f32(&self) -> Result<Vec<f32>, OnnxError> {
        let (int32, float, double) = (&self.int32_data, &self.float_data, &self.double_data);
        match self.element_type() {
            Some(DataType::Float) => self.read(float, |&x| x, f32::from_le_bytes),
            Some(DataType::Double) => {
                self.read(double, |&x| x as f32, |b| f64::from_le_bytes(b) as f32)
            }
            Some(DataType::Float16) => {
                self.read(int32, |&x| f16_to_f32(x as u16), |b| f16_to_f32(u16::from_le_bytes(b)))
            }
            Some(DataType::Bfloat16) => {
                let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
                self.read(int32, |&x| widen(x as u16), |b| widen(u16::from_le_bytes(b)))
            }
            _ => Err(self.not_readable_as("f32")),
        }
    }

    /// The data, row-major, of a BOOL or integer tensor; UINT64 and types below 8 bits excepted.
    ///
    /// # Errors
    /// The element type is another one, the data stands in another file, or does not fill the shape.
    pub fn to_i64(&self) -> Result<Vec<i64>, OnnxError> {
        let (int32, int64, uint64) = (&self.int32_data, &self.int64_data, &self.uint64_data);
        match self.element_type() {
            Some(DataType::Int64) => self.read(int64, |&x| x, i64::from_le_bytes),
            Some(DataType::Int32) => {
                self.read(int32, |&x| x.into(), |b| i32::from_le_bytes(b).into())
            }
            Some(DataType::Int16) => {
                self.read(int32, |&x| (x as i16).into(), |b| i16::from_le_bytes(b).into())
            }
            Some(DataType::Int8) => {
                self.read(int32, |&x| (x as i8).into(), |b| i8::from_le_bytes(b).into())
            }
            Some(DataType::Uint32) => {
                self.read(uint64, |&x| (x as u32).into(), |b| u32::from_le_bytes(b).into())
            }
            Some(DataType::Uint16) => {
                self.read(int32, |&x| (x as u16).into(), |b| u16::from_le_bytes(b).into())
            }
            Some(DataType::Uint8) => {
                self.read(int32, |&x| (x as u8).into(), |b| u8::from_le_bytes(b).into())
            }
            Some(DataType::Bool) => {
                self.read(int32, |&x| (x != 0).into(), |b: [u8; 1]| (b[0] != 0).into())
            }
            _ => Err(self.not_readable_as("i64")),
        }
    }

    /// Reads whichever storage the tensor uses, after checking that it fills the shape.
    fn read<Typed, Value, const WIDTH: usize>(
        &self,
        typed: &[Typed],
        from_typed: impl Fn(&Typed) -> Value,
        from_raw: impl Fn([u8; WIDTH]) -> Value,
    ) -> Result<Vec<Value>, OnnxError> {
        if self.data_location() == DataLocation::External {
            let entry = self.external_data.iter().find(|entry| entry.key() == "location");
            let location = entry.map(|entry| entry.value().to_owned()).unwrap_or_default();
            return Err(OnnxError::External { tensor: self.label(), location });
        }
        let elements = self.elements()?;
        let does_not_fill = |found| {
            let (tensor, dims) = (self.label(), self.dims.clone());
            Err(OnnxError::DataSize { tensor, dims, elements, found })
        };
        let raw = self.raw_data();
        if raw.is_empty() {
            if typed.len() != elements {
                return does_not_fill(format!("{} values", typed.len()));
            }
            return Ok(typed.iter().map(from_typed).collect());
        }
        if elements.checked_mul(WIDTH) != Some(raw.len()) {
            return does_not_fill(format!("{} bytes", raw.len()));
        }
        Ok(raw.as_chunks().0.iter().map(|&bytes| from_raw(bytes)).collect())
    }

    fn not_readable_as(&self, wanted: &'static str) -> OnnxError {
        let found = match self.element_type() {
            Some(known) => known.as_str_name().to_owned(),
            None => format!("number {}", self.data_type()),
        };
        OnnxError::ElementType { tensor: self.label(), found, wanted }
    }

    /// The name, for errors.
    fn label(&self) -> String {
        self.name().to_owned()
    }
}

/// Widens an IEEE 754 half: every value has an exact `f32`.
fn f16_to_f32(bits: u16) -> f32 {
    /// The value of the lowest mantissa bit of a subnormal half, 2⁻²⁴.
    const SUBNORMAL_UNIT: f32 = 1.0 / 16_777_216.0;
    /// Exponent bias of an f32 less that of a half.
    const REBIAS: u32 = 127 - 15;

    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10 & 0x1f);
    let mantissa = u32::from(bits & 0x3ff);
    let magnitude = match exponent {
        0 => (mantissa as f32 * SUBNORMAL_UNIT).to_bits(),
        0x1f => 0xff << 23 | mantissa << 13,
        _ => (exponent + REBIAS) << 23 | mantissa << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// A field that the messages do not know, and so do not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownField {
    /// Name of the message it stands in, such as `GraphProto`.
    pub message: &'static str,
    /// Its number.
    pub number: u32,
}

impl std::fmt::Display for UnknownField {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "field {} of {}", self.number, self.message)
    }
}

/// Why bytes are no ONNX model, or a tensor cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// Not a protobuf of a model at all, or a damaged one.
    #[error("not an ONNX model: {reason}")]
    NotOnnx {
        /// What is wrong with it.
        reason: String,
    },
    /// The beginning of a model.
    #[error("ONNX model is cut short: at least {missing} more bytes are expected at its end")]
    CutShort {
        /// How many bytes at least are missing.
        missing: usize,
    },
    /// A part every model must have is not there.
    #[error("not a complete ONNX model: it has no {missing}")]
    Incomplete {
        /// The part.
        missing: &'static str,
    },
    /// Deeper than any real model: subgraphs in subgraphs, or types in types.
    #[error("ONNX model nests more than {MAX_DEPTH} messages inside one another")]
    TooDeep,
    /// The tensor's data stands in a file beside the model.
    #[error("tensor {tensor:?} keeps its data in another file, {location:?}")]
    External {
        /// Name of the tensor.
        tensor: String,
        /// The file, relative to the model's folder.
        location: String,
    },
    /// The tensor's elements are of a type that cannot be had as the one asked for.
    #[error("tensor {tensor:?} has element type {found}, which cannot be read as {wanted}")]
    ElementType {
        /// Name of the tensor.
        tensor: String,
        /// Its element type.
        found: String,
        /// The type asked for.
        wanted: &'static str,
    },
    /// The tensor's shape is impossible.
    #[error("tensor {tensor:?} has the impossible shape {dims:?}")]
    Shape {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        dims: Vec<i64>,
    },
    /// The tensor has more or less data than its shape says.
    #[error("tensor {tensor:?} of shape {dims:?} needs {elements} elements, its data has {found}")]
    DataSize {
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        dims: Vec<i64>,
        /// Elements of that shape.
        elements: usize,
        /// What there is, with its unit.
        found: String,
    },
}

#[cfg(test)]
mod tests {
    use super::f16_to_f32;

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            let exponent = i32::from(bits >> 10 & 0x1f);
            let mantissa = f64::from(bits & 0x3ff);
            let found = f64::from(f16_to_f32(bits));
            match (exponent, bits & 0x3ff) {
                (0x1f, 0) => assert_eq!(found, sign * f64::INFINITY),
                (0x1f, _) => assert!(found.is_nan()),
                (0, _) => assert_eq!(found, sign * mantissa * 2f64.powi(-24)),
                _ => assert_eq!(found, sign * (1024.0 + mantissa) * 2f64.powi(exponent - 25)),
            }
        }
    }
}
