//! What crosses the wire, and its specification: four kinds of frame between the nodes of a
//! cluster, and the question and answer of those who ask it.
//!
//! Takes and gives whole frames as bytes; a transport keeps their borders. Every frame begins with
//! four bytes `"SNN"` and the version, 1, then the kind. Numbers are little-endian.
//!
//! | kind | frame | after the kind |
//! |---|---|---|
//! | 1 | [`TensorFrame`] | dtype `u8` (+ 128: degraded), sender `u16`, request `u64`, transfer `u32`, within `u32` ms, then the [payload](crate::codec) |
//! | 2 | [`Cancel`] | flags `u8` (1: run again), sender `u16`, request `u64`, then the reason, UTF-8 |
//! | 3 | [`Infer`] | zero `u8`, zero `u16`, within `u32` ms, then tensors |
//! | 4 | [`Reply::Answer`] | zero `u8`, flags `u16` (1: degraded), then tensors |
//! | 5 | [`Reply::Failure`] | zero `u8`, zero `u16`, then the reason, UTF-8 |
//! | 6 | [`Reply::Working`] | zero `u8`, zero `u16` |
//!
//! Tensors: their number `u16`, then each as rank `u16`, extents `u32`, elements `f32`.
//!
//! Any bytes at all give a frame or an error of one sentence: no panic, and nothing is allocated
//! that the bytes at hand do not justify. Payloads are slices of the bytes that arrived.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::policy::Dtype;

/// Largest frame accepted, in bytes: bounds memory before a peer is trusted. A feature map of a
/// hundred million numbers is no edge device's.
pub const MAX_FRAME: usize = 64 << 20;
/// Bytes a [`TensorFrame`] has beside its elements.
pub const TENSOR_HEADER: usize = 24;
/// Longest reason carried, in bytes: one sentence.
pub const MAX_REASON: usize = 1024;
/// Most tensors a question or an answer carries: models with more inputs are none of ours.
pub const MAX_TENSORS: usize = 64;
/// Most axes of a tensor.
pub const MAX_RANK: usize = 8;

const MAGIC: [u8; 4] = *b"SNN\x01";
const TENSOR: u8 = 1;
const CANCEL: u8 = 2;
const INFER: u8 = 3;
const ANSWER: u8 = 4;
const FAILURE: u8 = 5;
const WORKING: u8 = 6;
/// Bytes up to and with the kind, the byte and the two bytes that follow it.
const PREFIX: usize = 8;
/// Bytes a [`Cancel`] has beside its reason.
const CANCEL_HEADER: usize = PREFIX + 8;
/// Flag of a request that may be run again.
const AGAIN: u8 = 1;
/// Flag of an answer that went on without some of its tensors.
const DEGRADED: u16 = 1;
/// Bit of a tensor frame's dtype: computed without a tensor that was not waited for.
const DEGRADED_TENSOR: u8 = 1 << 7;

/// An f32 tensor with its shape, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl Tensor {
    /// A tensor of `data`, which must have as many elements as `shape` says.
    ///
    /// # Errors
    /// [`WireError::Shape`] where the two differ, or there are more than [`MAX_RANK`] axes.
    pub fn new(shape: Vec<usize>, data: Vec<f32>) -> Result<Tensor, WireError> {
        let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
        match elements == Some(data.len()) && shape.len() <= MAX_RANK {
            true => Ok(Tensor { shape, data }),
            false => Err(WireError::Shape { shape, elements: data.len() }),
        }
    }

    /// Extent of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// Shape and elements.
    pub fn into_parts(self) -> (Vec<usize>, Vec<f32>) {
        (self.shape, self.data)
    }
}

/// Kind 1: the features of one transfer, for one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorFrame {
    /// Type of the elements: 0 f32, 1 f16, 2 i8, 3 i4.
    pub dtype: Dtype,
    /// Rank of the sender.
    pub from: u16,
    /// The request they belong to.
    pub request: u64,
    /// The transfer, as the manifest numbers it.
    pub transfer: u32,
    /// How long the request may still take, as the sender saw it. A node that has not met the
    /// request yet takes its deadline from here.
    pub within: Duration,
    /// Whether they were computed without a tensor that was not waited for.
    pub degraded: bool,
    /// The elements, row-major, little-endian, as [`crate::codec`] says. Whoever knows the transfer's
    /// shape and packing checks its size.
    pub payload: Bytes,
}

impl TensorFrame {
    /// The beginning of a frame; the caller appends exactly `payload` bytes of elements.
    ///
    /// So features are encoded straight into the frame that leaves.
    pub fn begin(
        dtype: Dtype,
        from: u16,
        request: u64,
        (transfer, within): (u32, Duration),
        payload: usize,
    ) -> BytesMut {
        let mut frame = BytesMut::with_capacity(TENSOR_HEADER + payload);
        prefix(&mut frame, TENSOR, dtype_code(dtype), from);
        frame.put_u64_le(request);
        frame.put_u32_le(transfer);
        frame.put_u32_le(milliseconds(within));
        frame
    }

    /// Marks the frame that begins in `frame` as computed without all that was sent.
    pub fn mark_degraded(frame: &mut BytesMut) {
        if let Some(code) = frame.get_mut(MAGIC.len() + 1) {
            *code |= DEGRADED_TENSOR;
        }
    }

    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let about = (self.transfer, self.within);
        let payload = self.payload.len();
        let mut frame = TensorFrame::begin(self.dtype, self.from, self.request, about, payload);
        frame.extend_from_slice(&self.payload);
        if self.degraded {
            TensorFrame::mark_degraded(&mut frame);
        }
        frame.freeze()
    }
}

/// Kind 2: a request will get no answer; who still works on it may stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cancel {
    /// Rank of the sender.
    pub from: u16,
    /// The request.
    pub request: u64,
    /// Whether it may be run again from its inputs: a node was lost, and another may stand in.
    pub again: bool,
    /// Why, in one sentence.
    pub reason: String,
}

impl Cancel {
    /// The whole frame; a reason beyond [`MAX_REASON`] is cut.
    pub fn encode(&self) -> Bytes {
        let reason = shortened(&self.reason);
        let mut frame = BytesMut::with_capacity(CANCEL_HEADER + reason.len());
        prefix(&mut frame, CANCEL, u8::from(self.again), self.from);
        frame.put_u64_le(self.request);
        frame.extend_from_slice(reason.as_bytes());
        frame.freeze()
    }
}

/// A frame between nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Features.
    Tensor(TensorFrame),
    /// The end of a request.
    Cancel(Cancel),
}

impl Frame {
    /// Reads a frame.
    ///
    /// # Errors
    /// What the bytes are instead.
    pub fn decode(bytes: Bytes) -> Result<Frame, WireError> {
        let (kind, code, from) = read_prefix(&bytes)?;
        match kind {
            TENSOR => {
                let dtype = dtype_of(code & !DEGRADED_TENSOR)?;
                let head = bytes.get(PREFIX..TENSOR_HEADER).ok_or(WireError::CutShort)?;
                let payload = bytes.slice(TENSOR_HEADER..);
                Ok(Frame::Tensor(TensorFrame {
                    dtype,
                    from,
                    request: u64_at(head, 0)?,
                    transfer: u32_at(head, 8)?,
                    within: Duration::from_millis(u32_at(head, 12)?.into()),
                    degraded: code & DEGRADED_TENSOR != 0,
                    payload,
                }))
            }
            CANCEL => {
                let head = bytes.get(PREFIX..CANCEL_HEADER).ok_or(WireError::CutShort)?;
                let reason = read_reason(&bytes[CANCEL_HEADER..])?;
                let request = u64_at(head, 0)?;
                Ok(Frame::Cancel(Cancel { from, request, again: code & AGAIN != 0, reason }))
            }
            found => Err(WireError::Kind { found }),
        }
    }
}

/// Kind 3: a question to a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Infer {
    /// How long the answer may take.
    pub within: Duration,
    /// The model's inputs, in order.
    pub inputs: Vec<Tensor>,
}

impl Infer {
    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let mut frame = BytesMut::with_capacity(PREFIX + 4 + tensors_size(&self.inputs));
        prefix(&mut frame, INFER, 0, 0);
        frame.put_u32_le(milliseconds(self.within));
        put_tensors(&mut frame, &self.inputs);
        frame.freeze()
    }

    /// Most bytes of a question whose inputs have so many elements each, whatever their axes.
    pub fn most_bytes(inputs: impl IntoIterator<Item = usize>) -> usize {
        let tensor = |elements: usize| elements.saturating_mul(4).saturating_add(2 + 4 * MAX_RANK);
        let tensors = inputs.into_iter().map(tensor).fold(0, usize::saturating_add);
        tensors.saturating_add(PREFIX + 4 + 2).min(MAX_FRAME)
    }

    /// Reads a question.
    ///
    /// # Errors
    /// What the bytes are instead.
    pub fn decode(bytes: Bytes) -> Result<Infer, WireError> {
        let (kind, ..) = read_prefix(&bytes)?;
        if kind != INFER {
            return Err(WireError::Kind { found: kind });
        }
        let within = Duration::from_millis(u32_at(&bytes, PREFIX)?.into());
        let inputs = read_tensors(&bytes[PREFIX + 4..])?;
        Ok(Infer { within, inputs })
    }
}

/// Kinds 4 to 6: what a cluster answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The model's outputs, in order.
    Answer(Answer),
    /// Why there are none, in one sentence.
    Failure(String),
    /// The question has arrived, and its answer is being worked on: whoever hears nothing for a while
    /// asks again.
    Working,
}

/// The outputs of one inference.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The model's outputs, in order.
    pub outputs: Vec<Tensor>,
    /// Whether some tensors were not waited for and counted as zero.
    pub degraded: bool,
}

impl Reply {
    /// The whole frame; a reason beyond [`MAX_REASON`] is cut.
    pub fn encode(&self) -> Bytes {
        match self {
            Reply::Answer(Answer { outputs, degraded }) => {
                let mut frame = BytesMut::with_capacity(PREFIX + tensors_size(outputs));
                prefix(&mut frame, ANSWER, 0, if *degraded { DEGRADED } else { 0 });
                put_tensors(&mut frame, outputs);
                frame.freeze()
            }
            Reply::Failure(reason) => {
                let reason = shortened(reason);
                let mut frame = BytesMut::with_capacity(PREFIX + reason.len());
                prefix(&mut frame, FAILURE, 0, 0);
                frame.extend_from_slice(reason.as_bytes());
                frame.freeze()
            }
            Reply::Working => {
                let mut frame = BytesMut::with_capacity(PREFIX);
                prefix(&mut frame, WORKING, 0, 0);
                frame.freeze()
            }
        }
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// What the bytes are instead.
    pub fn decode(bytes: Bytes) -> Result<Reply, WireError> {
        let (kind, _, flags) = read_prefix(&bytes)?;
        match kind {
            ANSWER => {
                let outputs = read_tensors(&bytes[PREFIX..])?;
                Ok(Reply::Answer(Answer { outputs, degraded: flags & DEGRADED != 0 }))
            }
            FAILURE => read_reason(&bytes[PREFIX..]).map(Reply::Failure),
            WORKING => Ok(Reply::Working),
            found => Err(WireError::Kind { found }),
        }
    }
}

fn prefix(frame: &mut BytesMut, kind: u8, code: u8, word: u16) {
    frame.extend_from_slice(&MAGIC);
    frame.put_u8(kind);
    frame.put_u8(code);
    frame.put_u16_le(word);
}

/// Kind, and the byte and the two bytes that follow it.
fn read_prefix(bytes: &[u8]) -> Result<(u8, u8, u16), WireError> {
    if bytes.len() > MAX_FRAME {
        return Err(WireError::TooLarge { bytes: bytes.len() });
    }
    match *bytes {
        [b'S', b'N', b'N', version, ..] if version != MAGIC[3] => {
            Err(WireError::Version { found: version })
        }
        [b'S', b'N', b'N', _, kind, code, low, high, ..] => {
            Ok((kind, code, u16::from_le_bytes([low, high])))
        }
        [b'S', b'N', b'N', ..] => Err(WireError::CutShort),
        _ => Err(WireError::NoFrame),
    }
}

fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::I8 => 2,
        Dtype::I4 => 3,
    }
}

fn dtype_of(code: u8) -> Result<Dtype, WireError> {
    match code {
        0 => Ok(Dtype::F32),
        1 => Ok(Dtype::F16),
        2 => Ok(Dtype::I8),
        3 => Ok(Dtype::I4),
        found => Err(WireError::Dtype { found }),
    }
}

/// Whole milliseconds, rounded up so that a deadline never becomes none.
fn milliseconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u32::MAX)
}

fn shortened(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

fn read_reason(bytes: &[u8]) -> Result<String, WireError> {
    match bytes.len() <= MAX_REASON {
        true => Ok(String::from_utf8_lossy(bytes).into_owned()),
        false => Err(WireError::TooLarge { bytes: bytes.len() }),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, WireError> {
    let field = bytes.get(at..at + 2).and_then(|field| field.try_into().ok());
    field.map(u16::from_le_bytes).ok_or(WireError::CutShort)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, WireError> {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    field.map(u32::from_le_bytes).ok_or(WireError::CutShort)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, WireError> {
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map(u64::from_le_bytes).ok_or(WireError::CutShort)
}

fn tensors_size(tensors: &[Tensor]) -> usize {
    2 + tensors.iter().map(|t| 2 + 4 * t.shape.len() + 4 * t.data.len()).sum::<usize>()
}

/// Writes tensors; numbers beyond what the fields hold make a frame that no reader accepts.
fn put_tensors(frame: &mut BytesMut, tensors: &[Tensor]) {
    frame.put_u16_le(u16::try_from(tensors.len()).unwrap_or(u16::MAX));
    for tensor in tensors {
        frame.put_u16_le(u16::try_from(tensor.shape.len()).unwrap_or(u16::MAX));
        for &extent in &tensor.shape {
            frame.put_u32_le(u32::try_from(extent).unwrap_or(u32::MAX));
        }
        // Bytes of several at a time: one by one each would ask for room.
        for elements in tensor.data.chunks(64) {
            let mut bytes = [[0; 4]; 64];
            for (bytes, element) in bytes.iter_mut().zip(elements) {
                *bytes = element.to_le_bytes();
            }
            frame.extend_from_slice(bytes[..elements.len()].as_flattened());
        }
    }
}

fn read_tensors(bytes: &[u8]) -> Result<Vec<Tensor>, WireError> {
    let count = usize::from(u16_at(bytes, 0)?);
    if count > MAX_TENSORS {
        return Err(WireError::Tensors { found: count });
    }
    let mut at = 2;
    let mut tensors = Vec::with_capacity(count);
    for _ in 0..count {
        let rank = usize::from(u16_at(bytes, at)?);
        at += 2;
        if rank > MAX_RANK {
            return Err(WireError::Rank { found: rank });
        }
        let mut shape = Vec::with_capacity(rank);
        for _ in 0..rank {
            shape.push(u32_at(bytes, at)? as usize);
            at += 4;
        }
        let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
        let size = elements.and_then(|n| n.checked_mul(4)).ok_or(WireError::CutShort)?;
        let end = at.checked_add(size).ok_or(WireError::CutShort)?;
        let raw = bytes.get(at..end).ok_or(WireError::CutShort)?;
        let data = raw.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect();
        tensors.push(Tensor { shape, data });
        at = end;
    }
    match at == bytes.len() {
        true => Ok(tensors),
        false => Err(WireError::Trailing { bytes: bytes.len() - at }),
    }
}

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not one of our frames at all.
    #[error("not a frame")]
    NoFrame,
    /// A frame of another version.
    #[error("frame of version {found}, expected {}", MAGIC[3])]
    Version {
        /// Its version.
        found: u8,
    },
    /// A kind that does not exist, or not here.
    #[error("frame of the unknown kind {found}")]
    Kind {
        /// The kind.
        found: u8,
    },
    /// The frame ends too early.
    #[error("frame cut short")]
    CutShort,
    /// There is more than the frame says.
    #[error("{bytes} bytes too many at the frame's end")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// Larger than [`MAX_FRAME`], or a reason longer than [`MAX_REASON`].
    #[error("{bytes} bytes are more than a frame may have")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// An element type that does not exist.
    #[error("frame of the unknown dtype {found}")]
    Dtype {
        /// Its number.
        found: u8,
    },
    /// More than [`MAX_TENSORS`] tensors.
    #[error("{found} tensors, expected at most {MAX_TENSORS}")]
    Tensors {
        /// How many.
        found: usize,
    },
    /// More than [`MAX_RANK`] axes.
    #[error("tensor of {found} axes, expected at most {MAX_RANK}")]
    Rank {
        /// How many.
        found: usize,
    },
    /// Elements that do not fill their shape.
    #[error("{elements} numbers do not fill the shape {shape:?}")]
    Shape {
        /// The shape.
        shape: Vec<usize>,
        /// How many elements there are.
        elements: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn tensor_frame() -> TensorFrame {
        TensorFrame {
            dtype: Dtype::F16,
            from: 2,
            request: 0x0102_0304_0506_0708,
            transfer: 7,
            within: Duration::from_millis(2000),
            degraded: false,
            payload: Bytes::from_static(&[0x00, 0x3c, 0x00, 0xc0]),
        }
    }

    #[test]
    fn the_bytes_of_each_kind_are_these() {
        let tensor = tensor_frame().encode();
        assert_eq!(
            hex(&tensor),
            "534e4e01010102000807060504030201".to_owned() + "07000000d0070000003c00c0"
        );
        assert_eq!(tensor.len(), TENSOR_HEADER + 4);
        let degraded = TensorFrame { degraded: true, ..tensor_frame() }.encode();
        assert_eq!(hex(&degraded[..8]), "534e4e0101810200");
        let cancel = Cancel { from: 1, request: 9, again: true, reason: "no".into() }.encode();
        assert_eq!(hex(&cancel), "534e4e010201010009000000000000006e6f");
        let one = Tensor::new(vec![1, 2], vec![1.0, -2.0]).unwrap();
        let infer = Infer { within: Duration::from_secs(1), inputs: vec![one.clone()] }.encode();
        assert_eq!(
            hex(&infer),
            "534e4e0103000000e803000001000200010000000200000000".to_owned() + "00803f000000c0"
        );
        let answer = Reply::Answer(Answer { outputs: vec![one], degraded: true }).encode();
        assert_eq!(
            hex(&answer),
            "534e4e010400010001000200010000000200000000".to_owned() + "00803f000000c0"
        );
        let failure = Reply::Failure("late".into()).encode();
        assert_eq!(hex(&failure), "534e4e01050000006c617465");
        let working = Reply::Working.encode();
        assert_eq!(hex(&working), "534e4e0106000000");
        assert_eq!(Reply::decode(working), Ok(Reply::Working));
    }

    #[test]
    fn foreign_bytes_are_named() {
        let frame = |bytes: &[u8]| Frame::decode(Bytes::copy_from_slice(bytes)).unwrap_err();
        assert_eq!(frame(b"").to_string(), "not a frame");
        assert_eq!(frame(b"GET / HTTP/1.1").to_string(), "not a frame");
        assert_eq!(frame(b"SNN\x02\x01").to_string(), "frame of version 2, expected 1");
        assert_eq!(frame(b"SNN\x01\x09\0\0\0").to_string(), "frame of the unknown kind 9");
        assert_eq!(frame(b"SNN\x01\x01\x07\0\0").to_string(), "frame of the unknown dtype 7");
        assert_eq!(frame(b"SNN\x01\x01").to_string(), "frame cut short");
        let whole = tensor_frame().encode();
        assert_eq!(frame(&whole[..TENSOR_HEADER - 1]).to_string(), "frame cut short");
    }

    #[test]
    fn a_shape_that_asks_for_the_whole_memory_is_cut_short() {
        let mut bytes = BytesMut::new();
        prefix(&mut bytes, ANSWER, 0, 0);
        bytes.put_u16_le(1);
        bytes.put_u16_le(2);
        bytes.put_u32_le(u32::MAX);
        bytes.put_u32_le(u32::MAX);
        assert_eq!(Reply::decode(bytes.freeze()), Err(WireError::CutShort));
    }

    #[test]
    fn no_question_is_larger_than_its_inputs_need() {
        let one = Tensor::new(vec![1; MAX_RANK], vec![1.0]).unwrap();
        let six = Tensor::new(vec![2, 3], vec![1.0; 6]).unwrap();
        let question = |inputs| Infer { within: Duration::ZERO, inputs }.encode().len();
        assert_eq!(question(vec![one.clone()]), Infer::most_bytes([1]));
        assert_eq!(question(vec![]), Infer::most_bytes([]));
        assert!(question(vec![one, six]) < Infer::most_bytes([1, 6]));
        assert_eq!(Infer::most_bytes([usize::MAX, usize::MAX]), MAX_FRAME);
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let reason = "ä".repeat(MAX_REASON);
        let bytes = Reply::Failure(reason).encode();
        let Ok(Reply::Failure(read)) = Reply::decode(bytes) else { panic!("no failure") };
        assert_eq!(read, "ä".repeat(MAX_REASON / 2));
    }

    fn tensors() -> impl Strategy<Value = Vec<Tensor>> {
        let tensor = proptest::collection::vec(0usize..4, 0..4).prop_flat_map(|shape| {
            let elements = shape.iter().product::<usize>();
            proptest::collection::vec(-1e6f32..1e6, elements)
                .prop_map(move |data| Tensor { shape: shape.clone(), data })
        });
        proptest::collection::vec(tensor, 0..4)
    }

    proptest! {
        #[test]
        fn frames_read_back(
            from: u16, request: u64, transfer: u32, ms: u32, degraded: bool,
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let payload = Bytes::from(payload);
            let within = Duration::from_millis(ms.into());
            let frame = TensorFrame { dtype: Dtype::F32, from, request, transfer, within, degraded, payload };
            prop_assert_eq!(Frame::decode(frame.encode()).unwrap(), Frame::Tensor(frame));
            let again = ms % 2 == 0;
            let cancel = Cancel { from, request, again, reason: format!("{transfer}") };
            prop_assert_eq!(Frame::decode(cancel.encode()).unwrap(), Frame::Cancel(cancel));
        }

        #[test]
        fn questions_and_answers_read_back(tensors in tensors(), ms: u32, degraded: bool) {
            let infer = Infer { within: Duration::from_millis(ms.into()), inputs: tensors.clone() };
            prop_assert_eq!(Infer::decode(infer.encode()).unwrap(), infer);
            let reply = Reply::Answer(Answer { outputs: tensors, degraded });
            prop_assert_eq!(Reply::decode(reply.encode()).unwrap(), reply);
        }

        #[test]
        fn any_bytes_give_a_frame_or_an_error(
            kind in 0u8..8,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut frame = MAGIC.to_vec();
            frame.push(kind);
            frame.extend(bytes);
            let frame = Bytes::from(frame);
            let _ = Frame::decode(frame.clone());
            let _ = Infer::decode(frame.clone());
            let _ = Reply::decode(frame);
        }
    }
}
