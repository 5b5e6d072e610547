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
//! | 3 | [`Infer`] | form `u8`, zero `u16`, within `u32` ms, then tensors (form 0) or a picture (form 1) |
//! | 4 | [`Reply::Answer`] | zero `u8`, flags `u16` (1: degraded), then tensors |
//! | 5 | [`Reply::Failure`] | zero `u8`, zero `u16`, then the reason, UTF-8 |
//! | 6 | [`Reply::Working`] | zero `u8`, zero `u16` |
//!
//! Tensors: their number `u16`, then each as rank `u16`, extents `u32`, elements `f32`. A picture: channels
//! `u16`, the mean and then the standard deviation of each `f32`, rank `u16`, extents `u32`, pixels `u8`:
//! a quarter of its bytes, and the same numbers bit by bit.
//!
//! Any bytes at all give a frame or an error of one sentence: no panic, and nothing is allocated
//! that the bytes at hand do not justify. Payloads are slices of the bytes that arrived.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::codec::Pixels;
use crate::metadata::Normalisation;
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
/// Most channels of a picture that travels as its pixels.
pub const MAX_CHANNELS: usize = 16;
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
/// Form of a question that is a picture.
const PICTURE: u8 = 1;
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
    /// Begins a frame in `frame`, which is empty; the caller appends `payload` bytes of elements at most.
    ///
    /// So features are encoded straight into the frame that leaves, and into memory of one that has left:
    /// [`BytesMut::reserve`] takes it back once nobody holds what was split off.
    pub fn begin(
        frame: &mut BytesMut,
        dtype: Dtype,
        from: u16,
        request: u64,
        (transfer, within): (u32, Duration),
        payload: usize,
    ) {
        frame.reserve(TENSOR_HEADER + payload);
        prefix(frame, TENSOR, dtype_code(dtype), from);
        frame.put_u64_le(request);
        frame.put_u32_le(transfer);
        frame.put_u32_le(milliseconds(within));
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
        let mut frame = BytesMut::new();
        TensorFrame::begin(&mut frame, self.dtype, self.from, self.request, about, payload);
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
    /// The whole frame. An input that is a picture, and the only one, travels as its `pixels`.
    pub fn encode(&self, pixels: Option<&Pixels>) -> Bytes {
        let picture = match (self.inputs.as_slice(), pixels) {
            ([picture], Some(pixels)) => self.encode_picture(picture, pixels),
            _ => None,
        };
        picture.unwrap_or_else(|| {
            let mut frame = BytesMut::with_capacity(PREFIX + 4 + tensors_size(&self.inputs));
            prefix(&mut frame, INFER, 0, 0);
            frame.put_u32_le(milliseconds(self.within));
            put_tensors(&mut frame, &self.inputs);
            frame.freeze()
        })
    }

    /// The frame of a picture; none where the input is not made of pixels.
    fn encode_picture(&self, picture: &Tensor, pixels: &Pixels) -> Option<Bytes> {
        let Normalisation { mean, std } = pixels.normalisation();
        if mean.len() > MAX_CHANNELS {
            return None;
        }
        let head = PREFIX + 4 + 2 + 8 * mean.len() + 2 + 4 * picture.shape.len();
        let mut frame = BytesMut::with_capacity(head + picture.data.len());
        prefix(&mut frame, INFER, PICTURE, 0);
        frame.put_u32_le(milliseconds(self.within));
        frame.put_u16_le(mean.len() as u16);
        mean.iter().chain(std).for_each(|number| frame.put_f32_le(*number));
        put_shape(&mut frame, &picture.shape);
        let found = pixels.put_pixels(&picture.data, &picture.shape, &mut frame);
        found.then(|| frame.freeze())
    }

    /// Most bytes of a question whose inputs have so many elements each, whatever their axes.
    pub fn most_bytes(inputs: impl IntoIterator<Item = usize>) -> usize {
        let tensor = |elements: usize| elements.saturating_mul(4).saturating_add(2 + 4 * MAX_RANK);
        let tensors = inputs.into_iter().map(tensor).fold(0, usize::saturating_add);
        tensors.saturating_add(PREFIX + 4 + 2).min(MAX_FRAME)
    }

    /// Reads a question, which may take `most` bytes: as it is, and as numbers.
    ///
    /// # Errors
    /// What the bytes are instead.
    pub fn decode(bytes: Bytes, most: usize) -> Result<Infer, WireError> {
        let (kind, form, _) = read_prefix(&bytes)?;
        if kind != INFER {
            return Err(WireError::Kind { found: kind });
        }
        if bytes.len() > most {
            return Err(WireError::TooLarge { bytes: bytes.len() });
        }
        let within = Duration::from_millis(u32_at(&bytes, PREFIX)?.into());
        let body = &bytes[PREFIX + 4..];
        let inputs = match form {
            0 => read_tensors(body)?,
            PICTURE => vec![read_picture(body, most)?],
            found => return Err(WireError::Form { found }),
        };
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
        put_shape(frame, &tensor.shape);
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

fn put_shape(frame: &mut BytesMut, shape: &[usize]) {
    frame.put_u16_le(u16::try_from(shape.len()).unwrap_or(u16::MAX));
    for &extent in shape {
        frame.put_u32_le(u32::try_from(extent).unwrap_or(u32::MAX));
    }
}

/// The shape that begins at `at`, its elements, and where it ends.
fn read_shape(bytes: &[u8], mut at: usize) -> Result<(Vec<usize>, usize, usize), WireError> {
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
    Ok((shape, elements.ok_or(WireError::CutShort)?, at))
}

/// Reads a picture that takes `most` bytes at most as numbers.
fn read_picture(bytes: &[u8], most: usize) -> Result<Tensor, WireError> {
    let channels = usize::from(u16_at(bytes, 0)?);
    if channels > MAX_CHANNELS {
        return Err(WireError::Channels { found: channels });
    }
    let end = 2 + 8 * channels;
    let numbers = bytes.get(2..end).ok_or(WireError::CutShort)?;
    let mut numbers = numbers.as_chunks().0.iter().map(|&chunk| f32::from_le_bytes(chunk));
    let mean: Vec<f32> = numbers.by_ref().take(channels).collect();
    let normalisation = Normalisation { mean, std: numbers.collect() };
    let (shape, elements, at) = read_shape(bytes, end)?;
    let pixels = &bytes[at..];
    if pixels.len() < elements || (channels == 0 && elements > 0) {
        return Err(WireError::CutShort);
    }
    if pixels.len() > elements {
        return Err(WireError::Trailing { bytes: pixels.len() - elements });
    }
    if elements.saturating_mul(4) > most {
        return Err(WireError::TooLarge { bytes: elements.saturating_mul(4) });
    }
    let mut data = vec![0.0; elements];
    Pixels::new(normalisation).read_pixels(pixels, &shape, &mut data);
    Ok(Tensor { shape, data })
}

fn read_tensors(bytes: &[u8]) -> Result<Vec<Tensor>, WireError> {
    let count = usize::from(u16_at(bytes, 0)?);
    if count > MAX_TENSORS {
        return Err(WireError::Tensors { found: count });
    }
    let mut at = 2;
    let mut tensors = Vec::with_capacity(count);
    for _ in 0..count {
        let (shape, elements, begin) = read_shape(bytes, at)?;
        at = begin;
        let size = elements.checked_mul(4).ok_or(WireError::CutShort)?;
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
    /// A form that does not exist.
    #[error("question of the unknown form {found}")]
    Form {
        /// Its number.
        found: u8,
    },
    /// A picture of more than [`MAX_CHANNELS`] channels.
    #[error("picture of {found} channels, expected at most {MAX_CHANNELS}")]
    Channels {
        /// How many.
        found: usize,
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
mod tests;
