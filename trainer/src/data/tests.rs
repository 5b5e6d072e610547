//! Images as the network takes them: their split, their normalisation, their changes.

use super::*;

#[test]
fn the_digits_split_by_seed_and_never_overlap() {
    let data = Data::load(&Config::digits(), None).unwrap();
    assert_eq!([data.train.len(), data.validation.len(), data.test.len()], [1078, 120, 599]);
    let again = Data::load(&Config::digits(), None).unwrap();
    assert_eq!(data.train.labels(), again.train.labels());
    assert_eq!(
        data.sha256,
        Data::load(&Config { seed: 2, ..Config::digits() }, None).unwrap().sha256
    );
    assert_eq!(data.sha256.len(), 64);
    let other = Data::load(&Config { seed: 2, ..Config::digits() }, None).unwrap();
    assert_ne!(data.validation.images(), other.validation.images());
    assert_eq!(data.test.labels(), other.test.labels());
    for digit in 0..10 {
        for part in [&data.train, &data.validation, &data.test] {
            assert!(part.labels().contains(&digit));
        }
    }
}

#[test]
fn training_images_have_mean_zero_and_deviation_one() {
    let data = Data::load(&Config::digits(), None).unwrap();
    let count = data.train.images().len() as f32;
    let mean = data.train.images().iter().sum::<f32>() / count;
    let square = data.train.images().iter().map(|x| x * x).sum::<f32>() / count;
    assert!(mean.abs() < 1e-3 && (square - 1.0).abs() < 1e-3, "{mean} {square}");
    let pixel = data.test.image(0)[3] * data.normalisation.std[0] + data.normalisation.mean[0];
    assert!((pixel * 16.0 - (pixel * 16.0).round()).abs() < 1e-3);
}

#[test]
fn a_moved_image_is_filled_with_black() {
    let dataset = Dataset {
        images: vec![1.0, 2.0, 3.0, 4.0],
        shape: [1, 2, 2],
        labels: vec![0],
        black: vec![-1.0],
        white: vec![1.0],
    };
    let mut moved = Vec::new();
    dataset.push_moved(dataset.image(0), 1, -1, &mut moved);
    assert_eq!(moved, [-1.0, 3.0, -1.0, -1.0]);
}

#[test]
fn a_quarter_turn_moves_every_pixel_and_zoom_spreads_from_the_middle() {
    let dataset = Dataset {
        images: (1..=9).map(|pixel| pixel as f32).collect(),
        shape: [1, 3, 3],
        labels: vec![0],
        black: vec![0.0],
        white: vec![1.0],
    };
    let warp = |angle: f64, scale: f64| {
        let mut warped = Vec::new();
        dataset.push_warped(dataset.image(0), [0, 0], (angle.to_radians(), scale), &mut warped);
        warped.iter().map(|pixel| (pixel * 1e4).round() / 1e4).collect::<Vec<f32>>()
    };
    assert_eq!(warp(0.0, 1.0), dataset.images);
    assert_eq!(warp(90.0, 1.0), [7.0, 4.0, 1.0, 8.0, 5.0, 2.0, 9.0, 6.0, 3.0]);
    assert_eq!(warp(0.0, 2.0), [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0]);
}

#[test]
fn mirroring_and_autoaugment_keep_what_they_should() {
    let config = Config::digits();
    let data = Data::load(&config, None).unwrap();
    let device = Device::flex();
    let batch = |most: &Augmentation, number: usize| {
        let (images, _) = data.train.augmented(&[0], most, &mut rng(1, "test", number), &device);
        images.try_into_vec_as::<f32>().unwrap()
    };
    let nothing = Augmentation { shift: 0, ..Augmentation::default() };
    assert_eq!(batch(&nothing, 0), data.train.image(0));
    let flip = Augmentation { flip: true, ..nothing };
    let mut mirror = data.train.image(0).to_vec();
    mirror.chunks_exact_mut(8).for_each(<[f32]>::reverse);
    let seen: Vec<bool> = (0..40)
        .map(|number| {
            let found = batch(&flip, number);
            assert!(found == mirror || found == data.train.image(0));
            found == mirror
        })
        .collect();
    assert!(seen.contains(&true) && seen.contains(&false));
}

#[test]
fn what_is_left_out_is_counted_and_the_first_named() {
    let mut data = Data::load(&Config::digits(), None).unwrap();
    assert_eq!(data.left_out(), None);
    data.skipped.push("0.png: broken".to_owned());
    assert_eq!(data.left_out().unwrap(), "1 image is left out: 0.png: broken");
    data.skipped.extend((1..5).map(|index| format!("{index}.png: broken")));
    let expected = "5 images are left out: 0.png: broken; 1.png: broken; 2.png: broken; and 2 more";
    assert_eq!(data.left_out().unwrap(), expected);
}

#[test]
fn a_network_for_other_images_is_refused() {
    let mut config = Config::digits();
    config.net.input = [3, 32, 32];
    let error = Data::load(&config, None).unwrap_err().to_string();
    assert!(error.contains("digits has images [1, 8, 8] of 10 classes"), "{error}");
}
