//! The kernels against burn's own layers, values and gradients.

use burn::tensor::activation::relu;
use burn::tensor::module::{batch_norm_train, conv2d};
use burn::tensor::ops::ConvOptions;
use rand::RngExt;
use snn_schemas::{Dtype, Policy};

use super::*;
use crate::seed::{Rng, rng};

/// Values between −1 and 2: about half of what a ReLU sees is cut off.
fn random<const D: usize>(shape: [usize; D], rng: &mut Rng) -> Tensor<D> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..2.0)).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

/// What gradients may differ by, relative to the largest of a tensor.
const TOLERANCE: f32 = 1e-4;

/// Result, then the gradients of x, weight, gamma, beta and residual.
type Found = Vec<(&'static str, Vec<f32>)>;

struct Layer {
    name: &'static str,
    groups: usize,
    channels: [usize; 2],
    kernel: usize,
    stride: usize,
    relu: bool,
    residual: bool,
}

/// Every kind of layer the network has, and sizes that fill no vector.
const LAYERS: [Layer; 8] = [
    Layer {
        name: "stem",
        groups: 1,
        channels: [3, 16],
        kernel: 3,
        stride: 1,
        relu: true,
        residual: false,
    },
    Layer {
        name: "reduce",
        groups: 4,
        channels: [16, 8],
        kernel: 1,
        stride: 1,
        relu: true,
        residual: false,
    },
    Layer {
        name: "spatial",
        groups: 4,
        channels: [16, 16],
        kernel: 3,
        stride: 1,
        relu: true,
        residual: false,
    },
    Layer {
        name: "strided",
        groups: 4,
        channels: [16, 16],
        kernel: 3,
        stride: 2,
        relu: true,
        residual: false,
    },
    Layer {
        name: "depthwise",
        groups: 8,
        channels: [8, 8],
        kernel: 3,
        stride: 2,
        relu: true,
        residual: false,
    },
    Layer {
        name: "expand",
        groups: 4,
        channels: [8, 20],
        kernel: 1,
        stride: 1,
        relu: true,
        residual: true,
    },
    Layer {
        name: "open",
        groups: 2,
        channels: [6, 10],
        kernel: 1,
        stride: 1,
        relu: false,
        residual: true,
    },
    Layer {
        name: "shortcut",
        groups: 2,
        channels: [6, 10],
        kernel: 1,
        stride: 2,
        relu: false,
        residual: false,
    },
];

impl Layer {
    fn run(&self, [height, width]: [usize; 2], by_kernels: bool) -> Found {
        let mut rng = rng(5, self.name, height);
        let [inputs, outputs] = self.channels;
        let x = random([5, inputs, height, width], &mut rng).require_grad();
        let shape = [outputs, inputs / self.groups, self.kernel, self.kernel];
        let weight = random(shape, &mut rng).require_grad();
        let gamma = random([outputs], &mut rng).require_grad();
        let beta = random([outputs], &mut rng).require_grad();
        let out = [5, outputs, height.div_ceil(self.stride), width.div_ceil(self.stride)];
        let residual = random(out, &mut rng).require_grad();
        let added = self.residual.then(|| residual.clone());
        let weighing = random(out, &mut rng);
        let Layer { groups, stride, relu: close, kernel, .. } = *self;
        let y = if by_kernels {
            let options = ConvNormOptions { groups, stride, epsilon: 1e-5, relu: close };
            conv_norm(x.clone(), weight.clone(), [gamma.clone(), beta.clone()], added, options)
        } else {
            let options = ConvOptions::new([stride; 2], [kernel / 2; 2], [1, 1], groups);
            let y = conv2d(x.clone(), weight.clone(), None, options);
            let y = batch_norm_train(y, gamma.clone(), beta.clone(), 1e-5).output;
            let y = match added {
                Some(residual) => y + residual,
                None => y,
            };
            if close { relu(y) } else { y }
        };
        let grads = (y.clone() * weighing).sum().backward();
        let vec4 = |tensor: Tensor<4>| tensor.try_into_vec_as::<f32>().unwrap();
        let vec1 = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
        let mut found = vec![
            ("out", vec4(y)),
            ("x", vec4(x.grad(&grads).unwrap())),
            ("weight", vec4(weight.grad(&grads).unwrap())),
            ("gamma", vec1(gamma.grad(&grads).unwrap())),
            ("beta", vec1(beta.grad(&grads).unwrap())),
        ];
        if self.residual {
            found.push(("residual", vec4(residual.grad(&grads).unwrap())));
        }
        found
    }
}

#[test]
fn results_and_gradients_are_those_of_burns_layers() {
    for layer in &LAYERS {
        for size in [[8, 8], [5, 7], [12, 9], [1, 2]] {
            let found = layer.run(size, true);
            for ((what, found), (_, expected)) in found.iter().zip(layer.run(size, false)) {
                let largest = expected.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(&expected) {
                    let off = (found - expected).abs() / largest;
                    assert!(
                        off < TOLERANCE,
                        "{} {size:?} {what}: {found}, not {expected}",
                        layer.name
                    );
                }
            }
        }
    }
}

#[test]
fn an_exchange_and_its_gradients_are_those_of_the_plain_formulation() {
    let text =
        br#"{"version":1,"groups":3,"staleness":1,"dtype":"f16","decisions":[[3,4],[1,0],[0,8]]}"#;
    let mut policy = Policy::from_json(text).unwrap();
    let mut rng = rng(5, "exchange", 0);
    let mut random = || random([4, 9, 3, 5], &mut rng).require_grad();
    for dtype in [Dtype::F16, Dtype::F32, Dtype::I8, Dtype::I4] {
        policy.dtype = dtype;
        for step in 0..2 {
            let (base, sent, weighing) = (random(), random(), random());
            let routes = Routes::new(&policy, step, 3).unwrap();
            let fast = exchange(base.clone(), sent.clone(), routes);
            let arrived = crate::exchange::received(sent.clone(), &policy, step).unwrap();
            let plain = base.clone() + arrived;
            let gradients = |out: Tensor<4>| {
                let grads = (out.clone() * weighing.clone()).sum().backward();
                [out, base.grad(&grads).unwrap(), sent.grad(&grads).unwrap()]
                    .map(|tensor| tensor.try_into_vec_as::<f32>().unwrap())
            };
            assert!(gradients(fast) == gradients(plain), "{dtype} step {step}");
        }
    }
    assert_eq!(Routes::new(&policy, 2, 3), None, "a silent step moves nothing");
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let layer = &LAYERS[5];
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| layer.run([12, 9], true))
    };
    assert!(with(1) == with(3));
}
