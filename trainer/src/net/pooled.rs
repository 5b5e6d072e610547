//! Pooled features, normalised while weights are fitted.
//!
//! Every exchange adds a group's features to another's, so that with each the trunk's features grow, up to twofold. What the
//! classifier reads counts twice in a step of gradient descent: a step changes an image's logits by the rate times the square of
//! its features' length. In a deep network with exchanges that is thousands at the usual rate, and its first steps
//! end its learning. [`Pooled`] takes features `[batch, features]` and gives them with mean 0 and one variance over the
//! batch, such that their length is [`LENGTH`] in the mean, however many there are and whatever was added to them.
//! [`Pooled::fold`] has a classifier take up the statistics, so that what is exported is the plain network.
//! Guarantee: once folded, it gives what it takes, to the bit.

use burn::module::{Module, RunningState};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};

use super::Stats;

/// Least variance that is divided by: a feature that never moves stays small.
const LEAST_VARIANCE: f32 = 1e-5;
/// Root of the mean square of an image's features taken together. At a rate of 0.1 the first steps then change logits by
/// about 1. Of 2, 4, 8 and √features, 4 learned fastest in every network tried, with exchanges and without (RESULTS.md).
const LENGTH: f32 = 4.0;

/// Statistics of the pooled features, `[features]` each.
#[derive(Module, Debug)]
pub(super) struct Pooled {
    running_mean: RunningState<Tensor<1>>,
    running_var: RunningState<Tensor<1>>,
}

impl Pooled {
    /// For so many features, as if they had mean 0 and the right length.
    pub(super) fn new(features: usize, device: &Device) -> Pooled {
        let root = root(features);
        Pooled {
            running_mean: RunningState::new(Tensor::zeros([features], device)),
            running_var: RunningState::new(Tensor::full([features], root * root, device)),
        }
    }

    /// `x` normalised, `[batch, features]`.
    pub(super) fn forward(&self, x: Tensor<2>, stats: Stats) -> Tensor<2> {
        let (mean, variance) = match stats {
            Stats::Stored => self.stored(),
            Stats::Batch | Stats::Update(_) => {
                let mean = x.clone().mean_dim(0); // [1, features]
                let variance = (x.clone() - mean.clone()).square().mean_dim(0); // [1, features]
                (mean, variance)
            }
        };
        if let Stats::Update(fraction) = stats {
            self.move_towards(mean.clone(), variance.clone(), fraction);
        }
        (x - mean) / divisor(variance)
    }

    /// The classifier that reads the features as they are, and the statistics of features that are read so.
    pub(super) fn fold(self, classifier: Linear) -> (Pooled, Linear) {
        let (mean, variance) = self.stored();
        let [_, features] = mean.dims();
        let scale = divisor(variance).recip(); // [1, features]
        let shift = (mean * scale.clone()).matmul(classifier.weight.val()); // [1, classes]
        let [_, classes] = shift.dims();
        let folded = Linear {
            weight: classifier.weight.map(|weight| weight * scale.reshape([features, 1])),
            bias: classifier.bias.map(|bias| bias.map(|bias| bias - shift.reshape([classes]))),
        };
        let device = folded.weight.device();
        (Pooled::new(features, &device), folded)
    }

    /// Mean and variance, `[1, features]` each.
    fn stored(&self) -> (Tensor<2>, Tensor<2>) {
        let row = |state: &RunningState<Tensor<1>>| state.value_sync().unsqueeze();
        (row(&self.running_mean), row(&self.running_var))
    }

    fn move_towards(&self, mean: Tensor<2>, variance: Tensor<2>, fraction: f64) {
        for (state, batch) in [(&self.running_mean, mean), (&self.running_var, variance)] {
            let batch = batch.detach().squeeze_dim::<1>(0);
            state.update((state.value_sync() * (1.0 - fraction) + batch * fraction).detach());
        }
    }
}

/// Root of the mean square of each of so many features of the right length together.
fn root(features: usize) -> f32 {
    LENGTH / (features as f32).sqrt()
}

/// What features of this variance are divided by, `[1, features]`.
fn divisor(variance: Tensor<2>) -> Tensor<2> {
    let [_, features] = variance.dims();
    variance.clamp_min(LEAST_VARIANCE).sqrt() / root(features)
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::tensor::{Distribution, TensorData};

    use super::*;
    use crate::judge::host;

    fn features(batch: usize, features: usize) -> Tensor<2> {
        let device = host();
        device.seed(1);
        let factors: Vec<f32> = (0..features).map(|feature| 0.1 + feature as f32).collect();
        let factors = Tensor::<1>::from_data(TensorData::new(factors, [features]), &device);
        let drawn = Tensor::random([batch, features], Distribution::Uniform(0.0, 3.0), &device);
        drawn * factors.unsqueeze()
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.try_into_vec_as().unwrap()
    }

    #[test]
    fn features_have_one_length_however_large_they_are() {
        for count in [3, 64, 1000] {
            let norm = Pooled::new(count, &host());
            let given = values(norm.forward(features(50, count), Stats::Batch).square().sum());
            assert!((given[0] / 50.0 - LENGTH * LENGTH).abs() < 1e-2, "{count}: {given:?}");
        }
    }

    #[test]
    fn a_folded_classifier_answers_as_before() {
        for count in [3, 64, 1000] {
            let x = features(50, count);
            let norm = Pooled::new(count, &host());
            norm.forward(x.clone(), Stats::Update(1.0));
            let drawn = |shape: [usize; 2]| {
                Tensor::<2>::random(shape, Distribution::Uniform(-1.0, 1.0), &host())
            };
            let linear = Linear {
                weight: Param::from_tensor(drawn([count, 10])),
                bias: Some(Param::from_tensor(drawn([1, 10]).reshape([10]))),
            };
            let before = values(linear.forward(norm.forward(x.clone(), Stats::Stored)));
            let (norm, folded) = norm.fold(linear);
            // To the bit: what is exported leaves it out.
            assert_eq!(values(norm.forward(x.clone(), Stats::Stored)), values(x.clone()));
            let after = values(folded.forward(x));
            let off = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-3, "{count}: {off}");
        }
    }
}
