//! Every kernel against the definition of a convolution, on every instruction set of the machine.

#![allow(clippy::unwrap_used, reason = "a test may end in a panic")]

use half::f16;
use proptest::prelude::*;

use super::*;

/// Numbers between −1 and 1 that follow from `seed`.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let number = |index: u64| {
        let mut z = seed.wrapping_add(index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count as u64).map(number).collect()
}

fn activated(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::None => x,
        Activation::Clamp { low, high } => x.max(low).min(high),
        Activation::Leaky { slope } if x < 0.0 => slope * x,
        Activation::Leaky { .. } => x,
        Activation::HardSwish => x * (x / 6.0 + 0.5).clamp(0.0, 1.0),
    }
}

/// The definition, in f64; all tensors planar, the result without halo.
fn naive(spec: &ConvSpec, x: &[f32], w: &[f32], bias: &[f32], addends: &[Vec<f32>]) -> Vec<f32> {
    let [height, width] = spec.extent().unwrap();
    let (inputs, outputs) = (spec.input / spec.groups, spec.output / spec.groups);
    let mut result = Vec::new();
    for image in 0..spec.batch {
        for (o, &bias) in bias.iter().enumerate() {
            for (y, x0) in (0..height).flat_map(|y| (0..width).map(move |x| (y, x))) {
                let mut sum = f64::from(bias);
                for i in 0..inputs {
                    let plane = image * spec.input + o / outputs * inputs + i;
                    for ky in 0..spec.kernel[0] {
                        for kx in 0..spec.kernel[1] {
                            let row = (y * spec.stride[0] + ky).checked_sub(spec.pads.top);
                            let column = (x0 * spec.stride[1] + kx).checked_sub(spec.pads.left);
                            let (Some(row), Some(column)) = (row, column) else { continue };
                            if row >= spec.image[0] || column >= spec.image[1] {
                                continue;
                            }
                            let at = (plane * spec.image[0] + row) * spec.image[1] + column;
                            let weight =
                                ((o * inputs + i) * spec.kernel[0] + ky) * spec.kernel[1] + kx;
                            sum += f64::from(x[at]) * f64::from(w[weight]);
                        }
                    }
                }
                for addend in addends {
                    sum += f64::from(addend[result.len()]);
                }
                result.push(activated(spec.activation, sum as f32));
            }
        }
    }
    result
}

/// Two workers, so that tasks really run at once.
struct Two;

impl Workers for Two {
    fn count(&self) -> usize {
        2
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for half in 0..2 {
                scope.spawn(move || (0..tasks).filter(|at| at % 2 == half).for_each(task));
            }
        });
    }
}

/// The definition of a blocked tensor; lanes beyond the last channel are no numbers.
fn blocks(planar: &[f32], channels: usize, pixels: usize, lanes: usize) -> Aligned {
    let batch = planar.len() / (channels * pixels);
    let mut to = Aligned::zeros(batch * channels.next_multiple_of(lanes) * pixels);
    for (at, to) in to.as_mut_slice().iter_mut().enumerate() {
        let (lane, pixel, block) = (at % lanes, at / lanes % pixels, at / lanes / pixels);
        let blocks = channels.div_ceil(lanes);
        let (image, channel) = (block / blocks, block % blocks * lanes + lane);
        *to = match channel < channels {
            true => planar[(image * channels + channel) * pixels + pixel],
            false => f32::NAN,
        };
    }
    to
}

/// And back.
fn planes(blocked: &[f32], channels: usize, pixels: usize, lanes: usize) -> Vec<f32> {
    let blocks = channels.div_ceil(lanes);
    let batch = blocked.len() / (blocks * pixels * lanes);
    let element = |at: usize| {
        let (pixel, channel, image) = (at % pixels, at / pixels % channels, at / pixels / channels);
        let block = image * blocks + channel / lanes;
        blocked[(block * pixels + pixel) * lanes + channel % lanes]
    };
    (0..batch * channels * pixels).map(element).collect()
}

/// Planar images with zeros around them.
fn surrounded(images: &[f32], image: [usize; 2], margin: Halo) -> Vec<f32> {
    let [height, width] = margin.around(image);
    let planes = images.len() / (image[0] * image[1]);
    let mut stored = vec![0.0; planes * height * width];
    for (plane, images) in images.chunks_exact(image[0] * image[1]).enumerate() {
        for (y, row) in images.chunks_exact(image[1]).enumerate() {
            let at = (plane * height + y + margin.top) * width + margin.left;
            stored[at..at + row.len()].copy_from_slice(row);
        }
    }
    stored
}

/// Runs `spec` on `isa`; the result planar, after a look at its halo.
fn run(spec: ConvSpec, isa: Isa, workers: &dyn Workers, addends: usize) -> (Vec<f32>, Vec<f32>) {
    let [height, width] = spec.extent().unwrap();
    let x = numbers(1, spec.batch * spec.input * spec.image[0] * spec.image[1]);
    let taps = spec.kernel[0] * spec.kernel[1];
    let weights = numbers(2, spec.output * spec.input / spec.groups * taps);
    let bias = numbers(3, spec.output);
    let added = |at: usize| numbers(4 + at as u64, spec.batch * spec.output * height * width);
    let added: Vec<Vec<f32>> = (0..addends).map(added).collect();
    let expected = naive(&spec, &x, &weights, &bias, &added);

    let lanes = isa.lanes();
    let conv = Conv::new(spec, isa, &weights, &bias).unwrap();
    let x = surrounded(&x, spec.image, spec.margin);
    let mut input = Aligned::zeros(x.len());
    input.as_mut_slice().copy_from_slice(&x);
    if !spec.planar {
        let pixels = spec.margin.around(spec.image).iter().product();
        input = blocks(&x, spec.input, pixels, lanes);
    }
    let added: Vec<Aligned> =
        added.iter().map(|added| blocks(added, spec.output, height * width, lanes)).collect();
    let mut addends: Vec<Addend<'_>> =
        added.iter().map(|added| Addend::Elements(added.as_slice())).collect();
    let mut output = Aligned::zeros(conv.output_len());
    output.as_mut_slice().fill(7.0);
    if let (Some(first), true) = (addends.first_mut(), spec.halo.is_none()) {
        // The first lies where the result will.
        output.as_mut_slice().copy_from_slice(added[0].as_slice());
        *first = Addend::Output;
    }
    conv.run(input.as_slice(), &addends, output.as_mut_slice(), workers).unwrap();
    let [tall, wide] = spec.halo.around([height, width]);
    let stored = planes(output.as_slice(), spec.output, tall * wide, lanes);
    (without(&stored, [height, width], spec.halo), expected)
}

/// Planar images without their halo, all of which must be 7.
fn without(stored: &[f32], [height, width]: [usize; 2], halo: Halo) -> Vec<f32> {
    let [tall, wide] = halo.around([height, width]);
    let mut found = Vec::new();
    for (at, &x) in stored.iter().enumerate() {
        let (row, column) = (at / wide % tall, at % wide);
        let inside = (halo.top..halo.top + height).contains(&row)
            && (halo.left..halo.left + width).contains(&column);
        if inside {
            found.push(x);
        } else {
            assert_eq!(x, 7.0, "halo at row {row}, column {column}");
        }
    }
    found
}

fn check(spec: ConvSpec, workers: &dyn Workers, addends: usize) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let (found, expected) = run(spec, isa, workers, addends);
        assert_eq!(found.len(), expected.len());
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (found - expected).abs();
            assert!(
                error <= 1e-4 * expected.abs().max(1.0),
                "{isa:?} at {at}: {found}, {expected}"
            );
        }
    }
}

fn halo(most: usize) -> impl Strategy<Value = Halo> {
    let side = 0..=most;
    (side.clone(), side.clone(), side.clone(), side).prop_map(|(top, left, bottom, right)| Halo {
        top,
        left,
        bottom,
        right,
    })
}

fn activation() -> impl Strategy<Value = Activation> {
    prop_oneof![
        Just(Activation::None),
        Just(Activation::Clamp { low: 0.0, high: f32::INFINITY }),
        Just(Activation::Clamp { low: -0.5, high: 0.5 }),
        Just(Activation::Leaky { slope: 0.1 }),
        Just(Activation::HardSwish),
    ]
}

/// Channels taken and given, and groups: dense, grouped at will, narrow and depthwise.
fn channels() -> impl Strategy<Value = (usize, usize, usize)> {
    prop_oneof![
        (1..70usize, 1..70usize).prop_map(|(input, output)| (input, output, 1)),
        (1..6usize, 1..24usize, 1..24usize).prop_map(|(groups, input, output)| (
            groups * input,
            groups * output,
            groups
        )),
        (1..20usize, prop_oneof![Just(1usize), Just(2), Just(4), Just(8), Just(16), Just(32)])
            .prop_map(|(groups, each)| (groups * each, groups * each, groups)),
    ]
}

fn spec() -> impl Strategy<Value = ConvSpec> {
    let image = [1..20usize, 1..40usize];
    let kernel = [1..6usize, 1..6usize];
    let shape = (channels(), image, kernel, [1..4usize, 1..4usize], halo(3));
    let rest = (1..3usize, [halo(2), halo(3)], any::<bool>(), activation());
    (shape, rest).prop_filter_map("smaller than its kernel", |(shape, rest)| {
        let ((input, output, groups), image, kernel, stride, pads) = shape;
        let (batch, [halo, margin], planar, activation) = rest;
        let spec = ConvSpec {
            batch,
            input,
            output,
            groups,
            image,
            margin,
            kernel,
            stride,
            pads,
            halo,
            planar,
            activation,
        };
        spec.extent().map(|_| spec)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn a_convolution_is_what_its_definition_says(spec in spec(), addends in 0..3usize) {
        check(spec, &Alone, addends);
    }

    #[test]
    fn a_3x3_of_even_extent_is_what_its_definition_says(
        spec in spec(),
        half in [1..14usize, 1..28usize],
        pads in halo(2),
        addends in 0..3usize,
        two in any::<bool>(),
    ) {
        // 2 + the input's side − 2 + padding must be even.
        let side = |half: usize, pads: usize| (2 * half + 2).checked_sub(pads).filter(|&side| side > 0);
        let image = [side(half[0], pads.top + pads.bottom), side(half[1], pads.left + pads.right)];
        let [Some(height), Some(width)] = image else { return Ok(()) };
        let image = [height, width];
        let spec = ConvSpec { image, pads, kernel: [3, 3], stride: [1, 1], planar: false, ..spec };
        check(spec, if two { &Two } else { &Alone }, addends);
    }

    #[test]
    fn several_workers_compute_what_one_does(spec in spec()) {
        check(spec, &Two, 1);
    }

    #[test]
    fn turning_is_what_its_definition_says(
        (batch, channels, pixels) in (1..3usize, 1..70usize, 1..200usize),
        (first, taken, more) in (0..70usize, 1..70usize, 0..20usize),
    ) {
        let x = numbers(9, batch * channels * pixels);
        let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
        let first = first % channels;
        let taken = taken.min(channels - first);
        let part = |x: &[f32]| -> Vec<f32> {
            let images = x.chunks_exact(channels * pixels);
            images.flat_map(|x| x[first * pixels..][..taken * pixels].to_vec()).collect()
        };
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let lanes = isa.lanes();
            let blocked = blocks(&x, channels, pixels, lanes);
            let sizes = [batch, taken, pixels];
            let mut back = vec![0.0; batch * taken * pixels];
            unblock(blocked.as_slice(), first, sizes, PlanarMut::F32(&mut back), isa).unwrap();
            prop_assert_eq!(&back, &part(&x));
            let mut rounded = vec![f16::ONE; back.len()];
            unblock(blocked.as_slice(), first, sizes, PlanarMut::F16(&mut rounded), isa).unwrap();
            let expected: Vec<f16> = back.iter().map(|&x| f16::from_f32(x)).collect();
            prop_assert_eq!(&rounded, &expected);

            // More channels than there are become zero, and so do the lanes behind them.
            let all = (channels + more).next_multiple_of(lanes);
            let mut to = Aligned::zeros(batch * all * pixels);
            for (from, exact) in [(Planar::F32(&x), true), (Planar::F16(&halves), false)] {
                to.as_mut_slice().fill(f32::NAN);
                block(from, [batch, channels, pixels], to.as_mut_slice(), isa).unwrap();
                let back = planes(to.as_slice(), all, pixels, lanes);
                for (at, &found) in back.iter().enumerate() {
                    let (image, channel) = (at / pixels / all, at / pixels % all);
                    let from = (image * channels + channel) * pixels + at % pixels;
                    let expected = match (channel < channels, exact) {
                        (false, _) => 0.0,
                        (true, true) => x[from],
                        (true, false) => halves[from].to_f32(),
                    };
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn a_sum_is_what_its_definition_says(
        (batch, channels, image) in (1..3usize, 1..70usize, [1..20usize, 1..40usize]),
        (halo, activation) in (prop_oneof![Just(Halo::default()), halo(2)], activation()),
        kinds in prop::collection::vec((0..4usize, 0..70usize), 1..=MOST_TERMS),
    ) {
        let pixels = image[0] * image[1];
        let spec = SumSpec { batch, channels, image, halo, activation };
        // For each term its channels, those behind them zero.
        let mut terms: Vec<(usize, usize, Vec<f32>)> = Vec::new();
        for (at, &(kind, fewer)) in kinds.iter().enumerate() {
            let own = if kind < 2 { channels } else { channels.saturating_sub(fewer) };
            let mut x = numbers(at as u64, batch * channels * pixels);
            for (at, x) in x.iter_mut().enumerate() {
                let lost = at / pixels % channels >= own;
                *x = if lost { 0.0 } else { f16::from_f32(*x).to_f32() };
            }
            terms.push((kind, own, x));
        }
        let expected: Vec<f32> = (0..batch * channels * pixels)
            .map(|at| {
                let sum = terms[1..].iter().fold(terms[0].2[at], |sum, term| sum + term.2[at]);
                activated(activation, sum)
            })
            .collect();
        let own = |(_, own, x): &(usize, usize, Vec<f32>)| -> Vec<f32> {
            let images = x.chunks_exact(channels * pixels);
            images.flat_map(|image| image[..own * pixels].to_vec()).collect()
        };
        let planar: Vec<Vec<f32>> = terms.iter().map(own).collect();
        let halves: Vec<Vec<f16>> = planar
            .iter()
            .map(|x| x.iter().map(|&x| f16::from_f32(x)).collect())
            .collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let lanes = isa.lanes();
            let sum = Sum::new(spec, isa).unwrap();
            let mut output = Aligned::zeros(sum.output_len());
            output.as_mut_slice().fill(7.0);
            let blocked: Vec<Aligned> =
                terms.iter().map(|term| blocks(&term.2, channels, pixels, lanes)).collect();
            let mut in_place = halo.is_none();
            let mut given = Vec::new();
            for (at, &(kind, channels, _)) in terms.iter().enumerate() {
                given.push(match kind {
                    0 if in_place => {
                        output.as_mut_slice().copy_from_slice(blocked[at].as_slice());
                        in_place = false;
                        Term::Result
                    }
                    0 | 1 => Term::Blocked(blocked[at].as_slice()),
                    2 => Term::Planar { elements: Planar::F32(&planar[at]), channels },
                    _ => Term::Planar { elements: Planar::F16(&halves[at]), channels },
                });
            }
            sum.run(&given, output.as_mut_slice(), &Two).unwrap();
            let stored = halo.around(image).iter().product();
            let found = planes(output.as_slice(), channels, stored, lanes);
            let found = without(&found, image, halo);
            prop_assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let most = 1e-6 * expected.abs().max(1.0);
                prop_assert!((found - expected).abs() <= most, "{isa:?}: {found}, {expected}");
            }
        }
    }
}

#[test]
fn every_tile_of_every_width() {
    for width in 1..40 {
        let strides = [1, 2].into_iter();
        let shapes = [(16, 1), (40, 1), (32, 8), (16, 16)].into_iter();
        for ((channels, groups), stride) in
            shapes.flat_map(|shape| strides.clone().map(move |stride| (shape, stride)))
        {
            let one = Halo { top: 1, left: 1, bottom: 1, right: 1 };
            let margin = if width % 2 == 0 { one } else { Halo::default() };
            let spec = ConvSpec {
                batch: 1,
                input: channels,
                output: channels,
                groups,
                image: [2, width],
                margin,
                kernel: [3, 3],
                stride: [1, stride],
                pads: one,
                halo: Halo::default(),
                planar: false,
                activation: Activation::None,
            };
            check(spec, &Alone, 1);
        }
    }
}

/// A worker that is given another convolution whenever it waits.
struct Busy(ConvSpec);

impl Workers for Busy {
    fn count(&self) -> usize {
        2
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(|at| {
            check(self.0, &Alone, 0);
            task(at);
        });
    }
}

#[test]
fn a_thread_that_waits_may_compute_another_convolution() {
    let one = Halo { top: 1, left: 1, bottom: 1, right: 1 };
    let spec = ConvSpec {
        batch: 1,
        input: 8,
        output: 8,
        groups: 1,
        image: [5, 5],
        margin: Halo::default(),
        kernel: [3, 3],
        stride: [1, 1],
        pads: one,
        halo: Halo::default(),
        planar: false,
        activation: Activation::None,
    };
    check(spec, &Busy(ConvSpec { image: [9, 9], ..spec }), 0);
}

#[test]
fn halves_are_rounded_to_nearest_even() {
    // 1 + 2⁻¹¹ lies between two halves and goes to the even one below, 1 + 3 · 2⁻¹¹ to the one above.
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let mut x = Aligned::zeros(isa.lanes());
        let ties = [1.0 + 0.000_488_281_25, 1.0 + 3.0 * 0.000_488_281_25];
        x.as_mut_slice()[..2].copy_from_slice(&ties);
        let mut halves = [f16::ZERO; 2];
        unblock(x.as_slice(), 0, [1, 2, 1], PlanarMut::F16(&mut halves), isa).unwrap();
        assert_eq!(halves.map(f16::to_bits), [0x3c00, 0x3c02]);
    }
}

#[test]
fn what_makes_no_convolution_is_refused() {
    let good = ConvSpec {
        batch: 1,
        input: 4,
        output: 4,
        groups: 2,
        image: [4, 4],
        margin: Halo::default(),
        kernel: [3, 3],
        stride: [1, 1],
        pads: Halo::default(),
        halo: Halo::default(),
        planar: false,
        activation: Activation::None,
    };
    let new = |spec| Conv::new(spec, Isa::Plain, &[0.0; 72], &[0.0; 4]);
    let conv = new(good).unwrap();
    let refused = |spec| new(spec).unwrap_err().to_string();
    assert_eq!(refused(ConvSpec { groups: 3, ..good }), "groups do not divide the channels");
    assert_eq!(refused(ConvSpec { stride: [0, 1], ..good }), "something is 0");
    assert_eq!(refused(ConvSpec { kernel: [5, 5], ..good }), "the kernel is larger than the image");
    assert_eq!(
        refused(ConvSpec { groups: 1, ..good }),
        "the weights has 72 elements, expected 144"
    );
    let input = vec![0.0; conv.input_len()];
    let error = conv.run(&input, &[], &mut [0.0; 7], &Alone).unwrap_err();
    assert_eq!(error.to_string(), "the output has 7 elements, expected 32");
}
