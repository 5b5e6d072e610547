//! The bytes of each form, and that what is written is read back as training rounds it.

use super::*;
use crate::metadata::Normalisation;
use proptest::prelude::*;

fn codec(dtype: Dtype, signed: bool, packing: Packing) -> Codec {
    Codec { dtype, signed, packing }
}

fn payload(codec: Codec, numbers: &[f32], run: usize) -> BytesMut {
    let mut payload = BytesMut::new();
    codec.put_numbers(numbers, run, &mut payload);
    payload
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_bytes_of_each_form_are_these() {
    let numbers = [0.0, 127.5, 255.0, 0.4, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    // 127.5 is a tie and goes to the even 128; the scale is 1.
    let plain = payload(codec(Dtype::I8, false, Packing::None), &numbers, 12);
    assert_eq!(hex(&plain), "0000803f".to_owned() + "0080ff000000030000000000");
    let packed = payload(codec(Dtype::I8, false, Packing::Zeros), &numbers, 12);
    assert_eq!(hex(&packed), "0000803f".to_owned() + "01" + "4600" + "80ff03");
    let halves = payload(codec(Dtype::I4, true, Packing::None), &[7.0, -7.0, 1.0, 0.0], 2);
    assert_eq!(hex(&halves), "0000803f2549123e".to_owned() + "9707");
    let mut f16 = BytesMut::new();
    codec(Dtype::F16, true, Packing::Zeros).put_elements(&[0, 0, 0, 0x3c, 0, 0, 0, 0], &mut f16);
    assert_eq!(hex(&f16), "0102003c");
    // A mask that would not pay is left out.
    let full = payload(codec(Dtype::I8, false, Packing::Zeros), &[1.0, 2.0], 2);
    assert_eq!(full[4..], [ALL, 128, 255]);
}

#[test]
fn likely_bytes_have_half_of_the_elements_zero_or_another_share() {
    let shape = [1, 2, 10, 8];
    let zeros = |dtype| codec(dtype, false, Packing::Zeros);
    // Scales or none, a byte of form, a mask of 20 bytes, and what is kept.
    assert_eq!(zeros(Dtype::F16).likely_bytes(&shape), Some(1 + 20 + 160));
    assert_eq!(zeros(Dtype::I8).likely_bytes(&shape), Some(8 + 1 + 20 + 80));
    let bytes = |share| zeros(Dtype::I8).bytes_with_zeros(&shape, share);
    assert_eq!(bytes(0.25), Some(8 + 1 + 20 + 120));
    assert_eq!(bytes(1.0), Some(8 + 1 + 20));
    assert_eq!(zeros(Dtype::I4).bytes_with_zeros(&shape, 0.75), Some(8 + 1 + 20 + 20));
    // A mask that would not pay is left out; what is not packed has one size.
    assert_eq!(bytes(0.1), Some(8 + 1 + 160));
    let plain = Codec::plain(Dtype::I8);
    assert_eq!(plain.bytes_with_zeros(&shape, 1.0), plain.bytes(&shape));
}

#[test]
fn a_run_of_zeros_stays_zeros() {
    for dtype in [Dtype::I8, Dtype::I4] {
        let codec = codec(dtype, false, Packing::None);
        let payload = payload(codec, &[0.0; 40], 40);
        let mut numbers = [1.0; 40];
        codec.read_numbers(&payload, 40, &mut numbers).unwrap();
        assert_eq!(numbers, [0.0; 40]);
    }
}

#[test]
fn what_is_no_payload_is_named() {
    let zeros = codec(Dtype::I8, false, Packing::Zeros);
    let says = |bytes: &[u8]| zeros.check(bytes, &[1, 10]).unwrap_err().to_string();
    assert_eq!(says(&[0, 0, 0]), "payload cut short");
    assert_eq!(says(&[0; 4]), "payload cut short");
    assert_eq!(says(&[0, 0, 0, 0, 2]), "payload of the unknown form 2");
    assert_eq!(says(&[0, 0, 0, 0, 1, 1]), "payload cut short");
    let beyond = "the mask has more bits than there are elements";
    assert_eq!(says(&[0, 0, 0, 0, 1, 1, 4, 1, 1]), beyond);
    assert_eq!(says(&[0, 0, 0, 0, 1, 3, 0, 9]), "1 bytes are not 2 elements");
    assert_eq!(says(&[0, 0, 0, 0, 0, 1]), "1 bytes are not 10 elements");
    assert!(zeros.check(&[0, 0, 0, 0, 1, 3, 0, 9, 9], &[1, 10]).is_ok());
}

#[test]
fn channels_have_scales_of_their_own_where_that_is_cheap() {
    assert_eq!(Codec::run(&[2, 64, 8, 8]), 64);
    assert_eq!(Codec::run(&[2, 64, 2, 2]), 256);
    assert_eq!(Codec::run(&[2, 64]), 64);
    assert_eq!(Codec::run(&[2, 64, 100]), 100);
    let bytes = |dtype, packing, shape: &[usize]| codec(dtype, false, packing).bytes(shape);
    assert_eq!(bytes(Dtype::I8, Packing::None, &[1, 64, 32, 32]), Some(65_536 + 256));
    assert_eq!(bytes(Dtype::I4, Packing::None, &[1, 3, 7, 7]), Some(74 + 12));
    assert_eq!(bytes(Dtype::F16, Packing::Zeros, &[1, 64, 32, 32]), Some(131_073));
    assert_eq!(bytes(Dtype::I8, Packing::None, &[usize::MAX, 2]), None);
    assert_eq!(bytes(Dtype::I8, Packing::None, &[0, 3, 8, 8]), Some(0));
}

fn pixels() -> Pixels {
    Pixels::new(Normalisation { mean: vec![0.49, 0.0, 0.45], std: vec![0.25, 1.0, 1e-3] })
}

/// A picture of `size` pixels in each of three channels, as a model takes it.
fn picture(normalisation: &Normalisation, size: usize, seed: usize) -> Vec<f32> {
    let value = |at: usize| normalisation.value(at / size, ((at * 7919 + seed) % 256) as u8);
    (0..3 * size).map(value).collect()
}

#[test]
fn a_picture_travels_as_its_pixels_and_arrives_bit_by_bit() {
    let pixels = pixels();
    let normalisation = Normalisation { mean: vec![0.49, 0.0, 0.45], std: vec![0.25, 1.0, 1e-3] };
    let (sent, shape) = (picture(&normalisation, 300, 3), [1, 3, 15, 20]);
    let mut payload = BytesMut::new();
    pixels.put(&sent, &shape, &mut payload);
    assert_eq!((payload.len(), payload[0]), (901, 2));
    assert_eq!(payload[1..4], [3, (7919usize + 3) as u8, (2 * 7919usize + 3) as u8]);
    let mut arrived = vec![f32::NAN; 900];
    pixels.read(&payload, &shape, &mut arrived).unwrap();
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&arrived), bits(&sent));
    assert_eq!(Pixels::CODEC.bytes(&shape), Some(3601));
    assert_eq!(Pixels::CODEC.likely_bytes(&shape), Some(901));
    // The last bit of one number is enough for all to travel as they are.
    let mut changed = sent;
    changed[899] = f32::from_bits(changed[899].to_bits() ^ 1);
    let mut payload = BytesMut::new();
    pixels.put(&changed, &shape, &mut payload);
    assert_eq!((payload.len(), payload[0]), (3601, 0));
    pixels.read(&payload, &shape, &mut arrived).unwrap();
    assert_eq!(bits(&arrived), bits(&changed));
}

#[test]
fn pixels_that_are_none_are_named() {
    let mut numbers = [0.0; 12];
    let mut says = |payload: &[u8]| {
        pixels().read(payload, &[1, 3, 2, 2], &mut numbers).unwrap_err().to_string()
    };
    assert_eq!(says(&[]), "payload cut short");
    assert_eq!(says(&[2; 12]), "11 bytes are not 12 elements");
    assert_eq!(says(&[0; 13]), "12 bytes are not 12 elements");
    assert_eq!(says(&[1; 13]), "payload of the unknown form 1");
    let zeros = codec(Dtype::F32, true, Packing::Zeros);
    assert_eq!(zeros.check(&[2; 13], &[12]).unwrap_err(), CodecError::Form { found: 2 });
    // Codes without their scales, and the other way round.
    let codes = codec(Dtype::I4, false, Packing::Zeros);
    let read = codes.read_elements(&[1, 31, 0, 0, 0, 0], &mut [0; 9]);
    assert_eq!(read.unwrap_err(), CodecError::Scaled);
    let read = zeros.read_numbers(&[0; 5], 1, &mut [0.0]);
    assert_eq!(read.unwrap_err(), CodecError::Unscaled);
}

/// Features: half of them zero, of very different sizes.
fn features(signed: bool) -> impl Strategy<Value = Vec<f32>> {
    let number = prop_oneof![Just(0.0f32), 0.0f32..1.0, 0.0f32..1e4];
    let sign = prop_oneof![Just(1.0f32), Just(if signed { -1.0 } else { 1.0 })];
    proptest::collection::vec((number, sign).prop_map(|(x, sign)| x * sign), 0..200)
}

proptest! {
    #[test]
    fn numbers_arrive_as_training_rounds_them(
        (signed, numbers) in any::<bool>().prop_flat_map(|s| (Just(s), features(s))),
        four: bool, zeros: bool, run in 1usize..70,
    ) {
        let dtype = if four { Dtype::I4 } else { Dtype::I8 };
        let packing = if zeros { Packing::Zeros } else { Packing::None };
        let codec = codec(dtype, signed, packing);
        let numbers = &numbers[..numbers.len() / run * run];
        let payload = payload(codec, numbers, run);
        let mut arrived = vec![f32::NAN; numbers.len()];
        codec.read_numbers(&payload, run, &mut arrived).unwrap();
        let mut rounded = numbers.to_vec();
        codec.round(&mut rounded, run);
        prop_assert_eq!(&arrived, &rounded);
        let largest = codec.largest().unwrap();
        for (sent, arrived) in numbers.chunks(run).zip(arrived.chunks(run)) {
            let most = sent.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (sent, arrived) in sent.iter().zip(arrived) {
                prop_assert!((sent - arrived).abs() <= 0.5001 * most / largest);
            }
        }
        let shape = [numbers.len() / run, run];
        let bound = codec.bytes(&shape).unwrap();
        prop_assert!(payload.len() <= bound);
        prop_assert!(!codec.is_exact() || payload.len() == bound);
        prop_assert!(codec.check(&payload, &shape).is_ok());
    }

    #[test]
    fn elements_arrive_bit_by_bit(
        elements in proptest::collection::vec(prop_oneof![Just(0u16), any::<u16>()], 0..200),
        wide: bool, zeros: bool,
    ) {
        let dtype = if wide { Dtype::F32 } else { Dtype::F16 };
        let packing = if zeros { Packing::Zeros } else { Packing::None };
        let codec = codec(dtype, true, packing);
        let mut bytes: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        bytes.truncate(bytes.len() / 4 * 4);
        let mut payload = BytesMut::new();
        codec.put_elements(&bytes, &mut payload);
        let mut arrived = vec![7; bytes.len()];
        codec.read_elements(&payload, &mut arrived).unwrap();
        prop_assert_eq!(&arrived, &bytes);
        let bound = codec.bytes(&[bytes.len() * 8 / dtype.bits()]).unwrap();
        prop_assert!(payload.len() <= bound);
    }

    #[test]
    fn every_picture_is_found_by_its_pixels(
        mean in proptest::collection::vec(-1.0f32..2.0, 3),
        std in proptest::collection::vec(0.01f32..3.0, 3),
        seed: u8,
    ) {
        let normalisation = Normalisation { mean, std };
        let sent = picture(&normalisation, 256, seed.into());
        let pixels = Pixels::new(normalisation);
        let mut payload = BytesMut::new();
        pixels.put(&sent, &[1, 3, 16, 16], &mut payload);
        prop_assert_eq!(payload.len(), 1 + 3 * 256);
        let mut arrived = vec![0.0; sent.len()];
        pixels.read(&payload, &[1, 3, 16, 16], &mut arrived).unwrap();
        prop_assert_eq!(arrived, sent);
    }

    #[test]
    fn any_bytes_give_numbers_or_an_error(
        bytes in proptest::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..100),
        dtype in prop_oneof![
            Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::I8), Just(Dtype::I4),
        ],
        signed: bool, zeros: bool, count in 0usize..40, run in 0usize..9,
    ) {
        let packing = if zeros { Packing::Zeros } else { Packing::None };
        let codec = codec(dtype, signed, packing);
        let _ = codec.read_numbers(&bytes, run, &mut vec![0.0; count]);
        let _ = codec.read_elements(&bytes, &mut vec![0; count]);
        let _ = codec.check(&bytes, &[count]);
        let _ = pixels().read(&bytes, &[1, 3, count], &mut vec![0.0; 3 * count]);
        let mut again = BytesMut::new();
        let wild: Vec<f32> = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        codec.put_numbers(&wild, run, &mut again);
    }
}
