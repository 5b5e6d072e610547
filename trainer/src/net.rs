//! The separable ResNeXt or ResNet (section 3.1, Table 1), and the same with exchanges simulated (3.3).
//!
//! Takes images `[batch, channels, h, w]` and gives logits `[batch, classes]`: without exchange
//! ([`Network::forward`], what is exported) or under a policy ([`Network::forward_with`]). All G
//! groups live in one network whose channel axis is G blocks side by side; the classifier reads group 0, or
//! all ([`NetConfig::classified`]). Weights depend on the settings and the seed alone. Three ways to treat batch-norm
//! statistics are told apart by [`Stats`], because weights shared by many policies have no single
//! right ones.

mod pooled;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Initializer, Linear, PaddingConfig2d};
use burn::tensor::activation::relu;
use burn::tensor::module::{adaptive_avg_pool2d, batch_norm, batch_norm_train, conv2d};
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::RngExt;
use snn_schemas::Policy;

use crate::config::{NetConfig, STAGES};
use crate::exchange::{Exchange, Relaxed};
use crate::kernels::{self, ConvNormOptions};
use crate::seed::{Rng, rng};
use pooled::Pooled;

/// Which statistics batch norm uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stats {
    /// The stored ones: inference.
    Stored,
    /// Those of the batch itself; the stored ones stay. Judges a policy without re-estimating.
    Batch,
    /// Those of the batch; the stored ones move towards them by this fraction, 0 to 1.
    Update(f64),
}

/// A separable ResNeXt or ResNet; with one group the ordinary one.
#[derive(Module, Debug)]
pub struct Network {
    conv0: ConvNorm,
    blocks: Vec<Block>,
    pooled: Option<Pooled>,
    classifier: Linear,
    groups: usize,
    classified: usize,
}

/// One residual block, all groups side by side.
#[derive(Module, Debug)]
struct Block {
    reduce: ConvNorm,
    spatial: ConvNorm,
    expand: ConvNorm,
    shortcut: Option<ConvNorm>,
}

/// A convolution without bias, and its batch norm.
#[derive(Module, Debug)]
struct ConvNorm {
    conv: Conv2d,
    norm: BatchNorm,
}

impl Network {
    /// Builds the network with fresh weights: He's uniform initialisation, drawn from `seed`.
    ///
    /// `settings` must have passed its checks. On an autodiff device the network can be trained.
    pub fn new(settings: &NetConfig, seed: u64, device: &Device) -> Network {
        let mut draw = Draw { rng: rng(seed, "weights", 0), device };
        let NetConfig { groups, stem_channels, .. } = *settings;
        let conv0 = draw.conv_norm([settings.input[0], stem_channels], 3, 1, 1);
        let mut blocks = Vec::with_capacity(settings.blocks());
        let mut input = groups * stem_channels;
        for stage in 0..STAGES {
            let inner = (settings.cardinality * settings.path_width) << stage;
            let output = (groups * settings.trunk_width) << stage;
            for block in 0..settings.blocks_per_stage() {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let shape = [input, inner, output];
                blocks.push(draw.block(shape, stride, groups, settings.paths()));
                input = output;
            }
        }
        let classified = settings.classified();
        let read = input / groups * classified;
        let pooled = settings.pooled_norm.then(|| Pooled::new(read, device));
        let classifier = draw.linear(read, settings.classes);
        Network { conv0, blocks, pooled, classifier, groups, classified }
    }

    /// Logits `[batch, classes]` without any exchange, with stored statistics.
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        self.logits(images, None, Stats::Stored)
    }

    /// Logits `[batch, classes]` under `policy`.
    ///
    /// Step t sends the output of block tα + 1, after its ReLU and before anything received is
    /// added there, and adds it to the sum of block tα + α before that block's ReLU (equation 2).
    ///
    /// # Panics
    /// If the policy is for another number of groups or more steps than the trunk has.
    pub fn forward_with(&self, images: Tensor<4>, policy: &Policy, stats: Stats) -> Tensor<2> {
        assert_eq!(policy.groups, self.groups, "policy and network have different groups");
        self.logits(images, Some(Exchange { policy, relaxed: None }), stats)
    }

    /// The same under the steps `relaxed` of `policy`, which gradients flow into.
    pub(crate) fn forward_relaxed(
        &self,
        images: Tensor<4>,
        (policy, relaxed): (&Policy, &[Relaxed]),
        stats: Stats,
    ) -> Tensor<2> {
        self.logits(images, Some(Exchange { policy, relaxed: Some(relaxed) }), stats)
    }

    /// Trainable parameters: weights, batch norm's gamma and beta, and the classifier's bias.
    pub fn parameters(&self) -> usize {
        let mut count = Count { total: 0, stored: false };
        self.visit(&mut count);
        count.total
    }

    /// Channels, height and width of one group's output of each block, for images of this height and
    /// width.
    pub(crate) fn block_shapes(&self, [mut height, mut width]: [usize; 2]) -> Vec<[usize; 3]> {
        let mut shapes = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let [down, right] = block.spatial.conv.stride;
            (height, width) = (height.div_ceil(down), width.div_ceil(right));
            let channels = block.expand.conv.weight.dims()[0] / self.groups;
            shapes.push([channels, height, width]);
        }
        shapes
    }

    /// Where the weights lie.
    pub(crate) fn device(&self) -> Device {
        self.classifier.weight.device()
    }

    /// A copy without gradients. Unlike a clone it has batch-norm statistics of its own.
    pub fn inference(&self) -> Network {
        self.valid()
    }

    /// A copy to go on training, with batch-norm statistics of its own.
    pub(crate) fn copy(&self) -> Network {
        self.valid().train()
    }

    /// The same network, whose classifier has taken up what pooled features are normalised by.
    pub(crate) fn folded(mut self) -> Network {
        if let Some(pooled) = self.pooled.take() {
            let (pooled, classifier) = pooled.fold(self.classifier);
            (self.pooled, self.classifier) = (Some(pooled), classifier);
        }
        self
    }

    /// The same network as it is exported: nothing stands between pooling and classifier.
    pub(crate) fn plain(self) -> Network {
        Network { pooled: None, ..self.folded() }
    }

    fn logits(&self, images: Tensor<4>, exchange: Option<Exchange>, stats: Stats) -> Tensor<2> {
        let stem = self.conv0.forward(images, None, true, stats); // [batch, stem, h, w]
        let copies = match self.groups {
            1 => stem,
            groups => Tensor::cat(vec![stem; groups], 1), // [batch, G·stem, h, w]
        };
        let features = self.trunk(copies, exchange, stats); // [batch, G·out, h, w]
        let [batch, channels, height, width] = features.dims();
        let kept = channels / self.groups * self.classified;
        let read = match kept == channels {
            true => features,
            false => features.slice([0..batch, 0..kept, 0..height, 0..width]), // [batch, kept, h, w]
        };
        let pooled = adaptive_avg_pool2d(read, [1, 1]).reshape([batch, kept]); // [batch, kept]
        let pooled = match &self.pooled {
            Some(norm) => norm.forward(pooled, stats),
            None => pooled,
        };
        self.classifier.forward(pooled) // [batch, classes]
    }

    fn trunk(&self, mut x: Tensor<4>, exchange: Option<Exchange>, stats: Stats) -> Tensor<4> {
        let mut travelling = None;
        for (index, block) in self.blocks.iter().enumerate() {
            let step = exchange.and_then(|exchange| step_at(exchange, index));
            let sends = step.filter(|(exchange, step)| exchange.policy.sent_after(*step) == index);
            let adds = step.filter(|(exchange, step)| exchange.policy.added_in(*step) == index);
            let (shortcut, y) = block.paths(x, stats);
            let sum = |y, shortcut| block.expand.forward(y, Some(shortcut), false, stats);
            x = match (adds, travelling.take()) {
                // Sent and added in one block: the sum is needed before and after.
                (Some((exchange, step)), None) if sends.is_some() => {
                    let sum = sum(y, shortcut); // [batch, G·out, h, w]
                    relu(exchange.arrive(sum.clone(), relu(sum), step))
                }
                // While training the order of the additions does not matter, and this one is a pass
                // over memory less.
                (Some((exchange, step)), Some(sent)) if stats == Stats::Batch => {
                    let shortcut = exchange.arrive(shortcut, sent, step);
                    block.expand.forward(y, Some(shortcut), true, stats)
                }
                (Some((exchange, step)), Some(sent)) => {
                    relu(exchange.arrive(sum(y, shortcut), sent, step))
                }
                (_, in_flight) => {
                    travelling = in_flight;
                    block.expand.forward(y, Some(shortcut), true, stats)
                }
            };
            if sends.is_some() && adds.is_none() {
                travelling = Some(x.clone());
            }
        }
        x
    }
}

/// The step to whose α blocks block `index` belongs.
fn step_at(exchange: Exchange, index: usize) -> Option<(Exchange, usize)> {
    let step = index / exchange.policy.staleness;
    (step < exchange.policy.steps.len()).then_some((exchange, step))
}

impl Block {
    /// The shortcut, and the residual path up to its last convolution.
    fn paths(&self, x: Tensor<4>, stats: Stats) -> (Tensor<4>, Tensor<4>) {
        let shortcut = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x.clone(), None, false, stats),
            None => x.clone(),
        };
        let y = self.reduce.forward(x, None, true, stats); // [batch, C·d, h, w]
        (shortcut, self.spatial.forward(y, None, true, stats)) // [batch, C·d, h / stride, w / stride]
    }
}

/// From so many channels on [`kernels::same_conv`] pays on a GPU; the colours of an image are fewer.
const MANY: usize = 16;

impl ConvNorm {
    /// `norm(conv(x))`, plus `residual`, through a ReLU if `close`.
    fn forward(
        &self,
        x: Tensor<4>,
        residual: Option<Tensor<4>>,
        close: bool,
        stats: Stats,
    ) -> Tensor<4> {
        if stats == Stats::Batch && kernels::runs_on(&x.device()) {
            let norm = [self.norm.gamma.val(), self.norm.beta.val()];
            let options = ConvNormOptions {
                groups: self.conv.groups,
                stride: self.conv.stride[0],
                epsilon: self.norm.epsilon,
                relu: close,
            };
            return kernels::conv_norm(x, self.conv.weight.val(), norm, residual, options);
        }
        let y = self.normed(self.convolved(x, stats), stats);
        let y = match residual {
            Some(residual) => residual + y,
            None => y,
        };
        if close { relu(y) } else { y }
    }

    /// Grouped on the CPU, and with stored statistics, as it is exported. Elsewhere dense, with zeros
    /// between the groups: burn's GPU kernels are made for dense convolutions, and the gradient of a
    /// grouped one's weights takes a kernel a group.
    fn convolved(&self, x: Tensor<4>, stats: Stats) -> Tensor<4> {
        if stats == Stats::Stored || kernels::runs_on(&x.device()) {
            return self.conv.forward(x);
        }
        let Conv2d { groups, stride, dilation, .. } = self.conv;
        let weight = dense(self.conv.weight.val(), groups);
        let [_, inputs, kernel, _] = weight.dims();
        if kernel == 3 && stride == [1, 1] && inputs >= MANY {
            return kernels::same_conv(x, weight);
        }
        conv2d(x, weight, None, ConvOptions::new(stride, [kernel / 2; 2], dilation, 1))
    }

    fn normed(&self, x: Tensor<4>, stats: Stats) -> Tensor<4> {
        let (gamma, beta) = (self.norm.gamma.val(), self.norm.beta.val());
        let fraction = match stats {
            Stats::Stored => {
                let mean = self.norm.running_mean.value_sync();
                let variance = self.norm.running_var.value_sync();
                return batch_norm(x, gamma, beta, mean, variance, self.norm.epsilon);
            }
            // On a CPU it is part of the convolution's kernel.
            Stats::Batch => return kernels::batch_norm(x, [gamma, beta], self.norm.epsilon),
            Stats::Update(fraction) => fraction,
        };
        let normed = batch_norm_train(x, gamma, beta, self.norm.epsilon);
        if fraction > 0.0 {
            let towards = |stored: Tensor<1>, batch: Tensor<1>| {
                (stored * (1.0 - fraction) + batch.detach() * fraction).detach()
            };
            let (mean, variance) = (&self.norm.running_mean, &self.norm.running_var);
            mean.update(towards(mean.value_sync(), normed.mean));
            variance.update(towards(variance.value_sync(), normed.variance));
        }
        normed.output
    }
}

/// The weights `[out, in, k, k]` of the dense convolution that does what a grouped one with the weights
/// `[out, in / groups, k, k]` does.
fn dense(weight: Tensor<4>, groups: usize) -> Tensor<4> {
    if groups == 1 {
        return weight;
    }
    let [outputs, inputs, height, width] = weight.dims();
    let device = weight.device();
    let number = Tensor::<1, Int>::arange(0..groups as i64, &device);
    let own = number.clone().reshape([groups, 1, 1, 1]);
    let own = own.equal(number.reshape([1, 1, groups, 1])).float(); // [groups, 1, groups, 1]
    let weight = weight.reshape([groups, outputs / groups, 1, inputs * height * width]);
    (weight * own).reshape([outputs, groups * inputs, height, width])
}

/// Draws the weights of a new network, layer after layer.
struct Draw<'a> {
    rng: Rng,
    device: &'a Device,
}

impl Draw<'_> {
    fn block(
        &mut self,
        [input, inner, output]: [usize; 3],
        stride: usize,
        groups: usize,
        paths: usize,
    ) -> Block {
        Block {
            reduce: self.conv_norm([input, inner], 1, 1, groups),
            spatial: self.conv_norm([inner, inner], 3, stride, paths),
            expand: self.conv_norm([inner, output], 1, 1, groups),
            shortcut: (input != output || stride != 1)
                .then(|| self.conv_norm([input, output], 1, stride, groups)),
        }
    }

    fn conv_norm(
        &mut self,
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
        groups: usize,
    ) -> ConvNorm {
        let around = kernel / 2;
        let conv = Conv2dConfig::new(channels, [kernel, kernel])
            .with_stride([stride, stride])
            .with_padding(PaddingConfig2d::Explicit(around, around, around, around))
            .with_groups(groups)
            .with_bias(false)
            .with_initializer(Initializer::Zeros)
            .init(self.device);
        let fan_in = channels[0] / groups * kernel * kernel;
        let shape = [channels[1], channels[0] / groups, kernel, kernel];
        let weight = self.uniform(shape, (6.0 / fan_in as f32).sqrt());
        let norm = BatchNormConfig::new(channels[1]).init(self.device);
        ConvNorm { conv: Conv2d { weight, ..conv }, norm }
    }

    fn linear(&mut self, input: usize, output: usize) -> Linear {
        let bound = (1.0 / input as f32).sqrt();
        Linear {
            weight: self.uniform([input, output], bound),
            bias: Some(self.uniform([output], bound)),
        }
    }

    fn uniform<const D: usize>(&mut self, shape: [usize; D], bound: f32) -> Param<Tensor<D>> {
        let count = shape.iter().product();
        let values = (0..count).map(|_| self.rng.random_range(-bound..bound)).collect::<Vec<f32>>();
        Param::from_data(TensorData::new(values, shape), self.device)
    }
}

/// Counts parameters; the stored statistics are visited too, but are not trained.
struct Count {
    total: usize,
    stored: bool,
}

impl ModuleVisitor for Count {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.stored = name.starts_with("running_");
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.stored {
            self.total += param.lazy_shape().num_elements();
        }
    }
}

#[cfg(test)]
mod tests;
