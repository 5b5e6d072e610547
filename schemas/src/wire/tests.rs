//! The bytes of each frame, and that any bytes at all give a frame or an error.

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
    let infer = Infer { within: Duration::from_secs(1), inputs: vec![one.clone()] }.encode(None);
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
    let question = |inputs| Infer { within: Duration::ZERO, inputs }.encode(None).len();
    assert_eq!(question(vec![one.clone()]), Infer::most_bytes([1]));
    assert_eq!(question(vec![]), Infer::most_bytes([]));
    assert!(question(vec![one, six]) < Infer::most_bytes([1, 6]));
    assert_eq!(Infer::most_bytes([usize::MAX, usize::MAX]), MAX_FRAME);
}

/// Two channels, and a picture of three pixels in each.
fn picture() -> (Pixels, Infer) {
    let pixels = Pixels::new(Normalisation { mean: vec![0.5, 0.25], std: vec![0.25, 0.5] });
    let value = |at: usize| pixels.normalisation().value(at / 3, [0, 127, 255, 3, 2, 1][at]);
    let picture = Tensor::new(vec![1, 2, 1, 3], (0..6).map(value).collect()).unwrap();
    (pixels, Infer { within: Duration::from_secs(1), inputs: vec![picture] })
}

#[test]
fn a_picture_is_asked_about_by_its_pixels() {
    let (pixels, question) = picture();
    let frame = question.encode(Some(&pixels));
    assert_eq!(
        hex(&frame),
        "534e4e0103010000e8030000".to_owned()
            + "02000000003f0000803e0000803e0000003f"
            + "040001000000020000000100000003000000"
            + "007fff030201"
    );
    assert_eq!(Infer::decode(frame.clone(), MAX_FRAME), Ok(question.clone()));
    // Numbers take four bytes each, however few arrive.
    let bytes = frame.len();
    assert_eq!(Infer::decode(frame, bytes - 1), Err(WireError::TooLarge { bytes }));
    let (many, one) = (vec![1, 1, 1, 64], vec![0.0; 64]);
    let grey = Pixels::new(Normalisation::identity(1));
    let frame = Infer { inputs: vec![Tensor::new(many, one).unwrap()], ..question.clone() }
        .encode(Some(&grey));
    assert_eq!(Infer::decode(frame, 255), Err(WireError::TooLarge { bytes: 256 }));
    // A number that is no pixel's value sends all as they are; so do two inputs.
    let plain = question.encode(None);
    let mut changed = question.clone();
    changed.inputs[0].data[4] += 1e-3;
    assert_eq!(changed.encode(Some(&pixels)).len(), plain.len());
    assert_eq!(Infer::decode(changed.encode(Some(&pixels)), MAX_FRAME), Ok(changed));
    let two =
        Infer { inputs: [question.inputs.clone(), question.inputs.clone()].concat(), ..question };
    assert_eq!(two.encode(Some(&pixels)), two.encode(None));
}

#[test]
fn pictures_that_are_none_are_named() {
    let (pixels, question) = picture();
    let frame = question.encode(Some(&pixels));
    let decode = |at: usize, byte: u8| {
        let mut frame = frame.to_vec();
        frame[at] = byte;
        Infer::decode(Bytes::from(frame), MAX_FRAME).unwrap_err().to_string()
    };
    assert_eq!(decode(5, 2), "question of the unknown form 2");
    assert_eq!(decode(12, 17), "picture of 17 channels, expected at most 16");
    assert_eq!(decode(frame.len() - 10, 4), "frame cut short");
    assert_eq!(decode(frame.len() - 10, 2), "2 bytes too many at the frame's end");
    let short = frame.slice(..frame.len() - 1);
    assert_eq!(Infer::decode(short, MAX_FRAME), Err(WireError::CutShort));
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
        prop_assert_eq!(Infer::decode(infer.encode(None), MAX_FRAME).unwrap(), infer);
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
        let _ = Infer::decode(frame.clone(), MAX_FRAME);
        let _ = Reply::decode(frame);
    }
}
