//! The network as ONNX, and back.
//!
//! [`write_onnx`] takes a trained network and gives the bytes of a plain ONNX model: the separable
//! network without any exchange, batch 1, its normalisation and class names in the metadata, its large
//! weights in either precision.
//! [`write_exchanging`] writes the same with a policy's exchanges as ordinary ops, so that any
//! engine can run what training simulated.
//! [`read_network`] takes such a file and gives the network again, to the bit: exported weights are
//! named by their place in the network.

mod halves;
mod rounding;

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Tensor, TensorData};
use burn_onnx::export::OnnxExporter;
use bytes::Bytes;
use snn_schemas::metadata::CLASSES;
use snn_schemas::onnx::{self, GraphProto, ModelProto, TensorProto};
use snn_schemas::{Dtype, Policy};

use crate::config::{Config, Weights};
use crate::data::Data;
use crate::error::TrainError;
use crate::judge::host;
use crate::net::{Network, Stats};
pub(crate) use halves::halved;
use rounding::{Sent, round};

/// Name of the exported model's input.
const INPUT: &str = "image";
/// Name of its output.
const OUTPUT: &str = "logits";

/// The ONNX model of `network`, for images `[1, channels, h, w]` of `data`, with its large weights rounded
/// to `weights`.
///
/// # Errors
/// The exporter meets an operation it does not know.
pub fn write_onnx(network: &Network, data: &Data, weights: Weights) -> Result<Vec<u8>, TrainError> {
    let mut model = write(network, data, Network::forward)?;
    if let (Some(graph), Weights::F16) = (&mut model.graph, weights) {
        halves::store(graph)?;
    }
    Ok(onnx::encode(&model))
}

/// The same in f32 with the exchanges of `policy` in it: a channel gather, a mask, the ops of how features
/// travel and an addition a step.
///
/// # Errors
/// As [`write_onnx`].
///
/// # Panics
/// If the policy is for another number of groups or more steps than the trunk has.
pub fn write_exchanging(
    network: &Network,
    policy: &Policy,
    data: &Data,
) -> Result<Vec<u8>, TrainError> {
    let [_, height, width] = data.test.shape();
    let shapes = network.block_shapes([height, width]);
    let sent = |step| Sent::of(policy, step, shapes[policy.sent_after(step)]);
    let steps: Vec<Sent> = (0..policy.steps.len()).filter_map(sent).collect();
    // The exporter knows neither casts between floats nor codes: they are put in where features arrive.
    let mut exact = Policy { dtype: Dtype::F32, ..policy.clone() };
    exact.steps.iter_mut().for_each(|step| step.wire.dtype = None);
    let mut model = write(network, data, |network, images| {
        network.forward_with(images, &exact, Stats::Stored)
    })?;
    if let Some(graph) = &mut model.graph {
        round(graph, &steps)?;
    }
    Ok(onnx::encode(&model))
}

fn write(
    network: &Network,
    data: &Data,
    forward: impl FnOnce(&Network, Tensor<4>) -> Tensor<2>,
) -> Result<ModelProto, TrainError> {
    let device = host();
    let network = network.inference().to_device(&device).plain();
    let [channels, height, width] = data.test.shape();
    let sample = Tensor::<4>::zeros([1, channels, height, width], &device);
    let exported = OnnxExporter::new().export(&network, sample, forward)?;
    let mut model = onnx::decode(Bytes::from(exported.into_bytes()))?;
    if let Some(graph) = &mut model.graph {
        rename(graph);
    }
    for (key, value) in data.normalisation.entries() {
        model.set_metadata(&key, &value);
    }
    model.set_metadata(CLASSES, &data.classes.join(","));
    Ok(model)
}

/// Names ops and tensors after their place in the network: `image`, `blocks.0.reduce.conv`,
/// `relu_14`, `logits`. The exporter numbers tensors through the life of the process, so that the
/// same network would give other bytes the second time.
fn rename(graph: &mut GraphProto) {
    let mut names = HashMap::new();
    for input in &mut graph.input {
        names.insert(input.name().to_owned(), INPUT.to_owned());
        input.name = Some(INPUT.to_owned());
    }
    let last = graph.output.first().map(|output| output.name().to_owned());
    for (index, node) in graph.node.iter_mut().enumerate() {
        let weight = node.input.iter().find(|input| input.contains('.')); // a module's path
        let module = weight.and_then(|path| path.rsplit_once('.')).map(|(module, _)| module);
        let kind = node.op_type().to_lowercase();
        let name = match module {
            // The classifier's bias is reshaped before it is added.
            Some(module) if kind != "reshape" => module.to_owned(),
            _ => format!("{kind}_{index}"),
        };
        for output in &mut node.output {
            let is_last = last.as_deref() == Some(output);
            let new = if is_last { OUTPUT.to_owned() } else { name.clone() };
            names.insert(std::mem::replace(output, new.clone()), new);
        }
        for input in &mut node.input {
            if let Some(new) = names.get(input) {
                input.clone_from(new);
            }
        }
        node.name = Some(name);
    }
    for output in &mut graph.output {
        output.name = Some(OUTPUT.to_owned());
    }
}

/// The network that [`write_onnx`] wrote, without gradients.
///
/// # Errors
/// The bytes are no ONNX model, or not that of the network that `config` describes.
pub fn read_network(bytes: Vec<u8>, config: &Config) -> Result<Network, TrainError> {
    let model = onnx::decode(Bytes::from(bytes))?;
    let initializers = model.graph.into_iter().flat_map(|graph| graph.initializer);
    let weights = initializers.map(|tensor| (tensor.name().to_owned(), tensor)).collect();
    let mut fill = Fill { weights, path: Vec::new(), wrong: None };
    let network = Network::new(&config.net, config.seed, &host()).plain().map(&mut fill);
    match fill.wrong {
        Some(reason) => Err(TrainError::Model(reason)),
        None => Ok(network),
    }
}

/// Puts an ONNX file's weights into a network.
struct Fill {
    weights: HashMap<String, TensorProto>,
    path: Vec<String>,
    wrong: Option<String>,
}

impl Fill {
    fn find(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
        let weight = self.weights.get(name).ok_or(format!("it has no weight \"{name}\""))?;
        let found: Vec<usize> = weight.dims.iter().map(|&size| size as usize).collect();
        if found != shape {
            return Err(format!("\"{name}\" is {found:?}, the settings make it {shape:?}"));
        }
        weight.to_f32().map_err(|error| format!("\"{name}\": {error}"))
    }
}

impl ModuleMapper for Fill {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.join(".");
        let (id, tensor, mapper) = param.consume();
        let shape = tensor.dims();
        let filled = match self.find(&name, &shape) {
            Ok(values) => Tensor::from_data(TensorData::new(values, shape), &tensor.device()),
            Err(reason) => {
                self.wrong.get_or_insert(reason);
                tensor
            }
        };
        Param::from_mapped_value(id, filled, mapper)
    }
}

#[cfg(test)]
mod tests {
    use snn_schemas::{Decision, Step};

    use super::*;
    use crate::engine::answers;
    use crate::judge::{calibrate, classify, judge_all, largest};

    /// Sums made in another order now and then decide to which code a feature is rounded: of two classes
    /// whose logits are as near as this either may be told.
    const EVEN: f32 = 1e-2;

    /// A small network for the digits, and the images.
    fn small() -> (Config, Data) {
        let mut config = Config::digits();
        config.net.trunk_width = 4;
        config.net.path_width = 2;
        config.net.stem_channels = 4;
        config.train.calibration = 128;
        let data = Data::load(&config, None).unwrap();
        (config, data)
    }

    /// Everybody sends to the next, less in each of the three steps, each step in a type of its own.
    fn cycle(config: &Config, dtypes: [Dtype; 3]) -> Policy {
        let next = Decision::new(vec![1, 2, 3, 0]).unwrap();
        let mut policy = Policy { steps: vec![], ..config.silent() };
        for (dtype, level) in dtypes.into_iter().zip([8, 4, 0]) {
            let mut step = Step::new(next.clone(), level);
            step.wire.dtype = Some(dtype);
            policy.steps.push(step);
        }
        policy
    }

    #[test]
    fn features_of_every_type_are_told_as_in_training() {
        let (config, data) = small();
        let mixed = [Dtype::I4, Dtype::F16, Dtype::I8];
        for dtypes in [[Dtype::F16; 3], [Dtype::I8; 3], [Dtype::I4; 3], mixed] {
            let policy = cycle(&config, dtypes);
            let network = Network::new(&config.net, 1, &host());
            calibrate(&network, &policy, &data.train, &config.train, None);
            let told = classify(&network, &policy, &data.test).unwrap();
            let model = write_exchanging(&network, &policy, &data).unwrap();
            let rows = answers(&model, &data.test, 10).unwrap();
            assert_eq!(rows.len(), told.len());
            for (index, (row, &told)) in rows.iter().zip(&told).enumerate() {
                let off = row[largest(row)] - row[told];
                assert!(off < EVEN, "{dtypes:?}: image {index}: {off}");
            }
            let others = rows.iter().zip(&told).filter(|(row, told)| largest(row) != **told);
            assert!(others.count() * 100 <= rows.len(), "{dtypes:?}");
        }
    }

    #[test]
    fn weights_of_half_precision_are_those_of_the_rounded_network() {
        let (config, data) = small();
        let silent = config.silent();
        let network = Network::new(&config.net, 1, &host());
        calibrate(&network, &silent, &data.train, &config.train, None);
        let rounded = halved(network.folded());
        let write = |weights| write_onnx(&rounded, &data, weights).unwrap();
        let (whole, half) = (write(Weights::F32), write(Weights::F16));
        let model = onnx::decode(Bytes::from(half.clone())).unwrap();
        let stored = model.graph.unwrap().initializer;
        let halves = stored.iter().filter(|tensor| tensor.name().ends_with(".weight"));
        assert!(halves.clone().all(|tensor| tensor.data_type() == 10));
        // A stem, three convolutions a block, a shortcut where their width changes, and the classifier.
        assert_eq!(halves.count(), 1 + 3 * config.net.blocks() + 2 + 1);

        // What is read from either is one network, and what either is told is that network's.
        let read = |bytes: &[u8]| read_network(bytes.to_vec(), &config).unwrap();
        let values = |network: &Network| {
            let (pixels, _) = data.test.batch(&[0, 1, 2, 3], &host());
            network.forward(pixels).try_into_vec_as::<f32>().unwrap()
        };
        assert_eq!(values(&read(&half)), values(&read(&whole)));
        let score = judge_all(&read(&half), &silent, &data.test, Stats::Stored).unwrap();
        assert_eq!(score, judge_all(&rounded, &silent, &data.test, Stats::Stored).unwrap());
        assert_eq!(
            answers(&half, &data.test, 10).unwrap(),
            answers(&whole, &data.test, 10).unwrap()
        );
    }
}
