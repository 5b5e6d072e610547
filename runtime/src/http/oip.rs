//! The Open Inference Protocol, version 2: its requests and answers as JSON and binary tensors.
//!
//! [`read`] takes a body and what the model takes; gives one tensor an input, in the model's order,
//! and how the answer is wanted. [`write`] gives the answer's body. Tensors stand as numbers in the
//! JSON (nested or flat) or, with the binary extension, one after another behind it, f32 and
//! little-endian; the head field [`HEADER_LENGTH`] says where the JSON ends. Pure functions: any
//! bytes give a request or one sentence, and nothing is allocated that the bytes do not justify.

use std::time::Duration;

use bytes::Bytes;
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use snn_schemas::manifest::Port;

use crate::client::ClusterInfo;
use crate::{Answer, Tensor};

/// Head field that says how long the JSON before binary tensors is, in bytes.
pub const HEADER_LENGTH: &str = "inference-header-content-length";
/// The only version a model has.
pub const VERSION: &str = "1";
/// Element type of every tensor.
const DATATYPE: &str = "FP32";
/// Metadata key of a model's name.
const NAME: &str = "snn.name";
/// A model's name where its metadata has none.
const DEFAULT_NAME: &str = "model";
/// Characters that a number of an input may take in JSON, its separator and layout included.
const CHARACTERS_A_NUMBER: usize = 32;
/// What a request may take beside its numbers: names, parameters, braces.
const BODY_SLACK: usize = 64 << 10;

/// What the server is.
pub fn server() -> Value {
    json!({
        "name": "snn",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["binary_tensor_data"],
    })
}

/// The name that a cluster's model has here.
pub fn model_name(info: &ClusterInfo) -> &str {
    let name = info.metadata.iter().find(|(key, _)| key == NAME);
    name.map_or(DEFAULT_NAME, |(_, name)| name.as_str())
}

/// What the model takes and gives.
pub fn model(info: &ClusterInfo) -> Value {
    let port =
        |port: &Port| json!({ "name": port.name, "datatype": DATATYPE, "shape": port.shape });
    json!({
        "name": model_name(info),
        "versions": [VERSION],
        "platform": "snn_onnx",
        "inputs": info.inputs.iter().map(port).collect::<Vec<_>>(),
        "outputs": info.outputs.iter().map(port).collect::<Vec<_>>(),
    })
}

/// Longest body of a request for a model of these inputs, in bytes.
pub fn largest_body(inputs: &[Port]) -> usize {
    inputs.iter().map(elements).sum::<usize>() * CHARACTERS_A_NUMBER + BODY_SLACK
}

fn elements(port: &Port) -> usize {
    port.shape.iter().product()
}

/// One inference request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// The model's inputs, in its order.
    pub inputs: Vec<Tensor>,
    /// How long it may take, where it says so.
    pub within: Option<Duration>,
    /// How the answer is wanted.
    pub wanted: Wanted,
}

/// How an answer is wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// The client's name for the request.
    id: Option<String>,
    /// Outputs by their place in the model, and whether in binary; all of them where empty.
    outputs: Vec<(usize, bool)>,
    /// Whether outputs are binary where nothing else is said of them.
    binary: bool,
}

#[derive(Deserialize)]
struct Body {
    id: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
    inputs: Vec<Input>,
    #[serde(default)]
    outputs: Vec<Output>,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    shape: Vec<usize>,
    datatype: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    data: Option<Numbers>,
}

#[derive(Deserialize)]
struct Output {
    name: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

/// Reads a body; `header` is the length of its JSON where the head names one.
///
/// # Errors
/// One sentence: what is wrong with the request.
pub fn read(body: &Bytes, header: Option<usize>, info: &ClusterInfo) -> Result<Request, String> {
    let length = header.unwrap_or(body.len());
    if length > body.len() {
        let body = body.len();
        return Err(format!("{HEADER_LENGTH} is {length}, but the body has {body} bytes"));
    }
    let (json, binary) = body.split_at(length);
    let parsed: Body = serde_json::from_slice(json)
        .map_err(|error| format!("the request is unreadable: {error}"))?;
    let within = timeout(&parsed.parameters)?;
    let binary_default = flag(&parsed.parameters, "binary_data_output", "the request")?;
    let outputs = outputs(&parsed.outputs, binary_default.unwrap_or(false), info)?;
    let wanted = Wanted { id: parsed.id, outputs, binary: binary_default.unwrap_or(false) };
    let inputs = inputs(parsed.inputs, binary, info)?;
    Ok(Request { inputs, within, wanted })
}

fn inputs(given: Vec<Input>, mut binary: &[u8], info: &ClusterInfo) -> Result<Vec<Tensor>, String> {
    let mut found: Vec<Option<Tensor>> = vec![None; info.inputs.len()];
    for input in given {
        let place = info.inputs.iter().position(|port| port.name == input.name);
        let place = place.ok_or_else(|| format!("the model has no input {:?}", input.name))?;
        if found[place].is_some() {
            return Err(format!("input {:?} is given twice", input.name));
        }
        found[place] = Some(tensor(input, &info.inputs[place], &mut binary)?);
    }
    if !binary.is_empty() {
        return Err(format!("{} bytes follow the last binary tensor", binary.len()));
    }
    let missing = |(tensor, port): (Option<Tensor>, &Port)| {
        tensor.ok_or_else(|| format!("input {:?} is missing", port.name))
    };
    found.into_iter().zip(&info.inputs).map(missing).collect()
}

fn tensor(input: Input, port: &Port, binary: &mut &[u8]) -> Result<Tensor, String> {
    let name = &input.name;
    if input.datatype != DATATYPE {
        return Err(format!("input {name:?} is {}, expected {DATATYPE}", input.datatype));
    }
    if input.shape != port.shape {
        let (found, expected) = (&input.shape, &port.shape);
        return Err(format!("input {name:?} has shape {found:?}, expected {expected:?}"));
    }
    refuse_shared_memory(&input.parameters, name)?;
    let expected = elements(port);
    let data = match (input.parameters.get("binary_data_size"), input.data) {
        (Some(_), Some(_)) => {
            return Err(format!("input {name:?} has both data and binary_data_size"));
        }
        (None, None) => {
            return Err(format!("input {name:?} has neither data nor binary_data_size"));
        }
        (None, Some(Numbers(data))) => data,
        (Some(size), None) => take(binary, size, expected * size_of::<f32>(), name)?,
    };
    if data.len() != expected {
        return Err(format!("input {name:?} has {} numbers, expected {expected}", data.len()));
    }
    Tensor::new(input.shape, data).map_err(|error| format!("input {name:?}: {error}"))
}

/// The next binary tensor.
fn take(binary: &mut &[u8], size: &Value, expected: usize, name: &str) -> Result<Vec<f32>, String> {
    if size.as_u64() != Some(expected as u64) {
        return Err(format!("input {name:?} has binary_data_size {size}, expected {expected}"));
    }
    let Some((bytes, rest)) = binary.split_at_checked(expected) else {
        let left = binary.len();
        return Err(format!(
            "input {name:?} has {expected} bytes of binary data, but {left} are left"
        ));
    };
    *binary = rest;
    Ok(bytes.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect())
}

fn outputs(
    given: &[Output],
    binary: bool,
    info: &ClusterInfo,
) -> Result<Vec<(usize, bool)>, String> {
    let mut outputs: Vec<(usize, bool)> = Vec::with_capacity(given.len());
    for Output { name, parameters } in given {
        let place = info.outputs.iter().position(|port| port.name == *name);
        let place = place.ok_or_else(|| format!("the model has no output {name:?}"))?;
        if outputs.iter().any(|&(taken, _)| taken == place) {
            return Err(format!("output {name:?} is asked for twice"));
        }
        refuse_shared_memory(parameters, name)?;
        if parameters.get("classification").is_some_and(|top| top != &json!(0)) {
            return Err(format!("output {name:?}: the classification extension is not supported"));
        }
        let what = format!("output {name:?}");
        outputs.push((place, flag(parameters, "binary_data", &what)?.unwrap_or(binary)));
    }
    Ok(outputs)
}

fn refuse_shared_memory(parameters: &Map<String, Value>, name: &str) -> Result<(), String> {
    match parameters.keys().any(|key| key.starts_with("shared_memory")) {
        true => Err(format!("tensor {name:?}: the shared memory extension is not supported")),
        false => Ok(()),
    }
}

fn flag(parameters: &Map<String, Value>, key: &str, what: &str) -> Result<Option<bool>, String> {
    match parameters.get(key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(format!("{what} has {key} {other}, expected true or false")),
    }
}

/// The time a request asks for: the protocol's parameter `timeout`, in µs; 0 asks for none.
fn timeout(parameters: &Map<String, Value>) -> Result<Option<Duration>, String> {
    match parameters.get("timeout").map(|value| (value, value.as_u64())) {
        None | Some((_, Some(0))) => Ok(None),
        Some((_, Some(us))) => Ok(Some(Duration::from_micros(us))),
        Some((other, None)) => Err(format!("the request has timeout {other}, expected µs")),
    }
}

/// Numbers of a JSON array, however deeply nested, in order.
#[derive(Debug)]
struct Numbers(Vec<f32>);

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Numbers, D::Error> {
        let mut numbers = Vec::new();
        deserializer.deserialize_seq(Gather(&mut numbers))?;
        Ok(Numbers(numbers))
    }
}

/// Gathers a number, or the numbers of an array.
struct Gather<'a>(&'a mut Vec<f32>);

impl<'de> DeserializeSeed<'de> for Gather<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Gather<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("numbers that fit in 32 bits, or arrays of them")
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<(), E> {
        let narrow = number as f32;
        match narrow.is_finite() {
            true => {
                self.0.push(narrow);
                Ok(())
            }
            false => Err(E::invalid_value(serde::de::Unexpected::Float(number), &self)),
        }
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<(), E> {
        self.0.push(number as f32);
        Ok(())
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        self.0.push(number as f32);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Gather(self.0))?.is_some() {}
        Ok(())
    }
}

#[derive(Serialize)]
struct AnswerBody<'a> {
    model_name: &'a str,
    model_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    parameters: Map<String, Value>,
    outputs: Vec<AnswerTensor<'a>>,
}

#[derive(Serialize)]
struct AnswerTensor<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [usize],
    #[serde(skip_serializing_if = "Map::is_empty")]
    parameters: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a [f32]>,
}

/// Writes an answer; gives its body and, where binary tensors follow it, the length of its JSON.
///
/// # Errors
/// One sentence, when the answer has not the model's outputs.
pub fn write(
    answer: &Answer,
    wanted: &Wanted,
    info: &ClusterInfo,
) -> Result<(Vec<u8>, Option<usize>), String> {
    let all = || (0..info.outputs.len()).map(|place| (place, wanted.binary)).collect();
    let chosen: Vec<(usize, bool)> = match wanted.outputs.is_empty() {
        true => all(),
        false => wanted.outputs.clone(),
    };
    let mut outputs = Vec::with_capacity(chosen.len());
    let mut binary = Vec::new();
    let mut any_binary = false;
    for (place, is_binary) in chosen {
        let found = info.outputs.get(place).zip(answer.outputs.get(place));
        let (port, tensor) = found.ok_or("the answer has not the model's outputs")?;
        let mut parameters = Map::new();
        let bytes: &[u8] = bytemuck::cast_slice(tensor.data());
        if is_binary {
            any_binary = true;
            binary.extend_from_slice(bytes);
            parameters.insert("binary_data_size".to_owned(), bytes.len().into());
        }
        let data = (!is_binary).then_some(tensor.data());
        let shape = tensor.shape();
        outputs.push(AnswerTensor {
            name: &port.name,
            datatype: DATATYPE,
            shape,
            parameters,
            data,
        });
    }
    let mut parameters = Map::new();
    if answer.degraded {
        parameters.insert("degraded".to_owned(), true.into());
    }
    let (model_name, id) = (model_name(info), wanted.id.as_deref());
    let body = AnswerBody { model_name, model_version: VERSION, id, parameters, outputs };
    let mut bytes = serde_json::to_vec(&body).map_err(|error| error.to_string())?;
    let length = any_binary.then_some(bytes.len());
    bytes.extend_from_slice(&binary);
    Ok((bytes, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> ClusterInfo {
        let port = |name: &str, shape: &[usize]| Port { name: name.into(), shape: shape.to_vec() };
        ClusterInfo {
            split: String::new(),
            nodes: 2,
            inputs: vec![port("x", &[1, 2])],
            outputs: vec![port("y", &[1, 2]), port("z", &[1])],
            metadata: vec![("snn.name".into(), "digits".into())],
        }
    }

    fn answer() -> Answer {
        let tensor =
            |shape: &[usize], data: &[f32]| Tensor::new(shape.to_vec(), data.to_vec()).unwrap();
        Answer {
            outputs: vec![tensor(&[1, 2], &[1.0, 2.0]), tensor(&[1], &[3.0])],
            degraded: false,
        }
    }

    fn read_json(json: &str) -> Result<Request, String> {
        read(&Bytes::copy_from_slice(json.as_bytes()), None, &info())
    }

    const GOOD: &str =
        r#"{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[[0.5,-2]]}]}"#;

    #[test]
    fn numbers_may_be_nested_or_flat() {
        let nested = read_json(GOOD).unwrap();
        assert_eq!(nested.inputs[0].data(), [0.5, -2.0]);
        assert_eq!(read_json(&GOOD.replace("[[0.5,-2]]", "[0.5,-2]")).unwrap(), nested);
        assert_eq!(nested.within, None);
    }

    #[test]
    fn binary_tensors_follow_the_json() {
        let json = GOOD.replace(r#""data":[[0.5,-2]]"#, r#""parameters":{"binary_data_size":8}"#);
        let mut body = json.clone().into_bytes();
        body.extend(0.5f32.to_le_bytes());
        body.extend((-2f32).to_le_bytes());
        let read_cut =
            |body: &[u8], length: usize| read(&Bytes::copy_from_slice(body), Some(length), &info());
        assert_eq!(read_cut(&body, json.len()).unwrap(), read_json(GOOD).unwrap());
        assert_eq!(
            read_cut(&body[..body.len() - 1], json.len()).unwrap_err(),
            "input \"x\" has 8 bytes of binary data, but 7 are left"
        );
        body.push(0);
        assert_eq!(
            read_cut(&body, json.len()).unwrap_err(),
            "1 bytes follow the last binary tensor"
        );
        let error = read_cut(&body[..3], 9).unwrap_err();
        assert_eq!(error, "inference-header-content-length is 9, but the body has 3 bytes");
    }

    #[test]
    fn each_mistake_has_its_sentence() {
        let with = |from: &str, to: &str| {
            let changed = GOOD.replace(from, to);
            assert_ne!(changed, GOOD, "{from}");
            read_json(&changed).unwrap_err()
        };
        let parameters = |text: &str| with("{\"inputs\"", &format!("{{{text},\"inputs\""));
        for (found, expected) in [
            (with("\"x\"", "\"w\""), "the model has no input \"w\""),
            (with("[1,2]", "[2,1]"), "input \"x\" has shape [2, 1], expected [1, 2]"),
            (with("FP32", "FP16"), "input \"x\" is FP16, expected FP32"),
            (with("0.5,", ""), "input \"x\" has 1 numbers, expected 2"),
            (with(",\"data\":[[0.5,-2]]", ""), "input \"x\" has neither data nor binary_data_size"),
            (
                with("\"data\"", "\"parameters\":{\"binary_data_size\":8},\"data\""),
                "input \"x\" has both data and binary_data_size",
            ),
            (
                with("\"data\":[[0.5,-2]]", "\"parameters\":{\"binary_data_size\":7}"),
                "input \"x\" has binary_data_size 7, expected 8",
            ),
            (
                with("\"data\"", "\"parameters\":{\"shared_memory_region\":\"r\"},\"data\""),
                "tensor \"x\": the shared memory extension is not supported",
            ),
            (
                with("[{", r#"[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]},{"#),
                "input \"x\" is given twice",
            ),
            (read_json(r#"{"inputs":[]}"#).unwrap_err(), "input \"x\" is missing"),
            (parameters(r#""outputs":[{"name":"v"}]"#), "the model has no output \"v\""),
            (
                parameters(r#""outputs":[{"name":"y"},{"name":"y"}]"#),
                "output \"y\" is asked for twice",
            ),
            (
                parameters(r#""outputs":[{"name":"y","parameters":{"classification":3}}]"#),
                "output \"y\": the classification extension is not supported",
            ),
            (
                parameters(r#""outputs":[{"name":"y","parameters":{"binary_data":1}}]"#),
                "output \"y\" has binary_data 1, expected true or false",
            ),
            (
                parameters(r#""parameters":{"timeout":-1}"#),
                "the request has timeout -1, expected µs",
            ),
        ] {
            assert_eq!(found, expected);
        }
        for unreadable in [
            "",
            "{",
            "[]",
            "{\"inputs\":3}",
            &GOOD.replace("-2", "1e300"),
            &GOOD.replace("-2", "\"a\""),
        ] {
            let error = read_json(unreadable).unwrap_err();
            assert!(error.starts_with("the request is unreadable: "), "{error}");
        }
    }

    #[test]
    fn depth_beyond_reason_is_an_error() {
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(read_json(&GOOD.replace("[[0.5,-2]]", &deep)).unwrap_err().contains("recursion"));
    }

    #[test]
    fn every_cut_and_every_flipped_bit_gives_a_request_or_a_sentence() {
        for length in 0..GOOD.len() {
            assert!(read_json(&GOOD[..length]).is_err(), "{length}");
        }
        for at in 0..GOOD.len() {
            for bit in 0..8 {
                let mut changed = GOOD.as_bytes().to_vec();
                changed[at] ^= 1 << bit;
                if let Err(sentence) = read(&changed.into(), None, &info()) {
                    assert!(!sentence.is_empty() && !sentence.contains('\n'));
                }
            }
        }
    }

    #[test]
    fn an_answer_is_written_as_it_was_asked_for() {
        let wanted =
            read_json(&GOOD.replace("{\"inputs\"", "{\"id\":\"7\",\"inputs\"")).unwrap().wanted;
        let (body, length) = write(&answer(), &wanted, &info()).unwrap();
        let expected = r#"{"model_name":"digits","model_version":"1","id":"7","outputs":[{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.0,2.0]},{"name":"z","datatype":"FP32","shape":[1],"data":[3.0]}]}"#;
        assert_eq!((String::from_utf8(body).unwrap().as_str(), length), (expected, None));

        let asked = r#"{"parameters":{"binary_data_output":true},"outputs":[{"name":"z"},{"name":"y","parameters":{"binary_data":false}}],"inputs""#;
        let wanted = read_json(&GOOD.replace("{\"inputs\"", asked)).unwrap().wanted;
        let degraded = Answer { degraded: true, ..answer() };
        let (body, length) = write(&degraded, &wanted, &info()).unwrap();
        let (json, binary) = body.split_at(length.unwrap());
        let expected = r#"{"model_name":"digits","model_version":"1","parameters":{"degraded":true},"outputs":[{"name":"z","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}},{"name":"y","datatype":"FP32","shape":[1,2],"data":[1.0,2.0]}]}"#;
        assert_eq!(std::str::from_utf8(json).unwrap(), expected);
        assert_eq!(binary, 3f32.to_le_bytes());
    }
}
