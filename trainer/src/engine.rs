//! An ONNX file on images, run by tract: what a model is worth outside of this crate.
//!
//! Takes the bytes of any ONNX model that gives class logits for one image, and images; gives a
//! [`Score`]. Nothing of the network that was trained takes part.

use rayon::prelude::*;
use tract_onnx::prelude::*;

use crate::data::Dataset;
use crate::error::TrainError;
use crate::judge::{Score, largest};

/// Judges the ONNX model in `bytes`, whose input is `[1, channels, h, w]`, on all of `images`.
///
/// # Errors
/// tract cannot read or run it, or its output is not a logit for each of `classes` classes.
pub fn judge_onnx(bytes: &[u8], images: &Dataset, classes: usize) -> Result<Score, TrainError> {
    let rows = answers(bytes, images, classes)?;
    let labelled = || rows.iter().zip(images.labels());
    let correct = labelled().filter(|(row, label)| largest(row) == **label).count();
    let loss = labelled().map(|(row, &label)| cross_entropy(row, label)).sum::<f64>();
    Ok(Score { correct, images: images.len(), loss: loss / images.len().max(1) as f64 })
}

/// The logits that the model gives each image.
///
/// # Errors
/// As [`judge_onnx`].
pub(crate) fn answers(
    bytes: &[u8],
    images: &Dataset,
    classes: usize,
) -> Result<Vec<Vec<f32>>, TrainError> {
    let wrong = |error: TractError| TrainError::Model(one_line(&format!("{error:#}")));
    let [channels, height, width] = images.shape();
    let shape = [1, channels, height, width];
    let plan = tract_onnx::onnx()
        .model_for_read(&mut &*bytes)
        .and_then(|model| model.with_input_fact(0, f32::fact(shape).into()))
        .and_then(InferenceModelExt::into_optimized)
        .and_then(|model| model.into_runnable())
        .map_err(wrong)?;
    let answer = |index: usize| -> Result<Vec<f32>, TrainError> {
        let image = Tensor::from_shape(&shape, images.image(index)).map_err(wrong)?;
        let outputs = plan.run(tvec!(image.into())).map_err(wrong)?;
        let logits = outputs[0].to_plain_array_view::<f32>().map_err(wrong)?;
        let logits: Vec<f32> = logits.iter().copied().collect();
        match logits.len() == classes {
            true => Ok(logits),
            false => {
                let found = logits.len();
                Err(TrainError::Model(format!("gives {found} numbers, expected {classes}")))
            }
        }
    };
    (0..images.len()).into_par_iter().map(answer).collect()
}

/// −log of the softmax at `label`.
fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[label] - most)
}

/// tract's errors are a chain over several lines.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::data::Data;

    #[test]
    fn cross_entropy_is_that_of_the_softmax() {
        let logits = [1.0_f32, 2.0, 0.5];
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let expected = -(f64::from(logits[1]).exp() / sum).ln();
        assert!((cross_entropy(&logits, 1) - expected).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_model_is_one_line() {
        let data = Data::load(&Config::digits(), None).unwrap();
        let error = judge_onnx(b"no model", &data.test, 10).unwrap_err().to_string();
        assert!(error.starts_with("model: ") && error.lines().count() == 1, "{error}");
    }
}
